"""What tiles show: the box in which projections have their energy, and distinct patches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from torch import nn

from deconvnet.visualization.projection.effective_field import EffectiveField, effective_field
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.near_duplicates import correlations, distinct, surroundings
from deconvnet.visualization.search.projecting import project_top_activations
from deconvnet.visualization.search.top_activations import find_top_activations
from deconvnet.visualization.search.top_projections import load_top_projections


def blocks(fields, offset, size, image=(40, 50), value=1.0):
    """Projections that are zero except for a block at an offset from the corner of each field."""
    images = torch.zeros(len(fields), 3, *image)
    for picture, (top, left, *_) in zip(images, fields.tolist(), strict=True):
        rows, columns = (
            slice(max(first + shift, 0), max(first + shift + side, 0))
            for first, shift, side in zip((top, left), offset, size, strict=True)
        )
        picture[:, rows, columns] = value
    return images


def squares(corners, side):
    corners = torch.tensor(corners)
    return torch.cat([corners, corners + side], 1)


@pytest.mark.parametrize("side", [20, 21])
@pytest.mark.parametrize(
    ("offset", "size"), [((6, 9), (7, 7)), ((0, 2), (9, 9)), ((11, 4), (1, 1))]
)
def test_the_effective_field_is_the_box_of_the_energy_wherever_the_unit_is(side, offset, size):
    fields = squares([(4, 6), (8, 2), (12, 18)], side)
    box = effective_field([(blocks(fields, offset, size), fields)])
    assert box.size == size
    for (top, left, *_), found in zip(fields.tolist(), box.boxes(fields).tolist(), strict=True):
        first = [top + offset[0], left + offset[1]]
        assert found == [*first, first[0] + size[0], first[1] + size[1]]


def test_the_box_is_square_and_lies_in_the_receptive_field():
    fields = squares([(4, 6), (8, 2)], 20)
    wide = effective_field([(blocks(fields, (8, 3), (4, 15)), fields)])
    assert wide.size == (15, 15)
    # At the rim of the field, the square is shifted into it.
    low = effective_field([(blocks(fields, (18, 3), (2, 15)), fields)])
    top = low.boxes(fields)[0, 0] - fields[0, 0]
    assert low.size == (15, 15) and top + 15 == 20
    # Along an axis on which the field is shorter, the box is as long as the field.
    flat = torch.tensor([[4, 6, 7, 11]])
    box = effective_field([(blocks(flat, (0, 0), (3, 5)), flat)])
    assert torch.equal(box.boxes(flat), flat)


def test_the_box_holds_95_percent_of_the_mean_energy_and_strong_projections_count_no_more():
    fields = squares([(5, 8), (5, 14), (7, 11)], 31)
    at = torch.arange(-15, 16)
    bump = torch.exp(-(at**2) / 30.0)
    images = torch.zeros(3, 3, 40, 50)
    for picture, (top, left, *_), scale in zip(
        images, fields.tolist(), (1.0, 30.0, 1e4), strict=True
    ):
        picture[:, top : top + 31, left : left + 31] = scale * bump[:, None] * bump
    box = effective_field([(images[:2], fields[:2]), (images[2:], fields[2:])])
    # The energy is a Gaussian with a variance of 7.5 pixels along each axis.
    assert box.size[0] == box.size[1] and 11 <= box.size[0] <= 15
    top, left, bottom, right = (box.boxes(fields)[0] - fields[0, :2].repeat(2)).tolist()
    energy = (bump[:, None] * bump).square()
    assert energy[top:bottom, left:right].sum() >= 0.95 * energy.sum()
    equal = effective_field([(images / images.abs().amax((1, 2, 3), keepdim=True), fields)])
    assert equal == box


def test_there_is_no_effective_field_without_energy_or_if_units_see_the_whole_image():
    fields = squares([(4, 6)], 20)
    assert effective_field([(torch.zeros(1, 3, 40, 50), fields)]) is None
    assert effective_field([]) is None
    whole = torch.tensor([[0, 0, 40, 50]])
    assert effective_field([(torch.rand(1, 3, 40, 50), whole)]) is None


class Narrow(nn.Sequential):
    """A field of 15 pixels with stride 2, of which the inner 5 pixels matter."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 7, padding=3)
        )
        with torch.no_grad():
            self[3].weight[:] *= 1e-3
            self[3].weight[:, :, 3, 3].uniform_(generator=torch.Generator().manual_seed(0))
            self[3].bias.fill_(1)


