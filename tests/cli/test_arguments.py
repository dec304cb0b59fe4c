"""Text on the command line arrives as it was typed; what is wrong there is said in one line."""

import itertools
import random
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from deconvnet.cli import printed_commands
from deconvnet.cli.arguments import for_hydra
from deconvnet.cli.config_files import as_written
from deconvnet.cli.errors import one_line
from deconvnet.cli.hydra_errors import explain_refusal
from deconvnet.cli.image_keys import check_image_keys
from deconvnet.cli.read_settings import read_settings, register
from deconvnet.cli.setting_keys import has
from deconvnet.cli.settings import SCHEMAS as ALL_SCHEMAS
from deconvnet.cli.settings import (
    AblateConfig,
    ClassifyConfig,
    DenoiseConfig,
    InpaintConfig,
    ReconstructConfig,
    TrainConfig,
    VisualizeConfig,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# What a shell may deliver in one argument.
NUMBERS = ("1.10", "83e2010", "12e3456", "1_000", "1e5", "0x10", "007", "2024.10", "2024-10-01")
WORDS = ("true", "False", "off", "on", "no", "~", "inf", "nan", "12:30:45", "+5", "-5", ".5", "5.")
FILES = (
    *("photo (1).jpg", "a,b.png", "a=b", "a:b", "[a].jpg", "a[1", "a]b", "{a}", "it's", 'a"b'),
    *(
        "a$b",
        "$HOME",
        "${",
        "a${b.png",
        "日本.png",
        "é ü.jpg",
        "#1",
        "50%",
        "a\\b",
        "a\\",
        "C:\\x\\",
    ),
    *(
        " a",
        "a ",
        "a  b",
        "a\tb",
        "~/photos",
        "~nobody/x",
        "a&b",
        "a;b",
        "a|b",
        "a*?",
        "!x",
        "choice",
    ),
    *("choice(1).png", "range(1,2)", "(1)", "a\nb", "-x", "@x", "'", '"', "\\'", "null.png"),
)
TYPED = (*NUMBERS, *WORDS, *FILES)

SCHEMAS = {
    "train": TrainConfig,
    "reconstruct": ReconstructConfig,
    "ablate": AblateConfig,
    "denoise": DenoiseConfig,
    "inpaint": InpaintConfig,
    "classify": ClassifyConfig,
}


@pytest.fixture(scope="module", autouse=True)
def hydra():
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def read(name, *typed):
    return compose(name, for_hydra(list(typed), SCHEMAS[name]))


def value(argument, schema=TrainConfig):
    """What Hydra reads in one argument."""
    (ready,) = for_hydra([argument], schema)
    return OverridesParser.create().parse_override(ready).value()


def swept(argument, schema=TrainConfig):
    """What Hydra reads in one argument of a sweep."""
    _, ready = for_hydra(["-m", argument], schema)
    parser = OverridesParser.create()
    strings = parser.parse_override(ready).sweep_string_iterator()
    return [parser.parse_override(f"x={string}").value() for string in strings]


def told(name, *typed):
    """What is said of arguments that Hydra refuses."""
    with pytest.raises(HydraException) as caught:
        read(name, *typed)
    return explain_refusal(caught.value, SCHEMAS[name]) or one_line(caught.value)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_every_text_arrives_as_it_was_typed(prefix):
    for text in TYPED:
        assert value(f"{prefix}name={text}") == text.replace("${", r"\${"), text
        assert value(f"{prefix}images={text}", VisualizeConfig) == value(f"name={text}")


def test_texts_of_any_characters_arrive_as_they_were_typed():
    draw = random.Random(0)
    for _ in range(1500):
        text = "".join(draw.choices("ab1.0e_-/\\'\" ,=()[]{}$:~#%é\n\t", k=draw.randint(1, 8)))
        whole = text[0] in "'\"" and text[0] == text[-1] and len(text) > 1
        if not whole and "${" not in text:
            assert value(f"name={text}") == text, repr(text)


def test_settings_hold_the_texts_that_were_typed():
    for text in ("1.10", "83e2010", "007", "true", "photo (1).jpg", "a\nb", "it's ${"):
        cfg = read("train", f"name={text}", f"data.path={text}", f"resume={text}")
        assert (cfg.name, cfg.data.path, cfg.resume) == (text, text, text)
    cfg = read("classify", "run=1_0", "data.path=1e5", "beside=[1.10,2.20]", "output=0x1")
    assert (cfg.run, cfg.data.path, list(cfg.beside)) == ("1_0", "1e5", ["1.10", "2.20"])
    assert cfg.output == "0x1" and cfg.layers is None


def test_the_run_folder_has_the_name_that_was_typed():
    cfg = compose("train", for_hydra(["name=1.10"], TrainConfig), True)
    folder = OmegaConf.to_container(cfg.hydra.run, resolve=False)["dir"]
    assert OmegaConf.create({"name": cfg.name, "dir": folder}).dir == "runs/1.10"
    assert value("hydra.run.dir=2024.10") == "2024.10"
    assert value("hydra.run.dir=~/runs") == str(Path.home() / "runs")


def test_nothing_but_null_without_quotes_is_no_value_where_there_may_be_none():
    for text in ("null", "NULL"):
        assert value(f"output={text}", ReconstructConfig) is None
        assert value(f"layers={text}", VisualizeConfig) is None
        assert value(f"name={text}") == text
    assert value("output='null'", ReconstructConfig) == "null"


def test_quotes_around_a_whole_value_are_taken_off():
    for quote in "'\"":
        for text in ("null", "1.10", "lam=2", "[a,b]", "a b"):
            assert value(f"images={quote}{text}{quote}", VisualizeConfig) == text


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("[1e5,b.png]", ["1e5", "b.png"]),
        ("[photo (1).jpg, a=b.png ]", ["photo (1).jpg", "a=b.png"]),
        ("['a,b.png',\"c,d\",it's,b's]", ["a,b.png", "c,d", "it's", "b's"]),
        ("[a[1].png,b)]", ["a[1].png", "b)"]),
        ("[true,null,0x10]", ["true", "null", "0x10"]),
        ("[]", []),
    ],
)
def test_lists_hold_the_texts_that_were_typed(typed, expected):
    assert value(f"images={typed}", VisualizeConfig) == expected
    assert value(f"layers={typed}", VisualizeConfig) == expected
    assert value(f"images={typed}", DenoiseConfig) == expected


