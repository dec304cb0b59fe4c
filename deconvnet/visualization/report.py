"""The visualization of a network: arrays, pictures, a TensorBoard page and a gallery of its maps.

<folder>/visualization/topk.npz              the strongest activations of every map
<folder>/visualization/projections/*.npz     for each layer: projections, patches, positions, values
<folder>/visualization/control/              the same for the network with shuffled weights
<folder>/visualization/figures/*             the pictures: the pages of layers as WebP, else PNG
<folder>/visualization/manifest.json         how each tile was made
<folder>/visualization/events.out.tfevents.* TensorBoard
<folder>/gallery/index.html                  everything as a page

Every step writes its file, and a stopped visualization resumes after the last one. Files for
another network, other images or other settings are recomputed, and files of earlier visualizations
for other layers or settings are removed, so that the folders match the manifest. Files that others
have added or changed are never touched (`storage.ownership`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet.images.datasets import LazyImages
from deconvnet.images.decoding import shown_name
from deconvnet.monitoring.monitor import save_picture
from deconvnet.network.network import DeconvNet
from deconvnet.storage import ownership
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.visualization.cache_keys import activations_key, network_key
from deconvnet.visualization.event_page import write_event_page
from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.experiments.invariance import invariance, invariance_picture
from deconvnet.visualization.experiments.occlusion import occlusion, occlusion_picture
from deconvnet.visualization.gallery.content import write_result_gallery
from deconvnet.visualization.layer_choice import default_layers, projectable_layers
from deconvnet.visualization.manifest import (
    control_rows,
    figure_name,
    layer_file_name,
    rows_in_grid,
    write_manifest,
)
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.pictures.canvas import shade_signed
from deconvnet.visualization.pictures.evolution_picture import evolution_picture
from deconvnet.visualization.pictures.layer_pictures import filter_picture
from deconvnet.visualization.pictures.projection_grids import (
    layer_grid,
    pixel_filters,
    sample_maps,
)
from deconvnet.visualization.projection.projection import LayerInfo, suggest_layers
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.projecting import project_top_activations
from deconvnet.visualization.search.randomization import shuffled_control
from deconvnet.visualization.search.top_activations import (
    Progress,
    TopActivations,
    find_top_activations,
    group_by_size,
    merge_top_activations,
)
from deconvnet.visualization.search.top_projections import TopProjections, load_top_projections
from deconvnet.visualization.settings import VisualizationSettings

log = logging.getLogger(__name__)

# The search keeps this many times k activations of each map, for repetitions to be left out.
CANDIDATES = 2
# Images on which the scales and biases of the control are set.
CONTROL_IMAGES = 8
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
    communicator: Communicator = SINGLE,
) -> dict[str, Path]:
    """Visualize what a network responds to in these images; returns the paths of the results.

    evolutions: features over the epochs of training, by layer. communicator: of processes that
    share the search, each in a part of the images; rank 0 writes, the others return {}.
    """
    projector = make_projector(model, settings)
    infos = {info.name: info for info in projectable_layers(projector, images[0])}
    layers = settings.layers or default_layers(list(infos.values()))
    if not layers:
        choices = f"choose among {', '.join(infos)}" if infos else suggest_layers("", [])
        raise ValueError(f"layers=null: {model.name} has no layer of maps; {choices}")
    _check_layers(projector, images[0], layers)
    _check_maps(settings, [infos[layer] for layer in layers])
    place = Path(folder) / "visualization"
    if communicator.is_main:
        _check_places(Path(folder), place, layers, settings)
        log.info(
            "%s: what drives the maps of %s, in %d images",
            model.name,
            ", ".join(layers),
            len(images),
        )
    result = VisualizationResult(
        model,
        projector,
        images,
        {name: infos[name] for name in layers},
        settings.contrast,
        {name: e for name, e in (evolutions or {}).items() if name in layers},
    )
    searched = _Network(model, projector, place)
    result.top_activations = _search(result, searched, settings, communicator)
    if settings.control:
        shuffled = shuffled_model(model, projector, images, settings.seed)
        control = _Network(
            shuffled, make_projector(shuffled, settings), place / "control", is_control=True
        )
        control_tops = _search(result, control, settings, communicator)
    if not communicator.is_main:
        return {}
    result.projections = _project(result, searched, settings, result.top_activations)
    if not result.projections:
        raise ValueError(
            f"layers {', '.join(layers)}: none of their maps is ever active on these "
            f"{len(images)} images"
        )
    if settings.control:
        tops = {layer: control_tops[layer] for layer in result.projections}
        result.control = _project(result, control, settings, tops)
    _draw(result, settings, place / "figures")
    _remove_outdated(result, place)
    paths = {"pictures": place / "figures", "manifest": write_manifest(result, settings, place)}
    write_event_page(result, settings, place)
    gallery = Path(folder) / "gallery"
    if settings.gallery:
        with _progress_bar(settings, "gallery", "page", None) as progress:
            paths["gallery"] = write_result_gallery(
                gallery,
                result,
                explorer_images=settings.explorer_images,
                inside=settings.inside,
                notes=[INSIDE] if settings.inside else [],
                progress=progress,
            )
    elif gallery.exists():
        log.warning("%s is from an earlier visualization: gallery=true rebuilds it", gallery)
    return paths


def make_projector(model: LoadedModel, settings: VisualizationSettings) -> Projector:
    """The projector of a network with these settings."""
    if isinstance(model.module, DeconvNet):
        return Projector(model.module, batch=settings.batch)
    return Projector(
        model.module,
        method=settings.method,
        strict=settings.strict,
        gates=settings.gates,
        overlap=settings.overlap,
        normalization=model.normalization,
        batch=settings.batch,
    )


def shuffled_model(
    model: LoadedModel, projector: Projector, images: LazyImages, seed: int
) -> LoadedModel:
    """The control of a network: its weights in random order, set on some of the images."""
    count = min(CONTROL_IMAGES, len(images))
    numbers = [round(n * (len(images) - 1) / max(count - 1, 1)) for n in range(count)]
    chosen = [images[n] for n in numbers]
    pixels = torch.stack([image for image in chosen if image.shape == chosen[0].shape])
    module = shuffled_control(model.module, projector.prepare(pixels), seed=seed)
    digest = f"{model.digest} shuffled by {seed}, set on images {images.fingerprint}"
    return replace(model, module=module, weights="shuffled", digest=digest)


@dataclass(frozen=True)
class _Network:
    """A network that is searched and projected, and the folder for its arrays."""

    model: LoadedModel
    projector: Projector
    folder: Path
    is_control: bool = False

    @property
    def suffix(self) -> str:
        """What progress bars and warnings add to a name."""
        return ", control" if self.is_control else ""


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


def _check_places(
    folder: Path, place: Path, layers: list[str], settings: VisualizationSettings
) -> None:
    """Refuse to replace the files of others before the work begins."""
    names = {}
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


def _search(
    result: VisualizationResult,
    network: _Network,
    settings: VisualizationSettings,
    communicator: Communicator,
) -> dict[str, TopActivations]:
    """The strongest activations that all processes together have found."""
    rank, count = communicator.rank, communicator.world_size
    name = "topk.npz" if count == 1 else f"topk-{rank}-of-{count}.npz"
    title = f"searching{network.suffix}"
    total = len(range(rank, len(result.images), count))
    hidden = not communicator.is_main
    with _progress_bar(settings, title, "image", total, hidden=hidden) as progress:
        part = find_top_activations(
            network.projector,
            result.images,
            list(result.infos),
            k=CANDIDATES * settings.k,
            inside=settings.inside,
            batch=settings.batch,
            workers=settings.workers,
            shard=(rank, count),
            path=network.folder / name,
            key={"network": network_key(network.model), "data": result.images.fingerprint},
            progress=progress,
        )
    return merge_top_activations(communicator.all_gather(part), k=CANDIDATES * settings.k)


def _project(
    result: VisualizationResult,
    network: _Network,
    settings: VisualizationSettings,
    tops: dict[str, TopActivations],
) -> dict[str, TopProjections]:
    """The projections for every layer; those of an earlier visualization if they are the same."""
    results = {}
    for layer, top in tops.items():
        trained = result.projections.get(layer)
        maps = _chosen_maps(top, settings) if trained is None else trained.maps.tolist()
        counts = [settings.k] * len(maps)
        window = settings.window
        if trained is not None:
            # The control: of most maps, one projection is enough.
            shown = control_rows(trained, settings)
            counts = [settings.k if row in shown else 1 for row in range(len(maps))]
            window = trained.effective or "field"
        total = sum(min(count, len(top.units(m))) for m, count in zip(maps, counts, strict=True))
        if total == 0:
            log.warning("layer %s%s: none of its maps is ever active", layer, network.suffix)
            if trained is not None:
                results[layer] = trained.without_activations()
            continue
        key = {
            "top": activations_key(top),
            "maps": maps,
            "counts": counts,
            "window": window if isinstance(window, str) else asdict(window),
            "method": [network.projector.method, settings.gates, settings.overlap],
            "network": network_key(network.model),
            "data": result.images.fingerprint,
        }
        path = network.folder / "projections" / f"{layer_file_name(layer)}.npz"
        projections = load_top_projections(path, key)
        if projections is None:
            title = f"projecting {layer}{network.suffix}"
            with _progress_bar(settings, title, "unit", total) as progress:
                projections = project_top_activations(
                    network.projector,
                    result.images,
                    layer,
                    top,
                    maps=maps,
                    k=settings.k,
                    counts=counts,
                    window=window,
                    progress=progress,
                )
            projections.save(path, key)
            # As it is in the file, so that a resumed visualization draws the same pictures.
            projections = load_top_projections(path, key)
        results[layer] = projections
    return results


def _chosen_maps(top: TopActivations, settings: VisualizationSettings) -> list[int]:
    """The maps of a layer to project, without those that are dead."""
    if not isinstance(settings.maps, list):
        return sample_maps(top.dead, settings.maps, seed=settings.seed)
    dead = [m for m in settings.maps if top.dead[m]]
    if dead:
        log.warning("maps %s: never active on these images", dead)
    return [m for m in settings.maps if m not in dead]


def _draw(result: VisualizationResult, settings: VisualizationSettings, folder: Path) -> None:
    """Draw all pictures and save them."""
    pictures = result.pictures
    filters = pixel_filters(result.projector)
    if filters is not None:
        pictures[f"{filters[0]}-filters"] = filter_picture(shade_signed(filters[1]))
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
        with _progress_bar(settings, f"occluding image {number}", "position", None) as progress:
            x = projector.prepare(pixels[None])
            occluded = occlusion(projector, x, layer=layer, progress=progress)
        labels = result.model.labels and tuple(map(shown_name, result.model.labels))
        result.pictures[f"occlusion-{number}"] = occlusion_picture(occluded, pixels, names=labels)


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
    with _progress_bar(settings, "transforming images", "step", None) as progress:
        x = result.projector.prepare(pixels)
        curves = invariance(result.projector, x, layers, progress=progress)
    names = [shown_name(Path(name).stem) for name in result.images.names[:count]]
    result.pictures["invariance"] = invariance_picture(curves, pixels, names=names)


def _remove_outdated(result: VisualizationResult, place: Path) -> None:
    """Remove the files of earlier visualizations for other layers or settings."""
    arrays = {f"{layer_file_name(layer)}.npz" for layer in result.projections}
    current = {place / "figures" / figure_name(result, name) for name in result.pictures}
    current |= {place / "projections" / name for name in arrays}
    if result.control:
        current |= {place / "control" / "projections" / name for name in arrays}
    for folder in (place / "figures", place / "projections", place / "control" / "projections"):
        for path in folder.glob("*"):
            if path not in current:
                ownership.remove(path)
        ownership.prune(folder)
    if not result.control:
        ownership.remove(place / "control" / "topk.npz")
        ownership.prune(place / "control")


@contextmanager
def _progress_bar(
    settings: VisualizationSettings,
    name: str,
    unit: str,
    total: int | None,
    *,
    hidden: bool = False,
) -> Iterator[Progress]:
    """Yield a function of (done, total) that moves a progress bar."""
    # Only in a terminal: in a file, every state of the bar would remain.
    disable = True if hidden or not settings.progress else None
    with tqdm(desc=name, total=total, unit=unit, disable=disable, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
