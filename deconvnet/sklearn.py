"""A deconvolutional network as a transformer of scikit-learn: images in, sparse features out.

    N images · C channels, 1 or 3 · H, W pixels · K maps of the top layer

`fit` learns the filters of one layer or of several, `transform` infers the maps, and
`inverse_transform` paints images from them. Images lose the mean of each channel over all images of
`fit` and are divided by one number, so that any units will do, lam means the same in all of them,
and the way back ends in the units of X.

Rows that are no images are signals. They are coded by filters of one row: in the middle of as many
rows of zeros as a filter has, only the middle rows of filters and maps are not zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn.functional import pad

from deconvnet.applications.classification.grid_features import Grid, grid_features, num_cells
from deconvnet.filters.update import LearningSettings
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.monitoring.records import EpochStats
from deconvnet.network.codes import Codes
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.sparse_coding.solve import default_solver
from deconvnet.support.devices import torch_device
from deconvnet.support.modes import plain
from deconvnet.support.validation import as_tensor
from deconvnet.training.in_memory import learn_layers

FLOATS = (np.float64, np.float32)
# Images are inferred together up to this many, and up to so many entries of maps (64 MiB).
TOGETHER, ENTRIES = 64, 2**24
# Images per filter update: a tenth of all, within these.
BATCH = (8, 64)


class DeconvNetTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Learns filters from images, and gives for every image its sparse maps, or what they are in
    the cells of a grid.

    X: (N, H, W), (N, C, H, W), or rows (N, C*H*W) with an image_shape; an array, a list or a
    tensor, but what comes back are numpy arrays; real numbers in any units,
    and with `preprocessing` in [0, 1]. Rows without an image_shape are signals.

    layers: the settings of every layer, which then say all about learning; None: one layer of
    num_maps filters of filter_size x filter_size, at most the smaller side of the images (signals:
    filter_size, at most their length), learned in so many epochs with batch_size images for an
    update (None: a tenth of the images, 8 to 64). lam weighs the reconstruction: larger is less
    sparse.
    preprocessing: None only centres and scales, which can be undone. Sums of few filters are bad at
    slow changes of brightness: for photographs take PreprocessingSettings(), as networks do, with
    color="grey" for one channel; but no map holds what it takes away.
    image_shape: (H, W) or (C, H, W) of a row of X, channels first.
    grid: None: the features are the maps of the top layer before its pooling, flattened in the
    order map, row, column; g or (1, 2, 4): see `grid_features`. May be changed after `fit`.
    random_state: a number for the same filters every time. device: auto (cuda, else cpu) or a torch
    device.

    After `fit`: net_, the network, on the CPU, which explains (X - mean_) / scale_, or what its own
    preprocessing makes of X; mean_ (C, 1, 1) and scale_ (with `preprocessing` 0 and its scale);
    filters_ (K, C, h, w), those of the lowest layer; history_, what the epochs of all layers saw;
    image_shape_ (C, H, W); map_shape_ (K, rows, columns) of the top layer; n_features_in_, the
    numbers of one image.

    Memory of `fit`: the maps of all images.
    """

    net_: DeconvNet
    mean_: np.ndarray | float
    scale_: float
    filters_: np.ndarray
    history_: list[EpochStats]
    image_shape_: tuple[int, int, int]
    map_shape_: tuple[int, int, int]

    def __init__(
        self,
        layers: list[LayerSettings] | None = None,
        *,
        num_maps: int = 32,
        filter_size: int = 7,
        lam: float = 2.0,
        epochs: int = 10,
        batch_size: int | None = None,
        preprocessing: PreprocessingSettings | None = None,
        image_shape: tuple[int, ...] | None = None,
        grid: Grid | None = None,
        random_state: int | np.random.RandomState | None = 0,
        device: str = "auto",
    ):
        self.layers = layers
        self.num_maps = num_maps
        self.filter_size = filter_size
        self.lam = lam
        self.epochs = epochs
        self.batch_size = batch_size
        self.preprocessing = preprocessing
        self.image_shape = image_shape
        self.grid = grid
        self.random_state = random_state
        self.device = device

    @plain
    def fit(self, X: ArrayLike, y: object = None) -> DeconvNetTransformer:
        """Learn the filters from X, layer by layer; y is not looked at."""
        if self.grid is not None:
            num_cells(self.grid)
        images = self._images(X, reset=True)
        device = torch_device(self.device)
        self._device = str(device)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        layers = self._layers(len(images), device)
        net = DeconvNet(layers, self._preprocessing(), seed=seed).to(device)
        self._fit_center(net, images)
        entries = max(layer.num_maps for layer in layers) * math.prod(images.shape[2:])
        self._together = min(TOGETHER, max(1, ENTRIES // entries))
        y = self._explained(net, images)
        self.history_ = learn_layers(net, y, seed=seed, chunk=self._together)
        if any(self._margin):
            # New filters start with a trace of noise everywhere.
            row = pad(net.layer(1).filters, _negative(self._margin))
            net.layer(1).set_filters(pad(row, self._margin))
        self.filters_ = pad(net.layer(1).filters, _negative(self._margin)).cpu().numpy()
        self.map_shape_ = tuple(self._maps(net, images[:1]).shape[1:])
        self.net_ = net.cpu()
        return self

    @plain
    def transform(self, X: ArrayLike) -> np.ndarray:
        """The features of images, (N, features) in float32; an image has those it has alone."""
        check_is_fitted(self)
        images = self._images(X, reset=False)
        # Where it was fitted, if that is here; the network itself stays on the CPU for pickle.
        device = self._device if torch.cuda.is_available() else "cpu"
        net = self.net_ if device == "cpu" else copy.deepcopy(self.net_).to(device)
        parts = []
        for start in range(0, len(images), self._together):
            z = self._maps(net, images[start : start + self._together])
            parts.append(z.flatten(1) if self.grid is None else grid_features(z, self.grid))
        return torch.cat([part.cpu() for part in parts]).numpy()

    @plain
    def inverse_transform(self, Z: ArrayLike) -> np.ndarray:
        """What the maps Z (N, features) paint, in the shape and the units of X.

        For Z = transform(X) that approximates X, the better the larger lam is. With `preprocessing`
        it is the image without what the steps have taken away: (N, planes, H, W) for 4-D X, rows
        for 2-D. Raises ValueError with a grid, and where there is pooling between the layers, whose
        switches are no part of Z.
        """
        check_is_fitted(self)
        if self.grid is not None:
            raise ValueError(f"grid={self.grid!r}: a mean does not tell its maps; use grid=None")
        *below, _ = self.net_.layers
        for number, layer in enumerate(below, 1):
            if layer.settings.pool is not None:
                raise ValueError(
                    f"pool={list(layer.settings.pool)} of layer {number}: its switches are no part "
                    "of the features; use layers with pool=None, or net_.reconstruct"
                )
        Z = check_array(_array(Z), dtype=np.float32)
        if Z.shape[1] != self._n_features_out:
            raise ValueError(
                f"Z has {Z.shape[1]} features, but maps of shape {self.map_shape_} have "
                f"{self._n_features_out}"
            )
        z = torch.from_numpy(np.array(Z)).view(-1, *self.map_shape_)
        y = torch.cat([self._paint(part) for part in z.split(self._together)])
        painted = y.numpy() * self.scale_ + self.mean_
        # Without the channel, or all in a row, as X was.
        shape = {1: (-1,), 2: painted.shape[2:], 3: painted.shape[1:]}[len(self._shape)]
        return painted.reshape(len(painted), *shape)

    @property
    def _n_features_out(self) -> int:
        if self.grid is None:
            return math.prod(self.map_shape_)
        return self.map_shape_[0] * num_cells(self.grid)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _images(self, X: ArrayLike, *, reset: bool) -> np.ndarray:
        """X as (N, C, H, W), checked; with reset, its shape is what is expected from now on."""
        shape, X = None, _array(X)
        if (X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim) in (3, 4):
            X = check_array(X, dtype=FLOATS, allow_nd=True)
            shape, X = X.shape[1:], X.reshape(len(X), -1)
        rows = validate_data(self, X, dtype=FLOATS, reset=reset)
        if reset:
            self.image_shape_ = self._image_shape(shape, rows.shape[1])
            self._shape = shape or rows.shape[1:]
        elif shape is not None and _with_channels(shape) != self.image_shape_:
            raise ValueError(f"X has images of {shape}, but those of fit were {self.image_shape_}")
        return rows.reshape(-1, *self.image_shape_)

    def _image_shape(self, shape: tuple[int, ...] | None, numbers: int) -> tuple[int, int, int]:
        """(C, H, W) of images of this shape, or of rows of so many numbers."""
        asked = self.image_shape
        if asked is None:
            found = (1, 1, numbers) if shape is None else _with_channels(shape)
        else:
            sides = asked if isinstance(asked, Sequence) else ()
            if len(sides) not in (2, 3) or not all(map(_is_whole, sides)):
                raise ValueError(f"image_shape={asked}: must be (H, W) or (C, H, W)")
            found = _with_channels(asked)
            if shape is not None and _with_channels(shape) != found:
                raise ValueError(f"image_shape={asked}: X has images of {shape}")
            if math.prod(found) != numbers:
                raise ValueError(f"image_shape={asked}: X has rows of {numbers} numbers")
        if found[0] not in (1, 3):
            raise ValueError(
                f"images of {found}: the number of channels comes first and must be 1 or 3"
            )
        return found

    def _layers(self, images: int, device: torch.device) -> list[LayerSettings]:
        """Those that were given, or one for images of this number and shape."""
        self._margin = self._map_margin = (0, 0, 0, 0)
        if self.layers is not None:
            layers = list(self.layers)
            if not layers or not all(isinstance(layer, LayerSettings) for layer in layers):
                raise ValueError(f"layers={self.layers}: must be LayerSettings, one at least")
            return copy.deepcopy(layers)
        for key in ("num_maps", "filter_size", "epochs", "batch_size"):
            value = getattr(self, key)
            if not _is_whole(value) and (key != "batch_size" or value is not None):
                raise ValueError(f"{key}={value!r}: must be a whole number from 1")
        if not isinstance(self.lam, Real):
            raise ValueError(f"lam={self.lam!r}: must be a positive number")
        size = self._fit_margins(int(self.filter_size))
        batch_size = self.batch_size or min(max(images // 10, BATCH[0]), BATCH[1])
        learning = LearningSettings(epochs=int(self.epochs), batch_size=int(batch_size))
        solver = default_solver(torch.empty(0, device=device))
        maps, lam = int(self.num_maps), float(self.lam)
        return [LayerSettings(maps, size, lam, solver=solver, learning=learning)]

    def _fit_margins(self, size: int) -> int:
        """The side of filters that fit; around signals, and around what of their maps is not zero,
        there are zeros from now on: left, right, top, bottom.
        """
        _, H, W = self.image_shape_
        if min(H, W) > 1:
            return min(size, H, W)
        size = min(size, max(H, W))
        before = (size - 1) // 2
        image, maps = (before, size - 1 - before), (size - 1, size - 1)
        none = (0, 0)
        self._margin = (*none, *image) if H == 1 else (*image, *none)
        self._map_margin = (*none, *maps) if H == 1 else (*maps, *none)
        return size

    def _preprocessing(self) -> PreprocessingSettings:
        """That of the network; what centres and scales is beside it."""
        channels = self.image_shape_[0]
        if self.preprocessing is None:
            color = "grey" if channels == 1 else "rgb"
            return PreprocessingSettings(color=color, steps=[], scale="none")
        if channels == 1 and self.preprocessing.color != "grey":
            raise ValueError(
                f"preprocessing.color={self.preprocessing.color}: X has one channel; use grey"
            )
        return copy.deepcopy(self.preprocessing)

    def _fit_center(self, net: DeconvNet, images: np.ndarray) -> None:
        """Choose mean_ and scale_, or fit the preprocessing."""
        if self.preprocessing is None:
            # Of all places together: a mean image would print its negative into every image.
            self.mean_ = images.mean((0, 2, 3), dtype=np.float64)[:, None, None]
            # One at a time: X may be large, and its units such that squares of float32 overflow.
            squares = sum(float(np.square(image - self.mean_).mean()) for image in images)
            scale = math.sqrt(squares / len(images))
            # All numbers the same: what is left is rounding.
            self.scale_ = scale if scale > 1e-12 * np.abs(self.mean_).max() else 1.0
        else:
            net.preprocessing.fit(torch.from_numpy(images.astype(np.float32)).to(net.device))
            self.mean_, self.scale_ = 0.0, float(net.preprocessing.scale)

    def _explained(self, net: DeconvNet, images: np.ndarray) -> Tensor:
        """y (N, C, H, W), what the maps of images explain; around signals with zeros."""
        if self.preprocessing is None:
            images = (images - self.mean_) / self.scale_
        y = torch.from_numpy(images.astype(np.float32)).to(net.device)
        if self.preprocessing is not None:
            y, _ = net.preprocessing(y)
        return pad(y, self._margin)

    def _maps(self, net: DeconvNet, images: np.ndarray) -> Tensor:
        """z (N, K, rows, columns) of the top layer; of signals the row that is not zero."""
        codes = Codes((), self._explained(net, images), [])
        for _ in net.layers:
            codes = net.infer_next_layer(codes, chunk=len(images))
        return pad(codes.layer(net.depth).z, _negative(self._map_margin))

    def _paint(self, z: Tensor) -> Tensor:
        """R z (N, planes, H, W), through layers without pooling between them."""
        z = pad(z, self._map_margin)
        for layer in reversed(self.net_.layers):
            z = layer.operator()(z) * layer.scale
        return pad(z, _negative(self._margin))


def _with_channels(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return (1, *map(int, shape)) if len(shape) == 2 else tuple(map(int, shape))


def _array(X: ArrayLike) -> ArrayLike:
    """A tensor, wherever it is and of whatever type, as an array; anything else as it is."""
    if not isinstance(X, Tensor):
        return X
    X = as_tensor(X, "X").cpu()
    return (X.float() if X.dtype == torch.bfloat16 else X).numpy()


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and value >= 1


def _negative(margin: tuple[int, ...]) -> tuple[int, ...]:
    """The margin that takes this one away again."""
    return tuple(-side for side in margin)
