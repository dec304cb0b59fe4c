"""The layers of a network that can be visualized, and the default choice among them."""

from __future__ import annotations

import re

from torch import Tensor

from deconvnet.visualization.projection.projection import CONCEPTS, LayerInfo
from deconvnet.visualization.projection.projector import Projector

# Modules without their own features: their units are those of the previous layer, elsewhere.
MOVING = re.compile(r"pool|flatten|pad|permute|upsample", re.IGNORECASE)
# Modules that change features little or not at all.
PASSING = re.compile(r"dropout|drop_?path|stochasticdepth|identity|layer_?norm", re.IGNORECASE)
RECTIFIER = re.compile(r"relu|elu$|silu|swish|mish|^act", re.IGNORECASE)
MOST_LAYERS = 6
# Blocks shown of a network whose maps all have one size, if it has at least so many.
BLOCKS = 4


def projectable_layers(projector: Projector, image: Tensor) -> list[LayerInfo]:
    """`Projector.layers` for an image (3, H, W) in [0, 1]; ValueError if the model fails on it."""
    return projector.layers(projector.prepare(image[None]))


def default_layers(infos: list[LayerInfo]) -> list[str]:
    """All layers of a deconvolutional network; of a CNN, the ends of its stages, at most six, or
    only the concepts of a dictionary over one of its layers.

    A stage is what has maps of one size. Its end is its last output outside the block in which the
    size falls: the last ReLU before a pooling, or the last of the blocks that have this size, but
    not the first layers of the next block, in front of its stride. A network with few rectifiers
    is shown at each of them, and one with many blocks of a single size, such as a vision
    transformer, at blocks after each quarter of its depth. Vectors and modules that only pass on or
    normalise features are ignored.
    """
    if all(info.kind == "Layer" for info in infos):
        return [info.name for info in infos]
    if concepts := [info.name for info in infos if info.kind == CONCEPTS]:
        return concepts
    features = _features(infos)
    sizes = dict.fromkeys(infos[n].shape[1:] for n in features)
    if len(sizes) == 1 and len(blocks := _blocks(infos, features)) >= BLOCKS:
        return [infos[blocks[len(blocks) * n // BLOCKS - 1]].name for n in range(1, BLOCKS + 1)]
    ends = [end for size in sizes if (end := _end_of_stage(infos, features, size)) is not None]
    ends = sorted(ends)[:MOST_LAYERS]
    # A rectifier that ends a block has the output of the block.
    rectifiers = [n for n in features if RECTIFIER.search(infos[n].kind)]
    rectifiers = [n for n in rectifiers if not any(_is_end_of(infos, n, end) for end in ends)]
    every = sorted({*ends, *rectifiers})
    return [infos[n].name for n in (every if len(every) <= MOST_LAYERS else ends)]


def _features(infos: list[LayerInfo]) -> list[int]:
    """The indices of layers with maps of their own: neither vectors nor modules that only pass on
    features, nor modules that end with a pooling."""
    indices = []
    previous: LayerInfo | None = None  # the previous module, if it only moves features
    for index, info in enumerate(infos):
        is_part = previous and previous.name.startswith(f"{info.name}.")
        ends = is_part and previous.shape == info.shape
        previous = info if ends or MOVING.search(info.kind) else None
        if previous is None and min(info.shape[1:]) > 1 and not PASSING.search(info.kind):
            indices.append(index)
    return indices


def _blocks(infos: list[LayerInfo], features: list[int]) -> list[int]:
    """The indices of the longest series of modules that are numbered, of one kind and made of other
    modules; of series of equal length the outermost."""
    series: dict[tuple[str, str], list[int]] = {}
    for index in features:
        info = infos[index]
        prefix = info.name.rstrip("0123456789")
        contains = index > 0 and infos[index - 1].name.startswith(f"{info.name}.")
        if prefix != info.name and contains:
            series.setdefault((prefix, info.kind), []).append(index)
    ordered = sorted(series, key=lambda key: (-len(series[key]), key[0].count(".")))
    return series[ordered[0]] if ordered else []


def _end_of_stage(infos: list[LayerInfo], features: list[int], size: tuple[int, int]) -> int | None:
    """The index of the last layer with maps of this size outside the block in which it falls."""
    stage = [index for index in features if infos[index].shape[1:] == size]
    later = range(stage[-1] + 1, len(infos))
    falls = next((index for index in later if infos[index].shape[1] < size[0]), None)
    if falls is None:
        return stage[-1]
    for block in _modules_around(infos[falls].name):
        # Not a module that contains whole stages.
        sizes = {infos[n].shape[1:] for n in features if _is_in(infos[n].name, block)}
        if len(sizes) > 2:
            continue
        outside = [index for index in stage if not _is_in(infos[index].name, block)]
        if outside:
            return outside[-1]
        if any(_is_in(infos[index].name, block) for index in features if index > falls):
            # The block belongs to the next stage: this one has only a pooling.
            return None
    return None


def _modules_around(name: str) -> list[str]:
    """A module and the modules that contain it, the outermost first."""
    parts = name.partition("#")[0].split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _is_in(name: str, module: str) -> bool:
    return name.partition("#")[0] == module or name.startswith(f"{module}.")


def _is_end_of(infos: list[LayerInfo], index: int, end: int) -> bool:
    """Whether a layer is the last one of a module, whose output it gives."""
    between = infos[index + 1 : end + 1]
    same = infos[index].shape == infos[end].shape
    return same and all(infos[index].name.startswith(f"{info.name}.") for info in between)
