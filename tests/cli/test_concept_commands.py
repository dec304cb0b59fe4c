"""The commands for a run that explains activations: the trust in its codes, and its page."""

import contextlib
import importlib
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from deconvnet.applications.classification.settings import ClassData
from deconvnet.cli import (
    classify,
    denoise,
    export,
    faithfulness,
    info,
    printed_commands,
    reconstruct,
    stability,
    visualize,
)
from deconvnet.cli.settings import (
    ClassifyConfig,
    DenoiseConfig,
    ExportConfig,
    FaithfulnessConfig,
    ReconstructConfig,
    StabilityConfig,
    VisualizeConfig,
)
from deconvnet.support.communicator import SINGLE

NETS = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    low = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*low, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""
TRAINED = [
    *("data=activations", "data.model=nets:make", "data.layer='4'", "data.images=photos"),
    *("data.size=20", "model=activations", "model.layer1.num_maps=6", "model.layer1.lam=20"),
    *("model.layer1.learning.epochs=2", "model.layer1.solver.method=fista"),
    *("model.layer1.solver.iterations=100", "progress=false", "name=run"),
]
LABELS = ["cats", "dogs"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, script):
    """A folder with photos of two classes, a module with a network, and a run over its layer 4."""
    folder, generator = tmp_path_factory.mktemp("concepts"), np.random.default_rng(0)
    for number in range(6):
        path = folder / "photos" / LABELS[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((20, 20)).save(path)
    (folder / "nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        importlib.import_module("nets")
        result = script(folder, "train.py", *TRAINED)
        assert result.code == 0, result
        yield folder
    del sys.modules["nets"]


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place / "runs" / "run"


def measured(**given):
    faithfulness.measure(FaithfulnessConfig("runs/run", progress=False, device="cpu", **given))


@pytest.fixture(scope="module")
def printed(place):
    """What both commands print; their files are in the run folder."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(place)
        measured(trust_code=True, labels=LABELS, lam=[2.0, 200.0])
        stability.measure(StabilityConfig("runs/run", trust_code=True, device="cpu"))
    return out.getvalue()


def test_commands_for_images_say_that_a_run_explains_activations(here, monkeypatch):
    monkeypatch.setattr(printed_commands, "_call", ("deconvnet", "reconstruct"))
    seen = (
        "explains activations of layer 4 of nets:make, not images: deconvnet visualize run=runs/r"
    )
    photo = "photos/cats/0.png"
    with pytest.raises(ValueError, match=rf"{seen}.*; arrays of 4 channels are given as a \.npy"):
        reconstruct.reconstruct(ReconstructConfig("runs/run", photo, device="cpu"))
    with pytest.raises(ValueError, match=seen):
        export.export(ExportConfig("runs/run", "maps.npz", photo, device="cpu"))
    with pytest.raises(ValueError, match=rf"{seen}un shows its concepts in images$"):
        denoise.denoise(DenoiseConfig("runs/run", photo, device="cpu"))
    with pytest.raises(ValueError, match=seen):
        classify.classify(ClassifyConfig(run="runs/run", data=ClassData("photos")), SINGLE)
    # A network file does not say whose activations they are.
    file = "runs/run/network.safetensors"
    told = "explains arrays of 4 channels, not images; if they are activations, give the run folder"
    for config in (VisualizeConfig(file, images="photos"), FaithfulnessConfig(file, "photos")):
        is_page = isinstance(config, VisualizeConfig)
        command = visualize.visualize if is_page else faithfulness.measure
        with pytest.raises(ValueError, match=told):
            command(config)
    described = "\n".join(info.describe("runs/run"))
    assert "6 of photos, 20x20; their activations in layer 4 of nets:make" in described
    assert "dead concepts" in described and " maps " not in described


def test_what_is_measured_is_printed_and_stands_on_the_page(here, printed):
    assert "layer 4: 6 concepts of 1x1, on 6 images" in printed
    assert "from another seed, 1" in printed and "half 1 in half 2" in printed
    found = json.loads((here / "faithfulness.json").read_text())
    again = json.loads((here / "stability.json").read_text())
    sparse, dense = json.loads((here / "faithfulness-lam.json").read_text()).values()
    assert sparse["l0_position"] < found["l0_position"] < dense["l0_position"]
    assert sparse["fvu"] > found["fvu"] > dense["fvu"]
    table = printed[printed.index("non-zero per position") :].splitlines()
    assert table[1].split()[:2] == ["2", f"{sparse['l0_position']:.1f}"]
    assert table[2].split()[0] == "200" and max(map(len, table[:3])) <= 80
    assert found["num_maps"] == 6 and found["accuracy"] in [n / 6 for n in range(7)]
    settings = dict(progress=False, device="cpu", k=2, explorer_images=0, grid_maps=1)
    settings |= dict(control=False, window="field", labels=LABELS, trust_code=True)
    settings |= dict(layers=["4", "concepts"])
    visualize.visualize(VisualizeConfig(run="runs/run", **settings))
    (features,) = (here / "gallery" / "layers").glob("2-concepts/features.json")
    features = json.loads(features.read_text())
    assert features["kind"] == "Concepts" and features["similar_are"] == "filters"
    assert features["below"] == "4"
    for shown in features["maps"]:
        said = dict(shown["statistics"])
        assert said["stability over seeds"] == pytest.approx(
            again["over_seeds"][shown["map"]], abs=1e-5
        )
        assert said["importance, nats"] >= 0
        # The channels with the largest products with its filter.
        weights = [source["weight"] for source in shown["sources"]]
        assert weights and weights == sorted(weights, reverse=True)
        for example in shown["examples"]:
            heat = example["heat"]
            assert (heat["rows"], heat["columns"]) == (7, 7)
            # Positions are 2 pixels apart; the field of the first unit begins with the image.
            assert heat["box"] == [3.0, 3.0, 17.0, 17.0]
    page = (here / "gallery" / "index.html").read_text()
    assert "variance unexplained" in page and "make: concepts of layer 4" in page


def test_code_that_a_run_names_is_not_called_unless_the_user_trusts_it(here):
    for command in (
        measured,
        lambda: stability.measure(StabilityConfig("runs/run")),
        lambda: visualize.visualize(VisualizeConfig(run="runs/run")),
    ):
        with pytest.raises(ValueError, match="activations of nets:make, whose code would run"):
            command()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": ["a", "b", "c"]}, "labels: 3 names, but runs/run has 2 classes"),
        ({"images": "nowhere"}, "images=nowhere: no such file or folder"),
        ({"size": 0}, "size=0: must be at least 1, or null"),
        ({"max_images": 0}, "max_images=0: must be at least 1"),
        ({"lam": [1.0, -2.0]}, "lam=-2.0: must be a positive number"),
        ({"batch": 0}, "batch=0: must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(here, given, message):
    with pytest.raises(ValueError, match=message):
        measured(trust_code=True, **given)


def test_other_runs_and_damaged_files_are_refused_in_one_line(here, printed):
    with pytest.raises(ValueError, match="seeds=0, halves=false: nothing to compare with"):
        StabilityConfig("runs/run", seeds=0, halves=False)
    with pytest.raises(ValueError, match="network.safetensors: not a run folder"):
        stability.measure(StabilityConfig("runs/run/network.safetensors"))
    with pytest.raises(ValueError, match="explains arrays of 4 channels, not images; if they are"):
        faithfulness.measure(FaithfulnessConfig("runs/run/network.safetensors", images="photos"))
    for name in ("faithfulness", "stability"):
        path = here / f"{name}.json"
        content = path.read_text()
        for damaged in (content[:-2], "{}"):
            path.write_text(damaged)
            with pytest.raises(ValueError, match=f"{name}.json: damaged"):
                visualize.visualize(VisualizeConfig(run="runs/run", trust_code=True))
        path.write_text(content)
