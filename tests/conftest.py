"""Images to learn from without reading any, and a fast way to run the scripts as a user does."""

import contextlib
import errno
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
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
import atexit, contextlib, copy, gc, importlib, json, os, runpy, selectors, signal, socket, sys
import threading, weakref
import numba, numpy as np
import PIL.Image, skimage.data, skimage.transform
import sklearn.cluster, sklearn.datasets, sklearn.linear_model, sklearn.svm
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
import google_crc32c, imageio, resource
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
# Clients send orders, each a line: to fork, which is answered by the child, or to wait for a child,
# by its exit code. The server ends with its last client.
listener = socket.socket(fileno=int(sys.argv[1]))
ended, end = socket.socketpair()  # a byte arrives whenever a child ends
for one in (ended, end):
    one.setblocking(False)
signal.signal(signal.SIGCHLD, lambda *_: None)
signal.set_wakeup_fd(end.fileno())
sources = selectors.DefaultSelector()
sources.register(listener, selectors.EVENT_READ)
sources.register(ended, selectors.EVENT_READ)
awaited = {}  # children, and who waits for each

def answer(client, number):
    with contextlib.suppress(OSError):  # of a client that was killed
        client.sendall(b"%d\\n" % number)

def next_order():
    while True:
        for key, _ in sources.select():
            client = key.fileobj
            if client is listener:
                client, _ = listener.accept()
                sources.register(client, selectors.EVENT_READ, client.makefile("r"))
            elif client is ended:
                ended.recv(4096)
            elif not (line := key.data.readline()):
                sources.unregister(client)
                if len(sources.get_map()) == 2:
                    sys.exit(os.unlink(listener.getsockname()))
            elif "wait" in (order := json.loads(line)):
                awaited[order["wait"]] = client
            else:
                child = os.fork()
                if child == 0:
                    return order
                answer(client, child)
        for child in list(awaited):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                answer(awaited.pop(child), os.waitstatus_to_exitcode(status))

order = next_order()
signal.set_wakeup_fd(-1)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
os.environ.update(order["env"])
for path, value in order["returning"].items():
    module, name = path.rsplit(".", 1)
    function = lambda *_, value=value: copy.copy(value)
    setattr(importlib.import_module(module), name, function)

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


def pytest_collection_finish(session):
    """Start the server early, and keep the garbage collector from scanning what lives on."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "fork") and any("start" in item.fixturenames for item in session.items):
        session.config.fork_server = fork_server()
    gc.collect()
    gc.freeze()


SERVERS = []  # that this process started


def fork_server():
    """A connection to the server, which all processes of this session share."""
    name = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)[:12]
    path = os.path.join(tempfile.gettempdir(), f"deconvnet-tests-{name}")
    with contextlib.suppress(FileExistsError), socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise FileExistsError from error
        listener.listen()
        # The server, which removes the path when its last client leaves.
        SERVERS.append(
            subprocess.Popen(
                [sys.executable, "-c", SERVER, str(listener.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )
        )
    connection = socket.socket(socket.AF_UNIX)
    while connection.connect_ex(path) == errno.ECONNREFUSED:  # bound, but not yet listening
        time.sleep(0.01)
    return connection


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
def start(request):
    """start(folder, "train.py", *arguments, **environment): a script that runs in a folder.

    In place of a name it can be the path of another program, or "torchrun", which starts a program
    in several processes. pictures=False: as `helpers.no_pictures`.
    """
    from helpers import NO_PICTURES

    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    connection = request.config.fork_server
    answers = connection.makefile("r")
    count = 0

    def ask(order):
        connection.sendall(json.dumps(order).encode() + b"\n")
        return int(answers.readline())

    def run(folder, name, *arguments, pictures=True, **environment):
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
            "returning": {} if pictures else NO_PICTURES,
        }
        pid = ask(order)
        return Running(pid, lambda: Result(ask({"wait": pid}), out.read_text(), err.read_text()))

    return run


@pytest.fixture(scope="session")
def script(start):
    """script(folder, "train.py", *arguments): the result of a script that was run in a folder."""
    return lambda *arguments, **options: start(*arguments, **options).wait()


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
