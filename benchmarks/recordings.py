"""How long the code of a long recording takes, and how little its memory grows with the length.

    python benchmarks/recordings.py
    python benchmarks/recordings.py --samples 1000000 --gap 1e-3

A recording of one channel is simulated into a file: three atoms of 64 samples at random times, a
third of a percent of the samples each, and noise. It is coded from the file with these atoms, on
one thread. Prints the time of the processor and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from deconvnet import SolverSettings
from deconvnet.recordings import code_recording

LENGTH, NOISE, BLOCK = 64, 0.1, 10**6
# The weight of the reconstruction: a threshold 1/lam of five standard deviations of the noise.
LAM = 1 / (5 * NOISE)


def atoms() -> np.ndarray:
    """(3, L) of unit norm: damped oscillations of three frequencies."""
    t = np.arange(LENGTH)
    waves = [np.hanning(LENGTH) * np.sin(t * w + p) for w, p in ((0.2, 0), (0.5, 1), (0.9, 2))]
    return np.stack([wave / np.linalg.norm(wave) for wave in waves])


def write_recording(path: Path, samples: int) -> None:
    """A recording (1, samples) of float32 in a .npy file, block by block."""
    random = np.random.default_rng(0)
    recording = np.lib.format.open_memmap(path, "w+", np.float32, (1, samples))
    for first in range(0, samples, BLOCK):
        number = min(BLOCK, samples - first)
        block = NOISE * random.standard_normal(number)
        for atom in atoms():
            activations = random.exponential(3, number) * (random.random(number) < 1 / 300)
            block += np.convolve(activations, atom)[:number]
        recording[0, first : first + number] = block
    recording.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10**7)
    parser.add_argument("--gap", type=float, help="code to this relative duality gap")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = args.gap and SolverSettings("coordinate", iterations=1000, gap=args.gap)
    filters = torch.from_numpy(atoms()).float()[:, None, None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.npy"
        write_recording(path, args.samples)
        recording = np.load(path, mmap_mode="r")
        # Compiles the loops.
        code_recording(recording[:, :10_000], filters, lam=LAM, settings=settings)
        start = time.process_time()
        code = code_recording(recording, filters, lam=LAM, settings=settings)
        seconds = time.process_time() - start
    # In KiB on Linux; the pages of the file that are in memory count, too.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.samples} samples: {code}")
    print(f"{seconds:.1f} s of the processor, peak memory {memory:.0f} MiB")


if __name__ == "__main__":
    main()
