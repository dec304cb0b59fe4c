"""Pictures: complete grids, and features that are projections of the network."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.metrics import snr
from deconvnet.visualization import (
    Activations,
    PixelFeatures,
    filter_grid,
    image_parts_picture,
    layer_pictures,
    pixel_features,
    project_activations,
    strongest_activations,
    supporting_activations,
)
from deconvnet.visualization.drawing.canvas import (
    HAIRLINE,
    LINE,
    PAGE,
    paragraph,
    plain_number,
    quantile_magnitude,
    resize_tiles,
    shade_signed,
    tile_grid,
)
from deconvnet.visualization.drawing.sheet import (
    CARD,
    CARD_HEIGHT,
    MOST_CARDS,
    PAGE_HEIGHT,
    Sheet,
    cut_into_cards,
)
from deconvnet.visualization.pictures.active_positions import active_map_sheet
from deconvnet.visualization.pictures.image_decomposition import supporting_maps
from deconvnet.visualization.pictures.image_parts import image_parts
from deconvnet.visualization.pictures.layer_pictures import (
    LABEL,
    labelled_images,
    layer_cards,
    map_grid,
    reconstruction_picture,
)
from deconvnet.visualization.pictures.parts_picture import draw_parts
from deconvnet.visualization.projection.feature_projection import layer_field

FAST = SolverSettings(iterations=20)
GAP = 3


def network(images, pool=(1, 2, 2), *, color="rgb", boundaries=("valid", "valid"), seed=0):
    layers = [
        LayerSettings(
            4,
            5,
            lam=5.0,
            pool=None if pool is None else list(pool),
            boundary=boundaries[0],
            solver=FAST,
        ),
        LayerSettings(6, 3, lam=20.0, boundary=boundaries[1], solver=FAST),
    ]
    net = DeconvNet(layers, PreprocessingSettings(color=color, steps=["mean"]), seed=seed)
    net.preprocessing.fit(images)
    return net


@pytest.fixture(scope="module")
def images(textures):
    return textures(4, 3, 30, 36)


@pytest.fixture(scope="module", params=["maps", "image"])
def three_layers(request, images):
    """(net, codes of one image, image): three layers, pooled after inference or in its loop."""
    loop = {"target": "image", "pooling": "in_loop"} if request.param == "image" else {}
    solver = SolverSettings(method="fista", iterations=20)
    layers = [
        LayerSettings(4, 5, lam=5.0, pool=[2, 2, 2], solver=solver, **loop),
        LayerSettings(6, 3, lam=20.0, pool=[1, 2, 2], solver=solver, **loop),
        LayerSettings(5, 3, lam=20.0, solver=solver, target=loop.get("target", "maps")),
    ]
    net = DeconvNet(layers, PreprocessingSettings(color="ycbcr", steps=["mean"]), seed=0).double()
    net.preprocessing.fit(images.double())
    for layer, scale in zip(net.layers, (1.0, 0.7, 1.9), strict=True):
        layer.scale.fill_(scale)
    return net, net.infer(images[1:2]), images[1]


def tiles_of(page, h, w, columns, count):
    """The tiles of a page, cut out by hand."""
    for k in range(count):
        top, left = GAP + k // columns * (h + GAP), GAP + k % columns * (w + GAP)
        yield page[:, top : top + h, left : left + w]


@pytest.mark.parametrize(
    ("count", "columns"), [(1, None), (3, None), (9, None), (24, None), (5, 2)]
)
def test_a_grid_has_room_for_every_tile_and_shows_it_unsmoothed(count, columns):
    tiles = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    page = tile_grid(tiles, columns=columns, tile_width=15)
    h, w = 4 * 3, 5 * 3
    columns = columns or (page.shape[2] - GAP) // (w + GAP)
    rows = -(-count // columns)
    assert page.shape == (3, rows * (h + GAP) + GAP, columns * (w + GAP) + GAP)
    for shown, tile in zip(tiles_of(page, h, w, columns, count), tiles, strict=True):
        assert torch.equal(shown[:, 1::3, 1::3], tile)
        assert torch.equal(shown, tile.repeat_interleave(3, 1).repeat_interleave(3, 2))
    # A hairline around each tile; all else is paper.
    lines = 3 * count * 2 * (h + w + 2)
    paper = page.numel() - 9 * tiles.numel() - lines
    expected = paper + HAIRLINE * lines + 9 * tiles.sum().item()
    assert page.sum().item() == pytest.approx(expected, rel=1e-5)


def test_a_page_is_never_too_wide_for_a_screen():
    for count, columns in ((150, None), (6, 6), (500, None)):
        page = tile_grid(torch.rand(count, 3, 270, 270), columns=columns)
        assert PAGE / 2 < page.shape[2] <= PAGE
    stripes = torch.zeros(10, 3, 1000, 1000)
    stripes[..., ::2] = 1.0
    page = tile_grid(stripes, columns=10)
    (tile, *_) = tiles_of(page, 156, 156, 10, 10)
    assert_close(tile[:, 2:-2, 2:-2], torch.full((3, 152, 152), 0.5), rtol=0, atol=0.05)


def test_the_magnitude_of_a_tile_is_a_quantile_of_its_non_zero_values():
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(6, 3, 5, 4, generator=generator)
    tiles[tiles.abs() < 0.3] = 0
    tiles[4], tiles[5] = 0, 0
    tiles[5, 0, 0, 0] = -7
    for quantile in (0.5, 0.98, 0.995, 1.0):
        expected = []
        for tile in tiles.numpy():
            values = np.sort(np.abs(tile[tile != 0]))
            expected.append(values[int(quantile * (len(values) - 1))] if len(values) else 1)
        assert quantile_magnitude(tiles, quantile).flatten().tolist() == expected


def test_a_few_bright_pixels_do_not_leave_a_tile_grey():
    f = torch.zeros(2, 1, 20, 20)
    f[0, 0, :, 10:] = torch.linspace(-1, 1, 200).view(20, 10)
    f[0, 0, 3, 12] = 50.0
    assert (
        quantile_magnitude(f)[0] == pytest.approx(1.0, abs=0.02) and quantile_magnitude(f)[1] == 1
    )
    shown = shade_signed(f, quantile_magnitude(f))
    assert_close(shown + shade_signed(-f, quantile_magnitude(f)), torch.ones_like(shown))
    assert shown[0].amax() == 1 and shown[0].amin() < 0.01 and (shown[1] == 0.5).all()


@pytest.mark.parametrize("side", [3, 11, 40, 64, 75, 92, 111, 139, 140, 211])
def test_a_resized_tile_fills_most_of_its_room_and_keeps_its_range(side):
    tiles = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
    tiles[1] *= 1e-3
    resized = resize_tiles(tiles, 140)
    assert 112 <= resized.shape[2] == resized.shape[3] <= 140
    for tile, big in zip(tiles, resized, strict=True):
        assert tile.min() <= big.min() and big.max() <= tile.max()
    if 140 // side * side >= 112:
        zoom = 140 // side
        assert torch.equal(resized[:, :, ::zoom, ::zoom], tiles)


def test_numbers_are_written_plainly_and_texts_fit_their_width():
    numbers = {1347.2: "1347", 999.7: "1000", 52.31: "52.3", 8.8249: "8.82", 0.0718: "0.0718"}
    for value, text in numbers.items():
        assert plain_number(value) == text and plain_number(-value) == f"-{text}"
    assert plain_number(0.0) == "0"
    short, long = (paragraph("word " * n, 300) for n in (2, 60))
    assert short.shape[2] == long.shape[2] == 300 and long.shape[1] > 3 * short.shape[1]
    assert (long[:, :, -3:] == 1).all(), "a line is cut at the right"


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_are_shown_about_grey_each_by_its_own_largest_magnitude(channels):
    f = torch.randn(6, channels, 7, 7, generator=torch.Generator().manual_seed(0))
    f = f * torch.tensor([1.0, 1e-4, 100.0, 1.0, 1.0, 0.0]).view(-1, 1, 1, 1)
    page, negative = filter_grid(f, columns=3), filter_grid(-f, columns=3)
    assert page.shape[0] == 3 and page.min() >= 0 and page.max() <= 1
    tiles = list(tiles_of(page, 42, 42, 3, 6))
    for tile, opposite in zip(tiles, tiles_of(negative, 42, 42, 3, 6), strict=True):
        assert_close(tile + opposite, torch.ones_like(tile))
    for tile, filter in zip(tiles[:5], f, strict=False):
        assert (tile - 0.5).abs().max() == pytest.approx(0.5)
        shape = filter.expand(3, -1, -1) / filter.abs().max()
        assert_close(tile[:, ::6, ::6], 0.5 + 0.5 * shape)
    assert (tiles[5] == 0.5).all()


def test_the_maps_of_an_image_share_one_scale_and_no_value_is_lost():
    z = torch.zeros(4, 88, 88)
    z[0, 3, 4], z[1, 5, 6], z[2, 7, 8] = 4.0, -2.0, -4.0
    page = map_grid(z, columns=2)
    assert page.min() >= 0 and page.max() <= 1
    tiles = list(tiles_of(page, 44, 44, 2, 4))
    assert (tiles[0][:, 1, 2] == 1).all() and (tiles[2][:, 3, 4] == 0).all()
    assert (tiles[1][:, 2, 3] < 0.5).all() and (tiles[3] == 0.5).all()
    for tile in tiles[:3]:
        assert ((tile != 0.5).sum((1, 2)) == 1).all()


def test_maps_that_are_all_zero_are_all_grey():
    page = map_grid(torch.zeros(1, 88, 88))
    assert (page[:, GAP:-GAP, GAP:-GAP] == 0.5).all()


def test_the_features_of_the_first_layer_are_its_filters_with_the_sign_of_the_activation(images):
    net = network(images)
    codes = net.infer(images, depth=1)
    features = pixel_features(net, codes, 1)
    assert features.tiles.shape == (4, 3, 5, 5) and features.boxes.shape == (4, 4)
    expected = net.layer(1).filters * features.values.sign().view(-1, 1, 1, 1)
    inside = (features.boxes[:, 1] >= 0) & (features.boxes[:, 2] >= 0)
    inside &= (features.boxes[:, 1] + 5 <= 30) & (features.boxes[:, 2] + 5 <= 36)
    assert inside.all()
    assert_close(features.tiles, expected, rtol=0, atol=1e-6)


def test_a_feature_is_that_of_the_strongest_activation_inside_the_image(images):
    net = network(images)
    codes = net.infer(images, depth=1)
    features = pixel_features(net, codes, 1)
    # Positions of the maps whose 5x5 filter lies wholly inside the image.
    z = codes.layer(1).z[:, :, 4:-4, 4:-4]
    assert z.shape[2:] == (26, 32)
    assert torch.equal(features.values.abs(), z.abs().amax((0, 2, 3)))
    for k, (n, top, left, side) in enumerate(features.boxes.tolist()):
        assert side == 5 and codes.layer(1).z[n, k, top + 4, left + 4] == features.values[k]


SHAPES = {
    "pooled": ((1, 2, 2), ("valid", "valid")),
    "pooled over maps": ((2, 3, 3), ("valid", "valid")),
    "not pooled": (None, ("valid", "valid")),
    "pooled in columns more": ((1, 2, 4), ("valid", "valid")),
    "pooled in rows more": ((1, 4, 2), ("valid", "valid")),
    "circular": ((1, 2, 2), ("circular", "circular")),
    "circular above": ((1, 2, 2), ("valid", "circular")),
    "circular below": ((1, 2, 2), ("circular", "valid")),
}


@pytest.mark.parametrize(("pool", "boundaries"), SHAPES.values(), ids=SHAPES)
def test_a_feature_of_the_second_layer_is_the_projection_of_its_activation_alone(
    images, pool, boundaries
):
    net = network(images, pool, boundaries=boundaries)
    codes = net.infer(images)
    features = pixel_features(net, codes, 2)
    z, inside = codes.layer(2).z, 0
    for k, (n, top, left, side) in enumerate(features.boxes.tolist()):
        places = torch.nonzero(z[n, k] == features.values[k])
        assert len(places) == 1
        one = torch.zeros_like(z[:1])
        one[0, k, places[0, 0], places[0, 1]] = features.values[k].sign()
        painted = net.operator(codes.select(torch.tensor([n])), 2)(one)[0]
        assert painted.any()
        if top < 0 or left < 0 or top + side > 30 or left + side > 36:
            continue
        inside += 1
        box = painted[:, top : top + side, left : left + side]
        assert_close(features.tiles[k], box, rtol=0, atol=1e-6)
        rest = painted.clone()
        rest[:, top : top + side, left : left + side] = 0
        assert not rest.any()
    assert inside >= 3


def test_a_feature_at_the_border_is_padded_with_zeros(images):
    net = network(images, None)
    codes = net.infer(images, depth=1)
    z = codes.layer(1).z
    z.zero_()
    z[2, 0, 1, 3] = -2.0  # the filter's top left corner at row 1 - 4 and column 3 - 4
    z[1, 1, 33, 39] = 1.0  # and at row 29 and column 35: one pixel is left
    features = pixel_features(net, codes, 1)
    f = net.layer(1).filters
    assert features.boxes.tolist()[:2] == [[2, -3, -1, 5], [1, 29, 35, 5]]
    expected = torch.zeros(2, 3, 5, 5)
    expected[0, :, 3:, 1:] = -f[0, :, 3:, 1:]
    expected[1, :, 0, 0] = f[1, :, 0, 0]
    assert_close(features.tiles[:2], expected, rtol=0, atol=1e-6)
    patches = features.patches(images)
    assert not patches[0, :, :3].any() and not patches[0, :, :, 0].any()
    assert torch.equal(patches[0, :, 3:, 1:], images[2, :, :2, :4])


def test_maps_that_are_never_active_have_empty_tiles(images):
    net = network(images)
    net.layer(2).filters[3] = 0
    net.layer(2).filters[5] = 0
    features = pixel_features(net, net.infer(images), 2)
    dead = [k for k in range(6) if not features.tiles[k].any()]
    assert dead == [3, 5] and features.values[dead].tolist() == [0, 0]


@pytest.mark.parametrize("chunk", [1, 3])
def test_features_do_not_depend_on_the_chunk_size(images, chunk, monkeypatch):
    net = network(images)
    codes = net.infer(images)
    # The same image twice: of equal activations the first.
    codes = codes.select(torch.tensor([0, 1, 2, 3, 1, 0]))
    for layer in (1, 2):
        expected = pixel_features(net, codes, layer)
        monkeypatch.setattr("deconvnet.visualization.projection.feature_projection.CHUNK", chunk)
        found = pixel_features(net, codes, layer)
        monkeypatch.undo()
        assert torch.equal(found.boxes, expected.boxes)
        assert torch.equal(found.values, expected.values)
        assert_close(found.tiles, expected.tiles, rtol=0, atol=1e-6)
        assert found.boxes[:, 0].max() < 4


def squares(image, boxes, inner):
    """Tiles of random numbers in a square of side `inner` of images of ones; zeros elsewhere."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.zeros(len(boxes), 2, 11, 11)
    first = (11 - inner) // 2
    inside = slice(first, first + inner)
    tiles[:, :, inside, inside] = torch.randn(len(boxes), 2, inner, inner, generator=generator)
    return PixelFeatures(tiles, torch.tensor(boxes), torch.ones(len(boxes)))


