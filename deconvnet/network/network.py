"""A deconvolutional network: layers of filters, their maps, and the way back to pixels.

    down    R_l = F_1 U_1 S_2 F_2 U_2 S_3 ... F_l, from the maps of layer l to preprocessed images:
            deconvolutions F, unpoolings U with the switches of inference, rescalings S
    up      z_l explains b through T, T F_l z_l = b:
            target "maps"   b = pooled z_(l-1) / scale_l, T = I                     (CVPR 2010)
            target "image"  b = the preprocessed image, T = R_(l-1) U_(l-1) S_l     (ICCV 2011)
            target "both"   the two, one below the other

Layers are counted from 1, as in the papers.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from deconvnet.filters.update import LearningSettings, draw_filters, normalize, patch_sampler
from deconvnet.images.preprocessing import (
    SCALES,
    Preprocessing,
    PreprocessingSettings,
    Spread,
)
from deconvnet.network.codes import ALL, Codes, Images, LayerCodes, join
from deconvnet.operators.convolution import BOUNDARIES, map_size
from deconvnet.operators.linear import (
    Deconvolution,
    Identity,
    LinearOperator,
    Scaling,
    Unpooling,
    VerticalStack,
    WeightedUnpooling,
)
from deconvnet.operators.pooling import (
    UNPOOLINGS,
    Window,
    max_pool,
    pooled_shape,
    unpooling_weights,
)
from deconvnet.sparse_coding.prior import Prior, check_exponent
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.solve import Callback, solve
from deconvnet.storage.checkpoint_files import load_newest_checkpoint
from deconvnet.storage.integrity import InvalidFileError
from deconvnet.storage.network_files import load_network, save_network
from deconvnet.support.modes import default_device, plain
from deconvnet.support.validation import as_tensor, check_settings, positive, whole

Progress = Callable[[int, int], None]

# What a file of `Learned.save` says that it holds; of networks `load` reads the others.
FILTERS = "filters"

TARGETS = ("maps", "image", "both")
POOLINGS = ("after", "in_loop")
WIRINGS = ("full", "singles", "doubles", "singles_and_doubles", "random_doubles")


# More maps, or sides of more pixels, can only be a mistake.
LARGEST = 100_000


@dataclass
class LayerSettings:
    """One layer of a network."""

    # feature maps, and filters
    num_maps: int
    # side of the square filters, in pixels or in positions of the pooled maps below
    filter_size: int = 7
    # weight of the reconstruction against the sparsity; larger is less sparse
    lam: float = 2.0
    # exponent of the sparse prior sum |z|^p, 0 to 1
    p: float = 1.0
    # so many consecutive maps share one magnitude, their l2 norm at each place: sparse together
    group: int = 1
    # maps of entries >= 0
    non_negative: bool = False
    # which maps below a filter sees: full | singles | doubles | singles_and_doubles |
    # random_doubles
    connectivity: str = "full"
    # valid: maps are larger than what they explain, nothing wraps (the papers) | of one size with
    # it: circular | zero: nothing beyond the border | reflect: maps go on as their mirror image
    boundary: str = "valid"
    # what the maps explain: maps (those below, pooled) | image (through all layers below) | both
    target: str = "maps"
    # target both: weight of the image's squared error beside that of the maps
    image_weight: float = 1.0
    # [maps, rows, columns] of the max pooling between this layer and the next; null: none
    pool: list[int] | None = None
    # when maps are pooled: after inference | in_loop, so that only maxima survive in the maps and
    # switches are inferred with them
    pooling: str = "after"
    # where unpooling puts a value: switches | and, to see what they are worth, no_map | no_place |
    # centre | average | everywhere
    unpooling: str = "switches"
    # what becomes 1 in the maps below before they are explained: rms | max, their largest magnitude
    # | none
    scale: str = "rms"
    # how maps are inferred
    solver: SolverSettings = field(default_factory=SolverSettings)
    # how filters are learned
    learning: LearningSettings = field(default_factory=LearningSettings)

    def __post_init__(self) -> None:
        for key in ("num_maps", "filter_size", "group"):
            # Text is a number that a configuration has yet to say.
            if not isinstance(value := getattr(self, key), str):
                square = ", since filters are square" if key == "filter_size" else ""
                value = whole(value, key, square)
                if value > LARGEST:
                    raise ValueError(f"{key}={value}: must be at most {LARGEST}")
                setattr(self, key, value)
        for key in ("lam", "image_weight"):
            setattr(self, key, positive(getattr(self, key), key))
        check_settings(self.solver, SolverSettings, "solver", optional=False)
        check_settings(self.learning, LearningSettings, "learning", optional=False)
        check_exponent(self.p)
        for key, choices in (
            ("connectivity", WIRINGS),
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
            len(self.pool) != 3 or min(self.pool) < 1 or max(self.pool) > LARGEST
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

    @property
    def window(self) -> Window | None:
        """The window of the pooling in the loop of inference."""
        return tuple(self.pool) if self.pooling == "in_loop" else None

    @property
    def prior(self) -> Prior:
        """The sparse prior of the maps."""
        return Prior(self.p, window=self.window, group=self.group, non_negative=self.non_negative)


@dataclass(frozen=True)
class LayerProblem:
    """What a layer explains, and through what: its maps minimise lam/2 ||T F z - b||^2 + |z|^p.

    b: (N, C, H, W), or (N, numbers, 1, 1) where it is several things at once; T: from what the
    layer paints, in the space of the (rescaled) maps below, to b.
    """

    b: Tensor
    T: LinearOperator = Identity()


class Layer(nn.Module):
    """Filters (K, C, h, w), their connectivity (K, C), and what the maps below are divided by."""

    filters: Tensor
    connectivity: Tensor
    scale: Tensor

    def __init__(self, settings: LayerSettings, channels: int, generator: torch.Generator):
        super().__init__()
        self.settings = settings
        wiring = _connectivity(settings.connectivity, settings.num_maps, channels, generator)
        size = settings.filter_size
        shape = (settings.num_maps, channels, size, size)
        filters = torch.randn(shape, generator=generator, dtype=torch.float32)
        if settings.learning.non_negative:
            filters = filters.abs()
        self.register_buffer("connectivity", wiring)
        self.register_buffer("filters", filters)
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.set_filters(filters)

    def extra_repr(self) -> str:
        settings, (K, C, h, w) = self.settings, self.filters.shape
        pool = "" if settings.pool is None else f", pool={list(settings.pool)}"
        return f"{K} filters {C}x{h}x{w}, lam={settings.lam:g}, p={settings.p:g}{pool}"

    @property
    def g(self) -> Tensor | None:
        """The connectivity, or None where it is full."""
        return None if self.settings.connectivity == "full" else self.connectivity

    def set_filters(self, f: Tensor) -> None:
        """Take f (K, C, h, w), disconnected planes set to zero, with the norm of the settings and
        what else they ask of filters; one of which nothing is left stays as it was.
        """
        learning, g = self.settings.learning, self.connectivity[..., None, None]
        asked = dict(non_negative=learning.non_negative, zero_mean=learning.zero_mean)
        kept = self.filters * g if any(asked.values()) else None
        self.filters.copy_(normalize(f * g, learning.norm, fallback=kept, **asked))

    def fit_scale(self, below: Tensor | Spread) -> None:
        """Choose the scale from all the maps below (N, C, H, W), or from what is known of them."""
        if isinstance(below, Tensor):
            spread = Spread()
            spread.add(below)
            below = spread
        # Maps have the units of the data: however small, they are no rounding.
        self.scale.fill_(below.scale(self.settings.scale, least=0.0))

    def initialize(self, b: Tensor, generator: torch.Generator) -> None:
        """Start the filters as the settings say, from what the layer has to explain."""
        draw = patch_sampler(b, self.settings.filter_size, generator)
        self.set_filters(self.draw_filters(self.settings.num_maps, draw, generator))

    def draw_filters(
        self, num: int, draw: Callable[[int], Tensor], generator: torch.Generator
    ) -> Tensor:
        """So many filters (num, C, h, w) as learning starts with: noise, or patches of what is
        explained, draw(number) -> (number, C, h, w).
        """
        learning = self.settings.learning
        return draw_filters(
            num,
            self.filters,
            learning.init,
            generator,
            draw,
            non_negative=learning.non_negative,
            zero_mean=learning.zero_mean,
        )

    def operator(self) -> Deconvolution:
        """F, with the filters as they are now."""
        return Deconvolution(self.filters, self.settings.boundary)

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
        """The maps that solve the problem; the keywords are those of `solve`.

        settings: by default the solver of the layer.
        """
        return solve(
            problem.T @ self.operator(),
            problem.b,
            lam=self.settings.lam,
            prior=self.settings.prior,
            settings=settings or self.settings.solver,
            state=state,
            step=step,
            training=training,
            callback=callback,
        )

    def codes(self, found: Solution) -> LayerCodes:
        """What was found, pooled."""
        z, pool, cost = found.z, self.settings.pool, (found.reconstruction, found.sparsity)
        shape = tuple(z.shape[1:])
        if pool is None:
            return LayerCodes(z, None, shape, *cost)
        lossless = self.settings.window is not None
        return LayerCodes(*max_pool(z, tuple(pool)), shape, *cost, None if lossless else z)

    def unpooling(self, codes: LayerCodes, images: Images = ALL) -> LinearOperator:
        """U, from the pooled maps of some images to maps; the identity without pooling."""
        if codes.switches is None:
            return Identity()
        switches, kind = codes.switches[images], self.settings.unpooling
        if kind == "switches":
            return Unpooling(switches, codes.shape)
        window = tuple(self.settings.pool)
        weights = unpooling_weights(kind, switches, codes.shape, window).to(self.filters.dtype)
        return WeightedUnpooling(weights, window)


class DeconvNet(nn.Module):
    """A stack of layers over a preprocessing; all of its state is in its buffers."""

    def __init__(
        self,
        layers: list[LayerSettings],
        preprocessing: PreprocessingSettings | None = None,
        *,
        seed: int = 0,
    ):
        super().__init__()
        device = default_device()
        with torch.device("cpu"):
            self._build(layers, preprocessing or PreprocessingSettings(), seed)
        self.to(device)

    def _build(
        self, layers: list[LayerSettings], preprocessing: PreprocessingSettings, seed: int
    ) -> None:
        self.preprocessing = Preprocessing(preprocessing)
        self.layers = nn.ModuleList()
        channels = self.preprocessing.channels
        for number, settings in enumerate(layers, 1):
            try:
                self.layers.append(Layer(settings, channels, seeded(seed, number)))
            except ValueError as error:
                raise ValueError(f"layer{number}: {error}") from None
            groups = settings.pool[0] if settings.pool else 1
            channels = -(-settings.num_maps // groups)

    @property
    def depth(self) -> int:
        return len(self.layers)

    def layer(self, number: int) -> Layer:
        """One layer, counted from 1."""
        return self.layers[self._checked("layer", number, least=1) - 1]

    def _checked(self, name: str, number: int, *, least: int) -> int:
        """The number of a layer, or of layers."""
        try:
            index = operator.index(number)
        except TypeError:
            index = -1
        if not least <= index <= self.depth:
            raise ValueError(f"{name}={number!r}: this network has layers 1 to {self.depth}")
        return index

    @plain
    def infer(
        self,
        images: Tensor,
        *,
        frames: Tensor | None = None,
        depth: int | None = None,
        chunk: int = 8,
        progress: Progress | None = None,
    ) -> Codes:
        """The sparse maps of images, layer by layer.

        images: (N, 1 or 3, H, W) float in [0, 1], any size not below a filter. frames: (N, 4), the
        place of each picture in its square, as `load_images` gives them. depth: how many layers
        (default all; 0 only preprocesses). chunk: images at a time, which bounds memory and changes
        results by rounding only. progress(done, total) hears of every chunk.
        """
        images = as_tensor(images, "images")
        frames = None if frames is None else as_tensor(frames, "frames")
        chunk = whole(chunk, "chunk")
        if images.numel() == 0:
            raise ValueError(f"images must not be empty, got the shape {tuple(images.shape)}")
        depth = self._checked("depth", self.depth if depth is None else depth, least=0)
        if images.is_floating_point():
            images = images.to(self.preprocessing.scale.dtype)
        y, record = self.preprocessing(images.to(self.device), frames)
        self.check_size(tuple(y.shape[2:]), depth)
        codes = Codes((), y, record)
        for _ in range(depth):
            codes = self.infer_next_layer(codes, chunk=chunk, progress=progress)
        return codes

    @plain
    def infer_next_layer(
        self, codes: Codes, *, chunk: int = 8, progress: Progress | None = None
    ) -> Codes:
        """The codes with the maps of one more layer."""
        number = len(codes.layers) + 1
        layer = self.layer(number)
        check_size(self.layer_input(codes, number).shape, layer, number)
        parts = []
        for images in torch.arange(len(codes.y), device=self.device).split(chunk):
            parts.append(layer.codes(layer.infer(self.layer_problem(codes, number, images))))
            if progress:
                progress(min(len(parts) * chunk, len(codes.y)), len(codes.y))
        return Codes((*codes.layers, join(parts)), codes.y, codes.record)

    def check_size(self, size: tuple[int, int], depth: int) -> None:
        """Refuse images of H x W pixels that are too small for one of the layers up to `depth`."""
        for number, layer in enumerate(self.layers[:depth], 1):
            check_size(size, layer, number)
            settings = layer.settings
            size = map_size(size, (settings.filter_size,) * 2, settings.boundary)
            if settings.pool is not None:
                size = pooled_shape((1, *size), (1, *settings.pool[1:]))[1:]

    def layer_input(self, codes: Codes, number: int, images: Images = ALL) -> Tensor:
        """What layer `number` stands on: the rescaled pooled maps below it, or the image."""
        if number == 1:
            return codes.y[images]
        return codes.layer(number - 1).pooled[images] / self.layer(number).scale

    def layer_problem(self, codes: Codes, number: int, images: Images = ALL) -> LayerProblem:
        """What layer `number` has to explain, by its settings, given the layers below."""
        settings = self.layer(number).settings
        if number == 1 or settings.target == "maps":
            return LayerProblem(self.layer_input(codes, number, images))
        y, decoder = codes.y[images], self.decoder(codes, number, images)
        if settings.target == "image":
            return LayerProblem(y, decoder)
        maps = self.layer_input(codes, number, images)
        both = VerticalStack(
            [Identity(), decoder], [1.0, settings.image_weight**0.5], [maps.shape, y.shape]
        )
        return LayerProblem(both.join([maps, y]), both)

    def decoder(self, codes: Codes, number: int, images: Images = ALL) -> LinearOperator:
        """T: what layer `number` paints -> preprocessed images, with the switches of these codes.

        T = F_1 U_1 S_2 ... F_(number-1) U_(number-1) S_number
        """
        self.layer(number)
        T: LinearOperator = Identity()
        for level in range(1, number):
            layer, scale = self.layer(level), float(self.layer(level + 1).scale)
            T = T @ layer.operator() @ layer.unpooling(codes.layer(level), images)
            T = T if scale == 1 else T @ Scaling(scale)
        return T

    def operator(self, codes: Codes, layer: int) -> LinearOperator:
        """R_l: maps of layer l -> preprocessed images, with the switches of these codes."""
        return self.decoder(codes, layer) @ self.layer(layer).operator()

    @plain
    def synthesize(self, codes: Codes, layer: int, *, chunk: int = 8) -> Tensor:
        """R_l z_l (N, C, H, W), what one layer makes of the preprocessed images, some at a time."""
        parts = (codes.select(slice(n, n + chunk)) for n in range(0, len(codes.y), chunk))
        return torch.cat([self.operator(part, layer)(part.layer(layer).z) for part in parts])

    @plain
    def reconstruct(self, codes: Codes, layer: int | None = None) -> Tensor:
        """Pixels (N, 1 or 3, H, W) in [0, 1] from the maps of a layer, by default the highest."""
        if not isinstance(codes, Codes):
            raise ValueError(f"codes must be Codes of `infer`, got {type(codes).__name__}")
        layer = len(codes.layers) if layer is None else layer
        y = self.synthesize(codes, layer)
        return self.preprocessing.inverse(y, codes.record).clamp(0, 1)

    @plain
    def snr(self, codes: Codes, layer: int) -> float:
        """SNR in dB of what one layer makes of the preprocessed images, over all of them."""
        return snr(codes.y, self.synthesize(codes, layer))

    @property
    def device(self) -> torch.device:
        return self.preprocessing.scale.device

    def to_parts(self, depth: int | None = None) -> tuple[dict[str, Tensor], dict]:
        """(tensors, settings) of the network or of its lowest layers, to build it again."""
        layers = self.layers[:depth]
        above = tuple(f"layers.{index}." for index in range(len(layers), self.depth))
        tensors = {
            name: tensor.cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith(above)
        }
        return tensors, {
            "preprocessing": dataclasses.asdict(self.preprocessing.settings),
            "layers": [dataclasses.asdict(layer.settings) for layer in layers],
        }

    def load_parts(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of a network with the same settings and perhaps fewer or more layers."""
        own = self.state_dict()
        self.load_state_dict({name: tensors.get(name, own[name]) for name in own})

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], settings: dict) -> DeconvNet:
        """The network that `to_parts` described."""
        layers = [layer_settings(layer) for layer in settings["layers"]]
        preprocessing = PreprocessingSettings(**settings["preprocessing"])
        # Before anything of the sizes in the settings is made: they may be absurd.
        size = preprocessing.whitening_size
        _check_shape(tensors, "preprocessing.whitening", (None, None, size, size))
        for index, layer in enumerate(layers):
            size = layer.filter_size
            _check_shape(tensors, f"layers.{index}.filters", (layer.num_maps, None, size, size))
        net = cls(layers, preprocessing)
        net.load_state_dict(tensors)
        return net

    def save(self, path: str | Path) -> None:
        """Write the whole network to a .safetensors file, safe to share and to load."""
        save_network(Path(path), *self.to_parts())


