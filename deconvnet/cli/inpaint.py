"""Fill in missing pixels with the filters of a trained network.

deconvnet inpaint run=runs/denoise-rgb image=photo.png missing=scratches.png
"""

import torch
from omegaconf import DictConfig
from torch import Tensor

from deconvnet.applications.restoration import Restorer
from deconvnet.applications.restored_pictures import LEVELS, Restored, mask_file, restore, seen
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.reading import read_settings
from deconvnet.cli.settings import InpaintConfig
from deconvnet.network.network import Progress
from deconvnet.support.devices import torch_device


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        inpaint(read_settings(cfg))


def inpaint(settings: InpaintConfig) -> None:
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
        device=torch_device(settings.device),
        **settings.common(),
    )
