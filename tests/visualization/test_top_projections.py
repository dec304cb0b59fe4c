"""Projections of the strongest activations: tiles, their control, their grids and their files."""

import copy
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.visualization.drawing.canvas import (
    GAP,
    HAIRLINE,
    PAGE,
    PAPER,
    resize_tiles,
    shade_projections,
)
from deconvnet.visualization.gallery.page_text import IMAGES
from deconvnet.visualization.gallery.wording import border_sentences
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.projection.effective_field import EffectiveField
from deconvnet.visualization.projection.projection import (
    LayerInfo,
    ProjectionReport,
    UnevenOverlap,
)
from deconvnet.visualization.projection.projection_picture import BORDER
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search import projecting, projection_table, tile_codec
from deconvnet.visualization.search.checkerboard import averaged, averaged_period, checkerboard
from deconvnet.visualization.search.projecting import project_top_activations
from deconvnet.visualization.search.projection_grids import (
    MARK,
    TEXT,
    grid_caption,
    layer_grid,
    pixel_filters,
    projection_grid,
    sample_maps,
    tiles_to_show,
)
from deconvnet.visualization.search.randomization import shuffle_weights, shuffled_control
from deconvnet.visualization.search.top_activations import find_top_activations
from deconvnet.visualization.search.top_projections import (
    TopProjections,
    load_top_projections,
    refer_to_pictures,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def two_layers():
    """Fields of 3 and 8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()),
    )


class TwoSizes(nn.Module):
    """Maps of a 1x1 and of a 5x5 convolution, side by side, as in an Inception module."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 5, padding=2)
        self.both = nn.ReLU()

    def forward(self, x):
        return self.both(torch.cat([self.small(x), self.large(x)], 1))


@pytest.fixture(scope="module")
def trained(textures):
    """(projector, images, tops) of a small network that takes blue first, normalised."""
    normalization = Normalization(MEAN, STD, "bgr")
    projector = Projector(seeded(two_layers), normalization=normalization, batch=3)
    images = list(textures(7, 3, 12, 14))
    return projector, images, find_top_activations(projector, images, ["1", "4"], k=4)


@pytest.fixture(scope="module")
def learned(textures):
    """(network, images): two layers with pooling between, grey."""
    solver = SolverSettings(iterations=15)
    layers = [
        LayerSettings(4, 5, lam=5.0, pool=[2, 2, 2], solver=solver),
        LayerSettings(3, 3, lam=20.0, solver=solver),
    ]
    net = DeconvNet(layers, PreprocessingSettings(steps=["mean"], color="grey"), seed=0)
    images = textures(4, 3, 20, 24)
    net.preprocessing.fit(images)
    return net, list(images)


def project_fields(*arguments, **options):
    """Tiles of whole receptive fields."""
    return project_top_activations(*arguments, window="field", **options)


def shown(found):
    """The tiles of the first method, in units of the largest magnitude of each."""
    return found.tiles[found.methods[0]] / 127


def cut_out(image, top, left, h, w, fill):
    """A rectangle of an image (C, H, W), pixel by pixel."""
    C, H, W = image.shape
    part = torch.full((C, h, w), fill)
    for i in range(max(top, 0), min(top + h, H)):
        for j in range(max(left, 0), min(left + w, W)):
            part[:, i - top, j - left] = image[:, i, j]
    return part


# Layer 1: 3 pixels, from i - 1 on. Layer 4: 3 and 1 of the pooling and 2 * 2 more, from 2i - 3 on.
@pytest.mark.parametrize(("layer", "side", "stride", "offset"), [("1", 3, 1, -1), ("4", 8, 2, -3)])
def test_tiles_and_patches_are_projections_and_pixels_in_the_exact_field(
    trained, layer, side, stride, offset
):
    projector, images, tops = trained
    top = tops[layer]
    found = project_fields(projector, images, layer, top, maps=[3, 0])
    assert found.maps.tolist() == [3, 0] and found.layer == layer and found.scale == 1
    assert shown(found).shape == found.patches.shape == (2, 4, 3, side, side)
    reached_beyond = 0
    for row, m in enumerate([3, 0]):
        units = top.units(m)
        assert found.count(row) == len(units)
        assert list(map(tuple, found.units[row, : len(units)].tolist())) == units
        for place, (number, _, i, j) in enumerate(units):
            x = projector.prepare(images[number][None])
            alone = projector(x, layer, [(0, m, i, j)])
            # Blue first, in units of the standard deviations of blue, green and red.
            pixels = (alone.images[0] * torch.tensor(STD)[:, None, None]).flip(0)
            at = offset + stride * i, offset + stride * j
            tile = cut_out(pixels, *at, side, side, 0.0)
            assert_allclose(shown(found)[row, place], tile / tile.abs().max(), atol=5e-3)
            patch = cut_out(images[number], *at, side, side, 0.5)
            assert_allclose(found.patches[row, place] / 255, patch, atol=0.5 / 255 + 1e-6)
            box = [max(at[0], 0), max(at[1], 0), min(at[0] + side, 12), min(at[1] + side, 14)]
            assert found.boxes[row, place].tolist() == box
            window = [*at, at[0] + side, at[1] + side]
            assert found.windows[row, place].tolist() == window
            assert found.border[row, place] == (box != window)
            assert found.values[row, place] == pytest.approx(top.values[m, place])
            reached_beyond += at[0] < 0 or at[1] < 0
    assert reached_beyond, "no unit stands at the border"


def test_units_of_fewer_pixels_than_their_layer_keep_their_scale(textures, monkeypatch):
    projector = Projector(seeded(TwoSizes))
    images = list(textures(3, 3, 11, 12))
    top = find_top_activations(projector, images, ["both"], k=3, inside=True)["both"]
    whole = project_fields(projector, images, "both", top)
    assert shown(whole).shape[3:] == (5, 5)
    # Also where only small ones come together.
    monkeypatch.setattr(projecting, "CHUNK", 1)
    alone = project_fields(projector, images, "both", top)
    for found in (whole, alone):
        for m in range(3):
            for place in range(found.count(m)):
                number, _, i, j = found.units[m, place]
                assert found.boxes[m, place].tolist() == [i, j, i + 1, j + 1]
                tile = shown(found)[m, place].copy()
                assert np.abs(tile[:, 2, 2]).max() == 1
                tile[:, 2, 2] = 0
                assert not tile.any()
                around = cut_out(images[number], i - 2, j - 2, 5, 5, 0.5)
                assert_allclose(found.patches[m, place] / 255, around, atol=0.003)
    assert_array_equal(shown(whole), shown(alone))


def test_images_of_different_sizes_give_tiles_of_one_size(textures):
    projector = Projector(seeded(two_layers), batch=4)
    images = [
        *textures(2, 3, 12, 14),
        *textures(2, 3, 16, 10, seed=1),
        *textures(2, 3, 12, 14, seed=2),
    ]
    top = find_top_activations(projector, images, ["4"], k=6)["4"]
    found = project_fields(projector, images, "4", top)
    assert shown(found).shape[3:] == (8, 8)
    for m in range(5):
        for place, (number, _, i, j) in enumerate(top.units(m)):
            patch = cut_out(images[number], 2 * i - 3, 2 * j - 3, 8, 8, 0.5)
            assert_allclose(found.patches[m, place] / 255, patch, atol=0.003)
    assert set(found.units[..., 0].flatten()) >= {0, 1, 2, 3}


def test_only_some_units_and_images_are_projected_at_a_time(trained, monkeypatch):
    projector, images, tops = trained
    expected = project_fields(projector, images, "4", tops["4"])
    monkeypatch.setattr(projecting, "CHUNK", 2)
    asked, told = [], []

    class Watched(Projector):
        def by_method(self, x, layer, units, **options):
            asked.append((len(x), len(units)))
            return super().by_method(x, layer, units, **options)

    watched = Watched(projector.model, normalization=projector.normalization, batch=2)
    found = project_fields(watched, images, "4", tops["4"], progress=lambda *at: told.append(at))
    assert max(asked)[0] == 2 and max(units for _, units in asked) == 2
    total = int(np.isfinite(expected.values).sum())
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted({d for d, _ in told})
    for entry in fields(TopProjections):
        one, other = getattr(found, entry.name), getattr(expected, entry.name)
        if isinstance(one, np.ndarray):
            # The report of convolutions on other batches is rounded differently.
            assert_allclose(one.astype(float), other.astype(float), atol=1e-3, err_msg=entry.name)
    assert_allclose(shown(found), shown(expected), atol=1.1 / 127)


def test_maps_with_fewer_than_k_activations_have_empty_tiles(trained):
    projector, images, _ = trained
    net = copy.deepcopy(projector.model)
    with torch.no_grad():
        peaks = torch.cat([net[:4](projector.prepare(image[None])) for image in images])[:, 2]
        peaks = peaks.amax((1, 2)).sort().values
        net[3].bias[2] -= (peaks[-2] + peaks[-3]) / 2  # active in two images alone
        net[3].bias[1] = -1e6
    shy = Projector(net, normalization=projector.normalization)
    top = find_top_activations(shy, images, ["4"], k=4)["4"]
    found = project_fields(shy, images, "4", top, maps=[2, 1])
    assert [found.count(row) for row in (0, 1)] == [2, 0]
    assert np.isnan(found.values[0, 2:]).all() and np.isnan(found.values[1]).all()
    for name, empty in (("units", -1), ("boxes", -1), ("windows", -1), ("patches", 128)):
        array = getattr(found, name)
        assert (array[0, 2:] == empty).all() and (array[1] == empty).all()
        assert (array[0, :2] != empty).any((1, *range(2, array.ndim - 1))).all()
    assert not shown(found)[0, 2:].any() and not shown(found)[1].any()
    assert np.abs(shown(found)[0, :2]).max((1, 2, 3)).tolist() == [1, 1]
    assert not found.border[0, 2:].any() and not found.border[1].any()
    assert found.signs.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="layer '4': none of its 1 maps is ever active"):
        project_fields(shy, images, "4", top, maps=[1])


