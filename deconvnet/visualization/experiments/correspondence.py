"""Whether a model takes the same part of different images for the same (Zeiler & Fergus 2014, 4.4).

Cover the left eye in every one of some faces: if the features stand for parts, covering it changes
the same features, in the same direction, in all of them. Covering anything does not.
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
    cover_boxes,
    fill_values,
    layer_title,
)
from deconvnet.visualization.pictures.charts import CHART, LEFT, bar_chart
from deconvnet.visualization.projection.projector import Projector

Progress = Callable[[int, int], None]

RANDOM = "random"
# Relative to an image's strongest feature; a change below it is rounding, and has no sign.
TOLERANCE = 1e-5
GROUP = 120


@dataclass(frozen=True)
class CorrespondenceScore:
    """How differently the features of N images change as a part of each is covered.

    distances: (D, N, N), the share of features whose change has another sign in one image than in
    another; D = 1, or the number of draws of the random control. changed: (D, N), the share of
    features that change at all: where few do, signs agree for want of any, so a score is to be
    compared with one of a similar share.
    """

    distances: Tensor
    changed: Tensor

    @property
    def mean(self) -> float:
        """Delta: the mean of the distances over all pairs of different images."""
        return float(_pairs(self.distances).mean())

    @property
    def deviation(self) -> float:
        """The standard deviation of the distances over the pairs; of one pair not a number."""
        return float(_pairs(self.distances).std())

    @property
    def error(self) -> float:
        """The standard error of the mean; of fewer than three images not a number.

        Pairs that share an image are not independent, as the deviation over the root of their
        number would have it. So it is found by leaving out one image at a time (the jackknife):
        sqrt((N - 1) / N * sum_i (mean without image i - mean of these means)^2).
        """
        N = self.distances.shape[-1]
        if N < 3:
            return math.nan
        kept = [torch.arange(N) != n for n in range(N)]
        means = torch.stack([_pairs(self.distances[:, k][:, :, k]).mean() for k in kept])
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
    """{part: {layer: score}} of images x (N, C, H, W) in which parts are covered, and of "random".

    parts: for every part its box (N, 4) in each image, as top, left, bottom, right. With eps_i the
    change of the features of image i as its box is covered,

        Delta = mean over i != j of H(sign eps_i, sign eps_j) / number of features

    with H the number of entries that differ (of signs -1, 0 and 1). The paper writes a sum over the
    pairs and reports values that can only be means such as this.

    The control "random" has the boxes of a part, one part after the other, moved to random places
    of their images, or within the boxes `within` (N, 4), such as those of the objects, `draws`
    times; with draws=0 there is none. A change counts as none
    where it is at most `tolerance` of the strongest feature of its image.
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
        scores.append({layer: _score(each) for layer, each in signs.items()})
        if progress:
            progress(done, len(parts) + len(controls))
    found = dict(zip(parts, scores, strict=False))
    if controls:
        drawn = scores[len(parts) :]
        found[RANDOM] = {layer: _together([score[layer] for score in drawn]) for layer in layers}
    return found


def correspondence_picture(scores: dict[str, dict[str, CorrespondenceScore]]) -> Tensor:
    """Bars of every part in every layer with their standard errors, the control in grey."""
    layers = list(next(iter(scores.values())))
    bars = {
        part: [(each[layer].mean, each[layer].error) for layer in layers]
        for part, each in scores.items()
    }
    size = (CHART[0], max(CHART[1], GROUP * len(layers) + LEFT))
    names = [layer_title(layer) for layer in layers]
    return bar_chart(bars, names, ylabel="share of signs that differ", size=size, plain=[RANDOM])


def correspondence_table(scores: dict[str, dict[str, CorrespondenceScore]]) -> str:
    """The scores as a table in Markdown, mean and standard error as in the paper's table 1."""
    layers = list(next(iter(scores.values())))
    lines = [f"| covered | {' | '.join(layers)} |", "|---" * (len(layers) + 1) + "|"]
    for part, each in scores.items():
        cells = [f"{each[layer].mean:.3f} ± {each[layer].error:.3f}" for layer in layers]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _signs(
    projector: Projector, x: Tensor, covered: Tensor, layers: list[str], tolerance: float
) -> dict[str, Tensor]:
    """{layer: (N, M)}: -1, 0 or 1 for every feature that falls, stays or rises as x is covered.

    Both in the same batches: a convolution then rounds in the same way where nothing has changed.
    """
    signs = {layer: [] for layer in layers}
    for chunk in chunks(len(x), projector.batch):
        before, after = (projector.responses(y[chunk], layers) for y in (x, covered))
        for layer in layers:
            a, b = (found[layer].flatten(1).double() for found in (before, after))
            least = tolerance * a.abs().amax(1, keepdim=True)
            change = b - a
            signs[layer].append(torch.where(change.abs() > least, change.sign(), 0).char().cpu())
    return {layer: torch.cat(each) for layer, each in signs.items()}


def _score(signs: Tensor) -> CorrespondenceScore:
    """Of signs (N, M)."""
    distances = torch.stack([(signs != one).double().mean(1) for one in signs])
    return CorrespondenceScore(distances[None], (signs != 0).double().mean(1)[None])


def _together(scores: list[CorrespondenceScore]) -> CorrespondenceScore:
    return CorrespondenceScore(
        torch.cat([score.distances for score in scores]),
        torch.cat([score.changed for score in scores]),
    )


def _pairs(distances: Tensor) -> Tensor:
    """The entries of (D, N, N) above the diagonal: every pair once."""
    rows, columns = torch.triu_indices(*distances.shape[1:], offset=1)
    return distances[:, rows, columns]


def _moved(boxes: Tensor, within: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes (N, 4) of the same sizes at random places within others, all places as likely.

    A box that is longer than the one that it is to lie in starts where that one does.
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
