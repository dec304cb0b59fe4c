"""What the gallery computes: repainting, the survey of all maps, and how maps are related."""

import base64
import json
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.network.metrics import snr
from deconvnet.visualization.gallery.layer_content import _control
from deconvnet.visualization.gallery.relatives import (
    closest,
    filter_weights,
    pooled_maps,
    separate_sources,
    similarities,
)
from deconvnet.visualization.gallery.repainting import repainting, repainting_data
from deconvnet.visualization.gallery.survey import Survey, survey_layers
from deconvnet.visualization.projection.feature_projection import signed_rgb
from deconvnet.visualization.projection.projection import ProjectionReport
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_projections import TopProjections


@pytest.fixture(scope="module")
def net():
    """A network of two layers in colour; the first pools over pairs of maps."""
    solver = SolverSettings(iterations=12)
    layers = [
        LayerSettings(6, filter_size=5, lam=5.0, pool=[2, 2, 2], solver=solver),
        LayerSettings(4, filter_size=3, lam=5.0, solver=solver),
    ]
    return DeconvNet(layers, PreprocessingSettings(color="ycbcr"), seed=3)


@pytest.fixture(scope="module")
def images(textures):
    return textures(6, 3, 20, 22)


@pytest.fixture(scope="module")
def codes(net, images):
    return net.infer(images)


def read(entry, kind):
    integers = np.frombuffer(base64.b64decode(entry["data"]), np.dtype(kind).newbyteorder("<"))
    return integers * entry["factor"]


@pytest.mark.parametrize("layer", [1, 2])
def test_the_activations_in_the_files_of_a_repainting_add_up_to_the_reconstruction(
    net, codes, layer
):
    one = codes.select(slice(2, 3))
    data = json.loads(json.dumps(repainting_data(repainting(net, one, layer, count=7))))
    size = data["size"]
    assert size == [3, 20, 22] and 0 < len(data["parts"]) <= 7
    total = read(data["rest"], np.int16).reshape(size)
    for part in data["parts"]:
        top, left, bottom, right = part["box"]
        tile = read(part, np.int8).reshape(3, bottom - top, right - left)
        total[:, top:bottom, left:right] += tile
    # 7 alone, then those up to 28, 112, ...: what is left is less than four times what is listed.
    assert [(group["first"], group["last"]) for group in data["groups"]] == [
        (7 * 4**n + 1, 7 * 4 ** (n + 1)) for n in range(len(data["groups"]))
    ]
    assert data["groups"] and data["groups"][-1]["last"] < data["total"]
    assert data["total"] <= 4 * data["groups"][-1]["last"]
    for group in data["groups"]:
        total += read(group, np.int8).reshape(size)
    expected = net.synthesize(one, layer)[0].numpy()
    assert_allclose(total, expected, atol=1e-4 * np.abs(expected).max())
    image = read(data["image"], np.int8).reshape(size)
    assert_allclose(image, one.y[0], atol=0.51 / 127 * float(one.y.abs().max()))
    shown = snr(torch.from_numpy(image), torch.from_numpy(total))
    assert shown == pytest.approx(snr(one.y[0], torch.from_numpy(expected)), abs=0.1)
    assert data["total"] == int(torch.count_nonzero(one.layer(layer).z))


def test_a_part_of_a_repainting_is_the_projection_of_its_activation(net, images, codes):
    one = codes.select(slice(2, 3))
    shown = repainting(net, one, 2, count=5)
    z = one.layer(2).z[0]
    order = z.abs().flatten().argsort(descending=True, stable=True)[: len(shown.tiles)]
    units = [(0, *map(int, np.unravel_index(int(n), z.shape))) for n in order]
    projection = Projector(net)(images[2:3], "layer2", units)
    assert shown.maps == [unit[1] for unit in units]
    assert_allclose(shown.values, projection.values, rtol=1e-6)
    for tile, box, full in zip(shown.tiles, shown.boxes, projection.images.numpy(), strict=True):
        top, left, bottom, right = box
        assert_allclose(tile, full[:, top:bottom, left:right], atol=1e-6)
        # What the box leaves out vanishes in 8 bits.
        rest = full.copy()
        rest[:, top:bottom, left:right] = 0
        assert np.abs(rest).max() <= 0.5 / 127 * np.abs(full).max()


def test_a_group_of_a_repainting_is_the_projection_of_these_activations_alone(net, codes):
    one = codes.select(slice(2, 3))
    first, last, picture = repainting(net, one, 2, count=3).groups[0]
    assert (first, last) == (4, 12)
    z = one.layer(2).z
    ranked = z.abs().flatten().sort(descending=True).values
    alone = torch.where((z.abs() <= ranked[3]) & (z.abs() >= ranked[11]), z, 0)
    assert int(torch.count_nonzero(alone)) == 9
    assert_allclose(picture, net.operator(one, 2)(alone)[0], atol=1e-5)


