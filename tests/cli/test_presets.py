"""The settings of the papers against the papers' tables, and the presets as commands that train."""

import dataclasses
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import shown_pictures
from hydra import compose, initialize_config_dir
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from deconvnet import DeconvNet, load
from deconvnet.cli.read_settings import read_settings, register
from deconvnet.images.datasets import load_images
from deconvnet.network.codes import Codes, LayerCodes
from deconvnet.operators.arithmetic import receptive_field
from deconvnet.operators.convolution import map_size
from deconvnet.operators.pooling import max_pool

ROOT = Path(__file__).resolve().parents[2]


def read(experiment, *overrides):
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return read_settings(compose("train", [f"+experiment={experiment}", *overrides]))


def untrained(settings):
    return DeconvNet(settings.layer_settings(), settings.preprocessing, seed=settings.seed)


# Zeiler, Taylor, Fergus, ICCV 2011


@pytest.fixture(scope="module")
def iccv():
    return read("iccv2011")


@pytest.fixture(scope="module")
def iccv_net(iccv):
    return untrained(iccv)


@pytest.fixture(scope="module")
def iccv_codes(iccv_net, textures):
    """What the untrained network finds in one image of the paper's size."""
    image = textures(1, 3, 150, 150)
    iccv_net.preprocessing.fit(image)
    return iccv_net.infer(image)


def test_the_iccv_2011_layers_are_those_of_the_papers_table(iccv):
    layers = iccv.layer_settings()
    assert [layer.num_maps for layer in layers] == [15, 50, 100, 150]
    assert [layer.lam for layer in layers] == [2.0, 0.1, 0.005, 0.001]
    assert [layer.solver.step for layer in layers] == [1e-3, 1e-4, 1e-6, 1e-8]
    # [maps, rows, columns]: 3x3x3 and then what the paper, maps last, writes as 3x3x2.
    assert [layer.pool for layer in layers] == [[3, 3, 3], [2, 3, 3], [2, 3, 3], [2, 3, 3]]
    for layer in layers:
        assert layer.filter_size == 7 and layer.p == 1 and layer.connectivity == "full"
        assert (layer.boundary, layer.target, layer.scale) == ("valid", "image", "none")
        assert (layer.pooling, layer.unpooling) == ("in_loop", "switches")
        solver, learning = layer.solver, layer.learning
        assert (solver.method, solver.iterations, solver.training_iterations) == ("ista", 10, 10)
        assert solver.tolerance == 0
        assert (learning.epochs, learning.norm, learning.init) == (10, "plane", "random")
        assert (learning.update, learning.update_iterations) == ("cg", 2)
        assert learning.batch_size is None and not learning.reinit_unused and not learning.recenter


def test_the_iccv_2011_images_are_grey_with_the_papers_contrast_normalisation(iccv):
    assert iccv.data.size == 150
    preprocessing = iccv.preprocessing
    assert preprocessing.color == "grey" and preprocessing.steps == ["contrast"]
    assert preprocessing.contrast_divide and preprocessing.scale == "rms"
    assert (preprocessing.contrast_size, preprocessing.contrast_sigma) == (13, 4.773)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_step_of_the_iccv_2011_inference_is_the_printed_one_in_all_iterations(
    iccv_net, iccv_codes, number
):
    betas = []
    layer = iccv_net.layer(number)
    layer.infer(
        iccv_net.layer_problem(iccv_codes, number), callback=lambda *now: betas.append(now[2])
    )
    expected = torch.full((10,), layer.settings.solver.step)
    assert_close(1 / torch.stack(betas).flatten(), expected, rtol=1e-6, atol=0)


def test_the_iccv_2011_filters_have_the_papers_numbers_and_planes_of_unit_norm(iccv_net):
    filters = [layer.filters for layer in iccv_net.layers]
    # Each sees all pooled maps below: 15 / 3, 50 / 2, 100 / 2.
    assert [f.shape[:2] for f in filters] == [(15, 1), (50, 5), (100, 25), (150, 50)]
    assert [f.numel() for f in filters] == [735, 12_250, 122_500, 367_500]
    for f in filters:
        assert_close(f.square().sum((2, 3)), torch.ones(f.shape[:2]))


