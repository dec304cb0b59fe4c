"""The activations of a layer of any network, in place of images.

    source = ActivationSource(model, "layer3", images)
    learned = learn_filters(source.standardized(), 512, 1, lam=8, non_negative=True)

N images · C channels of the layer · H, W positions of its maps
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deconvnet.activations.shards import Shards
from deconvnet.images.datasets import ImageSet, LazyImages, lazy_images
from deconvnet.images.fit import Crop, check_equal_sizes
from deconvnet.images.preprocessing import Preprocessing, PreprocessingSettings
from deconvnet.images.sources import DataSettings
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import as_images, as_positive_integer
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.zoo import LoadedModel, digest
from deconvnet.visualization.projection.projector import Projector


def activation_preprocessing(channels: int) -> PreprocessingSettings:
    """The preprocessing of a network that explains activations of this many channels.

    It subtracts the mean of each channel and divides by the mean norm of a position, both of the
    training data; the network stores them, and gives activations back in the model's units.
    """
    return PreprocessingSettings("none", ["channel_mean"], scale="norm", channels=channels)


class ActivationSource:
    """The activations (N, C, H, W) of a layer for N images, computed or read when they are needed.

    It takes the place of a tensor of images: `source[3]`, `source[:8]` and `source[indices]` are
    tensors, float32, on the device of the model; `learn_filters` and `train` read batches of it,
    `sparse_code` and `DeconvNet.infer` all of it, and `source.split(8)` is for `learn_online`.

    model: any module, or one of `load_model`, with its normalisation and crop. It runs in
    evaluation mode and is not changed. layer: named as for `Projector`, such as "layer3" or
    "features.8"; vectors (N, C) are maps of one position, and the tokens of a transformer maps of
    their grid, without class token and registers. images: RGB pixels (N, 3, H, W) in [0, 1], a
    folder, `DataSettings`, or `LazyImages`; all of one size after the crop. normalization, crop:
    override those of the model; without any, a module is given the images as they are.

    folder: keep the activations there, in shards of safetensors of about 64 MiB. They are computed
    once, as they are needed; later sources of the same activations read them. batch: images that go
    through the model at a time, which bounds memory.

    Raises ValueError, in one line, if the model has no such layer, or if the folder holds other
    activations.
    """

    def __init__(
        self,
        model: nn.Module | LoadedModel,
        layer: str,
        images: Tensor | np.ndarray | LazyImages | ImageSet | DataSettings | str | Path,
        *,
        normalization: Normalization | None = None,
        crop: Crop | None = None,
        folder: str | Path | None = None,
        batch: int = 8,
    ):
        loaded = model if isinstance(model, LoadedModel) else None
        self.layer, self.batch = layer, as_positive_integer(batch, "batch")
        self.normalization = normalization or (loaded and loaded.normalization)
        self.images = _as_lazy(images, crop or (loaded and loaded.crop))
        self.projector = Projector(
            loaded.module if loaded else model, normalization=self.normalization, batch=batch
        )
        example = self._computed([0])
        self.shape = torch.Size((len(self.images), *example.shape[1:]))
        self._mean: Tensor | None = None
        self._norm = 1.0
        self._shards = None
        if folder is not None:
            self._shards = Shards(Path(folder).expanduser(), self.shape, self._identity)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"ActivationSource({type(self.model).__name__} {self.layer}, {shape})"

    @property
    def model(self) -> nn.Module:
        return self.projector.model

    @property
    def device(self) -> torch.device:
        return self.projector.device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """(C, H, W) of an image by its number, or (n, C, H, W) of a slice or of indices (n,)."""
        indices = torch.arange(len(self))[index]
        activations = self.read(indices.reshape(-1))
        return activations[0] if indices.ndim == 0 else activations

    @plain
    def read(self, indices: Tensor) -> Tensor:
        """The activations (n, C, H, W) of the images with these indices (n,)."""
        numbers = indices.tolist()
        if self._shards is None:
            activations = self._computed(numbers)
        else:
            activations = self._shards.read(numbers, self._computed).to(self.device)
        if self._mean is None:
            return activations
        return (activations - self._mean[:, None, None]) / self._norm

    def split(self, size: int, *, seed: int | None = None) -> Iterator[Tensor]:
        """Batches of up to `size` images, each once: in their order, or in a random one.

        Images of a folder are sorted by class; with a seed they are not.
        """
        size, order = as_positive_integer(size, "size"), torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=seeded_generator(seed))
        for indices in order.split(size):
            yield self.read(indices)

    def standardized(self) -> ActivationSource:
        """The same activations minus the mean of each channel, divided by one number, the mean norm
        of a position, so that a lam means the same for every layer.

        For `learn_filters` and `sparse_code`; a network with `activation_preprocessing` does the
        same and stores both numbers. Reads all activations once.
        """
        if self._mean is not None:
            return self
        mean, norm = self._statistics
        standardized = copy.copy(self)
        standardized._mean, standardized._norm = mean, norm
        return standardized

    def restored(self, y: Tensor) -> Tensor:
        """Activations in the units of the model, from standardised ones (n, C, H, W)."""
        if self._mean is None:
            return y
        return y * self._norm + self._mean.to(y)[:, None, None]

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """64 hexadecimal digits for each image: of its content, the model and the layer."""
        key = json.dumps(self._model_identity)
        return tuple(
            hashlib.sha256(f"{key} {digest}".encode()).hexdigest() for digest in self.images.digests
        )

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the model's input."""
        parameters = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(parameters, torch.float32)

    @property
    def _model_identity(self) -> list:
        normalization = self.normalization and asdict(self.normalization)
        return [digest(self.model), self.layer, normalization]

    @property
    def _identity(self) -> str:
        """What the activations are of, for files that keep them."""
        return json.dumps([*self._model_identity, self.images.fingerprint])

    @cached_property
    def _statistics(self) -> tuple[Tensor, float]:
        """The mean (C,) of the channels, and the mean norm of a position after it is subtracted."""
        preprocessing = Preprocessing(activation_preprocessing(self.shape[1])).to(self.device)
        preprocessing.fit_parts(lambda: ((part, None, None) for part in self.split(self.batch)))
        return preprocessing.channel_mean, float(preprocessing.scale)

    def _computed(self, numbers: list[int]) -> Tensor:
        """The activations (n, C, H, W) of the images with these numbers, in the model's units."""
        parts = [numbers[n : n + self.batch] for n in range(0, len(numbers), self.batch)]
        return torch.cat([self._responses(part) for part in parts])

    def _responses(self, numbers: list[int]) -> Tensor:
        images = [self.images[number] for number in numbers]
        names = [self.images.items[number].name for number in numbers]
        check_equal_sizes(images, names)
        x = torch.stack(images).to(self.device, self._dtype)
        if self.normalization is not None:
            x = self.projector.prepare(x)
        activations = self.projector.responses(x, [self.layer])[self.layer].float()
        finite = torch.isfinite(activations).flatten(1).all(1)
        if not finite.all():
            name = names[int((~finite).nonzero()[0])]
            raise ValueError(
                f"layer {self.layer!r}: NaN or infinite activations of the image {name}"
            )
        return activations


def _as_lazy(images: object, crop: Crop | None) -> LazyImages:
    """The images, each read on access, cropped unless they are already."""
    if isinstance(images, (str, Path)):
        images = DataSettings(source="folder", path=str(images), size=None, max_images=None)
    if isinstance(images, DataSettings):
        own = None if images.size is None else Crop(images.size, images.size)
        return lazy_images(images, crop=own or crop)
    if isinstance(images, LazyImages):
        return images if images.crop or crop is None else LazyImages(images.items, crop=crop)
    if not isinstance(images, ImageSet):
        pixels = as_images(images)
        images = ImageSet(pixels, tuple(map(str, range(len(pixels)))))
    return LazyImages.from_set(images, crop=crop)
