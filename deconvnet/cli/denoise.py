"""Remove noise from images with the filters of a trained network.

deconvnet denoise run=runs/denoise-rgb images=photo.png sigma=25
"""

import torch
from omegaconf import DictConfig
from torch import Tensor

from deconvnet.applications.restoration.noise import estimate_noise
from deconvnet.applications.restoration.restorer import Restorer
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.restore import GREY_LEVELS, Restored, restore_files
from deconvnet.cli.settings import DenoiseConfig
from deconvnet.network.network import Progress
from deconvnet.support.devices import torch_device

# In grey levels: rounding to whole levels alone makes noise of 0.3.
MIN_NOISE = 0.5


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        denoise(read_settings(cfg))


def denoise(settings: DenoiseConfig) -> None:
    generator = torch.Generator().manual_seed(settings.seed)

    def restore(restorer: Restorer, image: Tensor, depth: int, progress: Progress) -> Restored:
        noisy, clean = image, None
        if settings.noise is not None:
            noise = torch.randn(image.shape, generator=generator).to(image)
            noisy, clean = image + settings.noise / GREY_LEVELS * noise, image
            noisy = noisy.clamp(0, 1) if settings.clip else noisy
        level = settings.sigma or settings.noise
        if level:
            sigma = level / GREY_LEVELS
        else:
            # An image without noise must not stop the command.
            sigma = max(float(estimate_noise(noisy)), MIN_NOISE / GREY_LEVELS)
        options = dict(depth=depth, memory=settings.memory, progress=progress)
        layers = restorer.denoise(noisy, sigma, **options)
        return Restored(noisy, layers, clean, f"sigma {GREY_LEVELS * sigma:.1f}")

    restore_files(
        *(settings.run, settings.images, restore),
        folder="denoised",
        device=torch_device(settings.device),
        **settings.common(),
    )
