"""The settings of a visualization: what to search for, how to project it and what to draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deconvnet.visualization.projection.backward_rules import METHODS, OVERLAPS
from deconvnet.visualization.projection.cnn_backend import GATES


@dataclass
class VisualizationSettings:
    """What to look for and to show."""

    # dotted names of layers; null: all of a deconvolutional network, else the last of each size
    layers: Any = field(default=None, metadata={"texts": True})
    # strongest activations of each map
    k: int = 9
    # only activations whose receptive field lies inside the image, where a layer has enough of them
    inside: bool = True
    # maps of each layer to project: so many at random, or all if it has fewer; null: all
    maps: int | None = 150
    # maps in the grid of a layer, of those that are projected
    shown: int = 16
    # of a trained network: deconv | guided | gradient
    method: str = "deconv"
    # refuse layers below which stands an operation that the method has no rule for
    strict: bool = True
    # sigmoids that multiply maps: constant | gradient
    gates: str = "constant"
    # transposed convolutions: sum | normalised, which divides out their checkerboard
    overlap: str = "sum"
    # of the pixels of a tile that are not zero the share that stays short of black and white
    contrast: float = 0.995
    # the same of the network with its weights shuffled, beside every grid
    control: bool = True
    # images of which a grey square is slid over, and images that are shifted, scaled and turned
    occlusion: int = 0
    invariance: int = 0
    # images in the explorer of the gallery
    explored: int = 8
    # write the gallery
    gallery: bool = True
    # images that go through the network at a time, which bounds memory; processes that read them
    batch: int = 8
    workers: int = 0
    # of what is drawn at random: maps, the control
    seed: int = 0
    # show progress bars
    progress: bool = True

    def __post_init__(self) -> None:
        # One name without the brackets of a list is a list of one.
        self.layers = [self.layers] if isinstance(self.layers, str) else self.layers
        if self.layers is not None and not (
            isinstance(self.layers, list | tuple)
            and self.layers
            and all(isinstance(name, str) for name in self.layers)
        ):
            raise ValueError(
                f"layers={self.layers}: give names as [name,name]; layers=[?] lists them"
            )
        self.layers = None if self.layers is None else list(self.layers)
        for key in ("k", "shown", "batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        for key in ("occlusion", "invariance", "explored", "workers", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: must not be negative")
        if self.maps is not None and self.maps < 1:
            raise ValueError(f"maps={self.maps}: must be at least 1, or null for all")
        if not 0 < self.contrast <= 1:
            raise ValueError(f"contrast={self.contrast}: must be above 0 and at most 1")
        for key, choices in (("method", METHODS), ("gates", GATES), ("overlap", OVERLAPS)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)}: choose one of {', '.join(choices)}")
