"""Suggest the number of maps of layer 1 for images, by how well they predict hidden pixels.

deconvnet suggest data=folder data.path=photos
"""

from __future__ import annotations

from omegaconf import DictConfig

from deconvnet.cli import printed_commands
from deconvnet.cli.errors import interruptible, one_line_errors
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import SuggestConfig
from deconvnet.cli.train import for_arrays
from deconvnet.filters.update import Diverged, LearningSettings
from deconvnet.images.datasets import load_images
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.num_maps_choice import NumMapsChoice, choose_num_maps
from deconvnet.support.devices import torch_device


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError, Diverged), interruptible("nothing is written"):
        settings = read_settings(cfg)
        report(suggest(settings), settings)


def suggest(settings: SuggestConfig) -> NumMapsChoice:
    """Compare the numbers of maps on the preprocessed images."""
    device = torch_device(settings.device)
    data = load_images(settings.data)
    preprocessing = for_arrays(settings.preprocessing, settings.data)
    net = DeconvNet([LayerSettings(1, settings.filter_size)], preprocessing).to(device)
    images = data.images.to(device)
    net.preprocessing.fit(images, data.frames)
    y = net.infer(images, frames=data.frames, depth=0).y
    rows, columns = y.shape[2:]
    print(f"{len(y)} images of {rows}x{columns}, filters of {settings.filter_size}", flush=True)
    return choose_num_maps(
        *(y, settings.maps, settings.filter_size),
        lam=settings.lam,
        learning=LearningSettings(epochs=settings.epochs),
        seed=settings.seed,
        progress=settings.progress,
    )


def report(choice: NumMapsChoice, settings: SuggestConfig) -> None:
    """Print the comparison, and the command that trains with the suggestion."""
    print("\nmaps   hidden pixels that are not predicted")
    for number, error in zip(choice.candidates, choice.errors.mean(1).tolist(), strict=True):
        mark = "   suggested" if number == choice.num_maps else ""
        print(f"{number:>4}   {error:>6.1%}{mark}")
    if choice.num_maps == choice.candidates[-1]:
        print("more maps may predict better still: add larger numbers to maps=")
    typed = printed_commands.typed("data", "preprocessing")
    size = printed_commands.setting("model.layer1.filter_size", settings.filter_size)
    chosen = f"model.layer1.num_maps={choice.num_maps} {size} model.layer1.lam=auto"
    train = " ".join([printed_commands.sibling("train"), *typed])
    print(f"\ntrain  {train} +layers=1 {chosen}")