def test_values_and_tiles_of_deconvnets_have_signs(learned):
    net, images = learned
    projector = Projector(net, batch=2)
    top = find_top_activations(projector, images, ["layer2"], k=4)["layer2"]
    found = project_fields(projector, images, "layer2", top)
    assert shown(found).shape[2] == 1 and found.patches.shape[2] == 3
    assert (found.values < 0).any() and (found.values > 0).any()
    assert_allclose(np.abs(found.values), top.values, rtol=1e-5)
    assert found.report.method == "generative"
    for m, place in np.ndindex(*found.values.shape):
        number, _, i, j = found.units[m, place]
        codes = net.infer(images[number][None])
        one = torch.zeros_like(codes.layer(2).z)
        one[0, m, i, j] = found.values[m, place].item()
        painted = net.operator(codes, 2)(one)[0]
        # 5 pixels, 3 steps of 2, from 2i - 8 on.
        tile = cut_out(painted, 2 * i - 8, 2 * j - 8, 10, 10, 0.0)
        assert_allclose(shown(found)[m, place], tile / tile.abs().max(), atol=5e-3)


def test_a_data_set_that_returns_other_images_is_refused(trained):
    projector, images, tops = trained
    with pytest.raises(ValueError) as caught:
        project_fields(projector, images[1:] + images[:1], "4", tops["4"])
    message = str(caught.value)
    assert "neither shuffled nor augmented" in message and "\n" not in message
    assert "in the search: the data set must return the same images" in message


