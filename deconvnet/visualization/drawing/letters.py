"""Text that can be read in a picture, whatever its letters.

Pillow's own font has ASCII and a few signs. Text with other letters is drawn with DejaVu Sans,
which comes with matplotlib and has most alphabets. Letters that it lacks, such as Chinese ones, are
replaced by their numbers, so that different names stay different.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

from PIL import ImageFont

# A character that no font has.
MISSING = "\U0010fffe"


def legible(text: str) -> str:
    """The text with the letters that no font here has replaced: 中 becomes [U+4E2D]."""
    if text.isascii():
        return text
    # The names of files on macOS have accents as separate characters.
    return "".join(map(_drawn, unicodedata.normalize("NFC", text)))


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font of a legible text: Pillow's own, or that with other letters."""
    return _font(size, text.isascii() or all(map(_is_in_pillows_font, text)))


@cache
def _font(size: int, is_pillows: bool) -> ImageFont.FreeTypeFont:
    # Reading a font takes as long as drawing a line of text.
    return ImageFont.load_default(size) if is_pillows else ImageFont.truetype(_dejavu(), size)


@cache
def _is_in_pillows_font(letter: str) -> bool:
    font = _font(13, True)
    drawn, missing = font.getmask(letter), font.getmask(MISSING)
    return letter.isascii() or (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


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
    # Imported here because matplotlib takes long to load, and most text does not need it.
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
