"""Show what the maps of a network respond to.

deconvnet visualize run=runs/photographs
deconvnet visualize model=torchvision/vgg16 images=folder layers=[features.8,features.15]
"""

import os
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from deconvnet.cli import printed_commands
from deconvnet.cli.class_names import read_class_names
from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import VisualizeConfig
from deconvnet.images.datasets import LazyImages, lazy_images
from deconvnet.images.decoding import read_image, shown_name
from deconvnet.images.fit import Crop
from deconvnet.images.item import Item
from deconvnet.images.sources import DataSettings, without_download
from deconvnet.network.network import load
from deconvnet.support.communicator import SINGLE, Communicator, RankLost, started
from deconvnet.support.devices import torch_device
from deconvnet.training.run_folder import training_data
from deconvnet.visualization.evolution.evolution import Evolution, load_evolution
from deconvnet.visualization.evolution.from_checkpoints import project_checkpoints
from deconvnet.visualization.layer_choice import default_layers, projectable_layers
from deconvnet.visualization.manifest import layer_file_name
from deconvnet.visualization.models.weights import WEIGHT_FILES
from deconvnet.visualization.models.zoo import LoadedModel, digest, load_model
from deconvnet.visualization.projection.projection import suggest_layers
from deconvnet.visualization.report import make_projector, visualize_network

LIST = "?"


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError, RankLost), started() as communicator:
        try:
            visualize(read_settings(cfg), communicator)
        except KeyboardInterrupt:
            if communicator.is_main:
                print(f"\nstopped; to resume: {printed_commands.again()}")
            raise SystemExit(130) from None


def visualize(settings: VisualizeConfig, communicator: Communicator = SINGLE) -> None:
    check_images(settings)
    subject = load_run_network(settings) if settings.run else load_named_model(settings)
    subject.module.to(torch_device(settings.device))
    images = select_images(settings, subject, communicator)
    if settings.layers == [LIST]:
        return list_layers(settings, subject, images)
    check_labels(settings, subject, images)
    folder = output_folder(settings)
    paths = visualize_network(
        subject,
        images,
        settings,
        folder,
        # Rank 0 draws.
        evolutions=load_evolutions(settings, subject, images) if communicator.is_main else {},
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


def check_images(settings: VisualizeConfig) -> None:
    """Raise ValueError, before anything is loaded or downloaded, if no images are given."""
    images = settings.images
    if images is None and settings.model and not is_model_file(settings.model):
        raise ValueError(
            f"images=null: {settings.model} does not say which images it was trained on; give a "
            "folder of images with images=..."
        )
    for path in images if isinstance(images, list) else [images] if images is not None else []:
        if not os.path.lexists(os.path.expanduser(str(path))):
            raise ValueError(f"images={shown_name(path)}: no such file or folder")


def is_model_file(model: str) -> bool:
    """Whether a model is a file, which may record the images it was trained on."""
    return Path(model).suffix in WEIGHT_FILES or Path(model).is_file()


def load_run_network(settings: VisualizeConfig) -> LoadedModel:
    """The network of a run."""
    path = Path(settings.run)
    net = load(path)
    name = path.resolve().name if path.is_dir() else path.stem
    return LoadedModel(net, name, relative_path(path).as_posix(), digest=digest(net))


def load_named_model(settings: VisualizeConfig, weights: str | None = None) -> LoadedModel:
    """The network that `model` names."""
    return load_model(
        settings.model,
        weights=weights or settings.weights,
        options=settings.options,
        mean=settings.mean,
        std=settings.std,
        order=settings.order,
        labels=read_class_names(settings.labels),
        seed=settings.seed,
    )


def select_images(
    settings: VisualizeConfig, subject: LoadedModel, communicator: Communicator = SINGLE
) -> LazyImages:
    """The images of the settings, or the training images of the network, cropped.

    If there are more than `max_images`, takes evenly spaced ones.
    """
    crop = Crop(settings.size, settings.size) if settings.size else subject.crop
    data = training_images_of(settings, subject)
    if settings.images is None:
        if data is None:
            raise ValueError(
                f"images=null: {settings.run or settings.model} does not say what it has learned "
                "from; give a folder of images with images=..."
            )
        if communicator.is_main:
            print(f"reading the images that the network was trained on: {describe_source(data)}")
        skip = data.skip_unreadable or settings.skip_unreadable
        # Photographs are crops already.
        candidates = lazy_images(replace(data, skip_unreadable=skip), crop=crop)
    else:
        if crop is None and data is not None and data.size is not None:
            crop = Crop(data.size, data.size)
        candidates = named_images(settings, crop)
    count = min(settings.max_images or len(candidates), len(candidates))
    chosen = [round(n * (len(candidates) - 1) / max(count - 1, 1)) for n in range(count)]
    return LazyImages([candidates.items[n] for n in chosen], crop=candidates.crop)


def named_images(settings: VisualizeConfig, crop: Crop | None) -> LazyImages:
    """The images of a folder, a file, or a list of files."""
    several = isinstance(settings.images, list)
    paths = [
        Path(str(path)).expanduser() for path in (settings.images if several else [settings.images])
    ]
    if not several and paths[0].is_dir():
        skip, path = settings.skip_unreadable, str(paths[0])
        data = DataSettings(
            source="folder", path=path, size=None, max_images=None, skip_unreadable=skip
        )
        return lazy_images(data, crop=crop)
    for path in paths:
        if not path.exists():
            raise ValueError(f"images={path}: no such file or folder")
    return LazyImages(
        [Item(str(path), partial(read_image, path), path) for path in paths], crop=crop
    )


def training_images_of(settings: VisualizeConfig, subject: LoadedModel) -> DataSettings | None:
    """The training images of a network, as crops where they were padded; None if unknown."""
    if settings.run and Path(settings.run).is_dir():
        data = training_data(settings.run)
    else:
        data = subject.training.get("data")
        try:
            data = without_download(DataSettings(**data)) if data else None
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{settings.run or settings.model}: its record of the training images is not valid "
                f"({error}); give a folder of images with images=..."
            ) from error
    return replace(data, fit="crop") if data else None