def test_a_value_without_brackets_is_a_list_of_one_where_only_a_list_will_do():
    assert value("checkpoints=a (1).pt", VisualizeConfig) == ["a (1).pt"]
    assert value("beside=1.10", ClassifyConfig) == ["1.10"]
    assert value("preprocessing.steps=mean") == ["mean"]
    assert value("mean=0.5,0.4", VisualizeConfig) == [0.5, 0.4]
    assert value("layers=1,4", ClassifyConfig) == [1, 4]
    assert value("model.layer1.pool=[2,2,2]") == [2, 2, 2]
    assert value("layers=2") == 2


def test_a_reference_to_another_setting_is_no_text():
    cfg = read("train", "data.name=1.10", "name=${data.name}-wide (2)")
    assert cfg.name == "1.10-wide (2)"
    assert read("train", "name=a${b.png").name == "a${b.png"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("name=1.10,1.1", ["1.10", "1.1"]),
        ("name=a b,(c)", ["a b", "(c)"]),
        ("name='a,b',c", ["a,b", "c"]),
        ("name=choice(1.10,1.1,a=b)", ["1.10", "1.1", "a=b"]),
        ("name=choice(it's,(c))", ["it's", "(c)"]),
        ("name=sort(1.10,1.2,reverse=true)", ["1.2", "1.10"]),
        ("name=shuffle(choice(1.10,a b))", ["1.10", "a b"]),
        ("name=range(1,3)", [1, 2]),
        ("++name=1_000,0x10", ["1_000", "0x10"]),
        ("seed=0,1", [0, 1]),
    ],
)
def test_a_sweep_goes_over_the_texts_that_were_typed(typed, expected):
    found = swept(typed)
    assert (sorted(found) if "shuffle" in typed else found) == expected


