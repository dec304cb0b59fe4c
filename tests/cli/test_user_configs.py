"""Models and settings in files of the user's own, given with --config-dir."""

import pytest

QUICK = [
    *("progress=false", "device=cpu", "data.size=32", "data.max_images=3", "preprocessing=mean"),
    *(f"model.layer{n}.num_maps=4" for n in (1, 2, 3)),
    *(f"model.layer{n}.learning.epochs=1" for n in (1, 2, 3, 4)),
    *(f"model.layer{n}.solver.iterations=5" for n in (1, 2, 3, 4)),
]
DEEP = """\
defaults: [default]     # the layers of the default model, and one more
layer4: {num_maps: 3, filter_size: 3, connectivity: random_doubles}
"""


@pytest.fixture
def mine(tmp_path):
    """A folder with the user's settings, next to an empty working folder."""
    for group in ("model", "preset"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / "model" / "deep.yaml").write_text(DEEP)
    (tmp_path / "work").mkdir()
    return tmp_path / "mine"


def test_a_deeper_model_is_a_file_of_the_users_own(mine, script):
    work = mine.parent / "work"
    order = ["--config-dir", "../mine", "model=deep", *QUICK]
    result = script(work, "train", *order, pictures=False)
    assert result.code == 0 and result.err == "", result
    assert "layers of 4 and 4 and 4 and 3 maps" in result.out
    assert (work / "runs" / "photographs" / "network.safetensors").is_file()


def test_the_example_of_the_help_page_is_one(mine, script):
    page = script(mine.parent, "train", "--help", "all").out
    example = [
        line[2:] for line in page.splitlines() if line.startswith(("  defaults:", "  layer4:"))
    ]
    assert len(example) == 2
    (mine / "model" / "deep.yaml").write_text("\n".join(example))
    result = script(mine.parent, "train", "--config-dir", "mine", "model=deep", "--cfg", "job")
    assert result.code == 0 and "num_maps: 120" in result.out and "layer3:" in result.out


def test_own_settings_are_chosen_by_their_group_and_name(mine, script):
    (mine / "preset" / "fine.yaml").write_text("# @package _global_\nstrength: 2.5\nmemory: 1\n")
    order = ["--config-dir", mine, "+preset=fine", "run=x", "image=y", "--cfg", "job"]
    result = script(mine.parent, "denoise", *order)
    assert "strength: 2.5" in result.out and "memory: 1.0" in result.out, result
    result = script(mine.parent, "denoise", *order, "strength=3")
    assert "strength: 3.0" in result.out


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "layer1: {num_map: 3}\n",
            ["model/deep.yaml: model.layer1.num_map: no", "did you mean model.layer1.num_maps?"],
        ),
        (
            "layer1: {num_maps: many}\n",
            ["model/deep.yaml: model.layer1.num_maps: must be a whole number"],
        ),
        ("layer1: {num_maps: 3}\nlayer3: {num_maps: 3}\n", ["layer1, layer3", "without a gap"]),
        ("layer1: [\n", ["mine/model/deep.yaml: is no configuration in YAML"]),
    ],
)
def test_errors_in_a_users_file_are_one_line(mine, script, text, parts):
    (mine / "model" / "deep.yaml").write_text(text)
    result = script(mine.parent, "train", "--config-dir", "mine", "model=deep", "progress=false")
    assert result.code == 1 and result.err.count("\n") == 1, result
    for part in parts:
        assert part in result.err


def test_a_file_that_would_be_hidden_by_one_of_the_package_is_refused(mine, script):
    (mine / "model" / "default.yaml").write_text(DEEP)
    for order in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]):
        result = script(mine.parent, "train", *order, "progress=false")
        assert result.code == 1 and result.err.count("\n") == 1, result
        assert "mine/model/default.yaml: deconvnet has a file of this name, which would hide" in (
            result.err
        )
