"""What is each layer of a trained network worth, on images that it has not seen?

    python benchmarks/depth.py runs/iccv2011 --images photos
    python benchmarks/depth.py runs/iccv2011 --images photos --classes caltech --train 30

For every layer the table gives

- the SNR of the image reconstructed from its maps, as inferred with the layer's own settings, and
  the percentage of coefficients that are not zero;
- the share of the image's energy that it explains with equally many non-zero coefficients, given
  for each 1,000 pixels of an image. The maps are those of the convex problem
  min lam/2 ||y - R z||^2 + sum |z| for lams that fall until there are enough coefficients; between
  two lams the share is interpolated. The switches of the layers below are those that were inferred
  with the layers' own settings, so upper layers get them for nothing: switches are not counted;
- the PSNR of images denoised up to this layer (`deconvnet denoise depth=...`), if the network is
  grey or rgb;
- with --classes, a folder with a folder of images for each class, the accuracy of
  `deconvnet classify` with this layer alone, and with it and all layers below.

With images of the training set, the difference from others tells whether a layer memorises:

    python benchmarks/depth.py runs/iccv2011 --images photos --training
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deconvnet import DeconvNet, SolverSettings, load
from deconvnet.applications.restoration.restorer import Restorer
from deconvnet.cli.commands import run
from deconvnet.cli.restore import fit_restorer
from deconvnet.images.datasets import load_images
from deconvnet.images.sources import DataSettings
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.codes import Codes
from deconvnet.network.metrics import psnr
from deconvnet.operators.linear import LinearOperator
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.regularization_path import lams_of_path, solutions_along
from deconvnet.training.run_folder import training_data

# The path of lams for each layer: each is this times the one before it.
STEP = 1.5
MOST_LAMS = 16
PATH_SOLVER = SolverSettings("fista", iterations=60, tolerance=1e-3)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    net = load(options.run).eval()
    y, frames = images_of(options, options.images)
    columns = {"new images": table_of(net, y, frames, options)}
    if options.training:
        y, frames = images_of(options, None)
        columns["training images"] = table_of(net, y, frames, options)
    results = {"command": " ".join(sys.argv), "layers": columns}
    if options.classes:
        results["classes"] = accuracies(options, net.depth)
    for title, rows in columns.items():
        print(f"\n{title}\n" + markdown(rows))
    if options.classes:
        print("\n" + markdown(results["classes"]))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "depth.json"
    path.write_text(to_json(results, indent=1))
    print(f"\n{path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder or network file")
    parser.add_argument("--images", required=True, help="folder of images that it has not seen")
    parser.add_argument("--training", action="store_true", help="compare with training images")
    parser.add_argument("--number", type=int, default=12, help="of images (default 12)")
    parser.add_argument("--size", type=int, help="side of the images (default: as in training)")
    parser.add_argument(
        "--non-zeros", nargs="+", type=float, default=[1, 3, 10, 30],
        help="coefficients for 1,000 pixels (default 1 3 10 30)",
    )  # fmt: skip
    parser.add_argument("--sigma", type=float, default=25, help="noise in grey levels (25)")
    parser.add_argument("--classes", help="folder with a folder of images for each class")
    parser.add_argument("--train", type=int, default=30, help="training images of a class (30)")
    parser.add_argument("--test", type=int, default=50, help="test images of a class (50)")
    parser.add_argument("--splits", type=int, default=5, help="into training and test (5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (default 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/depth"))
    return parser.parse_args()


def images_of(options: argparse.Namespace, path: str | None) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in [0, 1] and their frames, prepared as in training; path None: some of
    those that the network was trained on.
    """
    data = training_data(options.run)
    if path is None:
        if data is None:
            raise SystemExit(f"--training: {options.run} does not say what it was trained on")
    elif data is None:
        data = DataSettings(source="folder", path=path, size=options.size)
    else:
        data = replace(data, source="folder", path=path, mask=None)
    if options.size:
        data = replace(data, size=options.size)
    loaded = load_images(replace(data, max_images=options.number))
    frames = None if loaded.frames is None else loaded.frames[: options.number]
    return loaded.images[: options.number], frames


