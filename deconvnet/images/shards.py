"""Where the images of a tar file lie in it.

A shard is scanned once, header by header; images can then be read in any order. Nothing is left out
silently: Python's tarfile stops at a header that it does not understand, and GNU tar at the mark
for the end of the archive. Here the first is an error that names the place, and archives that were
joined (`cat a.tar b.tar`) are read one after the other. As with `tar x`, a member that comes again
replaces the first, and links to other members have their content. What `find_images` leaves out in
a folder is left out here: hidden names, and what is no image by its name.
"""

from __future__ import annotations

import logging
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from deconvnet.images.decoding import SUFFIXES, Content, check_file, reason, shown_name

BLOCK = tarfile.BLOCKSIZE
# Bytes that GNU tar, and Python, fill up archives to a multiple of.
RECORD = tarfile.RECORDSIZE
CHUNK = 1 << 20

NO_SHARD = "is no readable, uncompressed .tar file"

# Headers that say something of the member after them, as its name if that is long; how many of them
# there may be in a row, and of how many bytes, for they are read into memory.
EXTENDED = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE),
    tarfile.SOLARIS_XHDTYPE,
)
MOST_EXTENDED, LONGEST_EXTENDED = 16, 1 << 20

LINKS = 40  # that may lead to one another, as Linux allows
HOLES = 1 << 30  # bytes that a sparse member may have beyond those that are stored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """An image of a shard: its name there, and its bytes, or why it has none."""

    name: str
    content: Content | None
    problem: str = ""


@dataclass(frozen=True)
class Damage:
    """A place in a shard from which on something cannot be read, in one line."""

    message: str


def read_index(shard: Path, name: str) -> Iterator[Member | Damage]:
    """The images of an uncompressed tar file in their order, and the places that are damaged.

    name: of the shard, for messages. After a damaged place, reading continues at the next intact
    header. OSError where a disk fails.
    """
    found: dict[str, Content | str | None] = {}
    links: dict[str, str] = {}
    images: list[tuple[str, str] | Damage] = []
    repeated = 0
    for entry in _walk(shard):
        if isinstance(entry, Damage):
            images.append(entry)
            continue
        path = posixpath.normpath(entry.name).lstrip("/")
        repeated += path in found or path in links
        found.pop(path, None)
        links.pop(path, None)
        if entry.islnk():
            links[path] = posixpath.normpath(entry.linkname).lstrip("/")
        elif entry.issym():
            links[path] = posixpath.normpath(
                posixpath.join(posixpath.dirname(path), entry.linkname)
            ).lstrip("/")
        elif entry.isfile():
            found[path] = _content(shard, f"{name}/{entry.name}", entry)
        elif not entry.isdir():
            found[path] = "a device or a pipe, not an image"
        if not entry.isdir() and _is_image(path):
            images.append((path, entry.name))
    if repeated:
        logger.warning("%s: %d names occur more than once; the last of each counts", name, repeated)
    yield from _resolved(images, found, links, name)


def _resolved(
    images: list[tuple[str, str] | Damage],
    found: dict[str, Content | str | None],
    links: dict[str, str],
    name: str,
) -> Iterator[Member | Damage]:
    """The images in their order, of those of one name the last, with what their links lead to."""
    last = {image[0]: n for n, image in enumerate(images) if not isinstance(image, Damage)}
    for n, image in enumerate(images):
        if isinstance(image, Damage):
            yield image
        elif last[image[0]] == n:
            path, stored = image
            target, where = path, f"{name}/{stored}"
            for _ in range(LINKS):
                if target not in links:
                    break
                target = links[target]
            content = found.get(target)
            if content is None:
                aim = shown_name(links.get(path, target))
                content = f"a link to {aim}, which is no file in {shown_name(name)}"
            if isinstance(content, str):
                yield Member(stored, None, content)
            else:
                yield Member(stored, content if target == path else replace(content, name=where))


def _is_image(path: str) -> bool:
    hidden = any(part.startswith(".") and part != ".." for part in path.split("/"))
    return path.lower().endswith(SUFFIXES) and not hidden


def _content(shard: Path, name: str, member: tarfile.TarInfo) -> Content | str:
    """The bytes of a member, or what is wrong with where it says they are."""
    if not member.issparse():
        parts = ((0, member.offset_data, member.size),)
        return Content(shard, name, parts, member.size)
    parts, place, stored = [], 0, 0
    for offset, length in member.sparse:
        if length == 0:
            continue
        if length < 0 or offset < place or offset + length > member.size:
            return "a sparse file whose parts overlap or lie outside it"
        parts.append((offset, member.offset_data + stored, length))
        place, stored = offset + length, stored + length
    if member.size - stored > HOLES:
        return f"a sparse file of {member.size} bytes, {stored} of them stored"
    return Content(shard, name, tuple(parts), member.size)


