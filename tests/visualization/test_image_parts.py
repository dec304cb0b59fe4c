"""The parts of one image: what they explain, where they lie and what supports them."""

import pytest
import torch
from torch.testing import assert_close

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.visualization import (
    PixelFeatures,
    image_parts,
    image_parts_picture,
    project_activations,
    strongest_activations,
)
from deconvnet.visualization.pictures.image_parts import (
    CHILDREN,
    count_explaining,
    cut_fields,
    energy_boxes,
    explained,
    family_tree,
    separate_fields,
    square_boxes,
    together,
)
from deconvnet.visualization.projection.feature_projection import layer_field, project_fields

FAST = SolverSettings(method="fista", iterations=15)


def network(image, boundary="valid"):
    layers = [
        LayerSettings(4, 5, lam=5.0, pool=[1, 2, 2], boundary=boundary, solver=FAST),
        LayerSettings(6, 3, lam=20.0, pool=[2, 2, 2], boundary=boundary, solver=FAST),
        LayerSettings(5, 3, lam=20.0, solver=FAST),
    ]
    net = DeconvNet(layers, PreprocessingSettings(color="rgb", steps=["mean"]), seed=0).double()
    net.preprocessing.fit(image)
    for layer, scale in zip(net.layers, (1.0, 0.7, 1.9), strict=True):
        layer.scale.fill_(scale)
    return net


@pytest.fixture(scope="module")
def coded(textures):
    """(net, codes of one image, image)."""
    image = textures(1, 3, 30, 36).double()
    net = network(image)
    return net, net.infer(image), image[0]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fields_that_are_projected_together_equal_those_projected_alone(coded, layer):
    net, codes, _ = coded
    units = strongest_activations(codes, layer, 40)
    found = separate_fields(net, codes, layer, units)
    alone = project_fields(net, codes, layer, units.positions, units.values, units.values)
    assert found.boxes.tolist() == alone.boxes.tolist()
    assert_close(found.tiles, alone.tiles, rtol=0, atol=1e-12)
    assert torch.equal(found.values, alone.values)


