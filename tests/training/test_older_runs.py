"""Run folders that an earlier version wrote, with settings under their old names.

tests/fixtures/older_run holds eight tiny photos, the arguments of the command, and the folder of
the run, which was stopped in the middle of an epoch of its second layer. resumed.safetensors and
extended.safetensors are what the earlier version learned from there: to the end, and as a new run
of one more epoch that starts from its filters.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from deconvnet import LayerSettings, LearningSettings, SolverSettings, load
from deconvnet.storage.network_files import load_network
from deconvnet.support.renaming import current_name
from deconvnet.training.run_folder import training_data

FIXTURE = Path(__file__).parents[1] / "fixtures" / "older_run"
ARGUMENTS = (FIXTURE / "arguments.txt").read_text().split()
# Where the networks of the fixture were learned. Other routines of torch may round differently.
MEASURED_WITH = ("2.14", "AVX512")
EXTENDED = "model.layer2.learning.epochs=5"


@pytest.fixture
def place(tmp_path):
    """A folder with the photos, and the run in runs/older."""
    shutil.copytree(FIXTURE / "photos", tmp_path / "photos")
    shutil.copytree(FIXTURE / "run", tmp_path / "runs" / "older")
    return tmp_path


def with_new_names(arguments):
    """The arguments with all settings under their current names."""
    kinds = {"learning": LearningSettings, "solver": SolverSettings}
    renamed = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        *path, name = key.split(".")
        kind = kinds.get(path[-1], LayerSettings) if path[:1] == ["model"] else object
        renamed.append(".".join([*path, current_name(kind, name)]) + f"={value}")
    return renamed


def assert_same_as_before(path, name):
    """Bit by bit where the fixture was made, and up to rounding elsewhere."""
    tensors, _ = load_network(path)
    expected, _ = load_network(FIXTURE / name)
    assert tensors.keys() == expected.keys()
    version = ".".join(torch.__version__.split(".")[:2])
    exact = (version, torch.backends.cpu.get_cpu_capability()) == MEASURED_WITH
    for key, tensor in tensors.items():
        if exact:
            assert torch.equal(tensor, expected[key]), key
        else:
            assert_close(tensor, expected[key], rtol=0, atol=1e-3)


@pytest.mark.parametrize("names", ["old", "new"])
def test_a_run_of_an_earlier_version_is_resumed_bit_by_bit(place, script, names):
    arguments = {"old": ARGUMENTS, "new": with_new_names(ARGUMENTS)}
    assert arguments["old"] != arguments["new"]
    result = script(place, "train.py", *arguments[names], "name=older", pictures=False)
    assert result.code == 0, result.err
    # It resumed in the second layer, and did not start from the beginning.
    assert "layer 1/" not in result.out + result.err
    folder = place / "runs" / "older"
    assert not (folder / "previous-1").exists()
    assert_same_as_before(folder / "network.safetensors", "resumed.safetensors")


def test_a_run_of_an_earlier_version_is_extended_from_its_filters(place, script):
    arguments = [*with_new_names(ARGUMENTS), EXTENDED, "resume=runs/older", "name=more"]
    result = script(place, "train.py", *arguments, pictures=False)
    assert result.code == 0, result.err
    # The number of epochs is the only setting that differs: none is reported under an old name.
    assert "model.layer2.learning.epochs: 4 there, 5 now; learning starts from" in result.out
    path = place / "runs" / "more" / "network.safetensors"
    assert_same_as_before(path, "extended.safetensors")


def test_a_run_of_an_earlier_version_is_refused_only_for_what_differs(place, script):
    arguments = [*with_new_names(ARGUMENTS), "model.layer1.lam=5", "name=older"]
    result = script(place, "train.py", *arguments)
    assert result.code == 1
    assert "runs/older holds a run with other settings (model.layer1.lam: 4.0 there, 5.0 now)" in (
        result.err
    )


def test_a_run_of_an_earlier_version_says_which_names_are_new(place):
    with pytest.warns(FutureWarning, match="coupling is now called rho"):
        net = load(place / "runs" / "older")
    assert net.depth == 2 and net.layer(1).settings.learning.reinit_unused is False
    assert net.layer(2).settings.solver.rho == 3.5
    assert training_data(place / "runs" / "older").path == "photos"


def test_a_network_file_of_an_earlier_version_reconstructs_images(place, script):
    shutil.copy(FIXTURE / "resumed.safetensors", place / "net.safetensors")
    result = script(place, "reconstruct.py", "run=net.safetensors", "images=photos", "output=out")
    assert result.code == 0, result.err
    assert list((place / "out").iterdir())
