"""The commands `occlusion` and `correspondence`, without their command line."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from deconvnet.cli import correspondence as correspondence_command
from deconvnet.cli import occlusion as occlusion_command
from deconvnet.cli.model_errors import one_line_model_errors
from deconvnet.cli.settings import CorrespondenceConfig, OcclusionConfig
from deconvnet.images.fit import Crop
from deconvnet.storage.ownership import ForeignFileError
from deconvnet.visualization.experiments.correspondence import correspondence
from deconvnet.visualization.experiments.occlusion import occlusion
from deconvnet.visualization.models.zoo import load_model
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.randomization import shuffle_weights

NETS = """
import torch
from torch import nn

def make(classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU()]
        if classes:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes)]
        return nn.Sequential(*layers)
"""
BOXES = """\
image, part, top, left, bottom, right
0.png, eye, 2, 3, 8, 9
0.png, all, 0, 0, 20, 20
1.png, eye, 5, 6, 11, 12
1.png, all, 0, 0, 20, 20
2.png, eye, 9, 4, 15, 10
2.png, all, 0, 0, 20, 20
"""


@pytest.fixture
def place(tmp_path, textures, monkeypatch):
    """The current folder: a module with a network, three images and the boxes of their parts."""
    for number, image in enumerate(textures(3, 3, 20, 22)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "tiny_nets.py").write_text(NETS)
    (tmp_path / "boxes.csv").write_text(BOXES)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("tiny_nets", None)


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).contiguous().float() / 255


def occlude(**settings):
    given = dict(model="tiny_nets:make", images="0.png", square=8, stride=4, device="cpu")
    occlusion_command.occlude(OcclusionConfig(**{**given, **settings}))


def compare(**settings):
    given = dict(model="tiny_nets:make", boxes="boxes.csv", within="all", draws=3, device="cpu")
    correspondence_command.compare(CorrespondenceConfig(**{**given, **settings}))


def projector():
    sys.path.insert(0, ".")
    import tiny_nets

    sys.path.pop(0)
    return Projector(tiny_nets.make().eval())


def test_occlusion_writes_the_panels_and_the_numbers_of_each_image(place, capsys):
    occlude(images=["0.png", "2.png"], layer="4", label="2", output="out")
    expected = occlusion(
        projector(),
        pixels("2.png")[None],
        layer="4",
        class_index=2,
        occluder_size=8,
        stride=4,
    )
    found = np.load("out/2-4.npz")
    assert_close(torch.from_numpy(found["activity"]), expected.activity, rtol=1e-5, atol=0)
    assert_close(torch.from_numpy(found["probability"]), expected.probability, rtol=1e-5, atol=0)
    assert found["rows"].tolist() == expected.corners[0].tolist()
    names = sorted(path.name for path in (place / "out").iterdir() if path.is_file())
    assert names == ["0-4.npz", "0-4.png", "2-4.npz", "2-4.png"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and f"map {expected.unit[0]} of 4" in lines[1]
    assert "class 2 (no class names: give labels=FILE)" in lines[1]


def test_occlusion_takes_the_highest_layer_and_names_of_classes(place, capsys):
    occlude(labels=["cat", "dog, hound", "owl"], label="hound")
    assert (place / "runs" / "tiny_nets-make" / "occlusion" / "0-4.png").is_file()
    assert "dog" in capsys.readouterr().out
    occlude(layer="?")
    assert "* 4 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "conv"}, "layer 'conv': no such layer"),
        ({"map": 5, "layer": "4"}, "map=5: 4 has 5 maps"),
        ({"map": -1}, "map=-1"),
        ({"label": "3"}, "label=3: this network has 3 classes"),
        ({"label": "cat"}, "label=cat: the network names no classes"),
        ({"label": "1", "options": {"classes": 0}}, "label=1: this network has no classes"),
        ({"labels": ["a", "b"]}, "labels: 2 names"),
        ({"square": 21}, "square=21: the image has 20x22"),
        ({"square": 0}, "square=0"),
        ({"stride": 9}, "stride=9: must be at most 8"),
        ({"images": "none.png"}, "images=none.png"),
        ({"images": None}, "images=null"),
        ({"model": None}, "give either run="),
        ({"method": "best"}, "method=best"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_settings_of_occlusion_are_named(place, settings, message):
    with pytest.raises(ValueError, match=message):
        occlude(**settings)
    assert not (place / "runs").exists()


def test_correspondence_prints_and_writes_the_scores(place, capsys):
    compare(layers=["1", "4"], output="out", seed=3)
    x = torch.stack([pixels(f"{n}.png") for n in range(3)])
    boxes = torch.tensor([[2, 3, 8, 9], [5, 6, 11, 12], [9, 4, 15, 10]])
    within = torch.tensor([[0, 0, 20, 20]] * 3)
    expected = correspondence(
        projector(),
        x,
        {"eye": boxes},
        ["1", "4"],
        draws=3,
        within=within,
        generator=torch.Generator().manual_seed(3),
    )
    with open("out/correspondence.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["covered"], row["layer"]) for row in rows] == [
        *(("eye", "1"), ("eye", "4")),
        *(("random", "1"), ("random", "4")),
    ]
    for row in rows:
        score = expected[row["covered"]][row["layer"]]
        assert float(row["difference"]) == pytest.approx(score.mean, rel=1e-5)
        assert float(row["standard_error"]) == pytest.approx(score.error, rel=1e-5)
    assert (place / "out" / "correspondence.png").is_file()
    out = capsys.readouterr().out
    assert "3 images" in out and "| eye |" in out and "out/correspondence.png" in out


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("image,part\n", {}, "top, left, bottom, right is missing"),
        (BOXES.replace("2, 3, 8, 9", "2, 3, 8, x"), {}, "line 2: .*2,3,8,x: expected whole"),
        (BOXES.replace("2, 3, 8, 9", "2, 3, 8"), {}, "line 2"),
        (BOXES.replace("2, 3, 8, 9", "2, 3, 8, 99"), {}, "0.png, eye: 2,3,8,99 is no box"),
        (BOXES.replace("1.png, all, 0, 0, 20, 20\n", ""), {}, "1.png has no box of all"),
        (BOXES + "2.png, eye, 9, 4, 15, 10\n", {}, "line 8: 2.png has eye twice"),
        ("\n".join(BOXES.splitlines()[:3]), {}, "1 images"),
        (BOXES.replace("2.png", "none.png"), {}, "none.png"),
        (BOXES, {"within": "face"}, "within=face: no such part; there are eye, all"),
        (BOXES, {"layers": ["conv"]}, "no such layer"),
        (BOXES, {"layers": []}, "layers="),
        (BOXES, {"draws": -1}, "draws=-1"),
        (BOXES, {"boxes": "none.csv"}, "boxes=none.csv: cannot be read: No such file"),
    ],
)
def test_wrong_boxes_are_named(place, text, settings, message):
    (place / "boxes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        compare(**settings)
    assert not (place / "runs").exists()


@pytest.mark.parametrize("name", ["correspondence.png", "correspondence.csv"])
def test_correspondence_replaces_no_file_of_the_user(place, name):
    (place / "out").mkdir()
    (place / "out" / name).write_text("mine")
    with pytest.raises(ForeignFileError, match=name):
        compare(layers=["1"], output="out")
    assert (place / "out" / name).read_text() == "mine"


def test_a_box_follows_the_crop_of_its_image():
    image = torch.zeros(3, 60, 90)
    image[:, 20:32, 30:54] = 1
    crop = Crop(40, 30)
    top, left, bottom, right = crop.box((20, 30, 32, 54), (60, 90))
    rows, columns = ((crop(image)[0] > 0.5).any(axis).nonzero()[:, 0] for axis in (1, 0))
    assert (top, bottom) == (rows[0], rows[-1] + 1)
    assert (left, right) == (columns[0], columns[-1] + 1)
    assert crop.box((0, 0, 2, 90), (60, 90)) == (0, 0, 0, 30)


def test_a_part_that_the_crop_cuts_off_is_refused(place):
    (place / "boxes.csv").write_text(BOXES.replace("2, 3, 8, 9", "2, 0, 8, 1"))
    with pytest.raises(ValueError, match="0.png, eye: lies outside the square"):
        compare(size=20)


BROKEN = """
import torch
from torch import nn

