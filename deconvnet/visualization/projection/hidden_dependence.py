"""Detection of constants of a model that depend on the pixels without a gradient.

The autograd graph has only recorded operations. A mask that multiplies maps, as in `x * (x > 0)`,
is a constant there although it comes from the pixels, so the product looks linear but is a
rectifier. During the forward pass we therefore follow every tensor that comes from the pixels,
recorded or not, and mark the operations that mix the two kinds. Values that leave PyTorch (numbers,
NumPy arrays) cannot be followed; they are found by comparing the constants of two images.
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

# Operations that use only the shape of a tensor.
SHAPES_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("randint_like", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
}
# Adding random values is as linear as adding a bias.
SUMS = {"add", "sub", "rsub"}
PIXELS = "by what was computed from the pixels without a gradient"
RANDOM = "by random numbers"
# Constants that do not depend on the image agree up to this relative difference.
TOLERANCE = 1e-4

T = TypeVar("T")


@dataclass
class _Call:
    """A recorded operation and its constants."""

    name: str
    numbers: tuple[float, ...]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Traits:
    """Properties of an operation; writes: position and name of the arguments that it writes to."""

    name: str
    is_random: bool
    writes: tuple[tuple[int, str], ...]


class DependenceTracker(TorchDispatchMode):
    """Follows the pixels through a forward pass.

    Afterwards `marked` has the nodes of the graph that use values computed from the pixels by
    unrecorded operations, with a description.

    suspects: indices of recorded calls whose constants are known to depend on the image. If None,
    they are not known yet, and `calls` collects the constants of all calls for a comparison.
    """

    def __init__(self, suspects: frozenset[int] | None = None):
        super().__init__()
        self.suspects = suspects
        self.marked: dict[Node, str] = {}
        self.calls: list[_Call] = []
        self._count = 0
        self._pixels: Tensor | None = None
        # The results of the last operation and their mark, until autograd has made their nodes.
        self._results: list[Tensor] = []
        self._mark: str | None = None
        # By storage, because views share theirs.
        self._origins: _ByStorage[str] = _ByStorage()
        self._nodes: _ByStorage[Node] = _ByStorage()

    def begin(self, pixels: Tensor) -> None:
        """pixels: the leaf of the graph."""
        self._origins.put(pixels, PIXELS)
        self._pixels = pixels

    def finish(self) -> None:
        """Process the results of the last operation; to be called at the end of the pass."""
        for t in self._results:
            # An operation in place on a view is in the graph of its base.
            t = t if t._base is None else t._base
            if t.grad_fn is None:
                continue
            self._nodes.put(t, t.grad_fn)
            if self._mark is not None:
                self.marked.setdefault(t.grad_fn, self._mark)
        self._results, self._mark = [], None

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.finish()
        kwargs = kwargs or {}
        traits = _traits(func)
        values = (*args, *kwargs.values()) if kwargs else args
        inputs = _flatten(values, Tensor)
        sources = [self._origins.get(t) for t in inputs]
        written = _written(traits, args, kwargs) if traits.writes else []
        is_recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        if is_recorded:
            self._track(traits.name, values, inputs, sources)
        else:
            for t in written:
                node = self._nodes.get(t)
                if node is not None:
                    self.marked.setdefault(node, f"{traits.name} in place without a gradient")
        result = func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else _flatten((result,), Tensor)
        if traits.is_random:
            origin = RANDOM
        elif traits.name in SHAPES_ONLY:
            origin = None
        else:
            origin = PIXELS if PIXELS in sources else RANDOM if RANDOM in sources else None
        if origin is not None:
            for t in (*outputs, *written):
                self._origins.put(t, origin)
        self._results = outputs if is_recorded else []
        return result

    def _track(
        self, name: str, values: tuple, inputs: list[Tensor], sources: list[str | None]
    ) -> None:
        """Track a recorded operation; sources: the origins of its inputs."""
        # A tensor at which the model itself starts recording is a constant.
        constants = [
            (t, source)
            for t, source in zip(inputs, sources, strict=True)
            if not t.requires_grad or (t.is_leaf and t is not self._pixels)
        ]
        if (
            name == "copy"
            and constants
            and constants[0][0] is inputs[0]
            and self._is_overwritten(inputs[0])
        ):
            constants.pop(0)
        origins = [source for _, source in constants]
        if PIXELS in origins or (self.suspects and self._count in self.suspects):
            self._mark = f"{name} {PIXELS}"
        elif RANDOM in origins and name not in SUMS:
            self._mark = f"{name} {RANDOM}"
        self._count += 1
        if self.suspects is None:
            tensors = tuple(t for t, source in constants if source is None)
            self.calls.append(_Call(name, tuple(_flatten(values, (int, float))), tensors))

    def _is_overwritten(self, t: Tensor) -> bool:
        """Whether nothing that came from the pixels remains in a tensor that is copied into."""
        storage = _storage(t)
        is_complete = storage is not None and t.numel() * t.element_size() == storage.nbytes()
        return is_complete or self._origins.get(t) is None or self._nodes.get(t) is not None


class _ByStorage(Generic[T]):
    """A dictionary whose keys are the storages of tensors."""

    def __init__(self) -> None:
        # By address, which no other storage gets as long as there is a weak reference to this one.
        self._entries: dict[int, tuple[StorageWeakRef, T]] = {}

    def get(self, t: Tensor) -> T | None:
        storage = _storage(t)
        entry = None if storage is None else self._entries.get(storage._cdata)
        return None if entry is None else entry[1]

    def put(self, t: Tensor, value: T) -> None:
        storage = _storage(t)
        if storage is None:
            return
        entry = self._entries.get(storage._cdata)
        reference = StorageWeakRef(storage) if entry is None else entry[0]
        self._entries[reference.cdata] = (reference, value)


def differing_calls(one: DependenceTracker, other: DependenceTracker) -> frozenset[int]:
    """The indices of the calls whose constants differ between the passes of two images.

    Empty if the passes consist of different operations: a model may take different branches for
    different images, and each image is projected along its own branch.
    """
    if [call.name for call in one.calls] != [call.name for call in other.calls]:
        return frozenset()
    pairs = zip(one.calls, other.calls, strict=True)
    return frozenset(index for index, pair in enumerate(pairs) if _differ(*pair))


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


def _flatten(values: Sequence, kind: type | tuple[type, ...]) -> list:
    """All values of a type, including those within lists and tuples."""
    flat = []
    for value in values:
        if isinstance(value, kind):
            flat.append(value)
        elif isinstance(value, (list, tuple)):
            flat += _flatten(value, kind)
    return flat


def _written(traits: _Traits, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation writes to."""
    return [
        t
        for index, name in traits.writes
        for t in _flatten((args[index] if index < len(args) else kwargs.get(name),), Tensor)
    ]


@cache
def _traits(func: object) -> _Traits:
    return _Traits(
        func.overloadpacket.__name__.rstrip("_"),
        torch.Tag.nondeterministic_seeded in func.tags,
        tuple(
            (index, argument.name)
            for index, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
    )


def _storage(t: Tensor) -> UntypedStorage | None:
    try:
        return t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # of sparse tensors, which have none
        return None
