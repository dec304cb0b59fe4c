"""Settings that were renamed are read under their old names; one line gives the new name."""

import warnings
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from deconvnet.cli.arguments import for_hydra
from deconvnet.cli.config_files import as_written
from deconvnet.cli.launch import CONFIGS
from deconvnet.cli.read_settings import check_keys, register
from deconvnet.cli.setting_keys import without_none
from deconvnet.cli.settings import SCHEMAS
from deconvnet.support.renaming import renamed


@renamed(turns="passes")
@dataclass
class Inner:
    passes: int = 1
    method: str = "a"


@renamed(width="num_maps", how="learning")
@dataclass
class Layer:
    num_maps: int = 1
    learning: Inner = field(default_factory=Inner)


@renamed(called="name", coat="preprocessing")
@dataclass
class Settings:
    name: str = "x"
    preprocessing: Inner = field(default_factory=Inner)
    model: dict[str, Layer] = field(default_factory=lambda: {"layer1": Layer(), "layer2": Layer()})


def compose_settings(*typed):
    """The settings that a command line of Settings gives, and the warnings."""
    ConfigStore.instance().store(name="renamed_settings", node=Settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ready = for_hydra(list(typed), Settings)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("renamed_settings", ready)
    check_keys(cfg)
    return cfg, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("typed", "key", "current"),
    [
        ("called=1.10", "name", "called is now called name"),
        ("++called=1.10", "name", "called is now called name"),
        ("coat.turns=3", "preprocessing.passes", "coat.turns is now called preprocessing.passes"),
        ("preprocessing.turns=3", "preprocessing.passes", "preprocessing.turns is now called"),
        ("model.layer2.width=3", "model.layer2.num_maps", "is now called model.layer2.num_maps"),
        (
            "model.layer2.learning.turns=3",
            "model.layer2.learning.passes",
            "model.layer2.learning.turns is now called model.layer2.learning.passes",
        ),
        (
            "model.layer2.how.turns=3",
            "model.layer2.learning.passes",
            "model.layer2.how.turns is now called model.layer2.learning.passes",
        ),
        (
            "model.layer2={width: 2, how: {turns: 3, method: '1.10'}}",
            "model.layer2.learning.passes",
            "model.layer2.learning.turns is now called model.layer2.learning.passes",
        ),
    ],
)
def test_an_old_key_on_the_command_line_sets_the_setting_and_is_warned_of(typed, key, current):
    cfg, said = compose_settings(typed)
    assert OmegaConf.select(cfg, key) == ("1.10" if key == "name" else 3)
    assert any(current in line for line in said)
    assert all(line.endswith("; the old name will go") and "\n" not in line for line in said)


def test_a_text_under_an_old_key_arrives_as_it_was_typed():
    cfg, _ = compose_settings("called=photo (1)", "model.layer1.how.method=1.10")
    assert cfg.name == "photo (1)" and cfg.model.layer1.learning.method == "1.10"


def test_an_old_key_is_read_in_a_sweep_a_deletion_and_a_reference():
    with pytest.warns(
        FutureWarning, match="model.layer1.width is now called model.layer1.num_maps"
    ):
        ready = for_hydra(["-m", "model.layer1.width=1,2", "~coat.turns"], Settings)
    assert ready == ["-m", "model.layer1.num_maps=1,2", "~preprocessing.passes"]
    assert compose_settings("name=of-${model.layer2.width}")[0].name == "of-1"


def test_current_keys_are_left_alone_without_a_warning():
    typed = ["name=x", "model.layer1.learning.passes=2", "model.layer1.learning={passes: 3}"]
    assert compose_settings(*typed)[1] == []


