"""Checks of arguments at the public functions.

Arrays may be tensors or numpy arrays; inside the package they are tensors. An invalid argument
raises a one-line ValueError: its name, its value, and what would be right.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from deconvnet.support.torch_modes import autocasts

FLOATS = (torch.float32, torch.float64)


@runtime_checkable
class OnDemand(Protocol):
    """Images (N, C, H, W) that are read when they are needed, in place of a tensor of all."""

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""

    @property
    def device(self) -> torch.device:
        """The device of the images that are read."""

    def read(self, indices: Tensor) -> Tensor:
        """The images (n, C, H, W) with these indices (n,)."""


# The side of square filters, or (rows, columns).
FilterSize = int | Sequence[int]


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor or numpy array of real numbers, of any shape, as a plain tensor without a gradient.

    It shares the memory of an array where it can. A subclass of Tensor, such as an image of
    torchvision, is converted to a plain tensor. Images on demand are all read.
    """
    if isinstance(value, np.ndarray):
        return _of_array(value, name)
    if isinstance(value, OnDemand):
        value = value.read(torch.arange(value.shape[0]))
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor or a numpy array, got {_kind(value, name)}")
    check_numbers(value, name)
    value = value.detach()
    # The compiled loops use numpy, which has no lazy negation.
    return (value if type(value) is Tensor else value.as_subclass(Tensor)).resolve_neg()


def check_numbers(value: Tensor, name: str) -> None:
    """Raise ValueError for a tensor that is not dense, real and unquantised."""
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got {value.layout}: use {name}.to_dense()")
    if value.is_complex():
        raise ValueError(f"{name} must be real, got {value.dtype}: use {name}.real or {name}.abs()")
    if value.is_quantized:
        raise ValueError(
            f"{name} must be plain numbers, got {value.dtype}: use {name}.dequantize()"
        )
    if value.is_meta:
        raise ValueError(f"{name} is on the device meta and has no numbers: must be on another")


def check_tensors(**tensors: Any) -> None:
    """Raise ValueError unless all are floating-point tensors of one dtype on one device.

    For the differentiable functions, which accept only tensors and keep gradients.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            use = f": use torch.from_numpy({name})" if isinstance(value, np.ndarray) else ""
            raise ValueError(f"{name} must be a tensor, got {_kind(value, name)}{use}")
        if value.layout != torch.strided or not value.is_floating_point():
            check_numbers(value, name)
            raise ValueError(
                f"{name} must be floating, got {value.dtype}: use {_floats(value, name)}"
            )
    (first, reference), *others = tensors.items()
    for name, value in others:
        if value.device != reference.device:
            raise ValueError(
                f"{first} is on {reference.device} and {name} on {value.device}: must be one"
            )
        # autocast would convert them to one dtype.
        if value.dtype != reference.dtype and not autocasts(value.device.type):
            raise ValueError(
                f"{first} is {reference.dtype} and {name} {value.dtype}: must be one, for example "
                f"by {name}.to({first})"
            )


def as_images(value: Any, name: str = "images") -> Tensor:
    """Non-empty images (N, C, H, W), float32 or float64, as a tensor."""
    images = as_tensor(value, name)
    if images.ndim != 4:
        more = {
            2: f": use {name}[None, None]",
            3: f": use {name}[None] for one image (C, H, W), {name}[:, None] for grey images "
            f"(N, H, W), or {name}[:, :, None] for signals (N, C, T)",
        }
        raise ValueError(
            f"{name} must have the shape (N, C, H, W), got {tuple(images.shape)}"
            f"{more.get(images.ndim, '')}"
        )
    if images.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be float32 or float64, got {images.dtype}: use {_floats(value, name)}"
        )
    if images.numel() == 0:
        raise ValueError(f"{name} must not be empty, got the shape {tuple(images.shape)}")
    return images


def as_filters(value: Any, channels: int, name: str = "filters") -> Tensor:
    """Non-empty filters (K, C, h, w) for images of this many channels, as a tensor."""
    filters = as_tensor(value, name)
    if filters.ndim != 4 or filters.shape[1] != channels:
        more = ""
        if filters.ndim == 3:
            more = (
                f": use {name}[:, None] for grey filters (K, h, w), or torch.as_tensor({name})"
                ".permute(2, 0, 1)[:, None] for SPORCO's (h, w, K)"
            )
        elif (
            filters.ndim == 4 and len(set(filters.shape[:2])) == 1 and filters.shape[2] == channels
        ):
            more = f": use torch.as_tensor({name}).permute(3, 2, 0, 1) for SPORCO's (h, w, C, K)"
        elif channels > 16 and filters.ndim == 4 and filters.shape[1] <= 3:
            more = "; images (N, H, W, C) need .permute(0, 3, 1, 2)"
        elif filters.ndim == 4 and filters.shape[1] == 1:
            more = (
                ": use images.mean(1, keepdim=True) for grey images, or "
                f"deconvnet.operators.convolution.per_channel({name}, {channels}) to code each "
                "channel by itself"
            )
        raise ValueError(
            f"{name} must have the shape (K, {channels}, h, w) for images (N, {channels}, H, W), "
            f"got {tuple(filters.shape)}{more}"
        )
    if filters.numel() == 0:
        raise ValueError(f"{name} must not be empty, got the shape {tuple(filters.shape)}")
    return filters


def as_weights(value: Any, name: str = "weights") -> Tensor:
    """Weights as a tensor, from an array, a number, or a list of numbers."""
    if isinstance(value, (list, tuple, int, float, np.generic)):
        try:
            value = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} must be numbers, got {_kind(value, name)}") from None
    return as_tensor(value, name)


def images_of_batch(batch: Any, name: str) -> Tensor:
    """The images of a DataLoader batch: a tensor, or a list or tuple of images and labels.

    The first element of a list is used; it must be the only one with the shape of images.
    """
    if isinstance(batch, dict):
        keys = ", ".join(map(repr, batch))
        raise ValueError(
            f"{name} is a dict of {keys}: give its images alone, for example by "
            "(batch['image'] for batch in batches)"
        )
    if isinstance(batch, (list, tuple)):
        dimensions = [getattr(element, "ndim", 0) for element in batch]
        if len(dimensions) == 2 and min(dimensions) == 4:
            raise ValueError(
                f"{name} is a {type(batch).__name__} of 2 tensors of images: use mask=True if the "
                "second is their mask"
            )
        if not dimensions or dimensions[0] < 4 or max(dimensions[1:], default=0) > 3:
            raise ValueError(
                f"{name} is {_kind(batch, name)}: must be images (N, C, H, W), or a list or tuple "
                "of images and their labels, which are ignored"
            )
        batch = batch[0]
    return as_tensor(batch, name)


def as_positive_number(value: Any, name: str) -> float:
    """A positive finite number from a Python or numpy number or a tensor of one element."""
    number = as_number(value, name)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={number}: must be positive and finite")
    return number


def as_number(value: Any, name: str) -> float:
    """A real number from a Python or numpy number or a tensor of one element."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        # torch warns of numbers whose gradient is lost; those who ask for one keep the tensor.
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={_short(value)}: must be a number") from None


