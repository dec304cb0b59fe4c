"""Which setting of a command names its images, for users who type that of another command.

Commands that look at images take files: images=FILE. Commands that learn from images take a source,
data=folder, and its data.path=FOLDER; or data.images=FOLDER to learn from activations.
"""

from __future__ import annotations

from deconvnet.cli.arguments import OVERRIDE
from deconvnet.cli.printed_commands import setting
from deconvnet.cli.setting_keys import SPELLINGS, has
from deconvnet.support.renaming import current_name

OF_IMAGES = {"images", "data.images", "data.path", "path"}


def check_image_keys(arguments: list[str], schema: type) -> None:
    """Raise ValueError, with the right setting, if images are named as other commands name them.

    arguments: as typed, before Hydra sees them. schema: the dataclass of the command's settings.
    """
    matches = [match for match in map(OVERRIDE.fullmatch, arguments) if match]
    typed = {SPELLINGS.get(match[2], match[2]): match[3] for match in matches}
    as_typed = {SPELLINGS.get(match[2], match[2]): match[2] for match in matches}
    if "data" in typed and has(schema, "images") and not has(schema, "data"):
        files = typed.get("data.path", typed.get("data.images", "FOLDER"))
        raise ValueError(f"data={typed['data']}: this command takes {setting('images', files)}")
    for key in OF_IMAGES & typed.keys():
        right = _right_setting(key, typed, schema)
        if right is not None:
            raise ValueError(f"{as_typed[key]}={typed[key]}: this command takes {right}")


def _right_setting(key: str, typed: dict[str, str], schema: type) -> str | None:
    """What to type instead of a key; None if it is right, or if the command takes no images."""
    value, source = typed[key], typed.get("data")
    if current_name(schema, key) != key and (value.isdecimal() or value.lower() == "null"):
        return None  # images=1000 of train-cnn was a number
    if source == "activations" and has(schema, "data.images"):
        return None if key == "data.images" else setting("data.images", value)
    # Without data=... the settings of the sample photographs would hold, such as their number.
    of_images = key == "data.images" and source is None and "data.model" not in typed
    if has(schema, key) and not of_images:
        return None
    if has(schema, "data.source"):
        path = setting("data.path", value)
        return path if source else f"data=folder {path}"
    for known in ("data.path", "images"):
        if has(schema, known):
            return setting(known, value)
    if has(schema, "boxes"):
        return "the images that the file boxes=... names"
    looks_at_images = has(schema, "run") and has(schema, "device")
    return "the images that the run was trained on" if looks_at_images else None
