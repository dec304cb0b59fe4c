"""Checks of every file that is loaded: it is readable, and its format version is supported."""

from __future__ import annotations

from pathlib import Path

from deconvnet.storage import ownership


class InvalidFileError(ValueError):
    """A file that is damaged, of another format, or unsafe to load."""


def read_file(path: Path) -> bytes:
    """The content of a file; InvalidFileError if it cannot be read."""
    # Read once, so that the verified bytes are the ones that are loaded.
    try:
        return ownership.read_regular_file(path)
    except ValueError as error:
        raise InvalidFileError(f"{error}; choose a file to read") from error
    except OSError as error:
        raise InvalidFileError(f"{path}: {error.strerror}; choose a file to read") from error


def check_version(path: Path, version: object, supported: object) -> None:
    """Raise InvalidFileError unless the file has the supported version of its format."""
    if version != supported:
        raise InvalidFileError(
            f"{path}: format version {version!r}, but this deconvnet reads {supported!r}; "
            "use the deconvnet that wrote it"
        )
