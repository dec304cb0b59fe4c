"""Train a deconvolutional network.

deconvnet train +layers=2
"""

import dataclasses
import logging
import os
import shlex
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from deconvnet.activations.settings import TrainingData, activation_source
from deconvnet.cli import printed_commands
from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.hydra_files import logged, unless_refused
from deconvnet.cli.read_settings import read_settings
from deconvnet.cli.settings import TrainConfig
from deconvnet.filters.update import Diverged
from deconvnet.images.arrays import array_shape
from deconvnet.images.datasets import load_images, stream_images
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.images.sources import training_scale
from deconvnet.monitoring.monitor import Monitor
from deconvnet.monitoring.statistics import LayerResult
from deconvnet.network.network import DeconvNet
from deconvnet.support.communicator import Communicator, RankLost, started
from deconvnet.support.devices import torch_device
from deconvnet.training.loop import Interrupted, train
from deconvnet.training.run_folder import RunFolder, locked_run_folder
from deconvnet.training.session import Limits
from deconvnet.training.training_set import ImageSource

log = logging.getLogger("train")

# Settings that may differ when a run is resumed: they do not affect the result.
FREE = (
    *("layers", "device", "resume", "chunk", "progress", "patience", "name"),
    *("memory", "disk", "init"),
)
# Settings of how images are read, which do not affect the result.
OF_READING = {f"data.{key}" for key in ("download", "skip_unreadable", "stream", "workers")}


def main(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with one_line_errors(ValueError, OSError, Diverged, RankLost):
        with unless_refused(folder):
            settings = read_settings(cfg)
        with started(patience=settings.patience) as communicator:
            try:
                results = run(settings, cfg, folder, communicator)
            except Interrupted:
                if communicator.is_main:
                    # Omit resume=false or a path: the run is now in this folder.
                    again = printed_commands.again("resume")
                    log.warning("stopped and saved; to resume: %s", again)
                raise SystemExit(130) from None
    if communicator.is_main:
        summarize(results, folder, settings.data)


def run(
    settings: TrainConfig, cfg: DictConfig, folder: Path, communicator: Communicator
) -> list[LayerResult]:
    with ExitStack() as stack:
        if communicator.is_main:
            stack.enter_context(locked_run_folder(folder))
        device = torch_device(settings.device)
        layers = settings.layer_settings()
        images = cache(lambda: source(settings.data, device))
        channels = images().read(torch.arange(1))[0].shape[1] if settings.data.model else None
        settings.preprocessing = for_arrays(settings.preprocessing, settings.data, channels)
        net = DeconvNet(layers, settings.preprocessing, seed=settings.seed)
        net.training_scale = None if settings.data.model else training_scale(settings.data)
        record = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}
        saved = None
        if communicator.is_main:
            saved = RunFolder(
                *(folder, record, settings.resume),
                init=settings.init,
                digests=lambda: images().digests(),
            )
            stack.enter_context(logged(cfg, folder))
        log.info(
            "%d %s %dx%d on %s, layers of %s %s; run folder %s",
            images().count,
            f"activations of layer {settings.data.layer}," if settings.data.model else "images of",
            *images().read(torch.arange(1))[0].shape[2:],
            device
            if communicator.world_size == 1
            else f"{communicator.world_size} ranks, {device}",
            " and ".join(str(layer.num_maps) for layer in layers),
            "concepts" if settings.data.model else "maps",
            relative_path(folder),
        )
        monitor = Monitor(
            folder if communicator.is_main else None,
            progress=settings.progress and communicator.is_main,
            config=OmegaConf.to_yaml(cfg, resolve=True),
            settings=hyperparameters(record, len(layers)),
        )
        return train(
            net.to(device),
            images(),
            saved,
            stack.enter_context(monitor),
            seed=settings.seed,
            limits=Limits(
                chunk=settings.chunk,
                hold_codes=not settings.data.stream,
                memory=settings.memory,
                disk=settings.disk,
            ),
            communicator=communicator,
        )


