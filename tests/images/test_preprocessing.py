import numpy as np
import pytest
import torch
from scipy import ndimage, signal
from skimage import color as skimage_color
from skimage import data

from deconvnet.images.preprocessing import (
    COLORS,
    STEPS,
    Preprocessing,
    PreprocessingSettings,
    local_moments,
    rgb_to_ycbcr,
    to_color,
    whitening_filter,
    ycbcr_to_rgb,
)

ORDERS = [[], *([step] for step in STEPS), ["mean", "laplacian", "contrast", "whiten"]]
LAPLACIAN = np.array([[1, 4, 1], [4, -20, 4], [1, 4, 1]]) / 6  # fspecial('laplacian', 0.2)


def preprocessing(steps, color="rgb", **settings):
    return Preprocessing(PreprocessingSettings(color=color, steps=list(steps), **settings))


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def framed(images, frames, seed=9):
    """The images with noise in place of everything outside their frames."""
    result = noise(*images.shape, seed=seed).to(images)
    for image, source, (top, left, height, width) in zip(
        result, images, frames.tolist(), strict=True
    ):
        inside = (slice(None), slice(top, top + height), slice(left, left + width))
        image[inside] = source[inside]
    return result


def cut(planes, frame):
    """What is inside a frame (top, left, height, width); one number a plane is not cut."""
    top, left, height, width = map(int, frame)
    whole = planes.shape[2:] == (1, 1)
    return planes if whole else planes[..., top : top + height, left : left + width]


def is_zero_outside(planes, frame):
    outside = planes.clone()
    cut(outside, frame).zero_()
    return not outside.any()


# Of the 40 x 48 pixels of the photographs; two are equal and stand apart.
FRAMES = torch.tensor([[10, 0, 20, 48], [0, 9, 40, 31], [10, 0, 20, 48], [3, 5, 13, 7]])


@pytest.fixture(scope="module")
def shapes(photographs):
    """Four pictures of three shapes, with noise around them."""
    return framed(torch.cat([photographs, photographs.flip(2)]), FRAMES)


