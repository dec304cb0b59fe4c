"""Compare the speed of projecting units and searching for top activations with Captum.

python benchmarks/compare_captum.py                  AlexNet, VGG-16 and ResNet-18 at one thread
python benchmarks/compare_captum.py --models vgg16 --repeats 5

Needs Captum (pip install captum); photographs come with scikit-image, weights are random. The two
sides take turns, and the tables give the median and range of the ratios of consecutive times.
Captum runs the whole network and projects one unit for each image of a batch. It has no search, so
ours is compared with what its users write: LayerActivation and a maximum.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torchvision
from torch import Tensor, nn

from deconvnet.images.datasets import load_images
from deconvnet.images.sources import DataSettings
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import TopActivations, find_top_activations

if TYPE_CHECKING:
    from captum.attr import NeuronDeconvolution

LAYERS = {
    "alexnet": ["features.3", "features.8"],
    "vgg16": ["features.8", "features.15", "features.22"],
    "resnet18": ["layer2.1.conv2", "layer3.1.conv2"],
}
MAPS, K = 64, 9
# Captum takes minutes for all units of a layer: it is timed on every 24th.
EVERY = 24

Unit = tuple[int, int, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--images", type=int, default=48, help="photographs (default 48)")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    options = parser.parse_args()
    if importlib.util.find_spec("captum") is None:
        sys.exit("benchmarks/compare_captum.py needs Captum: pip install captum")
    torch.set_num_threads(options.threads)
    settings = DataSettings(size=options.size, scale=1.0, max_images=options.images)
    images = load_images(settings).images
    print(
        f"{len(images)} images of {options.size}x{options.size}, {options.threads} threads, float32"
    )
    print("our seconds, and the time of Captum over ours: median (lowest to highest)\n")
    print(
        "| network, layer | one unit | Captum | 9 units of each of 64 maps | Captum | difference |"
    )
    print("|---|---|---|---|---|---|")
    for name in options.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        tops = find_top_activations(
            Projector(model), images, LAYERS[name], k=K, batch=options.batch
        )
        for layer in LAYERS[name]:
            print(projecting(name, model, layer, images, tops[layer], options))
    print("\n| network | search, s per image | Captum's LayerActivation |\n|---|---|---|")
    for name in options.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        print(searching(name, model, images, options))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory of the process, both sides: {peak:.0f} MiB")


def projecting(
    name: str,
    model: nn.Module,
    layer: str,
    images: Tensor,
    top: TopActivations,
    options: argparse.Namespace,
) -> str:
    """A row: one unit at a time, and nine units of each of 64 maps."""
    from captum.attr import NeuronDeconvolution

    projector = Projector(model, method="deconv", batch=options.batch)
    captum = NeuronDeconvolution(model, model.get_submodule(layer))
    alive = [k for k in range(len(top.values)) if len(top.units(k)) == K][:MAPS]
    units = sorted(unit for k in alive for unit in top.units(k))
    sample = units[::EVERY]

    def ours_one() -> Tensor:
        return torch.cat([projector(images[[n]], layer, [(0, *u)]).images for n, *u in sample[:4]])

    def captum_one() -> Tensor:
        return torch.cat([by_captum(captum, images, [unit], top) for unit in sample[:4]])

    def ours_all() -> Tensor:
        # All would fill the memory: of each chunk only those that are compared are stored.
        compared = []
        for start in range(0, len(units), 64):
            chunk = units[start : start + 64]
            projection = projector(images, layer, chunk)
            compared += [projection.images[chunk.index(unit)] for unit in chunk if unit in sample]
        return torch.stack(compared)

    def captum_some() -> Tensor:
        parts = [sample[n : n + options.batch] for n in range(0, len(sample), options.batch)]
        return torch.cat([by_captum(captum, images, part, top) for part in parts])

    seconds, ratios, _ = in_turns(ours_one, captum_one, options.repeats)
    all_seconds, all_ratios, (a, b) = in_turns(ours_all, captum_some, options.repeats)
    scale = len(units) / len(sample)
    difference = float((a - b).abs().max() / b.abs().max())
    every = spread([ratio * scale for ratio in all_ratios])
    return (
        f"| {name} {layer} | {seconds / 4:.3f} | {spread(ratios)} | "
        f"{all_seconds:.1f} ({len(units)}) | {every} | {difference:.0e} |"
    )


def by_captum(
    captum: NeuronDeconvolution, images: Tensor, units: list[Unit], top: TopActivations
) -> Tensor:
    """Projections of units, times their activations, since Captum starts from a seed of 1."""
    n, k, i, j = (torch.tensor(column) for column in zip(*units, strict=True))
    values = []

    def select(y: Tensor) -> Tensor:
        chosen = y[torch.arange(len(n)), k, i, j]
        values.append(chosen.detach())
        return chosen

    projections = captum.attribute(images[n].requires_grad_(), neuron_selector=select)
    return (projections * values[-1].view(-1, 1, 1, 1)).detach()


def searching(name: str, model: nn.Module, images: Tensor, options: argparse.Namespace) -> str:
    from captum.attr import LayerActivation

    projector, layers = Projector(model), LAYERS[name]
    captum = LayerActivation(model, [model.get_submodule(layer) for layer in layers])

    def ours() -> object:
        return find_top_activations(projector, images, layers, k=K, batch=options.batch)

    @torch.no_grad()
    def others() -> object:
        maxima = []
        for part in images.split(options.batch):
            maxima.append([y.flatten(2).max(2) for y in captum.attribute(part)])
        return [
            torch.cat([part[n].values for part in maxima]).topk(K, 0) for n in range(len(layers))
        ]

    seconds, ratios, _ = in_turns(ours, others, options.repeats)
    return f"| {name} | {seconds / len(images):.3f} | {spread(ratios)} |"


def in_turns(
    ours: Callable[[], object], others: Callable[[], object], repeats: int
) -> tuple[float, list[float], tuple[object, object]]:
    """The median of our seconds, the ratio of theirs to ours in each turn, and the last results."""
    seconds, ratios, results = [], [], (None, None)
    for turn in range(repeats + 1):
        times, results = [], []
        for run in (ours, others):
            start = time.perf_counter()
            results.append(run())
            times.append(time.perf_counter() - start)
        if turn:  # the first is a warm-up
            seconds.append(times[0])
            ratios.append(times[1] / times[0])
    return statistics.median(seconds), ratios, tuple(results)


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


if __name__ == "__main__":
    main()
