import hashlib
import logging
import os
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deconvnet
from deconvnet.images.datasets import ImageSet, LazyImages, lazy_images, load_images, stream_images
from deconvnet.images.decoding import digest_file, read_image
from deconvnet.images.files import distinct_names, find_images, image_files
from deconvnet.images.fit import Crop, crop_to_square, pad_to_square
from deconvnet.images.item import Item
from deconvnet.images.preprocessing import Preprocessing, PreprocessingSettings, local_moments
from deconvnet.images.sources import DataSettings, without_download
from deconvnet.monitoring.monitor import save_picture


def settings(source, path=None, **other):
    path = None if path is None else str(path)
    return DataSettings(source=source, path=path, **{"size": None, "max_images": None} | other)


def pixels(height=10, width=12, planes=3, seed=0):
    shape = (height, width, planes) if planes > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def expected(array):
    """Any array (H, W) or (H, W, 3) of 0..255 as a tensor (3, H, W) of 0..1."""
    array = np.repeat(array[..., None], 3, 2) if array.ndim == 2 else array
    return torch.from_numpy(array / 255).permute(2, 0, 1).float()


def damaged_files(folder):
    """One file of every kind that looks like an image and is none, and the reason to be given."""
    save(folder / "whole.jpg", pixels(200, 200))
    content = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    save(folder / "whole.png", pixels(50, 50))
    broken = bytearray((folder / "whole.png").read_bytes())
    broken[60:200] = bytes(140)
    (folder / "broken.png").write_bytes(broken)
    (folder / "text.jpg").write_text("these are words")
    (folder / "empty.png").touch()
    for name in ("whole.jpg", "whole.png"):
        (folder / name).unlink()
    return {"broken.png": "", "empty.png": "empty", "text.jpg": "Pillow", "truncated.jpg": "trunc"}


@pytest.fixture(scope="module")
def photographs():
    return load_images(DataSettings(scale=0.35, max_images=32))


def test_the_default_images_are_the_photographs_of_the_command():
    images = load_images(DataSettings())
    assert images.images.shape == (24, 3, 96, 96)
    assert torch.equal(images.images, deconvnet.sample_photographs(24, size=96, scale=0.5))


def test_photographs_have_shape_and_range(photographs):
    assert photographs.images.shape == (32, 3, 96, 96)
    assert photographs.images.dtype == torch.float32
    assert photographs.images.min() >= 0 and photographs.images.max() <= 1
    assert len(set(photographs.names)) == 32
    assert {name.split("-")[0] for name in photographs.names} == {
        *("astronaut", "chelsea", "coffee", "rocket", "motorcycle", "china", "flower")
    }


def test_photographs_are_the_same_every_time_and_do_not_touch_global_randomness(photographs):
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = load_images(DataSettings(scale=0.35, max_images=32))
    assert again.names == photographs.names
    assert torch.equal(again.images, photographs.images)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all() and random.getstate() == state[2]


def test_no_two_crops_are_equal_and_all_have_texture(photographs):
    flat = photographs.images.flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(32) * 1e9
    assert distances.min() > 1
    deviation = local_moments(photographs.images, 13, 4.773)[1]
    assert deviation.flatten(1).median(1).values.min() > 0.02


def test_the_crops_kept_are_those_of_most_texture_in_their_order(photographs):
    everything = load_images(DataSettings(scale=0.35, max_images=None))
    few = load_images(DataSettings(scale=0.35, max_images=5))
    texture = local_moments(everything.images, 13, 4.773)[1].flatten(1).numpy()
    best = np.sort(np.argsort(-np.median(texture, axis=1))[:5])
    assert few.names == tuple(everything.names[index] for index in best)
    assert torch.equal(few.images, everything.images[best])
    assert set(few.names) < set(photographs.names) < set(everything.names)


def test_crops_cover_a_photograph_from_end_to_end():
    everything = load_images(DataSettings(scale=0.35, max_images=None))
    crops = {name: crop for name, crop in zip(everything.names, everything.images, strict=True)}
    # The astronaut is 179 pixels wide after reduction: crops at 0 and 83, 13 columns in common.
    assert [name for name in crops if name.startswith("astronaut-0")] == [
        *("astronaut-0-0", "astronaut-0-1")
    ]
    left, right = crops["astronaut-0-0"], crops["astronaut-0-1"]
    assert torch.equal(left[..., 83:], right[..., :13])


def test_photographs_smaller_than_the_crop_are_skipped_and_none_left_is_an_error():
    large = load_images(DataSettings(size=170, scale=0.35, max_images=None))
    assert {name.split("-")[0] for name in large.names} == {"astronaut", "motorcycle"}
    with pytest.raises(ValueError, match="data.size=400.*data.scale=0.35"):
        load_images(DataSettings(size=400, scale=0.35))


@pytest.mark.parametrize(
    "suffix", ["png", "BMP", "gif", "tif", "TIFF", "webp", "ppm", "pgm", "Png"]
)
def test_a_lossless_grey_file_of_any_kind_is_read_exactly_and_repeated(tmp_path, suffix):
    grey = pixels(planes=1)
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"image.{suffix}", grey, **options)
    assert find_images(tmp_path) == [path]
    image = read_image(path)
    assert image.dtype == torch.float32 and image.shape == (3, 10, 12)
    torch.testing.assert_close(image, expected(grey))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_a_lossless_colour_file_is_read_exactly(tmp_path, suffix):
    rgb = pixels()
    torch.testing.assert_close(read_image(save(tmp_path / f"a.{suffix}", rgb)), expected(rgb))


