"""The strongest units of some images, and the pictures of projections."""

import io
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deconvnet.storage.ownership import ForeignFileError
from deconvnet.visualization import (
    Normalization,
    Projector,
    find_top_activations,
    project_top_activations,
    strongest,
)
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.projection import projection_picture as drawing
from deconvnet.visualization.search.projection_grids import layer_grid

SCALED = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), order="bgr")


def network(pool=True, channels=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 5, 3),
            nn.ReLU(),
            nn.MaxPool2d(2) if pool else nn.Identity(),
            nn.Conv2d(5, 6, 3),
            nn.ReLU(),
        )


@pytest.fixture(scope="module")
def pixels(textures):
    return textures(5, 3, 24, 26)


def responses(pixels, layer, normalization=SCALED):
    with torch.no_grad():
        return network()[: layer + 1](normalization.apply(pixels))


def test_the_strongest_unit_of_each_map_is_projected_and_the_strongest_comes_first(pixels):
    maps = responses(pixels, 4)
    found = strongest(network(), pixels, "4", k=4, normalization=SCALED)
    expected = sorted(((maps[:, k].max().item(), k) for k in range(6)), reverse=True)[:4]
    assert found.values.tolist() == pytest.approx([value for value, _ in expected])
    assert found.units[:, 1].tolist() == [k for _, k in expected]
    for unit, value in zip(found.units.tolist(), found.values.tolist(), strict=True):
        assert maps[tuple(unit)].item() == pytest.approx(value)


def test_the_strongest_unit_of_one_map_is_projected_in_each_image(pixels):
    maps = responses(pixels, 4)[:, 2].flatten(1).max(1).values
    found = strongest(network(), pixels, "4", k=3, map_index=2, normalization=SCALED)
    order = maps.argsort(descending=True)[:3]
    assert found.units[:, 0].tolist() == order.tolist()
    assert found.values.tolist() == pytest.approx(maps[order].tolist())


def test_the_projection_is_that_of_a_projector(pixels):
    found = strongest(network(), pixels, "4", k=2, normalization=SCALED, method="guided")
    projector = Projector(network(), normalization=SCALED, method="guided")
    expected = projector(SCALED.apply(pixels), "4", found.units)
    assert torch.equal(found.images, expected.images) and found.report == expected.report
    loaded = LoadedModel(network(), "net", "none", SCALED)
    assert torch.equal(strongest(loaded, pixels, "4", k=2).units, found.units)
    assert torch.equal(strongest(projector, pixels, "4", k=2).images, found.images)


def test_images_can_be_files(pixels, tmp_path):
    for n, image in enumerate(pixels[:2]):
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / f"{n}.png")
    found = strongest(network(), tmp_path / "1.png", "4", k=1)
    rounded = (pixels[1] * 255).round() / 255
    assert torch.equal(found.images, strongest(network(), rounded, "4", k=1).images)
    assert strongest(network(), tmp_path, "4", map_index=found.units[0, 1]).units.shape == (2, 4)


def test_units_that_see_padding_are_left_out(pixels):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU())
    found = strongest(model, pixels, "1", k=4)
    assert (found.boxes == found.fields).all()


def test_wrong_input_is_refused_in_one_line(pixels):
    for images, arguments, message in (
        (pixels * 255, {}, "expected pixels in .0, 1."),
        (pixels.byte(), {}, "expected pixels .* use images / 255"),
        (pixels.numpy(), {}, "images are ndarray: expected a file, .*to_tensor converts"),
        (pixels, {"k": 0}, "k=0"),
        (pixels, {"map_index": 6}, "6 maps, numbered from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            strongest(network(), images, "4", **arguments)
    with pytest.raises(ValueError, match="no such layer"):
        strongest(network(), pixels, "conv4")
    silent = network()
    nn.init.constant_(silent[3].weight, 0)
    nn.init.constant_(silent[3].bias, -1)
    with pytest.raises(ValueError, match="no unit of this layer responds"):
        strongest(silent, pixels, "4")


@pytest.mark.parametrize(("pool", "methods"), [(True, ["deconv", "guided"]), (False, ["guided"])])
def test_the_picture_shows_the_projection_the_other_method_and_the_image(pixels, pool, methods):
    found = strongest(network(pool), pixels[:1], "4", k=3, normalization=SCALED)
    assert found.report.method == methods[0]
    page = found.picture()
    assert page.shape[0] == 3 and page.min() >= 0 and page.max() <= 1
    projections = drawing._by_method(found, found.units)
    assert set(projections) == {"deconv", "guided"}
    windows = found.fields
    rows = drawing._rows(found, projections, windows)
    assert list(rows) == [*projections, "image"]
    (top, left, bottom, right), tile = windows[0].tolist(), rows["image"][0]
    zoom = tile.shape[1] // (bottom - top)
    patch = pixels[0, :, top:bottom, left:right]
    torch.testing.assert_close(tile[:, ::zoom, ::zoom], patch, rtol=0, atol=1e-6)


def test_pixels_are_recovered_from_the_input(pixels):
    grey = Normalization(mean=(0.3,), std=(0.2,), order="grey")
    torch.testing.assert_close(SCALED.pixels(SCALED.apply(pixels)), pixels)
    expected = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(grey.pixels(grey.apply(pixels)), expected)


def test_a_projection_is_saved_as_a_picture_and_replaces_no_file_of_the_user(pixels, tmp_path):
    found = strongest(network(), pixels, "4", k=2)
    for _ in range(2):
        found.save(tmp_path / "units.png")
    saved = np.asarray(Image.open(tmp_path / "units.png")) / 255
    assert np.abs(saved - found.picture().permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    shown = np.asarray(Image.open(io.BytesIO(found._repr_png_()))) / 255
    assert (shown == saved).all()
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(ForeignFileError, match="mine.png"):
        found.save(tmp_path / "mine.png")
    with pytest.raises(ValueError, match="ends in .png"):
        found.save(tmp_path / "units.jpg")


def test_many_units_are_drawn_in_rows(pixels):
    units = [(0, k, i, j) for k, i, j in product(range(5), range(3), range(1))]
    projector = Projector(network())
    few, many = (projector(pixels, "1", units[:n]).picture() for n in (9, 15))
    assert many.shape[1] > 1.8 * few.shape[1] - 40 and many.shape[2] < few.shape[2]


def test_a_notebook_shows_the_grid_of_top_projections(pixels):
    projector = Projector(network())
    top = find_top_activations(projector, pixels, ["4"], k=2)["4"]
    found = project_top_activations(projector, pixels, "4", top)
    page = torch.from_numpy(np.array(Image.open(io.BytesIO(found._repr_png_()))))
    assert page.permute(2, 0, 1).shape == layer_grid(found).shape


def test_results_print_in_a_line(pixels):
    projector = Projector(network(), normalization=SCALED)
    (top,) = find_top_activations(projector, pixels, ["4"], k=3).values()
    projections = project_top_activations(projector, pixels, "4", top)
    projection = strongest(projector, pixels, "4", k=2)
    assert repr(projection).startswith("Projection(2 units in images of 24x26 pixels; deconv: ")
    assert repr(top) == "TopActivations(6 maps, 0 of them dead, the 3 strongest in 5 images)"
    for text in map(repr, (projection, top, projections)):
        assert "\n" not in text and "tensor" not in text and "array" not in text
    assert repr(projections).startswith("TopProjections(4: 6 maps, up to 3 units each, deconv")