def test_large_tiles_are_reduced(textures, monkeypatch):
    monkeypatch.setattr(projection_table, "LARGEST", 10)
    net = nn.Sequential(seeded(two_layers), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    projector, images = Projector(net), list(textures(3, 3, 20, 28))
    top = find_top_activations(projector, images, ["2"], k=2)["2"]
    found = project_fields(projector, images, "2", top)
    # Each unit sees the whole image, whose longer side becomes 10 pixels.
    assert shown(found).shape == (5, 2, 3, 7, 10) and found.scale == 10 / 28
    number = found.units[0, 0, 0]
    assert found.boxes[0, 0].tolist() == [0, 0, 20, 28]
    expected = F.interpolate(images[number][None], (7, 10), mode="bilinear", antialias=True)[0]
    assert_allclose(found.patches[0, 0] / 255, expected, atol=0.003)


def test_reduced_projections_are_kept_in_full_size(textures, monkeypatch, tmp_path):
    net, images = nn.Sequential(seeded(two_layers)), list(textures(3, 3, 20, 28))
    projector = Projector(net, method="deconv")
    top = find_top_activations(projector, images, ["0.4"], k=2)["0.4"]
    plain = project_fields(projector, images, "0.4", top)
    assert plain.sheets == () and plain.full_tiles(0) == {}
    monkeypatch.setattr(projection_table, "LARGEST", 4)
    monkeypatch.setattr(tile_codec, "SMALL", 7)
    monkeypatch.setattr(tile_codec, "DENSE_PROJECTIONS", 100)
    found = project_fields(projector, images, "0.4", top)
    assert found.scale == 0.5 and found.sheet_tile == plain.patches.shape[3:] == (8, 8)
    found.save(tmp_path / "p.npz")
    loaded = load_top_projections(tmp_path / "p.npz")
    assert loaded.sheets == found.sheets
    for result in (found, loaded):
        assert result.tiles["deconv"].shape[3:] == (4, 4)
        for row in (row for row in range(len(found.maps)) if found.count(row)):
            count = found.count(row)
            signs = found.signs[row, :count, None, None, None]
            full = result.full_tiles(row)
            assert tuple(full) == found.methods == ("deconv", "guided")
            for method, tiles in full.items():
                expected = plain.tiles[method][row, :count]
                assert tiles.dtype == np.int8 and tiles.shape == expected.shape
                # WebP stores colours at half of the resolution, but brightness in full.
                pair = tiles * signs, expected
                brightness = [tiles.astype(float).mean(1).ravel() for tiles in pair]
                assert np.corrcoef(*brightness)[0, 1] > 0.9
                # The tiles of a file are made from the projections in full size.
                pair = [one.tiles[method][row, :count].astype(float) for one in (loaded, found)]
                assert np.corrcoef(*(tiles.mean(1).ravel() for tiles in pair))[0, 1] > 0.8
                assert np.abs(pair[0]).reshape(count, -1).max(1).min() == 127
    without = project_fields(projector, images, "0.4", top, full_size=False)
    assert without.sheets == () and without.full_tiles(0) == {}


# Files.


def projections_of(count=3, k=4, side=3):
    """Made up: the numbers tell where each comes from."""
    generator = np.random.default_rng(0)
    return TopProjections(
        layer="features.8",
        maps=np.arange(10, 10 + count),
        tiles={
            method: generator.integers(-127, 128, (count, k, 3, side, side), dtype=np.int8)
            for method in ("deconv", "guided")
        },
        patches=generator.integers(0, 256, (count, k, 3, side, side), dtype=np.uint8),
        units=generator.integers(0, 9, (count, k, 4)),
        boxes=generator.integers(0, 9, (count, k, 4)),
        windows=generator.integers(-9, 9, (count, k, 4)),
        border=generator.random((count, k)) < 0.5,
        values=-np.sort(-generator.random((count, k), dtype=np.float32)),
        checkerboard=np.full((count, k), np.nan, dtype=np.float32),
        scale=0.5,
        effective=EffectiveField((-1, 0), (3, 2)),
        reports={
            method: ProjectionReport(
                method,
                {"relu": 2},
                rectified=3,
                uneven=(UnevenOverlap("conv1", (3, 3), (2, 2), (2, 2)),),
            )
            for method in ("deconv", "guided")
        },
    )


def assert_same(one, two):
    for entry in fields(TopProjections):
        a, b = getattr(one, entry.name), getattr(two, entry.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert_array_equal(a, b)
        elif entry.name == "tiles":
            assert list(a) == list(b)
            for method in a:
                assert a[method].dtype == b[method].dtype
                assert_array_equal(a[method], b[method])
        else:
            assert a == b


def test_projections_survive_their_file(tmp_path):
    path, key = tmp_path / "there" / "a.npz", {"network": ("a", 1), "maps": [1, 2]}
    one = projections_of()
    one.save(path, key)
    assert_same(load_top_projections(path), one)
    assert_same(load_top_projections(path, key), one)
    assert load_top_projections(path, {**key, "maps": [1]}) is None
    assert load_top_projections(tmp_path / "nowhere.npz", key) is None
    assert {file.name for file in path.parent.iterdir()} == {".deconvnet", "a.npz"}


@pytest.mark.parametrize("planes", [1, 3])
def test_large_tiles_are_stored_in_less_than_half_of_their_bytes_almost_as_they_are(
    tmp_path, textures, planes
):
    M, k, side = 3, 5, 45
    pixels = textures(M * k, planes, side, side).view(M, k, planes, side, side)
    signed = ((pixels - 0.5) * 254).round().to(torch.int8).numpy()
    photographs = (pixels.expand(M, k, 3, side, side) * 255).round().byte().numpy().copy()
    one = projections_of(M, k)
    values = one.values.copy()
    values[1, 2:], values[2] = np.nan, np.nan
    for tiles, empty in ((signed, 0), (photographs, 128)):
        tiles[1, 2:], tiles[2] = empty, empty
    one = replace(
        one, values=values, tiles={"deconv": signed, "guided": -signed}, patches=photographs
    )
    path = tmp_path / "a.npz"
    one.save(path)
    two = load_top_projections(path)
    for method in ("deconv", "guided"):
        assert_close_tiles(two.tiles[method], one.tiles[method])
    assert_close_tiles(two.patches, one.patches)
    assert_array_equal(two.units, one.units)
    assert_array_equal(two.values, one.values)
    raw = (2 * signed[:1].nbytes + photographs[:1].nbytes) * 7 / 5
    assert path.stat().st_size < 0.5 * raw
    # What is loaded is the same every time.
    assert_same(load_top_projections(path), two)


def test_a_file_refers_to_pictures_that_a_page_has(tmp_path, textures):
    signed = ((textures(6, 3, 30, 30) - 0.5) * 254).round().to(torch.int8).view(2, 3, 3, 30, 30)
    one = replace(
        projections_of(2, 3), tiles={"deconv": signed.numpy()}, patches=np.full_like(signed, 7)
    )
    one = replace(one, reports={"deconv": one.reports["deconv"]}, values=one.values.copy())
    one.values[1] = np.nan
    path, key = tmp_path / "arrays" / "a.npz", {"k": 3}
    one.save(path, key)
    size, whole = path.stat().st_size, load_top_projections(path)
    page = tmp_path / "page"
    page.mkdir()
    picture = page / "0.webp"
    picture.write_bytes(whole.sheets[0])
    refer_to_pictures(path, [picture, None])
    assert path.stat().st_size < size - len(whole.sheets[0])
    assert_same(load_top_projections(path, key), whole)
    content = path.read_bytes()
    refer_to_pictures(path, [picture, None])
    assert path.read_bytes() == content
    # Both folders may be moved.
    tmp_path = (tmp_path / "arrays").parent.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    path, picture = tmp_path / "arrays" / "a.npz", tmp_path / "page" / "0.webp"
    assert_same(load_top_projections(path), whole)
    # A picture of another page is not taken for it.
    for change in (lambda: picture.write_bytes(whole.sheets[0] + b"x"), picture.unlink):
        change()
        assert load_top_projections(path, key) is None
        with pytest.raises(ValueError, match=r"its pictures are those of a page, \.\./page/0.webp"):
            load_top_projections(path)


def assert_close_tiles(tiles, expected):
    assert tiles.dtype == expected.dtype and tiles.shape == expected.shape
    # Tiles that are empty stay so.
    assert_array_equal(tiles[1, 2:], expected[1, 2:])
    assert_array_equal(tiles[2], expected[2])
    error = tiles.astype(float) - expected
    # The textures are of noise, the hardest to store.
    assert error[:2].std() < 0.4 * expected[0].std()
    assert abs(error[0].mean()) < 2


def test_a_damaged_file_of_projections_is_refused_in_one_line(tmp_path):
    path, one = tmp_path / "a.npz", projections_of()
    one.save(path)
    whole = path.read_bytes()
    damaged = [b"", b"no archive", whole[:-9], whole[:200]]
    for at in range(0, len(whole), 41):
        damaged.append(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert_same(load_top_projections(path), one)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            assert "remove it" in str(error)
            refused += 1
    assert refused > len(damaged) / 2
    np.savez(path, header=json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match="not a file of top projections"):
        load_top_projections(path)
    # Files of earlier versions are recomputed.
    np.savez(path, header=json.dumps({"format": "deconvnet exemplars"}))
    assert load_top_projections(path) is None


# The checkerboard.


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (1, 3)])
@pytest.mark.parametrize("period", [(2, 2), (4, 3), (1, 1), (0, 2)])
def test_a_uniform_projection_has_no_checkerboard(size, period):
    images = torch.tensor([0.0, 0.3, -2.0]).view(3, 1, 1, 1).expand(3, 3, *size)
    assert_allclose(checkerboard(images, period), 0, atol=1e-12)


def test_the_checkerboard_is_the_spread_of_the_phases_whatever_the_scale():
    images = torch.randn(4, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    magnitude = images.abs().mean(1).double().numpy()
    phases = np.array(
        [[m[i::3, j::2].mean() for i in range(3) for j in range(2)] for m in magnitude]
    )
    expected = phases.std(1) / phases.mean(1)
    assert_allclose(checkerboard(images, (3, 2)), expected, rtol=1e-6)
    for scale in (1e-12, -3.0, 1e12):
        assert_allclose(checkerboard(scale * images, (3, 2)), expected, rtol=1e-5)


def test_an_uneven_convolution_has_a_checkerboard_that_normalising_removes(textures):
    net = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.ReLU(), nn.Conv2d(2, 2, 5), nn.ReLU())
    for p in net.parameters():
        nn.init.ones_(p)
    images = list(textures(2, 3, 17, 17))
    boards = {}
    for overlap in ("sum", "normalised"):
        projector = Projector(net, overlap=overlap)
        top = find_top_activations(projector, images, ["3"], k=2)["3"]
        found = project_fields(projector, images, "3", top)
        boards[overlap] = found.checkerboard
    # Of 11 pixels the odd ones are painted once and the even ones twice, the outermost once.
    means = np.outer([10 / 6, 1], [10 / 6, 1])
    assert_allclose(boards["sum"], means.std() / means.mean(), rtol=1e-5)
    assert (boards["normalised"] < 0.5 * boards["sum"]).all()
    even = Projector(seeded(two_layers))
    top = find_top_activations(even, images, ["4"], k=2)["4"]
    assert np.isnan(project_fields(even, images, "4", top).checkerboard).all()


# The control.


def test_a_control_has_the_same_weights_in_every_filter_in_another_order():
    net = seeded(
        lambda: nn.Sequential(two_layers(), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 6))
    )
    with torch.no_grad():
        net[1].running_mean.normal_()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    control = shuffle_weights(net, seed=3)
    for name, value in control.state_dict().items():
        assert torch.equal(net.state_dict()[name], before[name]), "the original was touched"
        if value.dim() < 2:
            assert torch.equal(value, before[name]), name
            continue
        assert not torch.equal(value, before[name])
        one, two = (each.flatten(1).sort(1).values for each in (value, before[name]))
        assert torch.equal(one, two), name
    # Over space and channels, not in one of them only.
    moved, was = control[0][0].weight[0], net[0][0].weight[0]
    assert not torch.equal(moved.flatten(1).sort(1).values, was.flatten(1).sort(1).values)
    assert not torch.equal(moved.sum((1, 2)), was.sum((1, 2)))


