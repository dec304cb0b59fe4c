"""Images to learn from without reading any, and a fast way to run the scripts as a user does."""

import contextlib
import errno
import gc
import json
import logging
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

# No test cuts the power, so none waits until what was written is on the disk.
os.fsync = os.fstat

# What is imported is millions of objects that stay: the garbage collector need not visit them until
# all tests are collected, and then seldom.
gc.disable()
gc.set_threshold(50_000, 20, 100)

SERVER = Path(__file__).with_name("fork_server.py")


def pytest_collection_finish(session):
    """Start the server early, and keep the garbage collector from scanning what lives on."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "fork") and any("start" in item.fixturenames for item in session.items):
        session.config.fork_server = fork_server()
    # At each stage of a test pytest attaches its handlers to all loggers that do not propagate:
    # fifty of torch, which is a quarter of the time of a small test.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True
    gc.freeze()
    gc.enable()


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
                [sys.executable, str(SERVER), str(listener.fileno())],
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
