"""What the command line says of itself: --help, --version, and commands that are none."""

import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from omegaconf import OmegaConf

from deconvnet import __version__
from deconvnet.cli import commands, completion
from deconvnet.cli.help import FIRST, all_settings, comments, text_of
from deconvnet.cli.settings import SCHEMAS


@dataclass
class Below:
    # how many there are; each of them
    # takes a line
    count: int = 3
    other: int = 4


@dataclass
class Small:
    """Of `fields` with comments."""

    # where it is
    path: str
    below: Below = field(default_factory=Below)  # what is below
    # one of these
    layers: dict[str, Below] = field(default_factory=dict)

    def method(self):
        # no comment of a field
        self.path: str = ""


def test_a_comment_above_a_field_or_at_its_end_is_its_meaning():
    assert comments(Below) == {
        "count": "how many there are; each of them takes a line",
        "other": "",
    }
    assert comments(Small) == {
        "path": "where it is",
        "below": "what is below",
        "layers": "one of these",
    }


def test_the_help_page_has_values_and_meanings_and_the_first_of_several_layers():
    cfg = OmegaConf.create(
        {
            "path": "???",
            "below": {"count": 7, "other": [1, None, True]},
            "layers": {"layer1": {"count": 1, "other": 2}, "layer2": {"count": 1, "other": 5}},
        }
    )
    page = all_settings(Small, cfg)
    assert re.sub(" +", " ", page).splitlines() == [
        "path=... (needed) where it is",
        "below what is below",
        " count=7 how many there are; each of them takes a line",
        " other=[1,null,true]",
        "layers one of these",
        " layer1",
        " count=1 how many there are; each of them takes a line",
        " other=2",
        " layer2, as layer1 except other=5",
    ]


def test_values_are_shown_as_they_are_typed():
    shown = [text_of(value) for value in (None, True, 1e-4, "a b", ["x", 1], {"a": 1})]
    assert shown == ["null", "true", "0.0001", "a b", "[x,1]", '{"a": 1}']


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_explains_itself_in_80_columns(tmp_path, script, command):
    result = script(tmp_path, command, "--help", "all")
    assert result.code == 0 and result.err == "", result
    assert [line for line in result.out.splitlines() if len(line) > 80] == []
    assert f"deconvnet {command}" in result.out and "--config-dir" in result.out
    for key in comments(SCHEMAS[command.replace("-", "_")]):
        assert re.search(rf"^{key}\b", result.out, re.MULTILINE), key
    assert "$" not in re.sub(r"=\$\{data\.\w+\}", "", result.out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_the_main_settings_of_a_command_fit_on_a_screen(tmp_path, script, command):
    result = script(tmp_path, command, "--help")
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80, result
    assert lines[-1].endswith(f": deconvnet {command} --help all")
    name = command.replace("-", "_")
    keys = FIRST.get(name, [field for field in comments(SCHEMAS[name]) if field != "data"])
    for key in keys:
        assert re.search(rf"^{re.escape(key)}=\S+\s.*[a-z]", result.out, re.MULTILINE), key


def test_the_help_page_has_the_values_of_its_command_line(tmp_path, script):
    result = script(tmp_path, "train", "model=iccv2011", "seed=7", "--help", "all")
    assert "seed=7 " in result.out and "num_maps=15 " in result.out
    assert "layer4, as layer1 except num_maps=150 lam=0.001" in result.out


def run(*arguments):
    """What a user sees who calls `python -m deconvnet` without torch."""
    program = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['hydra'] = None  # an import of them would fail\n"
        f"sys.argv = ['deconvnet', *{list(arguments)!r}]\n"
        "from deconvnet.cli.commands import main; main()"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_commands_are_listed_in_a_line_each_without_loading_torch():
    for arguments in ([], ["--help"], ["-h"]):
        done = run(*arguments)
        assert done.returncode == 0 and done.stderr == "", done
        for command in commands.COMMANDS:
            assert len(re.findall(rf"^  {command} +[A-Z].*\.$", done.stdout, re.MULTILINE)) == 1
        assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("deconvnet occ", ["occlusion "]),
        ("deconvnet train mod", ["model.", "model="]),
        ("deconvnet train model.layer3.solver.rel", ["model.layer3.solver.relaxation="]),
        ("deconvnet train name=x +experiment=cvpr", ["cvpr2010 ", "cvpr2010_toolbox "]),
        ("deconvnet visualize control=", ["true ", "false "]),
        ("deconvnet visualize run=ru", ["runs/"]),
        ("deconvnet visualize images=photo", ["photo 1.jpg "]),
    ],
)
def test_tab_completes_commands_settings_choices_and_files(tmp_path, typed, completed):
    (tmp_path / "runs").mkdir()
    (tmp_path / "photo 1.jpg").touch()
    complete = (
        f"{completion.script()}\nCOMP_LINE={typed!r}\nCOMP_POINT={len(typed)}\n_deconvnet\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", complete], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.splitlines(), done.stderr) == (completed, ""), done


def test_the_version_is_that_of_the_package():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"deconvnet {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "deconvnet trian: no such command; did you mean train?"),
        (["denoice", "run=x"], "deconvnet denoice: no such command; did you mean denoise?"),
        (["zzz"], "deconvnet zzz: no such command; there are train, suggest, visualize"),
        (["+layers=2"], "the command comes first, as in: deconvnet train +layers=2"),
        (["run=x"], "the command comes first"),
        (["--verbose"], "deconvnet --verbose: no such command; there are train"),
    ],
)
def test_a_command_that_is_none_ends_in_one_line_with_the_nearest_one(arguments, expected):
    done = run(*arguments)
    assert done.returncode == 1 and expected in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/lib/python3/site-packages/deconvnet/__main__.py", ("python", "-m", "deconvnet")),
        ("/somewhere/else/bin/deconvnet", ("/somewhere/else/bin/deconvnet",)),
    ],
)
def test_printed_commands_begin_as_the_user_began(path, expected):
    assert commands._program(path) == expected


def test_a_program_on_the_path_is_called_by_its_name(tmp_path, monkeypatch):
    program = tmp_path / "deconvnet"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands._program(str(program)) == ("deconvnet",)
