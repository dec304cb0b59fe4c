"""Tiles of large images, without maps in memory: equal to the whole image up to a stated error."""

import math

import pytest
import torch
from torch.testing import assert_close

from deconvnet.applications.restoration import restorer as applied
from deconvnet.applications.restoration.restorer import Restorer
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.network import tiling
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.network.tiling import GIB, reconstruct, tiles
from deconvnet.operators.convolution import deconvolve
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.sparse_coding.solve import solve
from deconvnet.sparse_coding.whole_image import Thresholds, solve_whole_image

# So close to the minimum that the remaining difference is due to the tiles.
EXACT = SolverSettings("coordinate", iterations=400, gap=1e-5)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(*layers, color="grey", steps=("contrast",)):
    net = DeconvNet(list(layers), PreprocessingSettings(color, list(steps)))
    net.preprocessing.scale.fill_(0.5)
    return net


# Tiles.


@pytest.mark.parametrize("size", [(40, 200), (97, 64), (300, 151), (20, 20)])
@pytest.mark.parametrize("step", [1, 2, 6])
def test_tiles_cover_every_pixel_once_and_begin_where_windows_do(size, step):
    cut = tiles(size, 64, 10, step)
    total = torch.zeros(size)
    for tile in cut:
        assert tile.rows.start % step == 0 and tile.columns.start % step == 0
        assert tile.rows.stop - tile.rows.start <= 64 and tile.columns.stop <= size[1]
        assert tile.weights.shape == total[tile.rows, tile.columns].shape
        total[tile.rows, tile.columns] += tile.weights
    assert_close(total, torch.ones(size))
    assert len(cut) > 1 or max(size) <= 64


def test_where_two_tiles_meet_one_goes_over_into_the_other():
    left, right = tiles((20, 90), 60, 12, 1)[:2]
    assert left.columns.stop - right.columns.start == 24
    # Next to a border that is none of the image nothing counts, and no step is large.
    assert (left.column_weights[-6:] == 0).all() and (right.column_weights[:6] == 0).all()
    assert (
        left.column_weights.diff().abs().max() < 0.1
        and right.column_weights.diff().abs().max() < 0.1
    )


@pytest.mark.parametrize(("layers", "boundary"), [(1, "zero"), (2, "valid"), (2, "reflect")])
def test_an_image_in_tiles_is_the_image_at_once(textures, monkeypatch, layers, boundary):
    """Layer 1 to rounding; layer 2, whose solver is so near its minimum, to 1% of a grey level."""
    each = dict(lam=3.0, boundary=boundary, solver=EXACT)
    above = LayerSettings(3, 3, **each)
    net = network(LayerSettings(4, 5, pool=[1, 2, 2], **each), *[above] * (layers - 1))
    image = textures(1, 1, 190, 24)
    codes = net.infer(image)
    whole = reconstruct(net, image)
    assert whole.tiles == 1
    assert torch.equal(whole.pixels, net.reconstruct(codes))
    assert whole.density == codes.layers[-1].density
    assert whole.snr == net.snr(codes, net.depth)
    monkeypatch.setattr(tiling, "fits", lambda *_: False)
    if layers > 1:
        cut = tiles((190, 24), 3 * 48 + 2, 48, 2)
        assert len(cut) > 1
        monkeypatch.setattr(tiling, "plan", lambda *_, **__: cut)
    heard = []
    found = reconstruct(net, image, progress=lambda *now: heard.append(now))
    count = len(cut) if layers > 1 else 1
    assert found.tiles == count and heard == [(n + 1, count) for n in range(count)]
    assert 255 * (found.pixels - whole.pixels).abs().max() < (1e-3 if layers == 1 else 1e-2)
    assert abs(found.density - whole.density) < 0.02 * whole.density
    assert_close(found.y, whole.y)