def test_a_sweep_goes_over_lists_too():
    assert swept("layers=[a,1.10],[c]", VisualizeConfig) == [["a", "1.10"], ["c"]]
    assert swept("layers=[1],[1,4]", ClassifyConfig) == [[1], [1, 4]]


def test_numbers_groups_and_the_options_of_hydra_are_left_as_they_are():
    typed = ["model.layer1.num_maps=10", "model=cvpr2010", "+experiment=cvpr2010", "seed=1_0"]
    typed += ["~model.layer3", "hydra/launcher=basic", "data={path: 1}"]
    options = ["-m", "--config-dir", "name=1"]
    assert for_hydra([*options, *typed], TrainConfig) == [*options, *typed]
    # Between settings, argparse would not accept them.
    assert for_hydra([*typed, *options], TrainConfig) == [*options, *typed]
    assert for_hydra([*typed[:2], *options, *typed[2:]], TrainConfig) == [*options, *typed]


def test_lam_and_lam_ratio_alone_replace_each_other_in_the_files():
    lam, ratio = "model.layer2.lam", "model.layer2.lam_ratio"
    for given, other in ((f"{ratio}=0.1", lam), (f"{lam}=1.10", ratio), (f"{lam}=auto", ratio)):
        assert for_hydra([given, "seed=1"], TrainConfig) == [given, "seed=1", f"{other}=null"]
        for both in (f"{other}=1.0", f"{other}=null"):
            assert for_hydra([given, both], TrainConfig) == [given, both]
    for key in (lam, ratio):
        assert for_hydra([f"{key}=null"], TrainConfig)[1:] == []


@pytest.mark.parametrize("typed", ["name=", "data.path=", "+data.path=", "resume="])
def test_a_text_without_a_value_is_refused(typed):
    with pytest.raises(ValueError, match=r"= has no value"):
        for_hydra([typed], TrainConfig)


def test_a_printed_setting_is_read_back_as_it_was():
    texts = (*TYPED, "[a,b]", "'a'", '"a b"', "null", "${name}", "runs/lam=2", "runs/my run")
    for text, (key, schema) in itertools.product(
        texts, [("run", VisualizeConfig), ("images", ReconstructConfig)]
    ):
        (typed,) = shlex.split(printed_commands.setting(key, text))
        found = OmegaConf.create({"x": value(typed, schema)}).x
        assert found == text, typed
    assert printed_commands.setting("run", Path("runs/a")) == "run=runs/a"
    assert printed_commands.setting("layer", 2) == "layer=2"


def test_the_command_that_resumes_is_the_one_that_was_typed(monkeypatch):
    typed = ["name=lam=2", "data.path=photo (1)", "++resume=false"]
    monkeypatch.setattr(printed_commands, "_call", ())
    monkeypatch.setattr(printed_commands, "_typed", [])
    for call, other in (
        (["python", "my scripts/train.py"], ["python", "my scripts/train_cnn.py"]),
        (["deconvnet", "train"], ["deconvnet", "train-cnn"]),
        (["python", "-m", "deconvnet", "train"], ["python", "-m", "deconvnet", "train-cnn"]),
    ):
        printed_commands.remember(tuple(call), typed)
        assert shlex.split(printed_commands.again("resume")) == [*call, *typed[:2]]
        assert shlex.split(printed_commands.sibling("train-cnn")) == other


