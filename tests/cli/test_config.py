"""The configuration: every way to say how many layers, every file of configs/, every message."""

import copy
import dataclasses
import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException

from deconvnet import load
from deconvnet.cli.errors import one_line, one_line_errors
from deconvnet.cli.help import comments
from deconvnet.cli.launch import OWN_FOLDER
from deconvnet.cli.read_settings import read_settings, register
from deconvnet.cli.settings import SCHEMAS, ClassifyConfig, DenoiseConfig, VisualizeConfig
from deconvnet.cli.train import flat
from deconvnet.filters.update import LearningSettings
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.images.sources import DataSettings
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.support.devices import torch_device

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, CONFIGS = ROOT / "deconvnet", ROOT / "configs"

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
# Experiments on images of the user, whose list the command names.
OF_A_LIST = {"iccv2011_caltech", "iccv2011_objects", "patches"}
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
PREPROCESSING = sorted(path.stem for path in (CONFIGS / "preprocessing").glob("*.yaml"))
# What the files of configs/data leave to the user.
DATA = {
    "activations": ["data.model=torchvision/vgg16", "data.layer=features.8", "data.images=photos"],
    "array": ["data.path=x.npy"],
    "photographs": [],
    "folder": ["data.path=photos"],
    "list": ["data.path=images.txt"],
    "shards": ["data.path=shards"],
    "torchvision": ["data.dataset=CIFAR10"],
}

SETTINGS = (
    LayerSettings,
    SolverSettings,
    LearningSettings,
    PreprocessingSettings,
    DataSettings,
)


@pytest.fixture(scope="module", autouse=True)
def hydra():
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


# Files that an argument puts in; all other arguments set values in what the files make.
GROUPS = ("model", "data", "preprocessing", "experiment")


@functools.cache
def composed(*files):
    return compose("train", list(files))


