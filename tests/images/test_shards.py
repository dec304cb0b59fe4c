"""Shards: damage of any kind is named and loses nothing silently; what GNU tar and Python write is
read to the last byte.
"""

import io
import logging
import os
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from deconvnet.images.datasets import lazy_images, load_images, stream_images
from deconvnet.images.sources import DataSettings

SIDE = 16
BLOCK = 512


def image_bytes(level, kind="png"):
    """Of noise, so that it takes some blocks."""
    pixels = np.random.default_rng(level).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write(path, names, format=tarfile.GNU_FORMAT, contents=None):
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as archive:
        for number, name in enumerate(names):
            data = contents[number] if contents else image_bytes(number)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def settings(path, **options):
    wanted = {"size": None, "max_images": None} | options
    return DataSettings(source="shards", path=str(path), **wanted)


def read(path, **options):
    """{name: digest} of the images of a shard, or the message of the error."""
    try:
        found = load_images(settings(path, **options))
        names = [name.partition("/")[2] for name in found.names]
        assert len(set(names)) == len(names)
        return dict(zip(names, found.digests, strict=True))
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_flipped_bit_and_no_early_end_loses_an_image_silently(tmp_path, format):
    whole = write(tmp_path / "whole.tar", ["a/0.png", "a/1.png", "b/2.png"], format)
    data, expected = whole.read_bytes(), read(whole)
    with tarfile.open(whole) as archive:
        members = archive.getmembers()
    inside = {n for m in members for n in range(m.offset_data, m.offset_data + m.size)}
    generator = np.random.default_rng(0)
    end = members[-1].offset_data + 3 * BLOCK
    headers = [m.offset + n for m in members for n in range(BLOCK)]
    places = [*generator.choice(headers, 150), *generator.integers(0, end, 100)]
    shard = tmp_path / "shard.tar"
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(generator.integers(8))
        shard.write_bytes(flipped)
        found = read(shard)
        if isinstance(found, str):
            # In an image: that it cannot be read; anywhere else: that the shard is damaged.
            assert "shard.tar" in found and (place in inside or "damaged" in found or place < BLOCK)
        else:
            changed = [name for name in expected if found.get(name) != expected[name]]
            assert list(found) == list(expected) and len(changed) == (place in inside)
    for end in [*range(1, len(data), BLOCK // 2), *range(BLOCK, len(data), BLOCK)]:
        shard.write_bytes(data[:end])
        found = read(shard)
        assert found == expected or "shard.tar" in found, end


def test_zeroed_blocks_in_the_middle_are_damage_not_an_end(tmp_path):
    whole = write(tmp_path / "whole.tar", [f"{n}.png" for n in range(6)])
    data, expected = whole.read_bytes(), read(whole)
    shard = tmp_path / "shard.tar"
    starts = range(0, len(data) - 10240, BLOCK)
    for start in starts:
        for count in (1, 2, 3, 8):
            holed = bytearray(data)
            holed[start : start + count * BLOCK] = bytes(count * BLOCK)
            if holed == data:
                continue
            shard.write_bytes(holed)
            found = read(shard)
            if isinstance(found, dict):
                # A hole that lies within the data of one image is seen by its decoder, or not.
                assert list(found) == list(expected)
                assert sum(found[name] != expected[name] for name in expected) <= 1
            else:
                assert "shard.tar" in found


def test_damage_is_named_with_its_place_and_what_can_be_read_is_taken_on_demand(tmp_path, caplog):
    whole = write(tmp_path / "whole.tar", ["0.png", "1.png", "2.png"])
    data, expected = whole.read_bytes(), read(whole)
    with tarfile.open(whole) as archive:
        second = archive.getmembers()[1]
    flipped = bytearray(data)
    flipped[second.offset + 10] ^= 1
    cases = {
        "header": (bytes(flipped), f"is damaged at byte {second.offset}, after 0.png", ["1.png"]),
        "within": (data[: second.offset_data + 100], "early, inside 1.png", ["1.png", "2.png"]),
        "between": (data[: second.offset], "without an end-of-archive mark", ["1.png", "2.png"]),
        "garbage": (data + b"x" * 700, "zeros where a header should be", []),
        "no end": (
            data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // BLOCK) * BLOCK, b"\0"),
            "without an end-of-archive mark",
            [],
        ),
    }
    for name, (content, message, lost) in cases.items():
        shard = tmp_path / f"{name}.tar"
        shard.write_bytes(content)
        for images in (load_images, lazy_images, stream_images):
            with pytest.raises(
                ValueError, match=f"data.path=.*{name}.tar {'.*'}{message}"
            ) as caught:
                images(settings(shard))
            assert "data.skip_unreadable=true" in str(caught.value)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            left = read(shard, skip_unreadable=True)
        assert left == {key: value for key, value in expected.items() if key not in lost}
        assert any(message.split(",")[0] in record.getMessage() for record in caplog.records)


def test_archives_that_were_joined_are_read_one_after_the_other(tmp_path, caplog):
    one = write(tmp_path / "1.tar", ["0.png", "1.png"])
    two = write(tmp_path / "2.tar", ["x.png"], contents=[image_bytes(7)])
    for end in (10240, None):  # as `cat` joins those of GNU tar and Python, and those of bsdtar
        first = one.read_bytes()
        if end is None:
            first = first.rstrip(b"\0")
            first = first.ljust(-(-len(first) // BLOCK) * BLOCK + 2 * BLOCK, b"\0")
        (tmp_path / "both.tar").write_bytes(first + two.read_bytes())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = read(tmp_path / "both.tar")
        assert found == read(one) | read(two)
        assert any("another archive follows" in record.getMessage() for record in caplog.records)


def gnu_sparse(name, size, parts, data):
    """A member as `tar -S` writes it: the old format of GNU, up to four parts in the header."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[124:136] = b"%011o\0" % len(data)
    for number, (offset, length) in enumerate(parts):
        header[386 + 24 * number : 410 + 24 * number] = b"%011o\0%011o\0" % (offset, length)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % BLOCK)


def test_sparse_members_have_the_zeros_that_were_not_stored(tmp_path):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:6] = np.arange(64)
    pixels[40:48] = 200
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "bmp")
    content = stream.getvalue()
    # Bitmaps begin with their last row.
    parts = [(0, 1536), (2048, 1024), (4608, len(content) - 4608)]
    holed = bytearray(len(content))
    for offset, length in parts:
        holed[offset : offset + length] = content[offset : offset + length]
    stored = b"".join(content[offset : offset + length] for offset, length in parts)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.bmp").write_bytes(holed)
    sparse = gnu_sparse("a.bmp", len(content), parts, stored)
    pax = tarfile.TarInfo("GNUSparseFile.0/a.bmp")
    table = "".join(f"{number}\n" for number in (len(parts), *sum(parts, ()))).encode()
    table = table.ljust(BLOCK, b"\0")
    pax.size = len(table) + len(stored)
    pax.pax_headers = {
        **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.bmp"},
        "GNU.sparse.realsize": str(len(content)),
    }
    new = (
        pax.tobuf(tarfile.PAX_FORMAT) + table + stored + bytes(-(len(table) + len(stored)) % BLOCK)
    )
    (expected,) = load_images(
        DataSettings(source="folder", path=str(tmp_path / "plain"), size=None)
    ).images
    other = write(tmp_path / "other.tar", ["b.png"]).read_bytes()
    for member in (sparse, new):
        (tmp_path / "s.tar").write_bytes(member + other)
        found = load_images(settings(tmp_path / "s.tar", max_images=1))
        assert found.names == ("s.tar/a.bmp",) and torch.equal(found.images[0], expected)
        assert len(lazy_images(settings(tmp_path / "s.tar"))) == 2
    for parts, size in (([(0, 100), (50, 100)], 300), ([(0, 200)], 100), ([(0, 100)], 2**32)):
        member = gnu_sparse("a.bmp", size, parts, stored[:200])
        (tmp_path / "bad.tar").write_bytes(member + other)
        assert "cannot read bad.tar/a.bmp: a sparse file" in read(tmp_path / "bad.tar")
        assert list(read(tmp_path / "bad.tar", skip_unreadable=True)) == ["b.png"]


def test_links_have_the_content_of_what_they_lead_to(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:

        def add(name, kind=tarfile.REGTYPE, target="", data=b""):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            archive.addfile(info, io.BytesIO(data))

        add("b/early.png", tarfile.SYMTYPE, "../a/0.png")
        add("a/0.png", data=image_bytes(0))
        add("a/hard.png", tarfile.LNKTYPE, "a/0.png")
        add("a/twice.png", tarfile.SYMTYPE, "hard.png")
        add("data", data=image_bytes(1))
        add("named.png", tarfile.SYMTYPE, "./data")
    found = read(tmp_path / "s.tar")
    assert list(found) == ["b/early.png", "a/0.png", "a/hard.png", "a/twice.png", "named.png"]
    assert len(set(found.values())) == 2 and found["named.png"] != found["a/0.png"]
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        for name, kind, target in (
            *(("out.png", tarfile.SYMTYPE, "/etc/passwd"), ("x.png", tarfile.LNKTYPE, "gone.png")),
            *(("loop.png", tarfile.SYMTYPE, "loop.png"), ("pipe.png", tarfile.FIFOTYPE, "")),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    message = read(tmp_path / "s.tar")
    for part in (
        "s.tar/out.png: a link to etc/passwd, which is not a file in s.tar",
        *("s.tar/x.png: a link to gone.png", "s.tar/loop.png: a link", "s.tar/pipe.png: a device"),
    ):
        assert part in message
    assert read(tmp_path / "s.tar", skip_unreadable=True) == found


def test_a_name_that_comes_again_replaces_the_first_as_tar_does(tmp_path, caplog):
    contents = [image_bytes(n) for n in range(3)]
    path = write(tmp_path / "s.tar", ["a.png", "b.png", "./a.png"], contents=contents)
    with caplog.at_level(logging.WARNING):
        found = read(path)
    write(tmp_path / "t.tar", ["b.png", "./a.png"], contents=contents[1:])
    assert found == read(tmp_path / "t.tar")
    assert ["1 names occur more than once" in record.getMessage() for record in caplog.records] == [
        True
    ]


def test_long_and_foreign_names_hidden_files_and_folders_of_shards(tmp_path):
    long = "d" * 80 + "/" + "e" * 90 + ".png"
    latin = os.fsdecode(b"caf\xe9.png")
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write(tmp_path / "s.tar", [long, latin, "._0.png", ".h/1.png", "x/Zoë.PNG"], format)
        loaded = load_images(settings(path))
        assert loaded.names == (f"s.tar/{long}", "s.tar/caf\\xe9.png", "s.tar/x/Zoë.PNG")
        lazy = lazy_images(settings(path))
        assert [lazy.label(n) for n in (0, 2)] == ["d" * 80, "x"]
        with pytest.raises(ValueError, match="s.tar/caf.*has no class"):
            lazy.label(1)
    for folder in ("one", "two"):
        (tmp_path / "all" / folder).mkdir(parents=True)
        write(tmp_path / "all" / folder / "s.tar", ["0.png"])
    (tmp_path / "all" / "._s.tar").write_bytes(b"of a macOS archive")
    names = load_images(settings(tmp_path / "all")).names
    assert names == ("one/s.tar/0.png", "two/s.tar/0.png")


def test_sizes_and_headers_that_make_no_sense_are_refused_at_once(tmp_path):
    sound = write(tmp_path / "sound.tar", ["0.png"]).read_bytes()

    def header(name, kind, size):
        info = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
        info[156:157] = kind
        info[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
        info[148:156] = b" " * 8
        info[148:156] = b"%06o\0 " % sum(info)
        return bytes(info)

    below_zero = b"\xff" + struct.pack(">3xq", -5120)
    pax = b"28 size=9999999999999999999\n"
    cases = {
        "negative": header("x.png", b"0", below_zero) + sound,
        "huge": header("x.png", b"0", b"\x80" + struct.pack(">3xq", 2**60)) + sound,
        "name": header("././@LongLink", b"L", 8**11 - 1) + sound,
        "many": (header("././@LongLink", b"L", 5) + b"a.png".ljust(BLOCK, b"\0")) * 2000 + sound,
        "pax": header("pax", b"x", len(pax)) + pax.ljust(BLOCK, b"\0") + sound,
        "records": header("pax", b"x", 9) + b"99 path=x".ljust(BLOCK, b"\0") + sound,
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        message = read(path)
        assert isinstance(message, str) and f"{name}.tar" in message, name


def test_what_is_no_regular_file_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    write(tmp_path / "folder.tar" / "s.tar", ["0.png"])
    assert "pipe.tar is not a readable, uncompressed .tar file: not a regular" in read(tmp_path)
    assert list(read(tmp_path, skip_unreadable=True)) == ["s.tar/0.png"]
    assert "absent.tar is not a readable" in read(tmp_path / "absent.tar")
