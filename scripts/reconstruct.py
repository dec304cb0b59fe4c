"""Reconstruct images from the feature maps of a trained network:

python scripts/reconstruct.py run=runs/photographs layer=2 images=photo.jpg
"""

import os

import hydra
from omegaconf import DictConfig

# With another busy process on the machine, threads of OpenMP that spin while they wait cost up to
# ten times the time; on a quiet machine a short spin is as fast. To be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from deconvnet import config
from deconvnet.applications.pictures import reconstruct


@hydra.main(version_base="1.3", config_path="../configs", config_name="reconstruct")
def main(cfg: DictConfig) -> None:
    with config.one_line_errors(ValueError, OSError), config.interruptible():
        run(cfg)


def run(cfg: DictConfig) -> None:
    config.check_complete(cfg)
    layer = None if cfg.layer is None else _number(cfg.layer)
    if not isinstance(cfg.parts, bool):
        raise ValueError(f"parts={cfg.parts}: must be true or false")
    reconstruct(
        *(str(cfg.run), cfg.images),
        layer=layer,
        parts=cfg.parts,
        output=None if cfg.output is None else str(cfg.output),
        memory=cfg.memory,
        device=config.device(cfg.device),
    )


def _number(layer: object) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"layer={layer}: must be a whole number")
    return layer


if __name__ == "__main__":
    config.launch(main)
