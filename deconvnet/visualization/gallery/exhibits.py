"""What a gallery shows: layers, their maps with examples and relatives, images, and repainting.

These classes hold pictures and numbers, and know nothing of networks or of files. `sprites` defines
which types of pictures are accepted.

N images · K maps · k examples of a map · S side of a tile in pixels
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from deconvnet.visualization.gallery.sprites import Picture
from deconvnet.visualization.search.heat import Heat

Facts = Mapping[str, str | float]
# Top, left, bottom, right in pixels of an image, the last two exclusive.
Box = Sequence[int]


@dataclass(frozen=True)
class Example:
    """One activation of a map: the image it comes from, its value and its place.

    photograph: the number of the image in the `photographs` of the gallery, None if they do not
    contain it. unit: (row, column) in the map. box: the receptive field, clipped to the image;
    window: what the tiles show, which may reach beyond the image. border: whether the receptive
    field reaches beyond the image. share: the fraction of images with a weaker activation, for
    examples that are not among the strongest. heat: where in the image the map is active, to be
    shown over the photograph.
    """

    image: str
    value: float
    photograph: int | None = None
    unit: tuple[int, int] | None = None
    box: Box | None = None
    window: Box | None = None
    border: bool = False
    share: float | None = None
    heat: Heat | None = None


@dataclass(frozen=True)
class Histogram:
    """How many images have a strongest activation between consecutive edges.

    counts: (B,); edges: (B + 1,), ascending; silent: the number of further images, on which the map
    is never active.
    """

    counts: Sequence[int]
    edges: Sequence[float]
    silent: int = 0


@dataclass(frozen=True)
class Source:
    """A map of the layer below that a map is made of.

    maps: its number, or several if the layer pools over maps. weight: the norm of the filter with
    which it enters, or the share of the strongest activation that it contributes, as `sources_are`
    of the layer says. picture: its part of the projection, None if it is unknown.
    """

    maps: Sequence[int]
    weight: float
    picture: Picture | None = None


@dataclass(frozen=True)
class ProjectionSheet:
    """All projections of a map in one WebP picture, which the page shows as it is.

    content: of the file, the k projections by one method after the other, in the arrangement of
    `drawing.tile_sheet`. tile: (h, w) of each. contrast: by method, for each projection the factors
    by which the page raises its contrast where it is reduced to the size of a tile, and in full
    size: fine structure that averages to grey needs a larger one.
    """

    content: bytes
    tile: tuple[int, int]
    contrast: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class GalleryMap:
    """One map of a layer.

    examples: k of its strongest activations, strongest first. projections: by method, the projected
    examples (k, 3, S, S), the main method first; empty for a map that is never active. sheet: the
    same in full size; None if they are small. patches: the image at the same positions, (k, 3, S,
    S). label: the name of the map, such as that of a class.
    statistics: text or numbers; maps can be sorted by numbers, largest first. filter: (3, h, w).
    spectrum, spectrum_patches: further examples at lower activations, and the image there. similar:
    (number, cosine) of maps that look alike; coactive: (number, correlation) of maps that are
    active on the same images. sources: maps of the layer below. evolution: (E, 3, S, S), the map
    during training, with E labels in `epochs`.
    """

    number: int
    projections: Mapping[str, Picture] = dataclasses.field(default_factory=dict)
    patches: Picture | None = None
    examples: Sequence[Example] = ()
    sheet: ProjectionSheet | None = None
    label: str = ""
    statistics: Facts = dataclasses.field(default_factory=dict)
    filter: Picture | None = None
    spectrum: Sequence[Example] = ()
    spectrum_patches: Picture | None = None
    histogram: Histogram | None = None
    similar: Sequence[tuple[int, float]] = ()
    coactive: Sequence[tuple[int, float]] = ()
    sources: Sequence[Source] = ()
    evolution: Picture | None = None
    epochs: Sequence[str | int] = ()


@dataclass(frozen=True)
class Control:
    """Maps of the same layer in the control, the network with shuffled weights.

    projections: by map, the projected strongest activations (k, 3, S, S); None if the map is never
    active there.
    """

    projections: Mapping[int, Picture | None]


@dataclass(frozen=True)
class GalleryLayer:
    """One layer; its maps are read one at a time.

    shape: (K, H, W) of its maps; field, stride: (rows, columns) in pixels of the images; None if
    there is none, or if it is unknown. below: the name of the layer that `sources` refer to;
    sources_are: "weights" or "contributions"; similar_are: what `similar` of its maps compares,
    "pictures" or "filters". notes: sentences that a reader of its pictures should know.
    """

    name: str
    title: str
    maps: Iterable[GalleryMap]
    kind: str = ""
    shape: tuple[int, int, int] | None = None
    field: tuple[int, int] | None = None
    stride: tuple[int | Fraction, int | Fraction] | None = None
    facts: Facts = dataclasses.field(default_factory=dict)
    control: Control | None = None
    below: str | None = None
    sources_are: str = "weights"
    similar_are: str = "pictures"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """One activation of an image: its map, its value and its projection.

    box: the part of the image that `picture` shows; None if it shows the whole image.
    """

    map: int
    value: float
    picture: Picture
    box: Box | None = None


@dataclass(frozen=True)
class Repainting:
    """A reconstruction as the sum of separate activations, for the page to repaint.

    image: (C, H, W) float, the preprocessed image. tiles: U arrays (C, h, w), the projections of
    the strongest activations, each cropped to its box; boxes: (U, 4); maps, values: (U,). groups:
    (first, last, picture (C, H, W)) of the next ranks, from 1, that are projected together; rest:
    (C, H, W), what all of these leave of the reconstruction. total: of the activations. rgb: (3,
    C), from the planes to signed RGB. white: the magnitude that is shown as white.
    """

    image: np.ndarray
    rest: np.ndarray
    tiles: Sequence[np.ndarray]
    boxes: Sequence[Box]
    maps: Sequence[int]
    values: Sequence[float]
    rgb: np.ndarray
    white: float
    total: int
    groups: Sequence[tuple[int, int, np.ndarray]] = ()


@dataclass(frozen=True)
class ImageLayer:
    """An image in one layer.

    name: of the layer; reconstruction: of the image by the layer, None if there is none; maps:
    (number, picture) of the strongest maps, strongest first, black where they are zero; parts: the
    strongest activations, strongest first; repainting: of the reconstruction, if there is one.
    """

    name: str
    reconstruction: Picture | None = None
    facts: Facts = dataclasses.field(default_factory=dict)
    maps: Sequence[tuple[int, Picture]] = ()
    parts: Sequence[Part] = ()
    repainting: Repainting | None = None


@dataclass(frozen=True)
class GalleryImage:
    """An image in the explorer; picture: (3, H, W), cropped as for the network.

    photograph: its number in the `photographs` of the gallery, None if they do not contain it.
    """

    name: str
    picture: Picture
    layers: Sequence[ImageLayer] = ()
    photograph: int | None = None


@dataclass(frozen=True)
class Figure:
    """A picture of its own; caption: a sentence or two on what it shows."""

    picture: Picture
    caption: str
