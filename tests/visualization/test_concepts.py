"""Concepts of a dictionary over a layer as one more layer of a network: fields, responses and
projections, against projections of the units that they are made of.
"""

import pytest
import torch
from concept_models import CHANNELS, MAPS, concept_model, network
from torch import nn
from torch.testing import assert_close

from deconvnet import DeconvNet, LayerSettings
from deconvnet.visualization import Projector
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.search.randomization import shuffled_control

X = torch.rand(2, 3, 26, 26, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return concept_model()


def strongest_units(projector, count=3):
    """The strongest unit of some concepts in each image, as (image, map, row, column)."""
    z = projector.responses(X, ["concepts"])["concepts"]
    order = z[:, :count].flatten(2).argmax(2)
    return [
        (n, k, int(order[n, k]) // z.shape[3], int(order[n, k]) % z.shape[3])
        for n in range(len(z))
        for k in range(count)
    ]


def test_concepts_follow_the_layer_that_they_explain(model):
    infos = Projector(model).layers(X)
    names = [info.name for info in infos]
    assert names[4:6] == ["4", "concepts"]
    assert infos[5].shape == (MAPS, 14, 14)  # "valid": larger than the maps below by 2


def test_responses_are_the_maps_of_the_dictionary(model):
    activations = model.base[:5](X)
    z = model.dictionary.infer(activations).layer(1).z
    found = Projector(model).responses(X, ["concepts", "1"])
    assert_close(found["concepts"], z)
    assert_close(found["1"], model.base[:2](X))


def test_a_concept_is_projected_as_the_units_that_its_filter_paints(model):
    """The gradient is linear: the sum of the projections of all units, each with its weight."""
    projector = Projector(model, method="gradient")
    n, k, i, j = unit = strongest_units(projector)[1]
    found = projector(X, "concepts", [unit])
    f = model.dictionary.layer(1).filters[k] * model.dictionary.preprocessing.scale
    expected = torch.zeros_like(found.images[0])
    for c in range(CHANNELS):
        for p in range(3):
            for q in range(3):
                row, column = i - 2 + p, j - 2 + q
                if 0 <= row < 12 and 0 <= column < 12:
                    seed = (found.values * f[c, p, q]).float()
                    part = projector(X, "4", [(n, c, row, column)], seeds=seed)
                    expected += part.images[0]
    assert_close(found.images[0], expected)


@pytest.mark.parametrize("method", ["deconv", "guided"])
def test_a_concept_of_one_channel_is_that_channel(method):
    model = concept_model(1)
    model.dictionary.layer(1).filters.zero_()[:, 2] = 1
    projector = Projector(model, method=method)
    units = strongest_units(projector, 1)
    found = projector(X, "concepts", units)
    channel = projector(X, "4", [(n, 2, i, j) for n, _, i, j in units], seeds=found.values * 0.5)
    assert_close(found.images, channel.images)
    assert torch.equal(found.fields, channel.fields)
    assert torch.equal(found.boxes, channel.boxes)
    assert found.report == channel.report


def test_windows_give_the_projections_of_whole_images(model):
    units = strongest_units(Projector(model), 1)
    local = Projector(model)
    found = local.by_method(X, "concepts", units)
    assert any(plan is not None for plan in local.backend.cnn._plans.values())
    for method, expected in Projector(model, local=False).by_method(X, "concepts", units).items():
        assert_close(found[method].images, expected.images)
        for key in ("fields", "boxes"):
            assert torch.equal(getattr(found[method], key), getattr(expected, key))


def test_the_field_of_a_concept_holds_every_pixel_that_its_pattern_sees(model):
    projector = Projector(model, method="gradient")
    info = next(info for info in projector.layers(X) if info.name == "concepts")
    below = next(info for info in projector.layers(X) if info.name == "4")
    assert info.field == tuple(side + 2 * 2 for side in below.field)
    found = projector(X, "concepts", strongest_units(projector))
    for image, (top, left, bottom, right), unit, field in zip(
        found.images, found.boxes.tolist(), found.units.tolist(), found.fields.tolist(), strict=True
    ):
        outside = image.clone()
        outside[:, top:bottom, left:right] = 0
        assert not outside.any()
        starts = [int(info.starts(axis)[unit[2 + axis]]) for axis in (0, 1)]
        assert field == [*starts, *(s + f for s, f in zip(starts, info.field, strict=True))]


def test_deconv_is_left_out_where_it_shows_the_same_in_every_image(model):
    assert Projector(model).methods_of(X, "concepts") == ("deconv", "guided")
    unpooled = concept_model()
    unpooled.base[2] = nn.AvgPool2d(2)
    assert Projector(unpooled).methods_of(X, "concepts") == ("guided",)
    assert Projector(unpooled).methods_of(X, "4") == ("guided", "deconv")


def test_channels_contribute_what_their_product_with_the_filter_says(model):
    projector = Projector(model)
    units = strongest_units(projector)
    values = projector(X, "concepts", units).values
    found = projector.contributions(X, "concepts", units, "4")
    assert found.shape == (len(units), CHANNELS)
    assert_close(found.sum(1), values)
    assert not projector.contributions(X, "concepts", units, "1").any()


def test_the_control_shuffles_the_network_and_the_dictionary(model):
    control = shuffled_control(model, X)
    filters, shuffled = model.dictionary.layer(1).filters, control.dictionary.layer(1).filters
    assert not torch.equal(filters, shuffled)
    assert_close(filters.flatten(1).sort(1).values, shuffled.flatten(1).sort(1).values)
    assert not torch.equal(model.base[0].weight, control.base[0].weight)
    assert (Projector(control).responses(X, ["concepts"])["concepts"] > 0).any()


def test_a_dictionary_of_images_and_layers_that_do_not_exist_are_refused(model):
    with pytest.raises(ValueError, match="the dictionary takes images"):
        ConceptModel(network(), "4", DeconvNet([LayerSettings(2, 3)]))
    with pytest.raises(ValueError, match="layer '44': no such layer"):
        Projector(ConceptModel(network(), "44", model.dictionary)).layers(X)
    with pytest.raises(ValueError, match="concepts has 6 maps of 14x14"):
        Projector(model)(X, "concepts", [(0, 6, 0, 0)])
