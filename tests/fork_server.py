"""python tests/fork_server.py SOCKET: a process in which all is imported, and whose forks are the
commands of tests.

Importing torch takes seconds, so it happens once: each command is a fork of this process, with its
own arguments, working folder and standard streams. Modules that commands import lazily are loaded
too. Clients connect to the listening socket, which this process inherits, and send orders, each a
line of JSON: to fork, which is answered by the child's number, or to wait for a child, which is
answered by its exit code. The server ends with its last client.
"""

import atexit
import contextlib
import copy
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import weakref

import numba
import numpy as np
import PIL.Image
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins

from deconvnet.cli import launch
from deconvnet.cli.commands import COMMANDS, run

LAZY = (
    *("google_crc32c", "imageio", "resource", "skimage.data", "skimage.transform"),
    *("sklearn.cluster", "sklearn.datasets", "sklearn.linear_model", "sklearn.svm"),
    *("tensorboard.plugins.hparams.summary_v2", "torch.utils.tensorboard"),
    *("torch._dynamo", "torch.fx.experimental.symbolic_shapes"),  # as every backward pass does
    *("deconvnet.cli." + command.replace("-", "_") for command in COMMANDS),
)


def main():
    os.fsync = os.fstat  # as in conftest.py
    sys.path[0] = ""  # as for `python -c`: the working folder, not that of the tests
    listener = socket.socket(fileno=int(sys.argv[1]))
    import_everything()
    read_settings_once()
    omit_hydras_own_groups()
    # At exit there is no need to unload torch's libraries.
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # most commands here end before they have made much garbage
    execute(Server(listener).serve())


def import_everything():
    for name in LAZY:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):  # of newer versions of Hydra
        importlib.import_module("hydra._internal.logging_config")
    PIL.Image.init()
    numba.njit(lambda x: x[0])(np.ones(1))  # the first compilation initialises the compiler


def read_settings_once():
    """Register the schemas with Hydra, and read the YAML files of this package and of Hydra.

    Each command takes a file's content from here once.
    """
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


def omit_hydras_own_groups():
    """For help pages, Hydra lists all groups of settings twice: its own, which none shows, too."""
    format_groups = Hydra.format_config_groups
    Hydra.format_config_groups = lambda self, of: "" if of("hydra") else format_groups(self, of)


class Server:
    """Forks and waits as its clients order."""

    def __init__(self, listener):
        self.listener = listener
        self.ended, end = socket.socketpair()  # a byte arrives whenever a child ends
        for one in (self.ended, end):
            one.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.end = end
        signal.set_wakeup_fd(end.fileno())
        self.sources = selectors.DefaultSelector()
        self.sources.register(listener, selectors.EVENT_READ)
        self.sources.register(self.ended, selectors.EVENT_READ)
        self.awaited = {}  # children, and who waits for each

    def serve(self):
        """The order that this process, a child, is to execute; the server itself never returns."""
        while True:
            for key, _ in self.sources.select():
                if key.fileobj is self.listener:
                    client, _ = self.listener.accept()
                    self.sources.register(client, selectors.EVENT_READ, client.makefile("r"))
                elif key.fileobj is self.ended:
                    self.ended.recv(4096)
                elif order := self.order_of(key.fileobj, key.data):
                    return order
            self.answer_who_waits()

    def order_of(self, client, lines):
        """In a child, the order to execute; in the server None."""
        if not (line := lines.readline()):
            self.sources.unregister(client)
            if len(self.sources.get_map()) == 2:
                sys.exit(os.unlink(self.listener.getsockname()))
            return None
        order = json.loads(line)
        if "wait" in order:
            self.awaited[order["wait"]] = client
            return None
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return order
        answer(client, child)
        return None

    def answer_who_waits(self):
        for child in list(self.awaited):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                answer(self.awaited.pop(child), os.waitstatus_to_exitcode(status))


def answer(client, number):
    with contextlib.suppress(OSError):  # of a client that was killed
        client.sendall(b"%d\n" % number)


def execute(order):
    """Be the command of an order, and end as it does."""
    os.environ.update(order["env"])
    for path, value in order["returning"].items():
        module, name = path.rsplit(".", 1)
        setattr(importlib.import_module(module), name, lambda *_, value=value: copy.copy(value))
    for number, name in enumerate(("/dev/null", order["out"], order["err"])):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    os.chdir(order["folder"])
    sys.argv = ["deconvnet", *order["arguments"]]
    # Hydra composes all settings twice, the first time to read hydra.mode, which is not set here.
    if not any(argument[:1] == "-" or "hydra" in argument for argument in sys.argv[1:]):
        Hydra.get_mode = lambda *_, **__: None
    try:
        start(order["command"], order["arguments"])
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


def start(command, arguments):
    if command == "torchrun":
        torchrun(arguments)
    elif command.endswith(".py"):
        program(command, *arguments)
    else:
        run(command, ("deconvnet", command))


def torchrun(arguments):
    """What torchrun does with its arguments, but its workers are forks."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    config, _, (_, path, *rest) = run.config_from_args(run.parse_args(arguments))
    config.start_method = "fork"
    elastic_launch(config, program)(path, *rest)


def program(path, *arguments):
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
