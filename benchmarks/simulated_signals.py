"""The simulated signals of RoseCDL's benchmark, and its score of how well atoms are recovered.

    y signals (N, C, 1, T)   f atoms (K, C, 1, L)   N trials · C channels · T samples · L taps

Written from the description in github.com/tommoral/RoseCDL, `benchmark/datasets/simulated.py` with
`configs/config_runtime.yml`, and drawn from the same random numbers, so that these are its signals.
Each atom is a sine or a sum of Gaussians in one channel, with a Tukey taper. One long signal holds
its atoms at random places, with coefficients of 1, and white noise; it has variance 1, and is cut
into trials that a taper brings to zero at both ends. Learning starts from tapered noise, with more
atoms than there are.

RoseCDL learns from the first 80% of the trials and holds the others out (`benchmark/objective.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.signal import correlate, fftconvolve
from scipy.signal.windows import tukey

# Those of RoseCDL's benchmark.
SEEDS = (938425, 923842, 29081990, 4112023, 8031989)


@dataclass(frozen=True)
class SignalSpec:
    """`trials` signals of `channels` channels and `samples` samples, made of `true_atoms` atoms.

    ratio: lambda relative to the smallest that leaves all codes of the training signals zero under
    the initial atoms.
    """

    samples: int = 16_384
    ratio: float = 0.1
    trials: int = 10
    channels: int = 2
    true_atoms: int = 5
    extra_atoms: int = 5
    taps: int = 64
    noise: float = 0.01
    seed: int = SEEDS[0]

    @property
    def title(self) -> str:
        return (
            f"{self.trials} x {self.channels} x {self.samples} samples, "
            f"{self.true_atoms + self.extra_atoms} atoms of {self.taps}, "
            f"lambda {self.ratio:g} of its largest"
        )

    def tiny(self) -> SignalSpec:
        """A version that takes a second, to check that everything runs."""
        return replace(self, samples=1024, trials=5)


@dataclass(frozen=True)
class Signals:
    """Training and held-out signals, the true atoms, and the atoms from which learning starts.

    weight: lambda.
    """

    train: np.ndarray
    held_out: np.ndarray
    true_atoms: np.ndarray
    start: np.ndarray
    weight: float


def simulate(spec: SignalSpec) -> Signals:
    rng = np.random.RandomState(spec.seed)
    atoms = _true_atoms(spec)
    signal = _painted(atoms, activations(spec, rng))
    signal += rng.normal(scale=spec.noise, size=signal.shape)
    trials = _trials(signal / signal.std(), spec.trials)
    start = rng.randn(spec.true_atoms + spec.extra_atoms, spec.channels, spec.taps)
    start = _in_unit_ball(start * _taper(spec.taps))
    training = max(int(0.8 * spec.trials), 1)
    weight = spec.ratio * _largest_correlation(trials[:training], start)
    y, f, g = (array[:, :, None].astype(np.float32) for array in (trials, atoms, start))
    return Signals(y[:training], y[training:], f, g, weight)


def recovery(true_atoms: np.ndarray, learned: np.ndarray) -> float:
    """The mean correlation of the true atoms with the learned ones that are assigned to them.

    The correlation of two atoms (C, 1, L) is Pearson's, the largest over their relative shifts, and
    the assignment maximises the sum (RoseCDL, `utils_exp.evaluate_D_hat`). At most 1.
    """
    table = [[_best_correlation(f, true) for f in learned] for true in true_atoms]
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(np.array(table)[rows, columns].mean())


def _true_atoms(spec: SignalSpec) -> np.ndarray:
    """(K, C, L): sines and sums of Gaussians in turn, each kind with ever more cycles."""
    f = np.zeros((spec.true_atoms, spec.channels, spec.taps))
    for k in range(spec.true_atoms):
        cycles = 1 + k // 2
        wave = _gaussians(cycles, spec.taps) if k % 2 else _sine(cycles, spec.taps)
        f[k, k % spec.channels] = wave
    return _in_unit_ball(f * _taper(spec.taps))


def _sine(cycles: int, taps: int) -> np.ndarray:
    return np.sin(np.linspace(0, 2 * np.pi * cycles, taps))


def _gaussians(count: int, taps: int) -> np.ndarray:
    means = np.arange(1, count + 1) / (count + 1) * taps
    return np.exp(-((np.arange(taps) - means[:, None]) ** 2) * count / (2 * taps)).sum(0)


def activations(spec: SignalSpec, rng: np.random.RandomState) -> np.ndarray:
    """(K, positions) of 0 and 1: twenty ones per 5000 samples for each atom, or 3% of them."""
    places = spec.trials * spec.samples - spec.taps + 1
    size = spec.samples / 5000
    z = np.zeros((spec.true_atoms, places))
    if 20 * size < 1:
        raise ValueError(f"samples={spec.samples}: must be at least 250")
    for row in z:
        row[rng.choice(places, size=int(20 * size) * spec.trials, replace=False)] = 1
    return z


def _painted(f: np.ndarray, z: np.ndarray) -> np.ndarray:
    """(C, T): the sum of all z_k * f_k."""
    return sum(fftconvolve(row[None], atom, axes=1) for row, atom in zip(z, f, strict=True))


def _trials(signal: np.ndarray, count: int) -> np.ndarray:
    """(count, C, T / count): consecutive parts, which fade in and out."""
    samples = signal.shape[1] // count
    parts = signal[:, : count * samples].reshape(len(signal), count, samples).swapaxes(0, 1)
    return parts * tukey(samples, alpha=0.1)


def _taper(taps: int) -> np.ndarray:
    window = tukey(taps)
    window[[0, -1]] = 1e-9
    return window


def _in_unit_ball(f: np.ndarray) -> np.ndarray:
    return f / np.maximum(1, np.sqrt(np.square(f).sum((1, 2), keepdims=True)))


def _largest_correlation(y: np.ndarray, f: np.ndarray) -> float:
    """The smallest lambda for which codes >= 0 of signals y (N, C, T) are all zero."""
    return max(
        float(fftconvolve(y, atom[None, :, ::-1], "valid", axes=2).sum(1).max()) for atom in f
    )


def _best_correlation(f: np.ndarray, g: np.ndarray) -> float:
    products = sum(correlate(a, b, "same") for a, b in zip(f[:, 0], g[:, 0], strict=True))
    spread = max(f.std() * g.std(), 1e-6)
    return float((products.max() / f.size - f.mean() * g.mean()) / spread)
