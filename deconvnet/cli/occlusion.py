"""Cover parts of images, and measure what a map and the class of the image lose.

deconvnet occlusion model=torchvision/vgg16 images=photo.jpg layer=features.22
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.image_files import check_outputs, progress_bar
from deconvnet.cli.model_errors import one_line_model_errors
from deconvnet.cli.network_and_images import (
    LIST,
    check_images,
    check_labels,
    chosen_layer,
    list_layers,
    load_network,
    make_projector,
    output_folder,
    relative_path,
    select_images,
)
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import OcclusionConfig
from deconvnet.images.datasets import LazyImages
from deconvnet.images.decoding import shown_name
from deconvnet.images.files import distinct_names
from deconvnet.monitoring.monitor import save_picture
from deconvnet.storage.array_files import save_arrays
from deconvnet.visualization.experiments.occlusion import Occlusion, occlusion
from deconvnet.visualization.experiments.occlusion_picture import occlusion_picture
from deconvnet.visualization.manifest import layer_file_name
from deconvnet.visualization.projection.projector import Projector


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        settings = read_settings(cfg)
        with one_line_model_errors(settings.model or settings.run):
            occlude(settings)


def occlude(settings: OcclusionConfig) -> None:
    """Save the panels of figure 7 for each image as NAME-LAYER.png, and its numbers as .npz."""
    check_images(settings)
    model = load_network(settings)
    images = select_images(settings, model)
    projector = make_projector(model, batch=settings.batch, method=settings.method)
    if settings.layer in LIST:
        return list_layers(projector, images[0])
    check_labels(settings, model, projector, images[0])
    layer = chosen_layer(projector, images[0], settings.layer)
    labels = model.labels and tuple(map(shown_name, model.labels))
    class_index = class_named(settings.label, labels)
    check_values(settings, projector, images[0], layer, class_index)
    folder = output_folder(settings, "occlusion")
    names = [
        f"{name}-{layer_file_name(layer)}" for name in distinct_names([*map(Path, images.names)])
    ]
    outputs = [folder / f"{name}{suffix}" for name in names for suffix in (".png", ".npz")]
    check_outputs(outputs, input_files(images))
    for number, name in enumerate(names):
        pixels = images[number]
        with progress_bar(name, "position") as progress:
            result = occlusion(
                projector,
                projector.prepare(pixels[None]),
                layer=layer,
                map_index=settings.map,
                class_index=class_index,
                occluder_size=settings.square,
                stride=settings.stride,
                progress=progress,
            )
        shown = projector.shown(pixels[None])[0]
        save_picture(folder / f"{name}.png", occlusion_picture(result, shown, names=labels))
        save_arrays(folder / f"{name}.npz", arrays(result))
        where = shown_name(relative_path(folder / f"{name}.png"))
        print(f"{where}   {in_words(result, labels)}")


def check_values(
    settings: OcclusionConfig,
    projector: Projector,
    image: Tensor,
    layer: str,
    class_index: int | None,
) -> None:
    """Raise ValueError for a map, a class or a square that this network or image does not have."""
    x = projector.prepare(image[None])
    maps = next(info.shape[0] for info in projector.layers(x) if info.name == layer)
    if settings.map is not None and settings.map >= maps:
        raise ValueError(f"map={settings.map}: {layer} has {maps} maps, numbered from 0")
    if class_index is not None:
        outputs = projector.outputs(x)
        if outputs is None:
            raise ValueError(f"label={settings.label}: this network has no classes")
        if class_index >= outputs.shape[1]:
            raise ValueError(
                f"label={settings.label}: this network has {outputs.shape[1]} classes, numbered "
                "from 0"
            )
    height, width = image.shape[1:]
    side = settings.square or max(1, round(min(height, width) / 4))
    if side > min(height, width):
        raise ValueError(f"square={side}: the image has {height}x{width} pixels")
    if settings.stride is not None and settings.stride > side:
        raise ValueError(
            f"stride={settings.stride}: must be at most {side}, the side of the square, or pixels "
            "between squares are never covered"
        )


def class_named(label: str | None, labels: tuple[str, ...] | None) -> int | None:
    """The number of a class that is given by its number or name."""
    if label is None or label.isdecimal():
        return None if label is None else int(label)
    known = list(labels or ())
    found = [n for n, name in enumerate(known) if label.lower() in _names(name)]
    if len(found) != 1:
        reason = f"{len(found)} classes have this name" if known else "the network names no classes"
        raise ValueError(f"label={label}: {reason}; give a number")
    return found[0]


def _names(label: str) -> list[str]:
    """The names of a class such as "tench, Tinca tinca"."""
    return [label.lower(), *(name.strip().lower() for name in label.split(","))]


def input_files(images: LazyImages) -> list[Path]:
    return [item.path for item in images.items if item.path is not None]


def arrays(result: Occlusion) -> dict[str, np.ndarray]:
    """The numbers of a result, for an .npz file; see `Occlusion`."""
    values = {key: value for key, value in asdict(result).items() if value is not None}
    rows, columns = values.pop("corners")
    tensors = {"rows": rows, "columns": columns, **values}
    return {key: np.asarray(value) for key, value in tensors.items()}


def in_words(result: Occlusion, labels: tuple[str, ...] | None) -> str:
    """What the map and the class lose under the square that reduces the map the most."""
    top, left, bottom, right = result.boxes[result.worst].tolist()
    least = float(result.activity[result.worst])
    text = (
        f"map {result.unit[0]} of {result.layer}: {result.base_activity:.4g}, and {least:.4g} "
        f"without rows {top} to {bottom - 1}, columns {left} to {right - 1}"
    )
    if result.probability is None:
        return text
    number = result.class_index
    name = labels[number] if labels else f"class {number} (no class names: give labels=FILE)"
    whole, there = result.base_probabilities[result.class_index], result.probability[result.worst]
    return f"{text}; {name}: {float(whole):.1%}, and {float(there):.1%} without them"
