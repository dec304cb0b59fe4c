"""One-line messages for errors of the user's own network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deconvnet.cli.errors import WANTS_TRACEBACK, is_memory
from deconvnet.visualization.models.model_error import ModelError


@contextmanager
def one_line_model_errors(model: str) -> Iterator[None]:
    """End the program with one line and exit code 1 if the network of this name raises an error."""
    try:
        yield
    except ModelError as error:
        if WANTS_TRACEBACK:
            raise
        if is_memory(error.__cause__):  # `run` in launch.py says what to lower
            raise error.__cause__ from None
        name = "" if str(error).startswith("model=") else f"model={model}: "
        raise SystemExit(
            f"error: {name}{error}; to see the traceback, set HYDRA_FULL_ERROR=1 in the environment"
        ) from None