def test_tiles_are_cropped_to_the_energy_of_most_of_them():
    boxes = [[k % 3, 4 + k % 7, 3 + k % 5, 11] for k in range(20)]
    found = squares((30, 30), boxes, 5)
    found.tiles[7] = torch.randn(2, 11, 11)  # one in twenty needs more room
    found.tiles[9] = 0  # and one says nothing
    cropped = found.cropped((30, 30))
    assert cropped.tiles.shape == (20, 2, 5, 5)
    assert torch.equal(cropped.tiles, found.tiles[:, :, 3:8, 3:8])
    assert cropped.boxes.tolist() == [[n, t + 3, left + 3, 5] for n, t, left, _ in boxes]
    assert torch.equal(cropped.values, found.values)
    assert found.cropped((30, 30), energy_share=1.0, tile_share=1.0).tiles.shape[2] == 11


def test_cropped_tiles_lie_in_the_image_and_keep_their_pixels():
    image, boxes = (13, 9), [[0, -6, 2, 11], [1, 5, -2, 11], [0, 8, 5, 11], [1, 1, -1, 11]]
    painted = torch.randn(4, 2, *image, generator=torch.Generator().manual_seed(0))
    tiles = torch.zeros(4, 2, 11, 11)
    for k, (_, top, left, _) in enumerate(boxes):
        for i in range(11):
            for j in range(11):
                if 0 <= top + i < 13 and 0 <= left + j < 9:
                    tiles[k, :, i, j] = painted[k, :, top + i, left + j]
    found = PixelFeatures(tiles, torch.tensor(boxes), torch.ones(4)).cropped(
        image, energy_share=1.0, tile_share=1.0
    )
    assert found.tiles.shape == (4, 2, 9, 9)
    photographs = torch.arange(2 * 13 * 9).view(2, 1, 13, 9).float()
    assert [row[1:] for row in found.boxes.tolist()] == [[0, 0, 9], [4, 0, 9], [4, 0, 9], [2, 0, 9]]
    for k, (n, top, left, side) in enumerate(found.boxes.tolist()):
        patch = found.patches(photographs)[k]
        assert torch.equal(patch, photographs[n, :, top : top + side, left : left + side])
        here = painted[k, :, top : top + side, left : left + side].clone()
        reached = torch.zeros(13, 9)
        _, first, second, _ = boxes[k]
        reached[max(first, 0) : first + 11, max(second, 0) : second + 11] = 1
        here *= reached[top : top + side, left : left + side]
        assert torch.equal(found.tiles[k], here)


