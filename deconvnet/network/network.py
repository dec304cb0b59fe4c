"""A deconvolutional network: layers of filters, inference of their maps, and reconstruction.

    D_l = F_1 U_1 S_2 ... F_(l-1) U_(l-1) S_l    input of layer l -> preprocessed images: `decoder`
    R_l = D_l F_l                                maps of layer l -> preprocessed images: `operator`

with deconvolutions F, unpoolings U that use the inferred switches, and rescalings S. If a layer
codes patches, F here is the average of the patches that its maps paint, each times its inferred
norm. The maps of layer l minimise lam/2 ||T F_l z_l - b||^2 + sum |z_l|^p, where `target` sets b
and T:

    maps    b = pooled z_(l-1) / scale_l, T = I           (Zeiler et al. 2010)
    image   b = the preprocessed image, T = D_l           (Zeiler et al. 2011)
    both    the two stacked

Layers are counted from 1, as in the papers.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deconvnet.images.fit import TrainingScale
from deconvnet.images.holes import fill_holes
from deconvnet.images.preprocessing import Preprocessing, PreprocessingSettings
from deconvnet.network.codes import ALL, Codes, Images, join
from deconvnet.network.layer import (
    PATCHES,
    Layer,
    LayerProblem,
    LayerSettings,
    check_input_size,
)
from deconvnet.network.metrics import snr
from deconvnet.operators.convolution import map_size
from deconvnet.operators.linear import Identity, LinearOperator, Mask, Scaling, VerticalStack
from deconvnet.operators.pooling import pooled_shape
from deconvnet.sparse_coding.events import EVENTS
from deconvnet.storage.checkpoint_files import load_newest_checkpoint
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import load_network, save_network
from deconvnet.support.renaming import with_current_names
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import default_device, plain
from deconvnet.support.validation import as_positive_integer, as_tensor

Progress = Callable[[int, int], None]

# `kind` in the settings of a file written by `Learned.save`, which contains filters, no network.
FILTERS = "filters"


class DeconvNet(nn.Module):
    """A stack of layers on top of a preprocessing; its state is entirely in buffers.

    training_scale: of the images that it learned from, for pictures of other images; None if it is
    not known.
    """

    training_scale: TrainingScale | None = None

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
                self.layers.append(Layer(settings, channels, seeded_generator(seed, number)))
            except ValueError as error:
                raise ValueError(f"layer{number}: {error}") from None
            channels = settings.num_pooled_maps

    @property
    def depth(self) -> int:
        return len(self.layers)

    def layer(self, number: int) -> Layer:
        """One layer, counted from 1."""
        return self.layers[self._checked_number("layer", number, least=1) - 1]

    def _checked_number(self, name: str, number: int, *, least: int) -> int:
        """A layer number or a number of layers, from `least` to the depth; else ValueError."""
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
        mask: Tensor | None = None,
        depth: int | None = None,
        chunk: int = 8,
        progress: Progress | None = None,
    ) -> Codes:
        """The sparse maps of images, layer by layer.

        images: (N, 1 or 3, H, W) float in [0, 1], or arrays (N, C, H, W) in any units if
        preprocessing.color is "none"; at least as large as the filters. frames: (N, 4)
        int64, the frame of each picture in its square, as returned by `load_images`. mask: (N or 1,
        1, H, W), >= 0, weights the errors of the images as in `sparse_code`; pixels where it is 0
        are ignored and may have any value. depth: number of layers (None: all; 0: only preprocess).
        chunk: images at a time, which bounds memory and changes results by rounding only.
        progress(done, total) is called after every chunk.
        """
        images = as_tensor(images, "images")
        frames = None if frames is None else as_tensor(frames, "frames")
        chunk = as_positive_integer(chunk, "chunk")
        if images.numel() == 0:
            raise ValueError(f"images must not be empty, got the shape {tuple(images.shape)}")
        depth = self._checked_number("depth", self.depth if depth is None else depth, least=0)
        if images.is_floating_point():
            images = images.to(self.preprocessing.scale.dtype)
        images = images.to(self.device)
        if mask is not None:
            mask = Mask(mask, images[:, :1]).mask.expand(len(images), -1, -1, -1)
            images = fill_holes(images, mask)
            images = images if self.preprocessing.are_arrays else images.clamp(0, 1)
        y, record = self.preprocessing(images, frames, mask)
        self.check_size(tuple(y.shape[2:]), depth)
        codes = Codes((), y, record, mask)
        for _ in range(depth):
            codes = self.infer_next_layer(codes, chunk=chunk, progress=progress)
        return codes

    @plain
    def infer_next_layer(
        self, codes: Codes, *, chunk: int = 8, progress: Progress | None = None
    ) -> Codes:
        """The codes with the maps of the next layer added; arguments as of `infer`."""
        number = len(codes.layers) + 1
        layer = self.layer(number)
        check_input_size(self.layer_input(codes, number).shape, layer, number)
        parts = []
        for images in torch.arange(len(codes.y), device=self.device).split(chunk):
            problem = self.layer_problem(codes, number, images)
            parts.append(layer.codes(layer.infer(problem), problem.norms))
            if progress:
                progress(min(len(parts) * chunk, len(codes.y)), len(codes.y))
        return codes.with_layer(join(parts))

    def check_size(self, size: tuple[int, int], depth: int) -> None:
        """Raise ValueError if images of H x W pixels are too small for a layer up to `depth`."""
        self.map_shapes(size, depth)

    def map_shapes(
        self, size: tuple[int, int], depth: int | None = None
    ) -> list[tuple[int, int, int]]:
        """(K, rows, columns) of the maps of each layer up to `depth`, for images of H x W pixels;
        ValueError if these are too small.
        """
        shapes = []
        for number, layer in enumerate(self.layers[:depth], 1):
            check_input_size(size, layer, number)
            settings = layer.settings
            size = map_size(size, settings.filter_shape, settings.boundary)
            shapes.append((settings.num_maps, *size))
            if settings.pool is not None:
                size = pooled_shape((1, *size), (1, *settings.pool[1:]))[1:]
        return shapes

    def layer_input(self, codes: Codes, number: int, images: Images = ALL) -> Tensor:
        """The input (N, C, H, W) of layer `number`: the image or the rescaled pooled maps below."""
        if number == 1:
            return codes.y[images]
        return codes.layer(number - 1).pooled[images] / self.layer(number).scale

    def layer_problem(self, codes: Codes, number: int, images: Images = ALL) -> LayerProblem:
        """The problem that the maps of layer `number` solve, given the codes of layers below."""
        layer, settings = self.layer(number), self.layer(number).settings
        if settings.coding == PATCHES and number == 1 and codes.mask is not None:
            raise ValueError("layer1.coding=patches: needs images without holes, without a mask")
        if settings.target == "maps" and (number > 1 or settings.coding == PATCHES):
            return layer.problem(self.layer_input(codes, number, images))
        y, decoder = codes.y[images], self.decoder(codes, number, images)
        if codes.mask is not None:
            M = Mask(codes.mask[images], y)
            y, decoder = M.target(y), M @ decoder
        if number == 1 or settings.target == "image":
            return LayerProblem(y, decoder)
        maps = self.layer_input(codes, number, images)
        stack = VerticalStack(
            [Identity(), decoder], [1.0, settings.image_weight**0.5], [maps.shape, y.shape]
        )
        return LayerProblem(stack.join([maps, y]), stack)

    def decoder(self, codes: Codes, number: int, images: Images = ALL) -> LinearOperator:
        """D_l: input of layer `number` -> preprocessed images, with the switches of these codes.

        D_l = F_1 U_1 S_2 ... F_(l-1) U_(l-1) S_l; the identity for layer 1.
        """
        self.layer(number)
        D: LinearOperator = Identity()
        for level in range(1, number):
            layer, scale = self.layer(level), float(self.layer(level + 1).scale)
            D = D @ layer.decoder(codes.layer(level), images)
            D = D if scale == 1 else D @ Scaling(scale)
        return D

    def operator(self, codes: Codes, layer: int, images: Images = ALL) -> LinearOperator:
        """R_l: maps of layer l -> preprocessed images, with the switches of these codes."""
        painting = self.layer(layer).painting(codes.layer(layer), images)
        return self.decoder(codes, layer, images) @ painting

    @plain
    def synthesize(self, codes: Codes, layer: int, *, chunk: int = 8) -> Tensor:
        """R_l z_l (N, C, H, W), the preprocessed images reconstructed from the maps of one layer.

        chunk: images at a time, which bounds memory.
        """
        parts = (codes.select(slice(n, n + chunk)) for n in range(0, len(codes.y), chunk))
        return torch.cat([self.operator(part, layer)(part.layer(layer).z) for part in parts])

    @plain
    def reconstruct(self, codes: Codes, layer: int | None = None) -> Tensor:
        """Pixels (N, 1 or 3, H, W) in [0, 1] from the maps of a layer (default: the highest).

        Of a network for arrays: (N, C, H, W) in their units.
        """
        if not isinstance(codes, Codes):
            raise ValueError(
                f"codes must be the Codes that `infer` returns, got {type(codes).__name__}"
            )
        layer = len(codes.layers) if layer is None else layer
        y = self.synthesize(codes, layer)
        return self.preprocessing.pixels(y, codes.record)

    @plain
    def snr(self, codes: Codes, layer: int) -> float:
        """SNR in dB of `synthesize` for one layer, over all seen pixels of preprocessed images."""
        y, synthesis = codes.y, self.synthesize(codes, layer)
        if codes.mask is not None:
            seen = (codes.mask > 0).expand_as(y)
            y, synthesis = y[seen], synthesis[seen]
        return snr(y, synthesis)

    @property
    def device(self) -> torch.device:
        return self.preprocessing.scale.device

    def to_parts(self, depth: int | None = None) -> tuple[dict[str, Tensor], dict]:
        """(tensors, settings) of the network or of its lowest `depth` layers, for `from_parts`."""
        layers = self.layers[:depth]
        above = tuple(f"layers.{index}." for index in range(len(layers), self.depth))
        tensors = {
            name: tensor.cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith(above)
        }
        settings = {
            "preprocessing": dataclasses.asdict(self.preprocessing.settings),
            "layers": [dataclasses.asdict(layer.settings) for layer in layers],
        }
        if self.training_scale is not None:
            settings["training_scale"] = dataclasses.asdict(self.training_scale)
        return tensors, settings

    def load_parts(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of a network with the same settings and possibly another depth."""
        current = self.state_dict()
        self.load_state_dict({name: tensors.get(name, current[name]) for name in current})

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], settings: dict, source: str | Path = "network"
    ) -> DeconvNet:
        """The network with the tensors and settings of `to_parts`; old names of keys are accepted.

        source: the file that they come from, for warnings about old names.
        """
        layers = [
            LayerSettings.from_dict(fields, f"{source}: layer{number}")
            for number, fields in enumerate(settings["layers"], 1)
        ]
        fields = settings["preprocessing"]
        fields = with_current_names(fields, PreprocessingSettings, f"{source}: preprocessing")
        preprocessing = PreprocessingSettings(**fields)
        # Checked before anything is allocated: the sizes in a damaged file may be absurd.
        size, whitening = preprocessing.whitening_size, "preprocessing.whitening"
        if preprocessing.has_whitening:
            _check_shape(tensors, whitening, (None, None, size, size))
        else:  # files of earlier versions have it
            tensors = {name: value for name, value in tensors.items() if name != whitening}
        for index, layer in enumerate(layers):
            shape = (layer.num_maps, None, *layer.filter_shape)
            _check_shape(tensors, f"layers.{index}.filters", shape)
        net = cls(layers, preprocessing)
        net.load_state_dict(tensors)
        if "training_scale" in settings:  # files of earlier versions do not have it
            net.training_scale = TrainingScale(**settings["training_scale"])
        return net

    def save(self, path: str | Path) -> None:
        """Write the whole network to a .safetensors file, which is safe to share and to load."""
        save_network(Path(path), *self.to_parts())


