"""The benchmark problems: photographs and filters, the objective and its duality gap, in numpy.

    minimise over z, for every image      1/2 ||sum_k f_k * z_k - y||^2 + weight sum |z|

    y images (N, C, H, W), high-passed   f filters (K, C, h, w) of unit norm   z maps (N, K, ...)
    weight: SPORCO's lambda; deconvnet's lam is 1 / weight, and its objective 1 / weight times this

Every solver is evaluated by `Objective`, in float64 with Fourier transforms, whatever it reports
itself. The photographs are part of scikit-image's wheel, so nothing is downloaded; filters are
learned on other photographs than those that are coded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import fft
from skimage import data

LUMINANCE = np.array([0.2125, 0.7154, 0.0721])
CODED = ("astronaut", "camera")
OTHERS = ("chelsea", "coffee", "rocket")


@dataclass(frozen=True)
class Spec:
    """The specification of a problem: `count` crops of `pixels`, or one reduced photograph."""

    name: str
    photograph: str = "camera"
    channels: int = 1
    pixels: int = 256
    count: int = 1
    maps: int = 64
    size: int = 8
    weight: float = 0.05

    @property
    def title(self) -> str:
        several = f"{self.count} x " if self.count > 1 else ""
        kind = "colour" if self.channels == 3 else "grey"
        return (
            f"{several}{kind} {self.pixels}x{self.pixels}, {self.maps} maps of "
            f"{self.size}x{self.size}, lambda {self.weight:g}"
        )

    def tiny(self) -> Spec:
        """A version that takes a second, to check that everything runs."""
        return replace(self, pixels=48, count=min(self.count, 3), maps=12)


SPECS = {
    spec.name: spec
    for spec in (
        Spec("grey"),
        Spec("colour", photograph="astronaut", channels=3),
        Spec("wide", maps=32, size=11),
        Spec("dense", weight=0.01),
        Spec("batch", pixels=128, count=10),
        Spec("large", photograph="astronaut", pixels=512),
    )
}
# Learning has crops for training, and held-out crops of other photographs.
LEARNING = Spec("learning", pixels=128, count=10, maps=32, weight=0.1)
HELD_OUT = 5


@dataclass(frozen=True)
class Problem:
    """Images y (N, C, H, W), filters f (K, C, h, w), both float32, and the weight of sum |z|.

    non_negative: whether z >= 0.
    """

    name: str
    y: np.ndarray
    f: np.ndarray
    weight: float
    non_negative: bool = False

    @property
    def lam(self) -> float:
        return 1 / self.weight

    @property
    def digest(self) -> str:
        """A digest of the numbers, under which results for them can be stored."""
        numbers = (self.y.tobytes(), self.f.tobytes(), repr((self.y.shape, self.weight)).encode())
        return hashlib.sha256(b"".join(numbers)).hexdigest()[:16]

    def one(self, n: int) -> Problem:
        """The n-th image alone."""
        return replace(self, name=f"{self.name}-{n}", y=self.y[n : n + 1])


def make(spec: Spec, folder: Path) -> Problem:
    """The images of a problem, and its filters, which are learned once and stored in the folder."""
    return Problem(spec.name, images(spec), filters(spec, folder), spec.weight)


def images(spec: Spec) -> np.ndarray:
    if spec.count > 1:
        return crops(CODED, spec.count, spec.pixels, spec.channels)
    whole = photograph(spec.photograph, spec.channels)
    factor = max(1, min(whole.shape[1:]) // spec.pixels)
    reduced = high_pass(reduce(whole, factor))
    top, left = ((length - spec.pixels) // 2 for length in reduced.shape[1:])
    middle = reduced[:, top : top + spec.pixels, left : left + spec.pixels]
    return np.ascontiguousarray(middle[None], np.float32)


def learning_images(spec: Spec, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Training crops, and held-out crops of other photographs."""
    return images(spec), crops(OTHERS, held_out, spec.pixels, spec.channels)