def test_the_matrix_of_a_repainting_gives_signed_rgb(net, codes):
    shown = repainting(net, codes.select(slice(0, 1)), 1, count=1)
    expected = signed_rgb(net, codes.y[:1])[0].numpy()
    assert_allclose(np.tensordot(shown.rgb, codes.y[0].numpy(), 1), expected, atol=1e-5)


def test_large_tiles_leave_room_for_fewer_activations(net, codes, monkeypatch):
    monkeypatch.setattr("deconvnet.visualization.gallery.repainting.LARGEST", 400)
    shown = repainting(net, codes.select(slice(2, 3)), 1, count=50)
    assert 0 < len(shown.tiles) < 50 and sum(tile.size for tile in shown.tiles) <= 400
    assert shown.groups[0][0] == len(shown.tiles) + 1
    with pytest.raises(ValueError, match="codes of 6 images"):
        repainting(net, codes, 1)


def test_the_channels_of_a_layer_together_are_the_projection_of_a_unit(net, images, codes):
    z = codes.layer(2).z
    n, k, i, j = (int(index) for index in np.unravel_index(int(z.abs().argmax()), z.shape))
    channels = list(range(net.layer(2).filters.shape[1]))
    parts = separate_sources(net, codes, 2, (n, k, i, j), channels)
    projection = Projector(net)(images, "layer2", [(n, k, i, j)])
    assert parts.shape == (3, *projection.images.shape[1:])
    assert (parts.abs().amax((1, 2, 3)) > 0).sum() > 1
    assert_allclose(parts.sum(0), projection.images[0], atol=1e-5)
    one = separate_sources(net, codes, 2, (n, k, i, j), channels[1:2])
    assert_allclose(one[0], parts[1], atol=1e-6)


def test_channels_are_named_by_the_maps_that_they_pool(net):
    assert [pooled_maps(net, 2, channel) for channel in range(3)] == [[0, 1], [2, 3], [4, 5]]
    filters = net.layer(2).filters
    weights = filter_weights(net, 2)
    assert weights.shape == (4, 3)
    assert weights[3, 1] == pytest.approx(float(filters[3, 1].square().sum().sqrt()))


def test_the_survey_has_the_strongest_activation_of_every_map_in_every_image(net, images):
    projector = Projector(net, batch=4)
    data = [images[0], (images[1], "with a label"), *images[2:]]
    mask = torch.zeros(codes_shape(net, images, 2), dtype=torch.bool)
    mask[3:6, 2:9] = True
    found = survey_layers(projector, data, lambda image: {"layer2": mask}, ["layer1", "layer2"])
    for number, layer in enumerate(("layer1", "layer2"), 1):
        survey, z = found[layer], net.infer(images).layer(number).z.abs()
        if layer == "layer2":
            z = z * mask
        assert_array_equal(survey.images, range(6))
        assert_allclose(survey.peaks, z.amax((2, 3)), rtol=1e-5)
        n, k = np.indices(survey.peaks.shape)
        assert_allclose(z[n, k, survey.rows, survey.columns], survey.peaks, rtol=1e-5)


def codes_shape(net, images, layer):
    return net.infer(images[:1]).layer(layer).shape[1:]


def test_the_survey_takes_a_sample_and_images_of_any_size(net, images):
    mixed = [*images[:5], images[5][:, :16, :18]]
    found = survey_layers(Projector(net), mixed, lambda image: {}, ["layer1"], count=3)["layer1"]
    assert found.images.tolist() == [0, 2, 5]
    z = net.infer(images[5:6, :, :16, :18]).layer(1).z.abs()[0]
    assert_allclose(found.peaks[2], z.amax((1, 2)), rtol=1e-5)
    k = np.arange(6)
    assert_allclose(z[k, found.rows[2], found.columns[2]], found.peaks[2], rtol=1e-5)


def a_survey(peaks):
    peaks = np.array(peaks, dtype=np.float32).reshape(len(peaks), -1)
    nothing = np.zeros(peaks.shape, dtype=int)
    return Survey(10 * np.arange(len(peaks)), peaks, nothing, nothing)


def test_the_spectrum_goes_down_through_the_quantiles_without_the_strongest():
    survey = a_survey([*range(20, 0, -1), 0, 0])
    rows = [row for _, row in survey.spectrum(0)]
    assert [float(survey.peaks[row, 0]) for row in rows] == [20, 19, 17, 15, 13, 11, 8, 5, 2]
    shares = [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2, 0.05]
    assert [share for share, _ in survey.spectrum(0)] == shares
    # The strongest image has number 0.
    assert [row for _, row in survey.spectrum(0, without=[0, 90])] == [1, 3, 5, 7, 12, 15, 18]
    assert a_survey([0, 0]).spectrum(0) == []
    assert [row for _, row in a_survey([1.0, 2.0]).spectrum(0)] == [1, 0]


