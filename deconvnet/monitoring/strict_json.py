"""Strict JSON: null in place of NaN and infinity.

json.dumps writes NaN and Infinity, which are not JSON; browsers, jq and most parsers reject them.
"""

from __future__ import annotations

import json
import math


def to_json(value: object, **options: object) -> str:
    """A value as strict JSON; options: as of json.dumps.

    NaN and infinite numbers become null, tuples lists, and scalars of numpy and torch numbers.
    """
    return json.dumps(_plain(value), allow_nan=False, **options)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, str | bool | int | float | None) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
