"""The training data of one layer: its inputs and targets, by image index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from deconvnet.images.holes import fill_holes
from deconvnet.network.codes import Codes
from deconvnet.network.layer import LayerProblem
from deconvnet.network.network import DeconvNet
from deconvnet.operators.linear import Mask
from deconvnet.support.validation import OnDemand


@dataclass(frozen=True)
class LayerData:
    """The training images of one layer. Both functions take the indices (n,) of images.

    layer_input: the input (n, C, H, W) of the layer, in the space its filters synthesise; shape is
    (C, H, W). problem: the layer's target, and the operator between the two. prefetch: is called
    with the next indices, if the images are read from disk. seen: which pixels of the input are
    known (n, C or 1, H, W), if not all are; the others are interpolated.
    """

    num_images: int
    shape: torch.Size
    device: torch.device
    layer_input: Callable[[Tensor], Tensor]
    problem: Callable[[Tensor], LayerProblem]
    prefetch: Callable[[Tensor], None] | None = None
    seen: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def from_tensor(
        cls, b: Tensor, problem: Callable[[Tensor], LayerProblem] | None = None
    ) -> LayerData:
        """Data in memory: b (N, C, H, W) is the input and, by default, the target of the layer."""
        return cls(
            len(b),
            b.shape[1:],
            b.device,
            lambda images: b[images],
            problem or (lambda images: LayerProblem(b[images])),
        )

    @classmethod
    def from_images(cls, images: OnDemand) -> LayerData:
        """Images (N, C, H, W) that are read when they are needed."""
        count, *shape = images.shape
        return cls(
            count,
            torch.Size(shape),
            images.device,
            images.read,
            lambda indices: LayerProblem(images.read(indices)),
        )

    @classmethod
    def from_masked(cls, images: Tensor, mask: Mask) -> LayerData:
        """Images (N, C, H, W) in memory, whose errors count as their mask says."""
        target = mask.target(images)

        def seen(indices: Tensor) -> Tensor:
            return mask[indices].mask.expand(len(indices), -1, -1, -1) > 0

        return cls(
            len(images),
            images.shape[1:],
            images.device,
            lambda indices: fill_holes(images[indices], seen(indices)),
            lambda indices: LayerProblem(target[indices], mask[indices]),
            seen=seen,
        )

    @classmethod
    def from_codes(cls, net: DeconvNet, codes: Codes, number: int) -> LayerData:
        """The data of layer `number`, given the codes of the layers below it."""
        data = cls.from_tensor(
            net.layer_input(codes, number), partial(net.layer_problem, codes, number)
        )
        if number > 1 or codes.mask is None:
            return data
        return replace(data, seen=lambda images: codes.mask[images] > 0)
