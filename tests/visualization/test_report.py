"""Visualizations and their files, by one or several processes, and the command as a user runs it:
what it writes, how it resumes, and its errors."""

import importlib.util
import io
import json
import linecache
import os
import re
import shutil
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import shown_pictures
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.models import mobilenetv2, resnet, vgg, vision_transformer

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings, load
from deconvnet.cli import visualize as visualize_command
from deconvnet.cli.settings import VisualizeConfig
from deconvnet.images.datasets import LazyImages, lazy_images
from deconvnet.images.fit import Crop
from deconvnet.images.item import Item
from deconvnet.images.sources import DataSettings
from deconvnet.storage import ownership
from deconvnet.visualization import searched_network as module
from deconvnet.visualization.drawing.canvas import GAP, LINE
from deconvnet.visualization.drawing.sheet import CARD
from deconvnet.visualization.event_page import map_card
from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.layer_choice import default_layers
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.zfnet import ZFNet
from deconvnet.visualization.models.zoo import LoadedModel, digest, save_model
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.report import visualize_network
from deconvnet.visualization.search.projection_grids import sample_maps
from deconvnet.visualization.search.randomization import shuffle_weights
from deconvnet.visualization.search.top_activations import SearchState, find_top_activations
from deconvnet.visualization.search.top_projections import load_top_projections
from deconvnet.visualization.settings import VisualizationSettings

ROOT = Path(__file__).resolve().parents[2]
NORMALIZATION = Normalization((0.5,), (0.25,))


class Small(nn.Module):
    """Layers of every kind: one that is never active, one that only passes on, vectors."""

    def __init__(self, channels=3, *, padding=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=padding)
        self.relu2 = nn.ReLU()
        self.dead = nn.ReLU()
        self.pool2 = nn.AdaptiveAvgPool2d(3)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(45, 3)

    def forward(self, x):
        y = self.relu2(self.conv2(self.pool1(self.relu1(self.conv1(x)))))
        self.dead(-y - 1)
        return self.fc(self.flatten(self.pool2(y)))


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def subject_of(net, normalization=NORMALIZATION):
    return LoadedModel(net.eval(), "small net", "random", normalization, digest=digest(net))


def lazy(images, **options):
    items = [
        Item(f"folder/image-{n}.png", lambda image=image: image) for n, image in enumerate(images)
    ]
    return LazyImages(items, **options)


def settings_of(**options):
    given = {"k": 3, "progress": False, "explorer_images": 2, "layers": ["relu1", "relu2"]}
    given |= {"grid_maps": 2, "control_maps": 1}  # pictures are what takes the time
    return VisualizationSettings(**{**given, **options})


@pytest.fixture(scope="module")
def images(textures):
    return lazy(textures(6, 3, 18, 20))


@pytest.fixture(scope="module")
def seen(tmp_path_factory, images):
    """(folder, subject, images, settings, files) of a visualization that tests only read."""
    folder = tmp_path_factory.mktemp("seen") / "out"
    subject = subject_of(seeded(Small))
    settings = settings_of(layers=["conv1", "relu2", "dead", "fc"], control_maps=3, occlusion=1)
    settings.invariance = 1
    return folder, subject, images, settings, visualize_network(subject, images, settings, folder)


@pytest.fixture
def copied(seen, tmp_path):
    shutil.copytree(seen[0], tmp_path / "out", copy_function=shutil.copy2)
    return (tmp_path / "out", *seen[1:])


@pytest.fixture
def undrawn(monkeypatch):
    """Visualizations with empty pictures of layers and without a TensorBoard page, for tests that
    look at neither: to draw takes as long as all the rest."""
    place = "deconvnet.visualization.report"
    monkeypatch.setattr(f"{place}.layer_grid", lambda *_, **__: torch.ones(3, 1, 1))
    monkeypatch.setattr(f"{place}.write_event_page", lambda *_: None)


