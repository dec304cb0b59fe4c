"""Convolutional dictionaries of activations beside sparse autoencoders, and with planted concepts.

    python benchmarks/activations.py autoencoders --model torchvision/resnet50 --layer layer3 \
        --images photos --maps 512 --per-position 16
    python benchmarks/activations.py planted --problems 20
    python benchmarks/activations.py memory

autoencoders: TopK and BatchTopK autoencoders of `overcomplete` (pip install overcomplete), with its
linear encoder, its auxiliary loss, Adam and a falling learning rate, on the standardised
activations of the training images. Ours are 1x1 filters with codes >= 0, refitted
(`solver.refit`). They learn with a lam, and are then coded with another, at which the number of
non-zero coefficients at a position of training and of held-out images is that of the autoencoders.
The table is of held-out images:

- FVU, the fraction of the variance that the reconstruction does not explain;
- L0, the non-zero coefficients of a position;
- stability, the mean cosine of concepts matched one to one between two seeds (Hungarian method);
- gap, how far the objective is at most above the minimum; autoencoders have no such bound;
- CPU seconds to learn, and to encode 1,000 positions.

planted: activations of 3x3xC concepts with sparse non-negative maps and 2% noise; the fraction of
concepts that filters from independent random starts match with a cosine above 0.98, at any shift
that keeps their middle in the frame.

memory: the peak memory of the process while the activations of 10,000 images, 14x14x320 each, are
written to a folder, and 1,024 concepts are learned from random batches of them.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from timing import fresh_peak, peak
from torch import Tensor, nn

from deconvnet import (
    ActivationSource,
    LearningSettings,
    SolverSettings,
    learn_filters,
    learn_online,
    sparse_code,
)
from deconvnet.activations.settings import TrainingData, activation_source
from deconvnet.filters.constraint import normalize
from deconvnet.operators.convolution import deconvolve

# How ours are coded for the table.
SOLVER = SolverSettings("coordinate", iterations=50, gap=1e-2, refit=True)
# The fraction of the images that is held out.
HELD_OUT = 0.2
FOUND = 0.98


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.what == "planted":
        print_planted(options)
    elif options.what == "memory":
        print_memory(options)
    else:
        print_autoencoders(options)


def print_planted(options: argparse.Namespace) -> None:
    shares = []
    for seed in range(options.problems):
        concepts, y = planted(seed)
        learning = LearningSettings(epochs=options.epochs or 80, init="random")
        learned = learn_filters(
            y, len(concepts), 3, lam=4, non_negative=True, learning=learning, seed=seed
        )
        shares.append(float((best_cosines(concepts, learned.filters) > FOUND).float().mean()))
        print(f"problem {seed}: {shares[-1]:.1%} of {len(concepts)} concepts found", flush=True)
    print(f"mean {statistics.mean(shares):.1%}, least {min(shares):.1%}")


def planted(
    seed: int, *, K: int = 32, C: int = 16, N: int = 48, size: int = 10, active: int = 12
) -> tuple[Tensor, Tensor]:
    """Concepts (K, C, 3, 3) of unit norm, and activations (N, C, size, size) of mean norm 1.

    active: how many concepts an image has, with strengths of 0.5 to 1.5 at random positions.
    """
    generator = torch.Generator().manual_seed(seed)
    concepts = normalize(torch.randn(K, C, 3, 3, generator=generator))
    maps = torch.zeros(N, K, size + 2, size + 2)
    places = torch.randint(0, maps[0].numel(), (N, active), generator=generator)
    strengths = 0.5 + torch.rand(N, active, generator=generator)
    maps.flatten(1).scatter_(1, places, strengths)
    y = deconvolve(maps, concepts)
    y += 0.02 * y.std() * torch.randn(y.shape, generator=generator)
    return concepts, y / y.norm(dim=1).mean()


def best_cosines(concepts: Tensor, filters: Tensor) -> Tensor:
    """(K,): of each concept, the largest cosine with any filter, shifted by up to a pixel."""
    shifted = F.conv2d(F.pad(concepts, (1, 1, 1, 1)), filters)
    return shifted.amax((1, 2, 3))


def print_memory(options: argparse.Namespace) -> None:
    """Peak memory of each step of learning from activations in a folder."""
    N, C, size = options.max_images or 10_000, 320, 14
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.ReLU())
    images = torch.rand(N, 3, size, size)
    print(f"{N:,} images of {size}x{size}x{C}: {_mib(4 * N * C * size**2)} of activations")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = ActivationSource(model, "1", images, folder=folder)
        print(f"before: {_mib(fresh_peak())}", flush=True)
        y = source.standardized()
        print(f"activations written, mean and scale: {_mib(peak())}", flush=True)
        fresh_peak()
        batches = itertools.islice(y.split(16, seed=0), options.batches)
        learned = learn_online(batches, 1024, 1, lam=6.667, non_negative=True)
        count = len(learned.history)
        print(f"1,024 concepts learned from {count} random batches of 16: {_mib(peak())}")


def _mib(memory: float) -> str:
    return f"{memory / 2**20:,.0f} MiB"


def print_autoencoders(options: argparse.Namespace) -> None:
    train, test = split_activations(options)
    kinds: dict[str, Callable] = {}
    if options.autoencoders:
        import_overcomplete()
        kinds = {kind: autoencoder(kind) for kind in options.autoencoders}
    kinds["deconvnet"] = dictionary
    print("| method | FVU | L0 | stability | dead | gap | learn, s | encode 1,000, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, learn in kinds.items():
        results = [learn(train, test, options, seed) for seed in range(options.seeds)]
        pairs = itertools.combinations([result["concepts"] for result in results], 2)
        stability = statistics.mean([match(*pair) for pair in pairs] or [float("nan")])
        mean = {
            key: statistics.mean(result[key] for result in results)
            for key in results[0]
            if key != "concepts"
        }
        print(
            f"| {name} | {mean['fvu']:.3f} | {mean['l0']:.1f} | {stability:.3f} "
            f"| {mean['dead']:.0f} | {mean.get('gap', float('nan')):.2%} | {mean['learn']:.1f} "
            f"| {mean['encode']:.3f} |",
            flush=True,
        )


def split_activations(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Standardised activations of training and of held-out images, (N, C, H, W) each."""
    if options.tensor:
        y = torch.load(options.tensor, weights_only=True)
    else:
        data = TrainingData(
            model=options.model,
            weights=options.weights,
            layer=options.layer,
            images=options.images,
            size=options.size,
            max_images=options.max_images,
            mean=options.mean,
            std=options.std,
            order=options.order,
        )
        source: ActivationSource = activation_source(data)
        y = source[:]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = y[order].tensor_split([round(HELD_OUT * len(y))])
    mean = train.mean((0, 2, 3), keepdim=True)
    norm = (train - mean).norm(dim=1).mean()
    return (train - mean) / norm, (test - mean) / norm


