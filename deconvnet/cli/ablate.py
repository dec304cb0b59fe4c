"""Measure what the switches of max pooling contribute.

deconvnet ablate run=runs/iccv2011-small
"""

from pathlib import Path

import torch
from omegaconf import DictConfig

from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.images_of_run import read_training_images
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import AblateConfig
from deconvnet.cli.unfinished_run import load_run
from deconvnet.monitoring.monitor import save_picture
from deconvnet.network.switch_ablation import DESCRIPTIONS, SwitchAblation, ablate
from deconvnet.storage import ownership
from deconvnet.support.devices import torch_device
from deconvnet.visualization.pictures.layer_pictures import labelled_images


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError), interruptible():
        run(read_settings(cfg))


def run(settings: AblateConfig) -> None:
    folder = Path(settings.run)
    net = load_run(folder).to(torch_device(settings.device))
    if net.depth < 2 or not any(layer.settings.pool for layer in net.layers[:-1]):
        raise ValueError(f"run={folder}: there is no pooling between its layers")
    path = folder / "pictures" / "switches.png"
    ownership.check_writable(path)
    images, frames = training_images(folder, settings.count)
    codes = net.infer(images, frames=frames, chunk=settings.chunk)
    results = ablate(net, codes, chunk=settings.chunk)
    print(f"\nSNR in dB of {len(codes.y)} training images, preprocessed domain\n")
    print(table(results, net.depth))
    shown = [a for a in results if a.layer == net.depth]
    # Prefer the fairer comparison, with maps inferred again.
    shown = [a for a in shown if a.inferred] or shown
    rows = [("preprocessed", codes.y), *((f"{a.kind}\n{a.snr:.1f} dB", a.images) for a in shown)]
    save_picture(path, labelled_images(net, rows))
    print(f"\nfrom layer {net.depth}, as a picture: {path}")


def training_images(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Evenly spaced training images of a run, and their frames."""
    images = read_training_images(folder, count)
    if images is None:
        raise ValueError(f"run={folder}: not a run folder of deconvnet train with a checkpoint")
    return images


def table(results: list[SwitchAblation], depth: int) -> str:
    """A Markdown table: a row per unpooling, and two columns per layer above the first."""
    values = {(a.kind, a.layer, a.inferred): f"{a.snr:.2f}" for a in results}
    columns = [(layer, new) for layer in range(2, depth + 1) for new in (False, True)]
    names = [f"layer {layer}{', maps inferred for it' if new else ''}" for layer, new in columns]
    lines = ["| unpooling | " + " | ".join(names) + " | |", "|---" * (len(names) + 2) + "|"]
    for kind, meaning in DESCRIPTIONS.items():
        cells = (values.get((kind, *column), "-") for column in columns)
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {meaning} |")
    return "\n".join(lines)
