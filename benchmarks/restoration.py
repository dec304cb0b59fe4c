"""Compare the quality of denoised and inpainted photographs with other methods.

python benchmarks/restoration.py                noise, the paper's experiment, missing pixels
python benchmarks/restoration.py denoise --sigmas 25
python benchmarks/restoration.py --quick        small networks, to check that it runs

Grey photographs of scikit-image, large ones at half their size. Two networks of
+experiment=denoise are each trained on one half of the photographs and on three others that are not
restored, and restore the other half, so that no photograph is restored by a network trained on it.
They are stored in the output folder and used again. The other methods are

- scikit-image's total variation (Chambolle), with the weight that is best on the mean of all the
  photographs at this noise, its wavelets (BayesShrink), non-local means (h = 0.6 sigma), biharmonic
- SPORCO's convolutional denoising as in its example for grey images: its filters G:8x8x128,
  weights 1/c^2 from the correlations c, lambda 0.048 at sigma 0.1 and in proportion to sigma^3.
  --images sporco restores SPORCO's own example images instead.

Results are PSNR in dB of pixels clipped to [0, 1]. Needs SPORCO: pip install -e '.[benchmark]'.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from skimage import data, restoration, transform
from sklearn.datasets import load_sample_images
from torch import Tensor

from deconvnet import load
from deconvnet.applications.restoration.masks import make_mask
from deconvnet.applications.restoration.restorer import Restorer
from deconvnet.cli.reading import read_settings, register
from deconvnet.cli.restore import side_by_side
from deconvnet.monitoring.monitor import Monitor, save_picture
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.metrics import psnr, snr
from deconvnet.network.network import DeconvNet
from deconvnet.training.loop import train
from deconvnet.training.run_folder import RunFolder

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")
SPORCO_IMAGES = ("barbara.png", "kodim23.png", "monarch.png", "sail.png", "tulips.png")
WEIGHTS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)
CROP, CROPS = 96, 96
# Zeiler et al. 2010: sigma 0.25 of images in [-1, 1], cut off.
PAPER = 0.125


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    photographs = images_of(options.images)
    restorers = networks(photographs, options)
    results: dict = {"command": " ".join(os.sys.argv), "photographs": list(photographs)}
    if "denoise" in options.parts:
        results["denoise"] = denoise(photographs, restorers, options)
    if "paper" in options.parts:
        results["paper"] = paper(photographs, restorers, options)
    if "inpaint" in options.parts:
        results["inpaint"] = inpaint(photographs, restorers, options)
    path = options.output / f"restoration-{options.images}-{'-'.join(options.parts)}.json"
    path.write_text(to_json(results, indent=1))
    print(f"\n{path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["denoise", "paper", "inpaint"]
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(parts)}; all of them")
    parser.add_argument(
        "--sigmas", nargs="+", type=float, default=[10, 25, 50], help="in grey levels (10 25 50)"
    )
    parser.add_argument("--depth", type=int, choices=[1, 2], default=2, help="layers (default 2)")
    parser.add_argument("--images", choices=["photographs", "sporco"], default="photographs")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (default 2)")
    parser.add_argument("--quick", action="store_true", help="small networks, one noise level")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark/restoration"),
        help="folder for networks and results (default runs/benchmark/restoration)",
    )  # fmt: skip
    options = parser.parse_args()
    if wrong := set(options.parts) - set(parts):
        parser.error(f"{', '.join(sorted(wrong))}: choose from {', '.join(parts)}")
    options.parts = options.parts or parts
    if options.quick:
        options.output, options.sigmas = options.output / "quick", [25]
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def images_of(kind: str) -> dict[str, Tensor]:
    """Grey (1, 1, H, W) in [0, 1] by name."""
    if kind == "sporco":
        from sporco import util

        folder = Path(util.__file__).parent / "data"
        files = {Path(name).stem: folder / name for name in SPORCO_IMAGES}
        from deconvnet.images.decoding import read_image

        return {name: half(read_image(path).mean(0).numpy()) for name, path in files.items()}
    return {name: half(grey(getattr(data, name)())) for name in PHOTOGRAPHS}


def training_photographs() -> list[Tensor]:
    """Grey photographs (1, 1, H, W) for training only."""
    images = [data.stereo_motorcycle()[0], *load_sample_images().images]
    return [half(grey(image)) for image in images]


def grey(image: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1], from a grey or colour image of bytes."""
    return (image @ np.array([0.2125, 0.7154, 0.0721]) if image.ndim == 3 else image) / 255