def dictionary(train: Tensor, test: Tensor, options: argparse.Namespace, seed: int) -> dict:
    """1x1 filters, learned and coded with the lams that give the L0 of the options."""
    lam, seconds = 8.0, 0.0
    for epochs in (1, 1, options.epochs or 6):
        learning = LearningSettings(epochs=epochs, batch_size=16)
        started = time.process_time()
        learned = learn_filters(
            train, options.maps, 1, lam=lam, non_negative=True, learning=learning, seed=seed
        )
        seconds += time.process_time() - started
        lam = lam_of(train[:64], learned.filters, options.per_position, lam)
    lam = lam_of(test[:64], learned.filters, options.per_position, lam)
    started = time.process_time()
    code = sparse_code(test, learned.filters, lam=lam, non_negative=True, settings=SOLVER)
    encode = time.process_time() - started
    return {
        "concepts": learned.filters.flatten(1),
        "fvu": fvu(test, test - code.residual),
        "l0": l0(code.z),
        "dead": int((code.z == 0).flatten(2).all(2).all(0).sum()),
        "gap": float(code.gap.sum() / code.objective.sum()),
        "learn": seconds,
        "encode": 1000 * encode / test[:, 0].numel(),
    }


def lam_of(y: Tensor, filters: Tensor, per_position: float, lam: float) -> float:
    """The lam at which codes of y have this many non-zero coefficients at a position."""
    low, high = lam / 4, lam * 4
    for _ in range(8):
        lam = (low * high) ** 0.5
        count = l0(sparse_code(y, filters, lam=lam, non_negative=True, settings=SOLVER).z)
        low, high = (lam, high) if count < per_position else (low, lam)
    return lam


