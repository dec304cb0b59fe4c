"""Denoising and inpainting, against closed forms, dense solves and simple baselines."""

import math
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data, restoration, transform
from torch.nn import functional
from torch.testing import assert_close

from deconvnet.applications.restoration import restorer as applied
from deconvnet.applications.restoration.masks import make_mask
from deconvnet.applications.restoration.noise import estimate_noise
from deconvnet.applications.restoration.restorer import PSI, SECOND_PASS, Restorer
from deconvnet.cli.image_files import read_images
from deconvnet.cli.restore import FIT_IMAGES, fit_restorer, side_by_side
from deconvnet.dictionary import learn_filters
from deconvnet.filters.constraint import normalize
from deconvnet.filters.update import LearningSettings
from deconvnet.images.highpass import tikhonov_lowpass
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.network.layer import LayerSettings
from deconvnet.network.metrics import psnr, snr
from deconvnet.network.network import DeconvNet, load
from deconvnet.operators.convolution import deconvolve
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.prior import shrink
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.sparse_coding.solve import sparse_code
from deconvnet.sparse_coding.whole_image import MAX_RAISE
from deconvnet.storage.checkpoint_files import save_checkpoint

SIGMA = 25 / 255
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(filters, *, color="grey", above=(), **layer):
    """A network of one layer with these filters, and of random ones above."""
    K, _, size, _ = filters.shape
    first = LayerSettings(K, size, **layer)
    net = DeconvNet([first, *above], PreprocessingSettings(color, []))
    net.layer(1).filters.copy_(filters)
    return net


def photograph(name):
    """Grey (H, W), float32 in [0, 1], of a half or a third of its size."""
    image = getattr(data, name)()
    image = image.mean(2) / 255 if image.ndim == 3 else image / 255
    factor = 3 if min(image.shape) > 450 else 2
    return torch.from_numpy(transform.downscale_local_mean(image, (factor, factor))).float()


@pytest.fixture(scope="module")
def learned():
    """Filters from crops of two photographs, and a restorer that was fitted to them."""
    crops = []
    for name in ("coffee", "chelsea"):
        image = photograph(name)
        crops += [image[i : i + 64, j : j + 64] for i in (0, 60) for j in (0, 64, 128)]
    crops = torch.stack([crop for crop in crops if crop.shape == (64, 64)])[:, None]
    high = crops - tikhonov_lowpass(crops, PSI)
    learning = LearningSettings(epochs=5, batch_size=4)
    filters = learn_filters(high, 48, filter_size=9, lam=10.0, learning=learning).filters
    return Restorer(network(filters)).fit(crops)


@pytest.fixture(scope="module")
def noisy():
    """A photograph that was not trained on, clean and noisy."""
    clean = photograph("astronaut")[None, None]
    return clean, clean + SIGMA * rand(*clean.shape)


# The low frequencies.


def gradients(H, W):
    """The dense matrix of differences of neighbouring pixels, (.., H*W)."""
    down = torch.kron(torch.diff(torch.eye(H), dim=0), torch.eye(W))
    right = torch.kron(torch.eye(H), torch.diff(torch.eye(W), dim=0))
    return torch.cat([down, right]).double()


