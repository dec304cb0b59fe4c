"""Take noise out of images with the filters of a trained network:

python scripts/denoise.py run=runs/denoise-rgb image=photo.png sigma=25
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

from deconvnet.applications.restoration import Restorer, estimate_noise
from deconvnet.applications.restored_pictures import LEVELS, Restored, restore
from deconvnet.cli import config
from deconvnet.network.network import Progress

# In grey levels: rounding to whole ones alone makes noise of 0.3.
LEAST_NOISE = 0.5

config.register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="denoise")
def main(cfg: DictConfig) -> None:
    with config.one_line_errors(ValueError, OSError), config.interruptible():
        denoise(config.read_command(cfg))


def denoise(settings: config.DenoiseConfig) -> None:
    generator = torch.Generator().manual_seed(settings.seed)

    def job(restorer: Restorer, image: Tensor, depth: int, progress: Progress) -> Restored:
        given, clean = image, None
        if settings.noise is not None:
            noise = torch.randn(image.shape, generator=generator).to(image)
            given, clean = image + settings.noise / LEVELS * noise, image
            given = given.clamp(0, 1) if settings.clip else given
        level = settings.sigma or settings.noise
        # An image without noise is no reason to stop.
        estimate = None if level else max(float(estimate_noise(given)), LEAST_NOISE / LEVELS)
        sigma = level / LEVELS if level else estimate
        options = dict(depth=depth, memory=settings.memory, progress=progress)
        layers = restorer.denoise(given, sigma, **options)
        return Restored(given, layers, clean, f"sigma {LEVELS * sigma:.1f}")

    restore(
        *(settings.run, settings.image, job),
        folder="denoised",
        device=config.device(settings.device),
        **settings.common(),
    )


if __name__ == "__main__":
    config.launch(main, config.DenoiseConfig)