def table_of(
    net: DeconvNet, images: Tensor, frames: Tensor | None, options: argparse.Namespace
) -> list[dict]:
    """A row for each layer."""
    codes = net.infer(images, frames=frames)
    denoised = denoised_psnr(net, images, options)
    rows = []
    for number in range(1, net.depth + 1):
        layer = codes.layer(number)
        row = {
            "layer": number,
            "maps": net.layer(number).settings.num_maps,
            "SNR": f"{net.snr(codes, number):.2f} dB",
            "non-zero": f"{100 * layer.density:.2f}%",
        }
        shares = explained(net, codes, number, options.non_zeros)
        for count, share in zip(options.non_zeros, shares, strict=True):
            row[f"{count:g} per 1,000"] = "" if share is None else f"{100 * share:.1f}%"
        if denoised:
            row[f"sigma {options.sigma:g}"] = f"{denoised[number - 1]:.2f} dB"
        rows.append(row)
    return rows


def explained(net: DeconvNet, codes: Codes, number: int, counts: list[float]) -> list[float | None]:
    """The mean share of ||y||^2 explained with `counts` coefficients for 1,000 pixels.

    None where the path ends before.
    """
    prior = Prior(non_negative=net.layer(number).settings.non_negative)
    points = path_points(net.operator(codes, number), codes.y, prior, max(counts))
    return [interpolated(points, count) for count in counts]


def path_points(
    A: LinearOperator, y: Tensor, prior: Prior, most: float
) -> list[tuple[float, float]]:
    """(non-zero coefficients for 1,000 pixels, share explained), for lams from lambda_max on."""
    _, first = lams_of_path(A, y, prior, None, 2, 0.5, 1.0)
    lams = [first * STEP**n for n in range(1, MOST_LAMS + 1)]
    energy = y.double().square().sum((1, 2, 3)).clamp(min=1e-30)
    points = [(0.0, 0.0)]
    for solution in solutions_along(A, y, lams, prior, PATH_SOLVER, 8):
        error = solution.residual.double().square().sum((1, 2, 3))
        non_zeros = int(torch.count_nonzero(solution.z)) / len(y)
        points.append((1000 * non_zeros / y[0, 0].numel(), float((1 - error / energy).mean())))
        if points[-1][0] >= most:
            break
    return points


def interpolated(points: list[tuple[float, float]], x: float) -> float | None:
    """The value at x of the line through the points; None beyond the last."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def denoised_psnr(
    net: DeconvNet, images: Tensor, options: argparse.Namespace
) -> list[float] | None:
    """The mean PSNR of each layer's denoised images."""
    if net.preprocessing.settings.color not in ("rgb", "grey"):
        return None
    clean = images.mean(1, keepdim=True) if net.preprocessing.settings.color == "grey" else images
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    sigma = options.sigma / 255
    restorer = Restorer(net)
    fit_restorer(restorer, options.run, [])  # to the training images, as the command does
    results = restorer.denoise(clean + sigma * noise, sigma, depth=net.depth)
    return [float(psnr(clean, result.clamp(0, 1)).mean()) for result in results]


def accuracies(options: argparse.Namespace, depth: int) -> list[dict]:
    """The accuracy of `deconvnet classify` with each layer alone, and with those below it."""
    rows, folder = [], options.output / "classes"
    for number in range(1, depth + 1):
        sys.argv = [
            "classify", f"run={options.run}", f"data.path={options.classes}",
            f"layers={list(range(1, number + 1))}".replace(" ", ""), f"train={options.train}",
            f"test={options.test}", f"splits={options.splits}", f"output={folder}",
        ]  # fmt: skip
        run("classify", ("deconvnet", "classify"))
        scores = json.loads((folder / "scores.json").read_text())["scores"]
        together = list(scores.values())[-1]
        rows.append(
            {
                "layer": number,
                "accuracy": f"{100 * scores[f'layer {number}']['mean']:.1f}%",
                "with the layers below": f"{100 * together['mean']:.1f}%",
            }
        )
    return rows


def markdown(rows: list[dict]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row.get(key, "")) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
