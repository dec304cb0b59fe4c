"""The images of torchvision's data sets, by the name of their class."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deconvnet.images.decoding import (
    read_image,
    reason,
    shown_name,
    to_tensor,
    user_path,
    without_ghostscript,
)
from deconvnet.images.item import Item

if TYPE_CHECKING:
    from deconvnet.images.sources import DataSettings


def torchvision_items(settings: DataSettings) -> Iterator[Item]:
    """The images of data.dataset, in its order; ValueError if it cannot be opened."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ValueError(f"data.source=torchvision needs torchvision installed: {error}") from error

    names = [name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))]
    if settings.dataset not in names:
        lower = {name.lower(): name for name in names}
        close = [lower[key] for key in difflib.get_close_matches(settings.dataset.lower(), lower)]
        raise ValueError(
            f"data.dataset={settings.dataset}: torchvision has no such data set; "
            + (f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(names)}")
        )
    dataset_class = getattr(datasets, settings.dataset)
    arguments = _arguments(dataset_class, settings)
    try:
        samples = dataset_class(**arguments)
        count = len(samples)
    # Each class has its own exceptions for missing files, archives, packages or no network.
    except Exception as error:
        failure = f"data.dataset={settings.dataset}: cannot be opened"
        remedy = f"set data.download=true or put the files under data.path={settings.path}"
        if settings.download:
            failure += " with data.download=true"
            remedy = f"put the files under data.path={settings.path} if they cannot be fetched"
        raise ValueError(f"{failure}: {reason(error)}; {remedy}") from error
    # DatasetFolder has files, whose bytes identify the images without decoding.
    files = samples.samples if isinstance(samples, datasets.DatasetFolder) else None
    for index in range(count):
        read = partial(_read_image, samples, index, settings.dataset)
        read_label = partial(_read_label, samples, index, settings.dataset)
        path = None if files is None else Path(files[index][0])
        yield Item(f"{settings.dataset}-{index}", read, path, read_label)


def _arguments(dataset_class: type, settings: DataSettings) -> dict[str, Any]:
    """The arguments of this class and its bases, since EMNIST and others pass arguments on."""
    parameters = {
        name
        for base in dataset_class.__mro__
        for name in inspect.signature(base.__init__).parameters
    }
    arguments = {}
    if "root" in inspect.signature(dataset_class).parameters:
        if not settings.path:
            raise ValueError(f"data.path=None: data.dataset={settings.dataset} needs a root folder")
        arguments["root"] = user_path(settings.path)
    if "download" in parameters:
        arguments["download"] = settings.download
    if "loader" in parameters:
        # Read files as in a folder: with the same formats and the EXIF orientation applied.
        arguments["loader"] = read_image
    if settings.split is not None:
        key = next((key for key in ("split", "image_set", "train") if key in parameters), None)
        if key is None:
            raise ValueError(
                f"data.split={settings.split}: {settings.dataset} has no splits; use null"
            )
        if key == "train" and settings.split not in ("train", "test"):
            raise ValueError(f"data.split={settings.split}: {settings.dataset} has train and test")
        arguments[key] = settings.split == "train" if key == "train" else settings.split
    return arguments


def _read_image(samples: Any, index: int, dataset: str) -> Tensor:
    try:
        with without_ghostscript():
            sample = samples[index]
        image = sample[0] if isinstance(sample, (tuple, list)) else sample
        return to_tensor(image)
    except Exception as error:
        raise ValueError(f"cannot read sample {index} of {dataset}: {reason(error)}") from error


def _read_label(samples: Any, index: int, dataset: str) -> str:
    """The name of the class of a sample, or its number in data sets without names."""
    try:
        with without_ghostscript():
            number = int(samples[index][1])
    except Exception as error:
        raise ValueError(
            f"data.dataset={dataset}: its samples have no class: {reason(error)}"
        ) from error
    names = getattr(samples, "classes", None)
    return shown_name(names[number] if names else number)
