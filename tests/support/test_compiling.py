"""Compiled code is kept on disk where that is possible, and works where it is not."""

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numba
import pytest

import deconvnet
from deconvnet.support import compiling

SOURCE = "def twice(x):\n    return x + x\n"
# Damage that a crash, a full disk or a stray command leaves behind.
DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(255, 0, -1)) * 20),
    "text": lambda path: path.write_text("cos\nnothing\n"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros_inside": lambda path: _overwrite(path, bytes(64)),
    "another_number": lambda path: _overwrite(path, b"7"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
}


def _overwrite(path, data):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(data)] = data
    path.write_bytes(bytes(content))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A module with a function, a home that cannot be written, and a folder of temporary files."""
    (tmp_path / "module.py").write_text(SOURCE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", os.devnull)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    # numba would read its variables again in the middle of a test, when it next compiles.
    numba.config.reload_config()
    monkeypatch.setattr(compiling.CodeCache, "_warned", False)
    # Code from a file is for a module that is imported.
    monkeypatch.setitem(sys.modules, "module", None)
    return tmp_path


def twice(places):
    """The function, compiled as in a new process."""
    spec = importlib.util.spec_from_file_location("module", places / "module.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["module"] = module
    return compiling.compiled(nogil=True)(module.twice)


def found_on_disk(function):
    """Whether the code that a call needed came from a file."""
    assert function(2.0) == 4.0
    return sum(function.stats.cache_hits.values()) == 1


def without_a_place_beside_the_source(places):
    shutil.rmtree(places / "__pycache__", ignore_errors=True)
    (places / "__pycache__").write_text("")


def test_the_next_process_finds_compiled_code_next_to_the_source(places):
    assert not found_on_disk(twice(places))
    assert found_on_disk(twice(places))
    assert not list((places / "temporary").iterdir())


def test_code_is_kept_among_temporary_files_where_no_other_folder_can_be_written(places):
    without_a_place_beside_the_source(places)
    assert not found_on_disk(twice(places))
    (kept,) = (places / "temporary").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    assert found_on_disk(twice(places))


def test_code_in_a_temporary_folder_that_others_may_write_to_is_not_run(places, caplog):
    without_a_place_beside_the_source(places)
    assert not found_on_disk(twice(places))
    (kept,) = (places / "temporary").iterdir()
    kept.chmod(0o777)
    assert not found_on_disk(twice(places))
    assert "set NUMBA_CACHE_DIR to a writable folder" in caplog.text


def test_without_any_folder_code_is_compiled_in_the_process_and_one_line_says_so(places, caplog):
    without_a_place_beside_the_source(places)
    shutil.rmtree(places / "temporary")
    (places / "temporary").write_text("")
    assert not found_on_disk(twice(places))
    assert not found_on_disk(twice(places))
    assert len(caplog.records) == 1 and "compiled in every process" in caplog.text


def test_a_folder_that_the_user_names_is_used(places, monkeypatch):
    without_a_place_beside_the_source(places)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(places / "named"))
    assert not found_on_disk(twice(places))
    assert list((places / "named").rglob("*.nbc"))
    assert found_on_disk(twice(places))


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_file_is_compiled_again_and_replaced(places, suffix, kind):
    assert not found_on_disk(twice(places))
    (path,) = (places / "__pycache__").glob(f"*.{suffix}")
    DAMAGE[kind](path)
    found_on_disk(twice(places))
    assert found_on_disk(twice(places))


def test_code_for_other_arguments_under_this_name_is_not_run(places):
    """As where two processes compile for the first time at once, and each takes the first name."""
    function = twice(places)
    assert function(2.0) == 4.0 and function(2) == 4
    first, second = sorted((places / "__pycache__").glob("*.nbc"))
    shutil.copy(second, first)
    again = twice(places)
    assert again(2.5) == 5.0 and not again.stats.cache_hits
    assert found_on_disk(twice(places))


def test_a_full_disk_costs_the_cache_and_nothing_else(places, caplog):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    function = twice(places)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        value = function(2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert value == 4.0 and "File too large" in caplog.text
    assert not found_on_disk(twice(places))
    assert found_on_disk(twice(places))


def test_the_package_is_imported_and_computes_where_nothing_can_be_written(tmp_path):
    package = tmp_path / "deconvnet"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(deconvnet.__file__).parent, package, ignore=ignored)
    for folder in [package, *filter(Path.is_dir, list(package.rglob("*")))]:
        (folder / "__pycache__").write_text("")
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), os.devnull)
    env = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA")}
    env |= nowhere | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    code = (
        "import deconvnet, numpy as np; from deconvnet.sparse_coding import kernels;"
        "print(deconvnet.__file__, kernels.strongest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(package))


def test_the_first_call_that_compiles_says_so_and_no_other(places, caplog, monkeypatch):
    monkeypatch.setattr(compiling.compilation, "logged", False)
    caplog.set_level("INFO")
    function = twice(places)
    function(2.0)
    function(2)  # for other arguments it is compiled again
    assert caplog.text.count("compiling loops, once") == 1


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_rests_during_a_compilation_only(
    places, monkeypatch, fails, collecting
):
    function = twice(places)
    compiler, states = function._compiler.compile, []

    def compile(*arguments):
        states.append(gc.isenabled())
        if fails:
            raise NotImplementedError
        return compiler(*arguments)

    monkeypatch.setattr(function._compiler, "compile", compile)
    was_collecting = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        with pytest.raises(NotImplementedError) if fails else nullcontext():
            function(2.0)
        states.append(gc.isenabled())
    finally:
        (gc.enable if was_collecting else gc.disable)()
    assert states == [False, collecting]


def test_the_garbage_collector_rests_while_code_is_loaded_from_a_file(places, monkeypatch):
    assert not found_on_disk(twice(places))
    load, states = compiling._DigestCache.load_overload, []

    def recording(*arguments):
        states.append(gc.isenabled())
        return load(*arguments)

    monkeypatch.setattr(compiling._DigestCache, "load_overload", recording)
    was_collecting = gc.isenabled()
    gc.enable()
    try:
        assert found_on_disk(twice(places))
        states.append(gc.isenabled())
    finally:
        (gc.enable if was_collecting else gc.disable)()
    assert states == [False, True]
