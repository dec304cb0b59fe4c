"""What a user sees of a run while it goes: progress bar, log, TensorBoard page, pictures.

On a terminal a bar shows how far a layer is and what the last epoch saw, as much of it as there is
room for. The log has a line for epochs that are some seconds apart, in the file of a run and, where
there is no bar, among what is printed.

One global step, the filter updates since the run began, orders everything on the page; going on
with a run hides what an interrupted one wrote beyond the step where it goes on.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from deconvnet.monitoring.event_files import event_writer
from deconvnet.monitoring.records import EpochStats, InferencePoint, LayerResult
from deconvnet.monitoring.strict_json import to_json
from deconvnet.storage import ownership

log = logging.getLogger(__name__)

# Seconds between the lines of the log that epochs have.
BETWEEN = 5.0
# Attribute of a record of the log that a progress bar shows, too.
IN_BAR = "in_bar"
# Columns from which the bar is drawn in full, and from which it says more than the figures.
WIDE, MIDDLE = 120, 56

# One JSON object a line: what every epoch saw and cost, and what every layer reached.
METRICS = "metrics.jsonl"


class Monitor:
    """Shows a run. Without a folder it is a progress bar alone."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        progress: bool = True,
        config: str = "",
        settings: dict[str, bool | int | float | str] | None = None,
    ):
        self.folder, self.progress = folder, progress
        self.config, self.settings = config, settings or {}
        self._writer = None
        self._bar: tqdm | None = None
        self._inferred = 0
        self._said = -math.inf

    def start(self, step: int, layer: int = 1) -> None:
        """Open the TensorBoard file; events after `step` that an earlier run left are hidden, and
        so is the result of `layer`, which is not finished.
        """
        if self.folder is None:
            return
        from torch.utils.tensorboard.summary import hparams

        _cut(self.folder / METRICS, step, layer)
        self._writer = event_writer(self.folder, purge_step=step + 1)
        self._writer.add_text("config", f"```yaml\n{self.config}\n```", step)
        # add_hparams would put them into a run of its own; written by hand they stay in this one.
        for summary in hparams(self.settings, {"layer1/snr": 0.0}):
            self._writer.file_writer.add_summary(summary)

    def layer(self, number: int, done: int, total: int) -> None:
        """A layer begins, or goes on after `done` of its `total` filter updates."""
        self._open_bar(f"layer {number}", total, initial=done, unit="update")

    def advance(self) -> None:
        """One more filter update."""
        self._bar.update()

    def epoch(self, stats: EpochStats, step: int) -> None:
        """An epoch is over."""
        self._say(stats)
        if self._writer is None:
            return
        for key, value in stats.numbers.items():
            self._writer.add_scalar(f"layer{stats.layer}/{key}", value, step)
        for rank, load in enumerate(stats.loads):
            for phase, seconds in load.seconds.items():
                self._writer.add_scalar(f"seconds of an epoch/rank {rank}: {phase}", seconds, step)
            self._writer.add_scalar(f"memory/rank {rank}, MB", load.memory, step)
        speed = 1 / max(stats.seconds_per_image, 1e-12)
        self._writer.add_scalar("images per second", speed, step)
        self._note(step, **{**asdict(stats), "objective": stats.objective})

    def inferred(self, done: int, total: int) -> None:
        """Some of the images have their final maps."""
        if self._inferred == 0:
            self._open_bar("inference", total, unit="image", leave=False)
        self._bar.update(done - self._inferred)
        self._inferred = done
        if done == total:
            self._inferred = 0
            self._close_bar()

    def result(self, result: LayerResult, values: Tensor, step: int) -> None:
        """A layer is finished; values are the entries of its maps that are not zero."""
        if self._writer is None:
            return
        self._note(step, result=asdict(result), layer=result.layer)
        rows = [f"| {key} | {value:.6g} |" for key, value in asdict(result).items()]
        table = "\n".join(["| all training images | |", "|---|---|", *rows])
        self._writer.add_text(f"layer{result.layer}/result", table, step)
        if len(values):
            self._writer.add_histogram(f"layer{result.layer}/nonzero z", values, step)

    def inference(self, layer: int, curve: list[InferencePoint]) -> None:
        """How inference went in a finished layer, over its iterations.

        In a sub-folder, which TensorBoard shows as a run of its own: its steps are iterations, not
        filter updates.
        """
        if self.folder is None:
            return
        folder = self.folder / "inference" / f"layer{layer}"
        # A run that went back shows only its last curve.
        with event_writer(folder, purge_step=1) as writer:
            for point in curve:
                for key in ("objective", "beta", "density"):
                    tag = f"inference/{key} by iteration"
                    writer.add_scalar(tag, getattr(point, key), point.iteration)

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        """A picture (3, H, W) in [0, 1]: on the page, and as pictures/<name>.png of the run."""
        if self.folder is None:
            return
        if not torch.isfinite(picture).all():
            raise ValueError(f"the picture {name} has values that are not finite")
        picture = picture.clamp(0, 1).cpu()
        self._writer.add_image(name, picture, step)
        save_picture(self.folder / "pictures" / f"{name.replace('/', '-')}.png", picture)

    def flush(self) -> None:
        """Put on the disk what was said so far: before the checkpoint from which a run goes on."""
        if self._writer is not None:
            self._writer.flush()

    def _note(self, step: int, **values: object) -> None:
        """One line of metrics.jsonl, on the disk before the checkpoint that counts on it."""
        ownership.append(self.folder / METRICS, to_json({"step": step, **values}) + "\n")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()
        if self._writer is not None:
            self._writer.close()

    def _say(self, stats: EpochStats) -> None:
        """The figures of an epoch beside the bar, and from time to time in the log."""
        text = (
            f"objective {stats.objective:.1f}, SNR {stats.snr:.1f} dB, density {stats.density:.1%}"
        )
        text += f", {stats.dead} dead" if stats.dead else ""
        short = f"{stats.epoch}/{stats.epochs}, obj {stats.objective:.1f}, SNR {stats.snr:.1f} dB"
        columns = _columns()
        self._bar.bar_format = _bar_format(columns) if columns >= MIDDLE else "{desc}{postfix}"
        if columns >= WIDE:
            self._bar.set_postfix_str(f"epoch {stats.epoch}/{stats.epochs}, {text}")
        else:
            self._bar.set_postfix_str(f"epoch {short}" if columns >= MIDDLE else short)
        if stats.epoch == stats.epochs or time.monotonic() >= self._said + BETWEEN:
            self._said = time.monotonic()
            epoch = f"layer {stats.layer}, epoch {stats.epoch}/{stats.epochs}"
            log.info("%s: %s", epoch, text, extra={IN_BAR: not self._bar.disable})

    def _open_bar(self, name: str, total: int, **options: object) -> None:
        self._close_bar()
        self._bar = tqdm(
            desc=name,
            total=total,
            disable=hidden(self.progress),
            dynamic_ncols=True,
            bar_format=_bar_format(_columns()),
            **options,
        )

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def hidden(progress: bool) -> bool | None:
    """`disable` of a progress bar: a file would get all that a terminal draws over itself."""
    return None if progress else True


