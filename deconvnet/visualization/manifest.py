"""The manifest of a visualization: which unit, image and rule each tile comes from."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from deconvnet.images.decoding import shown_name
from deconvnet.monitoring.strict_json import to_json
from deconvnet.storage import ownership
from deconvnet.visualization.pictures.projection_grids import sample_maps
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.top_projections import TopProjections
from deconvnet.visualization.settings import VisualizationSettings


def write_manifest(
    state: VisualizationResult, settings: VisualizationSettings, place: Path
) -> Path:
    path = place / "manifest.json"
    text = to_json(_manifest(state, settings), indent=1, ensure_ascii=False)
    # Names of files may be no text; names of networks and layers, too.
    ownership.write(path, text.encode("utf-8", "backslashreplace"))
    return path


def _manifest(state: VisualizationResult, settings: VisualizationSettings) -> dict:
    """How each tile was made."""
    subject, names = state.subject, state.images.names
    layers = {}
    for layer, found in state.found.items():
        info = state.infos[layer]
        layers[layer] = {
            "kind": info.kind,
            "shape": info.shape,
            "field": info.field,
            "stride": info.stride,
            "figure": f"figures/{layer_file_name(layer)}.png",
            "arrays": f"projections/{layer_file_name(layer)}.npz",
            "report": asdict(found.report),
            "says": str(found.report),
            "tile_scale": found.scale,
            "dead_maps": np.flatnonzero(state.tops[layer].dead).tolist(),
            "shown": found.maps[rows_in_grid(found, settings)].tolist(),
            "maps": [_map_entry(found, row, names) for row in range(len(found.maps))],
        }
    return {
        "network": {
            "name": subject.name,
            "weights": subject.weights,
            "sha256": subject.digest,
            "normalization": asdict(subject.normalization),
        },
        "images": {"count": len(names), "sha256": state.images.fingerprint},
        "settings": asdict(settings),
        "display": (
            "zero is grey (0.5); each tile reaches black or white at the magnitude within which "
            f"{settings.contrast:.1%} of its pixels that are not zero stay"
        ),
        "control": "the same with the entries of every weight in a random order"
        if state.control
        else None,
        "layers": layers,
    }


def _map_entry(found: TopProjections, row: int, names: tuple[str, ...]) -> dict:
    tiles = []
    for rank in range(found.count(row)):
        image, _, i, j = found.units[row, rank].tolist()
        board = float(found.checkerboard[row, rank])
        tiles.append(
            {
                "rank": rank,
                "value": float(found.values[row, rank]),
                "image": image,
                "name": shown_name(names[image]),
                "unit": [i, j],
                "box": found.boxes[row, rank].tolist(),
                **({} if np.isnan(board) else {"checkerboard": round(board, 4)}),
            }
        )
    return {"map": int(found.maps[row]), "row": row, "tiles": tiles}


def rows_in_grid(found: TopProjections, settings: VisualizationSettings) -> list[int]:
    """The rows of the maps in the grid: some at random, in their order."""
    dead = np.zeros(len(found.maps), dtype=bool)
    return sample_maps(dead, settings.shown, seed=settings.seed)


def layer_file_name(layer: str) -> str:
    """The name of a layer as that of a file."""
    return re.sub(r"[^\w.-]+", "-", layer)