def load(path: str | Path) -> DeconvNet:
    """The network in the newest valid checkpoint of a run folder, or in a network file."""
    path = Path(path)
    if path.is_dir():
        checkpoint = load_newest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            raise ValueError(
                f"{path}: no checkpoint in this folder; expected a run of `deconvnet train`"
            )
        state, source = checkpoint
        network = state.get("network", {})
        tensors, settings = network.get("tensors"), network.get("settings")
    elif path.is_file():
        source = path
        tensors, settings = load_network(path)
    else:
        runs = sorted(folder.parent.name for folder in path.parent.glob("*/checkpoints"))
        more = ", ..." if len(runs) > 8 else ""
        hint = f"; {path.parent} has the runs {', '.join(runs[:8])}{more}" if runs else ""
        raise ValueError(f"{path}: no such run folder or network file{hint}")
    return restore_network(source, tensors, settings)


def restore_network(source: str | Path, tensors: dict[str, Tensor], settings: dict) -> DeconvNet:
    """`DeconvNet.from_parts` of the content of a file; InvalidFileError if it is not a network."""
    kind = settings.get("kind") if isinstance(settings, dict) else None
    if kind == FILTERS:
        raise InvalidFileError(
            f"{source}: holds filters of learn_filters or learn_online, not a network; use "
            "deconvnet.Learned.load"
        )
    if kind == EVENTS:
        raise InvalidFileError(
            f"{source}: holds events of a code, not a network; use deconvnet.Events.load"
        )
    try:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is not finite")
        return DeconvNet.from_parts(tensors, settings, source)
    except Exception as error:  # invalid settings may fail anywhere
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidFileError(f"{source}: not a network of this version ({reason})") from None


def _check_shape(tensors: dict[str, Tensor], name: str, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError if the shape of a tensor contradicts the settings; None: any size."""
    actual = tuple(tensors[name].shape)
    fits = len(actual) == len(shape) and all(
        expected in (None, size) for size, expected in zip(actual, shape, strict=True)
    )
    if not fits:
        text = ", ".join("any" if expected is None else str(expected) for expected in shape)
        raise ValueError(f"{name} has the shape {actual}, the settings say ({text})")
