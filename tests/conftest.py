"""Images to learn from without reading any, and a fast way to run the scripts as a user does."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# The process that only hands out tests to others does not import torch, which takes seconds.

# All problems here are tiny: threads that wait for each other cost ten times what they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Importing torch takes seconds, so it happens once: each run is a fork of this process, with its
# own arguments, working folder and standard streams. Modules that commands import lazily are loaded
# too.
SERVER = """
import atexit, contextlib, gc, importlib, json, os, runpy, sys, threading, weakref
import numba, numpy as np
import PIL.Image, skimage.data, skimage.transform
import sklearn.cluster, sklearn.datasets, sklearn.linear_model, sklearn.svm
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
import tensorboard.plugins.hparams.summary_v2, torch.utils.tensorboard
import torch._dynamo, torch.fx.experimental.symbolic_shapes  # as every backward pass does
from deconvnet.cli import launch
from deconvnet.cli.commands import COMMANDS, run
with contextlib.suppress(ImportError):  # of newer versions of Hydra
    importlib.import_module("hydra._internal.logging_config")
for command in COMMANDS:
    importlib.import_module("deconvnet.cli." + command.replace("-", "_"))
PIL.Image.init()
numba.njit(lambda x: x[0])(np.ones(1))  # the first compilation initialises the compiler

# Work that is the same for all runs happens here: the schemas are registered with Hydra, and the
# YAML files of this package and of Hydra are read. Each run takes a file's content from here once.
Plugins.instance()
launch.register()
launch.register = lambda: None
configs, requests = {}, []
original_read_files = launch.read_files_as_written

def read_files_as_written(schema):
    original_read_files(schema)
    for kind in ("file", "pkg"):
        source = SourcesRegistry.instance().types[kind]
        if not hasattr(source, "load_config_from_file"):
            source.load_config_from_file = source.load_config

        def load_config(self, config_path):
            key = schema, self.path, config_path
            requests.append((key, self))
            return configs.pop(key, None) or self.load_config_from_file(config_path)

        source.load_config = load_config

launch.read_files_as_written = read_files_as_written
# Composing also loads the grammar of the arguments and the plugins.
for command in COMMANDS:
    name = command.replace("-", "_")
    read_files_as_written(launch.SCHEMAS[name])
    folder = launch.PACKAGE / "cli" if name in launch.OWN_FOLDER else launch.CONFIGS
    with initialize_config_dir(str(folder), version_base="1.3"):
        compose(name, return_hydra_config=True)
        if name in ("train", "train_cnn"):
            compose(name, ["data=folder"], return_hydra_config=True)
for (schema, path, name), source in requests:
    read_files_as_written(schema)
    configs[schema, path, name] = source.load_config_from_file(name)

# For help pages, Hydra lists all groups of settings twice: its own, which none of them shows, too.
format_groups = Hydra.format_config_groups
Hydra.format_config_groups = lambda self, of: "" if of("hydra") else format_groups(self, of)

# What torchrun does with its arguments, but its workers are forks.
def torchrun(arguments):
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch
    config, _, (_, path, *rest) = run.config_from_args(run.parse_args(arguments))
    config.start_method = "fork"
    elastic_launch(config, program)(path, *rest)

def program(path, *arguments):
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")

# At exit there is no need to unload torch's libraries.
for finalizer in list(weakref.finalize._registry):
    finalizer.atexit = False
gc.collect()
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        code = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        print(json.dumps(code), flush=True)
        continue
    child = os.fork()
    if child == 0:
        break
    print(json.dumps(child), flush=True)
else:
    sys.exit()

os.environ.update(order["env"])

for number, name in enumerate(("/dev/null", order["out"], order["err"])):
    os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
os.chdir(order["folder"])
sys.argv = ["deconvnet", *order["arguments"]]
# Hydra composes all settings twice, the first time only to read hydra.mode, which is not set here.
if not any(argument[:1] == "-" or "hydra" in argument for argument in sys.argv[1:]):
    Hydra.get_mode = lambda *_, **__: None
try:
    if order["command"] == "torchrun":
        torchrun(order["arguments"])
    elif order["command"].endswith(".py"):
        program(order["command"], *order["arguments"])
    else:
        run(order["command"], ("deconvnet", order["command"]))
    code = 0
except SystemExit as end:
    code = end.code or 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
# What a Python process does at exit, except unloading all modules, which takes a second.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


def pytest_collection_finish():
    """Keep the garbage collector from scanning modules and tests, which live until the end."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Result:
    """What a user sees of a command that ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Running:
    """A script that was started: its process, and how to wait for its end."""

    pid: int
    wait: Callable[[], Result]


@pytest.fixture(scope="session")
def start():
    """start(folder, "train.py", *arguments, **environment): a script that runs in a folder.

    In place of a name it can be the path of another program, or "torchrun", which starts a program
    in several processes.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    count = 0

    def ask(order):
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def run(folder, name, *arguments, **environment):
        nonlocal count
        count += 1
        out, err = (Path(folder).parent / f".{count}.{kind}" for kind in ("out", "err"))
        order = {
            "command": str(name) if os.path.isabs(name) else Path(name).stem.replace("_", "-"),
            "arguments": list(map(str, arguments)),
            "folder": str(folder),
            "out": str(out),
            "err": str(err),
            "env": {key: str(value) for key, value in environment.items()},
        }
        pid = ask(order)
        return Running(pid, lambda: Result(ask({"wait": pid}), out.read_text(), err.read_text()))

    yield run
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="session")
def script(start):
    """script(folder, "train.py", *arguments): the result of a script that was run in a folder."""
    return lambda *arguments: start(*arguments).wait()


@pytest.fixture(scope="session")
def textures():
    """textures(N, C, H, W): images in [0, 1] with edges and colours, the same for the same seed."""
    import torch

    def make(*shape, seed=0):
        N, C, H, W = shape
        generator = torch.Generator().manual_seed(seed)
        rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        images = torch.full(shape, 0.4)
        for image in images:
            for _ in range(8):  # bars, one over the other, of random place, slope, width and colour
                slope, place, width = torch.rand(3, generator=generator)
                across = rows * (slope * 6.3).sin() + columns * (slope * 6.3).cos()
                inside = (across - place * (H + W) / 2).abs() < 1 + 3 * width
                color = torch.rand(C, generator=generator)
                image[:, inside] = color[:, None]
        noise = torch.randn(shape, generator=generator)
        return (images + 0.02 * noise).clamp(0, 1)

    return make
