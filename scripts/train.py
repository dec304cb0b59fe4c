"""Train a deconvolutional network: python scripts/train.py +layers=2"""

import dataclasses
import logging
import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

# With another busy process on the machine, threads of OpenMP that spin while they wait cost up to
# ten times the time; on a quiet machine a short spin is as fast. To be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from deconvnet import config
from deconvnet.data import load_images
from deconvnet.monitor import LayerResult, Monitor
from deconvnet.network import DeconvNet
from deconvnet.run import Run
from deconvnet.trainer import Diverged
from deconvnet.training import Interrupted, train

log = logging.getLogger("train")

# Settings that may differ between the commands that go on with one run: they do not change what it
# learns.
FREE = ("layers", "device", "resume", "chunk", "progress", "name")

config.register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        with config.one_line_errors(ValueError, OSError, Diverged):
            results = run(config.read(cfg), cfg, folder)
    except Interrupted:
        log.warning("stopped and saved; this goes on from here: %s", command())
        raise SystemExit(130) from None
    summarize(results, folder)


def run(settings: config.Config, cfg: DictConfig, folder: Path) -> list[LayerResult]:
    device = config.device(settings.device)
    layers = settings.layer_settings()
    net = DeconvNet(layers, settings.preprocessing, seed=settings.seed)
    record = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}
    saved = Run(folder, record, settings.resume)
    data = load_images(settings.data)
    images = data.images.to(device)
    log.info(
        "%d images of %dx%d on %s, layers of %s maps; run folder %s",
        len(images),
        *images.shape[2:],
        device,
        " and ".join(str(layer.num_maps) for layer in layers),
        shown(folder),
    )
    with Monitor(
        folder,
        progress=settings.progress,
        config=OmegaConf.to_yaml(cfg, resolve=True),
        settings=config.flat(record),
    ) as monitor:
        return train(
            net.to(device),
            images,
            saved,
            monitor,
            frames=data.frames,
            seed=settings.seed,
            chunk=settings.chunk,
        )


def summarize(results: list[LayerResult], folder: Path) -> None:
    place = shown(folder)
    lines = [
        "",
        "layer   SNR of the image   entries of z not zero   objective   dead maps   seconds",
    ]
    for r in results:
        lines.append(
            f"{r.layer:>5}   {r.snr:>13.2f} dB   {r.density:>21.2%}   {r.objective:>9.1f}   "
            f"{r.dead:>9}   {r.seconds:>7.1f}"
        )
    lines += [
        "(SNR and objective in the preprocessed domain, over all training images)",
        "",
        f"pictures      {place}/pictures",
        f"network       {place}/network.safetensors",
        f"look          tensorboard --logdir {shown(folder.parent)} --samples_per_plugin images=99",
        "reconstruct   python scripts/reconstruct.py "
        f"run={place} layer={len(results)} images=photo.jpg",
    ]
    print("\n".join(lines))


def shown(path: Path) -> Path:
    """A path as the user would type it from here."""
    return Path(os.path.relpath(path))


def command() -> str:
    """The command that goes on with this run, as one types it: without resume=false or a path."""
    kept = (argument for argument in sys.argv if not argument.lstrip("+").startswith("resume="))
    return shlex.join(["python", *kept])


if __name__ == "__main__":
    config.launch(main)
