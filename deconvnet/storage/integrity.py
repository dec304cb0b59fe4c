"""What every file that is loaded must pass: it can be read, and its version is known."""

from __future__ import annotations

from pathlib import Path

from deconvnet.storage import ownership


class InvalidFileError(ValueError):
    """A file that is damaged, of another format or unsafe to load."""


def read_file(path: Path) -> bytes:
    # Read once and as a whole, so that what is verified is what is loaded.
    try:
        return ownership.read_regular_file(path)
    except ValueError as error:
        raise InvalidFileError(f"{error}; choose a file to read") from error
    except OSError as error:
        raise InvalidFileError(f"{path}: {error.strerror}; choose a file to read") from error


def check_version(path: Path, found: object, known: object) -> None:
    if found != known:
        raise InvalidFileError(
            f"{path}: format version {found!r}, but this deconvnet reads {known!r}; "
            "use the deconvnet that wrote it"
        )
