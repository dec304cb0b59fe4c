"""How far features move when the image does (Zeiler & Fergus 2014, section 4.1 and figure 5).

Images are shifted up and down, zoomed and rotated. The features of a low layer change with every
pixel; those of a high layer should not, as long as the image still shows the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
from deconvnet.visualization.pictures.canvas import GAP, hstack, resize_tiles, vstack, with_title
from deconvnet.visualization.pictures.charts import CHART, color, legend_row, line_chart
from deconvnet.visualization.projection.projector import Projector

Progress = Callable[[int, int], None]

TRANSFORMS = {"translation": shifted, "scale": zoomed, "rotation": rotated}
UNITS = {"translation": "pixels down", "scale": "factor", "rotation": "degrees"}
# The paper's figure shifts images of 224 pixels by up to 60.
REACH = 60 / 224

BETWEEN = "between images"
EXAMPLES = 4
SMALLEST = 24
FRAME = 2


@dataclass(frozen=True)
class TransformCurves:
    """What one transformation does to N images at each of T strengths.

    transform: its name in TRANSFORMS; strengths: (T,). distances: for every layer (N, T), the
    Euclidean distance of the features of the transformed image from those of the original;
    relative: the same in units of the norm of the original's features, so that 0 is the same and 1
    as far as no features at all (not finite where the original has none). probabilities: (N, T), of
    the class of each image; None if the model tells no classes.
    """

    transform: str
    strengths: Tensor
    distances: dict[str, Tensor]
    relative: dict[str, Tensor]
    probabilities: Tensor | None


@dataclass(frozen=True)
class Invariance:
    """The curves of every transformation, and what they can be compared with.

    between: for every layer the mean distance of an original to another original, in units of its
    own norm as `Curves.relative`; not a number for a single image. classes: (N,), the classes whose
    probabilities are told, or None.
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
    """How the features of some layers of images x (N, C, H, W) change as the images are moved.

    strengths: for "translation" whole pixels, downwards if positive; for "scale" factors, larger
    images if above 1; for "rotation" degrees, counter-clockwise; by default those of the paper's
    figure, `default_strengths`. Transformations that are not named are left out. Images are sampled
    bilinearly about their middle, and `fill` (see `experiments.grey`) comes in from beyond the
    border. classes: the true ones, or True for the most likely of the originals, or False for none.

    The paper plots a "canonical distance" without its definition. It is drawn here relative to the
    norm of the original's features, so that layers and models can be compared.
    """
    check_images(x)
    strengths = default_strengths(x.shape[2]) if strengths is None else _checked(strengths)
    layers, fill = list(layers), fill_values(projector, x, fill)
    if not layers:
        raise ValueError("layers: name at least one")

    originals, base = _answers(projector, x, layers, classes is not False)
    if base is None and not isinstance(classes, bool):
        raise ValueError("classes: this model tells none")
    true = None if base is None else class_indices(base, None if classes is True else classes)

    done, total = 0, sum(map(len, strengths.values()))
    curves = []
    for transform, values in strengths.items():
        distances, probable = {layer: [] for layer in layers}, []
        for value in values:
            moved = TRANSFORMS[transform](x, value, fill)
            found, answers = _answers(projector, moved, layers, base is not None)
            for layer in layers:
                distances[layer].append(_norm(found[layer] - originals[layer]))
            if base is not None:
                probable.append(answers.gather(1, true[:, None])[:, 0])
            done += 1
            if progress:
                progress(done, total)
        along = {layer: torch.stack(each, 1) for layer, each in distances.items()}
        curves.append(
            TransformCurves(
                transform,
                torch.tensor(values, dtype=torch.float64),
                along,
                {name: each / _norm(originals[name])[:, None] for name, each in along.items()},
                torch.stack(probable, 1) if probable else None,
            )
        )
    between = {layer: _between(originals[layer]) for layer in layers}
    return Invariance(tuple(curves), between, true)