@pytest.mark.parametrize("boundary", ["circular", "zero"])
def test_fields_at_other_borders_equal_those_projected_alone(textures, boundary):
    image = textures(1, 3, 16, 16).double()
    net = network(image, boundary)
    codes = net.infer(image, depth=2)
    for layer in (1, 2):
        units = strongest_activations(codes, layer, 10)
        alone = project_fields(net, codes, layer, units.positions, units.values, units.values)
        found = separate_fields(net, codes, layer, units)
        assert_close(found.tiles, alone.tiles, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_shares_of_the_parts_are_what_their_sums_explain(coded, layer):
    net, codes, _ = coded
    parts = image_parts(net, codes, layer, count=4, share=2.0)
    assert 2 <= len(parts) <= 4 and not parts.complete
    whole = net.operator(codes, layer)(codes.layer(layer).z)[0]
    images = project_activations(net, codes, layer, parts.units)
    for n in range(len(parts)):
        rest = (whole - images[: n + 1].sum(0)).square().sum() / whole.square().sum()
        assert float(parts.shares[n]) == pytest.approx(1 - float(rest), abs=1e-9)
    assert (parts.shares.diff() > 0).all()


def test_parts_are_of_different_maps_and_places_and_lie_inside_the_image(coded):
    net, codes, image = coded
    parts = image_parts(net, codes, 1, count=100)
    field = layer_field(net, 1, 0)
    corners = parts.fields.boxes[:, 1:3]
    assert len(set(parts.units.maps.tolist())) == len(parts) > 2
    assert (corners >= 0).all() and (corners + field.size <= torch.tensor([30, 36])).all()
    distance = (corners[:, None] - corners).abs().amax(2) + 100 * torch.eye(len(parts)).long()
    assert distance.min() >= field.size / 2


def test_the_first_part_explains_more_than_any_other_of_the_strongest_of_each_map(coded):
    net, codes, _ = coded
    first = image_parts(net, codes, 1, count=1)
    whole = net.operator(codes, 1)(codes.layer(1).z)
    z = codes.layer(1).z[0]
    best = 0.0
    for k in range(len(z)):  # 5x5 filters inside the image
        inside = z[k, 4:-4, 4:-4]
        i, j = divmod(int(inside.abs().argmax()), inside.shape[1])
        painted = torch.zeros_like(whole)
        painted[0, :, i : i + 5, j : j + 5] = inside[i, j] * net.layer(1).filters[k]
        best = max(best, explained(whole, painted))
    assert float(first.shares[0]) >= best > 0


def test_parts_stop_at_half_of_the_energy(coded):
    net, codes, _ = coded
    few = image_parts(net, codes, 3, share=0.05)
    assert few.complete and few.shares[-1] >= 0.05
    assert len(few) == 1 or few.shares[-2] < 0.05


def test_the_number_of_strongest_activations_with_half_of_the_energy_is_the_least(coded):
    net, codes, _ = coded
    whole = net.operator(codes, 2)(codes.layer(2).z)
    number = count_explaining(net, codes, 2, 0.5)
    shares = [
        explained(whole, together(net, codes, 2, strongest_activations(codes, 2, n)))
        for n in (number - 1, number)
    ]
    assert shares[0] < 0.5 <= shares[1]


def test_the_family_tree_has_for_each_activation_those_below_that_explain_it_best(coded):
    net, codes, _ = coded
    units = strongest_activations(codes, 3, 2)
    tree = family_tree(net, codes, 3, units)
    assert [generation.layer for generation in tree] == [2, 1]
    above, places = units, [0, 1]
    for generation in tree:
        assert len(generation.units) <= CHILDREN * len(above)
        assert sorted(set(generation.places.tolist())) == generation.places.tolist()
        for number, place in enumerate(places):
            own = generation.units[generation.places // CHILDREN == place]
            whole = together(net, codes, generation.layer + 1, above[number : number + 1])
            shares = [
                explained(whole, together(net, codes, generation.layer, own[:n]))
                for n in range(1, len(own) + 1)
            ]
            assert shares == sorted(shares) and shares[0] > 0
        above, places = generation.units, generation.places.tolist()
    assert family_tree(net, codes, 1, strongest_activations(codes, 1, 2)) == []


def test_a_box_holds_most_of_the_energy_and_is_as_small_as_its_rows_and_columns_allow():
    tiles = torch.zeros(2, 1, 9, 9)
    tiles[0, 0, 2:4, 5] = 1.0
    tiles[1, 0, 4, 1:8] = 1.0
    tiles[1, 0, 0, 0] = 0.1  # a thousandth of the energy
    features = PixelFeatures(tiles, torch.tensor([[0, 10, 20, 9], [0, -2, 3, 9]]), torch.ones(2))
    assert energy_boxes(features, (40, 40)).tolist() == [[12, 25, 14, 26], [2, 4, 3, 11]]


def test_cut_fields_are_those_of_the_projections(coded):
    net, codes, image = coded
    units = strongest_activations(codes, 2, 6)
    fields = separate_fields(net, codes, 2, units)
    boxes = square_boxes(energy_boxes(fields, (30, 36)), (30, 36))
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert (sizes == sizes[0]).all() and (boxes >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([30, 36])).all()
    images = project_activations(net, codes, 2, units)
    tiles = cut_fields(fields, boxes)
    for tile, whole, (top, left, bottom, right) in zip(tiles, images, boxes.tolist(), strict=True):
        assert_close(tile, whole[:, top:bottom, left:right], rtol=0, atol=1e-12)


def test_the_image_has_a_frame_around_each_part(coded):
    net, codes, image = coded
    page = image_parts_picture(net, codes, image, 1)
    parts = image_parts(net, codes, 1)
    scale = 397 / 36
    top, left, bottom, _ = energy_boxes(parts.fields, (30, 36))[0].tolist()
    column = round(left * scale) - 1
    middle = 20 + round((top + bottom) / 2 * scale)
    blue = torch.tensor([0, 0x72, 0xB2]) / 255
    around = page[:, middle, column - 2 : column + 3]
    assert ((around - blue[:, None]).abs().amax(0) < 0.02).any()
