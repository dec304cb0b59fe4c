"""Show what the maps of a network respond to.

deconvnet visualize run=runs/photographs
deconvnet visualize model=torchvision/vgg16 images=folder layers=[features.8,features.15]
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from deconvnet.cli import printed_commands
from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.measurements import load_measurements
from deconvnet.cli.model_errors import one_line_model_errors
from deconvnet.cli.network_and_images import (
    LIST,
    check_images,
    check_labels,
    list_layers,
    load_named_model,
    load_network,
    output_folder,
    relative_path,
    select_images,
)
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import VisualizeConfig
from deconvnet.images.datasets import LazyImages
from deconvnet.images.decoding import shown_name
from deconvnet.storage import ownership
from deconvnet.support.communicator import SINGLE, Communicator, RankLost, started
from deconvnet.support.devices import torch_device
from deconvnet.visualization.cache_keys import network_key
from deconvnet.visualization.evolution.evolution import (
    Evolution,
    load_cached_evolution,
    load_evolution,
)
from deconvnet.visualization.evolution.from_checkpoints import project_checkpoints
from deconvnet.visualization.layer_choice import default_layers, projectable_layers
from deconvnet.visualization.manifest import layer_file_name
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.report import visualize_network
from deconvnet.visualization.searched_network import make_projector


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError, RankLost), started() as communicator:
        settings = read_settings(cfg)
        try:
            with one_line_model_errors(settings.model or settings.run):
                visualize(settings, communicator)
        except KeyboardInterrupt:
            if communicator.is_main:
                print(f"\nstopped; to resume: {printed_commands.again()}")
            raise SystemExit(130) from None


def visualize(settings: VisualizeConfig, communicator: Communicator = SINGLE) -> None:
    check_images(settings)
    model = load_network(settings)
    images = select_images(settings, model, communicator)
    projector = make_projector(model, settings)
    if settings.layers and settings.layers[0] in LIST:
        return list_layers(projector, images[0])
    check_labels(settings, model, projector, images[0])
    folder = output_folder(settings)
    paths = visualize_network(
        model,
        images,
        settings,
        folder,
        # Rank 0 draws.
        evolutions=load_evolutions(settings, model, images) if communicator.is_main else {},
        measurements=load_measurements(Path(settings.run), model) if settings.run else {},
        communicator=communicator,
    )
    if paths:
        names = {"pictures": "pictures", "manifest": "how each was made", "gallery": "gallery"}
        width = max(map(len, names.values())) + 2
        for key, path in paths.items():
            print(f"{names[key]:{width}}{shown_name(relative_path(path))}")
        # TensorBoard names runs by their paths below this folder.
        is_run = settings.output is None and settings.run and Path(settings.run).is_dir()
        shown = Path(folder).parent if is_run else folder
        events = shlex.quote(shown_name(relative_path(shown)))
        print(f"{'TensorBoard':{width}}tensorboard --logdir {events}")


def load_evolutions(
    settings: VisualizeConfig, model: LoadedModel, images: LazyImages
) -> dict[str, Evolution]:
    """The features of layers over the epochs of a run, or over the checkpoints of a model."""
    if settings.run:
        paths = sorted(Path(settings.run).glob("evolution/layer*.npz"))
        return {path.stem: load_evolution(path) for path in paths}
    if not settings.checkpoints:
        return {}
    layers = settings.layers
    if layers is None:
        layers = default_layers(projectable_layers(make_projector(model, settings), images[0]))
    # The epochs in the names of the files, if each has another one.
    names = [re.findall(r"\d+", Path(path).stem) for path in settings.checkpoints]
    epochs = [int(digits[-1]) for digits in names if digits]
    if len(set(epochs)) < len(names):
        epochs = list(range(1, len(names) + 1))
    networks = [network_key(load_named_model(settings, path)) for path in settings.checkpoints]
    key = {"networks": networks, "data": images.fingerprint, "epochs": epochs}
    return {
        layer: evolution_of_checkpoints(settings, images, layer, epochs, key) for layer in layers
    }


def evolution_of_checkpoints(
    settings: VisualizeConfig,
    images: LazyImages,
    layer: str,
    epochs: list[int],
    key: dict[str, object],
) -> Evolution:
    """The features of a layer over the checkpoints; those in the folder if they are the same.

    key: of the checkpoints and images.
    """
    method = [settings.method, settings.gates, settings.overlap, settings.strict]
    key = {**key, "layer": layer, "inside": settings.inside, "method": method}
    folder = output_folder(settings)
    path = folder / "visualization" / "evolution" / f"{layer_file_name(layer)}.npz"
    if (evolution := load_cached_evolution(path, key)) is not None:
        return evolution
    evolution = project_checkpoints(
        load_projectors(settings), images, layer, epochs=epochs, inside=settings.inside
    )
    with ownership.locked_folder(folder, part="visualization", elsewhere="output"):
        evolution.save(path, key)
    # As it is in the file, so that the same command draws the same pictures again.
    return load_evolution(path)


def load_projectors(settings: VisualizeConfig) -> Iterator[Projector]:
    """The projectors of the checkpoints; one network is in memory at a time."""
    for path in settings.checkpoints:
        checkpoint = load_named_model(settings, path)
        checkpoint.module.to(torch_device(settings.device))
        yield make_projector(checkpoint, settings)
