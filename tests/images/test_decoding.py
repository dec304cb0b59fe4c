"""Files of every kind that is read: their pixels are those that were written, from a file of their
own and from a shard, or the file is refused in one line.

TIFF files are written by hand, so that what was meant does not come from what reads them.
"""

import itertools
import os
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from deconvnet.images.datasets import load_images
from deconvnet.images.decoding import Content, digest_file, read_image, shown_name
from deconvnet.images.sources import DataSettings

H, W = 20, 24
GREY = np.linspace(0, 1, H * W).reshape(H, W)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
TURNED = {
    **{1: GREY, 2: GREY[:, ::-1], 3: np.rot90(GREY, 2), 4: GREY[::-1]},
    **{5: GREY.T, 6: np.rot90(GREY, -1), 7: np.rot90(GREY.T, 2), 8: np.rot90(GREY)},
}
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def tiff(data, height, width, *, order="<", strips=None, tags=(), **named):
    """A TIFF of one strip of these bytes, or of several; named: tags by the names below."""
    numbers = {"bits": 258, "compression": 259, "photometric": 262, "fill": 266, "turned": 274}
    numbers |= {"samples": 277, "planes": 284, "predictor": 317, "extra": 338, "format": 339}
    numbers |= {"colormap": 320, "tile_width": 322, "tile_height": 323}
    strips = [data] if strips is None else strips
    entries = {256: width, 257: height, 259: 1} | {numbers[k]: v for k, v in named.items()}
    entries |= dict(tags)
    offsets = list(itertools.accumulate([8, *(len(strip) for strip in strips)]))
    tiled = 322 in entries
    entries |= {324 if tiled else 273: offsets[:-1], 325 if tiled else 279: [*map(len, strips)]}
    if not tiled:
        entries.setdefault(278, height)
    body = b"".join(strips)
    body += bytes(len(body) % 2)
    table, beyond = b"", b""
    start = 8 + len(body) + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        values = value if isinstance(value, (list, tuple)) else [value]
        kind, letter = (4, "I") if tag in (273, 279, 324, 325) else (3, "H")
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(packed) > 4:
            packed, beyond = struct.pack(f"{order}I", start + len(beyond)), beyond + packed
        table += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    count = struct.pack(f"{order}H", len(entries))
    return head + body + count + table + bytes(4) + beyond


def numbers(values, kind, order="<"):
    """Bytes of values of 0 to 1 as integers of their whole range, or as floats."""
    dtype = np.dtype(order + kind)
    full = 1 if dtype.kind == "f" else np.iinfo(dtype).max
    if kind == "i4":
        full = 65535  # as Pillow writes numbers of 16 bits
    return (
        np.round(values * full).astype(dtype).tobytes()
        if full > 1
        else (values.astype(dtype).tobytes())
    )


def packed_bits(values, bits):
    """Rows of values of 0 to 1 as integers of some bits, each row filled up to whole bytes."""
    rows = np.round(values * (2**bits - 1)).astype(int)
    digits = ((rows[..., None] >> np.arange(bits)[::-1]) & 1).reshape(len(rows), -1)
    return np.packbits(digits.astype(np.uint8), axis=1).tobytes()


def read(content, folder, name="image.tif"):
    """(H, W, 3) of a file with these bytes, which are read from a shard to the same pixels."""
    path = folder / name
    path.write_bytes(content)
    image = read_image(path)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        shard.add(path, name)
    wanted = DataSettings(
        source="shards", path=str(folder / "shard.tar"), size=None, max_images=None
    )
    assert torch.equal(load_images(wanted).images[0], image)
    return image.numpy().transpose(1, 2, 0)


def check(content, expected, folder, what, *, levels=255, name="image.tif"):
    expected = np.repeat(expected[..., None], 3, 2) if expected.ndim == 2 else expected
    found = read(content, folder, name)
    assert found.shape == expected.shape, what
    assert abs(found - expected).max() < 0.6 / levels + 1e-6, what