@pytest.fixture(scope="module")
def narrow(textures):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Narrow()
    images = list(textures(6, 3, 32, 36))
    projector = Projector(net)
    return projector, images, find_top_activations(projector, images, ["3"], k=4, inside=True)["3"]


def test_tiles_show_the_effective_field_by_both_methods(narrow):
    projector, images, top = narrow
    found = project_top_activations(projector, images, "3", top, maps=[4, 1], k=3)
    assert found.methods == ("deconv", "guided")
    side = found.effective.size[0]
    assert found.patches.shape == (2, 3, 3, side, side) and 3 <= side <= 6
    for row, rank in np.ndindex(2, 3):
        number, m, i, j = found.units[row, rank].tolist()
        top_row, left, bottom, right = found.windows[row, rank].tolist()
        assert (bottom - top_row, right - left) == (side, side)
        # The field of a unit begins at 2i - 7 and has 16 pixels, of which the middle is shown.
        assert abs((top_row + bottom) / 2 - (2 * i + 1)) <= 1
        assert abs((left + right) / 2 - (2 * j + 1)) <= 1
        for method in found.methods:
            alone = Projector(projector.model, method=method)
            projection = alone(images[number][None], "3", [(0, m, i, j)]).images[0]
            tile = projection[:, top_row:bottom, left:right]
            shown = found.tiles[method][row, rank] / 127
            assert tile.abs().max() > 0
            assert_allclose(shown, tile / tile.abs().max(), atol=5e-3)
        patch = images[number][:, top_row:bottom, left:right]
        assert_allclose(found.patches[row, rank] / 255, patch, atol=0.003)
    # The same box for other maps, such as those of the control.
    again = project_top_activations(
        projector, images, "3", top, maps=[0], counts=[1], k=3, window=found.effective
    )
    assert again.effective == found.effective and again.count(0) == 1
    assert again.patches.shape == (1, 3, 3, side, side)
    with pytest.raises(ValueError, match="window=whole: choose one of effective, field"):
        project_top_activations(projector, images, "3", top, window="whole")