def test_the_command_that_resumes_several_processes_starts_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(printed_commands, "_call", ())
    monkeypatch.setattr(printed_commands, "_typed", [])
    for call, launched in (
        (["python", "scripts/train.py"], ["scripts/train.py"]),
        (["python", "-m", "deconvnet", "train"], ["-m", "deconvnet", "train"]),
        (["deconvnet", "train"], ["--no-python", "deconvnet", "train"]),
    ):
        printed_commands.remember(tuple(call), ["seed=1"])
        expected = ["torchrun", "--nproc-per-node=2", *launched, "seed=1"]
        assert shlex.split(printed_commands.again()) == expected


@pytest.mark.parametrize(
    ("name", "typed", "expected"),
    [
        ("train", "lam=3", "lam: no such setting; did you mean model.layer1.lam?"),
        (
            "train",
            "epochs=3",
            "epochs: no such setting; did you mean model.layer1.learning.epochs?",
        ),
        ("train", "model.layer2.num_map=3", "did you mean model.layer2.num_maps?"),
        ("train", "model.layer2.iterations=3", "did you mean model.layer2.solver.iterations?"),
        ("train", "model.layer9.lam=3", "model.layer9.lam: model has no layer9 here"),
        ("train", "path=x", "path: no such setting; did you mean data.path?"),
        ("train", "nonsense=1", "nonsense: no such setting; there are name, model, data"),
        ("train", "photos", "photos: settings are given as key=value"),
        ("train", "data=photos", "data=folder data.path=photos"),
        ("train", "data=~/my photos (1)", "data=folder 'data.path=~/my photos (1)'"),
        ("train", "model=nope", "there is no model/nope; choose activations"),
        ("train", "experiment=cvpr2010", "use +experiment=cvpr2010"),
        ("train", "+layers=2.5", "layers=2.5: must be a whole number"),
        ("train", "model.layer1.p=much", "model.layer1.p=much: must be a number"),
        ("train", "progress=maybe", "progress=maybe: must be true or false"),
        ("classify", "data=photos", "data: is no setting itself; there are data.path"),
        ("ablate", "layers=2", "layers: no such setting; there are run, count"),
    ],
)
def test_what_hydra_refuses_is_explained_by_what_would_be_right(name, typed, expected):
    found = told(name, typed)
    assert expected in found and "\n" not in found


def test_one_image_may_be_called_image_and_settings_have_no_dashes():
    for schema in (DenoiseConfig, InpaintConfig, ReconstructConfig, VisualizeConfig):
        assert for_hydra(["image=a.png", "++image=[b,c]"], schema) == [
            *("images=a.png", "++images=[b,c]"),
        ]
    with pytest.raises(ValueError, match="--name=mine: settings have no dashes; use name=mine"):
        for_hydra(["--name=mine", "--multi"], DenoiseConfig)
    assert as_written("image: 1e5\n", DenoiseConfig) == 'images: "1e5"\n'
    with pytest.raises(ValueError, match=r"b\.yaml: image is another name of images; give images"):
        as_written("image: a\nimages: b\n", DenoiseConfig, where="b.yaml")


@pytest.mark.parametrize(
    ("name", "typed", "right"),
    [
        ("train", "images=my photos", "data=folder 'data.path=my photos'"),
        ("train", "image=a.jpg data=list", "data.path=a.jpg"),
        ("train", "data=activations data.path=photos", "data.images=photos"),
        ("suggest", "data.images=photos", "data=folder data.path=photos"),
        ("train", "data.images=photos", "data=folder data.path=photos"),
        ("train_cnn", "images=photos", "data=folder data.path=photos"),
        ("classify", "images=photos", "data.path=photos"),
        *(
            (name, "data.path=photos data=folder", "images=photos")
            for name in ("reconstruct", "export", "denoise", "inpaint", "visualize", "occlusion")
        ),
        ("faithfulness", "path=photos", "images=photos"),
        ("correspondence", "images=photos", "the images that the file boxes=... names"),
        ("ablate", "images=photos", "the images that the run was trained on"),
        ("stability", "data.path=photos", "the images that the run was trained on"),
    ],
)
def test_images_named_as_other_commands_name_them_are_refused_with_the_right_setting(
    name, typed, right
):
    given = ["images=my photos"] if "my photos" in typed else typed.split()
    with pytest.raises(ValueError) as caught:
        check_image_keys(given, ALL_SCHEMAS[name])
    assert str(caught.value).endswith(f": this command takes {right}"), caught.value


