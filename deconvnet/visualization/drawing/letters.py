"""Text that can be read in a picture, whatever its letters.

Pillow's own font has ASCII only. Text with other letters is drawn with DejaVu Sans, which comes
with matplotlib and has most alphabets. Letters that it lacks, such as Chinese ones, are replaced by
their numbers, so that different names stay different.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

from PIL import ImageFont


def legible(text: str) -> str:
    """The text with the letters that no font here has replaced: 中 becomes [U+4E2D]."""
    if text.isascii():
        return text
    # The names of files on macOS have accents as separate characters.
    return "".join(map(_drawn, unicodedata.normalize("NFC", text)))


@cache
def font_of(size: int, *, ascii_only: bool = True) -> ImageFont.FreeTypeFont:
    """The font of all pictures, or that of text with other letters.

    Reading it takes as long as drawing a line of text.
    """
    if ascii_only:
        return ImageFont.load_default(size)
    return ImageFont.truetype(_dejavu(), size)


def _drawn(letter: str) -> str:
    """A letter, a simpler form of it, or its number."""
    for form in (letter, unicodedata.normalize("NFKD", letter)):
        if all(part in _letters() or part.isascii() for part in form):
            return form
    return f"[U+{ord(letter):04X}]"


@cache
def _letters() -> frozenset[str]:
    """The letters that DejaVu Sans has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(_dejavu()).get_charmap()))


def _dejavu() -> str:
    # Imported here because matplotlib takes long to load, and most text is ASCII.
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