def test_black_and_white_bitmaps_are_zero_and_one(tmp_path):
    grey = pixels(planes=1) // 128 * 255
    Image.fromarray(grey).convert("1").save(tmp_path / "a.pbm")
    torch.testing.assert_close(read_image(tmp_path / "a.pbm"), expected(grey))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_shows_white(tmp_path, mode):
    rgba = pixels(planes=4)
    if mode == "LA":
        rgba[..., 1] = rgba[..., 2] = rgba[..., 0]
        picture = Image.fromarray(np.ascontiguousarray(rgba[..., [0, 3]]), "LA")
    elif mode == "RGBA":
        picture = Image.fromarray(rgba)
    else:
        rgba[...] = np.where(np.arange(12)[:, None] < 6, [10, 20, 30, 0], [40, 50, 60, 255])
        picture = Image.fromarray((np.arange(12) >= 6).astype(np.uint8)[None].repeat(10, 0), "P")
        picture.putpalette([10, 20, 30, 40, 50, 60])
        picture.info["transparency"] = 0
    assert picture.mode == mode
    picture.save(tmp_path / "a.png")
    alpha = rgba[..., 3:] / 255
    composed = rgba[..., :3] * alpha + 255 * (1 - alpha)
    torch.testing.assert_close(read_image(tmp_path / "a.png"), expected(composed))


def test_a_palette_becomes_its_colours(tmp_path):
    rgb = np.where(pixels(planes=1)[..., None] < 128, [255, 0, 0], [10, 200, 30]).astype(np.uint8)
    Image.fromarray(rgb).quantize(2).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    torch.testing.assert_close(read_image(tmp_path / "a.png"), expected(rgb))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_divided_by_65535(tmp_path, suffix):
    deep = (pixels(planes=1).astype(np.uint16) * 257) ^ 3
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":  # which Pillow 10.1 cannot write
        path.write_bytes(b"P5 12 10 65535\n" + deep.astype(">u2").tobytes())
    else:
        save(path, deep)
    torch.testing.assert_close(read_image(path)[1], torch.from_numpy(deep / 65535).float())


def test_cmyk_is_turned_into_rgb(tmp_path):
    flat = np.broadcast_to(np.uint8([200, 100, 50]), (16, 16, 3))
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    torch.testing.assert_close(read_image(tmp_path / "a.jpg"), expected(flat), atol=0.02, rtol=0)


def test_the_camera_orientation_is_applied(tmp_path):
    rgb = pixels()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    path = save(tmp_path / "a.png", rgb, exif=exif)
    torch.testing.assert_close(read_image(path), expected(np.rot90(rgb, -1).copy()))


def test_float_tiff_is_accepted_within_zero_and_one_only(tmp_path):
    values = pixels(planes=1).astype(np.float32) / 255
    path = save(tmp_path / "a.tif", values)
    torch.testing.assert_close(read_image(path)[0], torch.from_numpy(values))
    for bad, message in ((255.0, r"from .* to 255, must be in \[0, 1\]"), (np.nan, "NaN")):
        values[3, 3] = bad
        with pytest.raises(ValueError, match=f"cannot read .*a.tif: .*{message}"):
            read_image(save(path, values))


def test_every_damaged_file_gives_one_line_with_its_path_and_the_reason(tmp_path):
    for name, reason in damaged_files(tmp_path).items():
        with pytest.raises(ValueError) as caught:
            read_image(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"cannot read {tmp_path / name}: ")
        assert reason in message and "\n" not in message and message.count(name) == 1


def test_what_is_no_file_is_refused_too(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("absent.png", "No such file"),
        ("pipe.png", "not a regular"),
        ("", "not"),
    ):
        with pytest.raises(ValueError, match=f"cannot read .*{reason}"):
            read_image(tmp_path / name)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", pixels(40, 40))
    for limit in (1000, 100):  # Pillow warns above the limit and raises above its double
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="cannot read .*a.png: .*decompression bomb"):
            read_image(path)


def test_a_folder_is_searched_with_all_its_folders_in_sorted_order(tmp_path):
    for index, name in enumerate(["b/2.png", "b/10.jpg", "a.png", "b/c/x.JPEG", ".hidden/h.png"]):
        save(tmp_path / name, pixels(seed=index))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._2.png").write_text("no image either")
    found = load_images(settings("folder", tmp_path))
    assert found.names == ("a.png", "b/10.jpg", "b/2.png", "b/c/x.JPEG")
    assert found.images.shape == (4, 3, 10, 12)
    torch.testing.assert_close(found.images[2], expected(pixels(seed=0)))


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "set" / "a.png", pixels())
    save(tmp_path / "elsewhere" / "b.png", pixels())
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self").symlink_to(tmp_path / "set")
    names = load_images(settings("folder", tmp_path / "set")).names
    assert names == ("a.png", "linked/b.png")


def test_a_folder_that_is_missing_empty_or_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, reason in (("absent", "no such"), ("file", "not a folder"), ("empty", "no image")):
        with pytest.raises(ValueError, match=f"data.path=.*{name}: {reason}"):
            load_images(settings("folder", tmp_path / name))