@pytest.mark.parametrize("shape", [(5, 7), (6, 4), (1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_low_frequencies_are_those_of_a_dense_solve(shape, masked):
    y = rand(2, 2, *shape).double()
    mask = (rand(2, 1, *shape, seed=1) > -0.5).double() if masked else None
    found = tikhonov_lowpass(y, 3.0, mask)
    D = gradients(*shape)
    for n in range(2):
        M = torch.diag(torch.ones(math.prod(shape)) if mask is None else mask[n].flatten()).double()
        expected = torch.linalg.solve(M + 3 * D.T @ D, M @ y[n].flatten(1).mT).mT
        assert_close(found[n].flatten(1), expected, rtol=1e-3 if masked else 1e-9, atol=1e-4)


def test_masked_pixels_do_not_affect_the_low_frequencies():
    y, mask = rand(1, 1, 12, 9), torch.ones(1, 1, 12, 9)
    mask[..., 3:6, 2:7] = 0
    hidden = torch.where(mask > 0, y, torch.full_like(y, math.nan))
    assert_close(tikhonov_lowpass(hidden, 2.0, mask), tikhonov_lowpass(mask * y, 2.0, mask))


# Denoising.


def test_with_one_filter_of_one_pixel_denoising_thresholds_the_high_frequencies():
    restorer = Restorer(network(torch.ones(1, 1, 1, 1)), strength=2.0)
    image, sigma = rand(2, 1, 9, 8), 0.3
    (found,) = restorer.denoise(image, sigma)

    def shrunk(low, pilot, level):
        fit = pilot.abs().clamp(min=level / MAX_RAISE)
        return low + shrink(image - low, fit / level**2)

    low = tikhonov_lowpass(image, PSI)
    rough = shrunk(low, image - low, 2 * sigma)
    share, own = SECOND_PASS.threshold, SECOND_PASS.noisy_weight
    low = tikhonov_lowpass(rough, PSI)
    pilot = own * (image - low) + (1 - own) * (rough - low)
    assert_close(found, shrunk(low, pilot, 2 * share * sigma), rtol=0, atol=1e-5)
    # Strong pixels are shrunk less, weak ones vanish.
    assert (found - image)[(image - low).abs() > 1.2].abs().max() < 0.3
    quiet = pilot.abs() < 0.2
    assert quiet.any()
    assert_close(found[quiet], low[quiet], rtol=0, atol=1e-5)


def test_cycle_spinning_averages_codes_that_are_zero_off_each_lattice(monkeypatch):
    monkeypatch.setattr(applied, "TOLERANCE", 1e-6)
    monkeypatch.setattr(applied, "ITERATIONS", 500)
    filters = rand(3, 1, 4, 4, seed=8)
    restorer = Restorer(network(filters))
    b, estimate = 4 * rand(1, 1, 10, 9), 4 * rand(1, 1, 10, 9, seed=1)
    share, own = SECOND_PASS.threshold, SECOND_PASS.noisy_weight
    assert SECOND_PASS.stride == 2
    level, gain = share * restorer.strength, filters.flatten(1).norm(dim=1).view(-1, 1, 1)
    expected = torch.zeros_like(b)
    for i in (0, 1):
        for j in (0, 1):
            # To even numbers of rows and columns that hold the image under every shift.
            margin = (j, 1 - j, i, 2 - i)
            image, pilot = (
                functional.pad(each, margin, mode="replicate")
                for each in (b, own * b + (1 - own) * estimate)
            )
            c = Deconvolution(filters).adjoint(pilot).abs() / gain
            weights = gain / (c / level).clamp(min=1 / MAX_RAISE)
            off = torch.ones_like(weights, dtype=torch.bool)
            off[..., 1::2, 1::2] = False
            weights = torch.where(off, 1e6, weights)
            settings = SolverSettings("fista", iterations=3000, tolerance=1e-7)
            code = sparse_code(image, filters, lam=1 / level, weights=weights, settings=settings)
            painted = image - code.residual
            expected += painted[..., i : i + 10, j : j + 9] / 4
    found = restorer._cycle_spin(b, estimate, SECOND_PASS)
    assert expected.norm() > 0.2 * b.norm()
    assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_the_threshold_of_a_map_grows_with_the_norm_of_its_filter():
    image = rand(1, 1, 9, 8)
    one, three = (Restorer(network(torch.full((1, 1, 1, 1), c))) for c in (1.0, 3.0))
    assert_close(one.denoise(image, 0.2)[0], three.denoise(image, 0.2)[0], rtol=0, atol=1e-5)


def test_learned_filters_denoise_better_than_total_variation(learned, noisy):
    clean, image = (each[..., :128, :128] for each in noisy)
    (found,) = learned.denoise(image, SIGMA)
    flat = image[0, 0].numpy()
    by_tv = max(
        float(psnr(clean, torch.from_numpy(each)[None, None]))
        for each in (restoration.denoise_tv_chambolle(flat, weight=w) for w in (0.06, 0.1, 0.14))
    )
    reached = float(psnr(clean, found))
    assert reached > by_tv + 0.2
    assert reached > float(psnr(clean, image)) + 5


def test_fitting_gives_maps_different_weights(learned):
    assert learned.weights.min() < 0.9 < 1.1 < learned.weights.max()


def test_fitting_to_clean_images_improves_denoising():
    # Images synthesised from the first of eight filters alone.
    filters = normalize(rand(8, 1, 7, 7) - rand(8, 1, 7, 7).mean((2, 3), keepdim=True))
    strokes = rand(6, 1, 54, 54, seed=1) * (rand(6, 1, 54, 54, seed=2) > 2.2)
    clean = 0.5 + 0.5 * deconvolve(strokes, filters[:1])
    net = network(filters)
    image = clean[4:] + SIGMA * rand(2, 1, 48, 48, seed=3)
    fitted, unfitted = Restorer(net).fit(clean[:4]), Restorer(net)
    assert fitted.weights.argmin() == 0
    errors = [psnr(clean[4:], each.denoise(image, SIGMA)[0]) for each in (fitted, unfitted)]
    assert (errors[0] > errors[1]).all()
    assert (errors[0] - errors[1]).mean() > 0.1


def test_each_image_is_denoised_by_its_own_noise_as_if_it_were_alone(learned, noisy):
    clean, _ = noisy
    sigmas = torch.tensor([0.05, 0.2])
    images = clean[..., :60, :50] + sigmas.view(2, 1, 1, 1) * rand(2, 1, 60, 50)
    (both,) = learned.denoise(images, sigmas)
    for n in range(2):
        (alone,) = learned.denoise(images[n : n + 1], float(sigmas[n]))
        assert_close(both[n : n + 1], alone, rtol=0, atol=2e-4)


def test_a_grey_network_denoises_the_planes_of_a_colour_image_one_by_one(learned):
    image = 0.5 + 0.1 * rand(2, 3, 30, 31)
    (found,) = learned.denoise(image, 0.1)
    for c in range(3):
        (plane,) = learned.denoise(image[:, c : c + 1], 0.1)
        assert_close(found[:, c : c + 1], plane, rtol=0, atol=2e-4)


def test_a_colour_network_treats_a_grey_image_as_its_grey_filters_would(learned):
    filters = learned.filters.expand(-1, 3, -1, -1) / 3**0.5
    colour = Restorer(network(filters, color="rgb"))
    grey = Restorer(learned.net)
    image = 0.5 + 0.1 * rand(1, 1, 40, 41)
    assert_close(colour.denoise(image, 0.1)[0], grey.denoise(image, 0.1)[0], rtol=0, atol=1e-3)


def test_upper_layers_that_reconstruct_the_maps_give_the_image_of_layer_one(learned, noisy):
    image = noisy[1][..., :40, :40]
    # Filters of one pixel that copy every map.
    K = 12
    above = LayerSettings(K, 1, lam=1e4, solver=SolverSettings(iterations=100, tolerance=1e-6))
    net = network(learned.filters[:K], above=[above])
    net.layer(2).filters.copy_(torch.eye(K)[..., None, None])
    net.layer(2).scale.fill_(0.3)
    seen = torch.ones(1, 1, 40, 40)
    first, second = Restorer(net).inpaint(image, seen, SIGMA, depth=2, keep_observed=False)
    assert_close(second, first, rtol=0, atol=2e-3)


def with_a_layer_above(filters, image, *, pool=(1, 2, 2), pooling="after", **settings):
    """A network whose layer 2 has patches of the maps of an image as filters."""
    net = network(filters, above=[LayerSettings(20, 3, **settings)], pool=pool, pooling=pooling)
    codes = net.infer(image.clamp(0, 1), depth=1)
    net.layer(2).fit_scale(codes.layers[-1].pooled)
    net.layer(2).initialize(net.layer_input(codes, 2), torch.Generator().manual_seed(0))
    return net


@pytest.mark.parametrize("pooling", ["after", "in_loop"])
@pytest.mark.parametrize("target", ["maps", "image"])
def test_layers_with_pooling_and_other_targets_restore_too(learned, noisy, target, pooling):
    _, image = (each[..., :48, :50] for each in noisy)
    solver = SolverSettings("fista", iterations=40)
    settings = dict(target=target, lam=1e3, solver=solver)
    net = with_a_layer_above(learned.filters, image, pooling=pooling, **settings)
    restorer = Restorer(net)
    b = (image - tikhonov_lowpass(image, PSI)) / SIGMA
    found = restorer._infer(b, pilot=b)
    (above,), below = restorer._infer_upper(found, b, 2), b - found.residual
    # It reconstructs a good part of the image of layer 1.
    assert float((above * below).sum() / (above.norm() * below.norm())) > 0.5


def test_two_layers_denoise_at_least_as_well_as_one(learned, noisy):
    clean, image = (each[..., :100, 60:160] for each in noisy)
    net = with_a_layer_above(learned.filters, clean, lam=2.0, solver=SolverSettings("coordinate"))
    restorer = Restorer(net)
    restorer.weights = learned.weights
    first, second = restorer.denoise(image, SIGMA, depth=2)
    assert_close(first, learned.denoise(image, SIGMA)[0], rtol=0, atol=1e-5)
    assert float(psnr(clean, second)) > float(psnr(clean, first)) - 0.02
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_the_estimated_noise_is_within_a_tenth_and_what_denoising_uses(learned, noisy, sigma):
    clean, _ = noisy
    image = clean + sigma * rand(*clean.shape, seed=3)
    assert_close(estimate_noise(image), torch.tensor([sigma]), rtol=0.1, atol=0)
    image = image[..., :50, :50]
    by_itself = learned.denoise(image)[0]
    assert_close(by_itself, learned.denoise(image, estimate_noise(image))[0], rtol=0, atol=0)


# Missing pixels.


def test_masked_pixels_have_no_effect_and_observed_ones_stay(learned, noisy):
    clean, _ = noisy
    clean = clean[..., :40, :44]
    mask = (rand(1, 1, 40, 44, seed=5) > 0).float()
    wild = torch.where(mask > 0, clean, torch.full_like(clean, math.nan))
    (found,) = learned.inpaint(wild, mask)
    (same,) = learned.inpaint(torch.where(mask > 0, clean, 1e3 * torch.ones(())), mask)
    assert_close(found, same, rtol=0, atol=0)
    assert torch.equal(found[mask > 0], clean[mask > 0])
    (smooth,) = learned.inpaint(wild, mask, keep_observed=False)
    assert not torch.equal(smooth[mask > 0], clean[mask > 0])


def test_half_of_the_pixels_are_inpainted_better_than_by_biharmonic_interpolation(learned, noisy):
    clean = noisy[0][..., :96, :96]
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 1, *clean.shape[2:], generator=generator) < 0.5).float()
    (found,) = learned.inpaint(clean, mask, 0.01)
    hidden = (mask == 0)[0, 0].numpy()
    smooth = restoration.inpaint_biharmonic((mask * clean)[0, 0].numpy(), hidden)
    smooth = torch.from_numpy(smooth)[None, None].float()
    assert float(psnr(clean, found)) > float(psnr(clean, smooth)) + 0.2


def test_inpainting_without_missing_pixels_removes_noise(learned, noisy):
    clean, image = (each[..., :96, :96] for each in noisy)
    whole = torch.ones(1, 1, *image.shape[2:])
    (found,) = learned.inpaint(image, whole, SIGMA, keep_observed=False)
    assert float(psnr(clean, found)) > float(psnr(clean, image)) + 3
    assert torch.equal(learned.inpaint(image, whole, SIGMA)[0], image)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: Restorer(r.net, strength=0), "strength=0.0: must be positive"),
        (lambda r: Restorer(r.net, psi=math.nan), "psi=nan: must be positive"),
        (lambda r: r.denoise(torch.rand(1, 1, 20, 20), 0.0), "sigma=0.0: must be positive"),
        (lambda r: r.denoise(torch.rand(1, 1, 20, 20), math.nan), "sigma=nan: must be positive"),
        (lambda r: r.denoise(torch.rand(1, 1, 5, 20), 0.1), "5x20 are smaller than the 9x9"),
        (lambda r: r.denoise(torch.rand(1, 2, 20, 20), 0.1), r"\(N, 1 or 3, H, W\), got \(1, 2"),
        (lambda r: r.denoise(torch.rand(20, 20), 0.1), r"\(N, 1 or 3, H, W\), got \(20, 20"),
        (lambda r: r.denoise(torch.full((1, 1, 20, 20), math.inf), 0.1), "must be finite"),
        (lambda r: r.denoise(torch.rand(1, 1, 20, 20), 0.1, depth=2), "layer=2: this network has"),
        (lambda r: r.denoise(torch.ones(1, 1, 20, 20).byte(), 0.1), "must be floating"),
        (lambda r: r.inpaint(torch.rand(1, 1, 20, 20), torch.ones(20, 20)), "mask of shape"),
        (lambda r: r.inpaint(torch.rand(1, 1, 20, 20), torch.full((1, 1, 20, 20), 0.5)), "0 or 1"),
        (
            lambda r: r.inpaint(torch.rand(1, 1, 20, 20), torch.zeros(1, 1, 20, 20)),
            "no observed pixel",
        ),
        (lambda r: r.fit([]), "there are none"),
        (lambda r: r.fit(torch.zeros(1, 1, 20, 20)), "nothing in them"),
    ],
)
def test_invalid_input_is_refused_in_one_line(learned, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(learned)
    assert "\n" not in str(error.value)


def test_a_network_for_other_planes_is_refused():
    with pytest.raises(ValueError, match="color=ycbcr: use a network for rgb or grey"):
        Restorer(DeconvNet([LayerSettings(4, 5)], PreprocessingSettings("ycbcr")))


# The commands.


@pytest.fixture(scope="module")
def run_folder(learned, tmp_path_factory):
    """A folder with a network file and two images, one of them grey."""
    folder = tmp_path_factory.mktemp("restore")
    above = LayerSettings(8, 3, solver=SolverSettings("fista", iterations=5))
    network(learned.filters, above=[above]).save(folder / "net.safetensors")
    colour = transform.resize(data.chelsea(), (40, 60))
    Image.fromarray((255 * colour).astype(np.uint8)).save(folder / "cat.png")
    grey = (255 * photograph("camera")[:44, :50]).byte().numpy()
    Image.fromarray(grey).save(folder / "camera.png")
    Image.fromarray((np.arange(44 * 50).reshape(44, 50) % 5 > 0).astype(np.uint8) * 255).save(
        folder / "holes.png"
    )
    return folder


def test_the_command_denoises_and_prints_the_quality(script, run_folder):
    result = script(
        run_folder,
        "denoise.py",
        *("run=net.safetensors", "images=[cat.png,camera.png]", "noise=25", "layer=1"),
        "clean=camera.png",
    )
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if "dB" in line]
    assert len(lines) == 2 and "sigma 25.0" in lines[0]
    for line in lines:
        given, restored = (
            float(part.split()[0]) for part in (line.split(k)[1] for k in ("given", "layer 1"))
        )
        assert 19 < given < 22 and restored > given + 3
    shown = Image.open(run_folder / "denoised/cat-layer1.png")
    assert shown.size == (60, 40) and shown.mode == "RGB"
    assert Image.open(run_folder / "denoised/camera-layer1.png").mode == "L"
    assert Image.open(run_folder / "denoised/cat-compared.png").width > 3 * 60


