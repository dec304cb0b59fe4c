"""The correspondence experiment: do features represent the same part in different images (Zeiler
and Fergus 2014, section 4.4)?

Cover the left eye in several faces: if features represent parts, this changes the same features in
the same direction in every face, whereas covering random regions does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.visualization.drawing.canvas import GAP, paragraph, vstack
from deconvnet.visualization.drawing.charts import CHART, LEFT, bar_chart
from deconvnet.visualization.experiments.perturbation import (
    check_images,
    chunks,
    cover_boxes,
    fill_values,
    layer_title,
)
from deconvnet.visualization.projection.projector import Projector

Progress = Callable[[int, int], None]

RANDOM = "random"
# A change below this, relative to the strongest feature of an image, is rounding without a sign.
TOLERANCE = 1e-5
# The width of a group of bars, in pixels: room for the longest name of a layer.
GROUP = 150


@dataclass(frozen=True)
class CorrespondenceScore:
    """The differences between the feature changes of N images when a part of each is covered.

    distances: (D, N, N), the fraction of features that change with different signs in two images;
    D is 1, or the number of draws of the random control. changed: (D, N), the fraction of features
    that change at all. If few features change, most signs agree because both are zero, so a score
    is comparable only with scores of a similar fraction.
    """

    distances: Tensor
    changed: Tensor

    @property
    def mean(self) -> float:
        """Delta: the mean of the distances over all pairs of different images."""
        return float(_pairs(self.distances).mean())

    @property
    def deviation(self) -> float:
        """The standard deviation of the distances over the pairs; NaN for a single pair."""
        return float(_pairs(self.distances).std())

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN for fewer than three images.

        Pairs that share an image are not independent, so the deviation divided by the root of their
        number would be too small. The error is therefore estimated by the jackknife over images:
        sqrt((N - 1) / N * sum_i (mean without image i - mean of these means)^2).
        """
        N = self.distances.shape[-1]
        if N < 3:
            return math.nan
        subsets = [torch.arange(N) != n for n in range(N)]
        means = torch.stack([_pairs(self.distances[:, s][:, :, s]).mean() for s in subsets])
        return float(((N - 1) * means.var(correction=0)).sqrt())


