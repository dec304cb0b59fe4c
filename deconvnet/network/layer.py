"""One layer of a network: its settings, its filters, and the inference of its maps.

N images · C channels of the layer's input · K maps · H, W pixels · h, w filter
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deconvnet.filters.constraint import FilterConstraint
from deconvnet.filters.initial import initial_filters
from deconvnet.filters.update import LearningSettings
from deconvnet.images.preprocessing import SCALES, Spread
from deconvnet.network.codes import ALL, Images, LayerCodes
from deconvnet.operators.convolution import BOUNDARIES
from deconvnet.operators.linear import (
    Deconvolution,
    Identity,
    LinearOperator,
    UnpooledDeconvolution,
    Unpooling,
    WeightedUnpooling,
)
from deconvnet.operators.pooling import UNPOOLINGS, Window, max_pool, unpooling_weights
from deconvnet.sparse_coding.prior import Prior, check_exponent
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.solve import (
    Callback,
    check_quantile,
    lam_from_ratio,
    relative_schedule,
    solve,
)
from deconvnet.support.renaming import with_current_names
from deconvnet.support.validation import (
    as_filter_size,
    as_number,
    as_positive_integer,
    as_positive_number,
    check_settings,
)

TARGETS = ("maps", "image", "both")
POOLINGS = ("after", "in_loop")
CONNECTIVITIES = ("full", "singles", "doubles", "singles_and_doubles", "random_doubles")

# The lam that is used if neither lam nor lam_ratio is given, and the word for one to be chosen.
LAM, AUTO = 2.0, "auto"

# A larger number of maps or filter side can only be a mistake.
MAX_SIZE = 100_000


@dataclass
class LayerSettings:
    """The settings of one layer of a network."""

    # number of feature maps, one per filter
    num_maps: int
    # filters in pixels of the layer's input: the side of a square, or [rows, columns], such as
    # [1, 64] for signals, which are images of one row
    filter_size: Any = 7
    # weight of the reconstruction relative to the sparsity; larger values give less sparse maps.
    # auto (for p = 1, target maps, pooling after): chosen before the layer learns, as the smallest
    # lam whose code predicts hidden pixels of some training images about as well as possible. null:
    # computed from lam_ratio or, without it, 2
    lam: Any = None
    # instead of lam (in a file also set lam: null), for p = 1: lambda = 1/lam as a fraction, in (0,
    # 1], of the smallest lambda for which all maps of some training images are zero; computed
    # before the layer learns
    lam_ratio: float | None = None
    # with lam_ratio or lam=auto: the smallest such lambda is computed for each of these images, and
    # this quantile of them is used, in (0, 1]; below 1, a few images with extreme values do not
    # change lam
    lam_max_quantile: float = 1.0
    # exponent of the sparse prior sum |z|^p, 0 to 1
    p: float = 1.0
    # group sparsity: this many consecutive maps share one magnitude at each position, their l2 norm
    group: int = 1
    # restrict the maps to coefficients >= 0
    non_negative: bool = False
    # which input channels each filter is connected to: full | singles | doubles |
    # singles_and_doubles | random_doubles
    connectivity: str = "full"
    # valid: maps larger than the image by filter_size - 1, as in the papers | circular | zero |
    # reflect: maps of the size of the image, continued like this beyond its border
    boundary: str = "valid"
    # what the maps reconstruct: maps (the pooled maps below) | image (through all layers below) |
    # both
    target: str = "maps"
    # target both: weight of the squared error of the image, relative to that of the maps
    image_weight: float = 1.0
    # [maps, rows, columns] of the max pooling between this layer and the next; null: none
    pool: list[int] | None = None
    # when maps are pooled: after (inference) | in_loop (at every iteration, so that only the maxima
    # survive and the switches are inferred with the maps)
    pooling: str = "after"
    # where unpooling puts a value: switches | for ablation: no_map | no_place | centre | average |
    # everywhere
    unpooling: str = "switches"
    # which statistic of the input maps is scaled to 1: rms | max (largest magnitude) | none
    scale: str = "rms"
    # how maps are inferred
    solver: SolverSettings = field(default_factory=SolverSettings)
    # how filters are learned
    learning: LearningSettings = field(default_factory=LearningSettings)

    def __post_init__(self) -> None:
        for key in ("num_maps", "filter_size", "group"):
            # A configuration may still hold an interpolation here.
            if not isinstance(value := getattr(self, key), str):
                setattr(self, key, _checked_size(value, key))
            elif key == "filter_size" and "${" not in value:
                as_filter_size(value)
        self.image_weight = as_positive_number(self.image_weight, "image_weight")
        check_settings(self.solver, SolverSettings, "solver", optional=False)
        check_settings(self.learning, LearningSettings, "learning", optional=False)
        self._check_lam()
        check_exponent(self.p)
        for key, choices in (
            ("connectivity", CONNECTIVITIES),
            ("boundary", BOUNDARIES),
            ("scale", SCALES),
            ("target", TARGETS),
            ("pooling", POOLINGS),
            ("unpooling", UNPOOLINGS),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)}: choose one of {', '.join(choices)}")
        if isinstance(self.num_maps, int) and self.num_maps % self.group:
            raise ValueError(f"group={self.group}: must divide num_maps={self.num_maps}")
        if self.learning.zero_mean and self.filter_size == 1:
            raise ValueError("learning.zero_mean=True: filter_size=1 leaves only zeros")
        if self.pool is not None and (
            len(self.pool) != 3 or min(self.pool) < 1 or max(self.pool) > MAX_SIZE
        ):
            raise ValueError(
                f"pool={list(self.pool)}: expected [maps, rows, columns], each at least 1, or null"
            )
        if self.pool is None and self.pooling == "in_loop":
            raise ValueError("pooling=in_loop: needs pool=[maps, rows, columns]")
        if self.group > 1 and self.pooling == "in_loop":
            raise ValueError(f"group={self.group}: must be 1 with pooling=in_loop")
        if self.solver.gap is not None and (self.p != 1 or self.pooling == "in_loop"):
            raise ValueError(
                f"solver.gap={self.solver.gap}: needs p=1 and pooling=after, got p={self.p}, "
                f"pooling={self.pooling}"
            )

    def _check_lam(self) -> None:
        """Raise ValueError unless there is one lam, or one way to compute it."""
        quantile = check_quantile(self.lam_max_quantile)
        if quantile != 1 and self.lam_ratio is None and self.lam != AUTO:
            raise ValueError(f"lam_max_quantile={quantile:g}: needs lam_ratio or lam=auto")
        if self.lam_ratio is not None:
            if self.lam is not None:
                raise ValueError(
                    f"lam={self.lam}, lam_ratio={self.lam_ratio}: give one of the two; with "
                    "lam_ratio, lam=null"
                )
            if not 0 < as_number(self.lam_ratio, "lam_ratio") <= 1:
                raise ValueError(f"lam_ratio={self.lam_ratio}: must lie in (0, 1]")
            if self.p != 1:
                raise ValueError(f"lam_ratio={self.lam_ratio}: needs p=1, got p={self.p}")
        elif self.lam is None:
            self.lam = LAM
        elif self.lam == AUTO:
            if self.p != 1 or self.target != "maps" or self.pooling == "in_loop":
                raise ValueError(
                    f"lam=auto: needs p=1, target=maps and pooling=after, got p={self.p}, "
                    f"target={self.target}, pooling={self.pooling}"
                )
            if self.learning.init == "random":
                raise ValueError(
                    "lam=auto: random initial filters predict no hidden pixels; use "
                    "learning.init=patches, or give a number for lam"
                )
        elif not (isinstance(self.lam, str) and "${" in self.lam):
            try:
                self.lam = as_positive_number(self.lam, "lam")
            except ValueError as error:
                raise ValueError(f"{error}, or auto") from None

    @property
    def filter_shape(self) -> tuple[int, int]:
        """(h, w) of the filters."""
        return as_filter_size(self.filter_size)

    @property
    def window(self) -> Window | None:
        """The pooling window if pooling is part of inference, else None."""
        return tuple(self.pool) if self.pooling == "in_loop" else None

    @property
    def prior(self) -> Prior:
        """The sparse prior of the maps."""
        return Prior(self.p, window=self.window, group=self.group, non_negative=self.non_negative)

    def with_lam_of_ratio(self, A: LinearOperator, b: Tensor) -> LayerSettings:
        """These settings with the lam of their lam_ratio for the data b, and the schedule of the
        solver in units of it.
        """
        ratio, quantile = self.lam_ratio, self.lam_max_quantile
        lam = lam_from_ratio(A, b, ratio, self.prior, lam_max_quantile=quantile)
        solver = relative_schedule(self.solver, A, lam, ratio)
        return replace(self, lam=lam, lam_ratio=None, lam_max_quantile=1.0, solver=solver)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str) -> LayerSettings:
        """The settings that `dataclasses.asdict` turned into a dict, with old names of keys.

        where: the file and the layer, for the warning about an old name.
        """
        fields = with_current_names(fields, cls, where)
        fields["solver"] = SolverSettings(**fields["solver"])
        fields["learning"] = LearningSettings(**fields["learning"])
        return cls(**fields)


@dataclass(frozen=True)
class LayerProblem:
    """The problem that the maps z of a layer solve: minimise lam/2 ||T F z - b||^2 + sum |z|^p.

    b: (N, C, H, W), or (N, numbers, 1, 1) if maps and image are stacked. T: from F z, which is in
    the space of the layer's input, to the space of b.
    """

    b: Tensor
    T: LinearOperator = Identity()


class Layer(nn.Module):
    """One layer: filters (K, C, h, w), connectivity (K, C) of 0 and 1, and the scale of its input.

    The layer's input is divided by `scale`, a tensor of shape ().
    """

    filters: Tensor
    connectivity: Tensor
    scale: Tensor

    def __init__(self, settings: LayerSettings, channels: int, generator: torch.Generator):
        super().__init__()
        self.settings = settings
        connectivity = _connectivity(settings.connectivity, settings.num_maps, channels, generator)
        shape = (settings.num_maps, channels, *settings.filter_shape)
        filters = torch.randn(shape, generator=generator, dtype=torch.float32)
        if settings.learning.non_negative:
            filters = filters.abs()
        self.register_buffer("connectivity", connectivity)
        self.register_buffer("filters", filters)
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.set_filters(filters)

    def extra_repr(self) -> str:
        settings, (K, C, h, w) = self.settings, self.filters.shape
        pool = "" if settings.pool is None else f", pool={list(settings.pool)}"
        lam = settings.lam if settings.lam_ratio is None else f"{settings.lam_ratio:g} lambda_max"
        lam = f"{lam:g}" if isinstance(lam, float) else lam
        return f"{K} filters {C}x{h}x{w}, lam={lam}, p={settings.p:g}{pool}"

    @property
    def lam(self) -> float:
        """The weight of the reconstruction; ValueError if it is still to be computed."""
        settings = self.settings
        if not isinstance(settings.lam, (int, float)):
            key = "lam" if settings.lam_ratio is None else "lam_ratio"
            raise ValueError(
                f"{key}={getattr(settings, key)}: lam is computed when the layer begins to learn; "
                "train it first, or give a number for lam"
            )
        return settings.lam

    @property
    def g(self) -> Tensor | None:
        """The connectivity (K, C), or None if it is full."""
        return None if self.settings.connectivity == "full" else self.connectivity

    @property
    def constraint(self) -> FilterConstraint:
        """The constraint on the filters, from the settings and the connectivity."""
        return self.settings.learning.constraint(self.g)

    def set_filters(self, f: Tensor) -> None:
        """Store the projection of f (K, C, h, w) onto `constraint`.

        A filter that vanishes under a constraint on signs or means keeps its previous value.
        """
        constraint = self.constraint
        constrained = constraint.non_negative or constraint.zero_mean
        fallback = self.filters if constrained else None
        self.filters.copy_(constraint.project(f, fallback=fallback))

    def fit_scale(self, pooled: Tensor | Spread) -> None:
        """Set the scale from all pooled maps below (N, C, H, W), or from their statistics."""
        if isinstance(pooled, Tensor):
            spread = Spread()
            spread.add(pooled)
            pooled = spread
        # Maps have the units of the data, so even tiny values need not be rounding errors.
        self.scale.fill_(pooled.scale(self.settings.scale, least=0.0))

    def initialize(self, b: Tensor, generator: torch.Generator, seen: Tensor | None = None) -> None:
        """Set the initial filters of the settings, from the layer's input b (N, C, H, W).

        seen: (N or 1, C or 1, H, W), which values of b are known; None: all.
        """
        settings, learning = self.settings, self.settings.learning
        f = initial_filters(
            settings.num_maps,
            b,
            settings.filter_shape,
            learning.init,
            generator,
            seen=seen,
            constraint=learning.constraint(),
        )
        self.set_filters(f)

    def operator(self) -> Deconvolution:
        """F: maps z (N, K, ...) -> the layer's input (N, C, H, W), with the current filters."""
        settings = self.settings
        return Deconvolution(self.filters, settings.boundary, sparse=settings.window is not None)

    def infer(
        self,
        problem: LayerProblem,
        *,
        settings: SolverSettings | None = None,
        state: Tensor | None = None,
        step: Tensor | None = None,
        training: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """The maps that minimise the objective of the problem, inferred by `solve`.

        settings: of the solver, by default those of the layer; other arguments as for `solve`.
        """
        return solve(
            problem.T @ self.operator(),
            problem.b,
            lam=self.lam,
            prior=self.settings.prior,
            settings=settings or self.settings.solver,
            state=state,
            step=step,
            training=training,
            callback=callback,
        )

    def codes(self, solution: Solution) -> LayerCodes:
        """The codes of a solution: its maps, pooled according to the settings."""
        z, pool = solution.z, self.settings.pool
        cost = (solution.reconstruction, solution.sparsity)
        shape = tuple(z.shape[1:])
        if pool is None:
            return LayerCodes(z, None, shape, *cost)
        lossless = self.settings.window is not None
        return LayerCodes(*max_pool(z, tuple(pool)), shape, *cost, None if lossless else z)

    def decoder(self, codes: LayerCodes, images: Images = ALL) -> LinearOperator:
        """F U: pooled maps of the given images -> the layer's input."""
        F, U = self.operator(), self.unpooling(codes, images)
        return UnpooledDeconvolution(F, U) if isinstance(U, Unpooling) else F @ U

    def unpooling(self, codes: LayerCodes, images: Images = ALL) -> LinearOperator:
        """U: pooled maps of the given images -> maps; the identity if there is no pooling."""
        if codes.switches is None:
            return Identity()
        switches, kind = codes.switches[images], self.settings.unpooling
        if kind == "switches":
            return Unpooling(switches, codes.shape)
        window = tuple(self.settings.pool)
        weights = unpooling_weights(kind, switches, codes.shape, window).to(self.filters.dtype)
        return WeightedUnpooling(weights, window)


def check_input_size(shape: Sequence[int], layer: Layer, number: int) -> None:
    """Raise ValueError if the input (..., H, W) of layer `number` is smaller than its filters."""
    h, w = layer.settings.filter_shape
    H, W = shape[-2:]
    if h > H or w > W:
        source = "images" if number == 1 else f"the pooled maps of layer {number - 1}"
        raise ValueError(
            f"{source} of {H}x{W} are smaller than the {h}x{w} filters of layer {number}: "
            "use larger images, smaller filters or fewer layers"
        )


def _checked_size(value: Any, key: str) -> int | list[int]:
    """A positive size that is not absurd; of filters that are not square, [rows, columns]."""
    sides = as_filter_size(value) if key == "filter_size" else (as_positive_integer(value, key),)
    if max(sides) > MAX_SIZE:
        raise ValueError(f"{key}={value}: must be at most {MAX_SIZE}")
    return sides[0] if len(set(sides)) == 1 else list(sides)


def _connectivity(kind: str, num_maps: int, channels: int, generator: torch.Generator) -> Tensor:
    """(K, C) of 0 and 1: which of C input channels each filter is connected to.

    Zeiler et al. 2010, table of layers.
    """
    if kind == "full":
        return torch.ones(num_maps, channels, dtype=torch.float32)
    singles = [(c,) for c in range(channels)]
    doubles = [(c, d) for c in range(channels) for d in range(c + 1, channels)]
    if kind == "random_doubles":
        if not doubles:
            raise ValueError("connectivity=random_doubles: needs at least two input channels")
        draws = [
            torch.randperm(len(doubles), generator=generator)
            for _ in range(num_maps // len(doubles) + 1)
        ]
        chosen = [doubles[i] for i in torch.cat(draws)[:num_maps].tolist()]
    else:
        chosen = {"singles": singles, "doubles": doubles, "singles_and_doubles": singles + doubles}[
            kind
        ]
        if len(chosen) != num_maps:
            count = {"singles": channels, "doubles": math.comb(channels, 2)}
            required = count.get(kind, channels + math.comb(channels, 2))
            raise ValueError(
                f"num_maps={num_maps}: connectivity={kind} over {channels} input channels makes "
                f"{required} filters"
            )
    g = torch.zeros(num_maps, channels, dtype=torch.float32)
    for k, connected in enumerate(chosen):
        g[k, list(connected)] = 1
    return g