def crops(names: tuple[str, ...], count: int, pixels: int, channels: int) -> np.ndarray:
    """(count, C, pixels, pixels): the tiles with the most contrast of high-passed photographs."""
    tiles = []
    for name in names:
        whole = high_pass(photograph(name, channels))
        rows, columns = (length // pixels for length in whole.shape[1:])
        for i in range(rows):
            for j in range(columns):
                tiles.append(whole[:, i * pixels :, j * pixels :][:, :pixels, :pixels])
    stacked = np.stack(tiles).astype(np.float32)
    highest_contrast = np.argsort(-stacked.std((1, 2, 3)), kind="stable")[:count]
    return np.ascontiguousarray(stacked[np.sort(highest_contrast)])


def photograph(name: str, channels: int) -> np.ndarray:
    """(C, H, W) in [0, 1]."""
    pixels = getattr(data, name)() / 255.0
    if channels == 1 and pixels.ndim == 3:
        pixels = pixels @ LUMINANCE
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def reduce(image: np.ndarray, factor: int) -> np.ndarray:
    """The means of blocks of factor x factor pixels."""
    height, width = (length // factor * factor for length in image.shape[1:])
    blocks = image[:, :height, :width].reshape(len(image), height // factor, factor, -1, factor)
    return blocks.mean((2, 4))


def high_pass(image: np.ndarray, strength: float = 5.0, border: int = 16) -> np.ndarray:
    """The image minus its low frequencies, argmin_x ||x - y||^2 + strength ||grad x||^2.

    As in SPORCO's examples (signal.tikhonov_filter), with mirrored borders.
    """
    padded = np.pad(image, ((0, 0), (border, border), (border, border)), "symmetric")
    rows, columns = (2 - 2 * np.cos(2 * np.pi * fft.fftfreq(n)) for n in padded.shape[1:])
    gain = 1 + strength * (rows[:, None] + columns)
    low = fft.ifft2(fft.fft2(padded) / gain).real
    return image - low[:, border:-border, border:-border]


def filters(spec: Spec, folder: Path) -> np.ndarray:
    """(K, C, h, w) float32, unit norm, learned by deconvnet on photographs that are not coded."""
    file = folder / f"filters-{spec.channels}x{spec.maps}x{spec.size}.npy"
    if not file.exists():
        # Imported here, since the rest of this module needs only numpy.
        import torch

        from deconvnet import LearningSettings, learn_filters

        learned = learn_filters(
            torch.from_numpy(crops(OTHERS, 10, 128, spec.channels)),
            spec.maps,
            filter_size=spec.size,
            lam=10.0,
            boundary="circular",
            learning=LearningSettings(epochs=8),
        )
        np.save(file, learned.filters.numpy())
    return np.load(file)


def random_filters(spec: Spec) -> np.ndarray:
    """(K, C, h, w) float32, unit norm: the noise from which all learning starts."""
    f = np.random.default_rng(0).standard_normal((spec.maps, spec.channels, spec.size, spec.size))
    return (f / np.sqrt(np.square(f).sum((1, 2, 3), keepdims=True))).astype(np.float32)


class Objective:
    """The objective (N,) of maps z (N, K, rows, columns) of a problem, and its duality gap.

    Maps of the image's size wrap around its border ("circular"). Maps larger by the filter size
    minus 1 extend beyond it ("valid"): this is the same circular convolution without its first rows
    and columns, where it wraps around.
    """

    def __init__(self, problem: Problem, boundary: str = "circular"):
        self.y, self.weight = problem.y.astype(np.float64), problem.weight
        self.non_negative = problem.non_negative
        beyond = (n - 1 if boundary == "valid" else 0 for n in problem.f.shape[2:])
        self.offset = tuple(beyond)
        self.map_size = tuple(n + o for n, o in zip(self.y.shape[2:], self.offset, strict=True))
        # Maps that extend beyond the border may be padded further, to a size of fast transforms.
        self.fft_shape = self.map_size
        if boundary == "valid":
            self.fft_shape = tuple(fft.next_fast_len(n, real=True) for n in self.map_size)
        self.spectrum = fft.rfft2(problem.f.astype(np.float64), self.fft_shape)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        error = np.square(self.y - self.synthesize(z)).sum((1, 2, 3))
        return error / 2 + self.weight * np.abs(z).sum((1, 2, 3), dtype=np.float64)

    def synthesize(self, z: np.ndarray) -> np.ndarray:
        """(N, C, H, W): the sum over k of z_k * f_k."""
        image = np.zeros((len(z), *self.spectrum.shape[1:]), complex)
        for k, f in enumerate(self.spectrum):
            if z[:, k].any():
                image += fft.rfft2(z[:, k].astype(np.float64), self.fft_shape)[:, None] * f
        (top, left), (bottom, right) = self.offset, self.map_size
        return fft.irfft2(image, self.fft_shape)[..., top:bottom, left:right]

    def correlate(self, r: np.ndarray) -> np.ndarray:
        """(N, K, rows, columns): the adjoint of `synthesize`."""
        top, left = self.offset
        spectrum = fft.rfft2(np.pad(r, ((0, 0), (0, 0), (top, 0), (left, 0))), self.fft_shape)
        products = (np.sum(spectrum * f.conj(), 1) for f in self.spectrum)
        maps = np.stack([fft.irfft2(product, self.fft_shape) for product in products], 1)
        return maps[..., : self.map_size[0], : self.map_size[1]]

    def dual(self, z: np.ndarray) -> np.ndarray:
        """(N,): a lower bound of each minimum, which is attained if z is the minimiser.

        The dual problem is  maximise <y, v> - 1/2 ||v||^2  over |correlate(v)| <= weight, or for
        non-negative maps over correlate(v) <= weight; the bound is the best v along the residual.
        """
        r = self.y - self.synthesize(z)
        c = self.correlate(r)
        largest = (c if self.non_negative else np.abs(c)).max((1, 2, 3))
        limit = self.weight / np.maximum(largest, 1e-300)
        energy, along = np.square(r).sum((1, 2, 3)), (self.y * r).sum((1, 2, 3))
        lowest = 0 if self.non_negative else -limit
        scale = np.clip(along / np.maximum(energy, 1e-300), lowest, limit)
        return scale * along - scale**2 * energy / 2