def test_a_control_depends_on_its_seed_alone():
    net = seeded(two_layers)
    torch.manual_seed(1)
    one = shuffle_weights(net, seed=3)
    torch.manual_seed(2)
    again, other = shuffle_weights(net, seed=3), shuffle_weights(net, seed=4)
    assert torch.equal(one[3].weight, again[3].weight)
    assert not torch.equal(one[3].weight, other[3].weight)
    assert isinstance(one, nn.Sequential) and one.training == net.training


def test_the_control_of_a_deconvnet_keeps_connections_and_norms(learned):
    net = copy.deepcopy(learned[0])
    settings = [replace(layer.settings) for layer in net.layers]
    settings[1].num_maps, settings[1].connectivity = 4, "random_doubles"
    settings[0].num_maps = 6
    net = DeconvNet(settings, net.preprocessing.settings, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    control = shuffle_weights(net, seed=0)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        if "filters" not in name:
            assert torch.equal(control.state_dict()[name], value)
    for layer, original in zip(control.layers, net.layers, strict=True):
        f, was = layer.filters, original.filters
        assert not torch.equal(f, was)
        assert torch.equal(f.flatten(1).sort(1).values, was.flatten(1).sort(1).values)
        assert_allclose(f.flatten(1).norm(dim=1), was.flatten(1).norm(dim=1), rtol=1e-6)
        assert not f[layer.connectivity == 0].any()
    assert (control.layer(2).connectivity == 0).any()


def deep():
    """Four convolutions with biases that keep many units of the trained order active."""
    net = nn.Sequential()
    for planes in (3, 8, 8, 8):
        net.extend([nn.Conv2d(planes, 8, 3), nn.ReLU()])
    with torch.no_grad():
        for conv in net[::2]:
            conv.weight.abs_()
            conv.bias.copy_(-conv.weight.sum((1, 2, 3)) * torch.linspace(0.2, 0.5, 8))
    return net


def deviations(y):
    return y.detach().std((0, 2, 3), correction=0)


def densities(y):
    return (y > 0).double().mean((0, 2, 3))


def test_maps_of_the_control_vary_as_much_and_are_positive_as_often_as_in_the_network(textures):
    net, x = seeded(deep).eval(), textures(4, 3, 16, 18)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    control = shuffled_control(net, x, seed=3)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), "the original was touched"
    for layer in (0, 2, 4, 6):
        one, other = control[: layer + 1](x), net[: layer + 1](x)
        assert_allclose(deviations(one), deviations(other), rtol=1e-3, atol=1e-4)
        count = other[:, 0].numel()
        # Maps that are never or always positive are so almost always.
        expected = densities(other).clamp(1e-3, 1 - 1e-3)
        assert_allclose(densities(one), expected, atol=1.6 / count)
        # Filters are those of `shuffle_weights`, each with its own scale.
        ratio = control[layer].weight / shuffle_weights(net, seed=3)[layer].weight
        assert_allclose(ratio.std((1, 2, 3)).detach(), 0, atol=1e-4)
        assert not torch.allclose(control[layer].bias, net[layer].bias)
    again = shuffled_control(net, x, seed=3)
    assert all(map(torch.equal, again.parameters(), control.parameters()))
    assert not any(module._forward_hooks for module in [*net.modules(), *control.modules()])


