"""Does inference through two layers together remove more noise than layer 1 alone?

    python benchmarks/joint_inference.py runs/denoise-rgb --images photos

White noise is added to centre crops of photographs, and their low frequencies are set apart as in
`deconvnet denoise`. All forms are one pass without lattices, so that they can be compared:

- layer 1: y ~ F_1 z_1, with the threshold t sigma;
- layer 2: R_2 z_2, where z_2 explains the pooled maps of layer 1, or these maps and the image
  (`target: both`); and the mean of this image and that of layer 1;
- mean: the prior of layer 1 becomes |z_1 - a m|, where m = U F_2 z_2 is what layer 2 expects;
- weights: the prior of layer 1 becomes |z_1| / (1 + |v| / eps), where v are the maps of layer 1
  themselves (Candes, Wakin and Boyd 2008), m, or their mean; also with z_2 inferred again from the
  new z_1;
- sum: y ~ F_1 z_1 + R_2 z_2, each inferred from what the other leaves.

Each form has its parameters chosen on the very images that it is measured on, which flatters those
with more parameters than layer 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from deconvnet import DeconvNet, SolverSettings, load, sparse_code
from deconvnet.images.datasets import load_images
from deconvnet.images.highpass import tikhonov_lowpass
from deconvnet.images.preprocessing import to_color
from deconvnet.images.sources import DataSettings
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.metrics import psnr
from deconvnet.operators.linear import Identity, LinearOperator, Scaling, Unpooling, VerticalStack
from deconvnet.operators.pooling import max_pool
from deconvnet.sparse_coding.solve import solve

SOLVER = SolverSettings("coordinate", iterations=25, tolerance=1e-3)
THROUGH = SolverSettings("fista", iterations=60, tolerance=1e-3)
# The smoothness of the low frequencies, as in `deconvnet denoise`.
PSI = 4.0
THRESHOLDS = (1.2, 1.5, 1.8, 2.2, 2.6)
LAMS, SHIFTS, EPSILONS = (1.5, 5.0, 15.0), (0.5, 1.0, 1.5), (0.1, 0.3, 1.0)
# Estimates in the unit range, and what they depend on.
Results = Iterator[tuple[str, str, Tensor]]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    clean = photographs(options)
    generator = torch.Generator().manual_seed(0)
    sigma = options.sigma / 255
    noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
    denoising = Denoising(load(options.run).eval(), clean, noisy, sigma)
    best: dict[str, tuple[float, str]] = {}
    for form, parameters, estimate in denoising.results():
        found = float(psnr(denoising.clean, estimate).mean()), parameters
        best[form] = max(found, best.get(form, found))
    print(f"| {len(clean)} crops, {options.sigma:g} grey levels | PSNR | with |\n|---|---|---|")
    for form, (value, parameters) in best.items():
        print(f"| {form} | {value:.2f} dB | {parameters} |")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "joint_inference.json"
    path.write_text(to_json({"command": " ".join(sys.argv), "best": best}, indent=1))
    print(f"\n{path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run of +experiment=denoise")
    parser.add_argument("--images", required=True, help="folder of photographs not seen by it")
    parser.add_argument("--number", type=int, default=6, help="of images (default 6)")
    parser.add_argument("--size", type=int, default=96, help="of the crops (default 96)")
    parser.add_argument("--sigma", type=float, default=25, help="noise in grey levels (25)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (default 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/joint_inference"))
    return parser.parse_args()


def photographs(options: argparse.Namespace) -> Tensor:
    """Centre crops (N, 3, size, size) in [0, 1]."""
    data = DataSettings(
        source="folder", path=options.images, size=options.size, max_images=options.number
    )
    return load_images(data).images


@dataclass
class Denoising:
    """Estimates of clean images (N, 3, H, W) from noisy ones, by layers 1 and 2 of a network.

    The clean images only choose the threshold of layer 1 from which other forms begin.
    """

    net: DeconvNet
    clean: Tensor
    noisy: Tensor
    sigma: float

    def __post_init__(self) -> None:
        color = self.net.preprocessing.settings.color
        self.clean, self.noisy = to_color(self.clean, color), to_color(self.noisy, color)
        self.low = tikhonov_lowpass(self.noisy, PSI)
        self.y = self.noisy - self.low
        self.first, self.second = self.net.layer(1), self.net.layer(2)
        self.F1, self.F2 = self.first.operator(), self.second.operator()

    def results(self) -> Results:
        for t, z1 in self.layer1.items():
            yield "layer 1", f"t {t}", self.image(self.F1(z1))
        z1 = self.layer1[self.best]
        yield from self.by_weights("own maps", z1, z1.abs())
        for lam in LAMS:
            m = self.expected(z1, lam)
            yield from self.by_layer2(z1, m, lam)
            yield from self.by_mean(m, lam)
            yield from self.by_weights("layer 2", z1, m.abs(), lam)
            yield from self.by_weights("both", z1, (z1.abs() + m.abs()) / 2, lam)
            yield from self.by_sum(z1, lam)

    @cached_property
    def layer1(self) -> dict[float, Tensor]:
        """z_1 for each threshold."""
        return {t: self.code(self.y, t) for t in THRESHOLDS}

    @cached_property
    def best(self) -> float:
        """The best threshold of layer 1."""
        scores = {t: psnr(self.clean, self.image(self.F1(z))) for t, z in self.layer1.items()}
        return max(scores, key=lambda t: float(scores[t].mean()))

    def image(self, y: Tensor) -> Tensor:
        return (self.low + y).clamp(0, 1)

    def code(self, y: Tensor, t: float, weights: Tensor | None = None) -> Tensor:
        """z_1 of what it is to explain, with the threshold t sigma."""
        f, boundary = self.first.filters, self.first.settings.boundary
        lam = 1 / (t * self.sigma)
        given = dict(lam=lam, boundary=boundary, weights=weights, settings=SOLVER)
        return sparse_code(y, f, **given).z

    def above(self, z1: Tensor) -> tuple[Tensor, LinearOperator, LinearOperator]:
        """(b, U, R): the input of layer 2, and what takes it, and z_2, to z_1 and to the image."""
        pooled, switches = max_pool(z1, tuple(self.first.settings.pool))
        scale = float(self.second.scale)
        U = Unpooling(switches, tuple(z1.shape[1:])) @ Scaling(scale)
        return pooled / scale, U, self.F1 @ U @ self.F2

    def expected(self, z1: Tensor, lam: float) -> Tensor:
        """m = U F_2 z_2, the maps of layer 1 that layer 2 expects."""
        b, U, _ = self.above(z1)
        z2 = solve(self.F2, b, lam=lam, settings=SOLVER).z
        return U(self.F2(z2))

    def by_layer2(self, z1: Tensor, m: Tensor, lam: float) -> Results:
        below, with_ = self.F1(z1), f"lam {lam}"
        b, U, R = self.above(z1)
        R2z2 = self.F1(m)
        yield "layer 2", with_, self.image(R2z2)
        yield "layer 2, mean with layer 1", with_, self.image((R2z2 + below) / 2)
        stack = VerticalStack([Identity(), self.F1 @ U], [1.0, 1.0], [b.shape, self.y.shape])
        both = stack @ self.F2, stack.join([b, self.y])
        R2z2 = R(solve(*both, lam=lam, settings=THROUGH).z)
        yield "layer 2, target both", with_, self.image(R2z2)
        yield "layer 2, target both, mean with layer 1", with_, self.image((R2z2 + below) / 2)

    def by_mean(self, m: Tensor, lam: float) -> Results:
        for a, t in itertools.product(SHIFTS, THRESHOLDS):
            z1 = a * m + self.code(self.y - self.F1(a * m), t)
            yield "mean", f"t {t}, lam {lam}, a {a}", self.image(self.F1(z1))

    def by_weights(self, kind: str, z1: Tensor, v: Tensor, lam: float | None = None) -> Results:
        for eps, t in itertools.product(EPSILONS, THRESHOLDS):
            with_ = f"t {t}, eps {eps}" + (f", lam {lam}" if lam else "")
            z1 = self.code(self.y, t, weights=1 / (1 + v / eps))
            yield f"weights, {kind}", with_, self.image(self.F1(z1))
            if kind == "layer 2":
                again = self.expected(z1, lam).abs()
                z1 = self.code(self.y, t, weights=1 / (1 + again / eps))
                yield "weights, layer 2, two rounds", with_, self.image(self.F1(z1))

    def by_sum(self, z1: Tensor, lam: float) -> Results:
        _, _, R = self.above(z1)
        for t in THRESHOLDS[1:4]:
            z2 = None
            for _ in range(3):
                # lam weighs the error of maps of layer 1, which cost t sigma.
                weight = 1 / (t * self.sigma * lam)
                z2 = solve(R, self.y - self.F1(z1), lam=weight, settings=THROUGH, state=z2).z
                z1 = self.code(self.y - R(z2), t)
            yield "sum", f"t {t}, lam {lam}", self.image(self.F1(z1) + R(z2))


if __name__ == "__main__":
    main()
