"""Time and memory of gradients through a sparse code: implicit, and by unrolling FISTA.

python benchmarks/gradients.py                       256x256, 64 filters of 7x7: takes 15 GB
python benchmarks/gradients.py --size 64             smaller
python benchmarks/gradients.py implicit-gap --lams 20 60

The gradients of a random linear function of the maps in image, filters and lam. Implicit: forward
and backward of `sparse_code`, for the default tolerance and for a duality gap of 1e-3. Unrolled:
torch's back-propagation through 100 FISTA iterations, by the operators of this package. The filters
are learned from other crops of the same photograph.

Seconds are those of the processor (user and system), from a process of its own for each row, after
a first call on a small image. Kept: the bytes that autograd keeps between forward and backward.
Peak: how far forward and backward raise the peak resident memory of the process. Cosine: between
the gradient in the image and that of a sparse code with a gap of 1e-6.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import skimage.data
import torch
from skimage.filters import gaussian
from torch import Tensor

import deconvnet
from deconvnet import LearningSettings, SolverSettings, sparse_code
from deconvnet.operators.convolution import correlate, deconvolve
from deconvnet.operators.linear import Deconvolution

METHODS = ("implicit", "implicit-gap", "unrolled")
SETTINGS = {
    "implicit": None,
    "implicit-gap": SolverSettings("coordinate", iterations=1000, gap=1e-3),
    "exact": SolverSettings("coordinate", iterations=2000, gap=1e-6),
}
MEBIBYTE = 2**20


def main() -> None:
    options = arguments()
    if options.row:
        print(json.dumps(row(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        filters = Path(folder) / "filters.pt"
        torch.save(learned(options.maps), filters)
        for lam in options.lams:
            print(f"\nlam {lam:g}", flush=True)
            print(f"{'':14}{'forward s':>10}{'backward s':>11}{'kept MiB':>10}{'peak MiB':>10}"
                  f"{'non-zero':>10}{'cosine':>10}")  # fmt: skip
            exact = Path(folder) / f"exact-{lam:g}.pt"
            measured(options, "exact", lam, filters, exact)
            for method in options.methods:
                r = measured(options, method, lam, filters, exact)
                numbers = f"{r['forward']:10.2f}{r['backward']:11.2f}{r['kept']:10.1f}"
                numbers += f"{r['peak']:10.1f}{r['nonzero']:10}{r['cosine']:10.5f}"
                print(f"{method:14}{numbers}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=METHODS, help=f"of {', '.join(METHODS)}; all")
    parser.add_argument("--size", type=int, default=256, help="side of the image (default 256)")
    parser.add_argument("--maps", type=int, default=64, help="number of filters (default 64)")
    parser.add_argument("--lams", nargs="+", type=float, default=[10.0], help="(10)")
    parser.add_argument("--iterations", type=int, default=100, help="of FISTA (default 100)")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.row and (wrong := set(options.methods) - set(METHODS)):
        parser.error(f"{', '.join(sorted(wrong))}: choose from {', '.join(METHODS)}")
    return options


def detail() -> Tensor:
    """A photograph (512, 512) without its slow changes of brightness."""
    camera = skimage.data.camera() / 255.0
    return torch.from_numpy(camera - gaussian(camera, 4)).float()


def learned(maps: int) -> Tensor:
    """Filters (maps, 1, 7, 7) of crops of the photograph."""
    crops = detail().unfold(0, 64, 64).unfold(1, 64, 64).reshape(-1, 1, 64, 64).contiguous()
    learning = LearningSettings(epochs=3)
    return deconvnet.learn_filters(crops, maps, 7, lam_ratio=0.05, learning=learning).filters


def measured(
    options: argparse.Namespace, method: str, lam: float, filters: Path, exact: Path
) -> dict:
    """The row of a method, from a process of its own."""
    command = [sys.executable, __file__, "--size", str(options.size), "--lams", str(lam)]
    command += ["--iterations", str(options.iterations), "--row", method, str(filters), str(exact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def row(options: argparse.Namespace) -> dict:
    method, filters, exact = options.row
    torch.set_num_threads(1)
    f, lam = torch.load(filters, weights_only=True), torch.tensor(options.lams[0])
    start = (512 - options.size) // 2
    y = detail()[None, None, start:, start:][..., : options.size, : options.size].contiguous()
    leaves = [x.clone().requires_grad_() for x in (y, f, lam)]
    direction = torch.randn(len(f), generator=torch.Generator().manual_seed(0)).view(-1, 1, 1)
    # Compiles and loads what the first call needs.
    maps(method, y[..., :32, :32].clone().requires_grad_(), f, lam, 2).sum().backward()
    before, kept = peak(), {}

    def keep(x: Tensor) -> Tensor:
        # Tensors that share memory, and the arguments, are counted once or not at all.
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    seconds = [time.process_time()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        z = maps(method, *leaves, options.iterations)
    for leaf in leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    nonzero = int(torch.count_nonzero(z))
    loss = (direction * z).sum()
    seconds.append(time.process_time())
    loss.backward()
    seconds.append(time.process_time())
    gradient = leaves[0].grad
    if method == "exact":
        torch.save(gradient, exact)
    cosine = torch.cosine_similarity(
        gradient.flatten(), torch.load(exact, weights_only=True).flatten(), 0
    )
    support = 0 if method == "unrolled" else nonzero * (4 * 8 + 2 * 4)
    return {
        "forward": seconds[1] - seconds[0],
        "backward": seconds[2] - seconds[1],
        "kept": (sum(kept.values()) + support) / MEBIBYTE,
        "peak": peak() - before,
        "nonzero": nonzero,
        "cosine": float(cosine),
    }


def peak() -> float:
    """The peak resident memory of this process in MiB (Linux)."""
    # ru_maxrss of a new process starts at that of its parent.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def maps(method: str, y: Tensor, f: Tensor, lam: Tensor, iterations: int) -> Tensor:
    if method == "unrolled":
        return unrolled(y, f, lam, iterations)
    return sparse_code(y, f, lam=lam, settings=SETTINGS[method]).z


def unrolled(y: Tensor, f: Tensor, lam: Tensor, iterations: int) -> Tensor:
    """FISTA (Beck and Teboulle 2009) with a fixed step, by autograd."""
    step = 1 / float(Deconvolution(f.detach()).squared_norm(y.detach()).max())
    z = x = torch.zeros_like(correlate(y.detach(), f.detach()))
    t = 1.0
    for _ in range(iterations):
        v = x + step * correlate(y - deconvolve(x, f), f)
        z_next = (v - step / lam).relu() - (-v - step / lam).relu()
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        x = z_next + (t - 1) / t_next * (z_next - z)
        z, t = z_next, t_next
    return z


if __name__ == "__main__":
    main()