def read(*overrides):
    """The settings of a command line; its files, which take a while, are composed once."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    files = tuple(each.input_line for each in parsed if each.key_or_group in GROUPS)
    cfg = copy.deepcopy(composed(*files))
    ConfigLoaderImpl._apply_overrides_to_config(
        [each for each in parsed if each.key_or_group not in GROUPS], cfg
    )
    return read_settings(cfg)


def message(*overrides):
    """The one-line error that a user gets for invalid overrides."""
    with pytest.raises((ValueError, HydraException, OmegaConfBaseException)) as caught:
        read(*overrides)
    return one_line(caught.value)


def test_every_way_to_say_two_layers_means_two_layers():
    everything = read()
    assert everything.layers is None
    assert len(everything.layer_settings()) == len(everything.model) == 3
    for override in ("+layers=2", "layers=2", "++layers=2"):
        found = read_settings(compose("train", [override]))
        assert found == dataclasses.replace(everything, layers=2)
        assert found.layer_settings() == everything.layer_settings()[:2]


def test_one_line_names_how_many_layers_there_are_when_the_number_is_wrong():
    for override in ("+layers=9", "layers=0", "+layers=-1"):
        value = override.split("=")[1]
        expected = f"layers={value}: this model defines 3 layers; choose 1 to 3"
        assert message(override).startswith(expected), message(override)


@pytest.mark.parametrize("value", ["two", "2.5", "[1,2]"])
def test_a_number_of_layers_that_is_no_whole_number_is_refused(value):
    found = message(f"+layers={value}")
    assert "layers" in found and "nteger" in found


def test_no_folder_turns_the_number_of_layers_into_a_group():
    # Its existence alone would make Hydra refuse +layers=2.
    assert not (CONFIGS / "layers").exists()
    assert not (CONFIGS / "layers.yaml").exists()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_also_with_fewer_layers(experiment):
    given = ["data.path=images.txt"] if experiment in OF_A_LIST else []
    whole = read(f"+experiment={experiment}", *given)
    for order in (
        [f"+experiment={experiment}", "+layers=2", *given],
        ["+layers=2", f"+experiment={experiment}", *given],
    ):
        found = read_settings(compose("train", order))
        assert found == dataclasses.replace(whole, layers=2)
    # An experiment that set it would break +layers=2.
    assert whole.layers is None
    assert whole.name != read().name
    DeconvNet(whole.layer_settings(), whole.preprocessing)
    changed = read(f"+experiment={experiment}", "model.layer2.lam=0.125", "seed=3", *given)
    assert changed.model["layer2"].lam == 0.125 and changed.seed == 3


@pytest.mark.parametrize("model", MODELS)
def test_every_model_makes_a_network_of_every_depth(model):
    settings = read(f"model={model}")
    for depth in range(1, len(settings.model) + 1):
        layers = read(f"model={model}", f"+layers={depth}").layer_settings()
        assert len(layers) == depth
        net = DeconvNet(layers, settings.preprocessing)
        assert [len(layer.filters) for layer in net.layers] == [layer.num_maps for layer in layers]


@pytest.mark.parametrize("preprocessing", PREPROCESSING)
def test_every_preprocessing_is_accepted(preprocessing):
    assert isinstance(read(f"preprocessing={preprocessing}").preprocessing, PreprocessingSettings)


def test_every_source_of_images_is_accepted_and_names_the_run():
    assert sorted(DATA) == sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
    for source, overrides in DATA.items():
        settings = read(f"data={source}", *overrides)
        assert settings.data.source == ("folder" if source == "activations" else source)
        assert settings.name == settings.data.name != ""


def test_the_papers_have_the_numbers_of_maps_that_they_say():
    maps = [layer.num_maps for layer in read("+experiment=cvpr2010").layer_settings()]
    assert maps == [9, 45, 150]


def test_one_layer_can_be_changed_alone():
    before = read().model
    after = read("model.layer2.num_maps=7", "model.layer2.solver.iterations=3").model
    assert after["layer1"] == before["layer1"] and after["layer3"] == before["layer3"]
    assert after["layer2"].num_maps == 7 and after["layer2"].solver.iterations == 3
    assert after["layer2"].learning == before["layer2"].learning


def test_every_value_of_a_layer_can_be_changed_on_the_command_line():
    found = read(
        "model.layer1.pool=[2,3,4]",
        "model.layer2.pool=null",
        "model.layer1.p=0.8",
        "model.layer1.learning.batch_size=null",
        "model.layer1.pooling=in_loop",
        "model.layer2.target=both",
        "model.layer2.image_weight=0.5",
        "model.layer2.unpooling=centre",
        "model.layer2.scale=none",
        "model.layer2.solver.step=0.02",
        "preprocessing.steps=[mean,whiten]",
    )
    layer = found.model["layer2"]
    assert found.model["layer1"].window == (2, 3, 4) and layer.window is None
    assert (layer.target, layer.image_weight, layer.unpooling) == ("both", 0.5, "centre")
    assert (layer.scale, layer.solver.step) == ("none", 0.02)
    assert found.model["layer1"].pool == [2, 3, 4] and found.model["layer2"].pool is None
    assert found.model["layer1"].p == 0.8
    assert found.model["layer1"].learning.batch_size is None
    assert found.preprocessing.steps == ["mean", "whiten"]


def test_the_topmost_layer_can_be_taken_out_but_no_gap_be_made():
    assert len(read("~model.layer3").model) == 2
    assert "layer1, layer3" in message("~model.layer2")
    assert "without a gap" in message("~model.layer1")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.layer1.num_map=16", ["num_map", "LayerSettings"]),
        ("model.layer1.solver.steps=16", ["steps", "SolverSettings"]),
        ("model.layer7.num_maps=3", ["layer7"]),
        ("modle=cvpr2010", ["modle"]),
        # Hydra lets a plus add what no code reads.
        ("+layer=2", ["layer: no such setting", "did you mean layers?"]),
        ("+model.layer1.num_map=3", ["model.layer1.num_map: no", "model.layer1.num_maps?"]),
        ("+data.solver=x", ["data.solver: no such setting", "max_images"]),
        ("+model.layer2.learning.epoch=3", ["model.layer2.learning.epochs?"]),
        ("model=nope", ["model/nope", "cvpr2010"]),
        ("data=nope", ["data/nope", "photographs"]),
        ("+experiment=nope", ["experiment/nope", "cvpr2010"]),
        ("experiment=cvpr2010", ["+experiment=cvpr2010"]),
        ("model.layer1.num_maps=many", ["many", "num_maps"]),
        ("model.layer1.num_maps=0", ["model.layer1.num_maps=0", "at least 1"]),
        ("model.layer2.lam=-1", ["model.layer2.lam=-1", "positive"]),
        ("model.layer2.pool=[1,2]", ["model.layer2.pool=[1, 2]", "[maps, rows, columns]"]),
        ("model.layer2.solver.method=lasso", ["model.layer2.solver.method=lasso", "admm", "fista"]),
        ("model.layer2.solver.step=-1", ["model.layer2.solver.step=-1", "positive"]),
        ("model.layer2.target=pixels", ["model.layer2.target=pixels", "maps, image, both"]),
        ("model.layer2.image_weight=0", ["model.layer2.image_weight=0", "positive"]),
        ("model.layer2.pooling=before", ["model.layer2.pooling=before", "after, in_loop"]),
        ("model.layer2.unpooling=random", ["model.layer2.unpooling=random", "no_map, no_place"]),
        ("model.layer2.learning.epochs=0", ["model.layer2.learning.epochs=0", "at least 1"]),
        ("preprocessing.steps=[blur]", ["preprocessing.steps", "blur", "whiten"]),
        ("preprocessing.contrast_size=4", ["preprocessing.contrast_size=4", "odd"]),
        ("data.size=2", ["data.size=2", "at least 8"]),
        ("data.name=a/b", ["data.name", "without slashes"]),
        ("data=folder", ["data.path"]),
        ("chunk=0", ["chunk=0", "at least 1"]),
        ("seed=-1", ["seed=-1", "negative"]),
        ("seed=null", ["seed"]),
        ("progress=maybe", ["progress", "maybe"]),
    ],
)
def test_errors_are_one_line_that_names_the_cause(override, parts):
    found = message(override)
    assert "\n" not in found and len(found) < 400
    for part in parts:
        assert part in found


def test_pooling_in_the_loop_needs_a_window_to_pool():
    found = message("model.layer1.pooling=in_loop", "model.layer1.pool=null")
    assert found == "model.layer1.pooling=in_loop: needs pool=[maps, rows, columns]"


def test_a_model_without_the_number_of_maps_is_refused_by_its_key():
    assert "model.layer1.num_maps" in message("model.layer1.num_maps=???")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(("auto", "auto"), ("true", "auto"), ("True", "auto"), ("AUTO", "auto")),
        *(("false", "false"), ("False", "false")),
        *(("runs/photographs", "runs/photographs"), ("Step-00000012.pt", "Step-00000012.pt")),
    ],
)
def test_resume_is_auto_false_or_a_path(value, expected):
    assert read(f"resume={value}").resume == expected


def test_reading_the_same_configuration_twice_gives_equal_settings_of_their_own():
    one, two = read(), read()
    assert one == two and one.model["layer1"] is not two.model["layer1"]
    assert one.model["layer1"].solver is not one.model["layer2"].solver


def test_a_device_is_found_by_its_name_or_refused_by_it():
    assert torch_device("cpu") == torch.device("cpu")
    assert torch_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device=nosuch: no such device; try auto"):
        torch_device("nosuch")
    with pytest.raises(ValueError, match="device=cuda:99: this machine has none"):
        torch_device("cuda:99")
    with pytest.raises(ValueError, match="device=mps: the sums need float64"):
        torch_device("mps")
    with pytest.raises(ValueError, match="device=meta"):
        torch_device("meta")


def test_flat_settings_have_dotted_names_and_plain_values():
    nested = {"a": 1, "b": {"c": {"d": 0.5}, "e": None}, "f": [1, 2], "g": True, "h": "text"}
    expected = {"a": 1, "b.c.d": 0.5, "b.e": "None", "f": "[1, 2]", "g": True, "h": "text"}
    assert flat(nested) == expected


def commented(lines, number):
    """Whether line `number` has a comment, in itself or just above."""
    return "#" in lines[number] or (number > 0 and lines[number - 1].strip().startswith("#"))


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_setting_has_a_comment_that_says_what_it_is(kind):
    lines = Path(__import__("sys").modules[kind.__module__].__file__).read_text().splitlines()
    start = lines.index(f"class {kind.__name__}:")
    for field in dataclasses.fields(kind):
        pattern = re.compile(rf"    {field.name}: ")
        number = next(n for n in range(start, len(lines)) if pattern.match(lines[n]))
        # One comment may introduce a group of settings: it names or counts them.
        while not commented(lines, number):
            number -= 1
            assert lines[number].startswith("    ") and "def " not in lines[number], field.name
            assert re.match(r"    \w+: ", lines[number]), f"{field.name} has no comment"


@pytest.mark.parametrize("name", [*SCHEMAS])
def test_every_setting_of_a_command_has_its_meaning_on_the_help_page(name):
    meanings = comments(SCHEMAS[name])
    # `info` only reads files.
    assert name == "info" or meanings["device"].startswith("auto (cuda, else cpu)")
    first = None
    for key, meaning in meanings.items():
        # A comment may introduce two or three settings, of which the first has it.
        first = key if meaning else first
        assert meaning or first, f"{name}: {key} has no comment"
        assert not meaning.startswith("#") and "\n" not in meaning


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_command_in_yaml_has_a_comment(path):
    lines = path.read_text().splitlines()
    keys = [key for key in yaml.safe_load("\n".join(lines)) if key not in ("defaults", "hydra")]
    if path.parent == CONFIGS:
        for key in keys:
            number = next(n for n, line in enumerate(lines) if line.startswith(f"{key}:"))
            assert commented(lines, number) or commented(lines, number + 1), key


def test_each_default_is_defined_once():
    for name, schema in SCHEMAS.items():
        path = (PACKAGE / "cli" if name in OWN_FOLDER else CONFIGS) / f"{name}.yaml"
        for key, value in yaml.safe_load(path.read_text()).items():
            if key in ("defaults", "hydra"):
                continue
            field = next(field for field in dataclasses.fields(schema) if field.name == key)
            default = field.default in (dataclasses.MISSING, MISSING)
            assert default and field.default_factory is dataclasses.MISSING, (name, key, value)


def test_every_choice_of_a_group_is_listed_next_to_it():
    lines = (CONFIGS / "train.yaml").read_text().splitlines()
    for group in ("model", "data", "preprocessing"):
        line = next(line for line in lines if line.startswith(f"  - {group}:"))
        named = set(re.split(r"[ ,:]+", line.split("#")[1]))
        for path in (CONFIGS / group).glob("*.yaml"):
            assert path.stem in named, f"{group}={path.stem}"


def test_every_file_of_a_group_says_what_it_is_in_its_first_lines():
    for path in CONFIGS.glob("*/*.yaml"):
        lines = [line for line in path.read_text().splitlines() if "@package" not in line]
        assert lines[0].startswith("# "), path


def test_errors_of_the_named_kinds_end_in_one_line_and_others_pass():
    with pytest.raises(SystemExit, match="error: 3 is odd"), one_line_errors(ValueError):
        raise ValueError("3 is odd")
    with pytest.raises(KeyError), one_line_errors(ValueError):
        raise KeyError("a bug")


HUGE = 10**12


@pytest.mark.parametrize(
    ("kind", "keys", "values"),
    [
        (LayerSettings, ("num_maps", "filter_size", "group"), (0, -1, HUGE)),
        (LearningSettings, ("epochs", "update_iterations"), (0, -1, HUGE)),
        (LearningSettings, ("averaging_epochs",), (math.nan, -1.0)),
        (SolverSettings, ("iterations", "training_iterations", "cg_iterations"), (0, -1, HUGE)),
        (LayerSettings, ("lam", "image_weight"), (0.0, -1.0, math.nan, math.inf)),
        (LayerSettings, ("p",), (-1.0, 2.0, math.nan)),
        (LayerSettings, ("pool",), ([1, 2, HUGE], [0, 2, 2])),
        (SolverSettings, ("rho", "step", "gap"), (0.0, -1.0, math.nan, math.inf)),
        (SolverSettings, ("tolerance", "relaxation", "beta_start"), (-1.0, math.nan, math.inf)),
        (PreprocessingSettings, ("contrast_sigma", "whitening_floor"), (0.0, math.nan, math.inf)),
        (DataSettings, ("size",), (0, -1, HUGE)),
        (DataSettings, ("scale",), (0.0, math.nan)),
        (DataSettings, ("max_images", "workers"), (0, -1)),
    ],
)
def test_numbers_that_can_only_be_a_mistake_are_refused_by_their_key(kind, keys, values):
    needed = {"num_maps": 4} if kind is LayerSettings else {}
    for key, value in itertools.product(keys, values):
        with pytest.raises(ValueError, match=key) as caught:
            kind(**{**needed, key: value})
        assert str(value) in str(caught.value) and "\n" not in str(caught.value)


def test_such_numbers_in_the_settings_of_a_run_are_refused_by_their_key():
    for key, value in itertools.product(("patience", "memory", "disk"), ("nan", "-1")):
        assert f"{key}={value}" in message(f"{key}={value}")
    assert "seed=-1: must not be negative" in message("seed=-1")
    assert f"seed={10**30}: must not be negative, and below 2^63" in message(f"seed={10**30}")
    assert "model.layer1.lam=inf: must be positive" in message("model.layer1.lam=inf")


def test_the_largest_seed_draws():
    torch.Generator().manual_seed(2**63 - 1)
    assert read(f"seed={2**63 - 1}").seed == 2**63 - 1


@pytest.mark.parametrize("value", [-1, 10**30])
def test_every_command_refuses_seeds_that_draw_nothing(value):
    for build in (
        lambda: DenoiseConfig("run", "image", seed=value),
        lambda: VisualizeConfig(run="run", seed=value),
        lambda: ClassifyConfig(run="run", seed=value),
    ):
        with pytest.raises(ValueError, match=f"seed={value}: must not be negative"):
            build()


def test_a_network_file_that_asks_for_endless_inference_is_refused(tmp_path):
    net = DeconvNet([LayerSettings(2, 3)], PreprocessingSettings("grey"))
    path = tmp_path / "endless.safetensors"
    net.layer(1).settings.solver.iterations = HUGE
    net.save(path)
    with pytest.raises(ValueError, match=rf"solver.iterations={HUGE}: must be at least 1"):
        load(path)


def test_the_users_folder_is_meant_by_a_tilde_in_every_path():
    home = str(Path.home())
    assert read("resume='~/runs/a'").resume == f"{home}/runs/a"
    found = read_settings(
        compose("classify", ["run='~/a'", "data.path=b", "beside=['~/c','d~']", "output='~'"])
    )
    assert (found.run, found.beside, found.output) == (f"{home}/a", [f"{home}/c", "d~"], home)


def test_lam_is_a_number_or_is_computed_when_the_layer_begins_to_learn():
    model = read(
        *("model.layer1.lam=null", "model.layer1.lam_ratio=0.1"),
        *("model.layer2.lam=auto", "model.layer2.learning.init=patches"),
    ).model
    assert model["layer1"].lam is None and model["layer1"].lam_ratio == 0.1
    assert model["layer2"].lam == "auto"
    both = message("model.layer1.lam_ratio=0.1")
    assert "model.layer1.lam=2.0, lam_ratio=0.1: give one of the two; with lam_ratio" in both
    assert "model.layer1.lam='abc': must be a number, or auto" in message("model.layer1.lam=abc")