def png(data, bits, color, chunks=(), height=H, width=W):
    """A PNG of rows of bytes."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    row = len(data) // height
    lines = b"".join(b"\0" + data[n * row : (n + 1) * row] for n in range(height))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    others = b"".join(chunk(*each) for each in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + others
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


GREY_KINDS = [
    *(("u1", 8, UNSIGNED), ("u2", 16, UNSIGNED), ("u4", 32, UNSIGNED), ("f4", 32, FLOAT)),
    *(("i1", 8, SIGNED), ("i2", 16, SIGNED), ("i4", 32, SIGNED)),
]
LEVELS = {"u1": 255, "i1": 127, "i2": 32767, "u2": 65535, "i4": 65535, "u4": 1e6, "f4": 1e6}
# What Pillow does not read at all: it must be refused.
REFUSED = {(kind, white) for kind in ("u4", "i1", "i2", "i4") for white in (0,)}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "deflated"])
def test_grey_tiffs_of_every_depth_sign_and_order_mean_what_their_tags_say(tmp_path, order, packed):
    read_kinds = 0
    for (kind, bits, sample), white in itertools.product(GREY_KINDS, (0, 1)):
        data = numbers(GREY if white else 1 - GREY, kind, order)
        data, compression = (zlib.compress(data), 8) if packed else (data, 1)
        content = tiff(
            *(data, H, W),
            order=order,
            bits=bits,
            format=sample,
            photometric=white,
            compression=compression,
        )
        what = f"{order}{kind}, photometric {white}"
        try:
            check(content, GREY, tmp_path, what, levels=LEVELS[kind])
            read_kinds += 1
        except ValueError as error:
            refusable = white == 0 and kind not in ("u1", "f4") or order == ">" and kind == "u4"
            assert refusable and "not an image that Pillow can read" in str(error), what
    assert read_kinds >= 8


def test_grey_tiffs_of_few_bits_are_read_in_both_polarities_and_fill_orders(tmp_path):
    for bits, white in itertools.product((1, 2, 4, 12), (0, 1)):
        levels = np.round(GREY * (2**bits - 1)) / (2**bits - 1)
        data = packed_bits(levels if white else 1 - levels, bits)
        for fill in (1, 2):
            turned = bytes(int(f"{b:08b}"[::-1], 2) for b in data) if fill == 2 else data
            content = tiff(turned, H, W, bits=bits, photometric=white, fill=fill)
            what = f"{bits} bits, photometric {white}, fill order {fill}"
            try:
                check(content, levels, tmp_path, what, levels=2**bits - 1)
            except ValueError as error:
                assert bits == 12 and "not an image" in str(error), what


def test_negative_numbers_of_a_signed_tiff_are_refused(tmp_path):
    for kind, bits in (("i1", 8), ("i2", 16), ("i4", 32)):
        for order in "<>":
            data = np.where(GREY < 0.1, -1, 7).astype(order + kind).tobytes()
            content = tiff(data, H, W, order=order, bits=bits, format=SIGNED, photometric=1)
            with pytest.raises(ValueError, match=r"values from -.*must be in \[0, 1\]"):
                read(content, tmp_path)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_of_a_tiff_is_applied_in_every_layout(tmp_path, order):
    for turned, expected in TURNED.items():
        for kind, bits, sample in (("u1", 8, 1), ("u2", 16, 1), ("f4", 32, 3), ("i2", 16, 2)):
            data = numbers(GREY, kind, order)
            rows = [
                data[n : n + 7 * len(data) // H] for n in range(0, len(data), 7 * len(data) // H)
            ]
            meaning = {"bits": bits, "format": sample, "photometric": 1, "order": order}
            layouts = {
                "plain": tiff(data, H, W, turned=turned, **meaning),
                "strips": tiff(b"", H, W, strips=rows, tags={278: 7}, turned=turned, **meaning),
                "deflated": tiff(
                    zlib.compress(data), H, W, compression=8, turned=turned, **meaning
                ),
            }
            for layout, content in layouts.items():
                what = f"{order}{kind}, {layout}, orientation {turned}"
                check(content, expected, tmp_path, what, levels=LEVELS[kind])
        for samples, extra in ((3, {}), (4, {"extra": 2})):
            pixels = np.concatenate([RGB, np.ones((H, W, 1))], -1)[..., :samples]
            content = tiff(
                *(numbers(pixels, "u1"), H, W),
                order=order,
                bits=[8] * samples,
                photometric=2,
                samples=samples,
                turned=turned,
                **extra,
            )
            found = read(content, tmp_path)
            assert found.shape == (*expected.shape, 3)
            np.testing.assert_allclose(found[..., 0], expected, atol=0.003)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_the_orientation_is_applied_in_every_format_that_has_one(tmp_path, suffix):
    smooth = (255 * GREY).round().astype(np.uint8)
    for turned, expected in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = turned
        for mode in ("L", "RGB", "RGBA"):
            if (mode, suffix) == ("RGBA", "jpg"):
                continue
            options = {"lossless": True} if suffix == "webp" else {"quality": 100}
            Image.fromarray(smooth).convert(mode).save(
                tmp_path / f"a.{suffix}", exif=exif, **options
            )
            content = (tmp_path / f"a.{suffix}").read_bytes()
            check(content, expected, tmp_path, f"{mode} {turned}", levels=100, name=f"b.{suffix}")


@pytest.mark.parametrize("order", ["<", ">"])
def test_colour_tiffs_are_read_interleaved_and_in_planes_or_refused(tmp_path, order):
    for kind, bits in (("u1", 8), ("u2", 16)):
        meaning = {"bits": [bits] * 3, "photometric": 2, "samples": 3, "order": order}
        whole = numbers(RGB, kind, order)
        planes = [numbers(RGB[..., n], kind, order) for n in range(3)]
        check(tiff(whole, H, W, **meaning), RGB, tmp_path, f"{kind} interleaved", levels=125)
        packed = [zlib.compress(plane) for plane in planes]
        content = tiff(b"", H, W, strips=packed, planes=2, compression=8, **meaning)
        check(content, RGB, tmp_path, f"{kind} planes, deflated", levels=125)
        content = tiff(b"", H, W, strips=planes, planes=2, **meaning)
        if kind == "u1":
            check(content, RGB, tmp_path, f"{kind} planes", levels=125)
        else:
            with pytest.raises(ValueError, match="16-bit colour in separate planes"):
                read(content, tmp_path)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("extra", [1, 2])
def test_grey_with_alpha_in_a_separate_plane_is_refused(tmp_path, compression, extra):
    """Pillow reads one of the planes and takes all pixels for transparent."""
    planes = [numbers(plane, "u1") for plane in (GREY, np.ones((H, W)))]
    planes = [zlib.compress(plane) if compression == 8 else plane for plane in planes]
    meaning = {"bits": [8, 8], "photometric": 1, "samples": 2, "planes": 2, "extra": extra}
    content = tiff(b"", H, W, strips=planes, compression=compression, **meaning)
    with pytest.raises(ValueError, match="alpha in a separate plane|not an image") as error:
        read(content, tmp_path)
    assert "\n" not in str(error.value)


def test_tiles_and_the_predictor_and_the_first_of_several_pages(tmp_path):
    for kind, bits in (("u1", 8), ("u2", 16)):
        full = np.zeros((32, 32))
        full[:H, :W] = GREY
        tiles = [numbers(full[a : a + 16, b : b + 16], kind) for a in (0, 16) for b in (0, 16)]
        meaning = {"bits": bits, "photometric": 1}
        content = tiff(b"", H, W, strips=tiles, tile_width=16, tile_height=16, **meaning)
        check(content, GREY, tmp_path, f"{kind} tiles", levels=LEVELS[kind])
        values = np.frombuffer(numbers(GREY, kind), kind).reshape(H, W)
        steps = np.diff(values, axis=1, prepend=values[:, :1] * 0)
        content = tiff(zlib.compress(steps.tobytes()), H, W, compression=8, predictor=2, **meaning)
        check(content, GREY, tmp_path, f"{kind} predictor", levels=LEVELS[kind])
    pages = [Image.fromarray((255 * page).astype(np.uint8)) for page in (GREY, 1 - GREY)]
    for name in ("pages.tif", "pages.gif", "pages.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], **options)
        content = (tmp_path / name).read_bytes()
        check(content, np.floor(255 * GREY) / 255, tmp_path, name, levels=250, name=name)


def test_transparent_tiffs_show_white_whatever_their_alpha_means(tmp_path):
    alpha = np.clip(2 * GREY, 0, 1)[..., None]
    for kind, bits in (("u1", 8), ("u2", 16)):
        # 0: not said; 1: colours were multiplied by alpha; 2: they were not.
        for extra in (0, 1, 2):
            stored = np.concatenate([RGB * alpha if extra == 1 else RGB, alpha], -1)
            expected = RGB if extra == 0 else RGB * alpha + 1 - alpha
            content = tiff(
                *(numbers(stored, kind), H, W),
                bits=[bits] * 4,
                photometric=2,
                samples=4,
                extra=extra,
            )
            check(content, expected, tmp_path, f"{kind}, extra {extra}", levels=60)
    stored = np.concatenate([GREY[..., None], alpha], -1)
    content = tiff(numbers(stored, "u1"), H, W, bits=[8, 8], photometric=1, samples=2, extra=2)
    check(content, GREY * alpha[..., 0] + 1 - alpha[..., 0], tmp_path, "grey", levels=60)
    stored[..., :1] *= alpha
    content = tiff(numbers(stored, "u1"), H, W, bits=[8, 8], photometric=1, samples=2, extra=1)
    try:
        check(content, GREY * alpha[..., 0] + 1 - alpha[..., 0], tmp_path, "grey", levels=60)
    except ValueError as error:  # of Pillow 10.1
        assert "not an image" in str(error)


def test_palettes_inks_and_other_colour_spaces_of_tiffs_are_turned_into_rgb(tmp_path):
    index = np.round(255 * GREY).astype(np.uint8)
    ramp = np.arange(256) * 257
    content = tiff(
        *(index.tobytes(), H, W),
        bits=8,
        photometric=3,
        colormap=[*ramp, *ramp[::-1], *(0 * ramp + 12345)],
    )
    expected = np.stack([index / 255, 1 - index / 255, np.full((H, W), 12345 / 65535)], -1)
    check(content, expected, tmp_path, "palette", levels=200)
    inks = np.concatenate([1 - RGB, np.zeros((H, W, 1))], -1)
    content = tiff(numbers(inks, "u1"), H, W, bits=[8] * 4, photometric=5, samples=4)
    check(content, RGB, tmp_path, "CMYK", levels=50)
    lab = np.zeros((H, W, 3), np.uint8)
    lab[..., 0] = 255 * (GREY > 0.5)  # black and white, a = b = 0
    content = tiff(lab.tobytes(), H, W, bits=[8] * 3, photometric=8, samples=3)
    check(content, (GREY > 0.5) * 1.0, tmp_path, "CIE Lab", levels=50)
    # Two rows of luminance for one of colour: Pillow would take them for pixels.
    content = tiff(
        *(bytes(H * W * 3 // 2), H, W),
        bits=[8] * 3,
        photometric=6,
        samples=3,
        tags={530: [2, 2]},
    )
    with pytest.raises(ValueError, match="cannot read .*image.tif: ") as caught:
        read(content, tmp_path)
    assert "\n" not in str(caught.value)


def test_pngs_of_every_depth_are_read_and_one_transparent_value_shows_white(tmp_path):
    for bits in (1, 2, 4, 8, 16):
        full = 2**bits - 1
        values = np.round(GREY * full).astype(int)
        data = packed_bits(values / full, bits)
        what = f"grey of {bits} bits"
        check(png(data, bits, 0), values / full, tmp_path, what, levels=full, name="a.png")
        clear = int(values[3, 5])
        content = png(data, bits, 0, [(b"tRNS", struct.pack(">H", clear))])
        expected = np.where(values == clear, 1, values / full)
        check(content, expected, tmp_path, f"{what}, {clear} clear", levels=full, name="a.png")
    for bits in (8, 16):
        full = 2**bits - 1
        values = np.round(RGB * full).astype(f">u{bits // 8}")
        clear = values[3, 5]
        chunk = (b"tRNS", struct.pack(">3H", *map(int, clear)))
        expected = np.where((values == clear).all(-1, keepdims=True), 1, RGB)
        check(png(values.tobytes(), bits, 2), RGB, tmp_path, bits, levels=125, name="a.png")
        content = png(values.tobytes(), bits, 2, [chunk])
        check(content, expected, tmp_path, f"colour of {bits} bits", levels=125, name="a.png")
        both = np.concatenate([RGB, GREY[..., None]], -1)
        content = png(np.round(both * full).astype(values.dtype).tobytes(), bits, 6)
        expected = RGB * GREY[..., None] + 1 - GREY[..., None]
        check(
            content, expected, tmp_path, f"colour and alpha of {bits} bits", levels=60, name="a.png"
        )


def test_portable_maps_of_every_depth_are_divided_by_their_largest_value(tmp_path):
    for largest in (1, 15, 100, 255, 1000, 4095, 65535):
        values = np.round(GREY * largest).astype(">u1" if largest < 256 else ">u2")
        plain = " ".join(map(str, values.reshape(-1)))
        for magic, body in ((b"P5", values.tobytes()), (b"P2", plain.encode())):
            content = magic + f"\n{W} {H}\n{largest}\n".encode() + body
            what = f"{magic} {largest}"
            check(content, values / largest, tmp_path, what, levels=min(largest, 255), name="a.pgm")


def test_only_the_formats_that_suffixes_name_are_tried_whatever_a_file_is_called(
    tmp_path, monkeypatch
):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "photo.jpg").write_bytes(eps)
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *order, **_: started.append(order))
    with pytest.raises(ValueError, match="photo.jpg: not an image that Pillow can read as one of"):
        read_image(tmp_path / "photo.jpg")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.ico")
    with pytest.raises(ValueError, match=r"a.ico: not an image .* PNG"):
        read_image(tmp_path / "a.ico")
    # By content, not by name: a PNG that is called a JPEG is one.
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "b.jpg", "png")
    assert not read_image(tmp_path / "b.jpg").any()
    # Phones put a second picture behind the first.
    two = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (255, 0)]
    two[0].save(tmp_path / "two.jpg", "mpo", save_all=True, append_images=two[1:])
    assert read_image(tmp_path / "two.jpg").min() == 1
    folder = tmp_path / "set" / "class"
    folder.mkdir(parents=True)
    (folder / "photo.jpg").write_bytes(eps)
    with pytest.raises(ValueError, match="1 of the images cannot be used"):
        load_images(
            DataSettings(
                source="torchvision", dataset="ImageFolder", path=str(tmp_path / "set"), size=None
            )
        )
    assert not started


def test_an_image_above_the_limit_is_read_where_its_owner_says_so(tmp_path, monkeypatch):
    Image.fromarray(np.full((40, 50), 7, np.uint8)).save(tmp_path / "pano.png")
    for limit in (1500, 100):  # Pillow warns above the limit and raises above its double
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        monkeypatch.delenv("DECONVNET_MAX_PIXELS", raising=False)
        with pytest.raises(ValueError, match=f"pixels are more than {limit}.*bomb") as caught:
            read_image(tmp_path / "pano.png")
        assert "PIL.Image.MAX_IMAGE_PIXELS" in str(caught.value)
        # The variable as the message writes it is large enough.
        name, value = re.search(r"(DECONVNET_\w+)=(\d+)", str(caught.value)).groups()
        monkeypatch.setenv(name, value)
        assert read_image(tmp_path / "pano.png").shape == (3, 40, 50)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        monkeypatch.delenv(name)
        with pytest.raises(ValueError, match="bomb"):
            read_image(tmp_path / "pano.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert read_image(tmp_path / "pano.png").shape == (3, 40, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    for value in ("many", "-5", "0", ""):
        monkeypatch.setenv("DECONVNET_MAX_PIXELS", value)
        with pytest.raises(ValueError, match=f"DECONVNET_MAX_PIXELS='{value}': must be a whole"):
            read_image(tmp_path / "pano.png")


def test_absurd_sizes_in_headers_are_refused_before_memory_is_taken(tmp_path):
    contents = {
        "a.png": png(b"\0" * H, 8, 0, height=H, width=2**31 - 1),
        "a.tif": tiff(b"\0", 60000, 60000, bits=8, photometric=1),
        "a.pgm": b"P5\n1000000 1000000\n255\n",
        "a.bmp": b"BM"
        + struct.pack(
            "<IHHIIiiHHIIIIII", 70, 0, 0, 54, 40, 10**6, 10**6, *(1, 24, 0, 0, 0, 0, 0, 0)
        ),
        "a.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read .*{name}: ") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name, why in (
        *(("pipe.png", "not a regular file"), ("device.png", "not a regular file")),
        *(("folder.png", "a folder, not a file"), ("loop.png", "symbolic links"), ("\0", "null")),
        ("x" * 300, "name too long"),
    ):
        for reader in (read_image, digest_file):
            with pytest.raises(ValueError, match=f"(?i)^cannot read .*: .*{why}") as caught:
                reader(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_parts_of_a_file_are_one_stream_with_zeros_between(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(data)
    parts = ((10, 300, 100), (200, 4000, 1000), (1300, 0, 50))
    whole = bytearray(1400)
    for place, source, length in parts:
        whole[place : place + length] = data[source : source + length]
    content = Content(tmp_path / "file", "file", parts, len(whole))
    with content.open() as file:
        assert file.read() == whole
        for place, length in ((0, 10), (5, 20), (150, 100), (1190, 200), (1399, 9), (1400, 5)):
            file.seek(place)
            assert file.read(length) == whole[place : place + length]
    short = Content(tmp_path / "file", "file", ((0, 4990, 30),), 30)
    with pytest.raises(ValueError, match="cannot read file: the file ends 20 bytes too early"):
        short.digest()


def test_names_are_shown_in_one_line_that_can_be_written_in_utf_8():
    assert shown_name("a b/Zoë \u202f 東.png") == "a b/Zoë \u202f 東.png"
    assert shown_name(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    for name in ("a\nb", "a\x1b[31m", "a\u2028b", "a\x85b", "\ud800", "\ud800\udce9"):
        shown = shown_name(name)
        shown.encode()
        assert shown.splitlines() == [shown] and "\\" in shown
