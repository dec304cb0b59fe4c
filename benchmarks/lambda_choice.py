"""The lambda that chooses itself: how much worse is it than the best, and what does the path cost?

Six grey photographs of scikit-image, at half their size, get white noise of 15, 25 and 50 grey
levels. Their low frequencies are removed (Tikhonov), the rest is coded with 48 filters of 8x8 that
were learned from other photographs, and the reconstruction is added to the low frequencies. For
each criterion of `choose_lam` the table gives the PSNR with its lam minus the best PSNR on the
path of 20 lams, in dB (positive: between two lams of the path). Then it compares the CPU time of
the path with that of its densest code from zero, measured in turn.

    python benchmarks/lambda_choice.py [--picture docs/coding-lambda.png]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from restoration import cut, images_of, psnr_clipped, training_photographs, with_noise
from torch import Tensor

from deconvnet import (
    LamChoice,
    LearningSettings,
    choose_lam,
    learn_filters,
    regularization_path,
    sparse_code,
)
from deconvnet.images.highpass import tikhonov_lowpass
from deconvnet.monitoring.monitor import save_picture
from deconvnet.operators.convolution import deconvolve
from deconvnet.visualization.drawing.canvas import hstack, with_title
from deconvnet.visualization.drawing.charts import line_chart

PSI = 4.0
TRAINING_NOISE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sigmas", nargs="+", type=float, default=[15, 25, 50])
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--quick", action="store_true", help="one photograph, one noise level")
    parser.add_argument("--picture", type=Path, help="draw the curves of one photograph here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    photographs = images_of("photographs")
    if options.quick:
        photographs, options.sigmas = {"camera": photographs["camera"]}, options.sigmas[:1]
    f = learned_filters()
    print("| noise | photograph | best PSNR | held out | SURE | path / densest |")
    print("|---|---|---|---|---|---|")
    for level in options.sigmas:
        losses: dict[str, list[float]] = {"held out": [], "SURE": []}
        for name, noisy in with_noise(photographs, level / 255).items():
            clean, b = photographs[name], highpass(noisy)
            choices = {
                "held out": choose_lam(b, f),
                "SURE": choose_lam(b, f, noise=level / 255, preprocess=highpass),
            }
            ratio, curve = timed_path(b, f, clean, noisy)
            best = max(curve)
            for key, choice in choices.items():
                losses[key].append(denoised_psnr(f, b, choice.lam, clean, noisy) - best)
            cells = " | ".join(f"{losses[key][-1]:+.3f}" for key in losses)
            print(f"| {level:g} | {name} | {best:.2f} | {cells} | {ratio:.2f} |", flush=True)
            if options.picture and (level, name) == (options.sigmas[0], next(iter(photographs))):
                save_picture(options.picture, picture(choices, curve))
        means = " | ".join(f"{statistics.mean(loss):+.3f}" for loss in losses.values())
        print(f"| {level:g} | mean | | {means} | |", flush=True)


def learned_filters() -> Tensor:
    """48 filters of 8x8 from photographs that are not denoised here."""
    crops = torch.cat([cut(highpass(image)) for image in training_photographs()])
    return learn_filters(
        *(crops[::2], 48, 8), lam=1 / TRAINING_NOISE, learning=LearningSettings(epochs=6)
    ).filters


def highpass(y: Tensor) -> Tensor:
    return y - tikhonov_lowpass(y, PSI)


def denoised_psnr(f: Tensor, b: Tensor, lam: float, clean: Tensor, noisy: Tensor) -> float:
    return psnr_clipped(clean, noisy - sparse_code(b, f, lam=lam).residual)


def timed_path(b: Tensor, f: Tensor, clean: Tensor, noisy: Tensor) -> tuple[float, list[float]]:
    """(CPU time of the path over that of its densest code alone, PSNR along the path)."""
    times: dict[str, list[float]] = {"path": [], "densest": []}
    for _ in range(2):
        started = time.process_time()
        path = regularization_path(b, f, events=True)
        times["path"].append(time.process_time() - started)
        started = time.process_time()
        sparse_code(b, f, lam=float(path.lam[-1]))
        times["densest"].append(time.process_time() - started)
    low = noisy - b
    curve = [psnr_clipped(clean, low + deconvolve(codes.maps(), f)) for codes in path.events]
    return min(times["path"]) / min(times["densest"]), curve


def picture(choices: dict[str, LamChoice], psnrs: list[float]) -> Tensor:
    """The criteria and the PSNR over lam, side by side."""
    path = choices["SURE"].path
    charts = [
        line_chart(
            choice.path.lam.log10(),
            [(key, 1e4 * choice.errors.mean(1))],
            xlabel="log10 lam",
            ylabel="error x 10^4",
            legend=False,
        )
        for key, choice in choices.items()
    ]
    truth = line_chart(
        *(path.lam.log10(), [("PSNR", torch.tensor(psnrs))]),
        xlabel="log10 lam",
        ylabel="dB",
        legend=False,
    )
    titles = [f"{key}: lam {choice.lam:.3g}" for key, choice in choices.items()]
    titles.append(f"PSNR: best at lam {float(path.lam[psnrs.index(max(psnrs))]):.3g}")
    return hstack([with_title(*pair) for pair in zip(titles, [*charts, truth], strict=True)])


if __name__ == "__main__":
    main()
