"""Vectors of a fixed number of lanes for compiled loops, whatever the compiler makes of the loops.

A variable in such a loop holds LANES numbers, in loops that are written as instructions also LONG
ones. A step is one instruction of the processor, or several if its registers are shorter. Arrays
are contiguous and indexed by element, as if flat.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, register_model

LANES = 8
LONG = 2 * LANES
# Correlations are computed for so many filters and pixels at a time, which fill the registers.
_HAS_LONG_VECTORS = get_host_cpu_features().get("avx512f", False)
FILTERS, _WIDE = (8, 16) if _HAS_LONG_VECTORS else (4, 8)
BLOCK = 2 * _WIDE

_INDEX = ir.IntType(32)
CONTRACT = ("contract",)


class Vector(types.Type):
    """The type of a vector of these numbers."""

    def __init__(self, dtype: types.Type):
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector):
        number = manager[kind.dtype].get_value_type()
        super().__init__(manager, kind, ir.VectorType(number, LANES))


@intrinsic
def load(typing: Any, array: types.Array, index: types.Type) -> tuple:
    """The numbers array[index], array[index + 1], ..."""
    vector = _vector_of(array)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        numbers = builder.load(_pointer(context, builder, array, *values))
        numbers.align = alignment(context, array)
        return numbers

    return vector(array, types.intp), generate


@intrinsic
def load_first(typing: Any, array: types.Array, index: types.Type, count: types.Type) -> tuple:
    """The first `count` numbers from array[index] on, then zeros; these are not read."""
    vector = _vector_of(array)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        data, index, count = values
        pointer = _pointer(context, builder, array, data, index)
        of = pointer.type.pointee
        lanes = ir.VectorType(_INDEX, LANES)
        counts = splat(builder, builder.trunc(count, _INDEX))
        mask = builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), counts)
        signature = ir.FunctionType(of, [pointer.type, _INDEX, mask.type, of])
        name = f"llvm.masked.load.v{LANES}f{8 * context.get_abi_sizeof(of.element)}.p0"
        function = cgutils.get_or_insert_function(builder.module, signature, name)
        numbers_align = ir.Constant(_INDEX, alignment(context, array))
        return builder.call(function, [pointer, numbers_align, mask, ir.Constant(of, None)])

    return vector(array, types.intp, types.intp), generate


@intrinsic
def store(typing: Any, array: types.Array, index: types.Type, vector: Vector) -> tuple:
    """Write a vector to array[index], array[index + 1], ..."""
    _check_vectors(array.dtype, vector, _vector_of(array))

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        data, index, numbers = values
        stored = builder.store(numbers, _pointer(context, builder, array, data, index))
        stored.align = alignment(context, array)
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), generate


@intrinsic
def fill(typing: Any, number: types.Type) -> tuple:
    """A vector of the same number."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        return splat(builder, values[0])

    return Vector(number)(number), generate


@intrinsic
def multiply(typing: Any, a: Vector, b: Vector) -> tuple:
    """a b."""
    return _arithmetic(lambda builder, a, b: builder.fmul(a, b), a, b)


@intrinsic
def add(typing: Any, a: Vector, b: Vector) -> tuple:
    """a + b."""
    return _arithmetic(lambda builder, a, b: builder.fadd(a, b), a, b)


