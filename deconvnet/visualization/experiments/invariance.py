"""The invariance experiment: how features change when the image is transformed (Zeiler and Fergus
2014, figure 5).

Images are shifted vertically, zoomed and rotated. The features of a low layer change with every
pixel; those of a high layer should stay the same as long as the image shows the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.visualization.drawing.canvas import (
    GAP,
    hstack,
    paragraph,
    resize_tiles,
    vstack,
    with_title,
)
from deconvnet.visualization.drawing.charts import CHART, color, legend_row, line_chart
from deconvnet.visualization.experiments.perturbation import (
    check_images,
    chunks,
    class_indices,
    class_probabilities,
    fill_values,
    layer_title,
    rotated,
    shifted,
    zoomed,
)
from deconvnet.visualization.projection.projector import Projector

Progress = Callable[[int, int], None]

TRANSFORMS = {"translation": shifted, "scale": zoomed, "rotation": rotated}
UNITS = {"translation": "pixels down", "scale": "factor", "rotation": "degrees"}
# The largest shift relative to the image: up to 60 of 224 pixels in the paper.
LARGEST_SHIFT = 60 / 224

BETWEEN = "between images"
EXAMPLES = 4
SMALLEST = 24
FRAME = 2


@dataclass(frozen=True)
class TransformCurves:
    """The effect of one transformation on N images, at each of T strengths.

    transform: its name in TRANSFORMS. strengths: (T,). distances: for every layer (N, T), the
    Euclidean distance between the features of the transformed and of the original image. relative:
    the same divided by the norm of the original's features: 0 means equal, 1 as far away as zero
    features; not finite if the original has none. probabilities: (N, T), of the class of each
    image; None if the model has no classes.
    """

    transform: str
    strengths: Tensor
    distances: dict[str, Tensor]
    relative: dict[str, Tensor]
    probabilities: Tensor | None


@dataclass(frozen=True)
class Invariance:
    """The curves of every transformation, and values to compare them with.

    between: for every layer, the mean distance between two different original images, relative like
    `TransformCurves.relative`; NaN for a single image. classes: (N,), the classes of the
    probabilities, or None.
    """

    curves: tuple[TransformCurves, ...]
    between: dict[str, float]
    classes: Tensor | None


def invariance(
    projector: Projector,
    x: Tensor,
    layers: Sequence[str],
    *,
    strengths: dict[str, Sequence[float]] | None = None,
    classes: Tensor | Sequence[int] | bool = True,
    fill: float | Tensor | None = None,
    progress: Progress | None = None,
) -> Invariance:
    """The changes of the features of these layers when images x (N, C, H, W) are transformed.

    strengths: "translation" in whole pixels, downwards if positive; "scale" as factors, which
    enlarge images if above 1; "rotation" in degrees, counter-clockwise. The default are those of
    the paper's figure, `default_strengths`; transformations that are not named are omitted. Images
    are transformed about their centre with bilinear interpolation. fill: the colour beyond the
    border, see `perturbation.fill_values`. classes: the true classes; True for the most likely
    classes of the originals; False for none.

    The paper plots a "canonical distance" that it does not define. Here the distance is relative to
    the norm of the original's features, so that layers and models can be compared.
    """
    check_images(x)
    strengths = default_strengths(x.shape[2]) if strengths is None else _checked(strengths)
    layers, fill = list(layers), fill_values(projector, x, fill)
    if not layers:
        raise ValueError("layers: name at least one")

    originals, base = _responses(projector, x, layers, classes is not False)
    if base is None and not isinstance(classes, bool):
        raise ValueError("classes: this model has none")
    indices = None if base is None else class_indices(base, None if classes is True else classes)

    done, total = 0, sum(map(len, strengths.values()))
    curves = []
    for transform, values in strengths.items():
        distances, class_values = {layer: [] for layer in layers}, []
        for value in values:
            transformed = TRANSFORMS[transform](x, value, fill)
            features, probabilities = _responses(projector, transformed, layers, base is not None)
            for layer in layers:
                distances[layer].append(_norm(features[layer] - originals[layer]))
            if base is not None:
                class_values.append(probabilities.gather(1, indices[:, None])[:, 0])
            done += 1
            if progress:
                progress(done, total)
        curve = {layer: torch.stack(values, 1) for layer, values in distances.items()}
        curves.append(
            TransformCurves(
                transform,
                torch.tensor(values, dtype=torch.float64),
                curve,
                {name: d / _norm(originals[name])[:, None] for name, d in curve.items()},
                torch.stack(class_values, 1) if class_values else None,
            )
        )
    between = {layer: _between(originals[layer]) for layer in layers}
    return Invariance(tuple(curves), between, indices)


def default_strengths(height: int) -> dict[str, list[float]]:
    """Shifts by up to 60 of 224 pixels, factors from 1 to 1.8, full turns, as in the paper."""
    shift = max(1, round(LARGEST_SHIFT * height))
    return {
        "translation": sorted({round(shift * step / 8) for step in range(-8, 9)}),
        "scale": [1 + step / 10 for step in range(9)],
        "rotation": [10.0 * step for step in range(36)],
    }


def invariance_picture(
    result: Invariance, pixels: Tensor, *, names: Sequence[str] | None = None
) -> Tensor:
    """A row for every transformation: transformed images, a chart of the distances in every layer,
    and a chart of the probability of the class if the model has classes.

    pixels: (N, 1 or 3, H, W) in [0, 1], the images; names: of the images. The frame and the lines
    of an image have one colour. The dashed line is the mean distance between two images.
    """
    count = len(next(iter(result.curves[0].distances.values())))
    names = [f"image {n}" for n in range(count)] if names is None else list(names)
    if len(pixels) != count or len(names) != count:
        raise ValueError(
            f"{len(pixels)} pictures and {len(names)} names: the curves are of {count} images"
        )
    pixels = pixels.detach().cpu().float().clamp(0, 1).expand(-1, 3, -1, -1)
    rows = []
    for curves in result.curves:
        shown = [
            (f"{layer_title(layer)}: distance / norm", curves.relative[layer], limits, between)
            for layer, between in result.between.items()
            for limits in [_limits(result, layer)]
        ]
        if curves.probabilities is not None:
            shown.append(("probability of the class", curves.probabilities, (0.0, 1.02), math.nan))
        charts = [
            with_title(
                title,
                line_chart(
                    curves.strengths,
                    list(zip(names, values, strict=True)),
                    xlabel=f"{curves.transform} ({UNITS[curves.transform]})",
                    limits=limits,
                    reference=(BETWEEN, between) if math.isfinite(between) else None,
                    legend=False,
                ),
            )
            for title, values, limits, between in shown
        ]
        rows.append(
            hstack([with_title(curves.transform, _examples(curves, pixels)), *charts], 2 * GAP)
        )
    dashed = BETWEEN if any(map(math.isfinite, result.between.values())) else None
    legend = legend_row(names, width=max(row.shape[2] for row in rows), reference=dashed)
    heading = (
        "Distance between the features of the transformed and the original image, divided by the "
        "norm of those of the original; 0: no change. The frame and the lines of an image have the "
        "same colour."
    )
    return vstack([paragraph(heading, 2 * CHART[1]), *rows, legend], 2 * GAP)


def _responses(
    projector: Projector, x: Tensor, layers: list[str], classes: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Features (N, M) of every layer, and probabilities (N, classes) if the model has classes."""
    features, probabilities = {layer: [] for layer in layers}, []
    for chunk in chunks(len(x), projector.batch):
        for layer, maps in projector.responses(x[chunk], layers).items():
            features[layer].append(maps.flatten(1).cpu())
        probabilities.append(class_probabilities(projector, x[chunk]) if classes else None)
    joined = {layer: torch.cat(parts) for layer, parts in features.items()}
    return joined, None if probabilities[0] is None else torch.cat(probabilities).cpu()