class _Archive(tarfile.TarFile):
    """A tar file whose headers are asked for by their places, so that it ends nowhere by itself."""

    def next(self) -> None:
        """Nothing, to which tarfile would add its own notion of where an archive ends."""

    def member_at(self, place: int) -> tuple[tarfile.TarInfo, int]:
        """The member whose header begins there, and where the next begins; TarError."""
        self._check_extended(place)
        self.offset = place
        self.fileobj.seek(place)
        member = self.tarinfo.fromtarfile(self)
        if member.size < 0 or self.offset <= place:
            raise tarfile.ReadError("a size below zero")
        return member, self.offset

    def _check_extended(self, place: int) -> None:
        for _ in range(MOST_EXTENDED):
            self.fileobj.seek(place)
            block = self.fileobj.read(BLOCK)
            # The byte of the type, for most headers need no look at the rest here.
            if block[156:157] not in EXTENDED:
                return
            header = tarfile.TarInfo.frombuf(block, self.encoding, self.errors)
            if not 0 <= header.size <= LONGEST_EXTENDED:
                raise tarfile.ReadError(f"an extended header of {header.size} bytes")
            place += BLOCK + -(-header.size // BLOCK) * BLOCK
        raise tarfile.ReadError(f"more than {MOST_EXTENDED} extended headers in a row")


def _walk(shard: Path) -> Iterator[tarfile.TarInfo | Damage]:
    """All members of a shard in their order, and the damaged places between them."""
    try:
        size = check_file(shard)
        if size == 0:
            raise ValueError("the file is empty")
        os.close(os.open(shard, os.O_RDONLY))
    except (OSError, ValueError) as error:
        yield Damage(f"{NO_SHARD}: {reason(error)}")
        return
    with (
        open(shard, "rb") as file,
        _Archive(fileobj=file, encoding="utf-8", errors="surrogateescape") as archive,
    ):
        start = place = 0
        before = ""
        while True:
            zeros = _zeros(file, place, size)
            if place + zeros >= size:
                if zeros == 0:
                    yield Damage(
                        f"ends at byte {size}{before} without an end-of-archive mark: it may be "
                        "truncated"
                    )
                return
            if zeros:
                end = place
                place += zeros
                joined = (place - start) % RECORD == 0 or zeros == 2 * BLOCK
                if joined and _is_header(archive, file, place):
                    logger.warning(
                        "%s: another archive follows the end of the first, at byte %d; both are "
                        "read",
                        *(shown_name(shard), place),
                    )
                    start = place
                else:
                    yield Damage(
                        f"is damaged at byte {end}{before}: zeros where a header should be, and "
                        f"other bytes after them, at byte {place}"
                    )
                    place = _next_header(archive, file, place, size)
                    if place is None:
                        return
            try:
                member, following = archive.member_at(place)
            except Exception as error:  # any kind: tarfile is not made for damaged files
                what = f"is damaged at byte {place}{before}"
                if place == 0:
                    what = NO_SHARD
                yield Damage(f"{what}: {reason(error)}")
                place = _next_header(archive, file, place + BLOCK, size)
                if place is None:
                    return
                continue
            before = f", after {shown_name(member.name)}"
            yield member
            if following > size:
                yield Damage(
                    f"ends {following - size} bytes too early, inside {shown_name(member.name)}"
                )
                place = _next_header(archive, file, member.offset_data, size)
                if place is None:
                    return
                continue
            place = following


def _zeros(file, place: int, size: int) -> int:
    """How many bytes of whole blocks of zeros, or of a part of one at the end, begin there."""
    file.seek(place)
    if file.read(BLOCK).strip(b"\0"):
        return 0
    file.seek(place)
    done = place
    while chunk := file.read(CHUNK):
        if chunk.count(0) == len(chunk):
            done += len(chunk)
            continue
        first = len(chunk) - len(chunk.lstrip(b"\0"))
        done += first // BLOCK * BLOCK
        break
    return done - place


def _next_header(archive: _Archive, file, place: int, size: int) -> int | None:
    """Where the next sound header begins, at this place or behind; None if nowhere."""
    while place < size:
        file.seek(place)
        chunk = file.read(CHUNK)
        # Only POSIX and GNU headers, which contain a word that is fast to find.
        begin = chunk.find(b"ustar")
        while begin >= 0:
            block, within = divmod(begin, BLOCK)
            if within == 257 and _is_header(archive, file, place + block * BLOCK):
                return place + block * BLOCK
            begin = chunk.find(b"ustar", begin + 1)
        place += CHUNK
    return None


def _is_header(archive: _Archive, file, place: int) -> bool:
    file.seek(place)
    try:
        tarfile.TarInfo.frombuf(file.read(BLOCK), archive.encoding, archive.errors)
    except tarfile.TarError:
        return False
    return True