def layer_settings(plain: dict) -> LayerSettings:
    """The settings of a layer that `dataclasses.asdict` has taken apart."""
    solver, learning = SolverSettings(**plain["solver"]), LearningSettings(**plain["learning"])
    return LayerSettings(**{**plain, "solver": solver, "learning": learning})


def load(path: str | Path) -> DeconvNet:
    """A network from a run folder, its newest valid checkpoint, or from a saved network file."""
    path = Path(path)
    if path.is_dir():
        found = load_newest_checkpoint(path / "checkpoints")
        if found is None:
            raise ValueError(
                f"{path}: no checkpoint in this folder; expected a run of scripts/train.py"
            )
        state, source = found
        saved = state.get("network", {})
        tensors, settings = saved.get("tensors"), saved.get("settings")
    elif path.is_file():
        source = path
        tensors, settings = load_network(path)
    else:
        raise ValueError(f"{path}: no such run folder or network file")
    return network_of(source, tensors, settings)


def network_of(source: str | Path, tensors: dict[str, Tensor], settings: dict) -> DeconvNet:
    """`DeconvNet.from_parts` of what a file holds; InvalidFileError where that is no network."""
    if isinstance(settings, dict) and settings.get("kind") == FILTERS:
        raise InvalidFileError(
            f"{source}: holds filters of learn_filters or learn_online, not a network; use "
            "deconvnet.Learned.load"
        )
    try:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is not finite")
        return DeconvNet.from_parts(tensors, settings)
    except Exception as error:  # settings of any type and size may go wrong anywhere
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidFileError(f"{source}: not a network of this version ({reason})") from None