@intrinsic
def multiply_add(typing: Any, a: Vector, b: Vector, c: Vector) -> tuple:
    """a b + c, rounded once where the processor can."""

    def generate(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return builder.fadd(builder.fmul(a, b, flags=CONTRACT), c, flags=CONTRACT)

    return _arithmetic(generate, a, b, c)


@intrinsic
def magnitude(typing: Any, a: Vector) -> tuple:
    """|a|."""
    return _arithmetic(lambda builder, a: _called(builder, "llvm.fabs", a), a)


@intrinsic
def square_root(typing: Any, a: Vector) -> tuple:
    """The square root of a."""
    return _arithmetic(lambda builder, a: _called(builder, "llvm.sqrt", a), a)


@intrinsic
def where_greater(typing: Any, a: Vector, b: Vector, c: Vector, d: Vector) -> tuple:
    """c in the lanes in which a > b, else d."""

    def generate(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value:
        a, b, c, d = values
        return builder.select(builder.fcmp_ordered(">", a, b), c, d)

    return _arithmetic(generate, a, b, c, d)


@intrinsic
def total(typing: Any, a: Vector) -> tuple:
    """The sum of the lanes, of the first and the second half, and so on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        return sum_of_lanes(builder, values[0])

    return a.dtype(a), generate


@intrinsic
def correlate_block(
    typing: Any,
    tile: types.Array,
    y: types.Array,
    pixel: types.Type,
    f: types.Array,
    tap: types.Type,
    sizes: types.BaseTuple,
) -> tuple:
    """Set tile (FILTERS, BLOCK) to the correlations of so many filters at consecutive pixels of a
    row, from y[pixel] on.

    f: from f[tap] on the first tap of each filter, then the second of each, and so on. sizes (plane
    of y, row of y, C, h, w): the numbers of a plane and a row of y, and the size of a filter.
    """
    arrays = (tile, y, f)
    if any(_vector_of(array) != _vector_of(y) for array in arrays):
        raise TypingError(f"not arrays of one type: {arrays}")

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        number = context.get_value_type(y.dtype)
        wide, size = ir.VectorType(number, _WIDE), context.get_abi_sizeof(number)
        tile_at, y_at, f_at = (
            context.make_array(array)(context, builder, values[position]).data
            for array, position in zip(arrays, (0, 1, 3), strict=True)
        )
        plane, row, C, h, w = cgutils.unpack_tuple(builder, values[5])

        def vector(first: ir.Value, index: ir.Value) -> ir.Value:
            element = builder.gep(first, [index], inbounds=True)
            return builder.bitcast(element, wide.as_pointer())

        sums = [[cgutils.alloca_once(builder, wide) for _ in range(2)] for _ in range(FILTERS)]
        for one in itertools.chain(*sums):
            builder.store(ir.Constant(wide, None), one)
        with (
            cgutils.for_range(builder, C) as of_channels,
            cgutils.for_range(builder, h) as of_rows,
            cgutils.for_range(builder, w) as of_columns,
        ):
            c, m, q = (loop.index for loop in (of_channels, of_rows, of_columns))
            start = builder.add(builder.mul(c, plane), builder.mul(m, row))
            start = builder.add(builder.add(values[2], start), q)
            taps = builder.add(builder.mul(builder.add(builder.mul(c, h), m), w), q)
            taps = builder.add(values[4], builder.mul(taps, taps.type(FILTERS)))
            pixels = []
            for half in range(2):
                pointer = vector(y_at, builder.add(start, start.type(half * _WIDE)))
                pixels.append(builder.load(pointer))
                pixels[-1].align = size
            for k in range(FILTERS):
                one = builder.load(builder.gep(f_at, [builder.add(taps, taps.type(k))]))
                one = splat(builder, one, _WIDE)
                for half in range(2):
                    product = builder.fmul(one, pixels[half], flags=CONTRACT)
                    so_far = builder.load(sums[k][half])
                    builder.store(builder.fadd(product, so_far, flags=CONTRACT), sums[k][half])
        for k, half in itertools.product(range(FILTERS), range(2)):
            pointer = vector(tile_at, values[2].type(k * BLOCK + half * _WIDE))
            builder.store(builder.load(sums[k][half]), pointer).align = size
        return context.get_dummy_value()

    return types.none(tile, y, types.intp, f, types.intp, sizes), generate


def padded(rows: np.ndarray) -> np.ndarray:
    """The same with zeros appended to the last axis, up to LANES numbers or a multiple of LONG."""
    length = rows.shape[-1]
    width = LANES if length <= LANES else -(-length // LONG) * LONG
    whole = np.zeros((*rows.shape[:-1], width), rows.dtype)
    whole[..., :length] = rows
    return whole


def _arithmetic(operation: Callable, *vectors: Vector) -> tuple:
    _check_vectors(vectors[0].dtype, *vectors)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        return operation(builder, *values)

    return vectors[0](*vectors), generate


def _vector_of(array: types.Array) -> Vector:
    if array.layout != "C":
        raise TypingError(f"vectors are of contiguous arrays, not of {array}")
    return Vector(array.dtype)


def _check_vectors(dtype: types.Type, *vectors: types.Type) -> None:
    if any(not isinstance(vector, Vector) or vector.dtype != dtype for vector in vectors):
        raise TypingError(f"not vectors of {dtype}: {', '.join(map(str, vectors))}")


def _pointer(
    context: Any, builder: ir.IRBuilder, array: types.Array, data: ir.Value, index: ir.Value
) -> ir.Value:
    """The address of array[index], of a vector."""
    first = context.make_array(array)(context, builder, data).data
    element = builder.gep(first, [index], inbounds=True)
    return builder.bitcast(element, context.get_value_type(Vector(array.dtype)).as_pointer())


def sum_of_lanes(builder: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """The sum that `total` computes."""
    lanes = numbers.type.count
    while lanes > 1:
        lanes //= 2
        halves = (
            builder.shuffle_vector(
                numbers,
                numbers,
                ir.Constant(ir.VectorType(_INDEX, lanes), list(range(first, first + lanes))),
            )
            for first in (0, lanes)
        )
        numbers = builder.fadd(*halves, flags=CONTRACT)
    return builder.extract_element(numbers, ir.Constant(_INDEX, 0))


def alignment(context: Any, array: types.Array) -> int:
    """That of the numbers of an array, in bytes."""
    return context.get_abi_sizeof(context.get_value_type(array.dtype))


def splat(builder: ir.IRBuilder, number: ir.Value, lanes: int = LANES) -> ir.Value:
    """A vector of the same number."""
    nothing = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    one = builder.insert_element(nothing, number, ir.Constant(_INDEX, 0))
    first = ir.Constant(ir.VectorType(_INDEX, lanes), [0] * lanes)
    return builder.shuffle_vector(one, nothing, first)


def _called(builder: ir.IRBuilder, name: str, vector: ir.Value) -> ir.Value:
    bits = 64 if isinstance(vector.type.element, ir.DoubleType) else 32
    signature = ir.FunctionType(vector.type, [vector.type])
    name = f"{name}.v{LANES}f{bits}"
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, [vector])