def test_cropped_features_keep_their_energy(images):
    net = network(images)
    features = pixel_features(net, net.infer(images), 2)
    cropped = features.cropped((30, 36), energy_share=0.6)
    side = cropped.tiles.shape[2]
    assert 1 < side < features.tiles.shape[2] and (cropped.boxes[:, 3] == side).all()
    energy = [f.tiles.square().sum((1, 2, 3)) for f in (cropped, features)]
    assert (energy[0] >= 0.6 * energy[1]).float().mean() >= 0.9
    corners = cropped.boxes[:, 1:3]
    assert (corners >= 0).all() and (corners + side <= torch.tensor([30, 36])).all()


def test_the_strongest_activations_of_an_image_are_sorted_by_magnitude(three_layers):
    net, codes, _ = three_layers
    for layer in (1, 2, 3):
        z = codes.layer(layer).z[0]
        units = strongest_activations(codes, layer, 7)
        expected = sorted(z[z != 0].tolist(), key=abs, reverse=True)
        assert units.values.tolist() == expected[:7]
        assert torch.equal(z[units.maps, units.rows, units.columns], units.values)
        everything = strongest_activations(codes, layer, z.numel())
        assert everything.values.tolist() == expected and len(everything) < z.numel()


def test_the_parts_of_an_image_add_up_to_its_reconstruction(three_layers):
    net, codes, _ = three_layers
    for layer in (1, 2, 3):
        units = strongest_activations(codes, layer, 100_000)
        made = net.operator(codes, layer)(codes.layer(layer).z)
        parts = project_activations(net, codes, layer, units)
        assert parts.shape == (len(units), *made.shape[1:]) and len(units) > 20
        assert_close(parts.sum(0), made[0], rtol=0, atol=1e-5 * float(made.abs().max()))