@pytest.mark.parametrize("solver", [SolverSettings(), SolverSettings("fista")])
def test_there_is_no_seam_where_tiles_meet(textures, monkeypatch, solver):
    """Errors at the borders of tiles are no larger than what the solver leaves everywhere."""
    net = network(
        LayerSettings(4, 5, lam=3.0, pool=[1, 2, 2], solver=solver),
        LayerSettings(3, 3, lam=3.0, solver=solver),
    )
    image = textures(1, 1, 190, 24)
    monkeypatch.setattr(tiling, "fits", lambda *_: False)
    one = reconstruct(net, image).estimate
    cut = tiles((190, 24), 3 * 48 + 2, 48, 2)
    monkeypatch.setattr(tiling, "plan", lambda *_, **__: cut)
    several = reconstruct(net, image).estimate
    assert (several - one).norm() < 5e-3 * one.norm()


def test_tiles_are_as_small_as_the_memory_asks_for():
    net = network(LayerSettings(24, 7, pool=[1, 2, 2]), LayerSettings(16, 5))
    size = (2000, 3000)
    assert tiling.fits(net, (200, 300), 2, 4.0) and not tiling.fits(net, size, 2, 4.0)
    counts = []
    for memory in (100.0, 4.0, 3.0, 2.0):
        cut = tiling.plan(net, size, 2, memory)
        area = max((t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in cut)
        planes = tiling.PLANE_BYTES * 3 * math.prod(size)
        assert planes + area * tiling.bytes_per_pixel(list(net.layers)) <= memory * GIB
        counts.append(len(cut))
    assert counts[0] == 1 and counts == sorted(counts) and counts[1] > 1


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (0.0, "memory=0.0: is in GiB"),
        (math.nan, "memory=nan"),
        (0.1, "an image of 2000x3000 pixels needs .* GiB, memory=0.1 allows less: give memory="),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(memory, message):
    net = network(LayerSettings(24, 7))
    with pytest.raises(ValueError, match=message):
        tiling.plan(net, (2000, 3000), 1, memory)


def test_periodic_images_are_not_tiled():
    net = network(LayerSettings(24, 7, boundary="circular"))
    assert len(tiling.plan(net, (200, 300), 1, 4.0)) == 1
    with pytest.raises(ValueError, match="layer1.boundary=circular: .* cannot be split"):
        tiling.plan(net, (2000, 3000), 1, 4.0)


def test_an_image_too_small_for_an_upper_layer_is_refused_before_any_work():
    net = network(LayerSettings(4, 5, pool=[1, 8, 8]), LayerSettings(4, 5))
    with pytest.raises(ValueError, match="pooled maps of layer 1 of 4x4 are smaller"):
        tiling.plan(net, (24, 24), 2, 4.0)


# Without maps.


def problem(group=1, seed=0, boundary="valid"):
    filters = rand(6, 2, 5, 4, seed=seed)
    b = 3 * rand(1, 2, 40, 33, seed=seed + 1)
    pilot = b + 0.1 * rand(1, 2, 40, 33, seed=seed + 2)
    gain = filters.flatten(1).norm(dim=1)
    base = gain * (0.5 + torch.rand(6, generator=torch.Generator().manual_seed(3)))
    return Deconvolution(filters, boundary), b, Thresholds(base, gain, group, pilot, 4.0)


@pytest.mark.parametrize("boundary", ["valid", "circular", "zero", "reflect"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_thresholds_made_when_they_are_looked_at_solve_the_problem_of_those_in_memory(
    boundary, group, masked, monkeypatch
):
    A, b, thresholds = problem(group, boundary=boundary)
    mask = (rand(1, 1, 40, 33, seed=9) > -0.6).float() if masked else None
    A = Deconvolution(A.f, boundary, mask)
    b = b if mask is None else mask * b
    weights = thresholds.per_coefficient(Deconvolution(A.f, boundary).adjoint(thresholds.pilot))
    settings = SolverSettings("coordinate", iterations=30, tolerance=1e-4)
    expected = solve(A, b, lam=0.3, prior=Prior(weights=weights, group=group), settings=settings)
    cached = 0 if group == 1 else 2**27
    monkeypatch.setattr("deconvnet.sparse_coding.whole_image.CACHE_BYTES", cached)
    found = solve_whole_image(A, b, thresholds, lam=0.3, iterations=30, tolerance=1e-4)
    assert found.iterations == expected.iterations > 3
    assert_close(found.maps(), expected.z, rtol=1e-4, atol=1e-5)
    assert_close(found.residual, expected.residual, rtol=1e-4, atol=1e-5)
    assert_close(found.objective, float(expected.objective), rtol=1e-5, atol=0)
    painted = deconvolve(found.maps(), A.f, boundary=boundary)
    assert_close(found.synthesis(), painted, rtol=0, atol=1e-4)
    assert_close(found.magnitudes(), found.maps().double().abs().sum((0, 2, 3)))
    part = found.maps(slice(3, 20), slice(7, 11))
    assert torch.equal(part, found.maps()[:, :, 3:20, 7:11])
    # From there it goes nowhere.
    again = solve_whole_image(A, b, thresholds, lam=0.3, iterations=30, tolerance=1e-4, start=found)
    assert again.iterations <= 1
    assert again.objective <= found.objective * (1 + 1e-6)


def test_denoising_takes_memory_for_pixels_and_not_for_maps(monkeypatch):
    """No array of maps is ever made: the largest is that of the pixels."""
    largest = 0
    zeros, empty = torch.Tensor.new_zeros, torch.Tensor.new_empty

    def watched(make):
        def made(self, *shape, **options):
            nonlocal largest
            result = make(self, *shape, **options)
            largest = max(largest, result.numel())
            return result

        return made

    monkeypatch.setattr(torch.Tensor, "new_zeros", watched(zeros))
    monkeypatch.setattr(torch.Tensor, "new_empty", watched(empty))
    monkeypatch.setattr("deconvnet.operators.convolution.STRIP", 2**12)
    monkeypatch.setattr("deconvnet.sparse_coding.whole_image.CACHE_BYTES", 0)
    net = network(LayerSettings(40, 5), steps=())
    image = 0.5 + 0.2 * rand(1, 1, 60, 70)
    restorer = Restorer(net)
    restorer.denoise(image, 0.1)
    restorer.inpaint(image, torch.ones(1, 1, 60, 70), 0.1)
    assert largest <= 2 * image.numel()


@pytest.mark.parametrize("pooling", ["after", "in_loop"])
def test_the_layers_above_restore_in_tiles_what_they_restore_at_once(monkeypatch, pooling):
    monkeypatch.setattr(applied, "ROUNDS", (2, 1))
    first = LayerSettings(6, 5, lam=3.0, pool=[1, 2, 2], pooling=pooling)
    net = network(first, LayerSettings(5, 3, lam=3.0, solver=EXACT), steps=())
    net.layer(2).scale.fill_(0.3)
    image = 0.5 + 0.3 * rand(1, 1, 190, 24)
    mask = (rand(1, 1, 190, 24, seed=1) > -0.5).float()
    restorer = Restorer(net)
    whole = restorer.inpaint(image, mask, 0.1, depth=2, keep_observed=False)
    cut = tiles((190, 24), 3 * 48 + 2, 48, 2)
    assert len(cut) > 1
    monkeypatch.setattr(tiling, "plan", lambda *_, **__: cut)
    heard = []
    parts = restorer.inpaint(
        image, mask, 0.1, depth=2, keep_observed=False, progress=lambda *now: heard.append(now)
    )
    assert torch.equal(parts[0], whole[0])
    assert (whole[1] - whole[0]).abs().max() > 1e-2
    assert_close(parts[1], whole[1], rtol=0, atol=1e-2 / 255)
    assert heard[-1][0] == heard[-1][1] and heard == sorted(heard)


def test_restoring_what_does_not_fit_is_refused_before_any_work(monkeypatch):
    net = network(LayerSettings(4, 5), steps=())
    monkeypatch.setattr(Restorer, "_infer", lambda *_, **__: pytest.fail("work was done"))
    image = torch.zeros(1, 1, 1, 1).expand(1, 1, 3000, 4000)
    with pytest.raises(ValueError, match="3000x4000 pixels needs .* memory=0.5 allows less"):
        Restorer(net).denoise(image, 0.1, memory=0.5)
    with pytest.raises(ValueError, match="memory=-1"):
        Restorer(net).inpaint(image, torch.ones_like(image), memory=-1)