def test_the_command_estimates_noise_where_none_is_given(script, run_folder):
    noisy = photograph("camera")[:64, :70] + SIGMA * rand(64, 70)
    path = run_folder / "noisy.png"
    Image.fromarray((255 * noisy.clamp(0, 1)).byte().numpy()).save(path)
    result = script(run_folder, "denoise.py", "run=net.safetensors", f"images={path}", "output=o")
    assert result.code == 0, result.err
    assert "dB" not in result.out
    assert abs(float(result.out.split("sigma")[1].split()[0]) - 25) < 4
    assert (run_folder / "o/noisy-layer2.png").is_file()


@pytest.mark.parametrize("missing", ["0.5", "box", "half", "holes.png"])
def test_the_command_inpaints_missing_pixels(script, run_folder, missing):
    result = script(
        run_folder,
        "inpaint.py",
        *("run=net.safetensors", "images=camera.png", f"missing={missing}", "layer=1"),
    )
    assert result.code == 0, result.err
    share = {"0.5": 50, "box": 6, "half": 50, "holes.png": 20}[missing]
    assert abs(float(result.out.split("%")[0].split()[-1]) - share) < 3
    assert ("dB" in result.out) == (missing != "holes.png")
    assert (run_folder / "inpainted/camera-layer1.png").is_file()