def for_arrays(
    settings: PreprocessingSettings, data: TrainingData, channels: int | None = None
) -> PreprocessingSettings:
    """The preprocessing with the number of channels of the arrays, if images are arrays.

    channels: of activations; of array files, it is read from them.
    """
    if settings.color != "none":
        if channels is not None:
            raise ValueError(
                f"preprocessing.color={settings.color}: activations are no pixels; use none"
            )
        return settings
    if channels is None and data.source != "array":
        raise ValueError(
            f"preprocessing.color=none: is for data.source=array, not {data.source}; choose rgb, "
            "grey or ycbcr"
        )
    what = "arrays" if channels is None else "activations"
    channels = channels or array_shape(data.path)[1]
    if settings.channels not in (None, channels):
        raise ValueError(f"preprocessing.channels={settings.channels}: the {what} have {channels}")
    return dataclasses.replace(settings, channels=channels)


def source(settings: TrainingData, device: torch.device) -> ImageSource:
    """The training images, or their activations: all in memory, or read when they are needed."""
    if settings.model:
        activations = activation_source(settings, device)
        held = settings.store is None and not settings.stream
        return ImageSource.from_tensor(
            activations[:] if held else activations, digests=lambda: activations.digests
        )
    has_holes = settings.mask is not None
    if settings.stream:
        streamed = stream_images(settings)
        return ImageSource(
            len(streamed), streamed.read, streamed.prefetch, lambda: streamed.digests, has_holes
        )
    data = load_images(settings)
    return ImageSource.from_tensor(
        data.images.to(device), data.frames, lambda: data.digests, has_holes=has_holes
    )


def summarize(results: list[LayerResult], folder: Path, data: TrainingData) -> None:
    """Print the result, and the command to try next."""
    run_path = relative_path(folder)
    run_setting = printed_commands.setting("run", run_path)
    if data.model:
        following = f"see concepts {printed_commands.sibling('visualize')} {run_setting}"
    else:
        example = data.path if data.source == "array" else "photo.jpg"
        following = (
            f"reconstruct  {printed_commands.sibling('reconstruct')} {run_setting} "
            f"layer={len(results)} {printed_commands.setting('images', example)}"
        )
    lines = ["", "layer   SNR of the image   non-zero   objective   dead maps   seconds"]
    explained = "all training images, preprocessed"
    if data.model:
        lines[1] = "layer   SNR of activations   non-zero   objective   dead concepts   seconds"
        explained = "the activations of all training images"
    snr, dead = (len(lines[1].split("   ")[n]) for n in (1, 4))
    for r in results:
        lines.append(
            f"{r.layer:>5}   {r.snr:>{snr - 3}.2f} dB   {r.density:>8.2%}   {r.objective:>9.1f}   "
            f"{r.dead:>{dead}}   {r.seconds:>7.1f}"
        )
    lines += [
        f"(over {explained}; non-zero: share of the coefficients)",
        "",
        f"pictures     {run_path}/pictures",
        f"network      {run_path}/network.safetensors",
        f"look         tensorboard --logdir {shlex.quote(str(relative_path(folder.parent)))} "
        "--samples_per_plugin images=99",
        following,
    ]
    print("\n".join(lines))


def relative_path(path: Path) -> Path:
    """A path relative to the current folder."""
    return Path(os.path.relpath(path))


def hyperparameters(record: dict[str, Any], depth: int) -> dict[str, bool | int | float | str]:
    """The settings of a run of `depth` layers by which runs are compared: flat, without those of
    layers above, those that are null, and those of how images are read.
    """
    model = {f"layer{number}": record["model"][f"layer{number}"] for number in range(1, depth + 1)}
    values = flat({**record, "model": model})
    return {k: v for k, v in values.items() if k not in OF_READING and v != "None"}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as one level of dotted names, lists and null as text."""
    result = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            result.update(flat(value, f"{name}."))
        else:
            result[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return result
