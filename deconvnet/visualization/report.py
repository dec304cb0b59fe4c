"""The visualization of a network: arrays, pictures, a TensorBoard page and a gallery of its maps.

<folder>/visualization/topk.npz              the strongest activations of every map
<folder>/visualization/projections/*.npz     for each layer: positions, values, patches, projections
<folder>/visualization/control/              the same for the network with shuffled weights
<folder>/visualization/figures/*             the pictures: the pages of layers as WebP, else PNG
<folder>/visualization/manifest.json         how each tile was made
<folder>/visualization/events.out.tfevents.* TensorBoard
<folder>/gallery/index.html                  everything as a page

The pictures of large projections lie on the page, once there is one, and the arrays refer to them.

Every step writes its file, and a stopped visualization resumes after the last one. Files for
another network, other images or other settings are recomputed, and files of earlier visualizations
for other layers or settings are removed, so that the folders match the manifest. Files that others
have added or changed are never touched (`storage.ownership`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.datasets import LazyImages
from deconvnet.images.decoding import shown_name
from deconvnet.monitoring.monitor import save_picture
from deconvnet.storage import ownership
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.visualization.drawing.canvas import as_curves, shade_signed
from deconvnet.visualization.event_page import write_event_page
from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.experiments.invariance import invariance, invariance_picture
from deconvnet.visualization.experiments.occlusion import occlusion
from deconvnet.visualization.experiments.occlusion_picture import occlusion_picture
from deconvnet.visualization.gallery.content import write_result_gallery
from deconvnet.visualization.gallery.layer_files import projections_file
from deconvnet.visualization.layer_choice import default_layers, projectable_layers
from deconvnet.visualization.manifest import (
    figure_name,
    layer_file_name,
    rows_in_grid,
    write_manifest,
)
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.pictures.evolution_picture import evolution_picture
from deconvnet.visualization.pictures.layer_pictures import filter_picture
from deconvnet.visualization.projection.projection import CONCEPTS, LayerInfo, suggest_layers
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.result import LayerMeasurements, VisualizationResult
from deconvnet.visualization.search.projection_grids import layer_grid, pixel_filters
from deconvnet.visualization.search.top_activations import group_by_size
from deconvnet.visualization.search.top_projections import refer_to_pictures
from deconvnet.visualization.searched_network import (
    SearchedNetwork,
    make_projector,
    progress_bar,
    project_layers,
    search_layers,
    shuffled_model,
)
from deconvnet.visualization.settings import VisualizationSettings

log = logging.getLogger(__name__)

INSIDE = (
    "In layers where the receptive fields of at least a quarter of the units lie inside the image, "
    "only these units were searched; in the others those in the middle, and border units are "
    "included."
)


def visualize_network(
    model: LoadedModel,
    images: LazyImages,
    settings: VisualizationSettings,
    folder: Path,
    *,
    evolutions: Mapping[str, Evolution] | None = None,
    measurements: Mapping[str, LayerMeasurements] | None = None,
    communicator: Communicator = SINGLE,
) -> dict[str, Path]:
    """Visualize what a network responds to in these images; returns the paths of the results.

    evolutions: features over the epochs of training, by layer; measurements: what the page is to
    say of layers besides, by layer. communicator: of processes that
    share the search, each in a part of the images; rank 0 writes, the others return {}. Raises
    FolderLockedError if another process is visualizing into the same folder.
    """
    projector = make_projector(model, settings)
    infos = {info.name: info for info in projectable_layers(projector, images[0])}
    layers = settings.layers or default_layers(list(infos.values()))
    if not layers:
        choices = f"choose among {', '.join(infos)}" if infos else suggest_layers("", [])
        raise ValueError(f"layers=null: {model.name} has no layer of maps; {choices}")
    _check_layers(projector, images[0], layers)
    _check_maps(settings, [infos[layer] for layer in layers])
    result = VisualizationResult(
        model,
        projector,
        images,
        {name: infos[name] for name in layers},
        settings.contrast,
        {name: e for name, e in (evolutions or {}).items() if name in layers},
        measurements=measurements or {},
    )
    if not communicator.is_main:
        return _visualize(result, settings, Path(folder), communicator)
    _check_places(Path(folder), layers, settings)
    with ownership.locked_folder(folder, part="visualization", elsewhere="output"):
        text = "%s: what drives the maps of %s, in %d images"
        if all(infos[layer].kind == CONCEPTS for layer in layers):
            text = "%s: what drives its %s, in %d images"
        log.info(text, model.name, ", ".join(layers), len(images))
        return _visualize(result, settings, Path(folder), communicator)


def _visualize(
    result: VisualizationResult,
    settings: VisualizationSettings,
    folder: Path,
    communicator: Communicator,
) -> dict[str, Path]:
    """Search, project and draw the layers of `result.infos`."""
    model, images, place = result.model, result.images, folder / "visualization"
    projector, layers = result.projector, list(result.infos)
    searched = SearchedNetwork(model, projector, place)
    result.top_activations = search_layers(result, searched, settings, communicator)
    if settings.control:
        shuffled = shuffled_model(model, projector, images, settings.seed)
        control = SearchedNetwork(
            shuffled, make_projector(shuffled, settings), place / "control", is_control=True
        )
        control_tops = search_layers(result, control, settings, communicator)
    if not communicator.is_main:
        return {}
    result.projections = project_layers(result, searched, settings, result.top_activations)
    if not result.projections:
        raise ValueError(
            f"layers {', '.join(layers)}: none of their maps is ever active on these "
            f"{len(images)} images"
        )
    if settings.control:
        tops = {layer: control_tops[layer] for layer in result.projections}
        result.control = project_layers(result, control, settings, tops)
    _draw(result, settings, place / "figures")
    _remove_outdated(result, place)
    paths = {"pictures": place / "figures", "manifest": write_manifest(result, settings, place)}
    write_event_page(result, settings, place)
    gallery = folder / "gallery"
    if settings.gallery:
        with progress_bar(settings, "gallery", "page", None) as progress:
            paths["gallery"] = write_result_gallery(
                gallery,
                result,
                explorer_images=settings.explorer_images,
                inside=settings.inside,
                notes=[INSIDE] if settings.inside else [],
                progress=progress,
            )
        _refer_to_page(result, place / "projections", gallery)
    elif gallery.exists():
        log.warning("%s is from an earlier visualization: gallery=true rebuilds it", gallery)
    return paths


def _check_layers(projector: Projector, image: Tensor, layers: list[str]) -> None:
    """Refuse layers that do not exist or cannot be projected before the work begins."""
    x = projector.prepare(image[None])
    for layer in layers:
        projector(x, layer, [(0, 0, 0, 0)])


def _check_maps(settings: VisualizationSettings, infos: list[LayerInfo]) -> None:
    """Refuse numbers of maps that a layer does not have before the work begins."""
    for info in infos if isinstance(settings.maps, list) else ():
        if max(settings.maps) >= info.shape[0]:
            raise ValueError(
                f"maps={settings.maps}: layer {info.name!r} has maps 0 to {info.shape[0] - 1}"
            )


def _check_places(folder: Path, layers: list[str], settings: VisualizationSettings) -> None:
    """Refuse to replace the files of others before the work begins."""
    place, names = folder / "visualization", {}
    for layer in layers:
        other = names.setdefault(layer_file_name(layer), layer)
        if other != layer:
            raise ValueError(
                f"layers {other!r} and {layer!r}: their files would have the same name; visualize "
                "one of them with another output=..."
            )
    paths = [place / "topk.npz", place / "manifest.json"]
    for name in names:
        paths += [place / "projections" / f"{name}.npz", place / "figures" / f"{name}.webp"]
    if settings.control:
        paths += [
            place / "control" / path.relative_to(place) for path in paths if path.suffix == ".npz"
        ]
    for path in paths:
        ownership.check_writable(path)
    if settings.gallery:
        ownership.check_replaceable(folder / "gallery")


def _draw(result: VisualizationResult, settings: VisualizationSettings, folder: Path) -> None:
    """Draw all pictures and save them."""
    pictures = result.pictures
    filters = pixel_filters(result.projector)
    if filters is not None:
        tiles = as_curves(shade_signed(filters[1]))
        pictures[f"{filters[0]}-filters"] = filter_picture(tiles)
    for layer, projections in result.projections.items():
        rows = rows_in_grid(projections, settings)
        pictures[layer] = layer_grid(
            projections,
            rows,
            info=result.infos[layer],
            num_images=len(result.images),
            control=result.control.get(layer),
            control_maps=settings.control_maps,
            contrast=settings.contrast,
        )
    for layer, e in result.evolutions.items():
        pictures[f"{layer}-evolution"] = evolution_picture(e)
    _draw_occlusion(result, settings)
    _draw_invariance(result, settings)
    for name, picture in pictures.items():
        save_picture(folder / figure_name(result, name), picture)


def _draw_occlusion(result: VisualizationResult, settings: VisualizationSettings) -> None:
    """The effect of a grey square on the highest layer, in the first images."""
    projector, layer = result.projector, list(result.projections)[-1]
    for number in range(min(settings.occlusion, len(result.images))):
        pixels = result.images[number]
        with progress_bar(settings, f"occluding image {number}", "position", None) as progress:
            x = projector.prepare(pixels[None])
            occluded = occlusion(projector, x, layer=layer, progress=progress)
        labels = result.model.labels and tuple(map(shown_name, result.model.labels))
        result.pictures[f"occlusion-{number}"] = occlusion_picture(
            occluded, result.shown_images[number], names=labels
        )


def _draw_invariance(result: VisualizationResult, settings: VisualizationSettings) -> None:
    """The effect of shifts, zooms and rotations on the lowest and the highest layer, in the first
    images of one size."""
    if settings.invariance == 0:
        return
    layers = list(dict.fromkeys([list(result.projections)[0], list(result.projections)[-1]]))
    numbers = range(len(result.images))[: settings.invariance]
    images = [result.images[number] for number in numbers]
    count = len(next(group_by_size(images)))
    pixels = torch.stack(images[:count])
    with progress_bar(settings, "transforming images", "step", None) as progress:
        x = result.projector.prepare(pixels)
        curves = invariance(result.projector, x, layers, progress=progress)
    names = [shown_name(Path(name).stem) for name in result.images.names[:count]]
    shown = result.projector.shown(pixels)
    result.pictures["invariance"] = invariance_picture(curves, shown, names=names)


def _refer_to_page(result: VisualizationResult, place: Path, gallery: Path) -> None:
    """Keep the pictures that the page shows there alone, and not in the arrays as well."""
    for number, (layer, projections) in enumerate(result.projections.items(), 1):
        if projections.sheets:
            files = [
                gallery / projections_file(number, layer, int(m))
                if projections.count(row)
                else None
                for row, m in enumerate(projections.maps)
            ]
            refer_to_pictures(place / f"{layer_file_name(layer)}.npz", files)


def _remove_outdated(result: VisualizationResult, place: Path) -> None:
    """Remove the files of earlier visualizations for other layers or settings."""
    arrays = {f"{layer_file_name(layer)}.npz" for layer in result.projections}
    current = {place / "figures" / figure_name(result, name) for name in result.pictures}
    current |= {place / "projections" / name for name in arrays}
    if result.control:
        current |= {place / "control" / "projections" / name for name in arrays}
    current |= {place / "evolution" / f"{layer_file_name(name)}.npz" for name in result.evolutions}
    kept = [place / name for name in ("figures", "projections", "evolution", "control/projections")]
    for folder in kept:
        for path in folder.glob("*"):
            if path not in current:
                ownership.remove(path)
        ownership.prune(folder)
    if not result.control:
        ownership.remove(place / "control" / "topk.npz")
        ownership.prune(place / "control")
