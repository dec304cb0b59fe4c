"""The manifest of a visualization: the image, unit and rules behind every tile."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from deconvnet.images.decoding import shown_name
from deconvnet.monitoring.picture_files import WEBP_LARGEST
from deconvnet.monitoring.strict_json import to_json
from deconvnet.storage import ownership
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.projection_grids import sample_maps
from deconvnet.visualization.search.top_projections import TopProjections
from deconvnet.visualization.settings import VisualizationSettings


def write_manifest(
    result: VisualizationResult, settings: VisualizationSettings, folder: Path
) -> Path:
    """Write `manifest.json` and return its path."""
    path = folder / "manifest.json"
    text = to_json(_manifest(result, settings), indent=1, ensure_ascii=False)
    # Names of files, networks and layers may not be valid text.
    ownership.write(path, text.encode("utf-8", "backslashreplace"))
    return path


def rows_in_grid(projections: TopProjections, settings: VisualizationSettings) -> list[int]:
    """The rows of the maps in the grid of a layer: a random sample, in ascending order."""
    dead = np.zeros(len(projections.maps), dtype=bool)
    return sample_maps(dead, settings.grid_maps, seed=settings.seed)


def control_rows(projections: TopProjections, settings: VisualizationSettings) -> list[int]:
    """The rows of the maps whose control is shown next to the grid of a layer."""
    return rows_in_grid(projections, settings)[: settings.control_maps]


def figure_name(result: VisualizationResult, name: str) -> str:
    """The name of the file of one of the pictures: PNG, or WebP for the large pages of layers."""
    is_webp = name in result.projections and max(result.pictures[name].shape[1:]) <= WEBP_LARGEST
    return f"{layer_file_name(name)}{'.webp' if is_webp else '.png'}"


def layer_file_name(layer: str) -> str:
    """The name of a layer as the name of a file."""
    return re.sub(r"[^\w.-]+", "-", layer)


def _manifest(result: VisualizationResult, settings: VisualizationSettings) -> dict:
    model, names = result.model, result.images.names
    return {
        "network": {
            "name": model.name,
            "weights": model.weights,
            "sha256": model.digest,
            "normalization": asdict(model.normalization),
        },
        "images": {"count": len(names), "sha256": result.images.fingerprint},
        "settings": asdict(settings),
        "display": (
            "zero is grey (0.5); each tile reaches black or white at the magnitude within which "
            f"{settings.contrast:.1%} of its non-zero pixels stay"
        ),
        "control": (
            "the same network with the entries of every filter in random order, and the scale and "
            "bias of every layer set on some of the images"
        )
        if result.control
        else None,
        "layers": {
            layer: _layer_entry(result, settings, layer, projections)
            for layer, projections in result.projections.items()
        },
    }


def _layer_entry(
    result: VisualizationResult,
    settings: VisualizationSettings,
    layer: str,
    projections: TopProjections,
) -> dict:
    info, names = result.infos[layer], result.images.names
    return {
        "kind": info.kind,
        "shape": info.shape,
        "field": info.field,
        "stride": info.stride and [float(n) if n % 1 else int(n) for n in info.stride],
        "figure": f"figures/{figure_name(result, layer)}",
        "arrays": f"projections/{layer_file_name(layer)}.npz",
        # The method to show first comes first.
        "methods": {
            method: {"report": asdict(report), "says": str(report)}
            for method, report in projections.reports.items()
        },
        # The box around each unit that tiles show; null: the receptive field.
        "effective_field": projections.effective and asdict(projections.effective),
        "tile_scale": projections.scale,
        "border_units_included": bool(projections.border.any()),
        "dead_maps": np.flatnonzero(result.top_activations[layer].dead).tolist(),
        "dead_in_the_control": _dead_in_the_control(result, layer),
        "shown": projections.maps[rows_in_grid(projections, settings)].tolist(),
        "maps": [_map_entry(projections, row, names) for row in range(len(projections.maps))],
    }


def _dead_in_the_control(result: VisualizationResult, layer: str) -> list[int] | None:
    """The projected maps that are never active in the control; None if there is no control."""
    control = result.control.get(layer)
    if control is None:
        return None
    return [int(m) for row, m in enumerate(control.maps) if control.count(row) == 0]


def _map_entry(projections: TopProjections, row: int, names: tuple[str, ...]) -> dict:
    tiles = []
    for rank in range(projections.count(row)):
        image, _, i, j = projections.units[row, rank].tolist()
        board = float(projections.checkerboard[row, rank])
        tiles.append(
            {
                "rank": rank,
                "value": float(projections.values[row, rank]),
                "image": image,
                "name": shown_name(names[image]),
                "unit": [i, j],
                "box": projections.boxes[row, rank].tolist(),
                "window": projections.windows[row, rank].tolist(),
                "border": bool(projections.border[row, rank]),
                **({} if np.isnan(board) else {"checkerboard": round(board, 4)}),
            }
        )
    return {"map": int(projections.maps[row]), "row": row, "tiles": tiles}
