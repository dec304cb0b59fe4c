"""Learn filters for denoising, by gradients through the sparse code, beside unsupervised ones.

python benchmarks/denoising_filters.py --train CBSD432 --test BSD68 --minutes 120
python benchmarks/denoising_filters.py --train CBSD432 --test BSD68 --minutes 3 --test-images 10

Both folders hold photographs, which are read as grey; those of the repository drorsimon/CSCNet are
datasets/CBSD432 and datasets/BSD68. `patch_denoisers` explains the denoiser. It starts with filters
of `learn_filters`; then Adam minimises the squared error of denoised crops (Mairal, Bach and Ponce
2012, "Task-driven dictionary learning"). It is compared with unsupervised filters, used with the
best of CHOICES as a hard threshold.

--minutes counts the time of the processor, all threads together. Run the same command again to
resume, or to train for longer; Ctrl-C costs at most the steps of half a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from patch_denoisers import ROW, Denoiser, hard_denoised, patches_of
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from deconvnet import LearningSettings, learn_filters
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.metrics import psnr

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
# Hard thresholds in units of the standard deviation of the noise, to choose from on crops.
CHOICES = (2.5, 2.75, 3.0, 3.25, 3.5)
# The norm of a gradient, in units of its running mean, beyond which it is scaled down: supports of
# almost dependent filters give rare large ones.
CLIP = 2.0


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = photographs(options.train, options.train_images)
    tests = [
        centre(image, options.test_crop) for image in photographs(options.test, options.test_images)
    ]
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    filters = unsupervised_filters(images, options.maps, options)
    model = Denoiser(filters, options.sigma / 255)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    steps, seconds = trained(model, images, options)
    scores = {}
    scores["learned for denoising"] = evaluated(
        lambda y: model(y, options.test_stride),
        *(tests, options, folder / f"learned-{steps}.json"),
    )
    filters = unsupervised_filters(images, options.unsupervised_maps, options)
    threshold = chosen_threshold(images, filters, options)
    scores["unsupervised"] = evaluated(
        lambda y: hard_denoised(y, filters, threshold, options.test_stride),
        *(tests, options, folder / "unsupervised.json"),
    )
    given = {key: str(value) for key, value in vars(options).items()}
    results = given | dict(steps=steps, minutes=seconds / 60, threshold=threshold) | scores
    (folder / "results.json").write_text(to_json(results, indent=1))
    for name, values in scores.items():
        print(f"{name}: {sum(values) / len(values):.3f} dB, {len(tests)} images")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--test", type=Path, required=True, help="folder of other photographs")
    parser.add_argument("--train-images", type=int, default=432, help="at most (default 432)")
    parser.add_argument("--test-images", type=int, default=68, help="at most (default 68)")
    parser.add_argument(
        "--test-crop", type=int, default=0, help="side of their central crops (0: whole images)"
    )
    parser.add_argument("--test-stride", type=int, default=1, help="of their patches (default 1)")
    parser.add_argument("--sigma", type=float, default=25.0, help="noise in grey levels (25)")
    parser.add_argument("--patch", type=int, default=8, help="side of the patches (default 8)")
    parser.add_argument("--maps", type=int, default=128, help="number of filters (default 128)")
    parser.add_argument(
        "--unsupervised-maps", type=int, default=512,
        help="number of unsupervised filters to compare with (default 512)",
    )  # fmt: skip
    parser.add_argument("--stride", type=int, default=3, help="of patches in training (default 3)")
    parser.add_argument(
        "--crop", type=int, default=32,
        help="side of training crops: a patch and a multiple of the stride (default 32)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=16, help="crops in a step (default 16)")
    parser.add_argument("--rate", type=float, default=4e-3, help="first learning rate (4e-3)")
    parser.add_argument(
        "--minutes", type=float, default=120.0,
        help="of training, time of the processor (default 120)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (default 2)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark/denoising_filters"),
        help="folder for checkpoint and results (default runs/benchmark/denoising_filters)",
    )  # fmt: skip
    options = parser.parse_args()
    if options.crop < options.patch or (options.crop - options.patch) % options.stride:
        parser.error(
            f"--crop {options.crop}: must be --patch {options.patch} plus a multiple of --stride "
            f"{options.stride}, so that patches cover the crops"
        )
    return options


def photographs(folder: Path, most: int) -> list[Tensor]:
    """Grey images (1, 1, H, W) in [0, 1]: the first of the folder, by name."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return [pil_to_tensor(Image.open(path).convert("L"))[None] / 255 for path in paths[:most]]


