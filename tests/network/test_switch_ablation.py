"""What the switches are worth: the measure, the network left as it was, and the script."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from deconvnet import DeconvNet, LayerSettings, LearningSettings, PreprocessingSettings, load
from deconvnet.network.switch_ablation import DESCRIPTIONS, ablate, unpooling
from deconvnet.operators.pooling import UNPOOLINGS
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.training.layer_data import LayerData
from deconvnet.training.layer_trainer import LayerTrainer

FAST = SolverSettings(method="fista", iterations=20)


def network(*, window=(2, 3, 3), target="image", maps=(6, 8, 6), **other):
    """Three layers with random filters."""
    common = dict(pool=list(window), pooling="in_loop", target=target, solver=FAST, **other)
    layers = [LayerSettings(count, 5, lam=2.0, **common) for count in maps]
    return DeconvNet(layers, PreprocessingSettings("grey", ["contrast"]), seed=1)


def learn(net, images):
    """Learn all layers; the codes of the images."""
    net.preprocessing.fit(images)
    codes = net.infer(images, depth=0)
    for number, layer in enumerate(net.layers, 1):
        if number > 1:
            layer.fit_scale(codes.layers[-1].pooled)
        trainer = LayerTrainer(layer, LayerData.from_codes(net, codes, number), number=number)
        while not trainer.done:
            trainer.update()
        codes = net.infer_next_layer(codes)
    return codes


@pytest.fixture(scope="module")
def images(textures):
    return textures(5, 3, 32, 36)


@pytest.fixture(scope="module")
def trained(images):
    """(network, codes of its training images)."""
    net = network(learning=LearningSettings(epochs=6, batch_size=3))
    return net, learn(net, images)


@pytest.fixture(scope="module")
def found(trained):
    return ablate(*trained)


def infer(net, images, **options):
    net.preprocessing.fit(images)
    return net.infer(images, **options)


def by_place(found):
    return {(a.kind, a.layer, a.inferred): a for a in found}


def test_all_unpoolings_are_seen_from_all_layers_above_the_first(found):
    every = [(kind, n, new) for kind in UNPOOLINGS for n in (2, 3) for new in (False, True)]
    assert [(a.kind, a.layer, a.inferred) for a in found] == every
    assert list(DESCRIPTIONS) == list(UNPOOLINGS)
    assert all(a.images.shape == (5, 1, 32, 36) and math.isfinite(a.snr) for a in found)


def test_the_snr_is_the_one_of_the_images_shown_over_all_of_them(trained, found):
    y = trained[1].y.double().numpy()
    for a in found:
        noise = np.sum((y - a.images.double().numpy()) ** 2)
        expected = 10 * np.log10(np.sum((y - y.mean()) ** 2) / noise)
        assert a.snr == pytest.approx(expected, abs=1e-9)


def test_with_the_switches_it_is_the_network_as_it_is(trained, found, images):
    net, codes = trained
    reinferred = net.infer(images)
    for number in (2, 3):
        for new in (False, True):
            a = by_place(found)["switches", number, new]
            assert a.snr == net.snr(codes, number) == net.snr(reinferred, number)
            assert torch.equal(a.images, net.operator(codes, number)(codes.layer(number).z))


@pytest.mark.parametrize("kind", UNPOOLINGS)
def test_reinferred_maps_are_those_of_a_network_with_this_unpooling(trained, found, kind):
    net, codes = trained
    settings = [replace(layer.settings, unpooling=kind) for layer in net.layers]
    other = DeconvNet(settings, net.preprocessing.settings)
    other.load_state_dict(net.state_dict())
    for number in (2, 3):
        z = other.layer(number).infer(other.layer_problem(codes, number)).z
        A = other.operator(codes, number)
        a = by_place(found)[kind, number, True]
        assert torch.equal(a.images, A(z))
        # Maps that are not inferred again are those inferred with the switches.
        before = by_place(found)[kind, number, False]
        assert torch.equal(before.images, A(codes.layer(number).z))


def test_switches_beat_whatever_forgets_a_part_of_them_in_each_layer(found):
    seen = by_place(found)
    for number in (2, 3):
        for new in (False, True):
            best = seen["switches", number, new].snr
            for kind in UNPOOLINGS[1:]:
                assert seen[kind, number, new].snr < best - 0.2, (kind, number, new)


def test_maps_inferred_for_an_unpooling_reach_a_lower_objective_than_those_of_the_switches(trained):
    net, codes = trained
    for kind in UNPOOLINGS[1:]:
        with unpooling(net, kind):
            for number in (2, 3):
                layer, problem = net.layer(number), net.layer_problem(codes, number)
                z = codes.layer(number).z
                residual = problem.b - net.operator(codes, number)(z)
                squares = residual.double().square().sum((1, 2, 3))
                before = layer.settings.lam / 2 * squares + z.double().abs().sum((1, 2, 3))
                assert (layer.infer(problem).objective < before).all()


@pytest.mark.parametrize("target", ["maps", "image"])
def test_maps_are_inferred_again_only_if_they_explain_the_image(images, target):
    net = network(target=target, maps=(2, 2, 2), window=(1, 2, 2))
    some = ablate(net, infer(net, images[:1]))
    assert any(a.inferred for a in some) == (target == "image")
    assert len(some) == len(UNPOOLINGS) * 2 * (2 if target == "image" else 1)


def test_windows_of_one_value_leave_nothing_to_forget(images):
    net = network(window=(1, 1, 1), maps=(3, 3, 3))
    some = ablate(net, infer(net, images[:2]))
    for a in some:
        assert torch.equal(a.images, by_place(some)["switches", a.layer, a.inferred].images)
        assert a.snr == by_place(some)["switches", a.layer, a.inferred].snr


def test_codes_of_fewer_layers_are_seen_as_far_as_they_go(images):
    net = network(maps=(3, 3, 3))
    two = infer(net, images[:1], depth=2)
    assert {a.layer for a in ablate(net, two)} == {2}
    assert ablate(net, infer(net, images[:1], depth=1)) == []


def test_the_network_has_its_own_settings_again_whatever_happens(trained, found):
    net, codes = trained
    before = [layer.settings for layer in net.layers]
    assert {settings.unpooling for settings in before} == {"switches"}

    def untouched():
        return all(a is b.settings for a, b in zip(before, net.layers, strict=True))

    with pytest.raises(RuntimeError, match="on the way"), unpooling(net, "average"):
        assert {layer.settings.unpooling for layer in net.layers} == {"average"}
        assert net.layer(2).settings == replace(before[1], unpooling="average")
        raise RuntimeError("on the way")
    assert untouched()
    wrong = pytest.raises(ValueError, match="unpooling=nothing: choose one of")
    with wrong, unpooling(net, "nothing"):
        pass
    assert untouched()
    # Inference that fails: the codes are of another network.
    with pytest.raises(RuntimeError):
        ablate(net, replace(codes, y=codes.y[..., 1:]))
    assert untouched()
    assert untouched()


def test_unpoolings_within_each_other_end_in_the_right_order(images):
    net = network(unpooling="centre", maps=(2, 2, 2))
    with unpooling(net, "average"):
        with unpooling(net, "no_map"):
            assert net.layer(1).settings.unpooling == "no_map"
        assert net.layer(1).settings.unpooling == "average"
    assert net.layer(1).settings.unpooling == "centre"


# The script

TINY = [
    *("progress=false", "device=cpu", "data.size=24", "preprocessing.contrast_size=5"),
    *(f"model.layer{n}.{key}" for n in (1, 2, 3) for key in ("num_maps=3", "filter_size=3")),
    *(f"model.layer{n}.learning.epochs=1" for n in (1, 2, 3)),
    *(f"model.layer{n}.solver.iterations=10" for n in (1, 2, 3)),
]
IN_LOOP = [
    "+layers=3",
    *(f"model.layer{n}.pool=[2,2,2]" for n in (1, 2, 3)),
    *(f"model.layer{n}.pooling=in_loop" for n in (1, 2, 3)),
    *(f"model.layer{n}.solver.method=fista" for n in (1, 2, 3)),
    *("model.layer2.connectivity=full", "model.layer3.connectivity=full"),
    "model.layer3.target=image",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory, textures):
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(textures(5, 3, 24, 30)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos, script):
    """A run folder of three layers, of which the third explains the image."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["data=folder", f"data.path={photos}", *TINY, *IN_LOOP]
    result = script(folder, "train.py", *arguments)
    assert result.code == 0, result
    return folder / "runs" / "folder"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run folder, to be changed."""
    return shutil.copytree(run, tmp_path / "copy")


def assert_one_line(result, *parts):
    assert result.code == 1, result
    assert result.err.endswith("\n") and result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err + result.out
    for part in parts:
        assert str(part) in result.err


def cells(out):
    """{first cell: other cells} of the rows of a table, the head apart."""
    lines = [line.strip().strip("|").split("|") for line in out.splitlines() if line[:1] == "|"]
    head, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return head, {row[0]: row[1:] for row in rows}


def test_the_script_prints_a_row_for_each_unpooling_and_leaves_a_picture(copy, photos, script):
    result = script(copy.parent, "ablate.py", "run=copy", "device=cpu")
    assert result.code == 0 and result.err == "", result
    head, rows = cells(result.out)
    assert head == [
        "unpooling",
        "layer 2",
        "layer 2, maps inferred for it",
        "layer 3",
        "layer 3, maps inferred for it",
        "",
    ]
    assert list(rows) == list(UNPOOLINGS)
    assert "5 training images" in result.out  # of at most six
    # Layer 2 explains the maps below: they do not depend on the unpooling.
    assert {row[1] for row in rows.values()} == {"-"}
    for kind, row in rows.items():
        assert row[4] == DESCRIPTIONS[kind]
        assert all(abs(float(row[n])) < 100 for n in (0, 2, 3))
    assert rows["switches"][2] == rows["switches"][3]
    assert "copy/pictures/switches.png" in result.out
    with Image.open(copy / "pictures" / "switches.png") as picture:
        pixels = np.asarray(picture)
    # Seven rows of five images: preprocessed, and one for each unpooling.
    assert pixels.shape[0] > 7 * 90 and pixels.shape[1] > 5 * 90 and pixels.std() > 0


def test_the_numbers_of_the_script_are_those_of_the_network(copy, photos, script):
    result = script(copy.parent, "ablate.py", "run=copy", "device=cpu", "count=2", "chunk=1")
    assert result.code == 0 and "2 training images" in result.out, result
    net, paths = load(copy), [photos / "0.png", photos / "4.png"]
    # Evenly among all: of two the first and the last, as the run saw them, 24x24 in the middle.
    pixels = [np.asarray(Image.open(path))[:, 3:27] for path in paths]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    _, rows = cells(result.out)
    for a in ablate(net, net.infer(images)):
        # Rounded to two decimals there.
        shown = float(rows[a.kind][2 * (a.layer - 2) + a.inferred])
        assert shown == pytest.approx(a.snr, abs=0.02)


def test_the_command_changes_only_one_picture_of_the_run(copy, script):
    def content():
        # But for the record of what was made.
        files = [p for p in copy.rglob("*") if p.is_file() and ".deconvnet" not in p.parts]
        return {path: path.read_bytes() for path in files}

    before = content()
    assert script(copy.parent, "ablate.py", f"run={copy}", "count=1").code == 0
    after = content()
    assert after.pop(copy / "pictures" / "switches.png")
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["run has no value", "run=..."]),
        (["run=nowhere"], ["nowhere: no such run folder or network file"]),
        (["run=copy/train.log"], ["train.log", ".safetensors"]),
        (
            ["run=copy/network.safetensors"],
            ["network.safetensors: not a run folder", "deconvnet train"],
        ),
        (["run=copy", "count=0"], ["count=0: must be at least 1"]),
        (["run=copy", "chunk=0"], ["chunk=0", "at least 1"]),
        (["run=copy", "device=nosuch"], ["device=nosuch"]),
        (["run=copy", "cuont=2"], ["cuont"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_settings_of_the_script_end_in_one_line(copy, script, arguments, parts):
    assert_one_line(script(copy.parent, "ablate.py", *arguments), *parts)
    assert not (copy / "pictures" / "switches.png").exists()


@pytest.mark.parametrize("wrong", ["count=many", "count=2.5", "count=null", "chunk=many"])
def test_a_count_that_is_no_whole_number_ends_in_one_line(copy, script, wrong):
    result = script(copy.parent, "ablate.py", "run=copy", wrong)
    assert_one_line(result, *wrong.split("="))


@pytest.mark.parametrize("pools", [[[1, 2, 2]], [None, [1, 2, 2]], [None, None, None]])
def test_a_network_without_pooling_has_no_switches_to_ask_for(tmp_path, script, pools):
    # The window of the topmost layer is never unpooled on the way to the image.
    DeconvNet([LayerSettings(2, 3, pool=pool) for pool in pools]).save(tmp_path / "my.safetensors")
    result = script(tmp_path, "ablate.py", "run=my.safetensors")
    assert_one_line(result, "run=my.safetensors", "no pooling")


def test_a_run_whose_images_are_gone_ends_in_one_line(copy, photos, tmp_path, script):
    elsewhere = photos.rename(tmp_path / "elsewhere")
    try:
        result = script(tmp_path, "ablate.py", "run=copy")
        assert_one_line(result, f"data.path={photos}: no such folder")
        photos.mkdir()
        result = script(tmp_path, "ablate.py", "run=copy")
        assert_one_line(result, f"data.path={photos}: no image in this folder")
        photos.rmdir()
    finally:
        elsewhere.rename(photos)


def test_help_says_what_the_script_does_and_needs(tmp_path, script):
    result = script(tmp_path, "ablate.py", "--help")
    assert result.code == 0 and result.err == ""
    assert "switches" in result.out and "run=runs/" in result.out and "count" in result.out
    assert list(tmp_path.iterdir()) == []
