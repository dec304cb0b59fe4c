"""The gallery: a folder with a web page that shows a network, layer by layer and map by map.

`index.html` opens as a file, without a server and without internet access. Next to it are

    gallery.css, gallery.js     appearance and behaviour
    layers/<n>-<name>/          for each layer: sheets with one tile of every map, maps.js with the
                                data of the maps, and sheets for each map
    images/<n>/                 for each image: the picture, its reconstructions, maps and parts
    figures/                    other pictures

A page opened as a file may not read other files, but it may show pictures and run scripts. The data
of the maps are therefore small scripts, loaded when a layer or an image is opened, and tiles are in
sprite sheets, one per layer or map instead of one file per tile.

`sprites` defines which types of pictures are accepted.

N images · K maps · k tiles of a map · S side of a tile in pixels
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deconvnet.images.decoding import shown_name
from deconvnet.storage import ownership
from deconvnet.visualization.gallery.sprites import (
    GAP,
    Picture,
    check_picture,
    sprite_style,
    to_tile,
    to_tiles,
    write_picture,
    write_sprite_sheet,
)

log = logging.getLogger(__name__)

Facts = Mapping[str, str | float]

TEMPLATES = Path(__file__).parent / "templates"
# The generator that the page names.
GENERATOR = "deconvnet gallery"

# The largest sides in pixels: of tiles, parts of images, pictures and figures.
TILE = 84
PART = 144
PICTURE = 512
FIGURE = 2400
THUMBNAILS = 12
SLAB = 96


@dataclass(frozen=True)
class Caption:
    """The origin of a tile: the image, the value of the activation, its position in words."""

    image: str
    value: float
    place: str = ""


@dataclass(frozen=True)
class GalleryMap:
    """One map of a layer: its strongest activations, strongest first, each in pixel space.

    projections, patches: (k, 3, S, S), the projections of the activations, and the image at the
    same position; None for a map that is never active. captions: k of them, or none. filter:
    (3, h, w). control: projections of this map with shuffled weights, any number of them.
    evolution: (E, 3, S, S), the map during training, with E labels in `epochs`. statistics: text or
    numbers; maps can be sorted by numbers, largest first.
    """

    number: int
    projections: Picture | None
    patches: Picture | None
    captions: Sequence[Caption] = ()
    statistics: Facts = dataclasses.field(default_factory=dict)
    filter: Picture | None = None
    control: Picture | None = None
    evolution: Picture | None = None
    epochs: Sequence[str | int] = ()


@dataclass(frozen=True)
class GalleryLayer:
    """One layer; its maps are read one at a time.

    shape: (K, H, W) of its maps; field, stride: (rows, columns) in pixels of the images; None if
    there is none, or if it is unknown.
    """

    name: str
    title: str
    maps: Iterable[GalleryMap]
    kind: str = ""
    shape: tuple[int, int, int] | None = None
    field: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    facts: Facts = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One activation of an image: its map, its value and its projection.

    box: the part of the image that `picture` shows: top, left, bottom, right in pixels, the last
    two exclusive; None if it shows the whole image.
    """

    map: int
    value: float
    picture: Picture
    box: Sequence[int] | None = None


@dataclass(frozen=True)
class ImageLayer:
    """An image in one layer.

    name: of the layer; reconstruction: of the image by the layer, None if there is none; maps:
    (number, picture) of the strongest maps, strongest first, black where they are zero; parts: the
    strongest activations, strongest first.
    """

    name: str
    reconstruction: Picture | None = None
    facts: Facts = dataclasses.field(default_factory=dict)
    maps: Sequence[tuple[int, Picture]] = ()
    parts: Sequence[Part] = ()


@dataclass(frozen=True)
class GalleryImage:
    """An image in the explorer; picture: (3, H, W), cropped as for the network."""

    name: str
    picture: Picture
    layers: Sequence[ImageLayer] = ()


