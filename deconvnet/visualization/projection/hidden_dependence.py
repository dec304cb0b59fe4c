"""Tracks what a model computes from the pixels without a gradient and then uses as a constant.

The autograd graph holds only recorded operations. A mask that multiplies maps, `x * (x > 0)`, is a
constant there although it comes from the pixels, so the product looks linear but is a rectifier.
During the forward pass we therefore follow every tensor that comes from the pixels, recorded or
not, and mark the operations that mix the two kinds. Values that leave PyTorch (numbers, NumPy
arrays) cannot be followed; we find them by comparing the constants of two images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# These use only the shape of a tensor.
SHAPES_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("randint_like", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
}
# Adding something random is as linear as adding a bias.
SUMS = {"add", "sub", "rsub"}
PIXELS = "by what was computed from the pixels without a gradient"
RANDOM = "by what is drawn at random"
# Constants that are the same for all images agree up to rounding.
TOLERANCE = 1e-4

T = TypeVar("T")


@dataclass
class _Call:
    """A recorded operation, and the constants in it."""

    name: str
    numbers: tuple[float, ...]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Traits:
    """What never changes about an operation; writes: the arguments it writes to, place and name."""

    name: str
    is_random: bool
    writes: tuple[tuple[int, str], ...]


class DependenceTracker(TorchDispatchMode):
    """Watches a forward pass; `marked` then says which nodes of the graph use something that came
    from the pixels by another way than the recorded one, and what it is.

    suspects: numbers of recorded calls whose constants are known to depend on the image; None: not
    known yet, and the constants of all calls are kept in `calls` to be compared.
    """

    def __init__(self, suspects: frozenset[int] | None = None):
        super().__init__()
        self.suspects = suspects
        self.marked: dict[Node, str] = {}
        self.calls: list[_Call] = []
        self._count = 0
        self._pixels: Tensor | None = None
        # The results of the last operation and what to mark them with, until they have their node.
        self._made: list[Tensor] = []
        self._says: str | None = None
        # By storage, since views share what they hold.
        self._origins: _ByStorage[str] = _ByStorage()
        self._nodes: _ByStorage[Node] = _ByStorage()

    def begin(self, pixels: Tensor) -> None:
        """pixels: the leaf of the graph."""
        self._origins.put(pixels, PIXELS)
        self._pixels = pixels

    def finish(self) -> None:
        """Call this when the pass has ended."""
        for t in self._made:
            # What is done in place to a view is in the graph of what it is a view of.
            t = t if t._base is None else t._base
            if t.grad_fn is None:
                continue
            self._nodes.put(t, t.grad_fn)
            if self._says is not None:
                self.marked.setdefault(t.grad_fn, self._says)
        self._made, self._says = [], None

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.finish()
        kwargs = kwargs or {}
        traits = _traits(func)
        values = (*args, *kwargs.values()) if kwargs else args
        given = _each(values, Tensor)
        sources = [self._origins.get(t) for t in given]
        written = _written(traits, args, kwargs) if traits.writes else []
        is_recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if is_recorded:
            self._note(traits.name, values, given, sources)
        else:
            for t in written:
                node = self._nodes.get(t)
                if node is not None:
                    self.marked.setdefault(node, f"{traits.name} in place without a gradient")
        result = func(*args, **kwargs)
        made = [result] if isinstance(result, Tensor) else _each((result,), Tensor)
        if traits.is_random:
            origin = RANDOM
        elif traits.name in SHAPES_ONLY:
            origin = None
        else:
            origin = PIXELS if PIXELS in sources else RANDOM if RANDOM in sources else None
        if origin is not None:
            for t in (*made, *written):
                self._origins.put(t, origin)
        self._made = made if is_recorded else []
        return result

    def _note(
        self, name: str, values: tuple, given: list[Tensor], sources: list[str | None]
    ) -> None:
        """An operation on the recorded way; sources: the origins of what it is given."""
        # A tensor at which the model itself starts recording counts as a constant.
        others = [
            (t, source)
            for t, source in zip(given, sources, strict=True)
            if not t.requires_grad or (t.is_leaf and t is not self._pixels)
        ]
        if name == "copy" and others and others[0][0] is given[0] and self._is_new(given[0]):
            others.pop(0)
        origins = [source for _, source in others]
        if PIXELS in origins or (self.suspects and self._count in self.suspects):
            self._says = f"{name} {PIXELS}"
        elif RANDOM in origins and name not in SUMS:
            self._says = f"{name} {RANDOM}"
        self._count += 1
        if self.suspects is None:
            constants = tuple(t for t, source in others if source is None)
            self.calls.append(_Call(name, tuple(_each(values, (int, float))), constants))

    def _is_new(self, t: Tensor) -> bool:
        """Whether what is copied into a tensor is all of it that comes from the pixels."""
        storage = _storage(t)
        whole = storage is not None and t.numel() * t.element_size() == storage.nbytes()
        return whole or self._origins.get(t) is None or self._nodes.get(t) is not None


class _ByStorage(Generic[T]):
    """What is noted of the storages of tensors."""

    def __init__(self) -> None:
        # By its address, which is given to no other as long as there is a weak reference to it.
        self._found: dict[int, tuple[StorageWeakRef, T]] = {}

    def get(self, t: Tensor) -> T | None:
        storage = _storage(t)
        found = None if storage is None else self._found.get(storage._cdata)
        return None if found is None else found[1]

    def put(self, t: Tensor, value: T) -> None:
        storage = _storage(t)
        if storage is None:
            return
        known = self._found.get(storage._cdata)
        reference = StorageWeakRef(storage) if known is None else known[0]
        self._found[reference.cdata] = (reference, value)


def differing_calls(one: DependenceTracker, other: DependenceTracker) -> frozenset[int]:
    """The numbers of the calls whose constants differ between the passes of two images.

    None if the passes consist of different operations: a model may take different branches for
    different images, and each image is projected along its own.
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


def _each(values: Sequence, kind: type | tuple[type, ...]) -> list:
    """All arguments of a kind, also those within lists."""
    found = []
    for value in values:
        if isinstance(value, kind):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _each(value, kind)
    return found


def _written(traits: _Traits, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operation writes into."""
    return [
        t
        for place, name in traits.writes
        for t in _each((args[place] if place < len(args) else kwargs.get(name),), Tensor)
    ]


@cache
def _traits(func: object) -> _Traits:
    return _Traits(
        func.overloadpacket.__name__.rstrip("_"),
        torch.Tag.nondeterministic_seeded in func.tags,
        tuple(
            (place, argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
    )


def _storage(t: Tensor) -> UntypedStorage | None:
    try:
        return t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # of sparse tensors, which have none
        return None