def test_the_iccv_2011_maps_have_the_papers_sizes(iccv_codes):
    assert iccv_codes.y.shape == (1, 1, 150, 150)
    assert [tuple(layer.z.shape[1:]) for layer in iccv_codes.layers] == [
        (15, 156, 156),
        (50, 58, 58),
        (100, 26, 26),
        (150, 15, 15),
    ]
    pooled = [(5, 52, 52), (25, 20, 20), (50, 9, 9), (75, 5, 5)]
    assert [tuple(layer.pooled.shape[1:]) for layer in iccv_codes.layers] == pooled
    # Maps and switches of one image: what the paper calls the number of latent variables.
    counts = [layer.z.numel() + layer.switches.numel() for layer in iccv_codes.layers]
    assert counts == [378_560, 178_200, 71_650, 35_625]


def test_the_iccv_2011_maps_hold_at_most_one_value_in_a_window(iccv_net, iccv_codes):
    for layer, found in zip(iccv_net.layers, iccv_codes.layers, strict=True):
        count, _ = max_pool(found.z.abs(), tuple(layer.settings.pool))
        assert torch.count_nonzero(count) == torch.count_nonzero(found.z)
    # With steps this small only the lower layers begin to explain the image in ten iterations.
    lower = [iccv_net.snr(iccv_codes, number) for number in (1, 2)]
    assert lower[0] > lower[1] > 0


# The figures 7, 21, 63, 189 that are often given count 7 filter positions a pooling stride apart,
# 7 * 3^(l-1). Each position stands for a window, though, whose maximum may be in any of its places,
# and a field is as large as the windows reach: 3 + 6 * 3 rows of layer 1's maps, which filters of 7
# widen to 27 pixels, and so on.
FIELDS = {1: (7, 1), 2: (27, 3), 3: (87, 9), 4: (267, 27)}


def switches_in_a_corner(net, size, last):
    """Codes of one image of (size, size): all switches in the first or last place of windows."""
    layers = []
    for layer in net.layers:
        settings = layer.settings
        shape = (settings.num_maps, *map_size((size, size), (settings.filter_size,) * 2, "valid"))
        ramp = torch.arange(1.0, prod(shape) + 1)
        ramp = (ramp if last else ramp.flip(0)).view(1, *shape)
        pooled, switches = max_pool(ramp, tuple(settings.pool))
        nothing = torch.zeros(1, dtype=torch.float64)
        layers.append(LayerCodes(pooled, switches, shape, nothing, nothing))
        size = pooled.shape[2]
    return Codes(tuple(layers), torch.zeros(1, 1, 1, 1), [])


