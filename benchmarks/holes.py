"""Measure the filters learned from images with holes against those learned from whole images.

python benchmarks/holes.py                          half of the pixels missing, 32 filters of 8x8
python benchmarks/holes.py --missing 0.5 0.8
python benchmarks/holes.py --crops 65               more images to learn from

The images are the high-passed crops of 128x128 with the most contrast of five photographs in
scikit-image's wheel (benchmarks/problems.py); every other one is held out for testing. Pixels of
the others are removed at random, or in squares of 16x16 pixels. The test crops are whole: their
objective under the learned filters, at one lam, is compared with that under filters from whole
images. lam is divided by the fraction of pixels that are seen while learning, so that a coefficient
costs as much relative to the error of its filter as without holes. For comparison, the same images
are learned without a mask, with the missing pixels set to zero or interpolated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import problems
import torch
from torch import Tensor

from deconvnet import LearningSettings, learn_filters, sparse_code
from deconvnet.images.holes import fill_holes

SQUARE = 16


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    spec = problems.LEARNING.tiny() if options.quick else problems.LEARNING
    names, count = problems.CODED + problems.OTHERS, 4 if options.quick else options.crops
    crops = torch.from_numpy(problems.crops(names, count, spec.pixels, spec.channels))
    train, test = crops[::2].contiguous(), crops[1::2].contiguous()
    lam, epochs = 1 / spec.weight, 2 if options.quick else options.epochs

    def held_out(
        images: Tensor, seed: int, *, mask: Tensor | None = None, lam_seen: float
    ) -> float:
        """The objective of the test images under filters that are learned from some images."""
        learned = learn_filters(
            images,
            spec.maps,
            spec.size,
            lam=lam_seen,
            mask=mask,
            learning=LearningSettings(epochs=epochs),
            seed=seed,
        )
        return float(sparse_code(test, learned.filters, lam=lam).objective.sum())

    problem = f"{len(train)} crops of {spec.pixels}x{spec.pixels}, {spec.maps} filters"
    print(f"{problem}, {epochs} epochs; objective of the test images / that from whole images")
    for seed in range(options.seeds):
        whole = held_out(train, seed, lam_seen=lam)
        print(f"seed {seed}, whole images: {whole:.1f}", flush=True)
        for missing in options.missing:
            for kind, seen in (
                ("random pixels", random_pixels(train, missing, seed)),
                ("squares", squares(train, missing, seed)),
            ):
                share = float(seen.float().mean())
                holes = train.where(seen, torch.nan)
                ratios = {
                    "with a mask": held_out(holes, seed, mask=seen, lam_seen=lam / share),
                    "set to zero": held_out(train * seen, seed, lam_seen=lam / share),
                    "interpolated": held_out(fill_holes(holes, seen), seed, lam_seen=lam),
                }
                text = ", ".join(f"{name} {value / whole:.4f}" for name, value in ratios.items())
                print(f"  {1 - share:.0%} missing, {kind}: {text}", flush=True)


def random_pixels(images: Tensor, missing: float, seed: int) -> Tensor:
    """(N, 1, H, W): whether a pixel is seen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images[:, :1].shape, generator=generator) >= missing


def squares(images: Tensor, missing: float, seed: int) -> Tensor:
    """(N, 1, H, W): as `random_pixels`, with the squares of a grid removed at random."""
    N, _, H, W = images.shape
    blocks = images.new_empty(N, 1, -(-H // SQUARE), -(-W // SQUARE))
    seen = random_pixels(blocks, missing, seed)
    return seen.repeat_interleave(SQUARE, 2).repeat_interleave(SQUARE, 3)[..., :H, :W]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--missing", type=float, nargs="+", default=[0.5], help="fractions of missing pixels"
    )
    parser.add_argument(
        "--crops", type=int, default=40, help="half of them to learn from; up to 65"
    )
    parser.add_argument("--epochs", type=int, default=20, help="passes over the images")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions")
    parser.add_argument("--quick", action="store_true", help="tiny, to check that it runs")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
