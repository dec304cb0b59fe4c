"""The files of an image of the explorer: the picture, its reconstructions, maps and parts.

images/<n>/picture.webp             the image
images/<n>/<m>-<layer>*             its reconstruction, strongest maps and parts in a layer
images/<n>/layers.js                their data, for the page
images/<n>/repainting-<m>.js        the data of a reconstruction that the page can repaint
"""

from __future__ import annotations

from pathlib import Path

from deconvnet.images.decoding import shown_name
from deconvnet.visualization.gallery.exhibits import GalleryImage, ImageLayer
from deconvnet.visualization.gallery.page_text import (
    fact_texts,
    number_text,
    safe_name,
    write_script,
)
from deconvnet.visualization.gallery.photographs import Photographs
from deconvnet.visualization.gallery.repainting import repainting_data
from deconvnet.visualization.gallery.sprites import (
    check_picture,
    to_tile,
    write_picture,
    write_sprite_sheet,
)

# The largest sides in pixels.
PART = 144
PICTURE = 512


def write_image(
    root: Path,
    number: int,
    image: GalleryImage,
    names: list[str],
    photographs: Photographs | None,
) -> dict:
    """Write the files of one image; returns its data for the page before the image is opened.

    number: from 1; names: of the layers of the gallery.
    """
    place, where = f"images/{number}", f"image {image.name!r}"
    layers = []
    for count, layer in enumerate(image.layers, 1):
        if layer.name not in names:
            raise ValueError(
                f"{where}: layer {layer.name!r} is not in this gallery; it has {', '.join(names)}"
            )
        layers.append(_write_image_layer(root, place, count, layer, where))
    picture = check_picture(image.picture, where)
    entry = {
        "name": shown_name(image.name),
        "picture": write_picture(root, f"{place}/picture", picture, PICTURE, photographs=True),
        "script": write_script(root, f"{place}/layers.js", layers),
        "repaintings": [layer["name"] for layer in layers if "repainting" in layer],
    }
    if image.photograph is not None and photographs is not None:
        entry["photograph"] = photographs.use(image.photograph)
    return entry


def _write_image_layer(root: Path, place: str, count: int, layer: ImageLayer, where: str) -> dict:
    at, where = f"{place}/{count}-{safe_name(layer.name)}", f"{where}, layer {layer.name!r}"
    entry: dict = {"name": layer.name, "facts": fact_texts(layer.facts)}
    if layer.reconstruction is not None:
        reconstruction = check_picture(layer.reconstruction, f"{where}, reconstruction")
        entry["reconstruction"] = write_picture(root, at, reconstruction, PICTURE, photographs=True)
    if layer.repainting is not None:
        data = repainting_data(layer.repainting)
        entry["repainting"] = write_script(root, f"{place}/repainting-{count}.js", data)
    maps = [to_tile(picture, f"{where}, map {n}", PART) for n, picture in layer.maps]
    parts = [to_tile(p.picture, f"{where}, part of map {p.map}", PART) for p in layer.parts]
    entry["maps"] = [n for n, _ in layer.maps]
    entry["parts"] = [
        [
            part.map,
            number_text(part.value),
            None if part.box is None else [int(n) for n in part.box],
        ]
        for part in layer.parts
    ]
    entry["sheets"] = {
        kind: write_sprite_sheet(root, f"{at}-{kind}", tiles)
        for kind, tiles in (("maps", maps), ("parts", parts))
        if tiles
    }
    return entry
