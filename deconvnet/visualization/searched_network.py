"""Search a network for its strongest activations and project them, each layer into a file.

What an earlier visualization has found is read from its files if the network, the images and the
settings are the same. The network and its control go the same way, in two folders.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from deconvnet.images.datasets import LazyImages
from deconvnet.monitoring.progress_bar import open_bar
from deconvnet.network.network import DeconvNet
from deconvnet.support.communicator import Communicator
from deconvnet.visualization.cache_keys import activations_key, network_key
from deconvnet.visualization.manifest import control_rows, layer_file_name
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.projecting import project_top_activations
from deconvnet.visualization.search.projection_grids import sample_maps
from deconvnet.visualization.search.randomization import shuffled_control
from deconvnet.visualization.search.top_activations import (
    Progress,
    TopActivations,
    find_top_activations,
    merge_top_activations,
)
from deconvnet.visualization.search.top_projections import TopProjections, load_top_projections
from deconvnet.visualization.settings import VisualizationSettings

log = logging.getLogger(__name__)

# The search keeps this many times k activations of each map, for repetitions to be left out.
CANDIDATES = 2
# Images on which the scales and biases of the control are set.
CONTROL_IMAGES = 8


@dataclass(frozen=True)
class SearchedNetwork:
    """A network that is searched and projected, and the folder for its arrays."""

    model: LoadedModel
    projector: Projector
    folder: Path
    is_control: bool = False

    @property
    def suffix(self) -> str:
        """What progress bars and warnings add to a name."""
        return ", control" if self.is_control else ""


def search_layers(
    result: VisualizationResult,
    network: SearchedNetwork,
    settings: VisualizationSettings,
    communicator: Communicator,
) -> dict[str, TopActivations]:
    """The strongest activations that all processes together have found."""
    rank, count = communicator.rank, communicator.world_size
    name = "topk.npz" if count == 1 else f"topk-{rank}-of-{count}.npz"
    title = f"searching{network.suffix}"
    total = len(range(rank, len(result.images), count))
    hidden = not communicator.is_main
    with progress_bar(settings, title, "image", total, hidden=hidden) as progress:
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


def project_layers(
    result: VisualizationResult,
    network: SearchedNetwork,
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
            "full_size": trained is None,
            "near_duplicates": settings.near_duplicates,
            "method": [network.projector.method, settings.gates, settings.overlap],
            "network": network_key(network.model),
            "data": result.images.fingerprint,
        }
        path = network.folder / "projections" / f"{layer_file_name(layer)}.npz"
        projections = load_top_projections(path, key)
        if projections is None:
            title = f"projecting {layer}{network.suffix}"
            with progress_bar(settings, title, "unit", total) as progress:
                projections = project_top_activations(
                    network.projector,
                    result.images,
                    layer,
                    top,
                    maps=maps,
                    k=settings.k,
                    counts=counts,
                    window=window,
                    full_size=trained is None,
                    near_duplicates=settings.near_duplicates,
                    progress=progress,
                )
            projections.save(path, key)
            # As it is in the file, so that a resumed visualization draws the same pictures.
            projections = load_top_projections(path, key)
        results[layer] = projections
    return results


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


@contextmanager
def progress_bar(
    settings: VisualizationSettings,
    name: str,
    unit: str,
    total: int | None,
    *,
    hidden: bool = False,
) -> Iterator[Progress]:
    """Yield a function of (done, total) that moves a progress bar."""
    show = settings.progress and not hidden
    with open_bar(show=show, desc=name, total=total, unit=unit, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            if total != bar.total:
                bar.reset(total)
            bar.update(done - bar.n)

        yield progress


def _chosen_maps(top: TopActivations, settings: VisualizationSettings) -> list[int]:
    """The maps of a layer to project, without those that are dead."""
    if not isinstance(settings.maps, list):
        return sample_maps(top.dead, settings.maps, seed=settings.seed)
    dead = [m for m in settings.maps if top.dead[m]]
    if dead:
        log.warning("maps %s: never active on these images", dead)
    return [m for m in settings.maps if m not in dead]
