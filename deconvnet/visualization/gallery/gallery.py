"""The gallery: a folder with a web page that shows a network, layer by layer and map by map.

`index.html` opens as a file, without a server and without internet access. Next to it are

    gallery.css, *.js    appearance and behaviour
    layers/              for each layer: sheets of tiles, and `features.json` (`layer_files`)
    images/              for each image of the explorer (`image_files`)
    photographs/         thumbnails of all images that examples come from (`photographs`)
    figures/             other pictures

A page opened as a file may not read other files, but it may show pictures and run scripts. The data
of the maps are therefore scripts, loaded when a layer or an image is opened, and tiles are in
sprite sheets, one per layer or map instead of one file per tile.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deconvnet.storage import ownership
from deconvnet.visualization.gallery.exhibits import Facts, Figure, GalleryImage, GalleryLayer
from deconvnet.visualization.gallery.image_files import write_image
from deconvnet.visualization.gallery.layer_files import write_layer
from deconvnet.visualization.gallery.page_text import (
    IMAGES,
    fact_texts,
    script_json,
    view_address,
)
from deconvnet.visualization.gallery.photographs import Photographs
from deconvnet.visualization.gallery.sprites import (
    GAP,
    check_picture,
    sprite_style,
    write_picture,
)

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
# In the order in which the page runs them.
SCRIPTS = ("gallery.js", "wall.js", "map.js", "image.js", "repaint.js", "navigation.js")
# The generator that the page names.
GENERATOR = "deconvnet gallery"

# The largest side of a figure, and the side of an image in the drawing of the network, in pixels.
FIGURE = 2400
SLAB = 96


def write_gallery(
    folder: str | Path,
    *,
    title: str,
    layers: Iterable[GalleryLayer],
    images: Iterable[GalleryImage] = (),
    photographs: Photographs | None = None,
    subtitle: str = "",
    facts: Facts | None = None,
    figures: Sequence[Figure] = (),
    notes: Sequence[str] = (),
    words: Mapping[str, str] = IMAGES,
) -> Path:
    """Write a gallery and return the path of its page, `folder/index.html`.

    Layers, their maps and images are read one at a time, so that only the pictures of one map or
    image are in memory. photographs: the images that examples refer to by number; subtitle: a
    sentence on the network; notes: paragraphs; words: what the page calls its images (`page_text`).
    An older gallery in the folder stays until the new one is complete. Raises ValueError if
    something does not match, and if the folder holds anything but an unchanged gallery.
    """
    folder = ownership.absolute(folder)
    with ownership.rebuilt_folder(folder) as new:
        about = (title, subtitle, facts or {}, figures, notes, words)
        _write(new, layers, images, photographs, *about)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    log.info("%s: %d files, %.1f MB", folder, len(sizes), sum(sizes) / 1e6)
    return folder / "index.html"


def _write(
    root: Path,
    layers: Iterable[GalleryLayer],
    images: Iterable[GalleryImage],
    photographs: Photographs | None,
    title: str,
    subtitle: str,
    facts: Facts,
    figures: Sequence[Figure],
    notes: Sequence[str],
    words: Mapping[str, str],
) -> None:
    """Write all files of a gallery into an empty folder."""
    shown_layers: list[dict] = []
    for number, layer in enumerate(layers, 1):
        if any(layer.name == other["name"] for other in shown_layers):
            raise ValueError(f"layer {layer.name!r}: given twice; layer names must be unique")
        shown_layers.append(write_layer(root, number, layer, photographs))
    if not shown_layers:
        raise ValueError("layers: a gallery needs at least one")
    names = [layer["name"] for layer in shown_layers]
    shown_images = [write_image(root, n, i, names, photographs) for n, i in enumerate(images, 1)]
    shown_figures = []
    for number, figure in enumerate(figures, 1):
        picture = check_picture(figure.picture, f"figure {figure.caption!r}")
        file = write_picture(root, f"figures/{number}", picture, FIGURE, photographs=True)
        shown_figures.append({"caption": figure.caption, **file})
    _draw_flow(shown_layers, shown_images[0]["picture"] if shown_images else None)
    data = {
        "title": title,
        "gap": GAP,
        "words": words,
        "layers": [{k: v for k, v in layer.items() if k in LAYER_DATA} for layer in shown_layers],
        "images": shown_images,
        "photographs": photographs and photographs.write(root),
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
        subtitle=subtitle,
        facts=fact_texts(facts),
        layers=shown_layers,
        images=shown_images,
        figures=shown_figures,
        notes=[notes] if isinstance(notes, str) else list(notes),
        controlled=any(layer["control"] for layer in shown_layers),
        repainted=next((n for n, i in enumerate(shown_images, 1) if i["repaintings"]), None),
        data=Markup(script_json(data)),
        scripts=SCRIPTS,
        words=words,
        sprite=sprite_style,
        address=view_address,
    )
    for name in ("gallery.css", *SCRIPTS):
        shutil.copyfile(TEMPLATES / name, root / name)
    # The page must be valid text whatever the names are.
    (root / "index.html").write_text(page, encoding="utf-8", errors="backslashreplace")


# The data of a layer that the script of the page has before the layer is opened.
LAYER_DATA = (
    *("name", "title", "shape", "facts", "notes", "maps", "labels", "sort", "methods", "shown"),
    *("sheets", "scripts", "per_script", "json", "control"),
)


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
