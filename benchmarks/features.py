"""Compare learned features by the accuracy of a linear classifier on them.

python benchmarks/features.py                            digits, 500 to learn from, 500 of others
python benchmarks/features.py --dataset shifted --grid 1
python benchmarks/features.py --dataset fashion --train 10000 --test 10000 --steps contrast
python benchmarks/features.py --dataset fashion --train 60000 --test 10000 --steps whiten --maps 128
    --size 6 --grid 7 --split-signs --methods pixels patches kmeans random-patches --repeats 1

Each method (benchmarks/baselines.py) sees the same preprocessed images, learns its filters without
labels from the first --learn training images, and computes maps. The features are the means, or
with --pooling max the maxima, of the magnitudes of the maps in the cells of a grid, raised to the
power 1 or 1/2 and divided by their maxima in training. With --split-signs, positive and negative
coefficients have cells of their own, where a method has both. The classifier is a linear SVM
(benchmarks/linear_svm.py) with C of 0.001, 0.01, 0.1, 1 or 10. Power and C are those that are best
on the last fifth of (at most the first 3000) training images after training on the rest; the test
images are used once. `pixels` are the images themselves. The features of all images are in memory
once, in float32: 3.5 GB for 70,000 images, 128 maps of both signs and 7x7 cells.

- digits    scikit-learn's digits, 8x8, in their order, so that the test has other writers
- shifted   the same, each at a random place of 13x13 pixels
- fashion   Fashion-MNIST, 28x28, as IDX files in --root. Debian's package dataset-fashion-mnist
            installs them in /usr/share/datasets/fashion-mnist;
            torchvision.datasets.FashionMNIST("data", download=True) in data/FashionMNIST/raw

Prints a table, and writes all results to --output.
"""

from __future__ import annotations

import argparse
import gzip
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import baselines
import numpy as np
import timing
import torch
from baselines import Method
from linear_svm import LinearSVM
from sklearn.datasets import load_digits
from torch import Tensor

from deconvnet.applications.classification.grid_features import POOLINGS, grid_features
from deconvnet.images.preprocessing import STEPS, PreprocessingSettings
from deconvnet.monitoring.strict_json import to_json
from deconvnet.support.devices import torch_device

DATASETS = ("digits", "shifted", "fashion")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

C = (0.001, 0.01, 0.1, 1.0, 10.0)
POWERS = (1.0, 0.5)
VALIDATION = 3000
# Images whose maps are in memory at a time.
IMAGES_AT_A_TIME = 256

Images = tuple[Tensor, np.ndarray]
Build = Callable[[argparse.Namespace, int], Method]


def _common_arguments(options: argparse.Namespace, seed: int) -> dict:
    return dict(seed=seed, preprocessing=options.preprocessing, device=options.device)


def _filters(kind: type, *, rectified: bool) -> Build:
    def build(options: argparse.Namespace, seed: int) -> Method:
        arguments = dict(_common_arguments(options, seed), rectified=rectified)
        arguments |= dict(lam=options.lam, epochs=options.epochs)
        return kind(options.maps, options.size, **arguments)

    return build


def _patches(options: argparse.Namespace, seed: int) -> Method:
    arguments = dict(_common_arguments(options, seed), epochs=options.patch_epochs)
    net = baselines.patch_layer(options.maps, options.size, **arguments)
    return baselines.SparseMaps(net, seed=seed)


def _pca(options: argparse.Namespace, seed: int) -> Method:
    """At most one component for each pixel of a patch."""
    maps = min(options.maps, options.size**2)
    return baselines.PatchPCA(maps, options.size, **_common_arguments(options, seed))


def _white_patches(kind: type) -> Build:
    def build(options: argparse.Namespace, seed: int) -> Method:
        return kind(options.maps, options.size, **_common_arguments(options, seed))

    return build


def _autoencoder(options: argparse.Namespace, seed: int) -> Method:
    arguments = dict(_common_arguments(options, seed), epochs=options.epochs)
    return baselines.Autoencoder(options.maps, options.size, **arguments)


METHODS: dict[str, Build | None] = {
    "pixels": None,
    "deconvnet": _filters(baselines.LearnedFilters, rectified=False),
    "deconvnet-rectified": _filters(baselines.LearnedFilters, rectified=True),
    "patches": _patches,
    "random": _filters(baselines.RandomFilters, rectified=False),
    "random-rectified": _filters(baselines.RandomFilters, rectified=True),
    "dictionary": _filters(baselines.PatchDictionary, rectified=False),
    "dictionary-rectified": _filters(baselines.PatchDictionary, rectified=True),
    "pca": _pca,
    "kmeans": _white_patches(baselines.KMeansMaps),
    "random-patches": _white_patches(baselines.RandomPatches),
    "autoencoder": _autoencoder,
}


