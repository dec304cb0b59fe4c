"""Reports of a run in progress: progress bar, log, TensorBoard page and pictures.

On a terminal, a bar shows the progress of a layer and, space permitting, the statistics of the last
epoch. Every few seconds the statistics of an epoch are logged, to the log file of the run and, if
there is no bar, to the terminal.

All events on the page are ordered by one global step, the number of filter updates since the run
began. Resuming a run hides the events of the interrupted run after the step from which it resumes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet.monitoring.event_files import event_writer
from deconvnet.monitoring.picture_files import png, webp
from deconvnet.monitoring.progress_bar import in_notebook, open_bar
from deconvnet.monitoring.statistics import EpochStats, InferencePoint, LayerResult
from deconvnet.monitoring.strict_json import to_json
from deconvnet.monitoring.summaries import (
    CURVES,
    INFERENCE,
    RESULTS,
    STEP,
    histogram_summary,
    hparam_summaries,
    image_summary,
    layout_summary,
    picture_description,
    picture_tag,
    result_tag,
    scalar_summary,
    text_summary,
)
from deconvnet.monitoring.time_left import LayerCost, TimeLeft, in_words
from deconvnet.storage import ownership

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

log = logging.getLogger(__name__)

# Seconds between the log lines of epochs.
LOG_INTERVAL = 5.0
# Attribute of log records that the progress bar shows, too.
IN_BAR = "in_bar"
# Columns of a terminal from which the bar is drawn in full, in words, and with the time left.
WIDE, MEDIUM, NARROW = 140, 76, 56

# One JSON object per line: the statistics and costs of each epoch, and the result of each layer.
METRICS = "metrics.jsonl"


class Monitor:
    """Reports a run; without a folder, only on a progress bar and in the log."""

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
        self._last_logged = -math.inf
        self._depth = 1
        self._time_left = TimeLeft([LayerCost(1.0, 0.0)])
        # The statistics of the last epoch, as the bar shows them.
        self._figures = ""

    def expect(self, costs: Sequence[LayerCost]) -> None:
        """Take the costs of all layers, from which the time left of the run is estimated."""
        self._time_left = TimeLeft(costs)

    def start(self, step: int, layer: int = 1, depth: int = 1) -> None:
        """Open the TensorBoard file of a run of `depth` layers.

        Hides events after `step` that an interrupted run left, and its result of `layer`, which is
        not finished.
        """
        self._depth = depth
        if self.folder is None:
            return
        _truncate_metrics(self.folder / METRICS, step, layer)
        self._writer = event_writer(self.folder, purge_step=step + 1)
        config = f"```yaml\n{self.config}\n```"
        self._show(text_summary("config", config, "All settings of the run."), step)
        layers = range(1, depth + 1)
        for summary in (*hparam_summaries(self.settings, layers), layout_summary(layers)):
            self._writer.file_writer.add_summary(summary)

    def layer(self, number: int, done: int, total: int) -> None:
        """Report that a layer begins, or resumes after `done` of its `total` filter updates."""
        self._time_left.begin(number, done, total)
        self._figures = ""
        name = f"layer {number}/{self._depth}" if _columns() >= NARROW else f"layer {number}"
        self._open_bar(name, total, initial=done, unit="update")

    def advance(self) -> None:
        """Report one more filter update."""
        self._time_left.advance()
        self._show_in_bar()
        self._bar.update()

    def epoch(self, stats: EpochStats, step: int) -> None:
        """Report the end of an epoch."""
        self._report_epoch(stats)
        if self._writer is None:
            return
        for key, value in stats.numbers.items():
            self._curve(f"layer{stats.layer}/{key}", value, step, CURVES[key])
        for rank, load in enumerate(stats.loads):
            process = f"the process of rank {rank}"
            for phase, seconds in load.seconds.items():
                tag = f"seconds of an epoch/rank {rank}: {phase}"
                self._curve(tag, seconds, step, f"Seconds of an epoch that {process} spent here.")
            memory = f"The peak memory of {process} so far, in MB."
            self._curve(f"memory/rank {rank}, MB", load.memory, step, memory)
        speed = 1 / max(stats.seconds_per_image, 1e-12)
        self._curve("speed/images per second", speed, step, "Images visited per second.")
        self._append_metrics(step, **{**asdict(stats), "objective": stats.objective})

    def inferred(self, done: int, total: int) -> None:
        """Report that `done` of `total` images have their final maps."""
        if self._inferred == 0:
            self._open_bar("inference", total, unit="image", leave=False)
        self._bar.update(done - self._inferred)
        self._inferred = done
        if done == total:
            self._inferred = 0
            self._close_bar()

    def result(self, result: LayerResult, values: Tensor, step: int) -> None:
        """Report a finished layer; values: the non-zero coefficients of its maps."""
        if self._writer is None:
            return
        self._append_metrics(step, result=asdict(result), layer=result.layer)
        rows = [f"| {name} | {getattr(result, key):.6g} |" for key, (name, _) in RESULTS.items()]
        table = "\n".join([f"| layer {result.layer} | all training images |", "|---|---|", *rows])
        final = f"layer {result.layer} over all training images, when its training has ended"
        summary = text_summary(f"layer{result.layer}/result", table, f"Result of {final}.")
        self._show(summary, step)
        for key, (name, description) in RESULTS.items():
            text = f"{name} of {final}: {description}."
            self._curve(result_tag(result.layer, key), getattr(result, key), step, text)
        if len(values):
            tag = f"layer{result.layer}/nonzero z"
            text = "The coefficients of the maps that are not zero, with the final filters."
            self._show(histogram_summary(tag, values, f"{text} {STEP}"), step)

    def inference(self, layer: int, curve: list[InferencePoint]) -> None:
        """Report the convergence of inference in a finished layer.

        It goes to a subfolder, which TensorBoard shows as a separate run, since its steps are
        iterations rather than filter updates.
        """
        if self.folder is None:
            return
        folder = self.folder / "inference" / f"layer{layer}"
        # After a run was set back, only its last curve is shown.
        with event_writer(folder, purge_step=1) as writer:
            for point in curve:
                for key, description in INFERENCE.items():
                    tag, value = f"inference/{key} by iteration", getattr(point, key)
                    text = f"{description} The step counts iterations of inference."
                    writer.file_writer.add_summary(
                        scalar_summary(tag, value, text), point.iteration
                    )

    def picture(self, name: str, picture: Tensor, step: int, cards: Sequence[Tensor] = ()) -> None:
        """Save a picture (3, H, W) in [0, 1] as pictures/<name>.png and show it on the page.

        cards: the same as smaller pictures, which the page shows instead.
        """
        if self.folder is None:
            return
        if not all(map(torch.isfinite, picture.aminmax())):
            raise ValueError(f"the picture {name} has values that are not finite")
        encode = cache(png)  # the first card is often the whole picture
        tag, description = picture_tag(name), picture_description(name)
        self._show(image_summary(tag, cards or [picture], description, encode=encode), step)
        path = self.folder / "pictures" / f"{name.replace('/', '-')}.png"
        ownership.write(path, encode(picture))

    def map_energies(self, layer: int, energies: Tensor, step: int) -> None:
        """Report how much each map is used: energies (K,), the sums of the squares of the maps."""
        if self._writer is None or not energies.sum() > 0:
            return
        tag, shares = f"layer{layer}/energy of each map", energies / energies.mean()
        text = (
            "The sum of squares of each map, in units of the mean over the maps: 0 is a dead map."
        )
        self._show(histogram_summary(tag, shares, f"{text} {STEP}"), step)

    def flush(self) -> None:
        """Write everything reported so far to disk, before the checkpoint that relies on it."""
        if self._writer is not None:
            self._writer.flush()

    def _show(self, summary: Summary, step: int) -> None:
        self._writer.file_writer.add_summary(summary, step)

    def _curve(self, tag: str, value: float, step: int, description: str) -> None:
        """Add a point to a curve over the updates."""
        self._show(scalar_summary(tag, value, f"{description} {STEP}"), step)

    def _append_metrics(self, step: int, **values: object) -> None:
        """Append a line to metrics.jsonl, before the checkpoint that relies on it is written."""
        ownership.append(self.folder / METRICS, to_json({"step": step, **values}) + "\n")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()
        if self._writer is not None:
            self._writer.close()

    def _report_epoch(self, stats: EpochStats) -> None:
        """Show the statistics of an epoch next to the bar, and every few seconds in the log."""
        epoch = f"epoch {stats.epoch}/{stats.epochs}"
        text = (
            f"objective {stats.objective:.1f}, SNR {stats.snr:.1f} dB, density {stats.density:.1%}"
        )
        text += f", {stats.dead} dead" if stats.dead else ""
        short = f"obj {stats.objective:.5g}, SNR {stats.snr:.1f} dB"
        columns = _columns()
        if columns >= WIDE:
            self._figures = f"{epoch}, {text}"
        else:
            shown = epoch if columns >= MEDIUM else f"{stats.epoch}/{stats.epochs}"
            self._figures = f"{shown}, {short}"
        self._show_in_bar()
        now = time.monotonic()
        if stats.epoch == stats.epochs or now >= self._last_logged + LOG_INTERVAL:
            self._last_logged = now
            # After the last update of the last layer, less than a second may be left.
            if (left := self._time_left.run_seconds()) is not None and left >= 1:
                text += f", about {in_words(left)} left"
            log.info(
                *("layer %d/%d, %s: %s", stats.layer, self._depth, epoch, text),
                extra={IN_BAR: not self._bar.disable},
            )

    def _show_in_bar(self) -> None:
        """Show the statistics of the last epoch and the time left of the run next to the bar."""
        if self._bar.disable:
            return
        columns, left = _columns(), self._time_left.run_seconds()
        parts = [self._figures] if self._figures else []
        # The bar of a layer stays on the screen when the run is finished.
        if left is not None and not self._time_left.learned and columns >= NARROW:
            parts.append(f"{'about ' if columns >= MEDIUM else ''}{in_words(left)} left")
        self._bar.bar_format = _bar_format(columns)
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def _open_bar(self, name: str, total: int, **options: object) -> None:
        self._close_bar()
        self._bar = open_bar(
            desc=name,
            total=total,
            show=self.progress,
            dynamic_ncols=True,
            bar_format=_bar_format(_columns()),
            **options,
        )

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def not_in_bar(record: logging.LogRecord) -> bool:
    """A filter for log handlers of a terminal: whether the progress bar does not show it."""
    return not getattr(record, IN_BAR, False)


def _bar_format(columns: int) -> str | None:
    """The format of the bar for this many columns; None: tqdm's own."""
    if columns >= WIDE:
        return None
    if columns >= MEDIUM:
        return "{desc} {percentage:3.0f}%{postfix}"
    return "{desc} {percentage:.0f}%{postfix}" if columns >= NARROW else "{desc}{postfix}"


def _columns() -> int:
    """The width of the terminal in columns; a notebook is wide."""
    if in_notebook():
        return WIDE
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return shutil.get_terminal_size().columns


def memory_used(device: torch.device) -> float:
    """The peak memory of this process so far, in MB; NaN if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return math.nan
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used / 1e3


def _truncate_metrics(path: Path, step: int, layer: int) -> None:
    """Remove lines after a step, results of this layer and later ones, and damaged lines."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] > step or ("result" in entry and entry["layer"] >= layer):
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        lines.append(line + "\n")
    ownership.write(path, "".join(lines).encode())


def save_picture(path: Path, picture: Tensor) -> None:
    """Write a picture (1 or 3, H, W) in [0, 1] to a PNG file, grey or RGB, or to a WebP file if the
    path ends in .webp.

    Raises ForeignFileError if a file that this package did not write is there.
    """
    ownership.write(path, webp(picture) if path.suffix == ".webp" else png(picture))
