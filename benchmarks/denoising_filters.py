"""Learn filters for denoising, by gradients through the sparse code, beside unsupervised ones.

python benchmarks/denoising_filters.py --train CBSD432 --test BSD68 --minutes 60
python benchmarks/denoising_filters.py --train CBSD432 --test BSD68 --minutes 5 --test-images 10

Both folders hold photographs, which are read as grey; those of the repository drorsimon/CSCNet are
datasets/CBSD432 and datasets/BSD68. The denoiser codes all overlapping patches of an image, which
are the channels of an image of patches (N, P P, H-P+1, W-P+1) and the filters columns of a
dictionary (K, P P, 1, 1):

    z = SparseCode(filters, lam)(patches - their means)       the threshold of every map is learned
    patches = decoder z + their means                         at first the filters themselves
    image = weighted mean of the patches at each pixel        one weight for each place in a patch,
                                                              times exp(-decay sum |z|)

It is compared with the same denoiser with filters of `learn_filters` from the clean patches, as it
is before the first step. Training minimises the squared error of denoised crops with Adam (Mairal,
Bach and Ponce 2012, "Task-driven dictionary learning"). Run the same command again to resume, or
to train for longer; Ctrl-C costs at most the steps since the last minute.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from deconvnet import LearningSettings, SolverSettings, learn_filters
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.metrics import psnr
from deconvnet.nn import SparseCode

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
TRAINING = SolverSettings("coordinate", iterations=40, tolerance=1e-3)
# Patches of a row.
ROW = 256
# The threshold of noise in units of its standard deviation, measured on crops (CHOICES).
CHOICES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5)


class Denoiser(torch.nn.Module):
    """Noisy grey images (N, 1, H, W) -> denoised ones, by sparse codes of their patches."""

    def __init__(self, filters: Tensor, lam: float, patch: int):
        super().__init__()
        self.patch = patch
        self.code = SparseCode(
            filters, lam, boundary="circular", threshold_per_map=True, settings=TRAINING
        )
        self.decoder = torch.nn.Parameter(self.code.filters.detach().clone())
        self.place = torch.nn.Parameter(torch.zeros(patch**2))
        self.decay = torch.nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor) -> Tensor:
        patches = patches_of(y, self.patch)
        mean = patches.mean(1, keepdim=True)
        z = self.coded(patches - mean)
        decoded = F.conv2d(z, self.decoder[:, :, 0, 0].T[..., None, None]) + mean
        weight = self.place.exp().view(1, -1, 1, 1) * (-self.decay * z.abs().sum(1, True)).exp()
        return folded(weight * decoded, y.shape) / folded(weight.expand_as(decoded), y.shape)

    def coded(self, patches: Tensor) -> Tensor:
        """The maps (N, K, ...) of patches (N, P P, ...): each is coded alone, so they are arranged
        in short rows, whose channels fit into a cache together.
        """
        shape = patches.shape
        flat = F.pad(patches.flatten(2), (0, -(shape[2] * shape[3]) % ROW))
        rows = flat.unflatten(2, (-1, ROW)).transpose(1, 2)
        z = self.code(rows.flatten(0, 1)[:, :, None].contiguous())[:, :, 0]
        z = z.unflatten(0, rows.shape[:2]).transpose(1, 2).flatten(2)
        return z[..., : shape[2] * shape[3]].unflatten(2, shape[2:])


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
    model = initial(images, options)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    results = {"unsupervised": evaluated(model, tests, options, folder / "unsupervised.json")}
    steps, seconds = trained(model, images, options)
    results["learned for denoising"] = evaluated(model, tests, options, None)
    results |= {"steps": steps, "minutes of training": seconds / 60, "sigma": options.sigma}
    (folder / "results.json").write_text(to_json(results, indent=1))
    for name in ("unsupervised", "learned for denoising"):
        print(f"{name}: {sum(results[name]) / len(results[name]):.3f} dB, {len(tests)} images")


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
    parser.add_argument("--sigma", type=float, default=25.0, help="noise in grey levels (25)")
    parser.add_argument("--patch", type=int, default=8, help="side of the patches (default 8)")
    parser.add_argument("--maps", type=int, default=256, help="number of filters (default 256)")
    parser.add_argument("--crop", type=int, default=32, help="side of training crops (32)")
    parser.add_argument("--batch", type=int, default=4, help="crops in a step (default 4)")
    parser.add_argument("--rate", type=float, default=2e-3, help="first learning rate (2e-3)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training in total (60)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (default 2)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark/denoising_filters"),
        help="folder for checkpoint and results (default runs/benchmark/denoising_filters)",
    )  # fmt: skip
    return parser.parse_args()


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


def patches_of(y: Tensor, side: int) -> Tensor:
    """(N, side side, H-side+1, W-side+1): all patches of grey images."""
    N, _, H, W = y.shape
    return F.unfold(y, side).view(N, side**2, H - side + 1, W - side + 1)


def folded(patches: Tensor, shape: torch.Size) -> Tensor:
    """The sum of patches at their places in images of this shape; the adjoint of `patches_of`."""
    side = shape[2] - patches.shape[2] + 1
    return F.fold(patches.flatten(2), tuple(shape[2:]), side)


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


def initial(images: list[Tensor], options: argparse.Namespace) -> Denoiser:
    """The denoiser with unsupervised filters and the best of CHOICES as the only threshold."""
    generator = torch.Generator().manual_seed(1)
    clean = crops(images, 8, options.crop, generator)
    noisy = clean + options.sigma / 255 * torch.randn(clean.shape, generator=generator)
    path = options.output / "unsupervised.pt"
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        return Denoiser(saved["filters"], saved["lam"], options.patch)
    patches = patches_of(crops(images, 64, options.crop, generator), options.patch)[:, :, ::2, ::2]
    patches = patches - patches.mean(1, keepdim=True)
    learned = learn_filters(
        patches.contiguous(), options.maps, filter_size=1, lam=25.0, boundary="circular",
        learning=LearningSettings(epochs=4, batch_size=16), progress=True,
    )  # fmt: skip
    best = -math.inf
    for choice in CHOICES:
        model = Denoiser(learned.filters, 255 / (choice * options.sigma), options.patch)
        with torch.no_grad():
            score = float(psnr(clean, model(noisy)).mean())
        print(f"threshold {choice} sigma: {score:.2f} dB on {len(clean)} crops")
        if score > best:
            best, chosen = score, model
    torch.save({"filters": learned.filters, "lam": float(chosen.code.lam)}, path)
    return chosen


def trained(
    model: Denoiser, images: list[Tensor], options: argparse.Namespace
) -> tuple[int, float]:
    """Train until the minutes are over; the number of steps, and the seconds of all runs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate, betas=(0.9, 0.99))
    generator, path = torch.Generator().manual_seed(2), options.output / "checkpoint.pt"
    steps, before, error = 0, 0.0, None
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        steps, before = saved["steps"], saved["seconds"]
    started, last, whole = time.perf_counter(), 0.0, 60 * options.minutes
    spent = before
    with tqdm(total=round(whole), initial=min(round(spent), round(whole)), unit="s") as bar:
        while spent < whole:
            rate = options.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * spent / whole)) / 2)
            optimizer.param_groups[0]["lr"] = rate
            clean = crops(images, options.batch, options.crop, generator)
            noise = torch.randn(clean.shape, generator=generator)
            denoised = model(clean + options.sigma / 255 * noise)
            loss = (denoised - clean).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            error = (
                float(loss.detach())
                if error is None
                else 0.98 * error + 0.02 * float(loss.detach())
            )
            spent = before + time.perf_counter() - started
            bar.set_postfix_str(f"step {steps}, {-10 * math.log10(error):.2f} dB")
            bar.update(min(round(spent), round(whole)) - bar.n)
            if spent - last > 60 or spent >= whole:
                last = spent
                state = dict(
                    model=model.state_dict(), optimizer=optimizer.state_dict(),
                    generator=generator.get_state(), steps=steps, seconds=spent,
                )  # fmt: skip
                torch.save(state, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
    return steps, spent


def evaluated(
    model: Denoiser, images: list[Tensor], options: argparse.Namespace, cache: Path | None
) -> list[float]:
    """PSNR in dB of every denoised image, clipped to [0, 1]; the noise is that of its number."""
    if cache and cache.is_file():
        import json

        known = json.loads(cache.read_text())
        if len(known) >= len(images):
            return known[: len(images)]
    scores = []
    for number, clean in enumerate(tqdm(images, desc="test")):
        generator = torch.Generator().manual_seed(number)
        noisy = clean + options.sigma / 255 * torch.randn(clean.shape, generator=generator)
        with torch.no_grad():
            denoised = model(noisy).clamp(0, 1)
        scores.append(float(psnr(clean, denoised)))
    if cache:
        cache.write_text(to_json(scores))
    return scores


if __name__ == "__main__":
    main()