def half(image: np.ndarray) -> Tensor:
    """An image at half its size, without odd last rows and columns; small images are unchanged."""
    if min(image.shape) > 350:
        H, W = (side // 2 * 2 for side in image.shape)
        image = transform.downscale_local_mean(image[:H, :W], (2, 2))
    return torch.from_numpy(np.ascontiguousarray(image)).float()[None, None]


def networks(
    photographs: dict[str, Tensor], options: argparse.Namespace
) -> Callable[[str], Restorer]:
    """The restorer for a photograph by name, from a network trained on the other half of them."""
    learned = images_of("photographs")
    halves = [list(learned)[::2], list(learned)[1::2]]
    restorers = []
    for number, names in enumerate(halves):
        crops = torch.cat(
            [cut(image) for image in [*map(learned.get, names), *training_photographs()]]
        )
        chosen = torch.linspace(0, len(crops) - 1, min(CROPS, len(crops))).round().long()
        net = network(crops[chosen].clamp(0, 1), options.output / f"half-{number}", options)
        restorers.append(Restorer(net).fit(crops[chosen]))
    # Images in neither half, such as SPORCO's, are restored by the first network.
    return lambda name: restorers[1 if name in halves[0] else 0]


def cut(image: Tensor) -> Tensor:
    """Crops (N, 1, CROP, CROP) that overlap by half."""
    rows = image.unfold(2, CROP, CROP // 2).unfold(3, CROP, CROP // 2)
    return rows.reshape(1, -1, CROP, CROP).transpose(0, 1)


def network(crops: Tensor, folder: Path, options: argparse.Namespace) -> DeconvNet:
    """The network of configs/experiment/denoise.yaml, learned from grey crops."""
    folder = folder.with_name(f"{folder.name}-depth-{options.depth}")
    small = ["model.layer1.num_maps=16", "model.layer2.num_maps=8"]
    small += [f"model.layer{n}.learning.epochs=1" for n in (1, 2)]
    register()
    with initialize_config_dir(str(Path(__file__).parents[1] / "configs"), version_base="1.3"):
        overrides = ["+experiment=denoise", "preprocessing.color=grey", f"layers={options.depth}"]
        overrides += small if options.quick else []
        settings = read_settings(compose("train", overrides))
    if (folder / "network.safetensors").is_file():
        return load(folder / "network.safetensors")
    net = DeconvNet(settings.layer_settings(), settings.preprocessing, seed=settings.seed)
    net.preprocessing.fit(crops)
    started = time.perf_counter()
    with Monitor(folder) as monitor:
        train(net, crops, RunFolder(folder, {}), monitor)
    print(f"{folder}: learned in {(time.perf_counter() - started) / 60:.1f} minutes")
    return net


def denoise(
    photographs: dict[str, Tensor],
    restorers: Callable[[str], Restorer],
    options: argparse.Namespace,
) -> dict:
    """PSNR by sigma, method and photograph, printed as tables."""
    results = {}
    for level in options.sigmas:
        sigma, table = level / 255, {}
        noisy = with_noise(photographs, sigma)
        table["noisy"] = {name: psnr_clipped(photographs[name], noisy[name]) for name in noisy}
        for method, run in methods(noisy, photographs, sigma).items():
            table[method] = {}
            for name in noisy:
                flat = noisy[name][0, 0].numpy()
                table[method][name] = psnr_clipped(photographs[name], as_image(run(flat)))
        pictures = {}
        for name in noisy:
            layers = restorers(name).denoise(noisy[name], sigma, depth=options.depth)
            for number, layer in enumerate(layers, 1):
                table.setdefault(f"layer {number}", {})[name] = psnr_clipped(
                    photographs[name], layer
                )
            pictures[name] = layers
        show(f"noise of {level:g} grey levels", table)
        results[str(level)] = table
        draw(options.output / f"denoised-{level:g}.png", photographs, noisy, pictures)
    return results


def with_noise(photographs: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: image + sigma * torch.randn(image.shape, generator=generator)
        for name, image in photographs.items()
    }


def methods(
    noisy: dict[str, Tensor], photographs: dict[str, Tensor], sigma: float
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Other denoising methods, functions of an image (H, W), by name."""

    def mean_of_tv(weight: float) -> float:
        return statistics.mean(
            psnr_clipped(
                photographs[name],
                as_image(restoration.denoise_tv_chambolle(image[0, 0].numpy(), weight=weight)),
            )
            for name, image in noisy.items()
        )

    best = max(WEIGHTS, key=mean_of_tv)
    return {
        f"TV, weight {best}": lambda y: restoration.denoise_tv_chambolle(y, weight=best),
        "wavelets": lambda y: restoration.denoise_wavelet(y, sigma=sigma, rescale_sigma=False),
        "non-local means": lambda y: restoration.denoise_nl_means(
            y, h=0.6 * sigma, sigma=sigma, patch_size=5, patch_distance=6, fast_mode=True
        ),
        "SPORCO CSC": lambda y: sporco(y, sigma),
    }


def sporco(y: np.ndarray, sigma: float, margin: int = 8) -> np.ndarray:
    """Convolutional denoising with the settings of SPORCO's example for grey images."""
    from sporco import fft, signal, util
    from sporco.admm import cbpdn

    filters = util.convdicts()["G:8x8x128"].astype(np.float32)
    low, high = signal.tikhonov_filter(y, 5.0, 16)
    _, around = signal.tikhonov_filter(np.pad(y, margin, mode="symmetric"), 5.0, 16)
    shape = around.shape
    spectrum = np.conj(fft.rfftn(filters, shape, (0, 1))) * fft.rfftn(
        around[..., None], None, (0, 1)
    )
    correlation = fft.irfftn(spectrum, shape, (0, 1))
    weight = 1 / np.maximum(correlation**2, 1e-8)
    lmbda = 0.048 * (sigma / 0.1) ** 3
    options = cbpdn.ConvBPDN.Options(
        {
            "MaxMainIter": 250,
            "RelStopTol": 3e-3,
            "AuxVarObj": False,
            "L1Weight": weight.reshape(*shape, 1, 1, -1),
            "AutoRho": {"Enabled": False},
            "rho": 400 * lmbda,
        }
    )
    solver = cbpdn.ConvBPDN(filters, np.pad(high, margin, mode="symmetric"), lmbda, options, dimK=0)
    solver.solve()
    return solver.reconstruct().squeeze()[margin:-margin, margin:-margin] + low


def paper(
    photographs: dict[str, Tensor],
    restorers: Callable[[str], Restorer],
    options: argparse.Namespace,
) -> dict:
    """SNR with the noise of the paper, clipped to the range of the clean image as in the paper."""
    generator, rows = torch.Generator().manual_seed(0), {}
    for name, clean in photographs.items():
        noise = PAPER * torch.randn(clean.shape, generator=generator)
        given = (clean + noise).clamp(float(clean.min()), float(clean.max()))
        layers = restorers(name).denoise(given, PAPER, depth=options.depth)
        images = {"noisy": given, **{f"layer {n}": layer for n, layer in enumerate(layers, 1)}}
        for key, image in images.items():
            rows.setdefault(key, {})[name] = snr(clean, image.clamp(0, 1))
    show("SNR in dB, noise of 0.25 in [-1, 1]; the paper (recalled): 13.84, 16.31, 18.01", rows)
    return rows


def inpaint(
    photographs: dict[str, Tensor],
    restorers: Callable[[str], Restorer],
    options: argparse.Namespace,
) -> dict:
    """PSNR of the inpainted images, by missing pixels, method and photograph."""
    results = {}
    for missing in ("0.5", "0.8", "box"):
        table, masks, pictures = {}, {}, {}
        generator = torch.Generator().manual_seed(0)
        for name, clean in photographs.items():
            mask, _ = make_mask(missing, tuple(clean.shape[2:]), generator)
            masks[name] = mask * clean
            layers = restorers(name).inpaint(clean, mask, depth=options.depth)
            hidden = (mask == 0)[0, 0].numpy()
            smooth = restoration.inpaint_biharmonic(masks[name][0, 0].numpy(), hidden)
            rows = {"biharmonic": as_image(smooth)}
            rows |= {f"layer {n}": layer for n, layer in enumerate(layers, 1)}
            for key, image in rows.items():
                table.setdefault(key, {})[name] = psnr_clipped(clean, image)
            pictures[name] = layers
        show(f"missing: {missing}", table)
        results[missing] = table
        draw(options.output / f"inpainted-{missing}.png", photographs, masks, pictures)
    return results


def draw(
    path: Path,
    photographs: dict[str, Tensor],
    given: dict[str, Tensor],
    layers: dict[str, list[Tensor]],
) -> None:
    """Save a picture of one photograph: damaged, restored by each layer, clean."""
    name = next(iter(photographs))
    columns = {"given": given[name]}
    columns |= {f"layer {n}": layer for n, layer in enumerate(layers[name], 1)}
    labels = [
        (f"{key}\n{psnr_clipped(photographs[name], image):.2f} dB", image)
        for key, image in columns.items()
    ]
    save_picture(path, side_by_side([*labels, ("clean", photographs[name])]))


def as_image(flat: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(flat)).float()[None, None]


def psnr_clipped(clean: Tensor, image: Tensor) -> float:
    return float(psnr(clean, image.clamp(0, 1)))


def show(title: str, table: dict[str, dict[str, float]]) -> None:
    """Print a table with a row for each method, a column for each photograph, and the mean."""
    names = list(next(iter(table.values())))
    print(f"\n## {title}\n\n| | {' | '.join(names)} | mean |\n{'|---' * (len(names) + 2)}|")
    for method, row in table.items():
        cells = " | ".join(f"{row[name]:.2f}" for name in names)
        print(f"| {method} | {cells} | {statistics.mean(row.values()):.2f} |")


if __name__ == "__main__":
    main()
