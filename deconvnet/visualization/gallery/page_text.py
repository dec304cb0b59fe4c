"""Text and JSON of a page: numbers as a reader sees them, and data that cannot end a script."""

from __future__ import annotations

import json
import math
import re
from numbers import Integral, Real
from pathlib import Path
from urllib.parse import quote

from deconvnet.visualization.gallery.exhibits import Facts

# What a page calls the maps and images that it shows, and images of one row, which are signals.
IMAGES = {
    **{"map": "map", "maps": "maps"},
    **{"image": "image", "images": "images", "one": "an image", "pixels": "pixels"},
    **{"photograph": "photograph", "photographs": "photographs"},
}
RECORDINGS = {
    **{"map": "map", "maps": "maps"},
    **{"image": "recording", "images": "recordings", "one": "a recording", "pixels": "samples"},
    **{"photograph": "recording", "photographs": "recordings"},
}
# What it calls the maps of a dictionary over the layer of a network.
CONCEPT_WORDS = {"map": "concept", "maps": "concepts"}


def fact_texts(facts: Facts) -> list[tuple[str, str]]:
    """Facts as pairs of texts."""
    return [(name, number_text(value)) for name, value in facts.items()]


def number_text(value: str | float) -> str:
    """Text and integers unchanged, other numbers with three digits."""
    if isinstance(value, str | Integral) or not is_number(value):
        return str(value)
    digits = ".0f" if 1000 <= abs(value) < 1e6 else ".3g"
    return f"{value:{digits}}".replace("-", "−")


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def rounded(value: float) -> float | None:
    """A number with six digits for JSON; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def script_json(value: object) -> str:
    """JSON that cannot end the script that contains it, whatever the names of images are."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write_script(root: Path, file: str, value: object) -> str:
    """Write data as a script that hands it to the page; returns `file`."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"gallery.add({script_json(file)},{script_json(value)});\n", encoding="utf-8")
    return file


def view_address(layer: str, number: int | None = None) -> str:
    """The fragment of a layer or a map in the page, in the form that its script uses."""
    name = quote(layer, safe="!'()*~")
    return f"#layer={name}" if number is None else f"#layer={name}&map={number}"


def safe_name(name: str) -> str:
    """The name of a layer as part of a file name: no characters that paths or URLs interpret."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:60].strip("._") or "layer"