def _norm(features: Tensor) -> Tensor:
    """(N,): the Euclidean norms of features (N, M), summed in float64."""
    return torch.linalg.vector_norm(features, dim=1, dtype=torch.float64)


def _between(originals: Tensor) -> float:
    """The mean of |a - b| / |a| over all pairs of different images."""
    distances = sum(_norm(originals - other) for other in originals)
    pairs = len(originals) * (len(originals) - 1)
    return float((distances / _norm(originals)).sum() / pairs) if pairs else math.nan


def _checked(strengths: dict[str, Sequence[float]]) -> dict[str, list[float]]:
    for name, values in strengths.items():
        if name not in TRANSFORMS:
            raise ValueError(f"strengths: {name} is not one of {', '.join(TRANSFORMS)}")
        if len(values) == 0:
            raise ValueError(f"strengths: {name} has none; name at least one")
        if name == "translation" and any(value != int(value) for value in values):
            raise ValueError(f"strengths: translation by {list(values)}: expected whole pixels")
        if name == "scale" and any(value <= 0 for value in values):
            raise ValueError(f"strengths: scale by {list(values)}: expected factors above 0")
    if not strengths:
        raise ValueError(f"strengths: name at least one of {', '.join(TRANSFORMS)}")
    return {
        name: [int(v) if name == "translation" else float(v) for v in values]
        for name, values in strengths.items()
    }


def _limits(result: Invariance, layer: str) -> tuple[float, float]:
    """The limits of y, the same for all transformations so that they can be compared."""
    values = [curves.relative[layer].flatten() for curves in result.curves]
    values = torch.cat([*values, torch.tensor([result.between[layer]])])
    return 0.0, 1.05 * max(values[values.isfinite()].tolist(), default=0.0) or 1.0


def _examples(curves: TransformCurves, pixels: Tensor) -> Tensor:
    """A row for every image, in a frame of its colour, at four strengths from first to last."""
    chosen = torch.linspace(0, len(curves.strengths) - 1, EXAMPLES).round().long().unique()
    grey = pixels.new_full((1, 1, 1, 1), 0.5)
    size = max(SMALLEST, (CHART[0] - GAP) // len(pixels) - GAP - 2 * FRAME)
    rows = []
    for number, image in enumerate(pixels.split(1)):
        transformed = torch.cat(
            [TRANSFORMS[curves.transform](image, curves.strengths[t].item(), grey) for t in chosen]
        )
        h, w = transformed.shape[2:]
        tiles = resize_tiles(transformed.clamp(0, 1), max(1, size * w // max(h, w)))
        frame = color(number)[:, None, None].expand(
            3, tiles.shape[2] + 2 * FRAME, len(tiles) * (tiles.shape[3] + FRAME) + FRAME
        )
        row = frame.clone()
        for t, tile in enumerate(tiles):
            left = FRAME + t * (tiles.shape[3] + FRAME)
            row[:, FRAME:-FRAME, left : left + tiles.shape[3]] = tile
        rows.append(row)
    return vstack(rows, GAP)