def describe_source(data: DataSettings) -> str:
    """Where images come from, to be printed."""
    if data.source == "photographs":
        return "the photographs that come with scikit-image and scikit-learn"
    name = f"{data.dataset} in " if data.source == "torchvision" else ""
    return f"{name}{shown_name(data.path)}"


def list_layers(settings: VisualizeConfig, subject: LoadedModel, images: LazyImages) -> None:
    """Print the layers that can be named, with their maps and receptive fields."""
    infos = projectable_layers(make_projector(subject, settings), images[0])
    if not infos:
        raise ValueError(f"layers=[?]: {suggest_layers('', [])}")
    chosen = set(default_layers(infos))
    print(f"  {'layer':28} {'kind':20} {'maps':>14}   receptive field (* by default)")
    for info in infos:
        print(f"{'*' if info.name in chosen else ' '} {info}")


def check_labels(settings: VisualizeConfig, subject: LoadedModel, images: LazyImages) -> None:
    """Raise ValueError unless the model has as many classes as the settings name."""
    if settings.labels is None:
        return
    projector = make_projector(subject, settings)
    outputs = projector.outputs(projector.prepare(images[0][None]))
    names = len(subject.labels)
    if outputs is None or outputs.shape[1] != names:
        classes = "no classes" if outputs is None else f"{outputs.shape[1]} classes"
        raise ValueError(f"labels: {names} names, but {settings.model} has {classes}")


def load_evolutions(
    settings: VisualizeConfig, subject: LoadedModel, images: LazyImages
) -> dict[str, Evolution]:
    """The features of layers over the epochs of a run, or over the checkpoints of a model."""
    if settings.run:
        paths = sorted(Path(settings.run).glob("evolution/layer*.npz"))
        return {path.stem: load_evolution(path) for path in paths}
    if not settings.checkpoints:
        return {}
    layers = settings.layers
    if layers is None:
        layers = default_layers(projectable_layers(make_projector(subject, settings), images[0]))
    # The epochs in the names of the files, if each has another one.
    names = [re.findall(r"\d+", Path(path).stem) for path in settings.checkpoints]
    epochs = [int(digits[-1]) for digits in names if digits]
    if len(set(epochs)) < len(names):
        epochs = list(range(1, len(names) + 1))
    device = torch_device(settings.device)

    def projectors():
        for path in settings.checkpoints:
            model = load_named_model(settings, path)
            model.module.to(device)
            yield make_projector(model, settings)

    return {
        layer: project_checkpoints(
            projectors(), images, layer, epochs=epochs, inside=settings.inside
        )
        for layer in layers
    }


def output_folder(settings: VisualizeConfig) -> Path:
    if settings.output is not None:
        return Path(settings.output).expanduser()
    if settings.run:
        path = Path(settings.run)
        return path if path.is_dir() else path.with_suffix("")
    path = Path(settings.model)
    return (
        path.with_suffix("") if path.is_file() else Path("runs") / layer_file_name(settings.model)
    )


def relative_path(path: Path) -> Path:
    """A path as the user would type it from here."""
    return Path(os.path.relpath(path))
