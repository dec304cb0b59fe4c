"""The network that a command looks into, and the images that it sees."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from deconvnet.cli.class_names import read_class_names
from deconvnet.cli.concepts_of_run import check_takes_images, load_concepts
from deconvnet.cli.settings import (
    OF_CNNS,
    FaithfulnessConfig,
    NetworkConfig,
    OcclusionConfig,
    VisualizeConfig,
)
from deconvnet.cli.unfinished_run import load_run
from deconvnet.images.arrays import array_items, is_array_file
from deconvnet.images.datasets import LazyImages, lazy_images
from deconvnet.images.decoding import read_image, shown_name
from deconvnet.images.files import image_files
from deconvnet.images.fit import Crop
from deconvnet.images.item import Item
from deconvnet.images.sources import DataSettings, without_download
from deconvnet.network.network import DeconvNet
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.devices import torch_device
from deconvnet.training.run_folder import training_data
from deconvnet.visualization.layer_choice import default_layers, projectable_layers
from deconvnet.visualization.manifest import layer_file_name
from deconvnet.visualization.models.weights import WEIGHT_FILES
from deconvnet.visualization.models.zoo import LoadedModel, digest, load_model
from deconvnet.visualization.projection.projection import suggest_layers, unknown_layer
from deconvnet.visualization.projection.projector import Projector

ImageSettings = VisualizeConfig | OcclusionConfig | FaithfulnessConfig
# Names in place of a layer that list all layers.
LIST = ("?", "[?]")


def load_network(settings: NetworkConfig) -> LoadedModel:
    """The network that the settings name, on their device."""
    model = load_run_network(settings) if settings.run else load_named_model(settings)
    model.module.to(torch_device(settings.device))
    return model


def check_images(settings: ImageSettings) -> None:
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


def load_run_network(settings: NetworkConfig) -> LoadedModel:
    """The network of a run; if it has learned from activations of another, that one with its
    concepts."""
    path = Path(settings.run)
    several, one = hasattr(settings, "layers"), hasattr(settings, "layer")
    net = load_run(path, "layers=[layer{}]" if several else "layer=layer{}" if one else "")
    data = training_data(path)
    if data is not None and data.model is not None:
        shown, trusted = relative_path(path), settings.trust_code
        return load_concepts(shown, net, data, trust_code=trusted, labels=settings.labels)
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if entry.name in OF_CNNS and value != entry.default:
            raise ValueError(f"{entry.name}={value}: only with model=..., not with run=...")
    name = path.resolve().name if path.is_dir() else path.stem
    return LoadedModel(net, name, relative_path(path).as_posix(), digest=digest(net))


def load_named_model(settings: NetworkConfig, weights: str | None = None) -> LoadedModel:
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
    settings: ImageSettings, model: LoadedModel, communicator: Communicator = SINGLE
) -> LazyImages:
    """The images of the settings, or the training images of the network, cropped.

    If there are more than `max_images`, takes evenly spaced ones.
    """
    data = training_images_of(settings, model)
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
        crop = Crop(settings.size, settings.size) if settings.size else model.crop
        candidates = lazy_images(replace(data, skip_unreadable=skip), crop=crop)
    else:
        if isinstance(model.module, DeconvNet):
            several = isinstance(settings.images, list)
            files = settings.images if several else [settings.images]
            paths = [Path(str(file)).expanduser() for file in files]
            check_takes_images(Path(settings.run), model.module, paths, or_arrays=True)
        candidates = named_images(settings, input_crop(settings, model))
    count = min(settings.max_images or len(candidates), len(candidates))
    chosen = [round(n * (len(candidates) - 1) / max(count - 1, 1)) for n in range(count)]
    return LazyImages([candidates.items[n] for n in chosen], crop=candidates.crop)


def input_crop(settings: NetworkConfig, model: LoadedModel) -> Crop | None:
    """The crop of an image of the user that the network sees; None: any size."""
    if settings.size:
        return Crop(settings.size, settings.size)
    if model.crop is not None:
        return model.crop
    data = training_images_of(settings, model)
    return Crop(data.size, data.size) if data and data.size else None


def named_images(settings: ImageSettings, crop: Crop | None) -> LazyImages:
    """The images of a folder, a file, a list in a text file, or several of these."""
    if not isinstance(settings.images, list):
        path = Path(str(settings.images)).expanduser()
        source = "folder" if path.is_dir() else "list" if path.suffix.lower() == ".txt" else None
        if source:
            skip = settings.skip_unreadable
            data = DataSettings(
                source=source, path=str(path), size=None, max_images=None, skip_unreadable=skip
            )
            return lazy_images(data, crop=crop)
    paths = image_files(settings.images)
    for path in paths:
        if not path.exists():
            raise ValueError(f"images={path}: no such file or folder")
    if crop is not None and any(map(is_array_file, paths)):
        raise ValueError(f"images={shown_name(settings.images)}: arrays are not cropped: size=null")
    return LazyImages([item for path in paths for item in items_of_file(path)], crop=crop)


def items_of_file(path: Path) -> list[Item]:
    """The image in a file, or those in an array file."""
    if is_array_file(path):
        return list(array_items(path))
    return [Item(str(path), partial(read_image, path), path)]


def training_images_of(settings: NetworkConfig, model: LoadedModel) -> DataSettings | None:
    """The training images of a network, as crops where they were padded; None if unknown."""
    if settings.run and Path(settings.run).is_dir():
        data = training_data(settings.run)
    else:
        data = model.training.get("data")
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


def list_layers(projector: Projector, image: Tensor) -> None:
    """Print the layers that can be named for an image (3, H, W), with their maps and receptive
    fields."""
    infos = projectable_layers(projector, image)
    if not infos:
        raise ValueError(f"?: {suggest_layers('', [])}")
    chosen = set(default_layers(infos))
    print(f"  {'layer':28} {'kind':20} {'maps':>14}   receptive field (* by default)")
    for info in infos:
        print(f"{'*' if info.name in chosen else ' '} {info}")


def check_labels(
    settings: NetworkConfig, model: LoadedModel, projector: Projector, image: Tensor
) -> None:
    """Raise ValueError unless the model has as many classes as the settings name; image: (3, H, W),
    one that it takes."""
    if settings.labels is None:
        return
    outputs = projector.outputs(projector.prepare(image[None]))
    names = len(model.labels)
    if outputs is None or outputs.shape[1] != names:
        classes = "no classes" if outputs is None else f"{outputs.shape[1]} classes"
        named = settings.run or settings.model
        raise ValueError(f"labels: {names} names, but {named} has {classes}")


def make_projector(model: LoadedModel, *, batch: int, method: str | None = None) -> Projector:
    """The projector of a network; method: of a CNN, by default auto."""
    return Projector(
        model.module,
        method=None if isinstance(model.module, DeconvNet) else method,
        normalization=model.normalization,
        batch=batch,
    )


def chosen_layer(projector: Projector, image: Tensor, name: str | None) -> str:
    """The layer of this name, or the highest of those to visualize; image: (3, H, W)."""
    infos = projectable_layers(projector, image)
    if name is None:
        layers = default_layers(infos)
        if not layers:
            names = ", ".join(info.name for info in infos)
            raise ValueError(f"layer=null: the network has no layer of maps; choose among {names}")
        return layers[-1]
    if name not in [info.name for info in infos]:
        raise unknown_layer(name, [info.name for info in infos])
    return name


def output_folder(settings: NetworkConfig, name: str = "") -> Path:
    """The folder for results: `output`, or a folder of this name in that of the network."""
    if settings.output is not None:
        return Path(settings.output).expanduser()
    path = Path(settings.run or settings.model)
    if settings.run:
        return (path if path.is_dir() else path.with_suffix("")) / name
    if path.is_file():
        return path.with_suffix("") / name
    return Path("runs") / layer_file_name(settings.model) / name


def relative_path(path: Path) -> Path:
    """A path as the user would type it from here."""
    return Path(os.path.relpath(path))
