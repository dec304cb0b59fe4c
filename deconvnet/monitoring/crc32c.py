"""The checksum of the records of TensorBoard's event files: CRC-32C (RFC 3720, appendix B.4).

TensorBoard computes it byte by byte in Python, which takes a second for 10 MB of pictures. Here
long data are cut into rows of equal length, whose checksums are computed all at once.
"""

from __future__ import annotations

from functools import cache

import numpy as np

POLYNOMIAL = 0x82F63B78
ONES = 0xFFFFFFFF
# Bytes of a row, and the number of rows from which they are faster than single bytes.
ROW, ROWS = 256, 64


def crc32c(data: bytes) -> int:
    """The CRC-32C of some bytes, from 0 to 2^32 - 1."""
    single = len(data) % ROW if len(data) >= ROW * ROWS else len(data)
    table = _table().tolist()
    register = ONES
    for byte in data[:single]:
        register = table[(register ^ byte) & 255] ^ register >> 8
    if single < len(data):
        rows = np.frombuffer(data, np.uint8, offset=single).reshape(-1, ROW)
        # The checksum is linear: that of what came before, moved on by a row of zeros, plus that of
        # the row alone.
        moved = _moved()
        for row in _registers(np.zeros(len(rows), np.uint32), rows).tolist():
            low, high = register & 0xFFFF, register >> 16
            before = moved[0][low & 255] ^ moved[1][low >> 8]
            register = before ^ moved[2][high & 255] ^ moved[3][high >> 8] ^ row
    return register ^ ONES


def _registers(registers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The registers (R,) after the bytes of the rows (R, length), one row for each register."""
    table = _table()
    for column in np.ascontiguousarray(rows.T):
        registers = table[(registers ^ column) & 255] ^ registers >> 8
    return registers


@cache
def _table() -> np.ndarray:
    """(256,): the register that each byte leaves, from an empty register."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ POLYNOMIAL, table >> 1).astype(np.uint32)
    return table


@cache
def _moved() -> list[list[int]]:
    """4 tables of 256: what a row of zeros makes of a register with this byte at this place."""
    registers = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    zeros = np.zeros((registers.size, ROW), np.uint8)
    return _registers(registers.ravel(), zeros).reshape(4, 256).tolist()