def test_the_control_of_a_network_with_batch_normalisation_has_its_own_statistics(textures):
    norm = nn.BatchNorm2d(6)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = textures(4, 3, 16, 18)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        net.train()(x)
    control = shuffled_control(net.eval(), x)
    assert torch.equal(control[1].weight, norm.weight) and torch.equal(control[1].bias, norm.bias)
    y = F.batch_norm(control[0](x), None, None, norm.weight, norm.bias, training=True)
    assert_allclose(control[:2](x).detach(), y.detach(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(control[1].running_var, norm.running_var, rtol=0.01)


def test_maps_that_are_active_in_the_network_are_active_in_its_control(textures):
    net, images = seeded(deep), list(textures(8, 3, 16, 18))
    # As in networks without normalisation, with shuffled weights alone most maps die.
    active = {}
    for name, model in (
        ("network", net),
        ("shuffled", shuffle_weights(net)),
        ("control", shuffled_control(net, torch.stack(images[:4]))),
    ):
        top = find_top_activations(Projector(model), images, ["7"], k=1)["7"]
        active[name] = ~top.dead
    assert active["network"].mean() > 0.5
    assert active["control"][active["network"]].all()


def test_a_model_that_fails_above_its_layers_has_a_control(textures):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7, 2)).eval()
    x = textures(2, 3, 9, 9)
    control = shuffled_control(net, x)
    one, other = control[0](x), net[0](x)
    assert_allclose(deviations(one), deviations(other), rtol=1e-3, atol=1e-4)
    assert_allclose(densities(one), densities(other), atol=0.02)
    assert torch.equal(control[3].bias, net[3].bias)


