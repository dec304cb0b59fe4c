"""Image files: which ones a folder or a setting names, and the names of files made from them."""

from __future__ import annotations

import logging
import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from deconvnet.images.decoding import SUFFIXES, check_file, reason, shown_name, user_path
from deconvnet.storage.ownership import foreign_files

logger = logging.getLogger(__name__)

# Bytes of a list that are read first, to check that it is a text file.
TEXT_PROBE = 1 << 20


def find_images(path: str | Path, *, key: str = "data.path") -> list[Path]:
    """The image files of a folder and its subfolders, sorted; SUFFIXES lists their endings.

    Hidden files and folders are skipped. Links to folders are followed, but no folder is entered
    twice. Pictures that this package made are skipped too, since results may lie among the images
    they were made from; a folder that contains nothing else is read in full.
    key: the setting that names the folder, for messages.
    """
    files = files_in(path, SUFFIXES, key)
    if not files:
        raise ValueError(f"{assignment(path, key)}: no image in this folder ({' '.join(SUFFIXES)})")
    images = foreign_files(files) or files
    if len(images) < len(files):
        count = len(files) - len(images)
        logger.warning("%s: skipped %d pictures that deconvnet made", assignment(path, key), count)
    return images


def image_files(images: object, *, key: str = "images") -> list[Path]:
    """The image files that a setting names: a file, those of a folder, those that a text file
    (.txt) names, or a list of these.

    key: the setting, for messages.
    """
    if isinstance(images, Sequence) and not isinstance(images, str):
        return [path for item in images for path in image_files(item, key=key)]
    path = user_path(str(images))
    if os.path.isdir(path):
        return find_images(path, key=key)
    if path.suffix.lower() == ".txt":
        return [image for _, image in listed_images(path, key=key)]
    return [path]


def listed_images(path: str | Path, *, key: str = "data.path") -> list[tuple[str, Path]]:
    """The lines of a text file that are not empty, and the image that each names, relative to the
    folder of the file; "#" starts a comment line.
    """
    file = user_path(path)
    lines = re.split(r"\r\n|\r|\n", _read_text(file, assignment(path, key)))
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise ValueError(f"{assignment(path, key)}: this list names no image")
    images = []
    for line in lines:
        # Spaces around a name belong to it only if there is such a file.
        if line != line.strip() and not os.path.lexists(file.parent / user_path(line)):
            line = line.strip()
        images.append((line, file.parent / user_path(line)))
    return images


def _read_text(file: Path, setting: str) -> str:
    """The content of a list; bytes that are not UTF-8 are kept, since file names may have them."""
    try:
        check_file(file)
        with open(file, "rb") as stream:
            data = stream.read(TEXT_PROBE)
            if b"\0" in data:
                raise ValueError("it has zero bytes, which no text in UTF-8 has")
            data += stream.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}: not a readable text file: {reason(error)}") from error
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def files_in(path: str | Path, suffixes: tuple[str, ...], key: str = "data.path") -> list[Path]:
    """The files of a folder and its subfolders with these endings, sorted; see `find_images`."""
    folder = user_path(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
    except FileNotFoundError:
        raise ValueError(f"{assignment(path, key)}: no such folder") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{assignment(path, key)}: cannot be read: {reason(error)}") from error
    if not is_folder:
        hint = ""
        if key == "data.path":
            hint = (
                "; data.source=shards reads .tar files, data.source=list reads the files that a "
                "text file names"
            )
        raise ValueError(f"{assignment(path, key)}: not a folder{hint}")

    def stop(error: OSError) -> None:
        raise ValueError(
            f"{assignment(path, key)}: {shown_name(error.filename)} cannot be listed: "
            f"{error.strerror}"
        )

    files, visited = [], set()
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        try:
            identity = os.stat(parent)
        except OSError as error:
            stop(error)
        if (identity.st_dev, identity.st_ino) in visited:
            folders.clear()
            continue
        visited.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in names if name.lower().endswith(suffixes))
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def assignment(path: str | Path, key: str = "data.path") -> str:
    """A setting and its value as a user would type them, for messages."""
    return f"{key}={shown_name(path)}"


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A distinct name for the pictures of each file: its stem, numbered if another file has it.

    Names differ even if case and the composition of accents are ignored, as on the file systems of
    Windows and macOS. They do not depend on the order of the paths.
    """
    order = sorted(range(len(paths)), key=lambda n: str(paths[n]))
    stems = [shown_name(path.stem) for path in paths]
    names: dict[int, str] = {}
    taken: set[str] = set()
    # Assign all free stems first, so that no numbered name takes one.
    for n in order:
        if _folded(stems[n]) not in taken:
            taken.add(_folded(stems[n]))
            names[n] = stems[n]
    counts: dict[str, int] = {}
    for n in order:
        if n in names:
            continue
        count = counts.get(_folded(stems[n]), 1) + 1
        while _folded(f"{stems[n]}-{count}") in taken:
            count += 1
        counts[_folded(stems[n])] = count
        names[n] = f"{stems[n]}-{count}"
        taken.add(_folded(names[n]))
    return [names[n] for n in range(len(paths))]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
