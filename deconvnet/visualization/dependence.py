"""What a model computes from the pixels without a gradient, and then computes with.

The graph of autograd holds what is recorded. A mask that multiplies maps, `x * (x > 0)`, is a
constant there, though it comes from the pixels: seen from the graph the product is linear, and
it is a rectifier. So during the forward pass every tensor is followed that comes from the pixels,
recorded or not, and the operations that mix the two kinds are marked. Values that leave PyTorch
(numbers, arrays of NumPy) cannot be followed: they are found by what differs for another image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# They take of a tensor its shape only.
SHAPES_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("randint_like", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
}
# With something random, sums are as linear as with a bias.
SUMS = {"add", "sub", "rsub"}
PIXELS = "by what was computed from the pixels without a gradient"
RANDOM = "by what is drawn at random"
# Constants that are the same for all images agree to rounding.
TOLERANCE = 1e-4


@dataclass
class _Call:
    """An operation on the recorded way, and the constants in it."""

    name: str
    numbers: tuple[float, ...]
    tensors: tuple[Tensor, ...]


class Dependence(TorchDispatchMode):
    """Within it a forward pass is watched; `marked` then says of nodes of the graph what entered
    there beside the recorded way of the pixels.

    suspects: numbers of calls on the recorded way whose constants are known to depend on the image.
    """

    def __init__(self, suspects: frozenset[int] = frozenset()):
        super().__init__()
        self.suspects = suspects
        self.marked: dict[Node, str] = {}
        self.calls: list[_Call] = []
        # What the last operation has made, and what is to be said of it, until it has its node.
        self._made: list[Tensor] = []
        self._says: str | None = None
        # By storage, since views share what they hold: weakly, so that none is kept alive and no
        # other is taken for it.
        self._origins: dict[StorageWeakRef, str] = {}
        self._nodes: dict[StorageWeakRef, Node] = {}

    def begin(self, pixels: Tensor) -> None:
        """pixels: the leaf of the graph."""
        self._origins[_storage(pixels)] = PIXELS

    def finish(self) -> None:
        """To be called when the pass has ended."""
        for t in self._made:
            # What is done in place to a view is in the graph of what it is a view of.
            t = t if t._base is None else t._base
            if t.grad_fn is None:
                continue
            self._nodes[_storage(t)] = t.grad_fn
            if self._says is not None:
                self.marked.setdefault(t.grad_fn, self._says)
        self._made, self._says = [], None

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.finish()
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        values = (*args, *kwargs.values())
        given = list(_each(values, Tensor))
        written = _written(func, args, kwargs)
        origins = {self._origin(t) for t in given}
        is_recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if is_recorded:
            self._note(name, values, given)
        else:
            for t in written:
                node = self._nodes.get(_storage(t))
                if node is not None:
                    self.marked.setdefault(node, f"{name} in place without a gradient")
        result = func(*args, **kwargs)
        made = list(_each((result,), Tensor))
        if torch.Tag.nondeterministic_seeded in func.tags:
            origins = {RANDOM}
        if name not in SHAPES_ONLY or origins == {RANDOM}:
            for origin in (RANDOM, PIXELS):
                if origin in origins:
                    self._origins.update({_storage(t): origin for t in (*made, *written)})
        self._origins.pop(None, None)
        self._made = made if is_recorded else []
        return result

    def _note(self, name: str, values: tuple, given: list[Tensor]) -> None:
        """An operation on the recorded way."""
        others = [t for t in given if not t.requires_grad]
        if name == "copy" and others and others[0] is given[0] and self._is_new(given[0]):
            others.pop(0)
        origins = {self._origin(t) for t in others}
        if PIXELS in origins or len(self.calls) in self.suspects:
            self._says = f"{name} {PIXELS}"
        elif RANDOM in origins and name not in SUMS:
            self._says = f"{name} {RANDOM}"
        constants = tuple(t for t in others if self._origin(t) is None)
        self.calls.append(_Call(name, tuple(_each(values, int | float)), constants))

    def _is_new(self, t: Tensor) -> bool:
        """Whether what is copied into a tensor is all of it that comes from the pixels."""
        storage = _storage(t)
        whole = storage is not None and (
            t.numel() * t.element_size() == t.untyped_storage().nbytes()
        )
        return whole or self._origin(t) is None or storage in self._nodes

    def _origin(self, t: Tensor) -> str | None:
        return self._origins.get(_storage(t))


def differing(one: Dependence, other: Dependence) -> frozenset[int]:
    """The numbers of the calls whose constants differ between the passes of two images.

    None of them if the passes are not of the same operations: a model may go other ways for other
    images, and each is projected along its own.
    """
    if [call.name for call in one.calls] != [call.name for call in other.calls]:
        return frozenset()
    pairs = zip(one.calls, other.calls, strict=True)
    return frozenset(number for number, pair in enumerate(pairs) if _differ(*pair))


def _differ(one: _Call, other: _Call) -> bool:
    if len(one.numbers) != len(other.numbers) or len(one.tensors) != len(other.tensors):
        return True
    numbers = zip(one.numbers, other.numbers, strict=True)
    tensors = zip(one.tensors, other.tensors, strict=True)
    return any(not math.isclose(a, b, rel_tol=TOLERANCE) for a, b in numbers) or any(
        a is not b and not _alike(a, b) for a, b in tensors
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=TOLERANCE, equal_nan=True)


def _each(values: object, kind: type) -> Iterator:
    """What is of a kind in arguments and the lists among them."""
    for value in values:
        if isinstance(value, kind):
            yield value
        elif isinstance(value, list | tuple):
            yield from _each(value, kind)


def _written(func: object, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operation writes into."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += _each((value,), Tensor)
    return found


def _storage(t: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(t.untyped_storage())
    except (NotImplementedError, RuntimeError):  # of sparse tensors, which have none
        return None