def test_max_images_takes_images_of_every_class_of_a_folder(tmp_path):
    for name in ("cats/a", "cats/b", "cats/c", "cats/d", "dogs/a", "dogs/b", "emus/a", "emus/b"):
        save(tmp_path / f"{name}.png", pixels(seed=ord(name[-1])))
    names = ["cats/a.png", "cats/c.png", "dogs/a.png", "emus/a.png"]
    wanted = settings("folder", tmp_path, max_images=4)
    assert list(load_images(wanted).names) == list(lazy_images(wanted).names) == names
    assert [item.name for item in stream_images(wanted).items] == names
    (tmp_path / "cats/c.png").write_bytes(b"")
    skipping = settings("folder", tmp_path, max_images=4, skip_unreadable=True)
    assert list(load_images(skipping).names) == [*names[:1], *names[2:], "cats/b.png"]


def test_max_images_reads_no_others(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png", pixels(seed=ord(name)))
    (tmp_path / "d.png").touch()
    assert load_images(settings("folder", tmp_path, max_images=2)).names == ("a.png", "c.png")
    assert len(load_images(settings("folder", tmp_path, max_images=3)).names) == 3


def test_all_unreadable_files_are_named_in_one_error(tmp_path):
    save(tmp_path / "good.png", pixels())
    bad = damaged_files(tmp_path)
    with pytest.raises(ValueError, match="4 of the images.*data.skip_unreadable=true") as caught:
        load_images(settings("folder", tmp_path))
    assert all(name in str(caught.value) for name in bad)
    for index in range(3):
        (tmp_path / f"z{index}.png").touch()
    with pytest.raises(ValueError, match="7 of the images") as caught:
        load_images(settings("folder", tmp_path))
    assert str(caught.value).count("cannot read /") == 5


def test_unreadable_files_are_left_out_with_one_warning_where_that_is_wanted(tmp_path, caplog):
    save(tmp_path / "a.png", pixels())
    bad = damaged_files(tmp_path)
    save(tmp_path / "z.png", pixels(seed=1))
    wanted = settings("folder", tmp_path, skip_unreadable=True, max_images=2)
    with caplog.at_level(logging.WARNING):
        assert load_images(wanted).names == ("a.png", "z.png")
    (record,) = caplog.records
    assert "4" in record.getMessage() and all(name in record.getMessage() for name in bad)
    for name in ("a.png", "z.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="none of the 4 images"):
        load_images(wanted)


def test_images_become_square_by_their_short_side_and_centre(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8), (32, 64))
    save(tmp_path / "wide.png", ramp.copy())
    save(tmp_path / "tall.png", ramp.T.copy())
    wide, tall = reversed(load_images(settings("folder", tmp_path, size=16)).images)
    torch.testing.assert_close(wide, tall.transpose(1, 2))
    # Pixels 16 to 47 of the ramp, averaged in pairs.
    centre = torch.from_numpy(ramp[0, 16:48].reshape(16, 2).mean(1) / 255).float()
    torch.testing.assert_close(wide[0, 8], centre, atol=0.02, rtol=0)


def test_fitting_agrees_with_pillow_and_leaves_the_right_size_alone(photographs):
    image = photographs.images[0]
    assert torch.equal(crop_to_square(image, 96), image)
    assert torch.equal(crop_to_square(image[:, 5:95], 90), image[:, 5:95, 3:93])
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    theirs = expected(np.asarray(picture.resize((40, 40), Image.Resampling.BICUBIC)))
    torch.testing.assert_close(crop_to_square(image, 40), theirs, atol=0.01, rtol=0)
    checker = torch.tensor([0.0, 1.0]).repeat(32)[None, None].expand(3, 64, 64)
    assert crop_to_square(checker, 16).std() < 0.05  # antialiased


def test_images_smaller_than_the_crop_are_enlarged_with_one_warning(tmp_path, caplog):
    for index, side in enumerate((8, 9, 40)):
        save(tmp_path / f"{index}.png", pixels(side, side))
    with caplog.at_level(logging.WARNING):
        images = load_images(settings("folder", tmp_path, size=16)).images
    assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    (record,) = caplog.records
    assert "2 of 3 images are smaller than data.size=16" in record.getMessage()


def test_whole_pictures_stand_in_the_middle_of_their_squares_with_zeros_around(tmp_path):
    shapes = {"a-wide": (20, 40), "b-tall": (33, 11), "c-square": (32, 32), "d-enlarged": (8, 12)}
    for name, (height, width) in shapes.items():
        save(tmp_path / f"{name}.png", pixels(height, width) // 2 + 127)
    loaded = load_images(settings("folder", tmp_path, size=32, fit="pad"))
    assert loaded.images.shape == (4, 3, 32, 32) and loaded.images.dtype == torch.float32
    assert loaded.frames.dtype == torch.int64
    # The longer side is 32, the shorter in proportion: 33x11 becomes 32x10.67.
    expected_frames = [[8, 0, 16, 32], [0, 10, 32, 11], [0, 0, 32, 32], [5, 0, 21, 32]]
    assert loaded.frames.tolist() == expected_frames
    for image, (top, left, height, width) in zip(loaded.images, expected_frames, strict=True):
        outside = image.clone()
        inside = outside[:, top : top + height, left : left + width]
        assert inside.min() > 0.3 and inside.max() <= 1
        inside.zero_()
        assert not outside.any()
    torch.testing.assert_close(loaded.images[2], read_image(tmp_path / "c-square.png"))


def test_padding_agrees_with_pillow_and_leaves_the_right_size_alone(photographs):
    image = photographs.images[0][:, :61]
    square, frame = pad_to_square(image, 96)
    assert frame == (17, 0, 61, 96) and torch.equal(square[:, 17:78], image)
    square, frame = pad_to_square(image, 48)
    assert frame == (9, 0, 30, 48)
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    theirs = expected(np.asarray(picture.resize((48, 30), Image.Resampling.BICUBIC)))
    torch.testing.assert_close(square[:, 9:39], theirs, atol=0.01, rtol=0)


def test_there_are_no_frames_where_all_pictures_fill_their_squares(tmp_path, photographs):
    save(tmp_path / "a.png", pixels(20, 20))
    save(tmp_path / "b.png", pixels(40, 40))
    assert load_images(settings("folder", tmp_path, size=16, fit="pad")).frames is None
    save(tmp_path / "c.png", pixels(40, 30))
    assert load_images(settings("folder", tmp_path, size=16)).frames is None
    assert load_images(settings("folder", tmp_path, size=16, fit="pad")).frames is not None
    assert photographs.frames is None


def test_padded_pictures_are_enlarged_where_their_longer_side_is_short(tmp_path, caplog):
    for index, shape in enumerate([(8, 15), (10, 16), (9, 40)]):
        save(tmp_path / f"{index}.png", pixels(*shape))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="9x40 pixels become"):
        load_images(settings("folder", tmp_path, size=16, fit="pad"))
    load_images(settings("folder", tmp_path, size=16, fit="pad", max_images=2))
    (record,) = caplog.records
    assert "1 of 2 images are smaller than data.size=16" in record.getMessage()


def test_a_picture_too_thin_for_its_square_is_named_and_left_out_where_that_is_wanted(
    tmp_path, caplog
):
    save(tmp_path / "thin.png", pixels(16, 400))
    save(tmp_path / "wide.png", pixels(20, 40))
    message = "thin.png: 16x400 pixels become 1x32 in a square of data.size=32: both .* at least 8"
    with pytest.raises(ValueError, match=message) as caught:
        load_images(settings("folder", tmp_path, size=32, fit="pad"))
    assert "\n" not in str(caught.value)
    wanted = settings("folder", tmp_path, size=32, fit="pad", skip_unreadable=True)
    with caplog.at_level(logging.WARNING):
        loaded = load_images(wanted)
    assert loaded.names == ("wide.png",) and len(loaded.frames) == 1
    (record,) = caplog.records
    assert "thin.png: 16x400" in record.getMessage()


@pytest.mark.parametrize("steps", [["contrast"], ["laplacian"], ["mean", "whiten"]])
def test_the_thinnest_pictures_are_large_enough_for_the_default_preprocessing(tmp_path, steps):
    save(tmp_path / "wide.png", pixels(16, 64))
    save(tmp_path / "tall.png", pixels(48, 40))
    loaded = load_images(settings("folder", tmp_path, size=32, fit="pad"))
    assert loaded.frames.tolist() == [[0, 2, 32, 27], [12, 0, 8, 32]]
    model = Preprocessing(PreprocessingSettings(steps=steps)).fit(loaded.images, loaded.frames)
    pixels_again = model.inverse(*model(loaded.images, loaded.frames))
    torch.testing.assert_close(pixels_again, loaded.images, atol=1e-5, rtol=0)


def test_without_a_size_images_of_two_sizes_are_named(tmp_path):
    save(tmp_path / "a.png", pixels(10, 12))
    save(tmp_path / "b.png", pixels(11, 12))
    with pytest.raises(ValueError, match="data.size=None.*a.png has 10x12 .* b.png 11x12"):
        load_images(settings("folder", tmp_path))


def test_a_list_names_images_relative_to_itself(tmp_path):
    save(tmp_path / "images" / "a b.png", pixels(seed=0))
    outside = save(tmp_path / "other" / "c.png", pixels(seed=1))
    file = tmp_path / "images" / "list.txt"
    # With the byte order mark that Windows editors write.
    file.write_text(f"\ufeff# chosen by hand\n{outside}\n\n  a b.png  \n../other/c.png\n")
    loaded = load_images(settings("list", file))
    assert loaded.names == (str(outside), "a b.png", "../other/c.png")
    torch.testing.assert_close(loaded.images[1], expected(pixels(seed=0)))
    assert torch.equal(loaded.images[0], loaded.images[2])


def test_spaces_around_a_name_in_a_list_are_part_of_it_where_there_is_such_a_file(tmp_path):
    for seed, name in enumerate((" first.png", "first.png", "last .png", "\u2028line.png")):
        save(tmp_path / name, pixels(seed=seed))
    (tmp_path / "list.txt").write_text(" first.png\n  first.png\t\n\u2028line.png\n # of none\n")
    loaded = load_images(settings("list", tmp_path / "list.txt"))
    for image, seed in zip(loaded.images, (0, 1, 3), strict=True):
        torch.testing.assert_close(image, expected(pixels(seed=seed)))


def test_a_list_that_cannot_be_used_and_a_missing_image_are_named(tmp_path):
    (tmp_path / "list.txt").write_text("absent.png\n")
    with pytest.raises(ValueError, match="1 of the images.*absent.png: No such file"):
        load_images(settings("list", tmp_path / "list.txt"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("empty.txt", "binary.txt", "absent.txt", ""):
        with pytest.raises(ValueError, match=f"data.path=.*{name}: "):
            load_images(settings("list", tmp_path / name))


def test_a_torchvision_data_set_is_found_by_name_and_only_what_is_asked_for_is_decoded():
    images = load_images(settings("torchvision", dataset="FakeData", size=64, max_images=3))
    assert images.images.shape == (3, 3, 64, 64)
    assert images.names == ("FakeData-0", "FakeData-1", "FakeData-2")


def test_a_torchvision_data_set_on_disk_is_read_with_its_split(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = {"train": pixels(3 * 28, 28, 1), "t10k": pixels(2 * 28, 28, 1, seed=1)}
    for name, values in digits.items():
        count = len(values) // 28
        header = b"".join(number.to_bytes(4, "big") for number in (0x0803, count, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + values.tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (0x0801, count))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + bytes(count))
    for split, name in (("train", "train"), ("test", "t10k")):
        loaded = load_images(settings("torchvision", tmp_path, dataset="MNIST", split=split))
        torch.testing.assert_close(loaded.images[1], expected(digits[name][28:56]))
    with pytest.raises(ValueError, match="data.split=val: MNIST has train and test"):
        load_images(settings("torchvision", tmp_path, dataset="MNIST", split="val"))


def test_an_absent_torchvision_data_set_is_not_downloaded_but_explained(tmp_path, monkeypatch):
    attempts = []

    def no_network(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("socket.socket.connect", no_network)
    # SEMEION downloads by default.
    for name in ("CIFAR10", "SEMEION", "EMNIST"):
        with pytest.raises(
            ValueError, match=f"data.dataset={name}: .*data.download=true"
        ) as caught:
            load_images(settings("torchvision", tmp_path, dataset=name))
        assert f"data.path={tmp_path}" in str(caught.value)
    assert not attempts


def test_a_misspelt_torchvision_data_set_gets_a_suggestion(tmp_path):
    for name, suggestion in (
        ("cifar10", "CIFAR10"),
        ("FashonMNIST", "FashionMNIST"),
        ("xyz", "STL10"),
    ):
        with pytest.raises(ValueError, match=f"data.dataset={name}: .*{suggestion}"):
            load_images(settings("torchvision", tmp_path, dataset=name))


def test_arguments_that_a_torchvision_data_set_lacks_or_does_not_know_are_named(tmp_path):
    with pytest.raises(ValueError, match="data.path=None: .*CIFAR10 needs a root folder"):
        load_images(settings("torchvision", dataset="CIFAR10"))
    with pytest.raises(ValueError, match="data.split=test: Caltech101 has no splits"):
        load_images(settings("torchvision", tmp_path, dataset="Caltech101", split="test"))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("name", {"name": "a/b"}),
        ("source", {"source": "internet"}),
        ("path", {"source": "folder"}),
        ("path", {"source": "list"}),
        ("dataset", {"source": "torchvision"}),
        ("path", {"path": "photos"}),
        ("size", {"size": 3}),
        ("size", {"size": None}),
        ("size", {"size": None, "fit": "pad", "source": "folder", "path": "photos"}),
        ("fit", {"fit": "stretch"}),
        ("fit", {"fit": "pad"}),
        ("scale", {"scale": 0.0}),
        ("scale", {"scale": 1.5}),
        ("max_images", {"max_images": 0}),
    ],
)
def test_settings_name_the_key_that_is_wrong(key, values):
    with pytest.raises(ValueError, match=f"data.{key}="):
        DataSettings(**values)


def test_images_read_one_by_one_are_those_read_at_once(tmp_path):
    for index, name in enumerate(["b/2.png", "b/10.png", "a.png"]):
        save(tmp_path / "set" / name, pixels(20 + index, 30, seed=index))
    (tmp_path / "list.txt").write_text("set/b/2.png\nset/a.png\n")
    for wanted in (
        settings("folder", tmp_path / "set", size=16),
        settings("folder", tmp_path / "set", size=16, max_images=2),
        settings("list", tmp_path / "list.txt", size=12),
        settings("torchvision", dataset="FakeData", size=40, max_images=3),
        settings("photographs", size=64, max_images=4),
    ):
        lazy, whole = lazy_images(wanted), load_images(wanted)
        assert lazy.names == whole.names and len(lazy) == len(whole.images)
        assert torch.equal(torch.stack(list(lazy)), whole.images)
    sizes = [image.shape[1:] for image in lazy_images(settings("folder", tmp_path / "set"))]
    assert sizes == [(22, 30), (21, 30), (20, 30)]  # a.png, b/10.png, b/2.png as they are


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    save(tmp_path / "a.png", pixels(16, 16))
    bad = damaged_files(tmp_path)
    lazy = lazy_images(settings("folder", tmp_path, size=16))
    assert lazy[0].shape == (3, 16, 16) and len(lazy) == 5
    assert len(lazy.fingerprint) == 64
    for index, name in enumerate(lazy.names[1:], start=1):
        with pytest.raises(ValueError, match=f"cannot read .*{name}: .*{bad[name]}"):
            lazy[index]
    with pytest.raises(IndexError):
        lazy[5]


def test_unreadable_files_have_no_number_where_they_are_left_out(tmp_path, caplog):
    save(tmp_path / "a.png", pixels())
    bad = damaged_files(tmp_path)
    for name in "xyz":
        save(tmp_path / f"{name}.png", pixels(seed=ord(name)))
    wanted = settings("folder", tmp_path, skip_unreadable=True, max_images=3)
    with caplog.at_level(logging.WARNING):
        lazy = lazy_images(wanted)
    assert lazy.names == ("a.png", "x.png", "y.png")
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in bad)
    for name in "axyz":
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ValueError, match="none of the 4 images"):
        lazy_images(wanted)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_is_what_torchvision_makes_of_an_image_in_evaluation(interpolation):
    from torchvision.transforms import v2

    theirs = v2.Compose(
        [
            v2.Resize(58, v2.InterpolationMode(interpolation), antialias=True),
            v2.CenterCrop(48),
        ]
    )
    crop = Crop(58, 48, interpolation)
    square = expected(pixels(80, 80))
    torch.testing.assert_close(crop(square), theirs(square).clamp(0, 1), atol=1e-6, rtol=0)
    # Other shapes are cropped to the middle first, within a pixel of the file of theirs.
    rows, columns = torch.meshgrid(torch.arange(90), torch.arange(121), indexing="ij")
    smooth = (0.5 + 0.4 * torch.sin(rows / 17) * torch.cos(columns / 11)).expand(3, -1, -1)
    torch.testing.assert_close(crop(smooth), theirs(smooth), atol=0.03, rtol=0)


def test_a_crop_takes_the_place_of_the_size_of_the_settings(tmp_path):
    save(tmp_path / "a.png", pixels(60, 50))
    image = read_image(tmp_path / "a.png")
    lazy = lazy_images(settings("folder", tmp_path, size=16), crop=Crop(40, 32))
    assert torch.equal(lazy[0], crop_to_square(image, 40)[:, 4:36, 4:36])
    memory = LazyImages.from_set(ImageSet(image[None], ("a.png",)), crop=Crop(40, 32))
    assert torch.equal(memory[0], lazy[0]) and memory.names == lazy.names


def test_a_crop_or_fit_that_makes_no_sense_is_named(tmp_path):
    for arguments, key in (((0, 0), "size=0"), ((10, 12), "resize=10"), ((9, 9, "cubic"), "cubic")):
        with pytest.raises(ValueError, match=f"crop.*{key}"):
            Crop(*arguments)
    with pytest.raises(ValueError, match="data.fit=pad"):
        lazy_images(settings("folder", tmp_path, size=16, fit="pad"))


def test_lazy_images_can_be_sent_to_other_processes_and_batched(tmp_path):
    for index in range(5):
        save(tmp_path / f"{index}.png", pixels(20, 24, seed=index))
    for lazy in (
        lazy_images(settings("folder", tmp_path, size=16)),
        lazy_images(settings("torchvision", dataset="FakeData", size=16, max_images=4)),
        lazy_images(DataSettings(size=64, max_images=20)),
    ):
        sent = pickle.dumps(lazy)
        assert len(sent) < 2 * 20 * 3 * 64 * 64 * 4  # the tensor of all images goes once
        again = pickle.loads(sent)
        assert again.fingerprint == lazy.fingerprint
        (batch,) = torch.utils.data.DataLoader(again, batch_size=len(again))
        assert torch.equal(batch, torch.stack(list(lazy)))


def test_the_fingerprint_tells_sets_of_images_apart_but_not_copies(tmp_path):
    for index in range(3):
        save(tmp_path / "a" / f"{index}.bmp", pixels(20, 24, seed=index))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "1.bmp", (0, 0))

    def fingerprint(folder, crop=None, **other):
        return lazy_images(settings("folder", tmp_path / folder, **other), crop=crop).fingerprint

    assert fingerprint("b") == fingerprint("a")
    assert fingerprint("a", size=16) == fingerprint("a", Crop(16, 16))
    found = [fingerprint("a", crop) for crop in (None, Crop(16, 16), Crop(18, 16))]
    found += [fingerprint("a", Crop(16, 16, "bilinear")), fingerprint("a", max_images=2)]
    save(tmp_path / "b" / "1.bmp", pixels(20, 28))
    found.append(fingerprint("b"))
    (tmp_path / "b" / "1.bmp").rename(tmp_path / "b" / "3.bmp")
    found.append(fingerprint("b"))
    for scale in (0.3, 0.5):  # the same names, other pixels
        crops = ImageSet(torch.full((40, 3, 8, 8), scale), tuple(map(str, range(40))))
        found.append(LazyImages.from_set(crops).fingerprint)
    assert len(set(found)) == len(found) == 9


