"""Train a small convolutional network to visualize.

deconvnet train-cnn data.download=true
"""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.hydra_files import logged, unless_refused
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import TrainCnnConfig
from deconvnet.images.datasets import LazyImages, lazy_images
from deconvnet.images.fit import Crop
from deconvnet.monitoring.monitor import save_picture
from deconvnet.monitoring.progress_bar import open_bar
from deconvnet.storage import ownership
from deconvnet.support.devices import torch_device
from deconvnet.visualization.drawing.canvas import shade_signed, tile_grid
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.zfnet import ZFNet, limit_filters
from deconvnet.visualization.models.zoo import LoadedModel, save_model

log = logging.getLogger("train_cnn")


@dataclass(frozen=True)
class Examples:
    pixels: Tensor  # (N, 1 or 3, S, S) uint8
    targets: Tensor  # (N,) int64

    def batches(self, size: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """RGB pixels (n, 3, S, S) in [0, 1] and the numbers of their classes."""
        for n in order.split(size):
            yield self.pixels[n].expand(-1, 3, -1, -1).float() / 255, self.targets[n]


def main(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        with one_line_errors(ValueError, OSError):
            with unless_refused(folder):
                settings = read_settings(cfg)
            with ownership.locked_folder(folder):
                check_outputs(settings, folder)
                with logged(cfg, folder):
                    run(settings, folder)
    except KeyboardInterrupt:
        log.warning("stopped; the network files of the epochs before are in %s", folder)
        raise SystemExit(130) from None


def run(settings: TrainCnnConfig, folder: Path) -> None:
    device = torch_device(settings.device)
    train, test, labels = examples(settings)
    # Parameters, dropout, order and shifts use the global generator.
    torch.manual_seed(settings.seed)
    channels, size = train.pixels.shape[1:3]
    net = ZFNet(channels, len(labels), size=size, width=settings.width, dropout=settings.dropout)
    model = LoadedModel(
        net.to(device),
        settings.name,
        "trained",
        normalization_of(train),
        Crop(size, size),
        labels,
    )
    log.info(
        "%d images of %d classes to train and %d to test, %dx%d, on %s; run folder %s",
        *(len(train.targets), len(labels), len(test.targets), size, size),
        *(device, os.path.relpath(folder)),
    )
    print("\nepoch   loss   test accuracy   seconds   network")
    started = time.perf_counter()
    for epoch, loss in enumerate(learn(model, train, settings), 1):
        if epoch not in settings.checkpoints and epoch != settings.epochs:
            continue
        accuracy = accuracy_of(model, test, settings.batch)
        path = folder / f"epoch-{epoch:03d}.safetensors"
        training = {"epoch": epoch, "test_accuracy": accuracy, "data": asdict(settings.data)}
        save_model(path, replace(model, training=training))
        filters = model.normalization.signed_rgb(net.conv1.weight.detach().cpu())
        save_picture(picture(folder, epoch), tile_grid(shade_signed(filters)))
        seconds, name = time.perf_counter() - started, os.path.relpath(path)
        tqdm.write(f"{epoch:>5}   {loss:>4.2f}   {accuracy:>13.1%}   {seconds:>7.0f}   {name}")


def check_outputs(settings: TrainCnnConfig, folder: Path) -> None:
    """Raise ValueError, before any work, if a file is in the way of the results."""
    if any(folder.glob("epoch-*.safetensors")):
        raise ValueError(f"{folder} already has a network: choose another name=..., or remove it")
    for epoch in {*settings.checkpoints, settings.epochs}:
        if epoch <= settings.epochs:
            ownership.check_writable(picture(folder, epoch))


def picture(folder: Path, epoch: int) -> Path:
    """The file of the first filters after an epoch."""
    return folder / "pictures" / f"conv1-{epoch:03d}.png"


def examples(settings: TrainCnnConfig) -> tuple[Examples, Examples, tuple[str, ...]]:
    """The training and test examples, and the names of the classes."""
    images = lazy_images(settings.data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    if settings.data.source == "torchvision" and settings.data.split == "train":
        others = lazy_images(replace(settings.data, split="test"))
        chosen = torch.arange(len(others))
    else:
        others, held = images, max(1, round(settings.held_out * len(images)))
        chosen, order = order[:held], order[held:]
    if len(order) < 2:
        raise ValueError(f"data.path={settings.data.path}: {len(images)} images are too few")
    train = read(images, order[: settings.max_images].tolist(), "to train", settings)
    test = read(others, chosen.tolist(), "to test", settings)
    labels = sorted({*train[1], *test[1]})
    if len(labels) < 2:
        raise ValueError(
            f"data.path={settings.data.path}: all {len(images)} images are of the class "
            f"{labels[0]}; there must be at least two"
        )
    numbers = {label: number for number, label in enumerate(labels)}
    both = (
        Examples(pixels, torch.tensor([numbers[name] for name in names]))
        for pixels, names in (train, test)
    )
    return *both, tuple(labels)


def read(
    images: LazyImages, chosen: list[int], what: str, settings: TrainCnnConfig
) -> tuple[Tensor, list[str]]:
    """The pixels (n, 1 or 3, S, S) uint8 of these images, and the names of their classes."""
    pixels, labels = [], []
    for index in open_bar(chosen, show=settings.progress, desc=f"images {what}", leave=False):
        image = images[index]
        image = image.mean(0, keepdim=True) if settings.color == "grey" else image
        pixels.append((image * 255).round().byte())
        labels.append(images.label(index))
    return torch.stack(pixels), labels


def normalization_of(examples: Examples) -> Normalization:
    """The normalisation of the planes of these images to mean zero and deviation one."""
    planes = [plane.float() / 255 for plane in examples.pixels.unbind(1)]
    mean, std = ([float(f(plane)) for plane in planes] for f in (torch.mean, torch.std))
    std = [max(value, 1e-3) for value in std]  # of images of one colour
    return Normalization(tuple(mean), tuple(std), "grey" if len(mean) == 1 else "rgb")


def learn(model: LoadedModel, examples: Examples, settings: TrainCnnConfig) -> Iterator[float]:
    """Train the network; yields the mean loss after each epoch."""
    net = model.module
    steps = settings.epochs * -(-len(examples.targets) // settings.batch)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with open_bar(show=settings.progress, total=steps, unit="update") as bar:
        for epoch in range(1, settings.epochs + 1):
            net.train()
            total = 0.0
            order = torch.randperm(len(examples.targets))
            for pixels, targets in examples.batches(settings.batch, order):
                x = normalized(model, augmented(pixels, settings))
                loss = F.cross_entropy(net(x), targets.to(x.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if settings.filter_rms is not None:
                    limit_filters(net, settings.filter_rms)
                total += loss.item() * len(targets)
                bar.update()
                bar.set_postfix_str(f"epoch {epoch}/{settings.epochs}, loss {loss.item():.2f}")
            yield total / len(order)


def augmented(pixels: Tensor, settings: TrainCnnConfig) -> Tensor:
    """The batch randomly mirrored and shifted, the same way for all images."""
    if settings.mirror and torch.rand(()) < 0.5:
        pixels = pixels.flip(3)
    if settings.shift:
        size, margin = pixels.shape[3], settings.shift
        top, left = torch.randint(2 * margin + 1, (2,)).tolist()
        pixels = F.pad(pixels, 4 * [margin], mode="replicate")
        pixels = pixels[:, :, top : top + size, left : left + size]
    return pixels


@torch.no_grad()
def accuracy_of(model: LoadedModel, examples: Examples, batch: int) -> float:
    model.module.eval()
    correct = 0
    for pixels, targets in examples.batches(batch, torch.arange(len(examples.targets))):
        scores = model.module(normalized(model, pixels))
        correct += int((scores.argmax(1).cpu() == targets).sum())
    return correct / len(examples.targets)


def normalized(model: LoadedModel, pixels: Tensor) -> Tensor:
    return model.normalization.apply(pixels.to(model.module.conv1.weight.device))
