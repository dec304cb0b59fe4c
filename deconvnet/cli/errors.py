"""One-line error messages of commands, with the exit codes that a shell expects."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from deconvnet.cli.hydra_errors import explain_refusal
from deconvnet.cli.setting_keys import has

# Settings that lower the memory of a command, and the messages of libraries that run out of it.
LARGE = ("chunk", "batch", "memory", "data.size", "data.max_images", "max_images", "count")
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "bad allocation")
# Read before `launch` sets this variable.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def explain(error: Exception, schema: type) -> str | None:
    """A one-line message with the remedy for an error; None if it is a bug of this package."""
    if is_memory(error):
        keys = [key for key in LARGE if has(schema, key)]
        lower = f"lower {' or '.join(f'{key}=' for key in keys)}" if keys else "use smaller images"
        details = one_line(error)[:200]
        return f"error: out of memory: {lower}" + (f" ({details})" if details else "")
    if isinstance(error, HydraException | OmegaConfBaseException | OSError | ValueError):
        return f"configuration error: {explain_refusal(error, schema) or one_line(error)}"
    inside = ("hydra", "omegaconf", "yaml", "antlr4")
    if isinstance(error, RecursionError) and raised_in(error, inside):
        return "configuration error: nested too deeply, or with a reference to itself"
    # Arguments that Hydra does not handle, such as hydra.launcher._target_=x.
    unforeseen = (TypeError, AttributeError, AssertionError, RuntimeError, ImportError)
    if isinstance(error, unforeseen) and raised_in(error, inside):
        what = f"({one_line(error)})"
        return f"configuration error: Hydra cannot make sense of the arguments {what}"
    return None


def is_memory(error: Exception) -> bool:
    """Whether an error means that a device is out of memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in NO_MEMORY)


def raised_in(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether an error comes from code of one of these packages."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in packages


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with one line and exit code 1 if an error of these types is raised."""
    try:
        yield
    except kinds as error:
        if isinstance(error, BrokenPipeError):
            end_of_pipe()
        # `run` in launch.py explains these.
        if WANTS_TRACEBACK or is_memory(error):
            raise
        raise SystemExit(f"error: {' '.join(str(error).splitlines())}") from None


def end_of_pipe() -> NoReturn:
    """End the program silently because nobody reads its output any more, as in `| head`."""
    # Python flushes the remaining output at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(141) from None


@contextmanager
def interruptible(message: str = "finished results are kept") -> Iterator[None]:
    """End the program with one line and exit code 130 if Ctrl-C stops it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {message}", file=sys.stderr)
        raise SystemExit(130) from None


def one_line(error: BaseException | None) -> str:
    """The message of an error and of its causes: Hydra often gives the reason only there."""
    messages = []
    while error is not None:
        lines = [line.strip() for line in str(error).splitlines()]
        informative = (
            line for line in lines if line and not line.startswith(("object_", "reference_"))
        )
        message = " ".join(informative)
        if message not in "; ".join(messages):
            messages.append(message)
        error = error.__cause__
    return "; ".join(messages)