def centre(image: Tensor, side: int) -> Tensor:
    """The central crop of this side; the whole image for 0."""
    if not side:
        return image
    top, left = ((size - side) // 2 for size in image.shape[2:])
    return image[:, :, top : top + side, left : left + side]


def crops(images: list[Tensor], number: int, side: int, generator: torch.Generator) -> Tensor:
    """Random crops (number, 1, side, side), mirrored and transposed at random."""
    found = []
    for _ in range(number):
        chosen = int(torch.randint(len(images), (), generator=generator))
        image = images[chosen]
        top, left, turn = torch.rand(3, generator=generator).tolist()
        top, left = int(top * (image.shape[2] - side + 1)), int(left * (image.shape[3] - side + 1))
        crop = image[:, :, top : top + side, left : left + side]
        turn = int(8 * turn)
        crop = crop.transpose(2, 3) if turn & 1 else crop
        found.append(crop.flip([axis for axis, bit in ((2, 2), (3, 4)) if turn & bit]))
    return torch.cat(found)


def unsupervised_filters(images: list[Tensor], maps: int, options: argparse.Namespace) -> Tensor:
    """Unit filters (maps, patch patch, 1, 1), learned from clean patches without their means."""
    path = options.output / f"unsupervised-{maps}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    clean = crops(images, max(300, maps), 4 * options.patch, generator)
    patches = patches_of(clean, options.patch, options.patch // 2 or 1)
    patches = (patches - patches.mean(1, keepdim=True)).transpose(0, 1).flatten(1)
    order = torch.randperm(patches.shape[1], generator=generator)
    order = order[: len(order) // ROW * ROW]
    rows = patches[:, order].view(len(patches), -1, 1, ROW).transpose(0, 1).contiguous()
    filters = learn_filters(
        rows, maps, filter_size=1, lam=25.0, boundary="circular",
        learning=LearningSettings(epochs=4, batch_size=16), progress=True,
    ).filters  # fmt: skip
    torch.save(filters, path)
    return filters


def chosen_threshold(images: list[Tensor], filters: Tensor, options: argparse.Namespace) -> float:
    """The best hard threshold on eight training crops, of CHOICES times the noise."""
    generator, sigma = torch.Generator().manual_seed(1), options.sigma / 255
    clean = crops(images, 8, 8 * options.patch, generator)
    noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
    scores = {}
    for choice in CHOICES:
        denoised = hard_denoised(noisy, filters, choice * sigma, 1)
        scores[choice] = float(psnr(clean, denoised).mean())
        print(f"hard threshold {choice} sigma: {scores[choice]:.2f} dB on {len(clean)} crops")
    return max(scores, key=scores.__getitem__) * sigma


def trained(
    model: Denoiser, images: list[Tensor], options: argparse.Namespace
) -> tuple[int, float]:
    """Train until the minutes are over; the number of steps, and processor seconds of all runs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate, betas=(0.9, 0.99))
    generator, path = torch.Generator().manual_seed(2), options.output / "checkpoint.pt"
    steps, before, norm, error = 0, 0.0, math.inf, math.nan
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        steps, before, norm = saved["steps"], saved["seconds"], saved["norm"]
    started, spent, whole = time.process_time(), before, 60 * options.minutes
    last = spent
    with tqdm(total=round(whole), initial=min(round(spent), round(whole)), unit="s") as bar:
        while spent < whole:
            rate = options.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * spent / whole)) / 2)
            optimizer.param_groups[0]["lr"] = rate
            clean = crops(images, options.batch, options.crop, generator)
            noise = options.sigma / 255 * torch.randn(clean.shape, generator=generator)
            loss = (model(clean + noise, options.stride) - clean).square().mean()
            optimizer.zero_grad()
            loss.backward()
            found = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP * norm))
            optimizer.step()
            norm = 0.98 * norm + 0.02 * min(found, CLIP * norm) if steps else found
            steps, current = steps + 1, loss.item()
            error = current if math.isnan(error) else 0.99 * error + 0.01 * current
            spent = before + time.process_time() - started
            bar.set_postfix_str(f"step {steps}, {-10 * math.log10(error):.2f} dB")
            bar.update(min(round(spent), round(whole)) - bar.n)
            if spent - last > 30 or spent >= whole:
                last = spent
                state = dict(
                    model=model.state_dict(), optimizer=optimizer.state_dict(),
                    generator=generator.get_state(), steps=steps, seconds=spent, norm=norm,
                )  # fmt: skip
                torch.save(state, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
    return steps, spent


def evaluated(
    denoise: Callable[[Tensor], Tensor],
    images: list[Tensor],
    options: argparse.Namespace,
    cache: Path,
) -> list[float]:
    """PSNR in dB of every denoised image, clipped to [0, 1]; the noise is that of its number.

    cache: a file of those already known, unless it is of other options.
    """
    test = dict(sigma=options.sigma, crop=options.test_crop, stride=options.test_stride)
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    scores = known["scores"] if known.get("test") == test else []
    for number in tqdm(range(len(scores), len(images)), desc=cache.stem):
        generator, clean = torch.Generator().manual_seed(number), images[number]
        noisy = clean + options.sigma / 255 * torch.randn(clean.shape, generator=generator)
        with torch.no_grad():
            scores.append(float(psnr(clean, denoise(noisy).clamp(0, 1))))
        cache.write_text(to_json({"test": test, "scores": scores}))
    return scores[: len(images)]


if __name__ == "__main__":
    main()