def default_strengths(height: int) -> dict[str, list[float]]:
    """Shifts of up to 60 of 224 pixels, zooms of 1 to 1.8, full turns, as in the paper's figure."""
    reach = max(1, round(REACH * height))
    return {
        "translation": sorted({round(reach * step / 8) for step in range(-8, 9)}),
        "scale": [1 + step / 10 for step in range(9)],
        "rotation": [10.0 * step for step in range(36)],
    }


def invariance_picture(
    result: Invariance, pixels: Tensor, *, names: Sequence[str] | None = None
) -> Tensor:
    """For every transformation a row: images that undergo it, a chart of the distances in every
    layer, and one of the probability of the class if the model tells classes.

    pixels: (N, 1 or 3, H, W) in [0, 1], the images; names: of what they show. Each image has a
    colour, that of its frame and of its lines. Dashed: how far apart two of the images are.
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
                    list(zip(names, each, strict=True)),
                    xlabel=f"{curves.transform} ({UNITS[curves.transform]})",
                    limits=limits,
                    reference=(BETWEEN, between) if math.isfinite(between) else None,
                    legend=False,
                ),
            )
            for title, each, limits, between in shown
        ]
        rows.append(
            hstack([with_title(curves.transform, _examples(curves, pixels)), *charts], 2 * GAP)
        )
    dashed = BETWEEN if any(map(math.isfinite, result.between.values())) else None
    legend = legend_row(names, width=max(row.shape[2] for row in rows), reference=dashed)
    return vstack([*rows, legend], 2 * GAP)


def _answers(
    projector: Projector, x: Tensor, layers: list[str], classes: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Features (N, M) of every layer, and the probabilities (N, classes) if there are any."""
    features, answers = {layer: [] for layer in layers}, []
    for chunk in chunks(len(x), projector.batch):
        for layer, found in projector.responses(x[chunk], layers).items():
            features[layer].append(found.flatten(1).cpu())
        answers.append(class_probabilities(projector, x[chunk]) if classes else None)
    joined = {layer: torch.cat(each) for layer, each in features.items()}
    return joined, None if answers[0] is None else torch.cat(answers).cpu()


def _norm(features: Tensor) -> Tensor:
    """(N,): the Euclidean norms of features (N, M), summed in float64."""
    return torch.linalg.vector_norm(features, dim=1, dtype=torch.float64)


def _between(originals: Tensor) -> float:
    """The mean of |a - b| / |a| over all pairs of different images."""
    apart = sum(_norm(originals - one) for one in originals)
    pairs = len(originals) * (len(originals) - 1)
    return float((apart / _norm(originals)).sum() / pairs) if pairs else math.nan


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
    """Of y, the same for all transformations, so that they can be compared."""
    each = [curves.relative[layer].flatten() for curves in result.curves]
    each = torch.cat([*each, torch.tensor([result.between[layer]])])
    return 0.0, 1.05 * max(each[each.isfinite()].tolist(), default=0.0) or 1.0


def _examples(curves: TransformCurves, pixels: Tensor) -> Tensor:
    """A row for every image, in a frame of its colour: the least, two middle and the most moved."""
    chosen = torch.linspace(0, len(curves.strengths) - 1, EXAMPLES).round().long().unique()
    grey = pixels.new_full((1, 1, 1, 1), 0.5)
    size = max(SMALLEST, (CHART[0] - GAP) // len(pixels) - GAP - 2 * FRAME)
    rows = []
    for number, one in enumerate(pixels.split(1)):
        moved = torch.cat(
            [TRANSFORMS[curves.transform](one, curves.strengths[t].item(), grey) for t in chosen]
        )
        h, w = moved.shape[2:]
        tiles = resize_tiles(moved.clamp(0, 1), max(1, size * w // max(h, w)))
        frame = color(number)[:, None, None].expand(
            3, tiles.shape[2] + 2 * FRAME, len(tiles) * (tiles.shape[3] + FRAME) + FRAME
        )
        row = frame.clone()
        for t, tile in enumerate(tiles):
            left = FRAME + t * (tiles.shape[3] + FRAME)
            row[:, FRAME:-FRAME, left : left + tiles.shape[3]] = tile
        rows.append(row)
    return vstack(rows, GAP)