def correspondence(
    projector: Projector,
    x: Tensor,
    parts: dict[str, Tensor],
    layers: Sequence[str],
    *,
    draws: int = 10,
    within: Tensor | None = None,
    generator: torch.Generator | None = None,
    fill: float | Tensor | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> dict[str, dict[str, CorrespondenceScore]]:
    """{part: {layer: score}} for images x (N, C, H, W) with covered parts, and for "random".

    parts: for every part, its boxes (N, 4) in the images: top, left, bottom, right. Let eps_i be
    the change of the features of image i when its box is covered. Then

        Delta = mean over i != j of H(sign eps_i, sign eps_j) / number of features

    where H is the Hamming distance of signs -1, 0 and 1. The paper defines a sum over the pairs,
    but the values it reports can only be such means.

    The control "random" covers boxes of the same sizes at random positions in their images, or
    inside the boxes `within` (N, 4), such as those of the objects. There are `draws` of them, with
    the sizes of the parts in turn; with draws=0 there is no control. fill: see
    `perturbation.fill_values`. A change of at most `tolerance` times the strongest feature of its
    image counts as none.
    """
    check_images(x)
    N, layers = len(x), list(layers)
    if N < 2:
        raise ValueError("1 image: a correspondence is between at least 2")
    if not parts or RANDOM in parts:
        raise ValueError(f"parts {', '.join(parts) or 'none'}: name some, none of them {RANDOM}")
    if not layers:
        raise ValueError("layers: name at least one")
    image = (x.shape[2], x.shape[3])
    parts = {name: _boxes(f"part {name}", boxes, N, image) for name, boxes in parts.items()}
    whole = torch.tensor([0, 0, *image]).expand(N, 4)
    within = whole if within is None else _boxes("within", within, N, image)
    generator = generator or torch.Generator().manual_seed(0)
    fill = fill_values(projector, x, fill)

    controls = [
        _moved(boxes, within, generator)
        for boxes in (list(parts.values())[draw % len(parts)] for draw in range(draws))
    ]
    scores = []
    for done, boxes in enumerate((*parts.values(), *controls), 1):
        signs = _signs(projector, x, cover_boxes(x, boxes, fill), layers, tolerance)
        scores.append({layer: _score(s) for layer, s in signs.items()})
        if progress:
            progress(done, len(parts) + len(controls))
    results = dict(zip(parts, scores, strict=False))
    if controls:
        drawn = scores[len(parts) :]
        results[RANDOM] = {layer: _merge([score[layer] for score in drawn]) for layer in layers}
    return results


def correspondence_picture(scores: dict[str, dict[str, CorrespondenceScore]]) -> Tensor:
    """A bar chart of the scores and their standard errors by layer, with a title; the control,
    random boxes, is grey."""
    layers = list(next(iter(scores.values())))
    bars = {
        part: [(by_layer[layer].mean, by_layer[layer].error) for layer in layers]
        for part, by_layer in scores.items()
    }
    size = (CHART[0], max(CHART[1], GROUP * len(layers) + LEFT))
    names = [layer_title(layer) for layer in layers]
    chart = bar_chart(
        bars, names, ylabel="fraction of signs that differ", size=size, plain=[RANDOM]
    )
    images = next(iter(next(iter(scores.values())).values())).distances.shape[-1]
    heading = (
        f"Covering a part of {images} images: how differently do their features change? Lower: the "
        "features represent the part. Bars: mean over pairs of images, and its standard error."
    )
    return vstack([paragraph(heading, chart.shape[2]), chart], GAP)


def correspondence_table(scores: dict[str, dict[str, CorrespondenceScore]]) -> str:
    """The scores as a Markdown table of means and standard errors, like table 1 of the paper."""
    layers = list(next(iter(scores.values())))
    lines = [f"| covered | {' | '.join(layers)} |", "|---" * (len(layers) + 1) + "|"]
    for part, by_layer in scores.items():
        cells = [f"{by_layer[layer].mean:.3f} ± {by_layer[layer].error:.3f}" for layer in layers]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _signs(
    projector: Projector, x: Tensor, covered: Tensor, layers: list[str], tolerance: float
) -> dict[str, Tensor]:
    """{layer: (N, M)}: -1, 0 or 1 for every feature that falls, stays or rises when x is covered.

    Both are computed in batches of the same size, because a convolution then rounds unchanged
    values in the same way.
    """
    signs = {layer: [] for layer in layers}
    for chunk in chunks(len(x), projector.batch):
        before, after = (projector.responses(y[chunk], layers) for y in (x, covered))
        for layer in layers:
            a, b = (features[layer].flatten(1).double() for features in (before, after))
            least = tolerance * a.abs().amax(1, keepdim=True)
            change = b - a
            signs[layer].append(torch.where(change.abs() > least, change.sign(), 0).char().cpu())
    return {layer: torch.cat(parts) for layer, parts in signs.items()}


def _score(signs: Tensor) -> CorrespondenceScore:
    """The score of signs (N, M)."""
    distances = torch.stack([(signs != other).double().mean(1) for other in signs])
    return CorrespondenceScore(distances[None], (signs != 0).double().mean(1)[None])


def _merge(scores: list[CorrespondenceScore]) -> CorrespondenceScore:
    return CorrespondenceScore(
        torch.cat([score.distances for score in scores]),
        torch.cat([score.changed for score in scores]),
    )


def _pairs(distances: Tensor) -> Tensor:
    """The entries of distances (D, N, N) above the diagonal: every pair once."""
    rows, columns = torch.triu_indices(*distances.shape[1:], offset=1)
    return distances[:, rows, columns]


def _moved(boxes: Tensor, within: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes (N, 4) of the same sizes at random positions inside others, with equal probability.

    A box that is longer than the enclosing one starts at the same position.
    """
    sizes = boxes[:, 2:] - boxes[:, :2]
    room = (within[:, 2:] - within[:, :2] - sizes).clamp(min=0) + 1
    moves = (torch.rand(len(boxes), 2, generator=generator, dtype=torch.float64) * room).long()
    first = within[:, :2] + moves
    return torch.cat([first, first + sizes], 1)


def _boxes(name: str, boxes: Tensor, N: int, image: tuple[int, int]) -> Tensor:
    boxes = torch.as_tensor(boxes).cpu()
    if boxes.shape != (N, 4) or boxes.dtype.is_floating_point:
        raise ValueError(
            f"{name}: boxes of shape {tuple(boxes.shape)} and {boxes.dtype}: expected ({N}, 4), "
            "top, left, bottom, right of each image in whole pixels"
        )
    limits = torch.tensor(image)
    bad = (boxes[:, :2] < 0) | (boxes[:, :2] >= boxes[:, 2:]) | (boxes[:, 2:] > limits)
    if bad.any():
        first = boxes[bad.any(1)][0].tolist()
        raise ValueError(
            f"{name}: box {first}: top < bottom <= {image[0]} and left < right <= {image[1]}"
        )
    return boxes.long()
