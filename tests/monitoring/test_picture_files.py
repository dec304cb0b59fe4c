"""Pictures as files: PNG keeps every pixel, WebP and JPEG are smaller."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from deconvnet.monitoring.monitor import save_picture
from deconvnet.monitoring.picture_files import WEBP_LARGEST, png, png_or_jpeg, webp
from deconvnet.monitoring.summaries import image_summary

NOISE = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
FLAT = torch.full((3, 40, 50), 0.25)


def read(content):
    with Image.open(io.BytesIO(content)) as image:
        return image.format, np.asarray(image.convert("RGB"))


def test_the_suffix_of_a_path_chooses_the_format(tmp_path):
    for name, expected in (("a.png", "PNG"), ("a.webp", "WEBP")):
        save_picture(tmp_path / name, NOISE)
        format, pixels = read((tmp_path / name).read_bytes())
        assert format == expected and pixels.shape == (40, 50, 3)
    assert len(webp(NOISE)) < len(png(NOISE))


def test_webp_refuses_pictures_that_are_too_large():
    with pytest.raises(ValueError, match=f"16384.* at most {WEBP_LARGEST} a side"):
        webp(torch.zeros(1, WEBP_LARGEST + 1, 1))


def test_tensorboard_gets_jpeg_only_where_it_is_allowed_and_smaller():
    assert read(png_or_jpeg(NOISE))[0] == "JPEG" and read(png_or_jpeg(FLAT))[0] == "PNG"
    for encode, formats in ((png, ["PNG", "PNG"]), (png_or_jpeg, ["JPEG", "PNG"])):
        summary = image_summary("a", [NOISE, FLAT], "Noise.", encode=encode)
        strings = summary.value[0].tensor.string_val
        assert list(strings[:2]) == [b"50", b"40"]
        assert [read(content)[0] for content in strings[2:]] == formats
