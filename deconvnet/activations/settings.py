"""Training data that may be activations: which images, and which layer of which network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deconvnet.activations.source import ActivationSource
from deconvnet.images.arrays import is_array_file
from deconvnet.images.sources import DataSettings
from deconvnet.visualization.models.zoo import LoadedModel, load_model

# Settings that need a model.
OF_MODELS = ("layer", "options", "mean", "std", "order", "store")


@dataclass
class TrainingData(DataSettings):
    """Which images to learn from; with a model, their activations in one of its layers."""

    # in place of source and path: a folder of images, a text file with one path per line, a .tar
    # file, or a .npy or .npz file
    images: str | None = None
    # learn from activations of this network: torchvision/NAME, timm/NAME, package.module:factory
    # (which runs the code of that package: only for code that you trust), or a network file of
    # `deconvnet train-cnn`; null: learn from the images themselves
    model: str | None = None
    # model: dotted name of the layer
    layer: str | None = None
    # model: its weights: default (pretrained), the name of other ones, a file, or none (random)
    weights: str = "default"
    # model: arguments of the function that builds it, such as '{num_classes: 10}'
    options: Any = None
    # model: it is given (pixel - mean) / std, with pixels in [0, 1]; null: those of its weights
    mean: list[float] | None = None
    std: list[float] | None = None
    # model: colour planes that it expects: rgb, bgr or grey; null: those it was trained with
    order: str | None = None
    # model: folder that keeps the activations, in shards of safetensors, for more of them than fit
    # into memory; null: they are held in memory or, with stream, computed whenever they are needed
    store: str | None = None

    def __post_init__(self) -> None:
        if self.images is not None:
            self.source, self.path, self.images = _kind_of(self.images), self.images, None
        super().__post_init__()
        if not isinstance(self.options, dict | None):
            raise ValueError(f"data.options={self.options}: give arguments as {{name: value}}")
        if self.model is None:
            for key in OF_MODELS:
                if getattr(self, key) is not None:
                    raise ValueError(f"data.{key}={getattr(self, key)}: needs data.model")
            return
        if self.layer is None:
            raise ValueError("data.layer=None: data.model needs the name of a layer")
        for key, value in (("fit", "crop"), ("mask", None)):
            if getattr(self, key) != value:
                raise ValueError(f"data.{key}={getattr(self, key)}: not with data.model")


def load_data_model(data: TrainingData, device: torch.device | str = "cpu") -> LoadedModel:
    """The network whose activations are the training data, on a device."""
    model = load_model(
        data.model,
        weights=data.weights,
        options=data.options,
        mean=data.mean,
        std=data.std,
        order=data.order,
    )
    model.module.to(device)
    return model


def activation_source(
    data: TrainingData, device: torch.device | str = "cpu", *, model: LoadedModel | None = None
) -> ActivationSource:
    """The activations that these settings describe; model: that of `load_data_model`, if loaded."""
    return ActivationSource(
        model or load_data_model(data, device),
        data.layer,
        data,
        folder=data.store,
    )


def _kind_of(path: str) -> str:
    """The data.source of the images at a path, by what is there."""
    if is_array_file(path):
        return "array"
    if Path(path).suffix.lower() == ".tar":
        return "shards"
    if Path(path).suffix.lower() == ".txt":
        return "list"
    return "folder"
