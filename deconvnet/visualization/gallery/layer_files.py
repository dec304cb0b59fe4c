"""The files of a layer: sheets with one tile of every map, one sheet for each map, and its data.

layers/<n>-<name>/<method>.webp     one tile of every map; also patches, filters, few, control;
                                    of many maps <method>-1.webp and so on
layers/<n>-<name>/maps/<k>.webp     all tiles of map k; maps/<k>-evolution of its training
layers/<n>-<name>/maps/<k>-projections.webp  its projections in full size, unless they are small
layers/<n>-<name>/features.json     everything about the maps but the pictures
layers/<n>-<name>/features.js       the same for the page, which may not read JSON as a file; of
                                    many maps also features-2.js and so on
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from deconvnet.images.decoding import shown_name
from deconvnet.visualization.gallery.exhibits import (
    Control,
    Example,
    Facts,
    GalleryLayer,
    GalleryMap,
    ProjectionSheet,
)
from deconvnet.visualization.gallery.page_text import (
    fact_texts,
    is_number,
    rounded,
    safe_name,
    write_script,
)
from deconvnet.visualization.gallery.photographs import Photographs
from deconvnet.visualization.gallery.sprites import (
    sheet_layout,
    to_tile,
    to_tiles,
    write_sprite_pages,
    write_sprite_sheet,
    write_sprite_sheets,
)

# The largest sides in pixels: of the tiles on a map's own page, of those on the wall, and of those
# of its evolution.
TILE = 160
WALL = 128
EPOCH = 96
# Maps whose data are in one script, which the page loads to show one of them.
PER_SCRIPT = 128
# How many maps a layer shows on the first page, by the number of tiles of each: three full rows.
THUMBNAILS = {1: 24, 2: 12, 3: 9}

Tiles = list[np.ndarray | None]


def write_layer(
    root: Path, number: int, layer: GalleryLayer, photographs: Photographs | None
) -> dict:
    """Write the files of one layer; returns its data for the page. number: from 1."""
    place = layer_folder(number, layer.name)
    firsts: list[dict[str, np.ndarray | None]] = []
    entries: list[dict] = []
    statistics: list[Facts] = []
    for shown in layer.maps:
        where = f"layer {layer.name!r}, map {shown.number}"
        if any(shown.number == entry["map"] for entry in entries):
            raise ValueError(f"{where}: twice; every map is shown once")
        statistics.append(shown.statistics)
        entries.append(_write_map(root, place, number, shown, photographs, where))
        firsts.append(_first_tiles(shown, where))
    if not entries:
        raise ValueError(f"layer {layer.name!r}: no maps; leave the layer out")
    keys = dict.fromkeys(key for tiles in firsts for key in tiles)
    methods = [key for key in keys if key not in ("patches", "filters")]
    overview = {
        key: [tiles.get(key) for tiles in firsts] for key in (*methods, "patches", "filters")
    }
    numbers = [entry["map"] for entry in entries]
    sheets = {
        key: write_sprite_pages(root, f"{place}/{safe_name(key)}", tiles)
        for key, tiles in overview.items()
        if any(tile is not None for tile in tiles)
    }
    # Projections by several methods are those of a CNN, which make sense next to the image alone;
    # so are those of concepts, which one method may show.
    of_cnn = len(methods) > 1 or (methods and layer.similar_are == "filters")
    shown = [*methods, "patches"] if of_cnn else methods[:1]
    features = {
        "layer": layer.name,
        "kind": layer.kind,
        "shape": layer.shape,
        "receptive_field": layer.field,
        "stride": layer.stride and [float(n) if n % 1 else int(n) for n in layer.stride],
        "methods": methods,
        "below": layer.below,
        "sources_are": layer.sources_are,
        "similar_are": layer.similar_are,
        "maps": entries,
    }
    text = json.dumps(features, allow_nan=False, separators=(",", ":"))
    (root / place).mkdir(parents=True, exist_ok=True)
    (root / place / "features.json").write_text(text, encoding="utf-8")
    return {
        "name": layer.name,
        "title": layer.title,
        "shape": layer.shape,
        "field": layer.field,
        "facts": _layer_facts(layer, len(numbers)),
        "notes": list(layer.notes),
        "maps": numbers,
        "labels": [entry["label"] for entry in entries] if any(e["label"] for e in entries) else [],
        "sort": _sort_keys(statistics),
        "methods": methods,
        "sheets": sheets,
        "scripts": _write_scripts(root, place, features),
        "per_script": PER_SCRIPT,
        "json": f"{place}/features.json",
        "shown": shown,
        "thumbnails": _thumbnails(root, place, overview, numbers, shown),
        "control": _write_control(root, place, layer.control, layer.name),
    }


def _write_scripts(root: Path, place: str, features: dict) -> list[str]:
    """Write the data of a layer as scripts of PER_SCRIPT maps each; returns their files."""
    maps, files = features["maps"], []
    for number, start in enumerate(range(0, len(maps), PER_SCRIPT), 1):
        part = {**features, "maps": maps[start : start + PER_SCRIPT]}
        name = "features.js" if number == 1 else f"features-{number}.js"
        files.append(write_script(root, f"{place}/{name}", part))
    return files


def layer_folder(number: int, layer: str) -> str:
    """The path of the folder of a layer from the page; number: from 1."""
    return f"layers/{number}-{safe_name(layer)}"


def projections_file(number: int, layer: str, map: int) -> str:
    """The path of the projections of a map in full size."""
    return f"{layer_folder(number, layer)}/maps/{map}-projections.webp"


def _write_map(
    root: Path,
    place: str,
    layer: int,
    shown: GalleryMap,
    photographs: Photographs | None,
    where: str,
) -> dict:
    """Write the files of one map; returns its data."""
    tiles = {
        method: to_tiles(pictures, f"{where}, {method}", TILE)
        for method, pictures in shown.projections.items()
    }
    methods = list(tiles)
    tiles["patches"] = to_tiles(shown.patches, f"{where}, patches", TILE)
    tiles["spectrum"] = to_tiles(shown.spectrum_patches, f"{where}, spectrum", TILE)
    tiles["sources"] = [
        None if source.picture is None else to_tile(source.picture, f"{where}, sources", TILE)
        for source in shown.sources
    ]
    tiles["evolution"] = to_tiles(shown.evolution, f"{where}, evolution", EPOCH)
    _check_counts(shown, {key: len(pictures) for key, pictures in tiles.items()}, where)
    if all(tile is None for tile in tiles["sources"]):
        tiles["sources"] = []
    evolution = tiles.pop("evolution")
    sheets = {}
    if shown.sheet is not None:
        counts = {method: len(tiles.pop(method)) for method in methods}
        file = f"{place}/maps/{shown.number}-projections.webp"
        sheets = _write_projections(root, file, shown.sheet, counts)
    if any(tile is not None for group in tiles.values() for tile in group):
        sheets |= write_sprite_sheets(root, f"{place}/maps/{shown.number}", tiles)
    if evolution:
        name = f"{place}/maps/{shown.number}-evolution"
        sheets["evolution"] = write_sprite_sheet(root, name, evolution)

    def example(given: Example) -> dict:
        return _example(given, photographs, layer, shown.number)

    return {
        "map": shown.number,
        "label": shown_name(shown.label),
        "statistics": [
            [name, rounded(value) if is_number(value) else str(value)]
            for name, value in shown.statistics.items()
        ],
        "examples": [example(given) for given in shown.examples],
        "spectrum": [example(given) for given in shown.spectrum],
        "histogram": shown.histogram
        and {
            "counts": [int(count) for count in shown.histogram.counts],
            "edges": [rounded(edge) for edge in shown.histogram.edges],
            "silent": int(shown.histogram.silent),
        },
        "similar": [[int(n), rounded(value)] for n, value in shown.similar],
        "coactive": [[int(n), rounded(value)] for n, value in shown.coactive],
        "sources": [
            {"maps": [int(n) for n in source.maps], "weight": rounded(source.weight)}
            for source in shown.sources
        ],
        "epochs": [str(epoch) for epoch in shown.epochs],
        "sheets": sheets,
    }


def _write_projections(
    root: Path, file: str, sheet: ProjectionSheet, counts: dict[str, int]
) -> dict[str, dict]:
    """Write the projections of a map in full size; returns their layouts by method."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sheet.content)
    layout = {"file": file, **sheet_layout(sum(counts.values()), *sheet.tile)}
    sheets, first = {}, 0
    for method, count in counts.items():
        contrast = [[rounded(factor) for factor in pair] for pair in sheet.contrast[method]]
        sheets[method] = {**layout, "first": first, "count": count, "contrast": contrast}
        first += count
    return sheets


