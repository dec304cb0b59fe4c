"""The checksum of event files against the values of the standard and TensorBoard's own."""

import numpy as np
import pytest
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as tensorboards

from deconvnet.monitoring.crc32c import ROW, ROWS, crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720, appendix B.4.
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_checksum_has_the_values_of_the_standard(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("length", [1, ROW, ROW * ROWS - 1, ROW * ROWS, ROW * ROWS + 1, 20_001])
def test_the_checksum_of_data_of_any_length_is_tensorboards(length):
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == tensorboards(data)
