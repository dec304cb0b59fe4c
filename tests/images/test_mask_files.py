"""Images with holes from files: which pixels are seen, how they are resized, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from deconvnet.images.datasets import lazy_images, load_images, stream_images
from deconvnet.images.fit import fit_image
from deconvnet.images.preprocessing import Preprocessing, PreprocessingSettings, local_moments
from deconvnet.images.sources import DataSettings


def settings(folder, mask, **other):
    options = dict(name="holes", source="folder", path=str(folder), size=16, max_images=None)
    return DataSettings(**options | dict(mask=mask and str(mask)) | other)


@pytest.fixture
def folders(tmp_path, textures):
    """Two pictures with holes: with an alpha channel, and beside a folder of masks."""
    random = np.random.default_rng(0)
    for name in ("alpha", "plain/class", "masks/class"):
        (tmp_path / name).mkdir(parents=True)
    for n, picture in enumerate(textures(2, 3, 16, 16)):
        pixels = (255 * picture.permute(1, 2, 0)).round().byte().numpy()
        seen = (random.random((16, 16)) < 0.7).astype(np.uint8) * 255
        Image.fromarray(np.dstack([pixels, seen])).save(tmp_path / f"alpha/{n}.png")
        Image.fromarray(pixels).save(tmp_path / f"plain/class/{n}.png")
        Image.fromarray(seen).save(tmp_path / f"masks/class/{n}.bmp")
    return tmp_path


def test_transparent_pixels_and_black_pixels_of_masks_are_unseen(folders):
    by_alpha = load_images(settings(folders / "alpha", "alpha"))
    by_files = load_images(settings(folders / "plain", folders / "masks"))
    assert torch.equal(by_alpha.images.nan_to_num(-1), by_files.images.nan_to_num(-1))
    for n, image in enumerate(by_files.images):
        seen = np.asarray(Image.open(folders / f"masks/class/{n}.bmp")) > 0
        assert torch.equal(~image.isnan(), torch.from_numpy(seen).expand(3, -1, -1))
    stream = stream_images(settings(folders / "alpha", "alpha", stream=True))
    streamed, _ = stream.read(torch.arange(2))
    assert torch.equal(streamed.nan_to_num(-1), by_alpha.images.nan_to_num(-1))
    assert stream.fingerprint == by_alpha.fingerprint
    whole = load_images(settings(folders / "plain", None))
    assert not whole.images.isnan().any() and whole.digests != by_files.digests
    assert not lazy_images(settings(folders / "alpha", "alpha"))[0].isnan().any()


def test_resized_pixels_are_means_of_the_seen_pixels_that_they_cover():
    image = torch.full((3, 32, 32), 0.25)
    image[:, :, 16:] = 0.75
    image[:, 5:9, 3:9] = image[:, :, 30:] = torch.nan
    for fit in ("crop", "pad"):
        fitted, _ = fit_image(image, "an image", 16, fit)
        seen = ~fitted.isnan().any(0)
        assert seen.float().mean() == pytest.approx(0.9, abs=0.03) and not seen[:, 15].any()
        assert_close(fitted[:, seen[:, 4], 4], torch.full_like(fitted[:, seen[:, 4], 4], 0.25))
        assert_close(fitted[:, :, 12], torch.full((3, 16), 0.75))


def test_the_mean_and_the_contrast_of_seen_pixels_ignore_the_others():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 12, 11, generator=generator)
    seen = torch.rand(2, 1, 12, 11, generator=generator) < 0.6
    other = images.where(seen, torch.rand(images.shape, generator=generator))
    keep = seen.expand_as(images)
    for steps in (["mean"], ["contrast"]):
        preprocessing = Preprocessing(PreprocessingSettings(steps=steps, contrast_size=5))
        y, record = preprocessing(images, mask=seen)
        assert_close(preprocessing(other, mask=seen)[0][keep], y[keep])
        assert_close(preprocessing.inverse(y, record), images)
    expected = [image[:, m[0]].mean(1) for image, m in zip(images, seen, strict=True)]
    preprocessing = Preprocessing(PreprocessingSettings(steps=["mean"]))
    assert_close(preprocessing(images, mask=seen)[1][0]["mean"].flatten(1), torch.stack(expected))
    # At a pixel in the middle: weighted sums over the seen pixels of its window, by hand.
    mean, deviation = local_moments(images, 5, 1.5, mask=seen)
    weights = torch.exp(-((torch.arange(5) - 2.0) ** 2) / (2 * 1.5**2))
    weights = weights[:, None] * weights * seen[0, 0, 3:8, 4:9]
    window = images[0, :, 3:8, 4:9]
    by_hand = (weights * window).sum((1, 2)) / weights.sum()
    assert_close(mean[0, :, 5, 6], by_hand)
    variance = (weights * window.square()).sum((1, 2)) / weights.sum() - by_hand.square()
    assert_close(deviation[0, 0, 5, 6], variance.mean().sqrt())


def test_masks_that_do_not_belong_to_the_images_are_refused_in_one_line(folders):
    with pytest.raises(ValueError, match="^data.mask=alpha: the images of data.source=photographs"):
        DataSettings(mask="alpha")
    plain, masks = folders / "plain", folders / "masks"

    def refused(mask, *parts):
        with pytest.raises(ValueError) as error:
            load_images(settings(plain, mask))
        assert "\n" not in str(error.value)
        assert all(part in str(error.value) for part in parts), error.value

    refused(folders / "nowhere", "data.mask=", "no such folder")
    (folders / "empty").mkdir()
    refused(folders / "empty", "data.mask=", "no mask in this folder")
    file = masks / "class" / "1.bmp"
    Image.new("L", (16, 16)).save(file)
    refused(masks, "class/1.png: none of its pixels is seen")
    Image.new("L", (15, 16), 255).save(file)
    refused(masks, "class/1.png: the mask has 16x15 pixels, the image 16x16")
    file.unlink()
    refused(masks, "data.mask=", "no mask named class/1, for the image class/1.png")
    skipping = load_images(settings(plain, masks, skip_unreadable=True))
    assert skipping.names == ("class/0.png",)
    Image.new("L", (16, 16), 255).save(masks / "class" / "0.png")
    refused(masks, "0.bmp and 0.png are masks of the same image")
