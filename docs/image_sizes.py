"""Prints the table of docs/start.md: how long images of several sizes take.

python docs/image_sizes.py RUN

RUN: the folder of a run of `deconvnet train +layers=2`. Crops of the astronaut of scikit-image,
which is enlarged for the largest size; processor time with one thread, and the peak memory of the
process so far.
"""

import resource
import sys
import time
from collections.abc import Callable

import skimage.data
import torch
import torch.nn.functional as F

from deconvnet import load, sparse_code

SIDES = (128, 256, 512, 1024)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    net = load(sys.argv[1])
    astronaut = torch.from_numpy(skimage.data.astronaut() / 255.0).float().permute(2, 0, 1)[None]
    large = F.interpolate(astronaut, (1024, 1024), mode="bilinear")
    # Loops are compiled at the first call.
    filters = net.layer(1).filters.detach()
    sparse_code(net.infer(astronaut[..., :64, :64]).y, filters, lam=2.0)
    print("| pixels | `sparse_code` | `net.infer`, two layers | peak memory |\n|---|---|---|---|")
    for side in SIDES:
        image = (large if side > 512 else astronaut)[..., :side, :side]
        y = net.infer(image, depth=0).y
        code = seconds(lambda y=y: sparse_code(y, filters, lam=2.0))
        infer = seconds(lambda image=image: net.infer(image))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"| {side}x{side} | {code:.1f} s | {infer:.1f} s | {memory:.1f} GB |", flush=True)


def seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


if __name__ == "__main__":
    main()
