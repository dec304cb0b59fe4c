"""Numbers that threads in compiled loops share without a lock.

What a thread wrote before `publish` is seen by another after `observe` has returned that number.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic


@intrinsic
def observe(typing: Any, array: types.Array, index: types.Type) -> tuple:
    """array[index], of an array (n,) of int64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        pointer = _pointer(context, builder, signature.args[0], values)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def publish(typing: Any, array: types.Array, index: types.Type, number: types.Type) -> tuple:
    """array[index] = number, in an array (n,) of int64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list) -> ir.Value:
        pointer = _pointer(context, builder, signature.args[0], values)
        builder.store_atomic(values[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.int64), generate


def _pointer(context: Any, builder: ir.IRBuilder, array: types.Array, values: list) -> ir.Value:
    data = context.make_array(array)(context, builder, values[0])
    return cgutils.get_item_pointer(context, builder, array, data, [values[1]])
