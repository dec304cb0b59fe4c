"""The speed of projection and search compared with Captum, on the same work in one run.

python benchmarks/projections.py                  AlexNet, VGG-16 and ResNet-18 at one thread
python benchmarks/projections.py --models vgg16 --repeats 5

Needs Captum (pip install captum) and nothing else that is not installed already: photographs come
with scikit-image, weights are random. The two sides take turns; the results are medians of the
ratios of neighbouring runs, and their range. Captum runs the whole network and projects one unit
per image of a batch. It has no search, so ours is compared with what its users write:
LayerActivation and a maximum.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torchvision
from captum.attr import LayerActivation, NeuronDeconvolution
from torch import Tensor, nn

from deconvnet.images.datasets import load_images
from deconvnet.images.sources import DataSettings
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import TopActivations, find_top_activations

LAYERS = {
    "alexnet": ["features.3", "features.8"],
    "vgg16": ["features.8", "features.15", "features.22"],
    "resnet18": ["layer2.1.conv2", "layer3.1.conv2"],
}
MAPS, K = 64, 9
# Captum takes minutes for all units of a layer: it is timed on every n-th of them.
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
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = DataSettings(size=options.size, scale=1.0, max_images=options.images)
    images = load_images(settings).images
    print(
        f"{len(images)} images of {options.size}x{options.size}, {options.threads} threads, float32"
    )
    print("seconds of ours; how many times as long Captum takes: median (least to most)\n")
    print(
        "| network, layer | one unit | of Captum | 9 units of each of 64 maps | of Captum | same? |"
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
    print("\n| network | search, s an image | of Captum's LayerActivation |\n|---|---|---|")
    for name in options.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        print(searching(name, model, images, options))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak of the process, both sides: {peak:.0f} MiB")


def projecting(
    name: str,
    model: nn.Module,
    layer: str,
    images: Tensor,
    top: TopActivations,
    options: argparse.Namespace,
) -> str:
    """A row: one unit at a time, and nine units of each of 64 maps."""
    projector = Projector(model, batch=options.batch)
    captum = NeuronDeconvolution(model, model.get_submodule(layer))
    alive = [k for k in range(len(top.values)) if len(top.units(k)) == K][:MAPS]
    units = sorted(unit for k in alive for unit in top.units(k))
    some = units[::EVERY]

    def ours_one() -> Tensor:
        return torch.cat([projector(images[[n]], layer, [(0, *u)]).images for n, *u in some[:4]])

    def captum_one() -> Tensor:
        return torch.cat([by_captum(captum, images, [unit], top) for unit in some[:4]])

    def ours_all() -> Tensor:
        # As large as the images are they would fill memory: of each chunk only those compared.
        kept = []
        for start in range(0, len(units), 64):
            chunk = units[start : start + 64]
            found = projector(images, layer, chunk)
            kept += [found.images[chunk.index(unit)] for unit in chunk if unit in some]
        return torch.stack(kept)

    def captum_some() -> Tensor:
        parts = [some[n : n + options.batch] for n in range(0, len(some), options.batch)]
        return torch.cat([by_captum(captum, images, part, top) for part in parts])

    seconds, ratios, _ = in_turns(ours_one, captum_one, options.repeats)
    all_seconds, all_ratios, (a, b) = in_turns(ours_all, captum_some, options.repeats)
    scale = len(units) / len(some)
    difference = float((a - b).abs().max() / b.abs().max())
    every = spread([ratio * scale for ratio in all_ratios])
    return (
        f"| {name} {layer} | {seconds / 4:.3f} | {spread(ratios)} | "
        f"{all_seconds:.1f} ({len(units)}) | {every} | to {difference:.0e} |"
    )


def by_captum(
    captum: NeuronDeconvolution, images: Tensor, units: list[Unit], top: TopActivations
) -> Tensor:
    """Some units, each of the copy of its image, times their activations: Captum's seed is 1."""
    n, k, i, j = (torch.tensor(each) for each in zip(*units, strict=True))
    values = []

    def select(y: Tensor) -> Tensor:
        chosen = y[torch.arange(len(n)), k, i, j]
        values.append(chosen.detach())
        return chosen

    found = captum.attribute(images[n].requires_grad_(), neuron_selector=select)
    return (found * values[-1].view(-1, 1, 1, 1)).detach()


def searching(name: str, model: nn.Module, images: Tensor, options: argparse.Namespace) -> str:
    projector, layers = Projector(model), LAYERS[name]
    captum = LayerActivation(model, [model.get_submodule(layer) for layer in layers])

    def ours() -> object:
        return find_top_activations(projector, images, layers, k=K, batch=options.batch)

    @torch.no_grad()
    def others() -> object:
        found = []
        for part in images.split(options.batch):
            found.append([y.flatten(2).max(2) for y in captum.attribute(part)])
        return [
            torch.cat([part[n].values for part in found]).topk(K, 0) for n in range(len(layers))
        ]

    seconds, ratios, _ = in_turns(ours, others, options.repeats)
    return f"| {name} | {seconds / len(images):.3f} | {spread(ratios)} |"


def in_turns(
    ours: Callable[[], object], others: Callable[[], object], repeats: int
) -> tuple[float, list[float], tuple[object, object]]:
    """The median of our seconds, theirs over ours turn by turn, and the last results."""
    seconds, ratios, results = [], [], (None, None)
    for turn in range(repeats + 1):
        times, results = [], []
        for run in (ours, others):
            start = time.perf_counter()
            results.append(run())
            times.append(time.perf_counter() - start)
        if turn:  # the first warms up
            seconds.append(times[0])
            ratios.append(times[1] / times[0])
    return statistics.median(seconds), ratios, tuple(results)


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


if __name__ == "__main__":
    main()
