"""A survey of a network: what drives its maps, as files, pictures, a TensorBoard page, a gallery.

<folder>/visualization/topk.npz              the strongest activations of every map
<folder>/visualization/projections/*.npz     of each layer: projections, patches, places, values
<folder>/visualization/control/              the same of the network with its weights shuffled
<folder>/visualization/figures/*.png         the pictures
<folder>/visualization/manifest.json         how each tile was made
<folder>/visualization/events.out.tfevents.* TensorBoard
<folder>/gallery/index.html                  everything as a page

Every step writes its file, and a survey that was stopped resumes after the last of them. Files for
another network, other images or other settings are recomputed, and what earlier surveys left in
these folders for other layers or settings is removed, so the folders hold what the manifest
describes. Files that others have put there, or have changed, are left alone (`files`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from deconvnet.images.datasets import LazyImages
from deconvnet.images.decoding import shown_name
from deconvnet.monitoring.event_files import event_writer
from deconvnet.monitoring.monitor import save_picture
from deconvnet.network.network import DeconvNet
from deconvnet.storage import ownership
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.experiments.invariance import invariance, invariance_picture
from deconvnet.visualization.experiments.occlusion import occlusion, occlusion_picture
from deconvnet.visualization.gallery.content import write_result_gallery
from deconvnet.visualization.manifest import layer_file_name, rows_in_grid, write_manifest
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.pictures.evolution_picture import evolution_picture
from deconvnet.visualization.pictures.layer_pictures import filter_grid
from deconvnet.visualization.pictures.projection_grids import (
    pixel_filters,
    projection_grid,
    sample_maps,
    with_control,
)
from deconvnet.visualization.projection.projection import LayerInfo, suggest_layers
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.randomization import shuffle_weights
from deconvnet.visualization.search.top_activations import (
    TopActivations,
    find_top_activations,
    group_by_size,
    merge_top_activations,
)
from deconvnet.visualization.search.top_projections import (
    TopProjections,
    load_top_projections,
    project_top_activations,
)
from deconvnet.visualization.settings import VisualizationSettings

log = logging.getLogger(__name__)

# What gives no features of its own: its units are those of the layer before.
PASSING = re.compile(r"pool|dropout|identity|flatten", re.IGNORECASE)
MOST_LAYERS = 6
INSIDE = (
    "Only activations whose receptive field lies inside the image were searched, in layers where "
    "at least a quarter of the units are such."
)


def visualize_network(
    subject: LoadedModel,
    images: LazyImages,
    settings: VisualizationSettings,
    folder: Path,
    *,
    evolutions: Mapping[str, Evolution] | None = None,
    communicator: Communicator = SINGLE,
) -> dict[str, Path]:
    """What a network responds to on some images, written into a folder; the files by what they are.

    evolutions: of layers by name, for their pictures. communicator: processes that share the
    search, each in a part of the images; rank 0 writes.
    """
    projector = make_projector(subject, settings)
    infos = {info.name: info for info in projectable_layers(projector, images[0])}
    chosen = settings.layers or default_layers(list(infos.values()))
    if not chosen:
        among = f"choose among {', '.join(infos)}" if infos else suggest_layers("", [])
        raise ValueError(f"layers=null: {subject.name} has no layer of maps; {among}")
    _try(projector, images[0], chosen)
    place = Path(folder) / "visualization"
    if communicator.is_main:
        _check_places(Path(folder), place, chosen, settings)
    state = VisualizationResult(
        subject,
        projector,
        images,
        {name: infos[name] for name in chosen},
        settings.contrast,
        {name: found for name, found in (evolutions or {}).items() if name in chosen},
    )
    if communicator.is_main:
        names = ", ".join(state.infos)
        log.info("%s: what drives the maps of %s, in %d images", subject.name, names, len(images))
    state.tops = _mine(state, settings, projector, subject, place, communicator)
    if settings.control:
        control = shuffled_model(subject, settings.seed)
        shuffled = make_projector(control, settings)
        control_tops = _mine(state, settings, shuffled, control, place / "control", communicator)
    if not communicator.is_main:
        return {}
    state.found = _collect(state, settings, projector, subject, state.tops, place)
    if not state.found:
        raise ValueError(
            f"layers {', '.join(state.infos)}: none of their maps is ever active on these "
            f"{len(images)} images"
        )
    if settings.control:
        same = {layer: control_tops[layer] for layer in state.found}
        state.control = _collect(state, settings, shuffled, control, same, place / "control")
    _draw(state, settings, place / "figures")
    _remove_others(state, place)
    written = {"pictures": place / "figures", "manifest": write_manifest(state, settings, place)}
    _write_events(state, place)
    if settings.gallery:
        with _bar(settings, "gallery", "page", None) as progress:
            written["gallery"] = write_result_gallery(
                Path(folder) / "gallery",
                state,
                explored=settings.explored,
                notes=[INSIDE] if settings.inside else [],
                progress=progress,
            )
    elif (Path(folder) / "gallery").exists():
        log.warning(
            "%s is from an earlier survey: gallery=true rebuilds it", Path(folder) / "gallery"
        )
    return written


def default_layers(infos: list[LayerInfo]) -> list[str]:
    """Of the layers with maps of the same size the last, from the first size to the last; all of a
    deconvolutional network.

    Left out are those that only pass on what they are given, what ends with one of them, and
    vectors.
    """
    if all(info.kind == "Layer" for info in infos):
        return [info.name for info in infos]
    last: dict[tuple[int, ...], str] = {}
    passing: LayerInfo | None = None
    for info in infos:
        ends = passing and passing.name.startswith(f"{info.name}.") and passing.shape == info.shape
        passing = info if ends or PASSING.search(info.kind) else None
        if passing is None and min(info.shape[1:]) > 1:
            last[info.shape[1:]] = info.name
    return list(last.values())[:MOST_LAYERS]


def projectable_layers(projector: Projector, image: Tensor) -> list[LayerInfo]:
    """`Projector.layers` for an image (3, H, W) in [0, 1]; ValueError if the model fails on it."""
    return projector.layers(projector.prepare(image[None]))


def _try(projector: Projector, image: Tensor, layers: list[str]) -> None:
    """Refuse layers that do not exist or cannot be projected before the work begins."""
    x = projector.prepare(image[None])
    for layer in layers:
        projector(x, layer, [(0, 0, 0, 0)])


def _check_places(
    folder: Path, place: Path, layers: list[str], settings: VisualizationSettings
) -> None:
    """Before the work begins, refuse to replace files that are not ours."""
    names = {}
    for layer in layers:
        other = names.setdefault(layer_file_name(layer), layer)
        if other != layer:
            raise ValueError(
                f"layers {other!r} and {layer!r}: their files would have the same name; survey one "
                "of them with another output=..."
            )
    paths = [place / "topk.npz", place / "manifest.json"]
    for name in names:
        paths += [place / "projections" / f"{name}.npz", place / "figures" / f"{name}.png"]
    if settings.control:
        paths += [
            place / "control" / path.relative_to(place) for path in paths if path.suffix == ".npz"
        ]
    for path in paths:
        ownership.check_writable(path)
    if settings.gallery:
        ownership.check_replaceable(folder / "gallery")


def _remove_others(state: VisualizationResult, place: Path) -> None:
    """Remove what earlier surveys made for other layers or with other settings."""
    arrays = {f"{layer_file_name(layer)}.npz" for layer in state.found}
    kept = {place / "figures" / f"{layer_file_name(name)}.png" for name in state.pictures}
    kept |= {place / "projections" / name for name in arrays}
    if state.control:
        kept |= {place / "control" / "projections" / name for name in arrays}
    for folder in (place / "figures", place / "projections", place / "control" / "projections"):
        for path in folder.glob("*"):
            if path not in kept:
                ownership.remove(path)
        ownership.prune(folder)
    if not state.control:
        ownership.remove(place / "control" / "topk.npz")
        ownership.prune(place / "control")


def make_projector(subject: LoadedModel, settings: VisualizationSettings) -> Projector:
    """What projects the units of a network as the settings say."""
    if isinstance(subject.module, DeconvNet):
        return Projector(subject.module, batch=settings.batch)
    return Projector(
        subject.module,
        method=settings.method,
        strict=settings.strict,
        gates=settings.gates,
        overlap=settings.overlap,
        normalization=subject.normalization,
        batch=settings.batch,
    )


def shuffled_model(subject: LoadedModel, seed: int) -> LoadedModel:
    """The control of a network: the same with the entries of every weight in a random order."""
    module = shuffle_weights(subject.module, seed=seed)
    digest = f"{subject.digest} shuffled by {seed}"
    return replace(subject, module=module, weights="shuffled", digest=digest)


def _mine(
    state: VisualizationResult,
    settings: VisualizationSettings,
    projector: Projector,
    subject: LoadedModel,
    place: Path,
    communicator: Communicator,
) -> dict[str, TopActivations]:
    """The strongest activations, those of all processes together."""
    rank, count = communicator.rank, communicator.world_size
    name = "topk.npz" if count == 1 else f"topk-{rank}-of-{count}.npz"
    what = "searching" if subject is state.subject else "searching, control"
    total = len(range(rank, len(state.images), count))
    with _bar(settings, what, "image", total, hidden=not communicator.is_main) as progress:
        part = find_top_activations(
            projector,
            state.images,
            list(state.infos),
            k=settings.k,
            inside=settings.inside,
            batch=settings.batch,
            workers=settings.workers,
            shard=(rank, count),
            path=place / name,
            key={"network": _network_key(subject), "data": state.images.fingerprint},
            progress=progress,
        )
    return merge_top_activations(communicator.all_gather(part), k=settings.k)


def _collect(
    state: VisualizationResult,
    settings: VisualizationSettings,
    projector: Projector,
    subject: LoadedModel,
    tops: dict[str, TopActivations],
    place: Path,
) -> dict[str, TopProjections]:
    """The projections of every layer; those of an earlier survey where they are the same."""
    whose = "" if tops is state.tops else ", control"
    found = {}
    for layer, top in tops.items():
        if layer in state.found:
            maps = state.found[layer].maps.tolist()
        else:
            maps = sample_maps(top.dead, settings.maps, seed=settings.seed)
        total = sum(len(top.units(m)) for m in maps)
        if total == 0:
            log.warning("layer %s%s: none of its maps is ever active", layer, whose)
            continue
        key = {
            "top": _digest(top.values, top.images, top.rows, top.columns),
            "maps": maps,
            "method": [projector.method, settings.gates, settings.overlap],
            "network": _network_key(subject),
            "data": state.images.fingerprint,
        }
        path = place / "projections" / f"{layer_file_name(layer)}.npz"
        known = load_top_projections(path, key)
        if known is None:
            with _bar(settings, f"projecting {layer}{whose}", "unit", total) as progress:
                known = project_top_activations(
                    projector, state.images, layer, top, maps=maps, progress=progress
                )
            known.save(path, key)
        found[layer] = known
    return found


def _network_key(subject: LoadedModel) -> list[object]:
    """What responses and projections depend on: parameters, what is done with them, and pixels."""
    module = subject.module
    built = module.to_parts()[1] if isinstance(module, DeconvNet) else [str(module), _code(module)]
    text = hashlib.sha256(json.dumps(built).encode()).hexdigest()[:16]
    return [subject.digest, text, asdict(subject.normalization)]


def _code(module: nn.Module) -> str:
    """A digest of the source of all classes of a network except those of PyTorch: users may change
    what a network of their own computes and keep its parameters."""
    found = hashlib.sha256()
    classes = {type(part) for part in module.modules()}
    for kind in sorted(classes, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        if kind.__module__.partition(".")[0] == "torch":
            continue
        try:
            found.update(inspect.getsource(kind).encode("utf-8", "surrogateescape"))
        except (OSError, TypeError):  # of a class that was made in an interpreter
            found.update(f"{kind.__module__}.{kind.__qualname__}".encode())
    return found.hexdigest()[:16]


def _draw(state: VisualizationResult, settings: VisualizationSettings, folder: Path) -> None:
    """All pictures, as PNG files."""
    pictures = state.pictures
    filters = pixel_filters(state.projector)
    if filters is not None:
        pictures[f"{filters[0]}-filters"] = filter_grid(filters[1])
    for layer, found in state.found.items():
        rows = rows_in_grid(found, settings)
        grid = projection_grid(found, rows, contrast=settings.contrast)
        if layer in state.control:
            beside = projection_grid(state.control[layer], rows, contrast=settings.contrast)
            grid = with_control(grid, beside, layer=layer)
        pictures[layer] = grid
    for layer, e in state.evolutions.items():
        pictures[f"{layer}-evolution"] = evolution_picture(e)
    _occlude(state, settings)
    _move(state, settings)
    for name, picture in pictures.items():
        save_picture(folder / f"{layer_file_name(name)}.png", picture)


def _occlude(state: VisualizationResult, settings: VisualizationSettings) -> None:
    """What a grey square does to the highest layer, in the first images."""
    projector, layer = state.projector, list(state.found)[-1]
    for number in range(min(settings.occlusion, len(state.images))):
        pixels = state.images[number]
        with _bar(settings, f"covering image {number}", "place", None) as progress:
            x = projector.prepare(pixels[None])
            found = occlusion(projector, x, layer=layer, progress=progress)
        labels = state.subject.labels and tuple(map(shown_name, state.subject.labels))
        picture = occlusion_picture(found, pixels, names=labels)
        state.pictures[f"occlusion-{number}"] = picture


def _move(state: VisualizationResult, settings: VisualizationSettings) -> None:
    """What shifts, zooms and turns do to the lowest and the highest layer, in the first images."""
    if settings.invariance == 0:
        return
    layers = list(dict.fromkeys([list(state.found)[0], list(state.found)[-1]]))
    some = [state.images[number] for number in range(len(state.images))[: settings.invariance]]
    count = len(next(group_by_size(some)))
    pixels = torch.stack(some[:count])
    with _bar(settings, "moving images", "step", None) as progress:
        x = state.projector.prepare(pixels)
        found = invariance(state.projector, x, layers, progress=progress)
    names = [shown_name(Path(name).stem) for name in state.images.names[:count]]
    state.pictures["invariance"] = invariance_picture(found, pixels, names=names)


def _write_events(state: VisualizationResult, folder: Path) -> None:
    for old in folder.glob("events.out.tfevents.*"):
        ownership.remove(old)
    with event_writer(folder) as writer:
        for name, picture in state.pictures.items():
            pixels = (picture.clamp(0, 1) * 255).round().byte()
            writer.add_image(f"visualization/{name}", pixels, 0)
        reports = "\n".join(f"| {name} | {e.report} |" for name, e in state.found.items())
        writer.add_text("visualization", f"| layer | how |\n|---|---|\n{reports}", 0)


def _digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@contextmanager
def _bar(
    settings: VisualizationSettings,
    name: str,
    unit: str,
    total: int | None,
    *,
    hidden: bool = False,
) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as what is told (done, total)."""
    # On a terminal only: a file would get all that the bar draws over itself.
    disable = True if hidden or not settings.progress else None
    with tqdm(desc=name, total=total, unit=unit, disable=disable, dynamic_ncols=True) as bar:

        def progress(done: int, whole: int) -> None:
            bar.total = whole
            bar.update(done - bar.n)

        yield progress