def times(folder, pattern="visualization/**/*.npz"):
    """When each file was written, by its name below the folder."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in sorted(Path(folder).glob(pattern))
    }


def manifest(folder):
    return json.loads((Path(folder) / "visualization" / "manifest.json").read_text())


def picture(path):
    with Image.open(path) as image:
        expected = "WEBP" if Path(path).suffix == ".webp" else "PNG"
        assert image.format == expected and image.mode == "RGB"
        return np.asarray(image)


# What is written.


def test_a_visualization_writes_its_files_and_returns_their_paths(seen):
    folder, _, _, _, written = seen
    assert written == {
        "pictures": folder / "visualization" / "figures",
        "manifest": folder / "visualization" / "manifest.json",
        "gallery": folder / "gallery" / "index.html",
    }
    assert all(path.exists() for path in written.values())
    kept = ["conv1.npz", "fc.npz", "relu2.npz"]
    assert sorted(times(folder)) == sorted(
        [
            *("visualization/topk.npz", "visualization/control/topk.npz"),
            *(f"visualization/projections/{name}" for name in kept),
            *(f"visualization/control/projections/{name}" for name in kept),
        ]
    )
    figures = {path.name for path in written["pictures"].iterdir()}
    assert figures == {
        *("conv1.webp", "relu2.webp", "fc.webp", "conv1-filters.png"),
        *("occlusion-0.png", "invariance.png"),
    }
    for name in figures:
        pixels = picture(written["pictures"] / name)
        assert min(pixels.shape[:2]) > 20 and len(np.unique(pixels)) > 3
    left = {path.name for path in folder.rglob(".*")} | {p.name for p in folder.rglob("*.tmp")}
    assert left == {".deconvnet"}, "temporary files"
    names = {path.name for path in (folder / ".deconvnet").iterdir()}
    assert names == {"made", "visualization.lock"}


def test_the_manifest_lists_the_origin_of_every_tile(seen):
    folder, subject, images, settings, _ = seen
    said = manifest(folder)
    assert said["network"] == {
        "name": "small net",
        "weights": "random",
        "sha256": subject.digest,
        "normalization": {"mean": [0.5], "std": [0.25], "order": "rgb"},
    }
    assert said["images"] == {"count": 6, "sha256": images.fingerprint}
    assert said["settings"]["k"] == 3 and said["settings"]["layers"] == settings.layers
    assert "shuffled" in said["control"] or "random order" in said["control"]
    # A layer that is never active has nothing to show.
    assert list(said["layers"]) == ["conv1", "relu2", "fc"]
    projector = Projector(subject.module, normalization=subject.normalization)
    tops = find_top_activations(projector, images, settings.layers, k=3, inside=True)
    for layer, about in said["layers"].items():
        place = folder / "visualization"
        found, top = load_top_projections(place / about["arrays"]), tops[layer]
        assert (place / about["figure"]).is_file()
        (info,) = (info for info in projector.layers(_x(subject, images)) if info.name == layer)
        assert about["shape"] == list(info.shape)
        assert about["field"] == (info.field and list(info.field))
        assert tuple(about["methods"]) == found.methods
        for method, told in about["methods"].items():
            report = found.reports[method]
            assert told == json.loads(json.dumps({"report": asdict(report), "says": str(report)}))
            assert f"{method}: rectified" in told["says"]
        assert about["dead_maps"] == np.flatnonzero(top.dead).tolist()
        assert [entry["map"] for entry in about["maps"]] == found.maps.tolist()
        assert len(about["shown"]) == 2 and set(about["shown"]) <= set(found.maps.tolist())
        for entry in about["maps"]:
            row, m = entry["row"], entry["map"]
            assert [tile["rank"] for tile in entry["tiles"]] == list(range(found.count(row)))
            assert len(entry["tiles"]) == len(top.units(m))
            for tile in entry["tiles"]:
                at = row, tile["rank"]
                number, _, *unit = found.units[at].tolist()
                assert (tile["image"], tile["unit"]) == (number, unit)
                assert (number, m, *unit) == top.units(m)[tile["rank"]]
                assert tile["name"] == f"folder/image-{number}.png"
                assert tile["box"] == found.boxes[at].tolist()
                assert tile["value"] == found.values[at] == pytest.approx(top.values[m, at[1]])


def _x(subject, images):
    return subject.normalization.apply(images[0][None])


def test_tensorboard_shows_the_same_pictures_with_descriptions(seen):
    folder = seen[0] / "visualization"
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    shown = shown_pictures(events)
    names = {path.stem for path in (folder / "figures").iterdir()}
    controls = {tag for tag in shown if tag.startswith("3 control/")}
    others = {tag.partition("/")[2] for tag in shown.keys() - controls - {"0 filters/conv1"}}
    assert others == names - {"conv1-filters"} and "0 filters/conv1" in shown
    assert controls and min(shown).startswith("0 filters/")
    # A card for each map of the grid.
    assert shown["2 strongest activations/relu2"] == [(0, 2)]
    for tag in shown:
        assert events.SummaryMetadata(tag).summary_description.endswith("."), tag
    (text,) = (tag for tag in events.Tags()["tensors"] if "visualization" in tag)
    said = events.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert "| relu2 | deconv: rectified 2" in said
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


def test_the_card_of_a_map_has_a_row_for_each_method_and_the_image(seen):
    result = load_top_projections(seen[0] / "visualization" / "projections" / "relu2.npz")
    card = map_card(result, 0)
    rows = len(result.tiles) + 1
    assert card.shape[0] == 3 and card.shape[2] <= CARD
    height = (card.shape[1] - LINE + GAP) / rows - GAP
    assert height == int(height) and card.min() >= 0 and card.max() <= 1
    # A map that no image activates has no tiles.
    result.values[0] = np.nan
    assert result.count(0) == 0 and map_card(result, 0).shape == (3, LINE, CARD)


def referenced(gallery):
    """The files that the page and its scripts name."""
    scripts = [*gallery.rglob("features.js"), *gallery.rglob("layers.js")]
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in [gallery / "index.html", *scripts]
    )
    return set(re.findall(r"[\w./#-]+\.(?:png|webp|json|js|css)\b", text)) - {"gallery.add"}


def test_the_gallery_has_every_file_that_it_shows(seen):
    gallery = seen[0] / "gallery"
    names = {name for name in referenced(gallery) if not re.fullmatch(r"image-\d\.png", name)}
    names -= {"features.json"}
    assert len(names) > 20
    for name in names:
        assert (gallery / name).is_file(), name
    page = (gallery / "index.html").read_text(encoding="utf-8")
    for words in ("small net", "conv1", "relu2", "fc", seen[1].digest, "lie inside the image"):
        assert words in page, words
    # Filters are shown of the layer that sees pixels alone.
    assert [path.parent.name for path in gallery.rglob("filters.*")] == ["1-conv1"]


def test_the_page_shows_what_the_arrays_contain(seen):
    """Examples, both methods, photographs, the survey of all images and the control."""
    folder, _, images, _, _ = seen
    gallery = folder / "gallery"
    layers = gallery / "layers"
    for number, name in ((1, "conv1"), (2, "relu2")):
        features = json.loads((layers / f"{number}-{name}" / "features.json").read_text())
        found = load_top_projections(folder / "visualization" / "projections" / f"{name}.npz")
        assert features["layer"] == name and tuple(features["methods"]) == found.methods
        assert [entry["map"] for entry in features["maps"]] == found.maps.tolist()
        for row, entry in enumerate(features["maps"]):
            assert len(entry["examples"]) == found.count(row)
            for rank, example in enumerate(entry["examples"]):
                image, _, *unit = found.units[row, rank].tolist()
                assert (
                    images.names[image] == f"folder/{example['image']}" and example["unit"] == unit
                )
                assert example["window"] == found.windows[row, rank].tolist()
                assert example["value"] == pytest.approx(float(found.values[row, rank]), rel=1e-5)
                assert example.get("border", False) == bool(found.border_marks[row, rank])
            histogram = entry["histogram"]
            assert sum(histogram["counts"]) + histogram["silent"] == len(images)
            strongest = {example["image"] for example in entry["examples"]}
            weaker = {example["image"] for example in entry["spectrum"]}
            assert not strongest & weaker
            for method in found.methods:
                assert entry["sheets"][method]["count"] == found.count(row)


def test_progress_bars_have_names_and_reach_their_ends(images, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    visualize_network(subject_of(seeded(Small)), images, settings_of(progress=True), tmp_path)
    said = sys.stderr.getvalue()
    for name in (
        *("searching", "searching, control", "projecting relu1", "projecting relu2"),
        *("projecting relu1, control", "projecting relu2, control", "gallery"),
    ):
        assert f"\r{name}: 100%" in said, name
    assert "0image [" not in said


@pytest.mark.usefixtures("undrawn")
def test_the_control_is_projected_in_full_for_maps_of_the_grid_alone(images, tmp_path):
    subject = subject_of(seeded(Small))
    options = {"layers": ["relu2"], "gallery": False, "grid_maps": 3, "control_maps": 2}
    visualize_network(subject, images, settings_of(**options), tmp_path)
    place = tmp_path / "visualization"
    trained, control = (
        load_top_projections(place / folder / "relu2.npz")
        for folder in ("projections", "control/projections")
    )
    assert control.maps.tolist() == trained.maps.tolist()
    assert control.effective == trained.effective
    shown = manifest(tmp_path)["layers"]["relu2"]["shown"][:2]
    counts = {int(m): control.count(row) for row, m in enumerate(control.maps)}
    assert all((count > 1) == (m in shown) for m, count in counts.items())


@pytest.mark.usefixtures("undrawn")
def test_maps_that_are_dead_in_the_control_are_said(images, tmp_path, monkeypatch):
    def silenced(model, x, *, seed):
        net = shuffle_weights(model, seed=seed)
        with torch.no_grad():
            net.conv2.bias[[0, 3]] = -1e6
            net.conv1.bias[:] = -1e6
        return net

    monkeypatch.setattr(module, "shuffled_control", silenced)
    options = {"layers": ["relu1", "relu2"], "maps": [0, 1, 3]}
    visualize_network(subject_of(seeded(Small)), images, settings_of(**options), tmp_path)
    layers = manifest(tmp_path)["layers"]
    assert (
        layers["relu2"]["dead_in_the_control"][0] == 0
        and 3 in (layers["relu2"]["dead_in_the_control"])
    )
    # A control without any activation is still shown.
    assert layers["relu1"]["dead_in_the_control"] == [0, 1, 3]
    assert (tmp_path / "gallery" / "index.html").is_file()


# Once more.


def fail(*_, **__):
    raise AssertionError("the result should have been read from a file")


def test_a_second_visualization_reads_everything_from_files(copied, monkeypatch):
    folder, subject, images, settings, _ = copied
    before, said = times(folder), manifest(folder)
    monkeypatch.setattr(module, "project_top_activations", fail)
    monkeypatch.setattr("deconvnet.visualization.search.top_activations._search", fail)
    visualize_network(subject, images, replace(settings, occlusion=0, invariance=0), folder)
    assert times(folder) == before
    assert manifest(folder)["layers"] == said["layers"]
    assert len(list((folder / "visualization").glob("events.out.tfevents.*"))) == 1


TOPS = {"visualization/topk.npz", "visualization/control/topk.npz"}


def changed(folder, before):
    after = times(folder)
    return {
        name.removeprefix("visualization/") for name in after if after[name] != before.get(name)
    }


ALL = {"topk.npz", "projections/relu1.npz", "projections/relu2.npz"}
CONTROLS = {f"control/{name}" for name in ALL}


FIRST = {"gallery": False, "control_maps": 3, "k": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory, images):
    """A folder with a visualization without a gallery."""
    folder = tmp_path_factory.mktemp("first") / "out"
    settings = settings_of(**FIRST)
    visualize_network(subject_of(seeded(Small)), images, settings, folder)
    return folder


@pytest.mark.parametrize(
    ("options", "recomputed"),
    [
        ({}, set()),
        ({"contrast": 0.9, "occlusion": 1, "batch": 2}, set()),
        # Maps of the grid are projected in full by the control.
        ({"grid_maps": 1}, CONTROLS - {"control/topk.npz"}),
        ({"window": "field"}, (ALL | CONTROLS) - {"topk.npz", "control/topk.npz"}),
        ({"k": 3}, ALL | CONTROLS),
        ({"inside": False}, ALL | CONTROLS),
        ({"maps": 2}, (ALL | CONTROLS) - {"topk.npz", "control/topk.npz"}),
        ({"method": "guided"}, (ALL | CONTROLS) - {"topk.npz", "control/topk.npz"}),
        ({"overlap": "normalised"}, (ALL | CONTROLS) - {"topk.npz", "control/topk.npz"}),
        ({"seed": 1}, CONTROLS),
        ({"control": False}, set()),
        ({"network": seeded(Small, 1)}, ALL | CONTROLS),
        ({"normalization": Normalization((0.5,), (0.5,))}, ALL | CONTROLS),
        ({"padding": 2}, ALL | CONTROLS),
        ({"images": 5}, ALL | CONTROLS),
        ({"crop": Crop(16, 16)}, ALL | CONTROLS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_only_what_depends_on_changed_settings_is_recomputed(
    first, images, tmp_path, request, options, recomputed
):
    if recomputed:  # otherwise all is drawn from the files
        request.getfixturevalue("undrawn")
    folder = tmp_path / "out"
    shutil.copytree(first, folder, copy_function=shutil.copy2)
    before, options = times(folder), dict(options)
    net = options.pop("network", seeded(Small))
    # The same parameters in a network that does something else with them.
    net.conv2.padding = (options.pop("padding", 1),) * 2
    subject = subject_of(net, options.pop("normalization", NORMALIZATION))
    data = LazyImages(images.items[: options.pop("images", 6)], crop=options.pop("crop", None))
    settings = settings_of(**{**FIRST, **options})
    visualize_network(subject, data, settings, folder)
    assert changed(folder, before) == recomputed


@pytest.mark.usefixtures("undrawn")
def test_pictures_lie_on_the_page_alone_and_are_read_from_there(images, tmp_path, monkeypatch):
    monkeypatch.setattr("deconvnet.visualization.search.tile_codec.SMALL", 4)
    projected, project = [], module.project_top_activations

    def counting(projector, images, layer, *arguments, **options):
        projected.append(layer)
        return project(projector, images, layer, *arguments, **options)

    monkeypatch.setattr(module, "project_top_activations", counting)
    subject, gallery = subject_of(seeded(Small)), tmp_path / "gallery"
    options = {"control": False, "explorer_images": 0, "maps": [0, 2], "k": 2}

    def visualized(*layers, **more):
        projected.clear()
        settings = settings_of(**{"layers": list(layers), **options, **more})
        visualize_network(subject, images, settings, tmp_path)
        return load_top_projections(tmp_path / "visualization" / "projections" / "relu2.npz")

    first = visualized("relu2")
    files = [gallery / f"layers/1-relu2/maps/{m}-projections.webp" for m in (0, 2)]
    pictures = [file.read_bytes() for file in files]
    assert list(first.sheets) == pictures
    path = tmp_path / "visualization" / "projections" / "relu2.npz"
    assert "sheets/webp" not in np.load(path).files
    # With another layer and contrast, the same pictures lie elsewhere on the page.
    second = visualized("relu1", "relu2", contrast=0.9)
    assert projected == ["relu1"] and second.sheets == first.sheets
    files = [Path(str(file).replace("1-relu2", "2-relu2")) for file in files]
    assert [file.read_bytes() for file in files] == pictures
    # Where the page is missing, they are made again, and the arrays have them until there is one.
    shutil.rmtree(gallery)
    third = visualized("relu2", gallery=False)
    assert projected == ["relu2"] and third.sheets == first.sheets
    assert "sheets/webp" in np.load(path).files


def test_one_process_at_a_time_visualizes_into_a_folder(images, tmp_path):
    subject = subject_of(seeded(Small))
    settings = settings_of(layers=["relu2"], control=False, gallery=False)
    with ownership.locked_folder(tmp_path, part="visualization"):
        with pytest.raises(ownership.FolderLockedError, match=r"process \d+ .* with output=\.\.\."):
            visualize_network(subject, images, settings, tmp_path)
        assert not (tmp_path / "visualization").exists()
    with ownership.locked_folder(tmp_path):  # a run that is training in this folder
        assert visualize_network(subject, images, settings, tmp_path)


def test_a_damaged_file_stops_a_visualization_with_one_line(copied):
    folder, subject, images, settings, _ = copied
    for name in ("topk.npz", "projections/relu2.npz", "control/topk.npz"):
        path = folder / "visualization" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name}: already exists and is not as"):
            visualize_network(subject, images, settings, folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["b", "a"])
@pytest.mark.usefixtures("undrawn")
def test_a_changed_image_of_the_same_name_is_searched_again(textures, tmp_path, name):
    folder = tmp_path / "photos"
    folder.mkdir()
    for each, pixels in zip("abc", textures(3, 3, 18, 20), strict=True):
        save_as(folder / f"{each}.bmp", pixels)

    def visualized(place):
        images = lazy_images(DataSettings(source="folder", path=str(folder), size=None))
        visualize_network(
            subject_of(seeded(Small)), images, settings_of(gallery=False), tmp_path / place
        )
        return times(tmp_path / place), SearchState.load(
            tmp_path / place / "visualization/topk.npz"
        )

    before, old = visualized("out")
    again, _ = visualized("out")
    assert again == before
    save_as(folder / f"{name}.bmp", textures(1, 3, 18, 20, seed=5)[0])
    after, found = visualized("out")
    assert changed(tmp_path / "out", before) == ALL | CONTROLS
    _, fresh = visualized("fresh")
    for layer in fresh.tops:
        assert np.array_equal(found.tops[layer].values, fresh.tops[layer].values)
        assert not np.array_equal(found.tops[layer].values, old.tops[layer].values)


def save_as(path, image):
    """An image (3, H, W) without compression: of one size in bytes, whatever it shows."""
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.mark.usefixtures("undrawn")
def test_a_network_whose_code_has_changed_is_searched_again(images, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "from torch import nn\nclass Own(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.a = nn.Conv2d(3, 4, 3)\n"
        "        self.b = nn.Conv2d(4, 4, 1)\n"
        "    def forward(self, x):\n        return self.b(self.a(x){})\n"
    )
    found = []
    for number, change in enumerate(("", ".relu()", ".relu()")):
        (tmp_path / f"own{number}.py").write_text(text.format(change))
        own = importlib.import_module(f"own{number}")
        own.Own.__module__ = "own"
        monkeypatch.setitem(sys.modules, "own", own)
        linecache.clearcache()
        options = settings_of(layers="b", gallery=False, control=False)
        visualize_network(subject_of(seeded(own.Own)), images, options, tmp_path / "out")
        found.append(times(tmp_path / "out"))
    assert found[0] != found[1] and found[1] == found[2]


def test_files_of_earlier_layers_and_settings_are_removed_but_not_those_of_others(images, tmp_path):
    subject, folder = subject_of(seeded(Small)), tmp_path / "visualization"
    first = settings_of(layers=["conv1", "relu2"], occlusion=1, gallery=True)
    visualize_network(subject, images, first, tmp_path)
    (folder / "figures" / "mine.png").write_bytes(b"precious")
    (folder / "projections" / "relu2.npz.bak").write_bytes(b"precious")
    (folder / "figures" / "conv1.webp").write_bytes(b"drawn over by hand")
    # As older versions wrote it.
    ownership.write(folder / "figures" / "relu2.png", b"ours")
    (folder / "events.out.tfevents.1.mine").write_bytes(b"precious")
    old_events = [path for path in folder.glob("events.*") if path.stat().st_size > 100]
    visualize_network(
        subject, images, settings_of(layers=["relu2"], control=False, gallery=False), tmp_path
    )
    assert {path.name for path in (folder / "figures").iterdir()} == {
        *("mine.png", "conv1.webp", "conv1-filters.png", "relu2.webp"),
    }
    assert {path.name for path in (folder / "projections").iterdir()} == {
        *("relu2.npz", "relu2.npz.bak"),
    }
    assert not (folder / "control").exists()
    assert (folder / "figures" / "conv1.webp").read_bytes() == b"drawn over by hand"
    assert (folder / "events.out.tfevents.1.mine").read_bytes() == b"precious"
    assert not any(path.exists() for path in old_events)
    assert set(manifest(tmp_path)["layers"]) == {"relu2"}


@pytest.mark.usefixtures("undrawn")
def test_an_older_gallery_that_is_not_rebuilt_gets_a_warning(images, tmp_path, caplog):
    subject = subject_of(seeded(Small))
    visualize_network(subject, images, settings_of(layers=["relu2"], control=False), tmp_path)
    assert "earlier visualization" not in caplog.text
    page = (tmp_path / "gallery/index.html").read_bytes()
    options = settings_of(layers=["relu2"], control=False, gallery=False, method="guided")
    visualize_network(subject, images, options, tmp_path)
    assert "gallery is from an earlier visualization: gallery=true rebuilds it" in caplog.text
    assert (tmp_path / "gallery/index.html").read_bytes() == page


@pytest.mark.parametrize(
    "name",
    [
        *(
            "visualization/topk.npz",
            "visualization/manifest.json",
            "visualization/figures/relu2.webp",
        ),
        *("visualization/projections/relu2.npz", "visualization/control/projections/relu2.npz"),
        *("gallery/thesis.txt", "gallery"),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_files_of_others_are_refused_before_the_work_begins(
    images, tmp_path, monkeypatch, name, linked
):
    monkeypatch.setattr(module, "find_top_activations", fail)
    path, precious = tmp_path / "out" / name, tmp_path / "precious"
    path.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    path.symlink_to(precious) if linked else path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="did not make|not as deconvnet wrote it|deconvnet made"):
        visualize_network(
            subject_of(seeded(Small)), images, settings_of(layers=["relu2"]), tmp_path / "out"
        )
    assert path.read_bytes() == precious.read_bytes() == b"precious"
    assert path.is_symlink() == linked


def test_image_names_that_are_not_valid_text_are_shown(textures, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, pixels in enumerate(textures(3, 3, 18, 20)):
        save(folder / f"{number}.png", pixels)
    try:
        os.rename(os.fsencode(folder / "2.png"), os.fsencode(folder) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("names are text on this system")
    images = lazy_images(DataSettings(source="folder", path=str(folder), size=None))
    labels = tuple(os.fsdecode(b"caf\xe9-%d" % n) for n in range(5))
    subject = replace(subject_of(seeded(Small)), labels=labels)
    options = settings_of(
        layers=["relu2"], explorer_images=3, occlusion=1, invariance=1, control=False
    )
    visualize_network(subject, images, options, tmp_path / "out")
    tiles = [t for m in manifest(tmp_path / "out")["layers"]["relu2"]["maps"] for t in m["tiles"]]
    assert any(tile["name"].endswith(r"caf\xe9.png") for tile in tiles)
    page = (tmp_path / "out/gallery/index.html").read_text(encoding="utf-8")
    assert "caf" in page


@pytest.mark.usefixtures("undrawn")
def test_one_layer_may_be_given_without_the_brackets_of_a_list(images, tmp_path):
    assert settings_of(layers="relu2").layers == ["relu2"]
    visualize_network(
        subject_of(seeded(Small)),
        images,
        settings_of(layers="relu2", control=False, gallery=False),
        tmp_path,
    )
    assert list(manifest(tmp_path)["layers"]) == ["relu2"]
    for wrong in ([], [3], {"relu2": 1}, 5):
        with pytest.raises(ValueError, match="layers=.*: give names as"):
            settings_of(layers=wrong)


# Settings.


@pytest.mark.usefixtures("undrawn")
def test_layers_maps_control_and_gallery_follow_the_settings(images, tmp_path):
    settings = settings_of(layers=["relu2"], maps=3, control=False, gallery=False, seed=5)
    written = visualize_network(subject_of(seeded(Small)), images, settings, tmp_path)
    assert set(written) == {"pictures", "manifest"} and not (tmp_path / "gallery").exists()
    assert sorted(times(tmp_path)) == [
        "visualization/projections/relu2.npz",
        "visualization/topk.npz",
    ]
    said = manifest(tmp_path)
    assert said["control"] is None and list(said["layers"]) == ["relu2"]
    chosen = [entry["map"] for entry in said["layers"]["relu2"]["maps"]]
    alive = np.zeros(5, dtype=bool)
    assert chosen == sample_maps(alive, 3, seed=5) != sample_maps(alive, 3, seed=0)


@pytest.mark.usefixtures("undrawn")
def test_maps_are_chosen_by_their_numbers(images, tmp_path, caplog):
    net = seeded(Small)
    with torch.no_grad():
        net.conv2.bias[1] = -1e6
    options = {"layers": ["relu2"], "control": False, "gallery": False}
    visualize_network(subject_of(net), images, settings_of(maps=[3, 1, 0], **options), tmp_path)
    chosen = [entry["map"] for entry in manifest(tmp_path)["layers"]["relu2"]["maps"]]
    assert chosen == [3, 0] and "maps [1]: never active" in caplog.text
    with pytest.raises(ValueError, match=r"maps=\[3, 5\]: layer 'relu2' has maps 0 to 4"):
        visualize_network(subject_of(net), images, settings_of(maps=[3, 5], **options), tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_method_and_overlap_reach_the_projections(images, tmp_path):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 3)))
    tiles = {}
    for method, overlap in (("deconv", "sum"), ("gradient", "sum"), ("deconv", "normalised")):
        folder = tmp_path / f"{method} {overlap}"
        settings = settings_of(layers=["2"], method=method, overlap=overlap, control=False)
        visualize_network(subject_of(net), images, replace(settings, gallery=False), folder)
        report = manifest(folder)["layers"]["2"]["methods"][method]["report"]
        assert (report["method"], report["overlap"]) == (method, overlap)
        found = load_top_projections(folder / "visualization" / "projections" / "2.npz")
        tiles[method, overlap] = found.tiles[method] / 127
    assert np.abs(tiles["deconv", "normalised"] - tiles["deconv", "sum"]).max() > 0.05
    projector = Projector(net, method="gradient", normalization=NORMALIZATION)
    number, *unit = found.units[0, 0].tolist()
    x = NORMALIZATION.apply(images[number][None])
    tile = projector(x, "2", [(0, *unit)]).tiles()[0]
    shown = tiles["gradient", "sum"][0, 0]
    assert_allclose(shown, tile / tile.abs().max(), atol=5e-3)
    assert np.abs(tiles["deconv", "sum"][0, 0] - shown).max() > 0.05


class Gated(nn.Module):
    """Maps that are multiplied by a sigmoid of their means, after an activation without a rule."""

    def __init__(self):
        super().__init__()
        self.conv, self.tanh, self.squeeze = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 1)
        self.out = nn.ReLU()

    def forward(self, x):
        y = self.tanh(self.conv(x))
        return self.out(y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid())


@pytest.mark.usefixtures("undrawn")
def test_gates_and_strict_reach_the_projections(images, tmp_path):
    said = {}
    for gates in ("constant", "gradient"):
        settings = settings_of(layers=["out"], gates=gates, strict=False, control=False)
        visualize_network(
            subject_of(seeded(Gated)), images, replace(settings, gallery=False), tmp_path
        )
        said[gates] = manifest(tmp_path)["layers"]["out"]["methods"]["deconv"]["says"]
        assert "unsupported: tanh x1" in said[gates]
    assert "sigmoid as a constant gate" in said["constant"]
    assert "sigmoid as a gate, with its gradient" in said["gradient"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0: must be at least 1"),
        *(
            (
                {"maps": wrong},
                f"maps={wrong}: must be at least 1, a list of numbers such as [3,7], or null for "
                "all",
            )
            for wrong in (0, [], [3, 3], [-1], "many", 2.5)
        ),
        ({"window": "whole"}, "window=whole: choose one of effective, field"),
        ({"contrast": 0}, "contrast=0: must be above 0 and at most 1"),
        ({"explorer_images": -1}, "explorer_images=-1: must not be negative"),
        ({"method": "decon"}, "method=decon: choose one of auto, deconv, guided, gradient"),
        ({"gates": "open"}, "gates=open: choose one of constant, gradient"),
        ({"overlap": "none"}, "overlap=none: choose one of sum, normalised"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ValueError) as caught:
        VisualizationSettings(**options)
    assert str(caught.value) == message


def test_renamed_settings_keep_their_old_names():
    with pytest.warns(FutureWarning, match="shown is now called grid_maps"):
        assert VisualizationSettings(shown=3).grid_maps == 3
    with pytest.warns(FutureWarning, match="explored is now called explorer_images"):
        assert VisualizeConfig(model="torchvision/vgg16", explored=2).explorer_images == 2


# Networks.


class VGGLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = vgg.make_layers([4, "M", 4, 4, "M", 6, "M"])
        self.avgpool = nn.AdaptiveAvgPool2d(4)
        self.classifier = nn.Sequential(nn.Linear(96, 5), nn.ReLU(), nn.Dropout())

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class Layer(nn.Sequential):
    """Not one of a deconvolutional network, but of the same name."""


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # The last ReLU before each pooling; `features` as a whole only passes a pooling on.
        (
            lambda: nn.Sequential(vgg.make_layers([4, 4, "M", 4, 4, "M", 6, 6, 6, "M"])),
            ["0.3", "0.8", "0.15"],
        ),
        # Few rectifiers: all.
        (VGGLike, ["features.1", "features.4", "features.6", "features.9"]),
        (
            lambda: resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=3),
            ["relu", "layer1", "layer2", "layer3", "layer4"],
        ),
        (Small, ["relu1", "relu2", "dead"]),
        (lambda: ZFNet(3, 5, size=64, width=2), [f"relu{n}" for n in range(1, 6)]),
        # The first layers of `layer2`, in front of its stride, have maps of the size of `layer1`.
        (
            lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 2, 1], num_classes=3),
            ["relu", "layer1", "layer2", "layer3", "layer4"],
        ),
        (
            lambda: mobilenetv2.MobileNetV2(
                num_classes=3,
                width_mult=0.1,
                inverted_residual_setting=[[1, 16, 1, 1], [2, 24, 2, 2], [2, 32, 1, 2]],
            ),
            ["features.1", "features.3", "features"],
        ),
        # Paddings are no layers, nor do their sizes count.
        (
            lambda: nn.Sequential(
                *(nn.ZeroPad2d(3), nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4)),
                nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, stride=2), nn.Identity()),
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(), nn.ZeroPad2d(1)),
            ),
            ["2", "4.0"],
        ),
        (
            lambda: nn.Sequential(
                Layer(nn.Conv2d(3, 4, 3), nn.ReLU()), Layer(nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
            ),
            ["0", "1"],
        ),
        (
            lambda: nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(8))),
            [str(n) for n in range(6)],
        ),
        # All blocks have one grid: those after each quarter of the depth.
        (
            lambda: vision_transformer.VisionTransformer(
                image_size=64, patch_size=32, num_layers=8, num_heads=1, hidden_dim=4, mlp_dim=4
            ),
            [f"encoder.layers.encoder_layer_{n}" for n in (1, 3, 5, 7)],
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5)), []),
    ],
    ids=[
        *("VGG", "short VGG", "ResNet", "plain", "ZFNet", "ResNet50", "MobileNet", "padded"),
        *("named Layer", "many sizes", "transformer", "vectors"),
    ],
)
def test_by_default_the_ends_of_stages_are_visualized(make, expected):
    projector = Projector(seeded(make))
    assert default_layers(projector.layers(torch.rand(1, 3, 64, 64))) == expected


@pytest.fixture(scope="module")
def learned(textures):
    solver = SolverSettings(iterations=10)
    layers = [
        LayerSettings(4, 5, lam=5.0, pool=[2, 2, 2], solver=solver),
        LayerSettings(3, 3, lam=20.0, solver=solver),
    ]
    net = DeconvNet(layers, PreprocessingSettings(steps=["mean"], color="grey"), seed=0)
    net.preprocessing.fit(textures(4, 3, 18, 20))
    return net


def test_all_layers_of_a_deconvnet_are_visualized_with_reconstructions(learned, textures, tmp_path):
    assert default_layers(Projector(learned).layers(torch.rand(1, 3, 18, 20))) == [
        "layer1",
        "layer2",
    ]
    data = lazy(textures(4, 3, 18, 20))
    tiles = torch.randn(2, 3, 1, 9, 9)
    learning = Evolution(
        tiles, (1, 5), (0, 1, 2), torch.zeros(2, 3, 4, dtype=torch.long), torch.ones(2, 3)
    )
    settings = settings_of(layers=None, explorer_images=1)
    evolutions = {"layer2": learning, "layer3": learning}  # of a layer that is not looked at
    visualize_network(subject_of(learned), data, settings, tmp_path, evolutions=evolutions)
    said = manifest(tmp_path)
    assert list(said["layers"]) == ["layer1", "layer2"]
    values = [
        tile["value"] for entry in said["layers"]["layer2"]["maps"] for tile in entry["tiles"]
    ]
    assert min(values) < 0 < max(values)
    figures = {path.name for path in (tmp_path / "visualization" / "figures").iterdir()}
    assert figures == {
        *("layer1-filters.png", "layer1.webp", "layer2.webp", "layer2-evolution.png"),
    }
    images = list((tmp_path / "gallery" / "images").rglob("layers.js"))
    assert len(images) == 1 and "SNR" in images[0].read_text()
    assert list((tmp_path / "gallery" / "images").rglob("repainting-2.js"))
    (file,) = (tmp_path / "gallery" / "layers").glob("2-*/features.json")
    features = json.loads(file.read_text())
    assert features["below"] == "layer1"
    for entry in features["maps"]:
        assert entry["epochs"] == ["1", "5"]
        # The first layer pools over pairs of maps.
        assert sorted(source["maps"] for source in entry["sources"]) == [[0, 1], [2, 3]]
        assert entry["sheets"]["sources"]["count"] == 2


@pytest.mark.usefixtures("undrawn")
def test_the_same_filters_with_another_solver_are_searched_again(learned, textures, tmp_path):
    data = lazy(textures(3, 3, 18, 20))
    settings = settings_of(layers=["layer1"], gallery=False, control=False)
    visualize_network(subject_of(learned), data, settings, tmp_path)
    tensors, parts = learned.to_parts()
    other = DeconvNet.from_parts(tensors, json.loads(json.dumps(parts)))
    before = times(tmp_path)
    visualize_network(subject_of(other), data, settings, tmp_path)
    assert times(tmp_path) == before
    other.layer(1).settings.lam = 1.0
    assert digest(other) == digest(learned)
    visualize_network(subject_of(other), data, settings, tmp_path)
    assert all(value != before[name] for name, value in times(tmp_path).items())


def test_networks_with_grey_input_or_depthwise_filters_are_visualized(images, tmp_path):
    grey = subject_of(seeded(lambda: Small(1)), Normalization((0.5,), (0.5,), "grey"))
    visualize_network(grey, images, settings_of(layers=["conv1", "relu2"]), tmp_path / "grey")
    found = load_top_projections(tmp_path / "grey" / "visualization" / "projections" / "relu2.npz")
    assert found.tiles["deconv"].shape[2] == 1 and found.patches.shape[2] == 3
    filters = picture(tmp_path / "grey" / "visualization" / "figures" / "conv1-filters.png")
    assert (filters == filters[..., :1]).all()
    net = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        )
    )
    settings = settings_of(layers=["0", "4", "6"], explorer_images=1)
    visualize_network(subject_of(net), images, settings, tmp_path / "depthwise")
    gallery = tmp_path / "depthwise" / "gallery"
    assert not list(gallery.rglob("filters.*"))


def test_images_of_different_sizes_are_visualized(textures, tmp_path):
    data = lazy([*textures(2, 3, 18, 20), *textures(2, 3, 24, 17, seed=1)])
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU())
    )
    settings = settings_of(layers=["1", "3"], k=4, explorer_images=4, occlusion=1, invariance=3)
    visualize_network(subject_of(net), data, settings, tmp_path)
    tiles = manifest(tmp_path)["layers"]["3"]["maps"][0]["tiles"]
    assert {tile["image"] for tile in tiles} == {0, 1, 2, 3}


def test_layers_that_are_never_active_are_left_out_with_a_warning(images, tmp_path, caplog):
    net = seeded(Small)
    settings = settings_of(layers=["dead", "relu2"], gallery=False, occlusion=1)
    visualize_network(subject_of(net), images, settings, tmp_path)
    assert "layer dead: none of its maps is ever active" in caplog.text
    assert list(manifest(tmp_path)["layers"]) == ["relu2"]
    with pytest.raises(ValueError) as caught:
        visualize_network(
            subject_of(net), images, replace(settings, layers=["dead"]), tmp_path / "all"
        )
    message = "layers dead: none of their maps is ever active on these 6 images"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Small, {"layers": ["relu3"]}, "layer 'relu3': no such layer; did you mean relu"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3)),
            {"layers": ["0", "2"], "method": "deconv"},
            "layer '2': deconv has no rule for tanh x1; strict=False",
        ),
        (
            lambda: Small(1),
            {},
            "the model Small fails on images of 3x18x20 in conv1 (Conv2d): Given",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(1080, 5)),
            {"layers": None},
            "layers=null: small net has no layer of maps; choose among 0, 1",
        ),
    ],
    ids=["name", "rule", "channels", "vectors"],
)
def test_what_cannot_be_visualized_is_refused_before_the_work_begins(
    images, tmp_path, monkeypatch, make, options, message
):
    monkeypatch.setattr(module, "find_top_activations", fail)
    with pytest.raises(ValueError) as caught:
        visualize_network(subject_of(seeded(make)), images, settings_of(**options), tmp_path)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# The command.

NETS = """
import os
from pathlib import Path