def every_way(wanted):
    return load_images(wanted), stream_images(wanted), lazy_images(wanted)


def test_an_image_that_is_corrected_under_its_old_name_has_another_digest(tmp_path):
    for index in range(3):  # BMP: the same number of bytes, whatever the pixels
        save(tmp_path / f"{index}.bmp", pixels(20, 24, seed=index))
    wanted = settings("folder", tmp_path, size=16)
    contents = [(tmp_path / f"{n}.bmp").read_bytes() for n in range(3)]
    expected_digests = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    found = every_way(wanted)
    prints = {each.fingerprint for each in found}
    assert all(each.digests == expected_digests for each in found) and len(prints) == 1
    assert digest_file(tmp_path / "1.bmp") == expected_digests[1]
    before = os.stat(tmp_path / "1.bmp")
    save(tmp_path / "1.bmp", pixels(20, 24, seed=8))
    os.utime(tmp_path / "1.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(tmp_path / "1.bmp").st_size == before.st_size
    for old, new in zip(found, every_way(wanted), strict=True):
        changed = [a != b for a, b in zip(old.digests, new.digests, strict=True)]
        assert changed == [False, True, False] and old.fingerprint != new.fingerprint


def test_the_same_images_have_one_fingerprint_whatever_holds_them(tmp_path, monkeypatch):
    for index, name in enumerate(("a/0.png", "a/1.png", "b/2.png")):
        save(tmp_path / "set" / name, pixels(20, 24, seed=index))
    shutil.copytree(tmp_path / "set", tmp_path / "copy" / "of it")
    os.utime(tmp_path / "copy" / "of it" / "a" / "1.png", (0, 0))
    (tmp_path / "linked").symlink_to(tmp_path / "set")
    with tarfile.open(tmp_path / "set.tar", "w") as shard:
        shard.add(tmp_path / "set", "")
    (tmp_path / "list.txt").write_text("set/a/0.png\nset/a/1.png\nset/b/2.png\n")
    (tmp_path / "other.txt").write_text(
        "".join(f"{tmp_path}/set/{n}.png\n" for n in ("a/0", "a/1", "b/2"))
    )
    monkeypatch.chdir(tmp_path)
    places = ["set", "set/", "./set", tmp_path / "set", "copy/of it", "linked"]
    ways = [("folder", place) for place in places]
    ways += [("shards", "set.tar"), ("list", "list.txt"), ("list", tmp_path / "other.txt")]
    for options in ({}, {"size": 16}):
        found = [each for way in ways for each in every_way(settings(*way, **options))]
        assert len({each.digests for each in found}) == 1
        assert len({each.fingerprint for each in found}) == 1
    padded = settings("folder", "set", size=16, fit="pad")
    assert load_images(padded).fingerprint == stream_images(padded).fingerprint
    prints = {
        load_images(each).fingerprint
        for each in (
            padded,
            settings("folder", "set", size=16),
            settings("folder", "set", size=17),
            settings("folder", "set"),
            settings("folder", "set", max_images=2),
        )
    }
    assert len(prints) == 5


def test_images_without_bytes_are_distinguished_by_all_their_pixels():
    pixels = torch.rand(40, 3, 8, 8)
    names = tuple(map(str, range(40)))
    one = ImageSet(pixels, names)
    other = ImageSet(pixels.clone().index_fill(0, torch.tensor(23), 0.5), names)
    assert [a == b for a, b in zip(one.digests, other.digests, strict=True)].index(False) == 23
    assert len(set(one.digests)) == 40 and one.fingerprint != other.fingerprint
    lazy = LazyImages.from_set(one)
    assert lazy.digests == one.digests and lazy.fingerprint == one.fingerprint
    numbered = settings("torchvision", dataset="FakeData", size=16, max_images=3)
    assert len({each.fingerprint for each in every_way(numbered)}) == 1
    assert len(set(load_images(numbered).digests)) == 3


def test_an_image_whose_bytes_cannot_be_read_has_no_digest_and_is_named(tmp_path):
    save(tmp_path / "a.png", pixels())
    (tmp_path / "list.txt").write_text("a.png\nabsent.png\n")
    for images in (lazy_images, stream_images):
        with pytest.raises(ValueError, match="cannot read .*absent.png: No such file") as caught:
            images(settings("list", tmp_path / "list.txt")).digests  # noqa: B018
        assert "\n" not in str(caught.value)


def test_the_digest_of_a_file_is_the_same_in_a_folder_and_in_a_torchvision_data_set(tmp_path):
    for index, name in enumerate(("cat/1.png", "dog/2.png")):
        save(tmp_path / name, pixels(16, 16, seed=index))
    folder = load_images(settings("folder", tmp_path))
    named = lazy_images(settings("torchvision", tmp_path, dataset="ImageFolder"))
    assert named.digests == folder.digests and torch.equal(named[1], folder.images[1])


def test_no_two_files_have_one_name_for_their_pictures_whatever_their_order():
    cases = {
        "a.png x/a.png a-2.png": "a a-3 a-2",
        "A.png a.png b/a.jpg": "A a-2 a-3",
        "a.png a.jpg a.png": "a-2 a a-3",
        "a-2.png a.png b/a.png c/a-2.png a-2-2.png": "a-2 a a-3 a-2-3 a-2-2",
        "STRASSE.png stra\xdfe.png": "STRASSE stra\xdfe-2",
        "caf\xe9.png x/cafe\u0301.png": "caf\xe9 cafe\u0301-2",
    }
    for paths, expected_names in cases.items():
        paths = [Path(path) for path in paths.split()]
        assert distinct_names(paths) == expected_names.split()
    generator = random.Random(0)
    for _ in range(200):
        stems = [generator.choice(["a", "A", "a-2", "a-3", "A-2", "a-2-2"]) for _ in range(6)]
        paths = [Path(f"{generator.randrange(3)}/{stem}.png") for stem in stems]
        names = distinct_names(paths)
        assert len({name.casefold() for name in names}) == len(paths)
        shuffled = generator.sample(range(6), 6)
        again = distinct_names([paths[n] for n in shuffled])
        if len(set(paths)) == 6:
            assert [again[shuffled.index(n)] for n in range(6)] == names
    (name,) = distinct_names([Path(os.fsdecode(b"caf\xe9\n.png"))])
    assert name == "caf\\xe9\\n"


def test_names_that_are_no_text_are_shown_as_text_and_read_all_the_same(tmp_path):
    inside = os.fsdecode(b"\xe9t\xe9/caf\xe9.png")
    for index, name in enumerate((inside, "b\nc/new\nline.png")):
        save(tmp_path / "set" / name, pixels(16, 16, seed=index))
    (tmp_path / "list.txt").write_bytes(b"# vieux\r\nset/\xe9t\xe9/caf\xe9.png\r\n")
    for images in every_way(settings("folder", tmp_path / "set")):
        assert len(images) == 2 if isinstance(images, LazyImages) else True
        names = images.names if hasattr(images, "names") else [i.name for i in images.items]
        assert list(names) == ["b\\nc/new\\nline.png", "\\xe9t\\xe9/caf\\xe9.png"]
    lazy = lazy_images(settings("folder", tmp_path / "set"))
    assert [lazy.label(0), lazy.label(1)] == ["b\\nc", "\\xe9t\\xe9"]
    listed = load_images(settings("list", tmp_path / "list.txt"))
    assert torch.equal(listed.images[0], lazy[1])
    assert listed.names == ("set/\\xe9t\\xe9/caf\\xe9.png",)
    (tmp_path / "set" / inside).write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"caf\\xe9.png: not an image") as caught:
        load_images(settings("folder", tmp_path / "set"))
    str(caught.value).encode()
    assert Item(inside, lambda: None).name == "\\xe9t\\xe9/caf\\xe9.png"


