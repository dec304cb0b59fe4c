"""The strongest activations of a data set are those of an exhaustive search, even if the search is
stopped, shared or damaged."""

import json
import shutil

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.images.datasets import LazyImages
from deconvnet.images.item import Item
from deconvnet.visualization.projection.projection import LayerInfo
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search import top_activations
from deconvnet.visualization.search.search_region import ENOUGH, includes_border, searched_units
from deconvnet.visualization.search.top_activations import (
    SearchState,
    TopActivations,
    find_top_activations,
    merge_top_activations,
)

LAYERS = ["0", "1", "3"]


def network():
    """Two layers whose sums are exact in any order: whole numbers, on eighths."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()
    )
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = torch.randint(-2, 3, p.shape, generator=generator).float()
    net[2].bias.data[4] = -1e6  # never active
    return net


def pictures(count, *size, seed=0):
    """Images in eighths. Some come again, which must not change who is first."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 9, (count, 3, *(size or (11, 13))), generator=generator) / 8
    images[5::4] = images[1:2]
    return list(images)


def equal(one, two):
    """Whether two tables are the same; a sum of shares may be rounded in another order."""
    return one.keys() == two.keys() and all(
        np.allclose(getattr(one[layer], key), getattr(two[layer], key), rtol=1e-12, atol=0)
        if key == "density_sum"
        else np.array_equal(getattr(one[layer], key), getattr(two[layer], key))
        for layer in one
        for key in TopActivations.__dataclass_fields__
    )


@torch.no_grad()
def search(net, images, layer, k, allowed=None):
    """The result of an exhaustive search: the strongest unit of every image, sorted.


    Image by image, and position by position.
    """
    strongest, active, density = [], 0, 0
    for number, image in enumerate(images):
        maps = net[: int(layer) + 1](image[None])[0]
        K, H, W = maps.shape
        of_maps = []
        for z in maps.tolist():
            places = [(i, j) for i in range(H) for j in range(W)]
            if allowed is not None:
                places = [place for place in places if allowed[place]]
            row, column = max(places, key=lambda at: z[at[0]][at[1]])
            of_maps.append((-z[row][column], number, row, column))
        strongest.append(of_maps)
        active = active + np.array([value < 0 for value, *_ in of_maps])
        density = density + (maps > 0).double().flatten(1).mean(1).numpy()
    found = [sorted(of_map)[:k] for of_map in zip(*strongest, strict=True)]
    total = -np.array([[unit[0] for unit in of_maps] for of_maps in strongest]).sum(0)
    values, numbers, rows, columns = np.array(found).transpose(2, 0, 1)
    return {
        **{"values": -values, "images": numbers, "rows": rows, "columns": columns},
        **{
            "num_images": len(images),
            "active_images": active,
            "peak_sum": total,
            "density_sum": density,
        },
    }


