"""The settings of a visualization: search, projection and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deconvnet.support.renaming import renamed
from deconvnet.visualization.projection.backward_rules import AUTO, METHODS, OVERLAPS
from deconvnet.visualization.projection.cnn_backend import GATES
from deconvnet.visualization.search.projecting import WINDOWS

# Current names of settings by their old names.
OLD_NAMES = {"shown": "grid_maps", "explored": "explorer_images"}


@renamed(**OLD_NAMES)
@dataclass
class VisualizationSettings:
    """What to search for, how to project it and what to draw."""

    # dotted names of layers; null: all of a deconvolutional network, else the ends of its stages,
    # or of the quarters of a vision transformer
    layers: Any = field(default=None, metadata={"texts": True})
    # strongest activations to find for each map
    k: int = 9
    # also show activations in what looks like the same part of the same photograph as that of a
    # stronger one, such as a picture that the images contain twice
    near_duplicates: bool = False
    # search only units whose receptive field lies inside the image, if a layer has enough of them
    inside: bool = True
    # maps to project in each layer: how many, drawn at random if there are more; or their numbers,
    # such as [3,7]; null: all
    maps: Any = 150
    # how many of these maps to draw in the grid of a layer
    grid_maps: int = 8
    # how to project units of a trained network: auto (deconv for layers above max pooling, else
    # guided) | deconv | guided | gradient
    method: str = "auto"
    # if an operation below a layer has no rule, refuse deconv and guided, and use the gradient with
    # auto; false: use the gradient of that operation alone
    strict: bool = True
    # how to treat sigmoids that multiply maps: constant | gradient
    gates: str = "constant"
    # how transposed convolutions overlap: sum | normalised (divide by the number of terms, against
    # checkerboards)
    overlap: str = "sum"
    # what tiles show: effective (the box that holds 95% of the energy of the projections of a
    # layer) | field (the whole receptive field)
    window: str = "effective"
    # fraction of the non-zero pixels of a tile that are not clipped to black or white
    contrast: float = 0.98
    # also search and project a control: the same network with shuffled weights
    control: bool = True
    # maps of the grid of a layer whose control is shown next to it; of other maps, the control
    # projects only the strongest activation
    control_maps: int = 3
    # images over which a grey square slides (the occlusion experiment)
    occlusion: int = 0
    # images that are shifted, scaled and rotated (the invariance experiment)
    invariance: int = 0
    # images in the explorer of the gallery
    explorer_images: int = 8
    # write the gallery
    gallery: bool = True
    # images that go through the network at a time, which bounds memory
    batch: int = 8
    # processes that read images ahead; 0: the main process reads them
    workers: int = 0
    # seed of the random choice of maps, and of the control
    seed: int = 0
    # show progress bars
    progress: bool = True

    def __post_init__(self) -> None:
        # A name without the brackets of a list is a list of one name.
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
        for key in ("k", "grid_maps", "control_maps", "batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        for key in ("occlusion", "invariance", "explorer_images", "workers", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: must not be negative")
        self.maps = list(self.maps) if isinstance(self.maps, tuple) else self.maps
        if not _is_choice_of_maps(self.maps):
            raise ValueError(
                f"maps={self.maps}: must be at least 1, a list of numbers such as [3,7], or null "
                "for all"
            )
        if not 0 < self.contrast <= 1:
            raise ValueError(f"contrast={self.contrast}: must be above 0 and at most 1")
        for key, choices in (
            ("method", (AUTO, *METHODS)),
            ("gates", GATES),
            ("overlap", OVERLAPS),
            ("window", WINDOWS),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)}: choose one of {', '.join(choices)}")


def _is_choice_of_maps(maps: object) -> bool:
    """Whether `maps` is a count, distinct numbers of maps, or None."""
    if isinstance(maps, list):
        return bool(maps) and len(set(maps)) == len(maps) and all(_is_whole(n, 0) for n in maps)
    return maps is None or _is_whole(maps, 1)


def _is_whole(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least