def test_the_control_of_a_deconvnet_is_only_shuffled(learned):
    net, images = learned
    control, shuffled = shuffled_control(net, torch.stack(images)), shuffle_weights(net)
    for name, value in control.state_dict().items():
        assert torch.equal(value, shuffled.state_dict()[name])


# Grids.


def test_a_tile_of_zeros_is_all_grey_and_what_is_not_a_number_too():
    shown = shade_projections(np.zeros((2, 3, 4, 5), dtype=np.float16))
    assert torch.equal(shown, torch.full((2, 3, 4, 5), 0.5))
    tile = torch.zeros(3, 1, 4, 4)
    tile[:, 0, 1, 1] = torch.tensor([math.nan, math.inf, 1e-30])
    shown = shade_projections(tile)
    assert shown.shape == (3, 3, 4, 4) and torch.isfinite(shown).all()
    assert torch.equal(shown[:2], torch.full((2, 3, 4, 4), 0.5))
    assert (shown[2, :, 1, 1] == 1).all()


@pytest.mark.parametrize("contrast", [0.5, 0.995, 1.0])
def test_zero_is_grey_and_the_opposite_tile_has_the_opposite_colours(contrast):
    tiles = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(0)) ** 3
    tiles[:, :, 2] = 0
    tiles *= 10.0 ** torch.arange(-6, 4, 2)[:, None, None, None]
    shown = shade_projections(tiles, contrast=contrast)
    assert torch.equal(shown[:, :, 2], torch.full((5, 3, 9), 0.5))
    assert_allclose(shade_projections(-tiles, contrast=contrast), 1 - shown, atol=1e-7)
    # This many of the non-zero pixels are neither black nor white.
    full = ((shown == 0) | (shown == 1)).flatten(1).sum(1)
    nonzero = int((tiles[0] != 0).sum())
    assert (full - (1 - contrast) * nonzero).abs().max() <= 2
    assert ((shown - 0.5) * tiles >= 0).all()


def colours(found):
    """The mean colour of every patch as three bytes."""
    return [tuple(patch.mean((1, 2)).round().astype(int)) for row in found.patches for patch in row]


