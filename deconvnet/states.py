"""What is remembered of images from one visit to the next, where inference goes on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deconvnet.pooling import Window, max_pool, unpool


class States:
    """The state of inference of images, so that each visit starts where the last one ended, and
    numbers that go with it.

    images: their indices, ascending, by which they are asked for. A state is kept as maps; with a
    window as pooled maps and switches, which is all that such a state is and takes a ninth of the
    memory.
    """

    def __init__(self, images: Tensor, window: Window | None = None):
        self.images, self.window = images, window
        self.shape: tuple[int, ...] | None = None
        self.kept: list[Tensor] = []
        # Of every image the gradient step that served it, and ||T||^2: (N, 1, 1, 1), NaN for none.
        self.numbers: dict[str, Tensor] = {}

    def __getitem__(self, part: Tensor) -> Tensor | None:
        if self.shape is None:
            return None
        kept = [tensor[self._rows(part)] for tensor in self.kept]
        return kept[0] if self.window is None else unpool(*kept, (len(part), *self.shape))

    def __setitem__(self, part: Tensor, state: Tensor) -> None:
        new = (state,) if self.window is None else max_pool(state, self.window)
        if self.shape is None:
            self.shape = tuple(state.shape[1:])
            self.kept = [tensor.new_zeros(len(self.images), *tensor.shape[1:]) for tensor in new]
            if self.window is not None:
                # No two switches of an image may be the same.
                self.kept[1][:] = new[1][:1]
        for tensor, values in zip(self.kept, new, strict=True):
            tensor[self._rows(part)] = values

    def number(self, name: str, part: Tensor) -> Tensor | None:
        """A number of these images (N, 1, 1, 1), if all have one."""
        values = self.numbers.get(name)
        values = None if values is None else values[self._rows(part)]
        return None if values is None or values.isnan().any() else values

    def set_number(self, name: str, part: Tensor, values: Tensor) -> None:
        if name not in self.numbers:
            self.numbers[name] = values.new_full((len(self.images), 1, 1, 1), math.nan)
        self.numbers[name][self._rows(part)] = values

    def state_dict(self) -> dict:
        return {
            "images": self.images.cpu(),
            "shape": self.shape,
            "kept": [tensor.cpu() for tensor in self.kept],
            "numbers": {name: values.cpu() for name, values in self.numbers.items()},
        }

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Take from the states of at least these images what belongs to them."""
        rows = torch.searchsorted(state["images"], self.images.cpu())
        self.shape = state["shape"]
        self.kept = [tensor[rows].to(device) for tensor in state["kept"]]
        self.numbers = {name: v[rows].to(device) for name, v in state["numbers"].items()}

    def _rows(self, part: Tensor) -> Tensor:
        return torch.searchsorted(self.images, part)


def all_states(parts: list[dict]) -> dict:
    """The states of the images of all ranks as those of one."""
    # A rank without images has nothing of any shape.
    parts = [part for part in parts if len(part["images"])]
    images = torch.cat([part["images"] for part in parts])
    order = images.argsort()
    names = {name for part in parts for name in part["numbers"]}

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    def numbers(name: str, part: dict) -> Tensor:
        return part["numbers"].get(name, torch.full((len(part["images"]), 1, 1, 1), math.nan))

    return {
        "images": images[order],
        "shape": parts[0]["shape"],
        "kept": [joined(list(each)) for each in zip(*(p["kept"] for p in parts), strict=True)],
        "numbers": {name: joined([numbers(name, part) for part in parts]) for name in names},
    }