def _first_tiles(shown: GalleryMap, where: str) -> dict[str, np.ndarray | None]:
    """The tiles of a map on the wall: its strongest example in each form, and its filter."""
    pictures = {**shown.projections, "patches": shown.patches}
    tiles = {
        key: to_tile(given[0], f"{where}, {key}", WALL)
        if given is not None and len(given)
        else None
        for key, given in pictures.items()
    }
    filter = shown.filter
    tiles["filters"] = None if filter is None else to_tile(filter, f"{where}, filter", WALL)
    return tiles


def _check_counts(shown: GalleryMap, counts: dict[str, int], where: str) -> None:
    """Raise ValueError unless there are as many tiles of every kind as there are examples."""
    expected = [counts[method] for method in shown.projections]
    count = expected[0] if expected else 0
    given = {**{key: counts[key] for key in shown.projections}, "patches": counts["patches"]}
    for key, length in (*given.items(), ("examples", len(shown.examples))):
        if length not in (0, count):
            raise ValueError(f"{where}: {count} projections and {length} {key}; expected as many")
    for key, length, other, labels in (
        ("patches of its spectrum", counts["spectrum"], "examples of it", len(shown.spectrum)),
        ("pictures of its evolution", counts["evolution"], "epochs", len(shown.epochs)),
        *(
            (f"contrasts of {method}", len(factors), "projections", counts.get(method, 0))
            for method, factors in (shown.sheet.contrast if shown.sheet else {}).items()
        ),
    ):
        if length != labels:
            raise ValueError(f"{where}: {length} {key} and {labels} {other}; expected as many")