def snr(reference: Tensor, estimate: Tensor) -> float:
    """10 log10( sum (reference - its mean)^2 / sum (reference - estimate)^2 ) in dB.

    inf where the two are equal, also of a constant reference.
    """
    reference, estimate = reference.double(), estimate.double()
    signal = (reference - reference.mean()).square().sum()
    noise = (reference - estimate).square().sum()
    if noise == 0:
        return math.inf
    return float(10 * torch.log10(signal / noise))


def check_size(shape: Sequence[int], layer: Layer, number: int) -> None:
    """Refuse to explain anything, of shape (..., H, W), that is smaller than a filter."""
    size = layer.settings.filter_size
    H, W = shape[-2:]
    if min(H, W) < size:
        what = "images" if number == 1 else f"the pooled maps of layer {number - 1}"
        raise ValueError(
            f"{what} of {H}x{W} are smaller than the {size}x{size} filters of layer {number}: "
            "use larger images, smaller filters or fewer layers"
        )


def _check_shape(tensors: dict[str, Tensor], name: str, shape: tuple[int | None, ...]) -> None:
    """Refuse a tensor that is not what the settings say; None: of any size."""
    found = tuple(tensors[name].shape)
    fits = len(found) == len(shape) and all(
        want in (None, have) for have, want in zip(found, shape, strict=True)
    )
    if not fits:
        text = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has the shape {found}, the settings say ({text})")


def _connectivity(kind: str, num_maps: int, channels: int, generator: torch.Generator) -> Tensor:
    """(K, C) of 0 and 1: which of the C maps below each of K filters sees (Zeiler et al. 2010,
    table of layers)."""
    if kind == "full":
        return torch.ones(num_maps, channels, dtype=torch.float32)
    singles = [(c,) for c in range(channels)]
    doubles = [(c, d) for c in range(channels) for d in range(c + 1, channels)]
    if kind == "random_doubles":
        if not doubles:
            raise ValueError("connectivity=random_doubles: needs at least two maps below")
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
            needed = count.get(kind, channels + math.comb(channels, 2))
            raise ValueError(
                f"num_maps={num_maps}: connectivity={kind} over {channels} maps below makes "
                f"{needed} filters"
            )
    g = torch.zeros(num_maps, channels, dtype=torch.float32)
    for k, seen in enumerate(chosen):
        g[k, list(seen)] = 1
    return g


def seeded(*seeds: int) -> torch.Generator:
    """A generator of its own for every purpose, from the seed of the run and what it is for."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % (2**62)
    return torch.Generator().manual_seed(seed)
