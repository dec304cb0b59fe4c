"""Fill in missing pixels with the filters of a trained network.

deconvnet inpaint run=runs/denoise-rgb images=photo.png missing=scratches.png
"""

import torch
from omegaconf import DictConfig
from torch import Tensor

from deconvnet.applications.restoration.masks import make_mask, mask_file
from deconvnet.applications.restoration.restorer import Restorer
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.restore import GREY_LEVELS, Restored, restore_files
from deconvnet.cli.settings import InpaintConfig
from deconvnet.network.network import Progress
from deconvnet.support.devices import torch_device


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        inpaint(read_settings(cfg))


def inpaint(settings: InpaintConfig) -> None:
    generator = torch.Generator().manual_seed(settings.seed)

    def restore(restorer: Restorer, image: Tensor, depth: int, progress: Progress) -> Restored:
        mask, is_drawn = make_mask(settings.missing, tuple(image.shape[2:]), generator)
        mask = mask.to(image.device)
        options = dict(depth=depth, memory=settings.memory, progress=progress)
        layers = restorer.inpaint(image, mask, settings.sigma / GREY_LEVELS, **options)
        missing = float((mask == 0).float().mean())
        clean = image if is_drawn else None
        return Restored(mask * image, layers, clean, f"{missing:.1%} missing")

    restore_files(
        *(settings.run, settings.images, restore),
        folder="inpainted",
        mask=mask_file(settings.missing),
        device=torch_device(settings.device),
        **settings.common(),
    )