def test_every_command_accepts_its_own_setting_of_images():
    for schema in ALL_SCHEMAS.values():
        own = [key for key in ("images", "data.images", "data.path") if has(schema, key)]
        for key in own[:1]:
            of_activations = ["data=activations"] if key == "data.images" else []
            check_image_keys([*of_activations, f"{key}=photos"], schema)
    check_image_keys(["data=folder", "data.path=photos"], ALL_SCHEMAS["train"])
    check_image_keys(["images=12000"], ALL_SCHEMAS["train_cnn"])
    check_image_keys(["images=photos"], ALL_SCHEMAS["info"])


@pytest.mark.parametrize("name", ["reconstruct", "ablate"])
def test_every_command_refuses_keys_that_are_none_and_values_of_other_types(name):
    given = ["run=x", *(["images=y"] if name == "reconstruct" else [])]
    assert read_settings(read(name, *given)).run == "x"
    with pytest.raises(ValueError, match="layr: no such setting"):
        read_settings(read(name, *given, "+layr=2"))
    key = "layer" if name == "reconstruct" else "count"
    assert told(name, *given, f"{key}=two") == f"{key}=two: must be a whole number"
    with pytest.raises(ValueError, match="run has no value"):
        read_settings(read(name, *given[1:]))


def test_a_file_of_settings_holds_texts_as_they_are_written():
    source = "name: 1.10  # a version\ndata:\n  path: 1_000\n  size: 24\nresume: off\nseed: 1_0\n"
    found = OmegaConf.create(as_written(source, TrainConfig))
    assert found == {
        "name": "1.10",
        "data": {"path": "1_000", "size": 24},
        "resume": "off",
        "seed": 10,
    }
    source = "path: 2024-10-01\nname: null\nsplit: '1.10'\n"
    found = OmegaConf.create(as_written(source, TrainConfig, "data"))
    assert found == {"path": "2024-10-01", "name": None, "split": "1.10"}
    source = "layers: [1.10, 'a', b]\nimages: 1e5\n"
    found = OmegaConf.create(as_written(source, VisualizeConfig))
    assert found == {"layers": ["1.10", "a", "b"], "images": "1e5"}
    for path in CONFIGS.rglob("*.yaml"):
        package = "" if path.parent == CONFIGS else path.parent.name
        source = path.read_text(encoding="utf-8")
        changed = as_written(source, TrainConfig, package)
        assert OmegaConf.create(changed) == OmegaConf.create(source), path


def test_hydra_reads_texts_in_files_as_they_are_written(tmp_path, script):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "wide.yaml").write_text("# @package _global_\nname: 1.10\nlayers: 1\n")
    (tmp_path / "mine" / "bad.yaml").write_text("name: [1\n")
    (tmp_path / "mine" / "latin.yaml").write_bytes(b"name: \xff\n")
    given = ["--config-dir", tmp_path, "--cfg", "job"]
    result = script(tmp_path, "train.py", *given, "+mine=wide")
    assert result.code == 0 and "name: '1.10'" in result.out and "layers: 1\n" in result.out
    for name in ("bad", "latin"):
        result = script(tmp_path, "train.py", *given, f"+mine={name}")
        assert result.code == 1 and result.err.count("\n") == 1, result.err
        assert f"{name}.yaml: is no configuration in YAML" in result.err