def main(command_line: Sequence[str] | None = None) -> None:
    options = arguments(command_line)
    torch.set_num_threads(options.threads)
    try:
        train, test = images_of(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = {
        "command": " ".join(sys.argv),
        "machine": timing.machine(),
        "device": str(options.device),
        "train": len(train[0]),
        "test": len(test[0]),
        "results": {},
    }
    print(f"{HEAD}\n{'|---' * HEAD.count(' | ')}|---|", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.methods:
        # Nothing is random with pixels.
        seeds = range(options.repeats if METHODS[name] else 1)
        runs = [measure(name, train, test, options, seed) for seed in seeds]
        results["results"][name] = runs
        print(row(name, runs), flush=True)
        options.output.write_text(to_json(results, indent=1))
    print(f"\n{options.output}")


def arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="digits")
    add("--root", type=Path, help="folder of the IDX files of fashion")
    add("--train", type=int, default=500, help="training images (default 500)")
    add("--test", type=int, default=500, help="test images (default 500)")
    add(
        "--learn",
        type=int,
        default=1000,
        help="training images that filters are learned from (default 1000)",
    )
    add("--maps", type=int, default=32, help="filters (default 32)")
    add("--size", type=int, default=5, help="their side in pixels (default 5)")
    add(
        "--lam",
        type=float,
        default=2.0,
        help="lam of sparse inference: larger is denser (default 2)",
    )
    add("--epochs", type=int, default=5, help="of deconvnet and autoencoder (default 5)")
    add("--patch-epochs", type=int, default=2, help="of patches (default 2)")
    add(
        "--grid",
        type=int,
        nargs="+",
        default=[4],
        help="cells along a side; several: a pyramid (4)",
    )
    add("--pooling", choices=POOLINGS, default="mean", help="of a cell (default mean)")
    add(
        "--split-signs",
        action="store_true",
        help="features of positive and of negative coefficients",
    )
    add("--steps", nargs="*", default=["mean"], help=f"preprocessing: {', '.join(STEPS)} (mean)")
    add("--methods", nargs="+", default=list(METHODS), help=f"some of {', '.join(METHODS)} (all)")
    add("--repeats", type=int, default=3, help="draws of filters: seeds 0, 1, ... (default 3)")
    add("--device", default="cpu", help="auto, cpu or cuda (default cpu)")
    add("--threads", type=int, default=2, help="threads of the CPU (default 2)")
    add("--output", type=Path, help="default runs/benchmark/features-<dataset>.json")
    options = parser.parse_args(command_line)
    if wrong := set(options.methods) - set(METHODS):
        parser.error(f"--methods {' '.join(sorted(wrong))}: choose from {', '.join(METHODS)}")
    for key in ("train", "test", "learn", "repeats", "threads"):
        if getattr(options, key) < (2 if key == "train" else 1):
            parser.error(f"--{key} {getattr(options, key)}: must be at least 1 (train: 2)")
    try:
        options.preprocessing = PreprocessingSettings(color="grey", steps=options.steps)
        options.device = torch_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    options.output = options.output or Path(f"runs/benchmark/features-{options.dataset}.json")
    return options


def images_of(options: argparse.Namespace) -> tuple[Images, Images]:
    """The first training and test images (N, 1, H, W) in [0, 1], with their labels."""
    if options.dataset == "fashion":
        parts = fashion(options.root, "train"), fashion(options.root, "t10k")
    else:
        images, labels = digits(shifted=options.dataset == "shifted")
        first = options.train
        parts = (images[:first], labels[:first]), (images[first:], labels[first:])
    counts = {"train": options.train, "test": options.test}
    for (key, number), (images, _) in zip(counts.items(), parts, strict=True):
        if len(images) < number:
            raise ValueError(
                f"{key}={number}: {options.dataset} has only {len(images)} images for it"
            )
    return tuple(
        (images[:number], labels[:number])
        for number, (images, labels) in zip(counts.values(), parts, strict=True)
    )


def digits(*, shifted: bool = False) -> Images:
    """The 1797 digits of scikit-learn, 8x8, or each at a random place of 13x13 pixels."""
    loaded = load_digits()
    images = loaded.images / 16
    if shifted:
        places = np.random.RandomState(0).randint(0, 6, (len(images), 2))
        large = np.zeros((len(images), 13, 13))
        for image, digit, (i, j) in zip(large, images, places, strict=True):
            image[i : i + 8, j : j + 8] = digit
        images = large
    return torch.from_numpy(images).float()[:, None], loaded.target


def fashion(root: Path | None, part: str) -> Images:
    """Fashion-MNIST, 28x28, from its IDX files; part: train (60,000) | t10k (10,000)."""
    folders = [root, root / "FashionMNIST" / "raw"] if root else [Path("data/FashionMNIST/raw")]
    folders += [] if root else [DEBIAN]
    for folder in folders:
        files = [
            folder / f"{part}-{kind}-idx{axes}-ubyte"
            for kind, axes in (("images", 3), ("labels", 1))
        ]
        files = [path if path.is_file() else path.with_name(path.name + ".gz") for path in files]
        if all(path.is_file() for path in files):
            images, labels = (read_idx(path) for path in files)
            return torch.from_numpy(images).float()[:, None] / 255, labels
    raise ValueError(
        f"root={folders[0]}: no {part}-images-idx3-ubyte[.gz] with its labels; Debian has them in "
        'dataset-fashion-mnist, torchvision in FashionMNIST("data", download=True)'
    )


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file, gzipped or not, in its shape."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    axes = data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data, ">u4", axes, 4) if len(data) >= 4 + 4 * axes else [0]
    numbers = np.frombuffer(data, np.uint8, offset=min(4 + 4 * axes, len(data)))
    if data[:3] != b"\0\0\x08" or len(numbers) != np.prod(shape):
        raise ValueError(f"{path}: not an IDX file of bytes, or cut off; fetch it again")
    return numbers.reshape(shape).copy()


def measure(name: str, train: Images, test: Images, options: argparse.Namespace, seed: int) -> dict:
    """The accuracy of a method with one seed, its power and C, and its seconds."""
    build, (images, labels) = METHODS[name], train
    if build is None:
        known, unknown = (part[0].flatten(1).clone() for part in (train, test))
        fitted = seconds = 0.0
        density = None
    else:
        started = time.perf_counter()
        method = build(options, seed).fit(images[: options.learn])
        fitted = time.perf_counter() - started
        started = time.perf_counter()
        (known, density), (unknown, _) = (
            features(method, part[0], options) for part in (train, test)
        )
        seconds = (time.perf_counter() - started) / (len(images) + len(test[0]))
    chosen = choose(known, labels)
    size = known.shape[1]
    score = accuracy(known, labels, unknown, test[1], **chosen)
    return dict(
        seed=seed,
        accuracy=score,
        **chosen,
        features=size,
        fit_seconds=fitted,
        seconds_per_image=seconds,
        density=density,
    )


def features(method: Method, images: Tensor, options: argparse.Namespace) -> tuple[Tensor, float]:
    """(N, K * cells), pooled from the maps of a method, and the fraction of non-zero values in the
    maps; twice as many if signs are split.
    """
    split_signs = options.split_signs and method.signed
    pooled, non_zero, coefficients = None, 0, 0
    for start in range(0, len(images), IMAGES_AT_A_TIME):
        part = slice(start, start + IMAGES_AT_A_TIME)
        z = method.maps(images[part])
        non_zero, coefficients = non_zero + int(torch.count_nonzero(z)), coefficients + z.numel()
        rows = grid_features(z, options.grid, pooling=options.pooling, split_signs=split_signs)
        if pooled is None:
            # Room for all, so that their parts are never in memory beside them.
            pooled = torch.empty(len(images), rows.shape[1])
        pooled[part] = rows.cpu()
    return pooled, non_zero / coefficients


def choose(known: Tensor, labels: np.ndarray) -> dict:
    """The power and the C that are best on the last fifth of (the first) training images."""
    known, labels = known[:VALIDATION], labels[:VALIDATION]
    split = len(known) - max(1, len(known) // 5)
    scores = {}
    for power in POWERS:
        train, test = scaled(known[:split].clone(), known[split:].clone(), power)
        svm = None
        for c in C:
            svm = LinearSVM.fit(train, labels[:split], C=c, start=svm)
            scores[power, c] = svm.score(test, labels[split:])
    power, c = max(scores, key=scores.get)
    return dict(power=power, c=c)


def accuracy(
    known: Tensor, labels: np.ndarray, unknown: Tensor, truth: np.ndarray, *, power: float, c: float
) -> float:
    """The share of test images whose class is right. Changes both features."""
    known, unknown = scaled(known, unknown, power)
    return LinearSVM.fit(known, labels, C=c).score(unknown, truth)


def scaled(known: Tensor, unknown: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Features >= 0 raised to a power and divided by their maxima in training, in their own
    memory.
    """
    if power == 0.5:
        known, unknown = known.sqrt_(), unknown.sqrt_()
    largest = known.amax(0)
    largest[largest == 0] = 1
    return known.div_(largest), unknown.div_(largest)


HEAD = "| method | accuracy | power | C | features | density | learning | per image |"


def row(name: str, runs: list[dict]) -> str:
    """One line of the table: the mean over the draws, and the lowest and highest value."""
    scores = [run["accuracy"] for run in runs]
    accuracy = f"{statistics.mean(scores):.1%}"
    if len(scores) > 1:
        accuracy += f" ({min(scores):.1%} to {max(scores):.1%})"
    chosen = [", ".join(f"{v:g}" for v in sorted({r[k] for r in runs})) for k in ("power", "c")]
    if runs[0]["density"] is None:
        return f"| {name} | {accuracy} | {' | '.join(chosen)} | {runs[0]['features']} | | | |"
    density, fit, each = (
        statistics.mean(run[key] for run in runs)
        for key in ("density", "fit_seconds", "seconds_per_image")
    )
    cost = f"{density:.1%} | {fit:.1f} s | {1000 * each:.2f} ms"
    return f"| {name} | {accuracy} | {' | '.join(chosen)} | {runs[0]['features']} | {cost} |"


if __name__ == "__main__":
    main()
