"""CRC-32C (Castagnoli), the checksum of the records of an event file.

TensorBoard's own goes byte by byte in Python: a second for ten megabytes of pictures. The register
after some bytes is linear in the register before them and in the bytes: so blocks of long data are
checked side by side, each from zero, and then joined.
"""

from __future__ import annotations

import numpy as np

POLYNOMIAL = 0x82F63B78
BLOCK = 256
# Shorter data are checked sooner byte by byte.
LONG = 8192


def crc32c(data: bytes) -> int:
    """The CRC-32C of some bytes, of 32 bits."""
    crc, head = 0xFFFFFFFF, len(data) if len(data) < LONG else len(data) % BLOCK
    for byte in data[:head]:
        crc = _BYTES[(crc ^ byte) & 255] ^ (crc >> 8)
    if head < len(data):
        blocks = np.frombuffer(data, np.uint8)[head:].reshape(-1, BLOCK)
        a, b, c, d = _PAST_A_BLOCK
        for register in _after(blocks, np.zeros(len(blocks), np.uint32)).tolist():
            crc = a[crc & 255] ^ b[crc >> 8 & 255] ^ c[crc >> 16 & 255] ^ d[crc >> 24] ^ register
    return crc ^ 0xFFFFFFFF


def _after(blocks: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """The registers (n,) after the bytes of blocks (n, BLOCK)."""
    for column in np.ascontiguousarray(blocks.T):
        registers = _TABLE[registers.astype(np.uint8) ^ column] ^ (registers >> 8)
    return registers


def _table() -> np.ndarray:
    """(256,): the register after a byte, from zero."""
    registers = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        registers = (registers >> 1) ^ np.where(registers & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return registers


_TABLE = _table()
_BYTES = _TABLE.tolist()
# What becomes of each of the four bytes of a register in a block of zeros.
_PAST_A_BLOCK = [
    _after(np.zeros((256, BLOCK), np.uint8), np.arange(256, dtype=np.uint32) << shift).tolist()
    for shift in (0, 8, 16, 24)
]