def as_positive_integer(value: Any, name: str, why: str = "") -> int:
    """An integer of at least 1; why: how the message for any other value ends."""
    try:
        number, is_integer = operator.index(value), True
    except TypeError:
        number, is_integer = 0, False
    if number < 1:
        expected = "at least 1" if is_integer else f"a whole number from 1{why}"
        raise ValueError(f"{name}={_short(value)}: must be {expected}")
    return number


def as_filter_size(value: Any, name: str = "filter_size") -> tuple[int, int]:
    """(h, w) of filters from one whole number, the side of a square, or two, (rows, columns)."""
    either = ", or two, (rows, columns)"
    several = isinstance(value, Sequence) and not isinstance(value, str)
    sides = tuple(value) if several or getattr(value, "ndim", 0) == 1 else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name}={_short(value)}: must be a whole number from 1{either}")
    try:
        h, w = (as_positive_integer(side, name, either) for side in sides)
    except ValueError:
        if sides == (value, value):
            raise
        raise ValueError(f"{name}={_short(value)}: must be whole numbers from 1") from None
    return h, w


def check_settings(value: Any, kind: type, name: str, *, optional: bool = True) -> None:
    """Raise ValueError unless value is an instance of `kind`, or None if it is optional."""
    if isinstance(value, kind) or (optional and value is None):
        return
    use = f"use {kind.__name__}({value!r})" if isinstance(value, str) else ""
    raise ValueError(f"{name}={_short(value)}: {use or f'must be {kind.__name__}(...)'}")


def _of_array(value: np.ndarray, name: str) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array: use {name}.filled(0) and pass the mask separately"
        )
    if value.dtype.kind not in "buif":
        raise ValueError(f"{name} must be real numbers, got an array of {value.dtype}")
    if value.dtype.itemsize > 8:
        raise ValueError(f"{name} must be float32 or float64, got an array of {value.dtype}")
    # torch supports no other byte order and no negative strides, and warns of read-only memory.
    native = value.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(value, native, requirements=["C", "W", "E"]))


def _floats(value: Any, name: str) -> str:
    """The expression that converts an array of another dtype to floats, for an error."""
    floats = f"{name}.float()" if isinstance(value, Tensor) else f"{name}.astype('float32')"
    return f"{floats} / 255" if str(value.dtype).endswith("uint8") else floats


def _kind(value: Any, name: str) -> str:
    """A description of a value for an error, with the way to convert it."""
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        inside = sorted({type(element).__name__ for element in value})
        if inside == ["Tensor"]:
            shapes = ", ".join(str(tuple(element.shape)) for element in value[:3])
            return f"a {kind} of {len(value)} tensors of {shapes}: torch.stack or torch.cat them"
        convert = {"ndarray": "stack", "list": "array", "float": "array", "int": "array"}
        kinds = convert.keys() & set(inside) if len(inside) == 1 else ()
        use = "".join(f": use np.{convert[kind]}({name})" for kind in kinds)
        return f"a {kind} of {len(value)} {' and '.join(inside[:3]) or 'things'}{use}"
    if hasattr(value, "__iter__") and hasattr(value, "batch_size"):
        return f"{kind}: batches are for learn_online"
    if isinstance(value, np.lib.npyio.NpzFile):
        return f"{kind}: use one of its arrays, {', '.join(value.files[:8])}"
    if isinstance(value, (str, Path)) and name == "images":
        return f"{kind}: use deconvnet.read_image(path)[None]"
    return kind


def _short(value: Any) -> str:
    """The repr of a value, shortened to fit in a one-line error."""
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) != 1:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
