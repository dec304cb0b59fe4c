"""Draws the picture of signals.md: `python docs/signals.py`, a few seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pywt.data
import torch
from matplotlib.figure import Figure
from scipy.ndimage import median_filter

from deconvnet import LearningSettings, learn_filters
from deconvnet.operators.convolution import deconvolve
from deconvnet.signals import as_images, as_signals

DPI = 90
GREY, COLORS = "#999999", ["#1f77b4", "#d62728"]


def electrocardiogram() -> Figure:
    """The signal and its reconstruction, the events of both atoms, and the atoms."""
    recording = pywt.data.ecg().astype(np.float32)
    recording = (recording - median_filter(recording, 301)) / recording.std()
    images = as_images(torch.from_numpy(recording)[None, None])
    learning = LearningSettings(epochs=60, batch_size=None, taper=0.3)
    learned = learn_filters(
        images, 2, (1, 128), lam_ratio=0.15, non_negative=True, learning=learning
    )
    solution = learned.encode(images)
    events, filters = solution.events(), learned.filters
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplot_mosaic([["signal", "0"], ["events", "1"]], width_ratios=[4, 1])
    signal, places = axes["signal"], axes["events"]
    signal.plot(recording, color=GREY, linewidth=2, label="electrocardiogram")
    signal.plot(as_signals(deconvolve(solution.z, filters))[0, 0], color="black", linewidth=1)
    signal.set_title("electrocardiogram (grey) and its reconstruction", fontsize=9)
    times = events.centres()[:, 1]
    for k, color in enumerate(COLORS):
        own = events.map == k
        marks = places.stem(times[own], events.value[own], markerfmt="o", basefmt=" ")
        for artist in (marks.markerline, marks.stemlines):
            artist.set_color(color)
        marks.markerline.set_markersize(3)
        axes[str(k)].plot(as_signals(filters)[k, 0], color=color)
        axes[str(k)].set_title(f"atom {k}", fontsize=9)
    places.sharex(signal)
    places.set_xlabel("time (samples)", fontsize=8)
    places.set_title("events: time and strength of both atoms", fontsize=9)
    for one in axes.values():
        one.tick_params(labelsize=7)
        one.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    electrocardiogram().savefig(Path(__file__).with_name("signals.png"), dpi=DPI)