def test_no_input_file_is_overwritten(script, run_folder, tmp_path):
    """The result is saved next to its image under its own name; an input is never overwritten."""
    for name in ("cat.png", "holes.png", "camera.png"):
        shutil.copy(run_folder / name, tmp_path / name)
    run = f"run={run_folder / 'net.safetensors'}"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command in (["denoise.py", "sigma=10"], ["inpaint.py", "missing=0.3"]):
        result = script(tmp_path, *command, run, "images=cat.png", "output=.", "layer=1")
        assert result.code == 0, result.err
        assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    for name in ("cat-layer1.png", "cat-compared.png"):
        (tmp_path / name).unlink()
    (tmp_path / "out").mkdir()
    # An input with the name of a result, a link to one, and the mask file.
    shutil.copy(tmp_path / "cat.png", tmp_path / "cat-layer1.png")
    (tmp_path / "out/camera-compared.png").symlink_to(tmp_path / "camera.png")
    os.link(tmp_path / "holes.png", tmp_path / "out/holes-layer1.png")
    for command in (
        ["denoise.py", "images=[cat.png,cat-layer1.png]", "output=."],
        ["denoise.py", "images=cat.png", "clean=cat-layer1.png", "output=."],
        ["denoise.py", "images=camera.png", "output=out"],
        ["inpaint.py", "images=holes.png", "missing=holes.png", "output=out"],
        ["reconstruct.py", "images=[cat.png,cat-layer1.png]", "output=."],
    ):
        result = script(tmp_path, command[0], run, "layer=1", *command[1:])
        assert result.code == 1 and len(result.err.splitlines()) == 1, result
        assert "overwritten" in result.err and result.out == ""
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("denoise.py", ["images=camera.png"], "run has no value"),
        ("denoise.py", ["run=no", "images=camera.png"], "no: no such run folder"),
        ("denoise.py", ["run=net.safetensors", "images=no.png"], "cannot read no.png"),
        ("denoise.py", ["run=net.safetensors", "images=camera.png", "sigma=0.1"], "grey levels"),
        ("denoise.py", ["run=net.safetensors", "images=camera.png", "layer=3"], "layers 1 to 2"),
        ("denoise.py", ["run=net.safetensors", "images=camera.png", "strength=-1"], "strength=-1"),
        ("denoise.py", ["run=net.safetensors", "images=camera.png", "+sigmas=3"], "did you mean"),
        ("inpaint.py", ["run=net.safetensors", "images=camera.png"], "missing has no value"),
        (
            "inpaint.py",
            ["run=net.safetensors", "images=camera.png", "missing=no.png"],
            "box, or half",
        ),
        (
            "inpaint.py",
            ["run=net.safetensors", "images=cat.png", "missing=holes.png"],
            "44x50 pixels",
        ),
        ("inpaint.py", ["run=net.safetensors", "images=cat.png", "missing=1.5"], "between 0 and 1"),
    ],
)
def test_a_wrong_command_says_what_would_be_right_in_one_line(
    script, run_folder, name, arguments, message
):
    result = script(run_folder, name, *arguments)
    assert result.code == 1
    lines = (result.out + result.err).strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("denoise.py", ["images=camera.png", "noise=25"]),
        ("inpaint.py", ["images=camera.png", "missing=0.5"]),
        ("reconstruct.py", ["images=camera.png", "layer=1"]),
    ],
)
def test_a_command_that_is_interrupted_says_so_in_one_line(
    run_folder, monkeypatch, capfd, name, arguments
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for made in (
        "deconvnet.network.tiling.reconstruct",
        "deconvnet.applications.restoration.restorer.solve_whole_image",
    ):
        monkeypatch.setattr(made, interrupt)
    monkeypatch.chdir(run_folder)
    # The command sets it, which other tests must not see.
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("sys.argv", [name, "run=net.safetensors", "output=interrupted", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    assert end.value.code == 130
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("stopped; ") and len(err.splitlines()) == 1


def test_a_run_whose_images_are_gone_is_used_unfitted_and_downloads_nothing(
    run_folder, tmp_path, monkeypatch, capsys
):
    """It prints what it would read, since the run may come from a stranger."""
    net = load(run_folder / "net.safetensors")
    tensors, settings = net.to_parts()

    def run(**data):
        folder = tmp_path / data["name"]
        data = {"size": 40, **data}
        saved = {"network": {"tensors": tensors, "settings": settings}, "settings": {"data": data}}
        save_checkpoint(folder / "checkpoints", 1, saved)
        restorer = Restorer(net)
        fit_restorer(restorer, folder, [])
        return restorer.weights, capsys.readouterr().out

    gone = str(tmp_path / "gone")
    weights, said = run(name="a", source="folder", path=gone)
    assert (weights == 1).all() and gone in said.splitlines()[0] and "not fitted" in said
    weights, said = run(name="b", source="torchvision", dataset="CIFAR10", path=gone, download=True)
    assert (weights == 1).all() and "torchvision" in said.splitlines()[0] and "not fitted" in said
    assert not (tmp_path / "gone").exists()
    shutil.copytree(run_folder, tmp_path / "there", ignore=lambda *_: ["net.safetensors", "o"])
    weights, said = run(name="c", source="folder", path=str(tmp_path / "there"), size=40)
    assert (weights != 1).any() and len(said.splitlines()) == 1
    # Of a thousand images a few are read.
    read = []
    monkeypatch.setattr("deconvnet.cli.images_of_run.stream_images", lambda _: Stream(read, 1000))
    run(name="d", source="folder", path=gone)
    assert len(read) == FIT_IMAGES


class Stream:
    """Many images that record which of them are read."""

    def __init__(self, read, count):
        self.numbers, self.count = read, count

    def __len__(self):
        return self.count

    def read(self, indices):
        self.numbers += indices.tolist()
        return 0.5 + 0.1 * rand(len(indices), 3, 40, 40), None


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("denoise.py", ["images=[camera.png,tiny.png]", "noise=9"], "tiny.png: images of 1x1"),
        ("denoise.py", ["images=[camera.png,text.png]", "noise=9"], "cannot read text.png"),
        ("denoise.py", ["images=camera.png", "noise=9", "memory=1e-5"], "memory=1e-05 allows less"),
        ("denoise.py", ["images=camera.png", "noise=9", "memory=0"], "memory=0.0: is in GiB"),
        ("denoise.py", ["images=camera.png", "output=net.safetensors"], "net.safetensors"),
        ("inpaint.py", ["images=[camera.png,cat.png]", "missing=holes.png"], "cat.png has 40x60"),
        ("inpaint.py", ["images=camera.png", "missing=black.png"], "no pixel is observed"),
        ("reconstruct.py", ["images=[camera.png,tiny.png]"], "tiny.png: images of 1x1"),
        ("reconstruct.py", ["images=camera.png", "memory=1e-5"], "memory=1e-05 allows less"),
        ("reconstruct.py", ["images=camera.png", "memory=1e-5", "parts=true"], "parts=true"),
    ],
)
def test_errors_of_all_images_are_raised_before_the_first_is_restored(
    script, run_folder, name, arguments, message
):
    Image.new("L", (1, 1)).save(run_folder / "tiny.png")
    Image.new("L", (50, 44)).save(run_folder / "black.png")
    (run_folder / "text.png").write_text("no image")
    arguments = ["output=early", *arguments] if "output" not in str(arguments) else arguments
    result = script(run_folder, name, "run=net.safetensors", *arguments)
    assert result.code == 1 and result.out == "", result
    assert message in result.err and len(result.err.splitlines()) == 1
    assert not any((run_folder / "early").glob("*.png"))


def test_an_image_without_noise_does_not_stop_the_other_images(script, run_folder):
    Image.new("L", (50, 40), 90).save(run_folder / "flat.png")
    result = script(
        *(run_folder, "denoise.py", "run=net.safetensors", "images=flat.png"),
        *("layer=1", "output=flat", "strength=1"),
    )
    assert result.code == 0 and "sigma 0.5" in result.out, result
    assert (np.asarray(Image.open(run_folder / "flat/flat-layer1.png")) == 90).all()


def test_no_noise_can_be_estimated_from_a_constant_image(learned):
    with pytest.raises(ValueError, match="image 1 has no noise"):
        learned.denoise(torch.cat([rand(1, 1, 40, 40), torch.ones(1, 1, 40, 40)]))


def test_equal_images_are_infinitely_near():
    image = torch.full((2, 1, 4, 4), 0.3)
    assert (psnr(image, image) == math.inf).all()
    assert snr(image, image) == math.inf and snr(image, image + 0.1) == -math.inf


@pytest.mark.parametrize("depth", [1, 2])
def test_a_constant_image_stays_constant(learned, depth):
    """Also if the maps of layer 1, by whose size layer 2 is scaled, are all zero."""
    net = with_a_layer_above(learned.filters, rand(1, 1, 48, 50).sigmoid(), target="image")
    flat = torch.full((1, 1, 48, 50), 0.4)
    for found in Restorer(net).denoise(flat, 0.1, depth=depth):
        assert_close(found, flat, rtol=0, atol=1e-4)


def test_grey_files_are_grey_and_a_mask_is_as_large_as_its_image(run_folder):
    files = [str(run_folder / name) for name in ("cat.png", "camera.png")]
    (_, cat), (_, camera) = read_images(files, torch.device("cpu"))
    assert cat.shape == (1, 3, 40, 60) and camera.shape == (1, 1, 44, 50)
    mask, is_drawn = make_mask("box", (44, 50), torch.Generator())
    assert is_drawn and mask.shape == (1, 1, 44, 50)
    page = side_by_side([("a\nb", cat), ("c", cat)])
    assert page.shape[0] == 3 and page.shape[2] == 2 * 60 + 4