def test_the_histogram_counts_every_image_once():
    found = a_survey([0, 0, 0.1, 4, 4, 2.01]).histogram(0)
    assert sum(found.counts) == 4 and found.silent == 2
    assert (found.edges[0], found.edges[-1]) == (0, 4)
    assert found.counts[-1] == 2 and found.counts[12] == 1 and found.counts[0] == 1
    assert a_survey([0.0]).histogram(0).silent == 1


def test_correlations_are_those_of_numpy_and_zero_for_constant_maps():
    peaks = np.random.default_rng(0).random((9, 4))
    peaks[:, 3] = 0
    found = a_survey(peaks).correlations()
    assert_allclose(found[:3, :3], np.corrcoef(peaks[:, :3].T), atol=1e-6)
    assert (found[3] == 0).all()
    assert a_survey(peaks[:7]).correlations() is None


def test_pictures_are_as_similar_as_at_their_best_shift():
    generator = torch.Generator().manual_seed(0)
    tiles = torch.zeros(4, 3, 20, 16)
    patch = torch.randn(3, 6, 5, generator=generator)
    tiles[0, :, 2:8, 3:8] = patch
    tiles[1, :, 11:17, 9:14] = 7 * patch
    tiles[2] = -tiles[0]
    found = similarities(tiles)
    assert found.shape == (4, 4)
    assert_allclose(found, found.T, atol=1e-5)
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    assert found[0, 2] < 0.6 and (found[3, :3] == 0).all()
    # Brute force over all shifts.
    best = max(
        float((tiles[0] * torch.roll(tiles[2], (i, j), (1, 2))).sum())
        for i in range(-2, 13)
        for j in range(-3, 9)
    )
    assert found[0, 2] >= best / float(tiles[0].square().sum()) - 1e-5


def test_a_unit_is_the_sum_of_what_the_maps_below_contribute_and_of_the_biases(textures):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU()),
    ).double()
    x = textures(3, 3, 20, 18).double()
    maps = model(x).detach()
    strongest = maps.flatten(2).amax(2).argmax(1).tolist()
    units = [
        (n, strongest[n], *map(int, np.unravel_index(int(maps[n, strongest[n]].argmax()), (5, 4))))
        for n in (2, 0, 2)
    ]
    units.append((2, strongest[2], 0, 0))
    projector = Projector(model, batch=2)
    found = projector.contributions(x, "6", units, "1")
    assert found.shape == (4, 4)
    # Nothing but the last convolution has a bias.
    with torch.no_grad():
        for (n, k, i, j), row in zip(units, found, strict=True):
            value = float(maps[n, k, i, j])
            expected = value - float(model[5].bias[k]) if value > 0 else 0
            assert float(row.sum()) == pytest.approx(expected, abs=1e-12)
        # A map that is left out takes its contribution with it, as long as no rectifier changes.
        below = model[:2](x[2:3])
        below[:, 1] *= 1 - 1e-6
        n, k, i, j = units[0]
        less = float(maps[n, k, i, j] - model[2:](below)[0, k, i, j])
        assert less / 1e-6 == pytest.approx(float(found[0, 1]), rel=1e-4)
    # Not one of a layer above.
    assert (projector.contributions(x, "1", [(0, 0, 5, 5)], "6") == 0).all()


def test_a_map_that_is_dead_in_the_control_is_shown_as_such():
    tiles = np.zeros((2, 3, 1, 4, 4), np.int8)
    tiles[0] = 100
    values = np.array([[-2.0, 1, np.nan], [np.nan] * 3], np.float32)
    given = {
        "maps": np.array([3, 8]),
        "values": values,
        "tiles": {"deconv": tiles},
        "reports": {"deconv": ProjectionReport("deconv")},
        "patches": np.zeros((2, 3, 3, 4, 4), np.uint8),
        "scale": 1.0,
        **dict.fromkeys(("units", "boxes", "windows"), np.zeros((2, 3, 4), int)),
    }
    names = [entry.name for entry in fields(TopProjections)]
    control = TopProjections(**{**dict.fromkeys(names), **given})
    shown = _control(SimpleNamespace(control={"a": control}, contrast=1.0), "a").projections
    assert list(shown) == [3, 8] and shown[8] is None
    # A negative activation has its sign taken out.
    assert [float(tile.mean()) for tile in shown[3]] == [0, 1]
    assert _control(SimpleNamespace(control={}), "a") is None


def test_the_closest_maps_are_the_largest_positive_values_of_others():
    row = np.array([1.0, 0.5, -0.2, 0.9, 0.0])
    assert closest(row, np.array([3, 5, 7, 11, 13]), 3) == [(11, 0.9), (5, 0.5)]