def test_a_grid_shows_maps_and_activations_in_order_with_projections_next_to_patches():
    M, k = 5, 9
    found = projections_of(M, k, side=4)
    number = np.arange(M * k).reshape(M, k)
    sign = np.where(number * 7 % 3 == 0, 1, -1)
    colour = np.stack([10 + number, 200 - number, 60 + 2 * number], -1)
    found = replace(
        found,
        tiles={
            "deconv": 127
            * np.ones((M, k, 3, 4, 4), np.int8)
            * sign[..., None, None, None].astype(np.int8)
        },
        reports={"deconv": found.reports["deconv"]},
        border=np.zeros((M, k), bool),
        patches=np.ones((M, k, 3, 4, 4), np.uint8) * colour[..., None, None].astype(np.uint8),
        values=np.ones((M, k), np.float32),
    )
    rows = [3, 0, 4]
    picture = (projection_grid(found, rows, columns=2, tile_width=12) * 255).round().int()
    corners = {}
    for row in rows:
        for rank in range(k):
            same = (picture == torch.tensor(colour[row, rank]).view(3, 1, 1)).all(0).nonzero()
            assert len(same) == 12 * 12, "each patch once"
            corners[row, rank] = same[0].tolist()
    step = corners[3, 1][1] - corners[3, 0][1]
    for row in rows:
        top, left = corners[row, 0]
        for rank in range(k):
            assert corners[row, rank] == [top + rank // 3 * step, left + rank % 3 * step]
            # Its projection is in the same place of the sheet on its left.
            beside = left + (rank % 3 - 3) * step - 3 * GAP
            tile = picture[:, top + rank // 3 * step :, beside:][:, :12, :12]
            expected = 255 if sign[row, rank] > 0 else 0
            assert (tile == expected).all(), (row, rank)
    # Two maps in a line, then the next.
    assert corners[3, 0][0] == corners[0, 0][0] < corners[4, 0][0]
    assert corners[3, 0][1] == corners[4, 0][1] < corners[0, 0][1]


@pytest.mark.parametrize("planes", [1, 3])
def test_missing_activations_are_hatched(planes):
    found = projections_of(1, 9, side=4)
    values = found.values.copy()
    values[0, 1], values[0, 7:] = -values[0, 1], np.nan
    tiles = {method: tiles[:, :, :planes] for method, tiles in found.tiles.items()}
    found = replace(found, values=values, tiles=tiles)
    picture = projection_grid(found, tile_width=12)
    last = picture[:, -15:, :]  # the third line of tiles
    sheets = (last[:, :, left : left + 48] for left in (0, 54, 108))  # two methods, the image
    for part in sheets:
        first, *empty = (part[:, 2:11, 4 + 15 * n : 13 + 15 * n] for n in range(3))
        assert len(first.unique()) > 2
        for tile in empty:
            assert tile.unique().tolist() == [0.75, 1.0]
    assert torch.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1


def contains(page, part):
    """Whether a picture is in another one, at its left edge."""
    h, w = part.shape[1:]
    return any(
        torch.equal(page[:, top : top + h, :w], part) for top in range(page.shape[1] - h + 1)
    )


def test_the_grid_of_a_layer_is_above_its_control():
    found = projections_of(5)
    page = layer_grid(found, [3, 0, 2], control=found, control_maps=2)
    assert contains(page, projection_grid(found, [3, 0, 2]))
    h = projection_grid(found, [3, 0]).shape[1]
    assert torch.equal(page[:, -h:], layer_grid(found, [3, 0])[:, -h:])
    assert page.shape[2] <= PAGE


def test_a_control_that_is_dead_says_so_and_does_not_vanish():
    found = projections_of(2)
    dead = replace(found, values=np.full_like(found.values, np.nan))
    alone, page = layer_grid(found), layer_grid(found, control=dead)
    assert torch.equal(page[:, : alone.shape[1]], alone)
    below = page[:, alone.shape[1] :]
    text, other = (projection_grid(dead, dead=t) for t in ("dead in the control", "-"))
    assert text.shape[1] < 120 and not torch.equal(text, other)
    assert below.shape[1] > text.shape[1] + 2 * TEXT and (below[:, -text.shape[1] :] < 0.6).any()


def test_every_method_has_a_sheet_in_the_order_of_the_tiles():
    found = projections_of(1, 4, side=4)
    shape = found.patches.shape
    full = np.full(shape, 127, np.int8)
    found = replace(
        found,
        tiles={"guided": full, "deconv": -full},
        patches=np.full(shape, 51, np.uint8),
        border=np.zeros((1, 4), bool),
    )
    picture = projection_grid(found, tile_width=12)
    row = picture[0, -8]  # through the last line of tiles
    filled = [float(v) for v in row if v not in (PAPER, HAIRLINE)]
    assert filled == pytest.approx([0.0] * 24 + [0.2] * 24)
    assert (row == PAPER).sum() >= 24, "white tiles of the first method"


def test_negative_activations_are_shown_with_the_opposite_sign_and_a_mark():
    found = projections_of(1, 4, side=20)
    tiles = found.tiles["guided"]
    found = replace(
        found,
        tiles={"guided": tiles},
        patches=np.full_like(found.patches, 128),
        border=found.border,
    )
    negative = replace(
        found,
        tiles={"guided": tiles * np.array([1, -1, 1, 1], np.int8)[:, None, None, None]},
        values=found.values * [1, -1, 1, 1],
    )
    one, other = (projection_grid(f, tile_width=20) for f in (found, negative))
    changed = (one != other).any(0)[2 * TEXT + 14 :]  # below caption and heads
    rows, columns = changed.nonzero().T
    assert 0 < changed.sum() <= 2 * MARK**2 and rows.max() - rows.min() < MARK
    assert columns.min() >= 20 + 2 * GAP, "the first tile is not marked"


def test_patches_of_units_at_the_border_are_marked():
    found = replace(projections_of(1, 4, side=20), border=np.array([[False, True, False, False]]))
    plain = replace(found, border=np.zeros((1, 4), bool))
    one, other = (projection_grid(f, tile_width=20) for f in (found, plain))
    changed = (one != other).any(0)
    paint = torch.tensor(to_rgb(BORDER))[:, None]
    assert_allclose(one[:, changed], paint.expand(-1, int(changed.sum())), atol=0.01)
    assert changed.sum() == MARK * (MARK + 1) / 2
    rows, columns = changed.nonzero().T
    # The second patch, to the right of two sheets.
    left = 2 * (2 * (20 + GAP) + 3 * GAP) + 20 + 2 * GAP
    assert left <= columns.min() and columns.max() == left + 19


def test_the_caption_of_a_grid_says_what_its_reader_has_to_know():
    found = projections_of(3, 9)
    found = replace(
        found,
        windows=np.broadcast_to([-2, 4, 62, 68], (3, 9, 4)),
        border=np.zeros((3, 9), bool),
        reports={"guided": ProjectionReport("guided", rectified=3, switched=1)},
    )
    info = LayerInfo("features.8", "ReLU", (128, 20, 20), (92, 92), (4, 4), (0, 0))
    title, caption = grid_caption(found, [0, 2], info=info, num_images=300)
    assert title == "features.8  ·  ReLU  ·  2 of 128 maps"
    assert caption == (
        "The 9 strongest activations of each map in 300 images, projected to pixels (grey is "
        "zero), and the image there. Receptive field: 92x92 pixels; tiles show the 64x64 pixels "
        "that matter."
    )
    small = replace(info, field=(64, 64))
    assert "the whole receptive field, 64x64 pixels." in grid_caption(found, info=small)[1]
    assert "sees the whole image" in grid_caption(found, info=replace(info, field=None))[1]
    marked = replace(
        found,
        values=-found.values,
        border=np.eye(3, 9, dtype=bool),
        reports={"deconv": ProjectionReport("deconv", rectified=3)},
    )
    caption = grid_caption(marked)[1]
    for part in ("A minus marks", "Units at the border", "deconv shows the same for every image"):
        assert part in caption
    assert np.array_equal(marked.border_marks, np.eye(3, 9, dtype=bool))
    # If all are at the border, a mark would not distinguish any.
    everywhere = replace(marked, border=np.ones((3, 9), bool))
    assert "All receptive fields reach beyond the image" in grid_caption(everywhere)[1]
    assert not everywhere.border_marks.any()
    assert border_sentences(everywhere, IMAGES)[0].startswith("The receptive fields of all")


def test_a_checkerboard_is_averaged_out_where_it_is_a_small_part_of_a_tile():
    uneven = (
        UnevenOverlap("conv2", (3, 3), (2, 2), (4, 4)),
        UnevenOverlap("conv1", (3, 3), (2, 2), (2, 2)),
    )
    found = projections_of(1, 2, side=40)
    edge = np.where(np.arange(40) < 20, -40, 40) * np.ones((40, 1))
    board = edge * (1 + 0.5 * (-1.0) ** np.add.outer(np.arange(40), np.arange(40)))
    found = replace(
        found,
        scale=1.0,
        tiles={"guided": np.broadcast_to(board, (1, 2, 3, 40, 40)).astype(np.int8)},
        reports={"guided": ProjectionReport("guided", uneven=uneven)},
        values=found.values * [1, -1],
    )
    period = averaged_period(found.report, (40, 40))
    shown = averaged(torch.from_numpy(found.tiles["guided"][0]).float(), period)
    assert shown.shape == (2, 3, 40, 40) and period == (2, 2)
    assert_allclose(shown[0, 0, :, :19], -40, atol=1e-4)
    assert_allclose(shown[0, 0, :, 20:], 40, atol=1e-4)
    signed = tiles_to_show(replace(found, tiles={"guided": shown.numpy()[None]}), 0)["guided"]
    assert torch.equal(signed[1], -signed[0])
    assert "averaged over 2x2 pixels" in grid_caption(found)[1]
    # Not in a tile of a few periods, and not without a pattern.
    small = replace(
        found,
        tiles={"guided": found.tiles["guided"][..., :30, :30]},
        patches=found.patches[..., :30, :30],
    )
    plain = replace(found, reports={"guided": ProjectionReport("guided")})
    for other in (small, plain):
        size = other.patches.shape[3:]
        assert averaged_period(other.report, size) == (1, 1)
        assert np.array_equal(tiles_to_show(other, 0)["guided"][0], other.tiles["guided"][0, 0])
        assert "averaged" not in grid_caption(other)[1]


def test_projected_tiles_are_averaged_over_the_checkerboard(textures):
    net = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.ReLU(), nn.Conv2d(2, 1, 16))
    for p in net.parameters():
        nn.init.ones_(p)
    projector, images = Projector(net, method="deconv"), list(textures(1, 3, 33, 33))
    found = project_fields(
        projector, images, "2", find_top_activations(projector, images, ["2"], k=1)["2"]
    )
    assert averaged_period(found.report, (33, 33)) == (2, 2)
    x = projector.prepare(images[0][None])
    tile = projector(x, "2", found.units[0].tolist()).tiles()
    expected = averaged(tile, (2, 2))[0]
    assert_allclose(shown(found)[0, 0], expected / expected.abs().max(), atol=5e-3)
    assert checkerboard(expected[None], (2, 2)) < 0.3 * checkerboard(tile, (2, 2))


def test_contrast_is_set_after_a_tile_is_resized():
    fine = torch.randn(1, 3, 280, 280, generator=torch.Generator().manual_seed(0))
    small = shade_projections(fine, width=140)
    assert small.shape == (1, 3, 140, 140)
    assert (small - 0.5).abs().amax() == pytest.approx(0.5) and small.std() > 0.15
    assert resize_tiles(shade_projections(fine), 140).std() < 0.12


def test_a_sample_of_maps_depends_on_the_seed_alone():
    dead = np.zeros(50, dtype=bool)
    dead[10:30] = True
    chosen = sample_maps(dead, 8, seed=1)
    assert chosen == sorted(set(chosen)) == sample_maps(dead, 8, seed=1) and len(chosen) == 8
    assert not dead[chosen].any()
    assert chosen != sample_maps(dead, 8, seed=2) and chosen != list(range(8))
    alive = [*range(10), *range(30, 50)]
    assert sample_maps(dead, None) == sample_maps(dead, 30) == sample_maps(dead, 99) == alive
    assert sample_maps(~np.zeros(3, dtype=bool), 2) == []


def test_the_first_filters_are_in_the_colours_of_pixels():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    nn.init.zeros_(net[0].weight)
    net[0].weight.data[0, 0] = 2.0  # sees blue
    net[0].weight.data[1, 2] = -1.0  # sees that red is missing
    name, filters = pixel_filters(Projector(net, normalization=Normalization(MEAN, STD, "bgr")))
    assert name == "0" and filters.shape == (2, 3, 3, 3) and not filters.requires_grad
    assert_allclose(filters[0].mean((1, 2)), [0, 0, 2 * STD[0]])
    assert_allclose(filters[1].mean((1, 2)), [-STD[2], 0, 0])


def test_first_filters_are_those_that_see_the_planes_of_an_image(learned):
    gate = nn.Conv2d(1, 1, 3, padding=1)
    depthwise = nn.Conv2d(3, 3, 3, groups=3)
    net = nn.Sequential(gate, depthwise, nn.Conv2d(3, 4, 3))
    assert pixel_filters(Projector(net))[0] == "2"
    grey = Projector(net, normalization=Normalization((0.5,), (0.5,), "grey"))
    assert pixel_filters(grey)[0] == "0"
    assert pixel_filters(grey)[1].shape == (1, 3, 3, 3)
    assert pixel_filters(Projector(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))) is None
    name, filters = pixel_filters(Projector(learned[0]))
    assert name == "layer1"
    assert torch.equal(filters, learned[0].layer(1).filters.expand(-1, 3, -1, -1))