@pytest.fixture(scope="module")
def photographs():
    crops = [data.astronaut()[:160:4, 150:342:4], data.coffee()[100:260:4, 200:392:4]]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_inverse_undoes_forward(photographs, steps, color):
    model = preprocessing(steps, color).fit(photographs)
    y, record = model(photographs)
    pixels = model.inverse(y, record)
    assert y.shape == (2, model.channels, 40, 48)
    expected = to_color(photographs, "grey") if color == "grey" else photographs
    # A few float32 roundings of values around 1, through two Fourier transforms.
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_an_image_is_preprocessed_the_same_way_in_any_company(photographs, steps):
    model = preprocessing(steps).fit(photographs)
    y, record = model(photographs)
    alone = [model(image) for image in photographs.split(1)]
    torch.testing.assert_close(y, torch.cat([y for y, _ in alone]))
    same_steps = zip(*(record for _, record in alone), strict=True)
    joined = [
        {key: torch.cat([kept[key] for kept in step]) for key in step[0]} for step in same_steps
    ]
    assert [list(kept) for kept in joined] == [list(kept) for kept in record]
    for ours, theirs in zip(joined, record, strict=True):
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key])
    second = [{key: tensor[1:] for key, tensor in kept.items()} for kept in joined]
    torch.testing.assert_close(model.inverse(y[1:], second), photographs[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("color", ["rgb", "grey"])
def test_a_small_image_alone_has_the_bits_that_it_has_in_a_batch(photographs, color):
    small = photographs[:, :, :20, :20].float()
    net = preprocessing(STEPS, color).fit(small)
    assert torch.equal(net(small[:1])[0], net(small)[0][:1])


@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_fitted_preprocessing_gives_unit_root_mean_square(photographs, steps):
    y, _ = preprocessing(steps).fit(photographs)(photographs)
    assert y.square().mean().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("color", ["rgb", "grey"])
def test_state_dict_holds_all_that_was_learned(photographs, color):
    model = preprocessing(["mean", "whiten"], color).fit(photographs)
    other = preprocessing(["mean", "whiten"], color)
    assert not torch.equal(other(photographs)[0], model(photographs)[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(photographs)[0], model(photographs)[0])


def test_before_fit_scale_is_one_and_whitening_does_nothing(photographs):
    y, _ = preprocessing(["whiten"])(photographs)
    assert torch.equal(y, photographs)


def test_mean_takes_the_mean_of_every_plane(photographs):
    y, record = preprocessing(["mean"])(photographs)
    torch.testing.assert_close(y.mean((2, 3)), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(record[0]["mean"][:, :, 0, 0], photographs.mean((2, 3)))


def test_laplacian_is_matlabs_with_a_mirrored_border(photographs):
    y, _ = preprocessing(["laplacian"])(photographs)
    for plane, result in zip(photographs.flatten(0, 1), y.flatten(0, 1), strict=True):
        expected = ndimage.correlate(plane.double().numpy(), LAPLACIAN, mode="reflect")
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_local_moments_are_those_of_a_gaussian_window_slid_over_the_reflected_image(photographs):
    mean, deviation = local_moments(photographs, 13, 4.773)
    steps = np.arange(-6, 7)
    window = np.exp(-(steps[:, None] ** 2 + steps**2) / (2 * 4.773**2))
    window /= window.sum()
    for image, our_mean, ours in zip(photographs.double().numpy(), mean, deviation, strict=True):
        padded = np.pad(image, ((0, 0), (6, 6), (6, 6)), mode="reflect")
        means = np.stack([signal.correlate(plane, window, "valid") for plane in padded])
        squares = np.stack([signal.correlate(plane**2, window, "valid") for plane in padded])
        np.testing.assert_allclose(our_mean, means, atol=1e-6)
        expected = np.sqrt((squares - means**2).mean(0))
        np.testing.assert_allclose(ours[0], expected, atol=1e-4)


def test_contrast_divides_by_the_deviation_floored_at_its_median(photographs):
    mean, deviation = local_moments(photographs, 13, 4.773)
    y, record = preprocessing(["contrast"])(photographs)
    floor = torch.from_numpy(np.median(deviation.numpy(), axis=(1, 2, 3), keepdims=True))
    expected = (photographs - mean) / torch.maximum(deviation, floor)
    torch.testing.assert_close(y, expected)
    assert record[0]["deviation"].shape == (2, 1, 40, 48)


def test_contrast_does_not_depend_on_brightness_and_contrast_of_the_image():
    image = noise(1, 3, 32, 32)
    model = preprocessing(["contrast"])
    torch.testing.assert_close(model(image)[0], model(0.3 * image + 0.5)[0], atol=1e-3, rtol=1e-3)


def test_the_floor_of_a_mostly_flat_image_is_the_median_of_its_non_zero_deviations():
    image = torch.ones(1, 1, 64, 64)
    image[..., :12, :12] = noise(12, 12)
    _, deviation = local_moments(image, 13, 4.773)
    y, record = preprocessing(["contrast"], "grey")(image)
    assert deviation.median() == 0
    floor = record[0]["deviation"].min().item()
    assert floor == pytest.approx(np.median(deviation[deviation > 0]))
    assert y[..., 40:, 40:].abs().max() < 1e-4


def test_whitened_patches_are_nearly_white():
    blurred = ndimage.gaussian_filter(noise(20, 1, 40, 40).numpy(), (0, 0, 0.7, 0.7), mode="wrap")
    images = torch.from_numpy(blurred)

    def correlations(planes):
        patches = torch.nn.functional.unfold(planes, 5).transpose(1, 2).flatten(0, 1)
        matrix = torch.corrcoef(patches.T)
        return (matrix - torch.eye(25)).abs().max().item()

    model = preprocessing(["mean", "whiten"], "grey", whitening_floor=1e-5).fit(images)
    assert correlations(images) > 0.5
    assert correlations(model(images)[0]) < 0.1


def test_whitening_filter_is_the_middle_row_of_the_inverse_square_root_of_the_covariance():
    images = noise(3, 2, 9, 9).double()
    size, floor = 3, 0.05
    patches = []
    for image in images.numpy():
        for mirrored in (image, image[:, ::-1], image[:, :, ::-1], image[:, ::-1, ::-1]):
            for i in range(7):
                for j in range(7):
                    patches.append(mirrored[:, i : i + 3, j : j + 3].ravel())
    covariance = np.cov(np.array(patches).T, bias=True)
    largest = np.linalg.eigvalsh(covariance)[-1]
    regularised = covariance + floor * largest * np.eye(18)
    f = whitening_filter(images.split(1), size, floor=floor)
    values, vectors = np.linalg.eigh(regularised)
    root = vectors / np.sqrt(values) @ vectors.T
    np.testing.assert_allclose(f.reshape(2, 18), root[[4, 13]], atol=1e-5)


def test_whitening_filter_is_symmetric_in_both_axes(photographs):
    f = whitening_filter(photographs.split(1), 7, floor=0.01)
    torch.testing.assert_close(f, f.flip(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(f, f.flip(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("color", ["grey", "rgb"])
@pytest.mark.parametrize("step", ["laplacian", "whiten"])
def test_a_noisy_reconstruction_of_a_filtered_image_gives_a_sensible_picture(
    photographs, step, color
):
    model = preprocessing([step], color).fit(photographs)
    y, record = model(photographs)
    noisy = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    errors = model.inverse(noisy, record) - model.inverse(y, record)
    blurred = record[0]["low"] - to_color(photographs, color)

    def decibels(error):
        return -10 * error.square().mean().log10().item()

    assert decibels(errors) > 35
    assert decibels(errors) > decibels(blurred) + 10


@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
@pytest.mark.parametrize("value", [0.0, 0.7, 1.0])
def test_constant_images_give_neither_nan_nor_noise(photographs, steps, value):
    constant = torch.full((2, 3, 40, 48), value)
    for fitted in (photographs, constant):
        model = preprocessing(steps).fit(fitted)
        y, record = model(constant)
        assert y.isfinite().all() and model.scale > 0
        torch.testing.assert_close(model.inverse(y, record), constant, atol=1e-5, rtol=0)
        assert model(photographs)[0].abs().max() < 100


def test_ycbcr_agrees_with_scikit_image_up_to_range_and_is_undone():
    rgb = noise(2, 3, 5, 6).double()
    ours = rgb_to_ycbcr(rgb)
    theirs = skimage_color.rgb2ycbcr(rgb.numpy(), channel_axis=1)
    np.testing.assert_allclose(ours[:, 0], (theirs[:, 0] - 16) / 219, atol=1e-5)
    np.testing.assert_allclose(ours[:, 1:], (theirs[:, 1:] - 128) / 224 + 0.5, atol=1e-4)
    torch.testing.assert_close(ycbcr_to_rgb(ours), rgb, atol=1e-12, rtol=0)


def test_pure_colours_span_the_unit_range_of_ycbcr():
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)[:, :, None, None]
    planes = rgb_to_ycbcr(corners)[:, :, 0, 0]
    torch.testing.assert_close(planes.amin(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(planes.amax(0), torch.ones(3), atol=1e-6, rtol=0)


def test_grey_images_enter_colour_networks_and_colour_images_grey_ones():
    grey, rgb = noise(2, 1, 8, 8), noise(2, 3, 8, 8)
    assert torch.equal(preprocessing([])(grey)[0], grey.expand(2, 3, 8, 8))
    luma = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(preprocessing([], "grey")(rgb)[0], luma)
    model = preprocessing(["mean"], "ycbcr")
    torch.testing.assert_close(model.inverse(*model(grey)), grey.expand(2, 3, 8, 8))


@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_input_and_float64_are_left_as_they_are(photographs, steps):
    images = photographs.double()
    model = preprocessing(steps).fit(images)
    y, record = model(images)
    assert y.dtype == model.inverse(y, record).dtype == torch.float64
    assert model.scale.dtype == model.whitening.dtype == torch.float32
    assert torch.equal(images, photographs.double())
    torch.testing.assert_close(model.inverse(y, record), images, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(N, 1 or 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8), r"got \(2, 4, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "divide 0..255 by 255"),
        (torch.zeros(2, 3, 8, 8).index_fill(0, torch.tensor(1), torch.nan), "image 1 .*NaN"),
        (torch.zeros(2, 3, 8, 8).index_fill(0, torch.tensor(1), torch.inf), "image 1 .*infinite"),
        (torch.full((1, 3, 8, 8), 200.0), "from 200 to 200: .*by 255"),
        (torch.full((1, 3, 8, 8), -0.5), "image 0 has values from -0.5"),
    ],
)
def test_images_that_cannot_be_meant_are_refused(images, message):
    for use in (preprocessing([]), preprocessing([]).fit):
        with pytest.raises(ValueError, match=message):
            use(images)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_a_picture_in_a_frame_is_preprocessed_as_if_it_were_alone(shapes, steps, color):
    model = preprocessing(steps, color).fit(shapes, FRAMES)
    y, record = model(shapes, FRAMES)
    assert y.shape == (4, model.channels, 40, 48)
    for images in ([0, 2], [1], [3]):  # those of one frame
        frame = FRAMES[images[0]]
        alone, kept = model(cut(shapes[images], frame))
        assert torch.equal(cut(y[images], frame), alone)
        for ours, theirs in zip(record, kept, strict=False):
            assert list(ours) == list(theirs)
            for key in ours:
                assert torch.equal(cut(ours[key][images], frame), theirs[key])
    planes = [tensor for kept in record[:-1] for tensor in kept.values()]
    for index, frame in enumerate(FRAMES):
        for plane in (y, *(plane for plane in planes if plane.shape[2:] != (1, 1))):
            assert is_zero_outside(plane[index : index + 1], frame)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_inverse_gives_the_picture_inside_its_frame_and_black_outside(shapes, steps, color):
    model = preprocessing(steps, color).fit(shapes, FRAMES)
    y, record = model(shapes, FRAMES)
    # What a reconstruction has outside its frame is no part of the picture.
    pixels = model.inverse(framed(y, FRAMES), record)
    expected = to_color(shapes, "grey") if color == "grey" else shapes
    for index, frame in enumerate(FRAMES):
        ours, theirs = pixels[index : index + 1], expected[index : index + 1]
        torch.testing.assert_close(cut(ours, frame), cut(theirs, frame), atol=1e-5, rtol=0)
        assert is_zero_outside(ours, frame)


@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
@pytest.mark.parametrize("chosen", [slice(1, 3), torch.tensor([3, 0])], ids=["slice", "indices"])
def test_a_record_with_frames_is_sliced_like_images(shapes, steps, chosen):
    model = preprocessing(steps).fit(shapes, FRAMES)
    y, record = model(shapes, FRAMES)
    assert all(len(tensor) == 4 for kept in record for tensor in kept.values())
    some = [{key: tensor[chosen] for key, tensor in kept.items()} for kept in record]
    torch.testing.assert_close(model.inverse(y[chosen], some), model.inverse(y, record)[chosen])


@pytest.mark.parametrize("scale", ["rms", "max"])
@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_fitting_sees_nothing_outside_the_frames(shapes, steps, scale):
    model = preprocessing(steps, scale=scale).fit(shapes, FRAMES)
    other = preprocessing(steps, scale=scale).fit(framed(shapes, FRAMES, seed=8), FRAMES)
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    y, _ = model(shapes, FRAMES)
    values = torch.cat([cut(y[n : n + 1], frame).flatten() for n, frame in enumerate(FRAMES)])
    found = values.abs().max() if scale == "max" else values.square().mean().sqrt()
    assert found.item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_frames_that_are_filled_change_nothing(photographs, steps):
    whole = torch.tensor([[0, 0, 40, 48]] * 2)
    with_frames = preprocessing(steps).fit(photographs, whole)
    without = preprocessing(steps).fit(photographs)
    for key, tensor in without.state_dict().items():
        assert torch.equal(with_frames.state_dict()[key], tensor)
    y, record = with_frames(photographs, whole)
    expected, kept = without(photographs)
    assert torch.equal(y, expected)
    assert torch.equal(with_frames.inverse(y, record), without.inverse(expected, kept))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (FRAMES[:3], r"shape \(4, 4\).*got torch.int64 of shape \(3, 4\)"),
        (FRAMES.float(), "got torch.float32"),
        (FRAMES + torch.tensor([0, 1, 0, 0]), r"frame 0 is \[10, 1, 20, 48\].*inside 40x48"),
        (FRAMES - torch.tensor([1, 0, 0, 0]), r"frame 1 is \[-1, 9, 40, 31\]"),
        (FRAMES * torch.tensor([1, 1, 0, 1]), r"frame 0 is \[10, 0, 0, 48\].*2x2 pixels or more"),
    ],
)
def test_frames_that_are_none_of_these_images_are_refused(shapes, frames, message):
    for use in (preprocessing([]), preprocessing([]).fit):
        with pytest.raises(ValueError, match=message):
            use(shapes, frames)
    model = preprocessing([])
    with pytest.raises(ValueError, match=message):
        model.inverse(shapes, [{"frame": frames}])


def test_a_picture_too_small_for_a_border_is_named_and_the_needed_size(shapes):
    model = preprocessing(["contrast"], contrast_size=15)
    message = "image 3 of 13x7 pixels: too small for the step 'contrast'.*at least 8x8"
    for use in (model, model.fit):
        with pytest.raises(ValueError, match=message):
            use(shapes, FRAMES)


@pytest.mark.parametrize(("step", "needed"), [("laplacian", 3), ("contrast", 7), ("whiten", 7)])
def test_images_smaller_than_a_border_are_refused_and_the_needed_size_named(step, needed):
    model = preprocessing([step])
    small = noise(1, 3, needed - 1, 20)
    with pytest.raises(ValueError, match=f"{step}.*at least {needed}x{needed}"):
        model(small)
    large = noise(1, 3, needed, 20)
    torch.testing.assert_close(model.inverse(*model.fit(large)(large)), large, atol=1e-5, rtol=0)


def test_a_record_of_other_images_is_refused(photographs):
    model = preprocessing(["contrast"])
    y, record = model(photographs)
    with pytest.raises(ValueError, match="does not belong"):
        model.inverse(y[:1], record)
    with pytest.raises(ValueError, match="does not belong"):
        model.inverse(y[..., 1:], record)
    with pytest.raises(ValueError, match="0 steps"):
        model.inverse(y, [])
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        model.inverse(y[:, :1], record)
    with pytest.raises(ValueError, match="0 images"):
        model.fit(photographs[:0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("color", "hsv"),
        ("steps", ["sharpen"]),
        ("steps", ["mean", "mean"]),
        ("contrast_size", 12),
        ("contrast_size", 1),
        ("contrast_sigma", 0.0),
        ("contrast_sigma", float("nan")),
        ("whitening_size", 4),
        ("whitening_floor", 0.0),
    ],
)
def test_settings_name_the_key_that_is_wrong(key, value):
    with pytest.raises(ValueError, match=f"preprocessing.{key}="):
        PreprocessingSettings(**{key: value})