def not_in_bar(record: logging.LogRecord) -> bool:
    """For the handlers that write to a terminal: whether a progress bar does not show it there."""
    return not getattr(record, IN_BAR, False)


def _bar_format(columns: int) -> str | None:
    """The bar without what there is no room for: first the bar itself, then times."""
    if columns >= WIDE:
        return None
    return (
        "{desc} {percentage:.0f}% {remaining}{postfix}"
        if columns >= MIDDLE
        else "{desc} {n_fmt}/{total_fmt}{postfix}"
    )


def _columns() -> int:
    """The width of the terminal that the bar is drawn on."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return shutil.get_terminal_size().columns


def memory_used(device: torch.device) -> float:
    """The most memory that this process has used so far, in MB; NaN where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return math.nan
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used / 1e3


def _cut(path: Path, step: int, layer: int) -> None:
    """Take from a file of metrics what an interrupted run wrote beyond a step, lines that are
    damaged or half written, and the results of layers from this one on.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
            if found["step"] > step or ("result" in found and found["layer"] >= layer):
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        kept.append(line + "\n")
    ownership.write(path, "".join(kept).encode())


def save_picture(path: Path, picture: Tensor) -> None:
    """Write a picture (1 or 3, H, W) in [0, 1] to a PNG file, grey or RGB.

    ForeignFileError where something is there that this package did not make (`files.write`).
    """
    pixels = (picture.clamp(0, 1).cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if len(picture) == 1 else pixels).save(buffer, "png")
    ownership.write(path, buffer.getbuffer())
