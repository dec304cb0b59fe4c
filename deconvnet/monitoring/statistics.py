"""Statistics of the epochs, layers and inference of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankLoad:
    """Time and memory of an epoch in one process.

    seconds: by phase; memory: the peak memory of the process so far in MB, on a GPU that of the
    GPU.
    """

    seconds: dict[str, float]
    memory: float


@dataclass(frozen=True)
class EpochStats:
    """Statistics of one epoch of a layer, over all images, each at the time of its visit.

    reconstruction, sparsity: the two terms of the objective, means per image; snr: in dB, 10 log10
    of the energy of the layer's target over the energy of the error; density: fraction of non-zero
    coefficients; dead: number of filters that no map uses; double: number of filters that duplicate
    another; loads: one per rank.
    """

    layer: int
    epoch: int
    epochs: int
    reconstruction: float
    sparsity: float
    snr: float
    density: float
    dead: int
    double: int
    seconds_per_image: float
    loads: tuple[RankLoad, ...] = field(default=(), compare=False)

    @property
    def objective(self) -> float:
        return self.reconstruction + self.sparsity

    @property
    def numbers(self) -> dict[str, float]:
        """The statistics that are plotted over the epochs, by name."""
        not_plotted = ("layer", "epoch", "epochs", "loads")
        values = {key: value for key, value in vars(self).items() if key not in not_plotted}
        return {**values, "objective": self.objective}


@dataclass(frozen=True)
class LayerResult:
    """The final statistics of a layer, with the maps of all training images inferred again.

    objective: mean per image; snr: in dB, of the images reconstructed from this layer, in the
    preprocessed domain; density: fraction of non-zero coefficients; dead: number of maps that are
    zero on all images; seconds: training time.
    """

    layer: int
    objective: float
    snr: float
    density: float
    dead: int
    seconds: float


@dataclass(frozen=True)
class InferencePoint:
    """One iteration of inference: objective (mean per image), beta (mean), density of z."""

    iteration: int
    objective: float
    beta: float
    density: float