def write_gallery(
    folder: str | Path,
    *,
    title: str,
    layers: Iterable[GalleryLayer],
    images: Iterable[GalleryImage] = (),
    facts: Facts | None = None,
    figures: Mapping[str, Picture] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write a gallery and return the path of its page, `folder/index.html`.

    Layers, their maps and images are read one at a time, so that only the pictures of one map or
    image are in memory. figures: other pictures by their captions; notes: paragraphs. An older
    gallery in the folder stays until the new one is complete. Raises ValueError if something does
    not match, and if the folder holds anything but an unchanged gallery.
    """
    folder = ownership.absolute(folder)
    with ownership.rebuilt_folder(folder) as new:
        _write(new, title, layers, images, facts or {}, figures or {}, notes)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    log.info("%s: %d files, %.1f MB", folder, len(sizes), sum(sizes) / 1e6)
    return folder / "index.html"


def _write(
    root: Path,
    title: str,
    layers: Iterable[GalleryLayer],
    images: Iterable[GalleryImage],
    facts: Facts,
    figures: Mapping[str, Picture],
    notes: Sequence[str],
) -> None:
    """Write all files of a gallery into an empty folder."""
    shown_layers: list[dict] = []
    for number, layer in enumerate(layers, 1):
        if any(layer.name == other["name"] for other in shown_layers):
            raise ValueError(f"layer {layer.name!r}: given twice; layer names must be unique")
        shown_layers.append(_write_layer(root, number, layer))
    if not shown_layers:
        raise ValueError("layers: a gallery needs at least one")
    names = [layer["name"] for layer in shown_layers]
    shown_images = [_write_image(root, n, image, names) for n, image in enumerate(images, 1)]
    shown_figures = []
    for number, (caption, figure) in enumerate(figures.items(), 1):
        figure = check_picture(figure, f"figure {caption!r}")
        picture = write_picture(root, f"figures/{number}", figure, FIGURE)
        shown_figures.append({"caption": caption, **picture})
    _draw_flow(shown_layers, shown_images[0]["picture"] if shown_images else None)
    data = {
        "title": title,
        "gap": GAP,
        "layers": [{k: v for k, v in layer.items() if k in LAYER_DATA} for layer in shown_layers],
        "images": shown_images,
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("index.html.j2").render(
        generator=GENERATOR,
        title=title,
        facts=_facts(facts),
        layers=shown_layers,
        images=shown_images,
        figures=shown_figures,
        notes=[notes] if isinstance(notes, str) else list(notes),
        controlled=any("control" in layer["sheets"] for layer in shown_layers),
        data=Markup(_json(data)),
        sprite=sprite_style,
        address=_address,
    )
    for name in ("gallery.css", "gallery.js"):
        shutil.copyfile(TEMPLATES / name, root / name)
    # The page must be valid text whatever the names are.
    (root / "index.html").write_text(page, encoding="utf-8", errors="backslashreplace")


# The data of a layer that the script of the page has before the layer is opened.
LAYER_DATA = ("name", "title", "facts", "maps", "sort", "sheets", "script")


def _write_layer(root: Path, number: int, layer: GalleryLayer) -> dict:
    """Write the files of one layer; returns its data for the page."""
    path = f"layers/{number}-{_safe(layer.name)}"
    (root / path).mkdir(parents=True)
    overview: dict[str, list[np.ndarray | None]] = {
        kind: [] for kind in ("projections", "patches", "control", "filters")
    }
    numbers: list[int] = []
    statistics: list[Facts] = []
    with open(root / path / "maps.js", "w", encoding="utf-8") as script:
        script.write(f"gallery.add({_json(path)}, [\n")
        for shown in layer.maps:
            where = f"layer {layer.name!r}, map {shown.number}"
            if shown.number in numbers:
                raise ValueError(f"{where}: twice; every map is shown once")
            numbers.append(shown.number)
            statistics.append(shown.statistics)
            script.write(_json(_write_map(root, path, shown, overview, where)) + ",\n")
        script.write("]);\n")
    if not numbers:
        raise ValueError(f"layer {layer.name!r}: no maps; leave the layer out")
    sheets = {
        kind: write_sprite_sheet(root, f"{path}/{kind}", tiles, photographs=kind == "patches")
        for kind, tiles in overview.items()
        if any(tile is not None for tile in tiles)
    }
    return {
        "name": layer.name,
        "title": layer.title,
        "shape": layer.shape,
        "field": layer.field,
        "facts": _layer_facts(layer, len(numbers)),
        "maps": numbers,
        "sort": _sort_keys(statistics),
        "sheets": sheets,
        "script": f"{path}/maps.js",
        "thumbnails": _thumbnails(root, path, overview, numbers),
    }


def _write_map(
    root: Path,
    place: str,
    shown: GalleryMap,
    overview: dict[str, list[np.ndarray | None]],
    where: str,
) -> dict:
    """Write the files of one map; returns its data. Its first tiles are added to the overview."""
    tiles = {
        "projections": to_tiles(shown.projections, f"{where}, projections", TILE),
        "patches": to_tiles(shown.patches, f"{where}, patches", TILE),
        "control": to_tiles(shown.control, f"{where}, control", TILE),
        "evolution": to_tiles(shown.evolution, f"{where}, evolution", TILE),
    }
    count = len(tiles["projections"])
    for kind, length in (("patches", len(tiles["patches"])), ("captions", len(shown.captions))):
        if length not in (0, count):
            raise ValueError(f"{where}: {count} projections and {length} {kind}; expected as many")
    if len(shown.epochs) != len(tiles["evolution"]):
        raise ValueError(
            f"{where}: {len(tiles['evolution'])} pictures of its evolution and "
            f"{len(shown.epochs)} epochs; expected as many"
        )
    sheets = {
        kind: write_sprite_sheet(
            root, f"{place}/{shown.number}-{kind}", pictures, photographs=kind == "patches"
        )
        for kind, pictures in tiles.items()
        if len(pictures)
    }
    for kind in ("projections", "patches", "control"):
        overview[kind].append(tiles[kind][0] if len(tiles[kind]) else None)
    filters = shown.filter
    overview["filters"].append(
        None if filters is None else to_tile(filters, f"{where}, filter", TILE)
    )
    return {
        "sheets": sheets,
        "captions": [[shown_name(c.image), _text(c.value), c.place] for c in shown.captions],
        "statistics": _facts(shown.statistics),
        "epochs": [str(epoch) for epoch in shown.epochs],
    }


def _write_image(root: Path, number: int, image: GalleryImage, names: list[str]) -> dict:
    """Write the files of one image; returns its data for the page before the image is opened."""
    place, where = f"images/{number}", f"image {image.name!r}"
    layers = []
    for count, layer in enumerate(image.layers, 1):
        if layer.name not in names:
            raise ValueError(
                f"{where}: layer {layer.name!r} is not in this gallery; it has {', '.join(names)}"
            )
        at, here = f"{place}/{count}-{_safe(layer.name)}", f"{where}, layer {layer.name!r}"
        entry = {"name": layer.name, "facts": _facts(layer.facts)}
        if layer.reconstruction is not None:
            reconstruction = check_picture(layer.reconstruction, f"{here}, reconstruction")
            entry["reconstruction"] = write_picture(root, at, reconstruction, PICTURE)
        maps = [to_tile(p, f"{here}, map {n}", PART) for n, p in layer.maps]
        parts = [to_tile(p.picture, f"{here}, part of map {p.map}", PART) for p in layer.parts]
        entry["maps"] = [n for n, _ in layer.maps]
        entry["parts"] = [
            [part.map, _text(part.value), None if part.box is None else [int(n) for n in part.box]]
            for part in layer.parts
        ]
        entry["sheets"] = {
            kind: write_sprite_sheet(root, f"{at}-{kind}", tiles)
            for kind, tiles in (("maps", maps), ("parts", parts))
            if tiles
        }
        layers.append(entry)
    (root / place).mkdir(parents=True, exist_ok=True)
    script = f"{place}/layers.js"
    text = f"gallery.add({_json(place)}, {_json(layers)});\n"
    (root / script).write_text(text, encoding="utf-8")
    picture = write_picture(
        root, f"{place}/picture", check_picture(image.picture, where), PICTURE, photographs=True
    )
    return {"name": shown_name(image.name), "picture": picture, "script": script}


def _layer_facts(layer: GalleryLayer, count: int) -> list[tuple[str, str]]:
    """The facts of a layer, as pairs of texts."""
    facts: dict[str, str | float] = {}
    if layer.kind:
        facts["kind"] = layer.kind
    if layer.shape is None:
        facts["maps"] = count
    else:
        K, H, W = layer.shape
        facts["maps"] = K if count == K else f"{K}, of which {count} are shown"
        facts["size of a map"] = f"{H}×{W}"
    if layer.field is not None:
        facts["receptive field"] = "{}×{} pixels".format(*layer.field)
    if layer.stride is not None:
        facts["stride"] = "{}×{} pixels".format(*layer.stride)
    return _facts({**facts, **layer.facts})


def _sort_keys(statistics: list[Facts]) -> list[dict]:
    """The statistics that maps can be sorted by: those whose values are all numbers."""
    names = list(dict.fromkeys(name for facts in statistics for name in facts))
    keys = []
    for name in names:
        column = [facts.get(name) for facts in statistics]
        if all(value is None or _is_number(value) for value in column):
            finite = [value is not None and math.isfinite(value) for value in column]
            values = [
                float(f"{v:.6g}") if ok else None for v, ok in zip(column, finite, strict=True)
            ]
            keys.append({"name": name, "values": values})
    return keys


def _thumbnails(
    root: Path, place: str, overview: dict[str, list[np.ndarray | None]], numbers: list[int]
) -> dict[str, object] | None:
    """A few evenly spaced maps of a layer, without dead ones, in separate small sheets.

    They show projections, or filters if there are none, and below them the control.
    """
    for kind in ("projections", "filters"):
        alive = [index for index, tile in enumerate(overview[kind]) if tile is not None]
        if alive:
            break
    else:
        return None
    steps = np.linspace(0, len(alive) - 1, min(THUMBNAILS, len(alive))).round().astype(int)
    chosen = [alive[step] for step in steps]
    control = [overview["control"][index] for index in chosen]
    thumbnails = {"maps": [numbers[index] for index in chosen], "control": None}
    thumbnails["sheet"] = write_sprite_sheet(
        root, f"{place}/few", [overview[kind][index] for index in chosen]
    )
    if not any(tile is None for tile in control):
        thumbnails["control"] = write_sprite_sheet(root, f"{place}/few-control", control)
    return thumbnails


def _draw_flow(layers: list[dict], picture: dict | None) -> None:
    """Add to each layer how it is drawn: as a stack of sheets, on the scale of the image.

    drawing: width and height of a sheet in pixels, and the number of sheets. cutout: SVG paths in
    an image 100 wide: `edge` is the receptive field of a unit in its centre, `around` the rest.
    """
    shapes = [layer["shape"] for layer in layers if layer["shape"]]
    sides = [side for shape in shapes for side in shape[1:]]
    largest = max([*sides, *(picture["pixels"] if picture else ())], default=1)
    for layer in layers:
        K, H, W = layer["shape"] or (len(layer["maps"]), largest, largest)
        layer["drawing"] = {
            "width": max(5, round(SLAB * W / largest)),
            # Outputs without positions, such as those of a classifier, are a column.
            "height": SLAB if H == W == 1 else max(5, round(SLAB * H / largest)),
            "sheets": 1 if H == W == 1 else min(8, 1 + round(math.log2(max(K, 1)))),
        }
        layer["cutout"] = None
        if layer["field"] is not None and picture is not None:
            high = 100 * picture["pixels"][0] / picture["pixels"][1]
            fields = zip((high, 100), layer["field"], picture["pixels"], strict=True)
            h, w = (total * min(1, side / pixels) for total, side, pixels in fields)
            top, left = (high - h) / 2, (100 - w) / 2
            outline = f"M{left:.2f} {top:.2f}h{w:.2f}v{h:.2f}h{-w:.2f}z"
            layer["cutout"] = {"around": f"M0 0h100v{high:.2f}h-100z{outline}", "edge": outline}


def _address(layer: str, number: int | None = None) -> str:
    """The fragment of a layer or a map in the page, in the form that its script uses."""
    name = quote(layer, safe="!'()*~")
    return f"#layer={name}" if number is None else f"#layer={name}&map={number}"


def _facts(facts: Facts) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in facts.items()]


def _text(value: str | float) -> str:
    """Text and integers unchanged, other numbers with three digits."""
    if isinstance(value, str | Integral) or not _is_number(value):
        return str(value)
    digits = ".0f" if 1000 <= abs(value) < 1e6 else ".3g"
    return f"{value:{digits}}".replace("-", "−")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _json(value: object) -> str:
    """JSON that cannot end the script that contains it, whatever the names of images are."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _safe(name: str) -> str:
    """The name of a layer as part of a file name: no characters that paths or URLs interpret."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:60].strip("._") or "layer"
