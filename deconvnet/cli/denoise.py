"""Remove noise from images with the filters of a trained network.

deconvnet denoise run=runs/denoise-rgb image=photo.png sigma=25
"""

import torch
from omegaconf import DictConfig
from torch import Tensor

from deconvnet.applications.restoration import Restorer, estimate_noise
from deconvnet.applications.restored_pictures import LEVELS, Restored, restore
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.reading import read_settings
from deconvnet.cli.settings import DenoiseConfig
from deconvnet.network.network import Progress
from deconvnet.support.devices import torch_device

# In grey levels: rounding to whole ones alone makes noise of 0.3.
LEAST_NOISE = 0.5


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        denoise(read_settings(cfg))


def denoise(settings: DenoiseConfig) -> None:
    generator = torch.Generator().manual_seed(settings.seed)

    def job(restorer: Restorer, image: Tensor, depth: int, progress: Progress) -> Restored:
        noisy, clean = image, None
        if settings.noise is not None:
            noise = torch.randn(image.shape, generator=generator).to(image)
            noisy, clean = image + settings.noise / LEVELS * noise, image
            noisy = noisy.clamp(0, 1) if settings.clip else noisy
        level = settings.sigma or settings.noise
        # An image without noise is no reason to stop.
        estimate = None if level else max(float(estimate_noise(noisy)), LEAST_NOISE / LEVELS)
        sigma = level / LEVELS if level else estimate
        options = dict(depth=depth, memory=settings.memory, progress=progress)
        layers = restorer.denoise(noisy, sigma, **options)
        return Restored(noisy, layers, clean, f"sigma {LEVELS * sigma:.1f}")

    restore(
        *(settings.run, settings.image, job),
        folder="denoised",
        device=torch_device(settings.device),
        **settings.common(),
    )