def assert_is(top, expected):
    for key, value in expected.items():
        assert_allclose(getattr(top, key), value, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("k", [1, 4, 30])
def test_the_table_is_that_of_an_exhaustive_search(k):
    net, images = network(), pictures(14)
    tops = find_top_activations(Projector(net), images, LAYERS, k=k)
    assert list(tops) == LAYERS
    for layer in LAYERS:
        assert_is(tops[layer], search(net, images, layer, k))
        assert tops[layer].values.shape[1] == min(k, 14)
    assert tops["3"].dead.tolist() == [False] * 4 + [True]


def test_batches_and_workers_change_nothing_and_the_earlier_of_equals_wins():
    projector, images = Projector(network()), pictures(14)
    tops = find_top_activations(projector, images, LAYERS, k=6, batch=1)
    for options in ({"batch": 7}, {"batch": 32}, {"batch": 3, "workers": 2}):
        assert equal(find_top_activations(projector, images, LAYERS, k=6, **options), tops), options
    same = {1, 5, 9, 13}
    together = 0
    for values, numbers in zip(tops["1"].values, tops["1"].images, strict=True):
        for value in set(values):
            who = numbers[values == value].tolist()
            assert who == sorted(who)
            together += same <= set(who)
    assert together, "no map is led by the image that comes four times"


@pytest.mark.parametrize("ranks", [2, 3, 20])
def test_merged_shards_are_the_whole_even_if_some_are_empty(ranks):
    projector, images = Projector(network()), pictures(14)
    parts = [
        find_top_activations(projector, images, LAYERS, k=5, shard=(rank, ranks))
        for rank in range(ranks)
    ]
    assert [part == {} for part in parts] == [rank >= 14 for rank in range(ranks)]
    assert equal(
        merge_top_activations(parts, k=5), find_top_activations(projector, images, LAYERS, k=5)
    )


class Stopped(Exception):
    pass


class Counted(list):
    """Images that count how often they are read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def stop_after(count):
    def progress(done, total):
        assert total == 14
        if done >= count:
            raise Stopped

    return progress


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_search_resumes_where_it_stopped(tmp_path, workers):
    projector, images, path = Projector(network()), Counted(pictures(14)), tmp_path / "top.npz"
    options = {"k": 5, "batch": 3, "path": path, "key": {"network": ("a", 1)}, "workers": workers}
    with pytest.raises(Stopped):
        find_top_activations(projector, images, LAYERS, progress=stop_after(6), **options)
    assert SearchState.load(path).done == 6
    images.reads, seen = 0, []
    tops = find_top_activations(
        projector, images, LAYERS, progress=lambda *at: seen.append(at), **options
    )
    assert images.reads == (0 if workers else 8)
    assert seen == [(6, 14), (9, 14), (12, 14), (14, 14)]
    assert equal(tops, find_top_activations(projector, images, LAYERS, k=5))
    # Once it is whole, nothing is read again, and the file is left alone.
    written, images.reads = path.stat().st_mtime_ns, 0
    assert equal(find_top_activations(projector, images, LAYERS, **options), tops)
    assert images.reads == 0 and path.stat().st_mtime_ns == written


def test_a_killed_search_loses_only_what_follows_the_last_save(tmp_path, monkeypatch):
    projector, images, path = Projector(network()), pictures(14), tmp_path / "whole" / "top.npz"
    monkeypatch.setattr(top_activations, "SAVE_SECONDS", -1)
    killed = tmp_path / "killed" / "top.npz"

    def progress(done, total):
        if done == 8:
            shutil.copytree(path.parent, killed.parent)

    tops = find_top_activations(projector, images, LAYERS, batch=4, path=path, progress=progress)
    assert SearchState.load(killed).done == 8
    assert equal(find_top_activations(projector, images, LAYERS, batch=4, path=killed), tops)
    for folder in (path.parent, killed.parent):
        assert {file.name for file in folder.iterdir()} == {".deconvnet", "top.npz"}
        assert {file.name for file in (folder / ".deconvnet").iterdir()} == {"made"}


@pytest.mark.parametrize(
    "other",
    [
        {"key": {"network": "b"}},
        {"key": {"network": "a", "data": 1}},
        {"layers": ["1"]},
        {"k": 4},
        {"inside": True},
        {"shard": (0, 2)},
        {"images": 13},
    ],
    ids=str,
)
def test_a_search_with_another_key_is_recomputed(tmp_path, other, caplog):
    caplog.set_level("INFO")
    projector, images, path = Projector(network()), pictures(14), tmp_path / "top.npz"
    options = {"layers": LAYERS, "k": 5, "key": {"network": "a"}, "path": path}
    with pytest.raises(Stopped):
        find_top_activations(projector, images, batch=4, progress=stop_after(8), **options)
    assert SearchState.load(path).done == 8
    options |= other
    images = images[: options.pop("images", 14)]
    assert equal(
        find_top_activations(projector, images, **options),
        find_top_activations(projector, images, **options | {"path": None}),
    )
    assert "is from another search and is recomputed" in caplog.text


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    projector, images, path = Projector(network()), pictures(6), tmp_path / "top.npz"
    tops = find_top_activations(projector, images, LAYERS, path=path)
    whole = path.read_bytes()
    damaged = [b"", b"some words", whole[:-10], whole[: len(whole) // 2], json.dumps({}).encode()]
    for at in range(0, len(whole), 89):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = SearchState.load(path)
        except ValueError as error:
            message = str(error)
            assert str(path) in message and "\n" not in message and "remove it" in message
            refused += 1
        else:  # times and the like, which nobody reads
            assert equal(found.tops, tops) and found.done == 6
    assert refused > len(damaged) / 2
    np.savez(path, header=json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match="top.npz: damaged or not a file of strongest activations"):
        find_top_activations(projector, images, LAYERS, path=path)
    with pytest.raises(ValueError, match="nowhere.npz: no such file"):
        SearchState.load(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_earlier_tables_kept(tmp_path, wrong):
    images, path = pictures(8), tmp_path / "top.npz"
    images[6] = images[6].clone()
    images[6][1, 4, 4] = wrong
    with pytest.raises(ValueError, match="layer '0': not finite on image 6 of the data set"):
        find_top_activations(Projector(network()), images, ["0", "1"], batch=2, path=path)
    assert SearchState.load(path).done == 6


def test_an_unreadable_image_gives_the_same_line_from_a_worker(tmp_path):
    def lost():
        raise ValueError("cannot read lost.png: truncated")

    good = pictures(3)
    items = [Item(f"{n}", lambda image=image: image) for n, image in enumerate(good)]
    images = LazyImages([*items, Item("lost.png", lost)])
    for workers in (0, 1):
        with pytest.raises(ValueError) as caught:
            find_top_activations(Projector(network()), images, ["1"], batch=2, workers=workers)
        assert str(caught.value) == "cannot read lost.png: truncated"


# Fields that lie inside the image.


def test_only_units_whose_field_lies_inside_the_image_are_searched():
    net, images = network(), pictures(10)
    tops = find_top_activations(Projector(net), images, ["1", "3"], k=5, inside=True)
    # 3x3 with stride 2 and padding 1 on 11x13 pixels: of 6x7 units only the first row and column
    # begin before the image, and the last ones end beyond it.
    allowed = np.zeros((6, 7), dtype=bool)
    allowed[1:5, 1:6] = True
    for row in range(6):
        for column in range(7):
            first, left = 2 * row - 1, 2 * column - 1
            inside = first >= 0 and first + 3 <= 11 and left >= 0 and left + 3 <= 13
            assert allowed[row, column] == inside
    assert_is(tops["1"], search(net, images, "1", 5, allowed))
    # 7x7 with stride 2, from -1 on, in 4x5 units.
    allowed = np.zeros((4, 5), dtype=bool)
    allowed[1:3, 1:4] = True
    assert_is(tops["3"], search(net, images, "3", 5, allowed))


def test_a_layer_with_few_units_inside_is_searched_in_the_middle():
    net, images = network(), pictures(6, 9, 9)
    # Of 5x5 units of layer 1 nine are inside, of 3x3 units of layer 3 one is.
    (info,) = (info for info in Projector(net).layers(images[0][None]) if info.name == "3")
    assert info.inside((9, 9)).sum() == 1
    assert includes_border(info, (9, 9)) and not includes_border(info, (11, 11))
    tops = find_top_activations(Projector(net), images, ["1", "3"], k=5, inside=True)
    allowed = np.zeros((3, 3), dtype=bool)
    allowed[1, 1] = True
    assert_is(tops["3"], search(net, images, "3", 5, allowed))
    allowed = np.zeros((5, 5), dtype=bool)
    allowed[1:4, 1:4] = True
    assert_is(tops["1"], search(net, images, "1", 5, allowed))


@pytest.mark.parametrize(
    ("shape", "field", "stride", "offset", "image", "rows", "columns"),
    [
        # Fields larger than the image: half of the rows and columns, around the middle.
        ((7, 7), 435, 32, -201, (224, 224), (2, 5), (2, 5)),
        # The field of unit 7 is centred in the image.
        ((14, 14), 211, 16, -105, (224, 224), (4, 11), (4, 11)),
        # The same share of both sides.
        ((4, 8), 100, 16, -42, (64, 128), (1, 3), (2, 6)),
        ((2, 1), 99, 16, -41, (32, 16), (0, 1), (0, 1)),
        # Without a field, all.
        ((3, 5), None, 1, 0, (9, 9), (0, 3), (0, 5)),
    ],
)
def test_units_in_the_middle_are_searched_where_most_fields_reach_beyond_the_image(
    shape, field, stride, offset, image, rows, columns
):
    info = LayerInfo("a", "ReLU", (1, *shape))
    if field is not None:
        info = LayerInfo("a", "ReLU", (1, *shape), *((n, n) for n in (field, stride, offset)))
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(searched_units(info, image), expected)


def test_a_quarter_of_the_units_is_enough():
    # A field of 4 pixels with stride 2 from -2 on, in images of 10: of the four rows of units two
    # are inside, and so of all units four in sixteen.
    info = LayerInfo("1", "ReLU", (1, 4, 4), (4, 4), (2, 2), (-2, -2))
    assert info.inside((6, 6)).float().mean() == ENOUGH == 0.25
    net = nn.Sequential(nn.Conv2d(3, 2, 4, stride=2, padding=2), nn.ReLU())
    images = pictures(3, 6, 6)
    assert net(images[0][None]).shape[2:] == (4, 4)
    tops = find_top_activations(Projector(net), images, ["1"], inside=True)
    for key in ("rows", "columns"):
        assert set(getattr(tops["1"], key).flatten()) <= {1, 2}


def test_images_of_different_sizes_are_searched_each_with_its_own_border():
    net = network()
    images = [*pictures(3, 11, 13), *pictures(2, 15, 9, seed=1), *pictures(3, 11, 13, seed=2)]
    tops = find_top_activations(Projector(net), images, LAYERS, k=4, batch=8)
    for layer in LAYERS:
        assert_is(tops[layer], search(net, images, layer, 4))
    inside = find_top_activations(Projector(net), images, ["1"], k=8, inside=True, batch=8)["1"]
    assert equal(
        {"1": inside},
        find_top_activations(Projector(net), images, ["1"], k=8, inside=True, batch=1),
    )
    for number, image in enumerate(images):
        rows, columns = (
            getattr(inside, key)[inside.images == number] for key in ("rows", "columns")
        )
        assert len(rows) == 4
        for places, pixels in ((rows, image.shape[1]), (columns, image.shape[2])):
            assert (2 * places - 1 >= 0).all() and (2 * places + 2 <= pixels).all()


# What is searched.


def test_labels_are_ignored_and_vectors_are_maps_with_one_position():
    net = nn.Sequential(*network(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    images = pictures(6)
    labelled = [(image, "a class") for image in images]
    tops = find_top_activations(Projector(net), labelled, ["3", "6"], k=2)
    assert equal(tops, find_top_activations(Projector(net), images, ["3", "6"], k=2))
    with torch.no_grad():
        scores = net(torch.stack(images)).numpy()
    order = np.argsort(-scores, 0, kind="stable")[:2].T
    assert_array_equal(tops["6"].images, order)
    assert_array_equal(tops["6"].values, np.take_along_axis(scores.T, order, 1))
    assert not tops["6"].rows.any() and not tops["6"].columns.any()


def test_only_activations_above_zero_are_units():
    net, images = network(), pictures(9)
    top = find_top_activations(Projector(net), images, ["0"], k=9)["0"]
    assert (top.values < 0).any(), "before a rectifier, where all is kept"
    for m in range(4):
        kept = zip(
            *(each[m] for each in (top.values, top.images, top.rows, top.columns)), strict=True
        )
        expected = [(image, m, row, column) for value, image, row, column in kept if value > 0]
        assert top.units(m) == expected and len(expected) == top.active_images[m]


@pytest.fixture(scope="module")
def learned(textures):
    solver = SolverSettings(iterations=15)
    layers = [
        LayerSettings(4, 5, lam=5.0, pool=[2, 2, 2], solver=solver),
        LayerSettings(3, 3, lam=20.0, solver=solver),
    ]
    net = DeconvNet(layers, PreprocessingSettings(steps=["mean"]), seed=0)
    images = textures(5, 3, 24, 28)
    net.preprocessing.fit(images)
    return net, images


@pytest.mark.parametrize("inside", [False, True])
def test_in_a_deconvolutional_network_magnitudes_are_searched(learned, inside):
    net, images = learned
    layers = ["layer1", "layer2"]
    tops = find_top_activations(Projector(net), list(images), layers, k=3, inside=inside, batch=2)
    codes = net.infer(images, chunk=2)
    for number, layer in enumerate(layers, 1):
        z, top = codes.layer(number).z.abs().numpy(), tops[layer]
        assert (codes.layer(number).z < 0).any()
        searched = z
        if inside:
            # Unit i of layer 1 paints the rows i-4 to i, of layer 2 the rows 2i-8 to 2i+1.
            searched = np.zeros_like(z)
            searched[..., 4:-4, 4:-4] = z[..., 4:-4, 4:-4]
        strongest = searched.max((2, 3))
        order = np.argsort(-strongest, 0, kind="stable")[:3].T
        assert_array_equal(top.images, order)
        # Inference depends on the batch by rounding.
        assert_allclose(top.values, np.take_along_axis(strongest.T, order, 1), rtol=1e-4)
        assert_allclose(top.density_sum, (z > 0).mean((2, 3)).sum(0), rtol=1e-3)
        assert_allclose(top.peak_sum, strongest.sum(0), rtol=1e-4)
        assert_array_equal(top.active_images, (strongest > 0).sum(0))
        for m, at in np.ndindex(*top.images.shape):
            unit = top.images[m, at], m, top.rows[m, at], top.columns[m, at]
            assert_allclose(z[unit], top.values[m, at], rtol=1e-4)


@pytest.mark.parametrize("options", [{"k": 0}, {"batch": 0}, {"images": []}], ids=str)
def test_invalid_searches_are_refused(options):
    options = {"images": pictures(2), **options}
    with pytest.raises(ValueError, match="must be at least 1"):
        find_top_activations(Projector(network()), options.pop("images"), ["1"], **options)
    with pytest.raises(ValueError, match="layer 'x': no such layer"):
        find_top_activations(Projector(network()), pictures(2), ["x"])
