"""Reconstruct images from the feature maps of a trained network.

deconvnet reconstruct run=runs/photographs layer=2 images=photo.jpg
"""

from omegaconf import DictConfig

from deconvnet.applications.restored_pictures import reconstruct
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.reading import read_settings
from deconvnet.cli.settings import ReconstructConfig
from deconvnet.support.devices import torch_device


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        run(read_settings(cfg))


def run(settings: ReconstructConfig) -> None:
    reconstruct(
        *(settings.run, settings.images),
        layer=settings.layer,
        parts=settings.parts,
        output=settings.output,
        memory=settings.memory,
        device=torch_device(settings.device),
    )
