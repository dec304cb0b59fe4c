"""The launch of a command: Hydra reads its settings, and errors are reported in one line."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra

from deconvnet.cli.arguments import for_hydra
from deconvnet.cli.config_files import check_names, read_files_as_written
from deconvnet.cli.errors import WANTS_TRACEBACK, end_of_pipe, explain
from deconvnet.cli.help import full_page
from deconvnet.cli.image_keys import check_image_keys
from deconvnet.cli.printed_commands import remember
from deconvnet.cli.read_settings import register, register_help
from deconvnet.cli.settings import SCHEMAS

PACKAGE = Path(__file__).resolve().parents[1]
# In an installation configs/ is part of the package; in a checkout it is next to it.
CONFIGS = next(p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir())

# The settings of these commands have a key `model`, which the folder of models in configs/ would
# shadow.
OWN_FOLDER = ("visualize", "occlusion", "correspondence")


def launch(command: str, call: tuple[str, ...]) -> None:
    """Run a command, such as "train-cnn", with the settings in sys.argv.

    call: how the user typed it, for the commands that it prints.
    """
    name = command.replace("-", "_")
    module = importlib.import_module(f"deconvnet.cli.{name}")
    register()
    if _asks_for_all(sys.argv):
        register_help(full_page)
    folder = PACKAGE / "cli" if name in OWN_FOLDER else CONFIGS
    read_settings = hydra.main(version_base="1.3", config_path=str(folder), config_name=name)
    run(read_settings(module.main), SCHEMAS[name], call)


def _asks_for_all(arguments: list[str]) -> bool:
    """Whether `--help all` is among the arguments, of which Hydra knows --help alone."""
    wanted = "all" in arguments and not {"--help", "-h"}.isdisjoint(arguments)
    if wanted:
        arguments.remove("all")
    return wanted


def run(main: Callable[[], None], schema: type, call: tuple[str, ...]) -> None:
    """Run a Hydra main so that a user's mistake gives a one-line error and exit code 1.

    schema: the dataclass of its settings. Ctrl-C ends it with 130, and a closed pipe, as in
    `| head`, with 141, as in the shell. HYDRA_FULL_ERROR=1 in the environment shows tracebacks.
    """
    # Hydra then raises instead of printing its own traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.raiseExceptions = WANTS_TRACEBACK
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # File names may have characters that the terminal cannot show.
        stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        # Ctrl-C was silent while libraries were loaded; from here on it raises KeyboardInterrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    rank = int(os.environ.get("RANK", 0))
    try:
        with _one_line_warnings(silent=rank > 0):
            remember(call, sys.argv[1:])
            check_image_keys(sys.argv[1:], schema)
            sys.argv[1:] = for_hydra(sys.argv[1:], schema)
            check_names(sys.argv[1:], CONFIGS)
            read_files_as_written(schema)
            if rank > 0:
                # Under torchrun rank 0 writes and logs; the other ranks only warn.
                sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
                sys.argv += ["hydra.verbose=false"]
                logging.disable(logging.INFO)
            main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _finish("stopped", 130)
    except BrokenPipeError:
        end_of_pipe()
    except Exception as error:
        if WANTS_TRACEBACK or not (message := explain(error, schema)):
            raise
        _finish(message, 1)


@contextmanager
def _one_line_warnings(silent: bool) -> Iterator[None]:
    """Show warnings about renamed settings in one line, without source code, in a `with` block."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_in_one_line(message: Warning, category: type[Warning], *location: Any) -> None:
            if category is not FutureWarning:
                show(message, category, *location)
            elif not silent:
                print(f"warning: {message}", file=sys.stderr)

        warnings.showwarning = show_in_one_line
        yield


def _finish(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)
