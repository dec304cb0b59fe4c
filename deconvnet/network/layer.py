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
    SignMerge,
    UnpooledDeconvolution,
    Unpooling,
    WeightedUnpooling,
)
from deconvnet.operators.patches import PATCH_BOUNDARIES, PatchAverage, extract_patches
from deconvnet.operators.pooling import (
    UNPOOLINGS,
    Window,
    max_pool,
    split_signs,
    unpooling_weights,
)
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
CONVOLUTION, PATCHES = CODINGS = ("convolution", "patches")
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
    # side of the square filters, in pixels of the layer's input; or [rows, columns], such as
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
    # convolution: all maps together explain the input | patches: the coefficients at a position
    # explain the patch of the input there, of the size of the filters, without regard to the
    # patches that overlap it, as in hierarchical matching pursuit (Bo, Ren, Fox 2011); for target
    # maps, pooling after, full connectivity
    coding: str = CONVOLUTION
    # coding patches: divide each patch by its norm, so that weak patterns count as much as strong
    # ones, but by no less than this fraction of the norm of a patch whose values have a root mean
    # square of 1 (that of all inputs with scale=rms); null: patches as they are
    normalize: float | None = None
    # pass on positive and negative parts of the maps separately, as twice as many maps; for pooling
    # after
    split_signs: bool = False
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
    # which statistic of the input maps is scaled to 1: rms | max (largest magnitude) | norm (mean
    # norm over the maps at a position) | none
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
            ("coding", CODINGS),
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
        self._check_patches()
        self._check_split_signs()
        if self.solver.refit and (self.p != 1 or self.pooling == "in_loop"):
            raise ValueError(
                f"solver.refit=True: needs p=1 and pooling=after, got p={self.p}, "
                f"pooling={self.pooling}"
            )
        if self.solver.gap is not None and (self.p != 1 or self.pooling == "in_loop"):
            raise ValueError(
                f"solver.gap={self.solver.gap}: needs p=1 and pooling=after, got p={self.p}, "
                f"pooling={self.pooling}"
            )

    def _check_patches(self) -> None:
        """Raise ValueError for settings that coding=patches does not have."""
        if self.coding != PATCHES:
            if self.normalize is not None:
                raise ValueError(f"normalize={self.normalize}: needs coding=patches")
            return
        for key, choices in (
            ("target", ("maps",)),
            ("pooling", ("after",)),
            ("connectivity", ("full",)),
            ("boundary", PATCH_BOUNDARIES),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"{key}={getattr(self, key)}: must be {' or '.join(choices)} with "
                    "coding=patches"
                )
        if self.learning.update == "cg":
            raise ValueError("learning.update=cg: must be proximal with coding=patches")
        if self.lam == AUTO:
            raise ValueError("lam=auto: give a number or lam_ratio with coding=patches")
        if self.normalize is not None:
            self.normalize = as_positive_number(self.normalize, "normalize")

    def _check_split_signs(self) -> None:
        """Raise ValueError for settings with which signs cannot be split."""
        if not self.split_signs:
            return
        if self.pooling == "in_loop" or self.non_negative:
            other = "non_negative=true" if self.non_negative else "pooling=in_loop"
            raise ValueError(f"split_signs=true: not with {other}")
        known = self.pool is not None and isinstance(self.num_maps, int)
        if known and self.num_maps % self.pool[0]:
            raise ValueError(
                f"split_signs=true: pool={list(self.pool)} must pool a number of maps that divides "
                f"num_maps={self.num_maps}"
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
    def num_pooled_maps(self) -> int:
        """The number of maps that the layer passes on."""
        maps = self.num_maps * (2 if self.split_signs else 1)
        return -(-maps // self.pool[0]) if self.pool else maps

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

    b: (N, C, H, W), or (N, numbers, 1, 1) if maps and image are stacked, or patches of the layer's
    input, (N, C h w, rows, columns). T: from F z, which is in the space of the layer's input or of
    its patches, to the space of b. norms: (N, 1, rows, columns), by which patches were divided.
    """

    b: Tensor
    T: LinearOperator = Identity()
    norms: Tensor | None = None


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
        kind = " of patches" if settings.coding == PATCHES else ""
        return f"{K} filters{kind} {C}x{h}x{w}, lam={lam}, p={settings.p:g}{pool}"

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

    @property
    def atoms(self) -> Tensor:
        """The filters of `operator`: (K, C, h, w) or, of patches as channels, (K, C h w, 1, 1)."""
        if self.settings.coding == PATCHES:
            return self.filters.flatten(1)[:, :, None, None]
        return self.filters

    def operator(self) -> Deconvolution:
        """F: maps z (N, K, ...) -> what they explain, with the current filters: the layer's input
        (N, C, H, W) or its patches (N, C h w, rows, columns).
        """
        settings = self.settings
        return Deconvolution(self.atoms, settings.boundary, sparse=settings.window is not None)

    def problem(self, x: Tensor) -> LayerProblem:
        """The problem of maps that explain the layer's input x (N, C, H, W) or its patches."""
        settings = self.settings
        if settings.coding != PATCHES:
            return LayerProblem(x)
        patches = extract_patches(x, settings.filter_shape, settings.boundary)
        if settings.normalize is None:
            return LayerProblem(patches)
        norms = torch.linalg.vector_norm(patches, dim=1, keepdim=True)
        norms = norms.clamp(min=settings.normalize * math.sqrt(patches.shape[1]))
        return LayerProblem(patches.div_(norms), norms=norms)

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

    def codes(self, solution: Solution, norms: Tensor | None = None) -> LayerCodes:
        """The codes of a solution: its maps, pooled according to the settings.

        norms: of the problem that was solved.
        """
        z, settings = solution.z, self.settings
        cost = (solution.reconstruction, solution.sparsity)
        maps = split_signs(z) if settings.split_signs else z
        switches = None
        if settings.pool is not None:
            maps, switches = max_pool(maps, tuple(settings.pool))
        lossless = maps is z or settings.window is not None
        dense = None if lossless else z
        return LayerCodes(maps, switches, tuple(z.shape[1:]), *cost, dense, norms)

    def painting(self, codes: LayerCodes, images: Images = ALL) -> LinearOperator:
        """Maps of the given images -> the layer's input: F or, of patches, their average with the
        norms of these codes.
        """
        if self.settings.coding != PATCHES:
            return self.operator()
        norms = None if codes.norms is None else codes.norms[images]
        return PatchAverage(self.filters, norms, codes.shape[1:], self.settings.boundary)

    def decoder(self, codes: LayerCodes, images: Images = ALL) -> LinearOperator:
        """F U: pooled maps of the given images -> the layer's input."""
        F, U = self.painting(codes, images), self.unpooling(codes, images)
        if isinstance(F, Deconvolution) and isinstance(U, Unpooling):
            return UnpooledDeconvolution(F, U)
        return F @ U

    def unpooling(self, codes: LayerCodes, images: Images = ALL) -> LinearOperator:
        """U: pooled maps of the given images -> maps; the identity if there is no pooling.

        Where signs are split, the positive and the negative parts are unpooled and subtracted.
        """
        K, H, W = codes.shape
        if self.settings.split_signs:
            return SignMerge() @ self._unpooling(codes.switches, (2 * K, H, W), images)
        return self._unpooling(codes.switches, codes.shape, images)

    def _unpooling(
        self, switches: Tensor | None, shape: tuple[int, int, int], images: Images
    ) -> LinearOperator:
        """The unpooling to maps of this (K, H, W)."""
        if switches is None:
            return Identity()
        switches, kind = switches[images], self.settings.unpooling
        if kind == "switches":
            return Unpooling(switches, shape)
        window = tuple(self.settings.pool)
        weights = unpooling_weights(kind, switches, shape, window).to(self.filters.dtype)
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