def _example(given: Example, photographs: Photographs | None, layer: int, number: int) -> dict:
    """An example as JSON values; without keys that have nothing to say."""
    entry: dict = {"image": shown_name(given.image), "value": rounded(given.value)}
    if given.photograph is not None and photographs is not None:
        entry["photograph"] = photographs.use(given.photograph, layer - 1, number)
    for key in ("unit", "box", "window"):
        place = getattr(given, key)
        if place is not None:
            entry[key] = [int(n) for n in place]
    if given.border:
        entry["border"] = True
    if given.share is not None:
        entry["share"] = rounded(given.share)
    if given.heat is not None:
        rows, columns = given.heat.values.shape
        entry["heat"] = {
            **{"rows": rows, "columns": columns},
            "box": [round(side, 1) for side in given.heat.box],
            "values": base64.b64encode(given.heat.values.tobytes()).decode(),
        }
    return entry


def _write_control(root: Path, place: str, control: Control | None, layer: str) -> dict | None:
    """Write the tiles of the control; returns, by map, the indices of its tiles in the sheet."""
    if control is None:
        return None
    where = f"layer {layer!r}, control"
    tiles: list[np.ndarray] = []
    maps = []
    for number, pictures in control.projections.items():
        added = to_tiles(pictures, f"{where}, map {number}", WALL)
        maps.append([int(number), len(tiles), len(added)])
        tiles += added
    sheet = write_sprite_sheet(root, f"{place}/control", tiles) if tiles else None
    return {"sheet": sheet, "maps": maps}


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
        if (H, W) != (1, 1):
            facts["size of a map"] = f"{H}×{W}"
    if layer.field is not None:
        facts["receptive field"] = _extent(layer, layer.field)
    if layer.stride is not None:
        facts["stride"] = _extent(layer, layer.stride)
    return fact_texts({**facts, **layer.facts})


def _extent(layer: GalleryLayer, size: Sequence[int | Fraction]) -> str:
    """Rows and columns in words; maps of one row are those of signals."""
    is_signal = layer.shape is not None and layer.shape[1] == 1 < layer.shape[2]
    return f"{size[1]} samples" if is_signal and size[0] == 1 else "{}×{} pixels".format(*size)


def _sort_keys(statistics: list[Facts]) -> list[dict]:
    """The statistics that maps can be sorted by: those whose values are all numbers."""
    names = list(dict.fromkeys(name for facts in statistics for name in facts))
    keys = []
    for name in names:
        column = [facts.get(name) for facts in statistics]
        if all(value is None or is_number(value) for value in column):
            values = [None if value is None else rounded(value) for value in column]
            keys.append({"name": name, "values": values})
    return keys


def _thumbnails(
    root: Path, place: str, overview: dict[str, Tiles], numbers: Sequence[int], keys: Sequence[str]
) -> dict[str, object] | None:
    """A few evenly spaced maps of a layer, without dead ones, in a small sheet.

    keys: the forms in which each is shown, next to each other; filters if there are none of these.
    """
    keys = [key for key in keys if any(tile is not None for tile in overview[key])] or ["filters"]
    alive = [index for index, tile in enumerate(overview[keys[0]]) if tile is not None]
    if not alive:
        return None
    count = min(THUMBNAILS.get(len(keys), 6), len(alive))
    steps = np.linspace(0, len(alive) - 1, count).round().astype(int)
    chosen = [alive[step] for step in steps]
    tiles = [overview[key][index] for index in chosen for key in keys]
    sheet = write_sprite_sheet(root, f"{place}/few", tiles)
    return {"maps": [numbers[index] for index in chosen], "each": len(keys), "sheet": sheet}