def test_one_value_paints_the_pixels_of_its_field_through_filters_of_ones(iccv):
    net, size = untrained(iccv), 330  # room for a field of layer 4
    for layer in net.layers:
        layer.set_filters(torch.ones_like(layer.filters))
    corners = [switches_in_a_corner(net, size, last) for last in (False, True)]
    for number, expected in FIELDS.items():
        field = receptive_field((7,) * number, (3,) * (number - 1))
        assert (field.size, field.stride) == expected
        K, H, W = corners[0].layer(number).shape
        row, column = H // 2, W // 2 - 1
        z = torch.zeros(1, K, H, W)
        z[0, K // 2, row, column] = 1
        # Nothing is negative, so that what either corner paints is all that any switches can.
        painted = sum(net.operator(codes, number)(z) for codes in corners)[0, 0] > 0
        for axis, unit in ((1, row), (0, column)):
            pixels = torch.nonzero(painted.any(axis)).flatten()
            first, end = pixels.min().item(), pixels.max().item() + 1
            assert (first, end) == field.pixels(unit)
            assert end - first == field.size and first >= 0 and end <= size


# Zeiler, Krishnan, Taylor, Fergus, CVPR 2010


@pytest.fixture(scope="module")
def cvpr():
    return read("cvpr2010")


def test_the_cvpr_2010_layers_are_those_of_the_paper(cvpr):
    layers = cvpr.layer_settings()
    assert [layer.num_maps for layer in layers] == [9, 45, 150]
    wiring = ["full", "singles_and_doubles", "random_doubles"]
    assert [layer.connectivity for layer in layers] == wiring
    for layer in layers:
        assert (layer.filter_size, layer.lam, layer.p) == (7, 1.0, 1.0)
        assert (layer.boundary, layer.target, layer.scale) == ("valid", "maps", "max")
        assert layer.pool is None
        solver, learning = layer.solver, layer.learning
        assert (solver.method, solver.iterations) == ("half_quadratic", 1)
        assert (solver.z_step, solver.cg_iterations) == ("cg", 2)
        assert solver.betas() == [1, 6, 36, 216, 1296, 7776, 46656]
        assert (learning.update, learning.update_iterations) == ("cg", 2)
        assert (learning.epochs, learning.batch_size) == (3, 1)
        assert (learning.norm, learning.init) == ("plane", "random")
        assert not learning.reinit_unused and not learning.recenter
    assert (cvpr.data.size, cvpr.data.max_images) == (100, 10)
    preprocessing = cvpr.preprocessing
    assert (preprocessing.color, preprocessing.scale) == ("rgb", "max")
    assert preprocessing.steps == ["mean", "laplacian"]


def test_the_cvpr_2010_filters_see_all_colours_then_maps_by_one_and_two(cvpr):
    net = untrained(cvpr)
    planes = [layer.connectivity.sum(1) for layer in net.layers]
    assert planes[0].tolist() == [3] * 9
    assert sorted(planes[1].tolist()) == [1] * 9 + [2] * 36
    assert planes[2].tolist() == [2] * 150
    # No two of the filters of layer 2 see the same, nor of layer 3, which has far more to choose.
    for layer in net.layers[1:]:
        assert len(layer.connectivity.unique(dim=0)) == len(layer.filters)
    for layer in net.layers:
        assert_close(layer.filters.square().sum((2, 3)), layer.connectivity)
    weights = [int(layer.connectivity.sum()) * 49 for layer in net.layers]
    assert weights == [1323, 3969, 14_700]


def test_the_cvpr_2010_maps_grow_by_six_pixels_in_each_layer(cvpr, textures):
    net, image = untrained(cvpr), textures(1, 3, 16, 18)
    net.preprocessing.fit(image)
    codes = net.infer(image)
    shapes = [tuple(layer.z.shape[1:]) for layer in codes.layers]
    assert shapes == [(9, 22, 24), (45, 28, 30), (150, 34, 36)]
    assert all(layer.switches is None for layer in codes.layers)
    for number, size in enumerate((7, 13, 19), 1):
        assert receptive_field((7,) * number, (1,) * (number - 1)).size == size


# As commands

KINDS = ("evolution", "filters", "maps", "reconstructed")
UPPER = ("patches", "parts")
SIDE = 88  # the least for four layers of 7x7 filters and 3x3 pooling is 85


def shrunk(maps, **learning):
    """Overrides that leave of a preset with four layers its structure: few maps, one epoch."""
    values = {"epochs": 1, **learning}
    return [
        *("progress=false", "device=cpu", f"data.size={SIDE}", "data.max_images=3"),
        *(f"model.layer{n}.num_maps={count}" for n, count in enumerate(maps, 1)),
        *(f"model.layer{n}.learning.{k}={v}" for n in (1, 2, 3, 4) for k, v in values.items()),
        *(f"model.layer{n}.solver.iterations=8" for n in (1, 2, 3, 4)),
    ]


def assert_four_layers(result, run):
    """The command ended well, and the run has all that four layers have to show."""
    assert result.code == 0 and result.err == "", result
    rows = [line.split() for line in result.out.splitlines() if " dB " in line]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    expected = {f"layer{n}-{kind}" for n in (1, 2, 3, 4) for kind in KINDS}
    expected |= {f"layer{n}-{kind}" for n in (2, 3, 4) for kind in UPPER}
    assert {path.stem for path in (run / "pictures").iterdir()} == expected
    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()
    # A tag such as "0 filters/layer1".
    shown = (tag.partition(" ")[2].partition("/") for tag in shown_pictures(events))
    assert {f"{layer}-{kind}" for kind, _, layer in shown} == expected
    for number in (1, 2, 3, 4):
        for key in ("objective", "snr", "density"):
            assert f"layer{number}/{key}" in tags["scalars"]
        assert f"layer{number}/result/text_summary" in tags["tensors"]
        for kind in ("filters", "maps"):
            with Image.open(run / "pictures" / f"layer{number}-{kind}.png") as picture:
                assert np.asarray(picture).std() > 0
        inference = EventAccumulator(str(run / "inference" / f"layer{number}"))
        inference.Reload()
        assert len(inference.Scalars("inference/objective by iteration")) == 8
    assert (run / "network.safetensors").is_file()


def test_the_two_iccv_2011_presets_differ_in_values_only(iccv):
    small = read("iccv2011_small")
    assert small.model.keys() == iccv.model.keys()
    for name, layer in small.model.items():
        paper = iccv.model[name]
        for key in ("target", "pooling", "pool", "filter_size", "connectivity", "boundary"):
            assert getattr(layer, key) == getattr(paper, key)
    assert small.preprocessing == iccv.preprocessing
    assert small.data.size == iccv.data.size
    # Every value of the one can be that of the other: the same command with other settings.
    for name, layer in iccv.model.items():
        assert dataclasses.replace(small.model[name], **vars(layer)) == layer


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, script):
    """(result, run folder) of the small preset, shrunk, on the photographs that it is for."""
    folder = tmp_path_factory.mktemp("small")
    arguments = ["+experiment=iccv2011_small", *shrunk([6, 4, 4, 4])]
    return script(folder, "train.py", *arguments), folder / "runs" / "iccv2011-small"