def test_repeated_patches_are_replaced_by_the_next_activations(narrow):
    projector, images, _ = narrow
    # Each image comes twice, and once more with noise that nobody sees.
    noise = 1e-6 * torch.randn(3, 32, 36, generator=torch.Generator().manual_seed(0))
    repeated = [other for image in images for other in (image, image.clone(), image + noise)]
    top = find_top_activations(projector, repeated, ["3"], k=18, inside=True)["3"]
    found = project_top_activations(projector, repeated, "3", top, k=4)
    once = find_top_activations(projector, images, ["3"], k=6, inside=True)["3"]
    for m in range(5):
        assert found.count(m) == 4
        assert (found.units[m, :, 0] // 3).tolist() == once.images[m, :4].tolist()
        assert (np.diff(np.abs(found.values[m])) <= 0).all()
    # Where there is nothing else, a map has fewer.
    fewer = project_top_activations(projector, repeated, "3", top, k=9)
    assert [fewer.count(m) for m in range(5)] == [6] * 5
    assert (fewer.units[:, 6:] == -1).all() and not fewer.tiles["deconv"][:, 6:].any()


def test_a_photograph_that_is_shifted_or_brighter_is_shown_once_unless_asked_for(narrow):
    projector, images, _ = narrow
    planted = [
        other for image in images for other in (image, image.roll((1, -1), (1, 2)), 0.9 * image)
    ]
    top = find_top_activations(projector, planted, ["3"], k=18, inside=True)["3"]
    found = project_top_activations(projector, planted, "3", top, k=4)
    everything = project_top_activations(projector, planted, "3", top, k=4, near_duplicates=True)

    def repetitions(units, windows):
        """Pairs in the same place of the same original, up to two pixels."""
        corners = windows[:, :2] - np.outer(units[:, 0] % 3 == 1, (1, -1))
        return sum(
            one[0] // 3 == other[0] // 3 and np.abs(corner - corners[n]).max() <= 2
            for n, other in enumerate(units)
            for one, corner in zip(units[:n], corners[:n], strict=True)
        )

    for m in range(5):
        assert found.count(m) == 4
        assert repetitions(found.units[m], found.windows[m]) == 0
        assert everything.units[m].tolist() == [list(unit) for unit in top.units(m)[:4]]
    assert sum(map(repetitions, everything.units, everything.windows)) > 3


def test_surroundings_correlate_at_their_best_shift():
    one = np.random.default_rng(0).random((10, 11))
    others = np.stack([np.roll(one, (2, -1), (0, 1)), 3 * one + 1, np.ones((10, 11)), one[::-1]])
    expected = []
    for other in others[[0, 1, 3]]:
        shifts = [(i, j) for i in range(5) for j in range(5)]
        parts = [one[i : i + 6, j : j + 7].ravel() for i, j in shifts]
        expected.append(max(np.corrcoef(other[2:8, 2:9].ravel(), part)[0, 1] for part in parts))
    found = correlations(others, one)
    assert_allclose(found[[0, 1, 3]], expected)
    assert_allclose(found[:3], [1, 1, 0], atol=1e-12)


def test_surroundings_are_compared_where_both_images_show_them():
    random = np.random.default_rng(0)
    one, other = random.random((2, 20, 22))
    one[:, :9], other[13:] = np.nan, np.nan
    other[:7] = one[1:8]
    expected = []
    for i, j in np.ndindex(5, 5):
        pair = np.stack([other[2:18, 2:20].ravel(), one[i : i + 16, j : j + 18].ravel()])
        common = pair[:, np.isfinite(pair).all(0)]
        assert common.shape[1] > 0.25 * 16 * 18
        expected.append(np.corrcoef(common)[0, 1])
    assert_allclose(correlations(other[None], one), [max(expected)])
    # What is left of both is too little to tell a photograph from a feature.
    other[5:] = np.nan
    assert correlations(other[None], one) == 0


def test_surroundings_are_larger_than_a_small_patch_which_lies_in_their_middle(textures):
    images = textures(2, 3, 40, 50)
    windows = torch.tensor([[20, 20, 24, 24], [-2, 47, 2, 51]])
    found = surroundings(images, windows)
    assert_allclose(found[0], images[0, :, 6:38, 6:38].mean(0), atol=1e-6)
    assert_allclose(found[1, 16:, :17], images[1, :, :16, 33:].mean(0), atol=1e-6)
    assert np.isnan(found[1, :16]).all() and np.isnan(found[1, :, 17:]).all()
    # Signals with the same feature would all correlate.
    assert not surroundings(images[:, :, :1], windows).any()


def test_crops_that_end_at_different_distances_from_a_patch_show_it_once(textures):
    photograph = textures(1, 3, 48, 80)[0]
    crops = torch.stack([photograph[:, :, :40], photograph[:, :, 20:60], photograph[:, :, 37:77]])
    patches = np.random.default_rng(0).integers(0, 256, (3, 3, 12, 12), dtype=np.uint8)
    # A patch near the right border of one crop and near the left border of another, and a patch
    # elsewhere.
    windows = torch.tensor([[20, 26, 32, 38], [20, 6, 32, 18], [4, 15, 16, 27]])
    assert distinct(patches, surroundings(crops, windows)) == [0, 2]
    # At the very borders, the crops have little more than the patch in common.
    windows = torch.tensor([[20, 29, 32, 41], [4, 15, 16, 27], [20, -8, 32, 4]])
    assert distinct(patches, surroundings(crops, windows)) == [0, 1, 2]


def test_images_of_several_sizes_are_padded_not_squashed(textures):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = [*textures(2, 3, 12, 20), *textures(2, 3, 24, 10, seed=1)]
    projector = Projector(net)
    top = find_top_activations(projector, images, ["3"], k=4)["3"]
    found = project_top_activations(projector, images, "3", top)
    assert found.effective is None and found.patches.shape[3:] == (12, 20)
    row, rank = np.argwhere(found.units[..., 0] >= 2)[0]
    top_row, left, bottom, right = found.windows[row, rank].tolist()
    # 24 rows and 40 columns: the image with 15 grey columns on either side.
    assert [top_row, left, bottom, right] == [0, -15, 24, 25]
    image = images[found.units[row, rank, 0]]
    padded = F.pad(image, (15, 15), value=0.5)[None]
    expected = F.interpolate(padded, (12, 20), mode="bilinear", antialias=True)[0]
    assert_allclose(found.patches[row, rank] / 255, expected, atol=0.003)


def test_an_effective_field_survives_its_file(narrow, tmp_path):
    projector, images, top = narrow
    found = project_top_activations(projector, images, "3", top, maps=[0], k=1)
    found.save(tmp_path / "a.npz")
    box = load_top_projections(tmp_path / "a.npz").effective
    assert isinstance(box, EffectiveField) and box == found.effective