def test_a_tilde_is_the_home_of_the_user_in_every_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "set" / "a.png", pixels(seed=3))
    save(tmp_path / "~nobody-of-that-name.png", pixels(seed=4))
    (tmp_path / "list.txt").write_text("~/set/a.png\n~nobody-of-that-name.png\n")
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(tmp_path / "set", "")
    for source, path in (("folder", "~/set"), ("list", "~/list.txt"), ("shards", "~/s.tar")):
        found = load_images(settings(source, path))
        torch.testing.assert_close(found.images[0], expected(pixels(seed=3)))
    assert image_files("~/set") == [tmp_path / "set" / "a.png"]
    listed = [tmp_path / "set" / "a.png", tmp_path / "~nobody-of-that-name.png"]
    assert image_files("~/list.txt") == listed and image_files(["~/list.txt"]) == listed
    torch.testing.assert_close(read_image("~/set/a.png"), expected(pixels(seed=3)))
    with pytest.raises(ValueError, match="data.path=~nobody: no such folder"):
        load_images(settings("folder", "~nobody"))


def test_places_that_cannot_be_read_are_named_in_one_line(tmp_path, monkeypatch):
    save(tmp_path / "set" / "a.png", pixels())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros.txt").write_bytes(b"a.png\n\0")
    for source, path, reason in (
        ("folder", tmp_path / "set" / "a.png", "not a folder; data.source=shards reads .tar"),
        *(("folder", "x" * 5000, "name too long"), ("folder", "a\0b", "null")),
        ("folder", tmp_path / "two\nlines", r"two\\nlines: no such folder"),
        *(("list", tmp_path / "pipe", "not a regular"), ("list", tmp_path / "set", "a folder")),
        *(("list", tmp_path / "zeros.txt", "zero bytes"), ("shards", tmp_path / "pipe", "regular")),
        ("shards", tmp_path / "absent", "No such file"),
    ):
        for images in (load_images, lazy_images, stream_images):
            with pytest.raises(ValueError, match=f"(?i)data.path=.*{reason}") as caught:
                images(settings(source, path))
            assert "\n" not in str(caught.value)

    def refused(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(ValueError, match="set cannot be listed: Permission denied"):
        load_images(settings("folder", tmp_path / "set"))


def test_the_setting_that_names_a_folder_is_named_in_messages(tmp_path):
    for key in ("images", "image", "clean"):
        with pytest.raises(ValueError, match=f"^{key}=.*: no image in this folder"):
            image_files(["a.png", str(tmp_path)], key=key)
    with pytest.raises(ValueError, match="^images=.*: no image in this folder"):
        image_files(str(tmp_path))


def test_a_download_that_failed_says_so_and_settings_of_a_file_fetch_nothing(tmp_path, monkeypatch):
    tried = []

    def no_network(*arguments, **_):
        tried.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("socket.socket.connect", no_network)
    asked = settings("torchvision", tmp_path / "data", dataset="CIFAR10", download=True)
    with pytest.raises(ValueError, match="with data.download=true: .*no network") as caught:
        load_images(asked)
    assert "set data.download=true" not in str(caught.value) and "\n" not in str(caught.value)
    assert tried
    tried.clear()
    kept = without_download(asked)
    assert kept == DataSettings(**{**vars(asked), "download": False}) and asked.download
    with pytest.raises(ValueError, match="set data.download=true"):
        load_images(kept)
    assert not tried


def test_images_know_their_class_by_their_folder_or_data_set(tmp_path):
    for name in ("cat/1.png", "cat/young/2.png", "dog/1.png", "loose.png"):
        save(tmp_path / name, pixels())
    lazy = lazy_images(settings("folder", tmp_path))
    assert [lazy.label(index) for index in range(3)] == ["cat", "cat", "dog"]
    with pytest.raises(ValueError, match="loose.png: has no class"):
        lazy.label(3)
    (tmp_path / "loose.png").unlink()
    named = lazy_images(settings("torchvision", tmp_path, dataset="ImageFolder"))
    assert [named.label(index) for index in range(3)] == ["cat", "cat", "dog"]
    numbered = lazy_images(settings("torchvision", dataset="FakeData", max_images=3))
    assert all(numbered.label(index) in map(str, range(10)) for index in range(3))
    with pytest.raises(ValueError, match="astronaut.*has no class"):
        lazy_images(DataSettings()).label(0)


def test_results_among_the_images_that_they_were_made_from_are_no_images(tmp_path, caplog):
    for name in ("a.png", "b/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("a-layer1.png", "b/runs/r/pictures/layer1-filters.png"):
        save_picture(tmp_path / name, torch.zeros(3, 8, 8))
    assert find_images(tmp_path) == [tmp_path / "a.png", tmp_path / "b" / "c.png"]
    assert "skipped 2 pictures that deconvnet made" in caplog.text
    # They are images where they are asked for, or edited.
    assert find_images(tmp_path / "b" / "runs") == [
        tmp_path / "b" / "runs" / "r" / "pictures" / "layer1-filters.png"
    ]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a-layer1.png")
    assert tmp_path / "a-layer1.png" in find_images(tmp_path)