@pytest.mark.slow
def test_the_small_iccv_2011_preset_trains_four_layers_and_shows_them(small_run):
    assert_four_layers(*small_run)
    result, run = small_run
    assert f"3 images of {SIDE}x{SIDE}" in result.out
    net = load(run)
    assert net.depth == 4
    assert [layer.filters.shape[:2] for layer in net.layers] == [(6, 1), (4, 2), (4, 2), (4, 2)]
    # It explains something in all layers, a layer further up less of it.
    values = [float(line.split()[1]) for line in result.out.splitlines() if " dB " in line]
    assert values == sorted(values, reverse=True) and values[-1] > 0.5


SHAPES = [(60, 96), (96, 40), (70, 70)]


@pytest.fixture(scope="module")
def padded_run(tmp_path_factory, textures, script):
    """(result, run folder) of the paper's preset, shrunk, on whole pictures of three shapes."""
    folder = tmp_path_factory.mktemp("padded")
    (folder / "pictures").mkdir()
    for number, shape in enumerate(SHAPES):
        image = textures(1, 3, *shape, seed=number)[0]
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    arguments = ["+experiment=iccv2011", "data=folder", f"data.path={folder / 'pictures'}"]
    arguments += ["data.fit=pad", *shrunk([6, 4, 4, 4], epochs=2)]
    return script(folder, "train.py", *arguments), folder / "runs" / "iccv2011-folder"


@pytest.mark.slow
def test_the_iccv_2011_preset_trains_on_whole_pictures_of_different_shapes(padded_run):
    result, run = padded_run
    assert_four_layers(result, run)
    assert f"1 of 3 images are smaller than data.size={SIDE}" in result.out
    net = load(run)
    for layer in net.layers:
        norms = torch.linalg.vector_norm(layer.filters, dim=(2, 3))
        assert_close(norms, torch.ones_like(norms))


@pytest.mark.slow
def test_nothing_is_explained_around_whole_pictures(padded_run, iccv):
    _, run = padded_run
    settings = dataclasses.replace(
        iccv.data, source="folder", path=str(run.parents[1] / "pictures"), fit="pad", size=SIDE
    )
    data, net = load_images(settings), load(run)
    # 60x96 and 96x40 become 88 pixels in their longer side.
    assert data.frames.tolist() == [[16, 0, 55, 88], [0, 25, 88, 37], [0, 0, 88, 88]]
    codes = net.infer(data.images, frames=data.frames, depth=1)
    for y, (top, left, height, width) in zip(codes.y, data.frames.tolist(), strict=True):
        around = y.clone()
        around[:, top : top + height, left : left + width] = 0
        assert (around == 0).all() and y.std() > 0