from torch import nn

class Net(nn.Sequential):
    seen = frozenset()

    def forward(self, x):
        if x.shape[2:] == (24, 24):  # a whole image
            self.seen |= {float(x.detach().sum())}
        # As if it were killed, or interrupted from the keyboard, in the midst of its work.
        if Path("kill").exists() and Path(Path("kill").read_text()).exists():
            os.kill(os.getpid(), 9)
        if Path("interrupt").exists() and len(self.seen) > int(Path("interrupt").read_text()):
            raise KeyboardInterrupt
        return super().forward(x)

def make(channels=3, maps=4):
    return Net(
        nn.Conv2d(channels, maps, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(maps, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )
"""

TRAINED = [
    *("progress=false", "device=cpu", "layers=2", "data=folder", "data.size=24"),
    *(f"model.layer{n}.{key}" for n in (1, 2) for key in ("num_maps=4", "filter_size=3")),
    *(f"model.layer{n}.learning.epochs=2" for n in (1, 2)),
    *(f"model.layer{n}.solver.iterations=10" for n in (1, 2)),
]
QUICK = [
    "progress=false",
    "device=cpu",
    "k=3",
    "explorer_images=1",
    "grid_maps=2",
    "control_maps=1",
]
MODEL = ["model=nets:make", "images=photos", "size=24"]
RUN = {"run": "runs/run"}
MAKE = {"model": "nets:make", "images": "photos", "size": 24}


def save(path, image):
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


def assert_one_line(result, *parts):
    """The user did something wrong: exit code 1 and one line that says what, no traceback."""
    assert result.code == 1, result
    assert result.err.endswith("\n") and result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err + result.out
    for part in parts:
        assert str(part) in result.err, result.err


@pytest.fixture(scope="module")
def place(tmp_path_factory, textures, script):
    """A folder with photos, a module with a network, weights, and a run that learned from photos.

    Nothing may be written here but under names of one's own.
    """
    folder = tmp_path_factory.mktemp("place")
    (folder / "photos").mkdir()
    for number, image in enumerate(textures(5, 3, 26, 30)):
        save(folder / "photos" / f"photo-{number}.png", image)
    (folder / "nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        nets = importlib.import_module("nets")
        for epoch in (1, 2, 10):
            torch.save(seeded(nets.make, epoch).state_dict(), folder / f"epoch-{epoch}.pt")
        result = script(folder, "train.py", *TRAINED, "data.path=photos", "name=run")
        assert result.code == 0, result
        yield folder
    del sys.modules["nets"]


@pytest.fixture(scope="module")
def visualize():
    """The command without its command line: visualize(**settings), in the current folder."""
    quick = dict(progress=False, device="cpu", k=3, explorer_images=1, grid_maps=2)
    quick |= dict(control_maps=1)
    return lambda **given: visualize_command.visualize(VisualizeConfig(**{**quick, **given}))


@pytest.fixture(scope="module")
def run_seen(place, script):
    return script(place, "visualize.py", "run=runs/run", "max_images=4", *QUICK)


def test_a_run_is_visualized_on_its_own_images(place, run_seen):
    folder = place / "runs" / "run"
    assert run_seen.code == 0 and run_seen.err == "", run_seen
    for path in (
        "runs/run/visualization/figures",
        "runs/run/visualization/manifest.json",
        "runs/run/gallery/index.html",
        "tensorboard --logdir runs\n",
    ):
        assert path in run_seen.out
    said = manifest(folder)
    assert said["network"]["name"] == "run" and said["network"]["weights"] == "runs/run"
    assert said["images"]["count"] == 4 and list(said["layers"]) == ["layer1", "layer2"]
    assert said["settings"]["run"] == "runs/run" and said["settings"]["max_images"] == 4
    tile = said["layers"]["layer2"]["maps"][0]["tiles"][0]
    # Four of the five, evenly.
    assert tile["name"] == f"photo-{(0, 1, 3, 4)[tile['image']]}.png"
    figures = {path.name for path in (folder / "visualization" / "figures").iterdir()}
    assert {"layer1-filters.png", "layer1.webp", "layer2.webp", "layer2-evolution.png"} <= figures
    # What training has written is as it was.
    assert load(folder).depth == 2 and (folder / "pictures" / "layer1-filters.png").is_file()


def test_repeating_a_command_recomputes_nothing(place, run_seen, script):
    before = times(place / "runs" / "run")
    again = script(place, "visualize.py", "run=runs/run", "max_images=4", *QUICK)
    assert again.code == 0 and again.out == run_seen.out
    assert times(place / "runs" / "run") == before


def test_a_network_file_needs_images_and_has_a_folder_of_its_own(
    place, tmp_path, monkeypatch, visualize
):
    shutil.copy(place / "runs" / "run" / "network.safetensors", tmp_path / "shared.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="images=null: shared.safetensors does not say what"):
        visualize(run="shared.safetensors")
    photos = str(place / "photos")
    visualize(run="shared.safetensors", images=photos, size=20, layers=["layer2"], gallery=False)
    said = manifest(tmp_path / "shared")
    assert list(said["layers"]) == ["layer2"] and said["images"]["count"] == 5
    assert max(max(t["box"]) for e in said["layers"]["layer2"]["maps"] for t in e["tiles"]) <= 20


def test_a_model_is_visualized_with_weights_experiments_and_checkpoints(
    place, tmp_path, monkeypatch, visualize, capsys
):
    monkeypatch.chdir(place)
    visualize(
        **{**MAKE, "weights": "epoch-10.pt", "mean": [0.5], "std": [0.25], "order": "bgr"},
        **{"occlusion": 1, "invariance": 2, "layers": ["1", "4", "7"], "output": str(tmp_path)},
        checkpoints=["epoch-1.pt", "epoch-2.pt", "epoch-10.pt"],
    )
    said = manifest(tmp_path)
    assert said["network"]["normalization"] == {"mean": [0.5], "std": [0.25], "order": "bgr"}
    assert said["network"]["weights"] == "epoch-10.pt"
    figures = {path.name for path in (tmp_path / "visualization" / "figures").iterdir()}
    assert figures == {
        *("1.webp", "4.webp", "7.webp", "0-filters.png"),
        *("1-evolution.png", "4-evolution.png", "7-evolution.png"),
        *("occlusion-0.png", "invariance.png"),
    }
    (maps,) = (tmp_path / "gallery" / "layers").glob("2-*/features.js")
    assert '"epochs":["1","2","10"]' in maps.read_text()
    assert f"{os.path.relpath(tmp_path)}/gallery/index.html" in capsys.readouterr().out


def test_the_file_of_a_trained_network_records_its_training_images(
    place, tmp_path, monkeypatch, visualize
):
    data = asdict(DataSettings(source="folder", path="photos", size=20, max_images=3))
    for epoch in (1, 2):
        net = seeded(lambda: ZFNet(1, 2, size=16, width=2), epoch)
        subject = LoadedModel(net, "zf", "", Normalization((0.5,), (0.3,), "grey"), Crop(16, 16))
        path = tmp_path / f"epoch-{epoch}.safetensors"
        save_model(path, replace(subject, training={"data": data}))
    monkeypatch.chdir(place)
    files = [str(tmp_path / f"epoch-{epoch}.safetensors") for epoch in (1, 2)]
    visualize(model=files[1], checkpoints=files, layers=["relu2"], control=False)
    folder = tmp_path / "epoch-2"
    said = manifest(folder)
    assert said["images"]["count"] == 3 and said["network"]["name"] == "zf"
    assert said["network"]["normalization"]["order"] == "grey"
    drawn = folder / "visualization" / "figures" / "relu2-evolution.png"
    assert drawn.is_file() and (folder / "gallery" / "index.html").is_file()
    # The features of the checkpoints are in the folder; other checkpoints replace them.
    before = drawn.read_bytes()
    settings = {"model": files[1], "layers": ["relu2"], "control": False, "gallery": False}
    with monkeypatch.context() as patch:
        patch.setattr(visualize_command, "project_checkpoints", None)
        visualize(**settings, checkpoints=files)
    assert drawn.read_bytes() == before
    visualize(**settings, checkpoints=files[::-1])
    assert drawn.read_bytes() != before
    visualize(**settings)
    assert not drawn.exists() and not (folder / "visualization" / "evolution").exists()


@pytest.mark.parametrize("given", [{}, {"images": "nowhere"}, {"images": ["photos", "nowhere"]}])
def test_missing_images_are_reported_before_a_network_is_loaded(
    place, monkeypatch, visualize, given
):
    monkeypatch.chdir(place)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"images=(null: torchvision/vgg16 does|nowhere: no such)"):
        visualize(model="torchvision/vgg16", **given)


def test_recorded_images_are_announced_and_never_downloaded(
    place, tmp_path, monkeypatch, visualize, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", fail)
    data = {"source": "torchvision", "dataset": "FashionMNIST", "path": "there", "size": 28}
    net = subject_of(seeded(lambda: ZFNet(1, 3, size=28, width=4)))
    net = replace(net, normalization=Normalization((0.5,), (0.5,), "grey"))
    for extra, says in (
        ({"download": True}, "FashionMNIST"),
        ({"downlaod": True}, "its record of the training images is not valid"),
    ):
        save_model(tmp_path / "hostile.safetensors", replace(net, training={"data": data | extra}))
        with pytest.raises(ValueError, match=says):
            visualize(model="hostile.safetensors")
    said = "reading the images that the network was trained on: FashionMNIST in there"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "there").exists()


def test_images_are_a_folder_a_file_or_a_list(place, tmp_path, monkeypatch, visualize):
    monkeypatch.chdir(place)
    files = ["photos/photo-3.png", "photos/photo-1.png"]
    listed = str(place / "photos" / "photo-2.png")
    (tmp_path / "list.txt").write_text(f"# one\n{listed}\n")
    cases = (
        ("photos", 5),
        (files[0], files[:1]),
        (files, files),
        (f"{tmp_path}/list.txt", [listed]),
    )
    for number, (given, names) in enumerate(cases):
        output = tmp_path / str(number)
        visualize(
            **{"model": "nets:make", "images": given, "size": 24, "output": str(output), "k": 9},
            **{"gallery": False, "control": False},
        )
        said = manifest(output)
        found = {t["name"] for e in said["layers"]["4"]["maps"] for t in e["tiles"]}
        expected = names if isinstance(names, list) else [f"photo-{n}.png" for n in range(names)]
        assert found == set(expected) and said["images"]["count"] == len(expected)


def test_unreadable_images_are_named_or_left_out(place, tmp_path, monkeypatch, visualize, script):
    shutil.copytree(place / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "photo-3.png").write_text("words")
    shutil.copy(place / "nets.py", tmp_path)
    result = script(tmp_path, "visualize.py", *MODEL, *QUICK, "batch=2", "workers=1")
    assert_one_line(result, "cannot read photos/photo-3.png: not an image")
    monkeypatch.chdir(tmp_path)
    given = {"model": "nets:make", "images": "photos", "size": 24, "control": False}
    with pytest.raises(ValueError, match="cannot read photos/photo-3.png"):
        visualize(**given)
    visualize(**given, skip_unreadable=True, gallery=False)
    assert manifest(tmp_path / "runs" / "nets-make")["images"]["count"] == 4


def test_layers_are_listed_with_their_receptive_fields(
    place, script, monkeypatch, visualize, capsys
):
    result = script(place, "visualize.py", *MODEL, "layers=[?]", *QUICK)
    assert result.code == 0 and result.err == ""
    head, *rows = result.out.splitlines()
    assert "layer" in head and "receptive field" in head and "by default" in head
    assert [row.split()[-1] for row in rows[:5]] == ["3x3", "3x3", "4x4", "8x8", "8x8"]
    assert [row.startswith("*") for row in rows] == [False, True, False, False, True] + [False] * 3
    assert "5x9x9" in rows[4] and "ReLU" in rows[4]
    assert rows[-1].endswith("3x1x1   the whole image") and "Linear" in rows[-1]
    monkeypatch.chdir(place)
    visualize(run="runs/run", layers=["?"])
    said, _, *rows = capsys.readouterr().out.splitlines()
    assert said == "reading the images that the network was trained on: photos"
    assert [row.split()[:3] for row in rows] == [["*", "layer1", "Layer"], ["*", "layer2", "Layer"]]


def test_a_model_without_layers_is_refused(place, tmp_path, monkeypatch, visualize):
    (tmp_path / "bare.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Conv2d(3, 4, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    for layers in (["?"], None, ["conv"]):
        with pytest.raises(ValueError, match="the model calls no module that gives maps"):
            visualize(model="bare:make", images=str(place / "photos"), layers=layers)


@pytest.fixture
def unchanged(place):
    """Checks that nothing was written."""

    def files():
        return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}

    before = files()
    yield
    assert files() == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["give either run=", "or model="]),
        (["run=nowhere"], ["nowhere: no such run folder or network file"]),
        (["run=runs/run", "layers=[layer3]"], ["layer 'layer3': no such layer", "layer2"]),
        (["run=runs/run", "k=many"], ["k=many: must be a whole number"]),
        (["run=runs/run", "leyers=[layer1]"], ["leyers"]),
        (["run=runs/run", "+leyers=[layer1]"], ["leyers: no such setting; did you mean layers?"]),
        (["run=runs/run", "output=nets.py"], ["nets.py"]),
        ([*MODEL, "options={chanels: 3}"], ["cannot be built with options", "chanels"]),
    ],
    ids=" ".join,
)
def test_wrong_settings_are_refused_in_one_line_and_write_nothing(
    place, unchanged, script, arguments, parts
):
    keys = {argument.split("=")[0] for argument in arguments}
    quick = [value for value in QUICK if value.split("=")[0] not in keys]
    assert_one_line(script(place, "visualize.py", *arguments, *quick), *parts)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({**RUN, **MAKE}, ["give either run=", "or model="]),
        ({"run": "runs"}, ["runs: no checkpoint in this folder"]),
        ({"run": "nets.py"}, ["nets.py", ".safetensors"]),
        ({**RUN, "method": "guided"}, ["method=guided: only with model="]),
        ({**RUN, "weights": "epoch-1.pt"}, ["weights=epoch-1.pt: only with model="]),
        ({**RUN, "checkpoints": ["epoch-1.pt"]}, ["checkpoints=", "only with model="]),
        ({**RUN, "options": {"maps": 5}}, ["options={'maps': 5}: only with model="]),
        ({**RUN, "images": []}, ["images=[]: give a folder"]),
        ({**RUN, "images": "nowhere"}, ["images=nowhere: no such file or folder"]),
        ({**RUN, "images": ["photos/photo-1.png", "no.png"]}, ["images=no.png: no such file"]),
        ({**RUN, "images": "nets.py"}, ["cannot read nets.py"]),
        ({**RUN, "images": "runs/run/pictures/nowhere"}, ["pictures/nowhere: no such file"]),
        ({**RUN, "size": 3}, ["3x3"]),
        ({**RUN, "size": 0}, ["size=0: must be at least 1, or null"]),
        ({**RUN, "max_images": 0}, ["max_images=0: must be at least 1, or null"]),
        ({**RUN, "device": "nosuch"}, ["device=nosuch"]),
        ({"model": "nets:make"}, ["images=null: nets:make does not say", "images=..."]),
        (
            {**MAKE, "method": "decon"},
            ["method=decon: choose one of auto, deconv, guided, gradient"],
        ),
        ({**MAKE, "model": "nets:mak"}, ["model=nets:mak: nets has no 'mak'", "make"]),
        ({**MAKE, "model": "net:make"}, ["model=net:make: net cannot be imported"]),
        ({**MAKE, "model": "torchvision/vgg17"}, ["torchvision/vgg17", "did you mean vgg"]),
        ({**MAKE, "model": "vgg16"}, ["model=vgg16", "did you mean torchvision/vgg16"]),
        ({**MAKE, "model": "photos"}, ["model=photos: give torchvision/NAME"]),
        ({**MAKE, "model": "epoch-1.pt"}, ["model=epoch-1.pt: holds parameters"]),
        (
            {**MAKE, "model": "runs/run/network.safetensors"},
            ["network.safetensors: not a convolutional network"],
        ),
        ({**MAKE, "weights": "nowhere.pt"}, ["weights=nowhere.pt: no such file"]),
        (
            {**MAKE, "weights": "nets.py"},
            ["weights=nets.py: not a file of weights: it begins with"],
        ),
        ({**MAKE, "weights": "photos"}, ["weights=photos", "takes a file of weights"]),
        (
            {**MAKE, "weights": "epoch-1.pt", "options": {"maps": 6}},
            ["not of this network", "; options= builds"],
        ),
        ({**MAKE, "checkpoints": ["epoch-1.pt", "no.pt"]}, ["weights=no.pt: no such file"]),
        ({**MAKE, "layers": ["9"]}, ["layer '9': no such layer"]),
        ({**RUN, "labels": ["a"]}, ["labels=['a']: only with model="]),
        ({**MAKE, "labels": ["a", "b"]}, ["labels: 2 names, but nets:make has 3 classes"]),
        ({**MAKE, "labels": "nowhere.txt"}, ["labels=nowhere.txt: No such file"]),
        ({**MAKE, "layers": ["1", "?"]}, ["layer '?': no such layer"]),
        ({**MAKE, "options": {"channels": 1}}, ["the model Net fails on images of 3x24x24"]),
        ({**MAKE, "options": 5}, ["options=5: give arguments as {name: value}"]),
        ({**MAKE, "order": "brg"}, ["order='brg': choose rgb, bgr, grey"]),
        ({**MAKE, "std": [0]}, ["std=(0.0,): must be finite and above 0"]),
        ({**MAKE, "size": 2}, ["the model Net fails on images of 3x2x2"]),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_other_wrong_settings_are_refused_in_one_line(
    place, unchanged, monkeypatch, visualize, given, parts
):
    monkeypatch.chdir(place)
    with pytest.raises((ValueError, OSError)) as caught:
        visualize(**given)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message


def test_a_killed_visualization_resumes_after_its_last_file(
    place, tmp_path, monkeypatch, visualize, script
):
    shutil.copytree(place / "photos", tmp_path / "photos")
    shutil.copy(place / "nets.py", tmp_path)
    arguments = [*MODEL, "layers=['1','4']", "batch=1", "output=out", *QUICK]
    arguments += ["mean=[0.5,0.4,0.3]", "std=[0.25]", "order=bgr", "options={maps: 3}"]
    (tmp_path / "kill").write_text("out/visualization/projections/1.npz")
    result = script(tmp_path, "visualize.py", *arguments)
    assert result.code == -9, result
    before = times(tmp_path / "out")
    assert {Path(name).name for name in before} == {"topk.npz", "1.npz"}
    (tmp_path / "kill").unlink()
    result = script(tmp_path, "visualize.py", *arguments)
    assert result.code == 0, result
    after = times(tmp_path / "out")
    assert before.items() <= after.items() and len(after) == 6
    monkeypatch.chdir(tmp_path)
    given = {**MAKE, "mean": [0.5, 0.4, 0.3], "std": [0.25], "order": "bgr", "options": {"maps": 3}}
    visualize(**given, layers=["1", "4"], batch=1, output="whole")
    out, whole = manifest(tmp_path / "out"), manifest(tmp_path / "whole")
    assert out["layers"] == whole["layers"] and out["network"] == whole["network"]
    assert out["network"]["normalization"]["mean"] == [0.5, 0.4, 0.3]
    assert out["layers"]["1"]["shape"] == [3, 22, 22]


def test_an_interrupted_search_keeps_its_tables_and_prints_how_to_resume(
    place, tmp_path, monkeypatch, visualize, script
):
    shutil.copytree(place / "photos", tmp_path / "photos")
    shutil.copy(place / "nets.py", tmp_path)
    arguments = [*MODEL, "layers=['1']", "batch=1", "output=out", *QUICK]
    path = tmp_path / "out" / "visualization" / "topk.npz"
    # Three, and the two images that tell what depends on the image.
    (tmp_path / "interrupt").write_text("5")
    result = script(tmp_path, "visualize.py", *arguments)
    assert result.code == 130 and result.err == "", result
    assert "stopped; to resume: deconvnet visualize model=nets:make" in result.out
    assert SearchState.load(path).done == 3
    (tmp_path / "interrupt").unlink()
    monkeypatch.chdir(tmp_path)
    visualize(**MAKE, layers=["1"], batch=1, output="out")
    assert SearchState.load(path).done == 5


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


@pytest.mark.slow
def test_two_processes_find_the_same_as_one(place, tmp_path, monkeypatch, visualize, start):
    arguments = [*MODEL, *QUICK, f"output={tmp_path / 'two'}"]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=2)
    running = [
        start(place, "visualize.py", *arguments, RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in (0, 1)
    ]
    said = [each.wait() for each in running]
    assert [each.code for each in said] == [0, 0], said
    monkeypatch.chdir(place)
    visualize(**MAKE, output=str(tmp_path / "one"))
    # The first one writes, and speaks.
    assert "gallery/index.html" in said[0].out and said[1].out == ""
    files = {path.name for path in (tmp_path / "two" / "visualization").glob("*.npz")}
    assert files == {"topk-0-of-2.npz", "topk-1-of-2.npz"}
    one, two = (manifest(tmp_path / name)["layers"] for name in ("one", "two"))
    assert one == two
    for layer in one:
        one_layer, two_layers = (
            load_top_projections(tmp_path / name / "visualization" / "projections" / f"{layer}.npz")
            for name in ("one", "two")
        )
        assert_array_equal(one_layer.units, two_layers.units)
        assert one_layer.methods == two_layers.methods
        for method in one_layer.methods:
            assert_array_equal(one_layer.tiles[method], two_layers.tiles[method])