class Scale(nn.Module):
    def forward(self, x):
        return x * {}["scale"]

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        raise KeyError("no backward")

class Double(nn.Module):
    def forward(self, x):
        return Twice.apply(x)

def forward():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(Scale()))

def channels():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(7, 4, 3))

def backward():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Double(), nn.Conv2d(4, 4, 3), nn.ReLU())

def factory():
    return {}["missing"]

def uncopied():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    net.held = net[0].weight * 2
    return net
"""


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("forward", ["in 2.0 (Scale): KeyError: 'scale'"]),
        ("channels", ["in 2 (Conv2d): Given groups=1", "7 channels"]),
        ("backward", ["in its backward pass: KeyError: 'no backward'"]),
        ("factory", ["model=broken_nets:factory: cannot be built: KeyError: 'missing'"]),
        ("uncopied", ["cannot be copied", "control=false"]),
    ],
)
def test_an_error_of_the_users_network_names_it_and_its_layer(place, model, parts):
    (place / "broken_nets.py").write_text(BROKEN)
    name = f"broken_nets:{model}"
    with pytest.raises(SystemExit) as stopped, one_line_model_errors(name):
        if model == "uncopied":
            shuffle_weights(load_model(name).module)
        occlude(model=name)
    message = str(stopped.value)
    assert message.startswith(f"error: model={name}: ") and "\n" not in message
    assert all(part in message for part in [*parts, "HYDRA_FULL_ERROR=1"])
    sys.modules.pop("broken_nets", None)


def test_errors_that_are_not_the_networks_pass():
    with pytest.raises(KeyError), one_line_model_errors("tiny_nets:make"):
        raise KeyError("a mistake of this package")
