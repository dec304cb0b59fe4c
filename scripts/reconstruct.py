"""Reconstruct images from the feature maps of a trained network:

python scripts/reconstruct.py run=runs/photographs layer=2 images=photo.jpg
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

from deconvnet.applications.restored_pictures import reconstruct
from deconvnet.cli import config

config.register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="reconstruct")
def main(cfg: DictConfig) -> None:
    with config.one_line_errors(ValueError, OSError), config.interruptible():
        run(config.read_command(cfg))


def run(settings: config.ReconstructConfig) -> None:
    reconstruct(
        *(settings.run, settings.images),
        layer=settings.layer,
        parts=settings.parts,
        output=settings.output,
        memory=settings.memory,
        device=config.device(settings.device),
    )


if __name__ == "__main__":
    config.launch(main, config.ReconstructConfig)
