"""The loops over the taps of a filter that coordinate descent runs millions of times.

    r image (C, H, W + margin)   f filters (K, C, h, w), w padded to whole vectors (`padded`)

They are written as instructions of LLVM, so that they contain few branches and little code. Rows
are taken eight at a time, then four, two and one: for a filter of up to 15 rows and 16 columns,
no loop ends at a point that the processor has to guess. Long code is slow in a way that no test
of a single process shows: when sweeps were spread over five pages of memory, they took up to twice
as long in every second process, depending on where the system had put these pages.

Sums have a fixed order, so that every copy of the code computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from deconvnet.support.vectors import CONTRACT, LANES, LONG, alignment, splat, sum_of_lanes

# Independent sums, because an addition takes as long as several of them may start in.
_SUMS = 4

# step(pixels, taps, n): the instructions for the n-th vector of a block, from these addresses.
Step = Callable[[ir.Value, ir.Value, int], None]


@intrinsic
def correlate_at(
    typing: Any,
    r: types.Array,
    f: types.Array,
    planes: types.Array,
    k: types.Type,
    pixel: types.Type,
) -> tuple:
    """The inner product of r and filter k, whose first tap falls on r[c, ...].flat[pixel].

    The channels c are planes[k], up to the first -1.
    """
    _check(r, f, planes)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        loop = _Loop.of(context, builder, signature.args, values)
        result = cgutils.alloca_once(builder, loop.number)
        for lanes, over_vectors in loop.forms():
            vector = ir.VectorType(loop.number, lanes)
            sums = [cgutils.alloca_once(builder, vector) for _ in range(_SUMS)]
            for one in sums:
                builder.store(ir.Constant(vector, None), one)

            def step(pixels: ir.Value, taps: ir.Value, n: int, sums: list = sums) -> None:
                product = builder.fmul(loop.load(pixels), loop.load(taps), flags=CONTRACT)
                one = sums[n % _SUMS]
                builder.store(builder.fadd(product, builder.load(one), flags=CONTRACT), one)

            over_vectors(step)
            parts = [builder.load(one) for one in sums]
            while len(parts) > 1:
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [builder.fadd(*pair, flags=CONTRACT) for pair in pairs]
            builder.store(sum_of_lanes(builder, parts[0]), result)
        return builder.load(result)

    return r.dtype(r, f, planes, types.intp, types.intp), generate


@intrinsic
def paint_at(
    typing: Any,
    r: types.Array,
    f: types.Array,
    planes: types.Array,
    k: types.Type,
    pixel: types.Type,
    amount: types.Type,
) -> tuple:
    """r += amount * filter k, placed as by `correlate_at`."""
    _check(r, f, planes)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        loop = _Loop.of(context, builder, signature.args, values)
        for lanes, over_vectors in loop.forms():
            amounts = splat(builder, values[5], lanes)

            def step(pixels: ir.Value, taps: ir.Value, _: int, amounts: Any = amounts) -> None:
                product = builder.fmul(amounts, loop.load(taps), flags=CONTRACT)
                painted = builder.fadd(product, loop.load(pixels), flags=CONTRACT)
                builder.store(painted, pixels).align = loop.align

            over_vectors(step)
        return context.get_dummy_value()

    return types.none(r, f, planes, types.intp, types.intp, r.dtype), generate


def _check(r: types.Array, f: types.Array, planes: types.Array) -> None:
    for array, axes in ((r, 3), (f, 4), (planes, 2)):
        if array.layout != "C" or array.ndim != axes:
            raise TypingError(f"not a contiguous array of {axes} axes: {array}")
    if r.dtype != f.dtype:
        raise TypingError(f"not arrays of one type: {r}, {f}")


@dataclass(frozen=True)
class _Loop:
    """A loop over the vectors of filter k and the pixels under them.

    planes, f: the addresses of planes[k] and f[k]; r: that of the pixel in the first channel.
    plane, row: the numbers of a plane and of a row of r. C, h, w: the size of a filter.
    """

    builder: ir.IRBuilder
    number: ir.Type
    align: int
    planes: ir.Value
    r: ir.Value
    f: ir.Value
    plane: ir.Value
    row: ir.Value
    C: ir.Value
    h: ir.Value
    w: ir.Value

    @classmethod
    def of(cls, context: Any, builder: ir.IRBuilder, kinds: tuple, values: list) -> _Loop:
        r, f, planes = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(kinds[:3], values[:3], strict=True)
        )
        k, pixel = values[3:5]
        _, H, W = cgutils.unpack_tuple(builder, r.shape)
        _, C, h, w = cgutils.unpack_tuple(builder, f.shape)
        numbers = builder.mul(k, builder.mul(C, builder.mul(h, w)))
        return cls(
            *(builder, context.get_value_type(kinds[0].dtype), alignment(context, kinds[0])),
            builder.gep(planes.data, [builder.mul(k, C)], inbounds=True),
            builder.gep(r.data, [pixel], inbounds=True),
            builder.gep(f.data, [numbers], inbounds=True),
            *(builder.mul(H, W), W, C, h, w),
        )

    def load(self, address: ir.Value) -> ir.Value:
        numbers = self.builder.load(address)
        numbers.align = self.align
        return numbers

    def forms(self) -> Iterator[tuple[int, Callable[[Step], None]]]:
        """(lanes, over_vectors) for rows of one short vector, of a long one, and of several long
        ones: over_vectors(step) emits that form of the loop.
        """
        builder, w = self.builder, self.w
        with builder.if_else(builder.icmp_signed("==", w, w.type(LANES))) as (short, other):
            with short:
                yield LANES, lambda step: self._one_vector_per_row(LANES, step)
            with other, builder.if_else(builder.icmp_signed("==", w, w.type(LONG))) as branches:
                with branches[0]:
                    yield LONG, lambda step: self._one_vector_per_row(LONG, step)
                with branches[1]:
                    yield LONG, self._several_vectors_per_row

    def _one_vector_per_row(self, lanes: int, step: Step) -> None:
        for r, f in self._channels():
            self._blocks((r, f), (self.row, self.w.type(lanes)), self.h, lanes, step)

    def _several_vectors_per_row(self, step: Step) -> None:
        builder, w = self.builder, self.w
        lanes, count = w.type(LONG), builder.sdiv(w, w.type(LONG))
        for r, f in self._channels():
            with cgutils.for_range(builder, self.h) as rows:
                r = builder.gep(r, [builder.mul(rows.index, self.row)], inbounds=True)
                f = builder.gep(f, [builder.mul(rows.index, w)], inbounds=True)
                self._blocks((r, f), (lanes, lanes), count, LONG, step)

    def _channels(self) -> Iterator[tuple[ir.Value, ir.Value]]:
        """The addresses of the first pixel and the first tap, once for a loop over the channels."""
        builder = self.builder
        with cgutils.for_range(builder, self.C) as channels:
            c = builder.load(builder.gep(self.planes, [channels.index], inbounds=True))
            c = builder.sext(c, self.C.type)
            with builder.if_then(builder.icmp_signed("<", c, c.type(0))):
                channels.do_break()
            taps = builder.mul(c, builder.mul(self.h, self.w))
            yield (
                builder.gep(self.r, [builder.mul(c, self.plane)], inbounds=True),
                builder.gep(self.f, [taps], inbounds=True),
            )

    def _blocks(
        self,
        first: tuple[ir.Value, ir.Value],
        strides: tuple[ir.Value, ir.Value],
        count: ir.Value,
        lanes: int,
        step: Step,
    ) -> None:
        """Take so many vectors, from these addresses on at these strides, in blocks of 8, then at
        most one block each of 4, 2 and 1.
        """
        builder, vector = self.builder, ir.VectorType(self.number, lanes).as_pointer()
        cursors = [cgutils.alloca_once(builder, address.type) for address in first]
        for cursor, address in zip(cursors, first, strict=True):
            builder.store(address, cursor)

        def block(size: int) -> None:
            at = [builder.load(cursor) for cursor in cursors]
            for n in range(size):
                step(*(builder.bitcast(address, vector) for address in at), n)
                at = [
                    builder.gep(address, [stride], inbounds=True)
                    for address, stride in zip(at, strides, strict=True)
                ]
            for cursor, address in zip(cursors, at, strict=True):
                builder.store(address, cursor)

        with cgutils.for_range(builder, builder.lshr(count, count.type(3))):
            block(8)
        for size in (4, 2, 1):
            is_left = builder.icmp_signed(
                "!=", builder.and_(count, count.type(size)), count.type(0)
            )
            with builder.if_then(is_left):
                block(size)