def import_overcomplete() -> None:
    """Import `overcomplete` without its plotting, which fails with a recent matplotlib."""
    plots = types.ModuleType("overcomplete.visualization")
    names = ("overlay_top_heatmaps", "evidence_top_images", "zoom_top_images", "contour_top_image")
    for name in names:
        setattr(plots, name, None)
    sys.modules.setdefault("overcomplete.visualization", plots)
    importlib.import_module("overcomplete")


def autoencoder(kind: str) -> Callable:
    """The function that learns and measures an autoencoder: topk or batchtopk."""

    def learn(train: Tensor, test: Tensor, options: argparse.Namespace, seed: int) -> dict:
        from overcomplete.sae import BatchTopKSAE, TopKSAE, train_sae
        from overcomplete.sae.losses import top_k_auxiliary_loss

        torch.manual_seed(seed)
        x, size = positions(train), 512
        if kind == "topk":
            model = TopKSAE(x.shape[1], options.maps, top_k=options.per_position)
        else:
            model = BatchTopKSAE(x.shape[1], options.maps, top_k=options.per_position * size)
        data = torch.utils.data.TensorDataset(x)
        batches = torch.utils.data.DataLoader(data, size, shuffle=True, drop_last=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
        steps = options.sae_epochs * len(batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
        started = time.process_time()
        train_sae(
            *(model, batches, top_k_auxiliary_loss, optimizer, schedule),
            nb_epochs=options.sae_epochs,
            monitoring=0,
        )
        seconds, y = time.process_time() - started, positions(test)
        model.eval()
        started = time.process_time()
        with torch.no_grad():
            _, z, painted = model(y)
        encode = time.process_time() - started
        return {
            "concepts": model.get_dictionary().detach(),
            "fvu": float((y - painted).square().sum() / (y - y.mean(0)).square().sum()),
            "l0": float((z != 0).sum() / len(y)),
            "dead": int((z == 0).all(0).sum()),
            "learn": seconds,
            "encode": 1000 * encode / len(y),
        }

    return learn


def positions(y: Tensor) -> Tensor:
    """(P, C): all positions of activations (N, C, H, W)."""
    return y.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def fvu(y: Tensor, painted: Tensor) -> float:
    """The unexplained fraction of the variance of y (N, C, H, W) around its channel means."""
    centred = y - y.mean((0, 2, 3), keepdim=True)
    return float((y - painted).square().sum() / centred.square().sum())


def l0(z: Tensor) -> float:
    """The mean number of non-zero coefficients of a position of maps (N, K, H, W)."""
    return float((z != 0).sum() / z[:, 0].numel())


def match(first: Tensor, second: Tensor) -> float:
    """The mean cosine of the concepts (K, C) of two dictionaries, matched one to one."""
    cosines = F.normalize(first) @ F.normalize(second).T
    rows, columns = linear_sum_assignment(-cosines.numpy())
    return float(cosines[rows, columns].mean())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("autoencoders", "planted", "memory"))
    parser.add_argument("--model")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--layer")
    parser.add_argument("--images")
    parser.add_argument("--tensor", help="a file of activations (N, C, H, W) instead, torch.save")
    parser.add_argument("--size", type=int, help="side of the images in pixels")
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--mean", type=float, nargs="+")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--order")
    parser.add_argument("--maps", type=int, default=512)
    parser.add_argument("--per-position", type=int, default=16, help="L0")
    parser.add_argument("--autoencoders", nargs="*", default=["topk", "batchtopk"])
    parser.add_argument("--epochs", type=int, help="ours; by default 6, with planted 80")
    parser.add_argument("--sae-epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--batches", type=int, default=100, help="memory: batches to learn from")
    parser.add_argument("--folder", help="memory: where the activations are kept until it ends")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
