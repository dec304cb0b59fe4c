"""Measure what a network keeps of its outputs if codes replace one of its layers.

deconvnet faithfulness run=runs/resnet50-layer3
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from deconvnet.cli.concepts_of_run import check_takes_images
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.model_errors import one_line_model_errors
from deconvnet.cli.network_and_images import (
    check_images,
    check_labels,
    load_network,
    make_projector,
    relative_path,
    select_images,
)
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import FaithfulnessConfig
from deconvnet.images.datasets import LazyImages
from deconvnet.monitoring.progress_bar import open_bar
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.network import DeconvNet
from deconvnet.storage import ownership
from deconvnet.visualization.experiments.faithfulness import (
    Faithfulness,
    comparison,
    faithfulness,
    with_lam,
)
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import group_by_size

RESULT, COMPARISON = "faithfulness.json", "faithfulness-lam.json"


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        settings = read_settings(cfg)
        with one_line_model_errors(settings.run):
            measure(settings)


def measure(settings: FaithfulnessConfig) -> None:
    """Print the table, and write it as faithfulness.json into the run folder."""
    check_images(settings)
    model, path = load_network(settings), Path(settings.run) / RESULT
    module = model.module
    if not isinstance(module, ConceptModel):
        check_takes_images(Path(settings.run), module, [Path("images")])
        raise ValueError(
            f"run={settings.run}: has learned from images, not from the activations of a network "
            "(data=activations)"
        )
    for file in (path, path.parent / COMPARISON):
        ownership.check_writable(file)
    images = select_images(settings, model)
    projector = make_projector(model, batch=settings.batch)
    check_labels(settings, model, projector, images[0])
    classes = _classes(images, model.labels)

    def result_with(net: DeconvNet, title: str) -> Faithfulness:
        batches = _batches(images, projector, classes, settings, title)
        return faithfulness(module.base, module.layer, net, batches, chunk=settings.batch)

    result = result_with(module.dictionary, "images")
    ownership.write(path, to_json(result.as_dict(), indent=1).encode())
    print(f"\n{result}\n\n{relative_path(path)}")
    if not settings.lam:
        return
    compared = {
        lam: result_with(with_lam(module.dictionary, lam), f"lam={lam:g}") for lam in settings.lam
    }
    table = {f"{lam:g}": each.as_dict() for lam, each in compared.items()}
    ownership.write(path.parent / COMPARISON, to_json(table, indent=1).encode())
    print(f"\n{comparison(compared)}\n\n{relative_path(path.parent / COMPARISON)}")


def _batches(
    images: LazyImages,
    projector: Projector,
    classes: Tensor | None,
    settings: FaithfulnessConfig,
    title: str,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The images as the network takes them, those of one size together, and their classes."""
    show = settings.progress
    with open_bar(show=show, total=len(images), desc=title, dynamic_ncols=True) as bar:
        for numbers in torch.arange(len(images)).split(settings.batch):
            pixels = [images[n] for n in numbers.tolist()]
            for group in group_by_size(pixels):
                x = projector.prepare(torch.stack([pixels[n] for n in group]))
                yield x, None if classes is None else classes[numbers[group]]
            bar.update(len(numbers))


def _classes(images: LazyImages, labels: tuple[str, ...] | None) -> Tensor | None:
    """(N,): the class of each image, if their folders have names of classes; else None."""
    try:
        names = [images.label(n) for n in range(len(images))]
    except ValueError:
        return None
    numbers = {name: number for number, name in enumerate(labels or ())}
    known = all(name in numbers for name in names)
    return torch.tensor([numbers[name] for name in names]) if known else None