def test_an_activation_is_the_sum_of_all_supporting_activations_in_any_lower_layer(three_layers):
    net, codes, _ = three_layers
    for layer in (2, 3):
        unit = strongest_activations(codes, layer, 3)[1:2]
        whole = project_activations(net, codes, layer, unit)
        everything = supporting_activations(net, codes, layer, unit, counts=(100_000,) * 5)
        assert len(everything) == layer - 1
        for level, units in zip(range(layer - 1, 0, -1), everything, strict=True):
            together = project_activations(net, codes, level, units).sum(0, keepdim=True)
            assert_close(together, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_supporting_activations_are_the_strongest_entries_of_the_supporting_maps(three_layers):
    net, codes, _ = three_layers
    unit = strongest_activations(codes, 3, 1)
    found = supporting_activations(net, codes, 3, unit, counts=(5, 25))
    everything = supporting_activations(net, codes, 3, unit, counts=(100_000, 100_000))
    # By hand: one activation through F_3, S_3 and the switches of layer 2.
    z = torch.zeros_like(codes.layer(3).z)
    z[0, unit.maps, unit.rows, unit.columns] = unit.values
    pooled = 1.9 * net.layer(3).operator()(z)
    below = torch.zeros(codes.layer(2).shape, dtype=z.dtype).flatten()
    below[codes.layer(2).switches.flatten()] = pooled.flatten()
    below = below.view(codes.layer(2).shape)
    top = everything[0]
    assert_close(below[top.maps, top.rows, top.columns], top.values)
    assert torch.count_nonzero(below) == len(top)
    for kept, all_of_them, count in zip(found, everything, (5, 25), strict=True):
        assert len(kept) == count < len(all_of_them)
        for name in ("maps", "rows", "columns", "values"):
            assert torch.equal(getattr(kept, name), getattr(all_of_them, name)[:count])
    assert [tuple(z.shape) for z in supporting_maps(net, codes, 3, unit)] == [
        codes.layer(2).shape,
        codes.layer(1).shape,
    ]
    assert supporting_activations(net, codes, 1, strongest_activations(codes, 1, 1)) == []


def test_parts_need_one_image_and_supporting_activations_need_one_activation(images):
    net = network(images)
    codes = net.infer(images)
    with pytest.raises(ValueError, match="4 images"):
        strongest_activations(codes, 2, 3)
    one = codes.select(slice(0, 1))
    with pytest.raises(ValueError, match="2 activations"):
        supporting_activations(net, one, 2, strongest_activations(one, 2, 2))
    none = torch.zeros(0, dtype=torch.long)
    nothing = project_activations(net, one, 2, Activations(none, none, none, torch.zeros(0)))
    assert nothing.shape == (0, 3, 30, 36)


def test_the_picture_of_the_parts_has_a_row_for_every_layer_below(three_layers):
    net, codes, image = three_layers
    heights = []
    for layer in (1, 2, 3):
        page = image_parts_picture(net, codes, image, layer)
        assert page.isfinite().all() and page.min() >= 0 and page.max() <= 1
        assert page.shape[0] == 3 and page.shape[2] == PAGE
        # Hardly a row or a column is empty.
        assert (page == 1).all((0, 1)).double().mean() < 0.03
        assert (page == 1).all((0, 2)).double().mean() < 0.2
        heights.append(page.shape[1])
    assert heights[0] < heights[1] < heights[2]


def test_the_picture_of_the_parts_of_a_silent_layer_is_the_image(three_layers):
    net, codes, image = three_layers
    full = image_parts_picture(net, codes, image, 3)
    z = codes.layer(3).z
    before = z.clone()
    z.zero_()
    page = image_parts_picture(net, codes, image, 3)
    z.copy_(before)
    assert page.isfinite().all() and page.shape[1] < 400
    # What preprocessing makes of the image stands where it always stands.
    assert torch.equal(page[:, 20:340, 401:800], full[:, 20:340, 401:800])


def test_the_picture_of_the_parts_shows_the_image_that_is_reconstructed_best(images):
    net = network(images)
    codes = net.infer(images)
    made = net.operator(codes, 2)(codes.layer(2).z)
    best = max(range(4), key=lambda n: snr(codes.y[n], made[n]))
    expected = image_parts_picture(net, codes.select(torch.tensor([best])), images[best], 2)
    assert torch.equal(layer_pictures(net, codes, images, 2)["layer2/parts"], expected)


def test_labelled_images_share_the_scale_of_the_first_row(images):
    net = network(images)
    y = net.infer(images, depth=0).y
    page = labelled_images(net, [("one", y), ("half of it", 0.5 * y)])
    zoom, left = round(96 / 36), 110 + GAP
    rows = page[:, GAP::zoom, left : left + 36 * zoom : zoom]
    first, second = (
        rows[:, :30],
        page[:, 30 * zoom + 3 * GAP :: zoom, left : left + 36 * zoom : zoom],
    )
    expected = (0.5 + 0.5 * y[0] / (3 * y.std())).clamp(0, 1)
    assert_close(first, expected, rtol=0, atol=1e-6)
    inside = (expected > 0) & (expected < 1)
    assert_close((second[:, :30] - 0.5)[inside], 0.5 * (expected - 0.5)[inside], rtol=0, atol=1e-6)


def test_patches_are_cropped_from_the_images_at_the_boxes(images):
    net = network(images)
    features = pixel_features(net, net.infer(images), 2)
    patches = features.patches(images)
    assert patches.shape == features.tiles.shape
    for patch, (n, top, left, side) in zip(patches, features.boxes.tolist(), strict=True):
        for i in range(side):
            for j in range(side):
                row, column = top + i, left + j
                within = 0 <= row < 30 and 0 <= column < 36
                expected = images[n, :, row, column] if within else torch.zeros(3)
                assert torch.equal(patch[:, i, j], expected)


def test_features_change_neither_the_codes_nor_the_network(images):
    net = network(images)
    codes = net.infer(images)
    before = [layer.z.clone() for layer in codes.layers]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layer_pictures(net, codes, images, 2)
    for layer, z in zip(codes.layers, before, strict=True):
        assert torch.equal(layer.z, z)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("color", ["rgb", "grey", "ycbcr"])
@pytest.mark.parametrize("planes", [1, 3])
def test_every_layer_has_its_pictures_in_the_range_of_pixels(images, color, planes):
    shown = images[:, :planes]
    net = network(shown, color=color)
    codes = net.infer(shown)
    names = set()
    for number in (1, 2):
        for name, picture in layer_pictures(net, codes, shown, number).items():
            names.add(name)
            assert picture.ndim == 3 and picture.shape[0] == 3, name
            assert picture.min() >= 0 and picture.max() <= 1, name
            assert picture.std() > 0.01, name
    expected = {f"layer{n}/{kind}" for n in (1, 2) for kind in ("filters", "reconstructed", "maps")}
    assert names == {*expected, "layer2/patches", "layer2/parts"}


def test_filters_of_a_ycbcr_network_are_shown_in_their_colours(images):
    net = network(images, color="ycbcr")
    f = torch.zeros(4, 3, 5, 5)
    f[0, 0], f[1, 1], f[2, 2] = 1.0, 1.0, 1.0
    f[3, 0] = -1.0
    net.layer(1).set_filters(f)
    page = layer_pictures(net, net.infer(images), images, 1)["layer1/filters"]
    # Tiles of 5 x 5, sixteen times as large, each above its number.
    columns = (page.shape[2] + GAP) // (80 + GAP)
    tiles = []
    for k in range(4):
        top, left = k // columns * (80 + LINE + GAP), k % columns * (80 + GAP)
        tiles.append(page[:, top : top + 80, left : left + 80])
        assert (page[:, top + 80 : top + 80 + LINE, left : left + 80] < 0.5).any()
    light, blue, red, dark = (tile[:, 20, 20].tolist() for tile in tiles)
    assert light == pytest.approx([1, 1, 1]) and dark == pytest.approx([0, 0, 0], abs=1e-6)
    assert blue[2] > 0.9 and blue[0] == pytest.approx(0.5, abs=1e-5) and blue[1] < 0.5
    assert red[0] > 0.9 and red[2] == pytest.approx(0.5, abs=1e-5) and red[1] < 0.5


def test_rows_of_reconstructions_start_with_the_original_images(images):
    net = network(images)
    page = reconstruction_picture(net, net.infer(images, depth=1), images)
    # Behind the margin of the labels: the first row, at four times its size.
    left = LABEL + GAP
    first = page[:, : 30 * 4 : 4, left : left + 36 * 4 : 4]
    assert_close(first, images[0], rtol=0, atol=0.5 / 255 + 1e-6)


def test_the_residual_is_what_the_highest_layer_leaves_on_the_scale_of_the_image(images):
    net = network(images)
    codes = net.infer(images)
    page = reconstruction_picture(net, codes, images)
    step, left = 30 * 4 + GAP, LABEL + GAP
    rows = [page[:, n * step : n * step + 120 : 4, left : left + 144 : 4] for n in range(6)]
    _, y, _, second, residual, pixels = ((row - 0.5) for row in rows)
    visible = (y.abs() < 0.5) & (second.abs() < 0.5) & (residual.abs() < 0.5)
    assert visible.float().mean() > 0.9
    assert_close((y - second)[visible], residual[visible], rtol=0, atol=1e-5)
    assert_close(pixels + 0.5, net.reconstruct(codes)[0], rtol=0, atol=1e-6)


def test_every_picture_of_a_layer_has_cards_that_tensorboard_can_show_in_full(images):
    net = network(images)
    drawn = layer_cards(net, net.infer(images), images, 2)
    for name, (_, cards) in drawn.items():
        assert cards and all(card.shape[0] == 3 for card in cards), name
        if name != "layer2/parts":
            assert all(c.shape[1] <= CARD_HEIGHT and c.shape[2] <= CARD for c in cards), name
    assert len(drawn["layer2/reconstructed"][1]) == len(images)


def cells(count, height, width):
    generator = torch.Generator().manual_seed(0)
    return list(torch.rand(count, 3, height, width, generator=generator) / 2)


@pytest.mark.parametrize("count", [1, 4, 11, 60])
def test_the_cards_of_a_sheet_show_every_cell_once_in_order(count):
    sheet = Sheet(cells(count, 30, 70), labels=torch.ones(3, 30, 20), head=torch.ones(3, 9, 70))
    found = []
    for card in sheet.cards():
        assert card.shape[1] <= CARD_HEIGHT and card.shape[2] <= CARD
        for top in range(9 + GAP, card.shape[1], 30 + GAP):
            for left in range(20 + GAP, card.shape[2], 70 + GAP):
                cell = card[:, top : top + 30, left : left + 70]
                found += [] if (cell == 1).all() else [cell]
    assert len(found) == count
    assert all(map(torch.equal, found, sheet.cells))


def test_a_sheet_is_at_most_as_wide_as_a_page_and_has_a_few_cards():
    sheet = Sheet(cells(700, 60, 60))
    assert sheet.picture().shape[2] <= PAGE
    assert len(sheet.cards()) == MOST_CARDS


def test_a_picture_of_a_thousand_maps_shows_the_first_rows_and_says_so():
    sheet = Sheet([torch.full((3, 100, 170), k / 1000) for k in range(1000)])
    picture = sheet.picture()
    assert picture.shape[1] <= PAGE_HEIGHT + LINE
    shown = PAGE_HEIGHT // (100 + GAP) * (PAGE // (170 + GAP))
    assert 300 < shown < 1000
    expected = Sheet(sheet.cells[:shown], title=f"the first {shown} of 1000").picture()
    assert torch.equal(picture, expected)


def test_a_picture_is_cut_into_cards_through_white_only():
    picture = torch.ones(3, 600, 900)
    panels = [(20, 20), (20, 480), (330, 20), (330, 480)]
    for top, left in panels:
        picture[:, top : top + 250, left : left + 400] = 0.25
    whole, *pieces = cut_into_cards(picture)
    assert torch.equal(whole, picture) and len(pieces) == 4
    assert all((piece == 0.25).sum() == 3 * 250 * 400 for piece in pieces)
    assert len(cut_into_cards(picture[:, :280, :430])) == 1
    assert len(cut_into_cards(torch.zeros(3, 600, 900))) == 1


@pytest.mark.parametrize("layer", [1, 2])
def test_a_coefficient_is_marked_at_the_centre_of_its_receptive_field(images, layer):
    net = network(images)
    codes = net.infer(images[:1], depth=layer)
    z = torch.zeros_like(codes.layer(layer).z[0])
    row, column = z.shape[1] // 2, z.shape[2] // 3
    z[2, row, column], z[0, row, column] = -1.0, 0.5
    features = torch.full((len(z), 3, 5, 5), 0.5)
    grey = torch.full((3, *images.shape[2:]), 0.5)
    sheet = active_map_sheet(net, z, grey, grey, features, layer)
    # The image, the same preprocessed, and the two maps that are active, the strongest first.
    assert len(sheet.cells) == 4
    height = round(144 * 30 / 36)
    for cell, hue, other in ((sheet.cells[2], 2, 0), (sheet.cells[3], 0, 2)):
        marked = (cell[hue, :height] - cell[other, :height] > 0.05).nonzero().float()
        centre = (marked.mean(0) + 0.5) * 36 / 144
        for axis, unit in enumerate((row, column)):
            first, last = layer_field(net, layer, axis).pixels(unit)
            assert centre[axis] == pytest.approx((first + last) / 2, abs=0.3)


def test_a_picture_is_written_as_a_png_of_its_pixels(tmp_path):
    picture = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0))
    with Monitor(tmp_path, progress=False) as monitor:
        monitor.start(0)
        monitor.picture("layer1/filters", picture, 0)
        with pytest.raises(ValueError, match="layer2/filters.*not finite"):
            monitor.picture("layer2/filters", picture / 0, 0)
    found = np.asarray(Image.open(tmp_path / "pictures" / "layer1-filters.png"))
    assert found.shape == (8, 9, 3)
    assert np.abs(found / 255 - picture.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    assert not (tmp_path / "pictures" / "layer2-filters.png").exists()


def test_the_picture_of_the_parts_fits_a_narrower_page(three_layers):
    net, codes, image = three_layers
    parts = image_parts(net, codes, 3)
    assert draw_parts(net, codes, image, 3, parts, page=640).shape[2] == 640
