"""Measure whether the features of a network represent the same part in different images.

deconvnet correspondence model=torchvision/vgg16 boxes=faces.csv layers=[features.22,features.29]
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.image_files import check_outputs, progress_bar
from deconvnet.cli.model_errors import one_line_model_errors
from deconvnet.cli.network_and_images import (
    LIST,
    chosen_layer,
    input_crop,
    list_layers,
    load_network,
    make_projector,
    output_folder,
    relative_path,
)
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import CorrespondenceConfig
from deconvnet.images.decoding import read_image, shown_name, user_path
from deconvnet.images.fit import Crop
from deconvnet.monitoring.monitor import save_picture
from deconvnet.storage import ownership
from deconvnet.visualization.experiments.correspondence import (
    CorrespondenceScore,
    correspondence,
    correspondence_picture,
    correspondence_table,
)
from deconvnet.visualization.layer_choice import default_layers, projectable_layers
from deconvnet.visualization.projection.projector import Projector

COLUMNS = ("image", "part", "top", "left", "bottom", "right")
EDGES = COLUMNS[2:]

Box = tuple[int, int, int, int]


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        settings = read_settings(cfg)
        with one_line_model_errors(settings.model or settings.run):
            compare(settings)


def compare(settings: CorrespondenceConfig) -> None:
    """Print the table of the scores, and save them as correspondence.png and .csv."""
    file = user_path(settings.boxes)
    boxes = read_boxes(file)
    check_within(settings, boxes)
    model = load_network(settings)
    pixels, parts = fitted(file, boxes, input_crop(settings, model))
    projector = make_projector(model, batch=settings.batch)
    if settings.layers and settings.layers[0] in LIST:
        return list_layers(projector, pixels[0])
    layers = chosen_layers(projector, pixels[0], settings.layers)
    folder = output_folder(settings, "correspondence")
    picture, table = (folder / f"correspondence{suffix}" for suffix in (".png", ".csv"))
    check_outputs([picture, table], [file, *boxes])
    within = parts.pop(settings.within) if settings.within else None
    with progress_bar("covering parts", "box") as progress:
        scores = correspondence(
            projector,
            projector.prepare(pixels),
            parts,
            layers,
            draws=settings.draws,
            within=within,
            generator=torch.Generator().manual_seed(settings.seed),
            progress=progress,
        )
    save_picture(picture, correspondence_picture(scores))
    ownership.write(table, as_csv(scores).encode())
    print(f"{len(pixels)} images: fraction of the features whose changes have different signs")
    print(correspondence_table(scores))
    for path in (picture, table):
        print(shown_name(relative_path(path)))


def read_boxes(file: Path) -> dict[Path, dict[str, Box]]:
    """The box of every part in every image of a CSV file; every image has all parts."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"boxes={shown_name(file)}: cannot be read: {reason}") from error
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"boxes={shown_name(file)}: its first line must name the columns {','.join(COLUMNS)}; "
            f"{', '.join(missing)} is missing"
        )
    found: dict[Path, dict[str, Box]] = {}
    for number, row in enumerate(reader, 2):
        try:
            box = tuple(int(row[edge]) for edge in EDGES)
        except (TypeError, ValueError):
            values = ",".join(str(row[edge]) for edge in EDGES)
            raise ValueError(
                f"boxes={shown_name(file)}: line {number}: {','.join(EDGES)} is {values}: expected "
                "whole pixels"
            ) from None
        parts = found.setdefault(file.parent / row["image"], {})
        if row["part"] in parts:
            raise ValueError(
                f"boxes={shown_name(file)}: line {number}: {row['image']} has {row['part']} twice"
            )
        parts[row["part"]] = box
    names = list(dict.fromkeys(part for parts in found.values() for part in parts))
    for image, parts in found.items():
        if len(parts) < len(names):
            absent = next(name for name in names if name not in parts)
            raise ValueError(f"boxes={shown_name(file)}: {image.name} has no box of {absent}")
    if len(found) < 2:
        raise ValueError(
            f"boxes={shown_name(file)}: {len(found)} images; a correspondence is between at least 2"
        )
    return found


def check_within(settings: CorrespondenceConfig, boxes: dict[Path, dict[str, Box]]) -> None:
    parts = list(next(iter(boxes.values())))
    if settings.within is not None and settings.within not in parts:
        raise ValueError(f"within={settings.within}: no such part; there are {', '.join(parts)}")
    if parts == [settings.within]:
        raise ValueError(f"within={settings.within}: the file has no other part to cover")


def fitted(
    file: Path, boxes: dict[Path, dict[str, Box]], crop: Crop | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The images as the network sees them (N, 3, H, W), and the boxes (N, 4) of each part there."""
    images, parts = [], {}
    for path, found in boxes.items():
        image = read_image(path)
        size = tuple(image.shape[1:])
        for part, box in found.items():
            top, left, bottom, right = box
            if not (0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]):
                raise ValueError(
                    f"boxes={shown_name(file)}: {path.name}, {part}: {','.join(map(str, box))} is "
                    f"no box of an image of {size[0]}x{size[1]} pixels"
                )
            top, left, bottom, right = box if crop is None else crop.box(box, size)
            if top >= bottom or left >= right:
                raise ValueError(
                    f"boxes={shown_name(file)}: {path.name}, {part}: lies outside the square that "
                    "the network sees, the middle of the image; crop the image, or give size=..."
                )
            parts.setdefault(part, []).append((top, left, bottom, right))
        images.append(image if crop is None else crop(image))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{path}: has {size[0]}x{size[1]} pixels, unlike other images; size=... crops all "
                "to one size"
            )
    return torch.stack(images), {part: torch.tensor(rows) for part, rows in parts.items()}


def chosen_layers(projector: Projector, image: Tensor, names: list[str] | None) -> list[str]:
    """The layers of these names, or the lowest and the highest of those to visualize."""
    if names is not None:
        return [chosen_layer(projector, image, name) for name in names]
    layers = default_layers(projectable_layers(projector, image))
    return list(dict.fromkeys([*layers[:1], chosen_layer(projector, image, None)]))


def as_csv(scores: dict[str, dict[str, CorrespondenceScore]]) -> str:
    """The scores, and the fraction of the features that change at all."""
    lines = ["covered,layer,difference,standard_error,changed"]
    for part, by_layer in scores.items():
        for layer, score in by_layer.items():
            changed = float(score.changed.mean())
            lines.append(f"{part},{layer},{score.mean:.6g},{score.error:.6g},{changed:.6g}")
    return "\n".join(lines) + "\n"