def test_a_yaml_file_may_have_old_keys_at_every_level():
    source = """\
called: 1.10  # a comment stays
coat: &coat
  turns: 3
model:
  layer1: &layer
    width: 4
    how: {turns: 5, method: 1e5}
  layer2:
    <<: *layer
    width: 6
  layer3:
    <<: [*layer]
    learning:
      <<: *coat
      method: b
hydra:
  sweeper:
    params:
      model.layer1.width: 1,2
"""
    with pytest.warns(FutureWarning) as caught:
        changed = as_written(source, Settings, where="mine/wide.yaml")
    assert "# a comment stays" in changed
    assert OmegaConf.create(changed) == {
        "name": "1.10",
        "preprocessing": {"passes": 3},
        "model": {
            "layer1": {"num_maps": 4, "learning": {"passes": 5, "method": "1e5"}},
            "layer2": {"num_maps": 6, "learning": {"passes": 5, "method": "1e5"}},
            "layer3": {"num_maps": 4, "learning": {"passes": 3, "method": "b"}},
        },
        "hydra": {"sweeper": {"params": {"model.layer1.num_maps": "1,2"}}},
    }
    said = [str(warning.message) for warning in caught]
    assert "mine/wide.yaml: called is now called name; the old name will go" in said
    assert all(line.startswith("mine/wide.yaml: ") and "\n" not in line for line in said)


def test_a_yaml_file_of_a_group_has_keys_below_it():
    with pytest.warns(FutureWarning, match="model.layer1.width is now called"):
        changed = as_written("layer1: {width: 2}\n", Settings, "model")
    assert OmegaConf.create(changed) == {"layer1": {"num_maps": 2}}


def test_an_old_and_a_new_name_of_one_setting_do_not_stand_together():
    with (
        pytest.warns(FutureWarning),
        pytest.raises(ValueError, match=r"a\.yaml: width is another name of num_maps; give num_"),
    ):
        as_written("width: 1\nnum_maps: 2\n", Settings, "model.layer1", "a.yaml")


def old_keys(schema, prefix=""):
    """(old, current) dotted keys of every setting of a command that was renamed."""
    schema = without_none(schema)[0]
    if get_origin(schema) is dict:
        yield from old_keys(get_args(schema)[1], f"{prefix}layer1.")
    elif is_dataclass(schema):
        for old, current in getattr(schema, "RENAMED", {}).items():
            yield f"{prefix}{old}", f"{prefix}{current}"
        for name, annotation in get_type_hints(schema).items():
            yield from old_keys(annotation, f"{prefix}{name}.")


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_setting_that_was_renamed_is_read_under_its_old_name(name):
    for old, current in old_keys(SCHEMAS[name]):
        with pytest.warns(FutureWarning, match=f"{old} is now called {current}; the old"):
            assert for_hydra([f"{old}=1"], SCHEMAS[name])[0].startswith(f"{current}=")
        names = {field.name for field in fields(SCHEMAS[name])}
        assert current.partition(".")[0] in names


def test_the_files_that_come_with_the_package_have_current_names():
    register()
    files = [path for path in CONFIGS.rglob("*.yaml")]
    assert len(files) > 20
    for path in files:
        package = "" if path.parent in (CONFIGS, CONFIGS / "experiment") else path.parent.name
        schema = SCHEMAS.get(path.stem, SCHEMAS["train"]) if package == "" else SCHEMAS["train"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            as_written(path.read_text(encoding="utf-8"), schema, package, str(path))


def test_a_command_reads_a_file_of_old_keys_and_says_so_in_one_line(tmp_path, script):
    old, current = next(old_keys(SCHEMAS["train"]), (None, None))
    if old is None:
        pytest.skip("no setting of train was renamed")
    Path(tmp_path, "mine").mkdir()
    text = OmegaConf.create({})
    OmegaConf.update(text, old, "1", force_add=True)
    file = Path(tmp_path, "mine", "wide.yaml")
    file.write_text("# @package _global_\n" + OmegaConf.to_yaml(text).replace("'", ""))
    result = script(tmp_path, "train.py", "--config-dir", tmp_path, "+mine=wide", "--cfg", "job")
    assert result.err == f"warning: {file}: {old} is now called {current}; the old name will go\n"
    assert result.code == 0
    result = script(tmp_path, "train.py", f"{old}=1", "--cfg", "job")
    assert result.err == f"warning: {old} is now called {current}; the old name will go\n"
    assert result.code == 0
