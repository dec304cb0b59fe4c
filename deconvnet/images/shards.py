"""The index of a tar shard: the positions of its images in the file.

A shard is scanned once, header by header; its images can then be read in any order. Nothing is
skipped silently. Python's tarfile stops at a header that it does not understand, and GNU tar at the
end-of-archive mark; here the former is reported with its position, and concatenated archives
(`cat a.tar b.tar`) are all read. As with `tar x`, a later member of the same name replaces an
earlier one, and links to other members have their content. As in `find_images`, hidden names and
names that are not those of images are skipped.
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
# GNU tar and Python pad archives to a multiple of this many bytes.
RECORD = tarfile.RECORDSIZE
CHUNK = 1 << 20  # bytes read at a time

NOT_A_SHARD = "is not a readable, uncompressed .tar file"

# Extended headers, which describe the member that follows, such as a long name. They are read into
# memory, so their number in a row and their size in bytes are limited.
EXTENDED = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE),
    tarfile.SOLARIS_XHDTYPE,
)
MAX_EXTENDED, MAX_EXTENDED_SIZE = 16, 1 << 20

MAX_LINKS = 40  # in a chain of links, as in Linux
MAX_HOLES = 1 << 30  # bytes of a sparse member that are not stored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """An image of a shard: its name there and its bytes, or the problem with them."""

    name: str
    content: Content | None
    problem: str = ""


@dataclass(frozen=True)
class Damage:
    """A damaged part of a shard, described in one line."""

    message: str


def read_index(shard: Path, name: str) -> Iterator[Member | Damage]:
    """The images of an uncompressed tar file in order, and its damaged parts.

    name: of the shard, for messages. After a damaged part, reading continues at the next valid
    header. Raises OSError if the disk fails.
    """
    contents: dict[str, Content | str | None] = {}
    links: dict[str, str] = {}
    images: list[tuple[str, str] | Damage] = []
    repeated = 0
    for entry in _walk(shard):
        if isinstance(entry, Damage):
            images.append(entry)
            continue
        path = posixpath.normpath(entry.name).lstrip("/")
        repeated += path in contents or path in links
        contents.pop(path, None)
        links.pop(path, None)
        if entry.islnk():
            links[path] = posixpath.normpath(entry.linkname).lstrip("/")
        elif entry.issym():
            links[path] = posixpath.normpath(
                posixpath.join(posixpath.dirname(path), entry.linkname)
            ).lstrip("/")
        elif entry.isfile():
            contents[path] = _content(shard, f"{name}/{entry.name}", entry)
        elif not entry.isdir():
            contents[path] = "a device or a pipe, not an image"
        if not entry.isdir() and _is_image(path):
            images.append((path, entry.name))
    if repeated:
        logger.warning("%s: %d names occur more than once; the last of each counts", name, repeated)
    yield from _resolved(images, contents, links, name)


def _resolved(
    images: list[tuple[str, str] | Damage],
    contents: dict[str, Content | str | None],
    links: dict[str, str],
    name: str,
) -> Iterator[Member | Damage]:
    """The images in order, only the last of each name, with links resolved."""
    last = {image[0]: n for n, image in enumerate(images) if not isinstance(image, Damage)}
    for n, image in enumerate(images):
        if isinstance(image, Damage):
            yield image
        elif last[image[0]] == n:
            path, stored = image
            resolved, full_name = path, f"{name}/{stored}"
            for _ in range(MAX_LINKS):
                if resolved not in links:
                    break
                resolved = links[resolved]
            content = contents.get(resolved)
            if content is None:
                link = shown_name(links.get(path, resolved))
                content = f"a link to {link}, which is not a file in {shown_name(name)}"
            if isinstance(content, str):
                yield Member(stored, None, content)
            else:
                yield Member(
                    stored, content if resolved == path else replace(content, name=full_name)
                )


def _is_image(path: str) -> bool:
    hidden = any(part.startswith(".") and part != ".." for part in path.split("/"))
    return path.lower().endswith(SUFFIXES) and not hidden


def _content(shard: Path, name: str, member: tarfile.TarInfo) -> Content | str:
    """The bytes of a member, or the problem with their positions in the file."""
    if not member.issparse():
        parts = ((0, member.offset_data, member.size),)
        return Content(shard, name, parts, member.size)
    parts, stored_end, stored = [], 0, 0
    for offset, length in member.sparse:
        if length == 0:
            continue
        if length < 0 or offset < stored_end or offset + length > member.size:
            return "a sparse file whose parts overlap or lie outside it"
        parts.append((offset, member.offset_data + stored, length))
        stored_end, stored = offset + length, stored + length
    if member.size - stored > MAX_HOLES:
        return f"a sparse file of {member.size} bytes, {stored} of them stored"
    return Content(shard, name, tuple(parts), member.size)


class _Archive(tarfile.TarFile):
    """A tar file whose headers are read by position, because tarfile stops at damage."""

    def next(self) -> None:
        """Disabled, since tarfile would decide where the archive ends."""

    def member_at(self, position: int) -> tuple[tarfile.TarInfo, int]:
        """The member whose header begins at a position, and the position of the next; TarError."""
        self._check_extended(position)
        self.offset = position
        self.fileobj.seek(position)
        member = self.tarinfo.fromtarfile(self)
        if member.size < 0 or self.offset <= position:
            raise tarfile.ReadError("a size below zero")
        return member, self.offset

    def _check_extended(self, position: int) -> None:
        for _ in range(MAX_EXTENDED):
            self.fileobj.seek(position)
            block = self.fileobj.read(BLOCK)
            # The byte of the type; most headers need no further check here.
            if block[156:157] not in EXTENDED:
                return
            header = tarfile.TarInfo.frombuf(block, self.encoding, self.errors)
            if not 0 <= header.size <= MAX_EXTENDED_SIZE:
                raise tarfile.ReadError(f"an extended header of {header.size} bytes")
            position += BLOCK + -(-header.size // BLOCK) * BLOCK
        raise tarfile.ReadError(f"more than {MAX_EXTENDED} extended headers in a row")


def _walk(shard: Path) -> Iterator[tarfile.TarInfo | Damage]:
    """All members of a shard in order, and the damaged parts between them."""
    try:
        size = check_file(shard)
        if size == 0:
            raise ValueError("the file is empty")
        os.close(os.open(shard, os.O_RDONLY))
    except (OSError, ValueError) as error:
        yield Damage(f"{NOT_A_SHARD}: {reason(error)}")
        return
    with (
        open(shard, "rb") as file,
        _Archive(fileobj=file, encoding="utf-8", errors="surrogateescape") as archive,
    ):
        start = position = 0
        suffix = ""
        while True:
            zeros = _zeros(file, position, size)
            if position + zeros >= size:
                if zeros == 0:
                    yield Damage(
                        f"ends at byte {size}{suffix} without an end-of-archive mark: it may be "
                        "truncated"
                    )
                return
            if zeros:
                end = position
                position += zeros
                joined = (position - start) % RECORD == 0 or zeros == 2 * BLOCK
                if joined and _is_header(archive, file, position):
                    logger.warning(
                        "%s: another archive follows the end of the first, at byte %d; both are "
                        "read",
                        *(shown_name(shard), position),
                    )
                    start = position
                else:
                    yield Damage(
                        f"is damaged at byte {end}{suffix}: zeros where a header should be, and "
                        f"other bytes after them, at byte {position}"
                    )
                    position = _next_header(archive, file, position, size)
                    if position is None:
                        return
            try:
                member, following = archive.member_at(position)
            except Exception as error:  # of any kind: tarfile does not expect damaged files
                what = f"is damaged at byte {position}{suffix}"
                if position == 0:
                    what = NOT_A_SHARD
                yield Damage(f"{what}: {reason(error)}")
                position = _next_header(archive, file, position + BLOCK, size)
                if position is None:
                    return
                continue
            suffix = f", after {shown_name(member.name)}"
            yield member
            if following > size:
                yield Damage(
                    f"ends {following - size} bytes too early, inside {shown_name(member.name)}"
                )
                position = _next_header(archive, file, member.offset_data, size)
                if position is None:
                    return
                continue
            position = following


def _zeros(file, position: int, size: int) -> int:
    """The number of zero bytes at a position, in whole blocks or a part of one at the end."""
    file.seek(position)
    if file.read(BLOCK).strip(b"\0"):
        return 0
    file.seek(position)
    done = position
    while chunk := file.read(CHUNK):
        if chunk.count(0) == len(chunk):
            done += len(chunk)
            continue
        first = len(chunk) - len(chunk.lstrip(b"\0"))
        done += first // BLOCK * BLOCK
        break
    return done - position


def _next_header(archive: _Archive, file, position: int, size: int) -> int | None:
    """The position of the next valid header at or after this one; None if there is none."""
    while position < size:
        file.seek(position)
        chunk = file.read(CHUNK)
        # Only POSIX and GNU headers contain this word, which is fast to find.
        begin = chunk.find(b"ustar")
        while begin >= 0:
            block, within = divmod(begin, BLOCK)
            if within == 257 and _is_header(archive, file, position + block * BLOCK):
                return position + block * BLOCK
            begin = chunk.find(b"ustar", begin + 1)
        position += CHUNK
    return None


def _is_header(archive: _Archive, file, position: int) -> bool:
    file.seek(position)
    try:
        tarfile.TarInfo.frombuf(file.read(BLOCK), archive.encoding, archive.errors)
    except tarfile.TarError:
        return False
    return True
