"""Fill in missing pixels with the filters of a trained network:

python scripts/inpaint.py run=runs/denoise-rgb image=photo.png missing=scratches.png
"""

import os
import signal

import hydra
from omegaconf import DictConfig

# With another busy process on the machine, threads of OpenMP that spin while they wait cost up to
# ten times the time; on a quiet machine a short spin is as fast. To be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Ctrl-C while libraries are loaded ends the program without a word; `launch` has more to say.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch import Tensor

from deconvnet.applications.restoration import Restorer
from deconvnet.applications.restored_pictures import LEVELS, Restored, mask_file, restore, seen
from deconvnet.cli import config
from deconvnet.network.network import Progress

config.register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="inpaint")
def main(cfg: DictConfig) -> None:
    with config.one_line_errors(ValueError, OSError), config.interruptible():
        inpaint(config.read_command(cfg))


def inpaint(settings: config.InpaintConfig) -> None:
    generator = torch.Generator().manual_seed(settings.seed)

    def job(restorer: Restorer, image: Tensor, depth: int, progress: Progress) -> Restored:
        mask, known = seen(settings.missing, image, generator)
        options = dict(depth=depth, memory=settings.memory, progress=progress)
        layers = restorer.inpaint(image, mask, settings.sigma / LEVELS, **options)
        missing = float((mask == 0).float().mean())
        return Restored(mask * image, layers, image if known else None, f"{missing:.1%} missing")

    restore(
        *(settings.run, settings.image, job),
        folder="inpainted",
        mask=mask_file(settings.missing),
        device=config.device(settings.device),
        **settings.common(),
    )


if __name__ == "__main__":
    config.launch(main, config.InpaintConfig)
