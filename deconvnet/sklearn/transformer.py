"""A deconvolutional network as a scikit-learn transformer from images to sparse features.

    N images · C channels · H, W pixels · K maps of the top layer

`fit` learns the filters of one or more layers, `transform` infers the maps, and `inverse_transform`
reconstructs images from them. Images are centred by the mean of each channel over all images of
`fit` and divided by one number, so X may have any units, lam does not depend on them, and
reconstructions have the units of X.

Rows that are not images are signals: images of one row, coded by filters of one row. For trials of
several channels there is `SignalDictionary`.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_array, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from deconvnet.applications.classification.grid_features import (
    POOLINGS,
    Grid,
    grid_features,
    num_cells,
)
from deconvnet.filters.update import LearningSettings
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.monitoring.statistics import EpochStats
from deconvnet.network.codes import Codes
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.sklearn.arrays import (
    as_array,
    batch_size_of,
    center_and_scale,
    chunk_of,
    is_positive_int,
    validated_rows,
)
from deconvnet.sparse_coding.solve import default_solver
from deconvnet.support.devices import torch_device
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import FilterSize, as_filter_size
from deconvnet.training.in_memory import learn_layers

logger = logging.getLogger(__name__)


class DeconvNetTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Learns filters from images; transforms each image into its sparse maps, or pooled ones.

    X: images (N, H, W) or (N, C, H, W), or rows (N, C*H*W) together with `image_shape`: an array, a
    list or a tensor of real numbers in any units, with `preprocessing` in [0, 1]. Rows without
    `image_shape` are signals of one channel; for (trials, channels, times) use `SignalDictionary`.
    Results are numpy arrays.

    Parameters
    ----------
    layers : list of LayerSettings, or None
        The settings of all layers, including learning; num_maps, filter_size, lam, epochs and
        batch_size are then ignored. None: one layer with those five.
    num_maps : int
        Number of filters, and of maps.
    filter_size : int or (int, int)
        Size of the filters in pixels: the side of squares, or (rows, columns). For signals, which
        are images of one row, the length of the filters. Sizes are reduced to fit the images.
    lam : float
        Weight of the reconstruction relative to the sparsity; larger values give denser maps.
    epochs : int
        Passes over the images.
    batch_size : int or None
        Images per filter update. None: a tenth of the images, at least 8 and at most 64.
    preprocessing : PreprocessingSettings or None
        None: only centre and scale, which `inverse_transform` undoes. Sums of a few small filters
        represent slow changes of brightness poorly: for photographs use PreprocessingSettings(), as
        networks do (color="grey" for one channel). The maps do not represent what it removes.
    image_shape : tuple of int, or None
        (H, W) or (C, H, W) of a row of X, channels first.
    grid : int, sequence of int, or None
        None: the features are the maps of the top layer before its pooling, flattened in the order
        map, row, column. g, or several such as (1, 2, 4): means of |z| over g x g cells of each map
        (`grid_features`). This and the next two may be changed after `fit`.
    pooling : str
        What represents a cell of the grid: "mean" or "max".
    split_signs : bool
        With a grid: the positive and the negative coefficients have cells of their own, so there
        are twice as many features.
    max_images : int or None
        Filters are learned from at most this many images, drawn at random. None: from all.
    random_state : int, RandomState or None
        An int gives the same filters every time.
    device : str
        "auto" (cuda if available, else cpu), or a torch device.

    Attributes
    ----------
    net_ : DeconvNet
        The network, on the CPU. Its target is (X - mean_) / scale_, or the output of its own
        preprocessing.
    mean_, scale_ : array (C, 1, 1) and float
        With `preprocessing`, 0 and the scale of that.
    filters_ : array (K, C, h, w)
        The filters of the lowest layer.
    history_ : list of EpochStats
        The statistics of each epoch of each layer.
    image_shape_ : (C, H, W)
    map_shape_ : (K, rows, columns)
        Of the top layer.
    n_features_in_ : int
        Numbers per image.

    `fit` holds the maps of all images that it learns from in memory.
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
        filter_size: FilterSize = 7,
        lam: float = 2.0,
        epochs: int = 10,
        batch_size: int | None = None,
        preprocessing: PreprocessingSettings | None = None,
        image_shape: tuple[int, ...] | None = None,
        grid: Grid | None = None,
        pooling: str = "mean",
        split_signs: bool = False,
        max_images: int | None = None,
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
        self.pooling = pooling
        self.split_signs = split_signs
        self.max_images = max_images
        self.random_state = random_state
        self.device = device

    @plain
    def fit(self, X: ArrayLike, y: object = None) -> DeconvNetTransformer:
        """Learn the filters from X, layer by layer; y is ignored.

        Raises ValueError if X or a parameter is out of range, and Diverged if the objective becomes
        infinite or NaN.
        """
        self._check_pooling()
        images = self._images(X, reset=True)
        device = torch_device(self.device)
        self._device = str(device)
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        images = self._learned_from(images, random)
        layers = self._layers(len(images), device)
        net = DeconvNet(layers, self._preprocessing(), seed=seed).to(device)
        self._fit_center(net, images)
        coefficients = max(layer.num_maps for layer in layers) * math.prod(images.shape[2:])
        self._chunk = chunk_of(coefficients)
        y = self._network_input(net, images)
        self.history_ = learn_layers(net, y, seed=seed, chunk=self._chunk)
        self.filters_ = net.layer(1).filters.cpu().numpy()
        self.map_shape_ = tuple(self._maps(net, images[:1]).shape[1:])
        self.net_ = net.cpu()
        return self

    @plain
    def transform(self, X: ArrayLike) -> np.ndarray:
        """The features of images, (N, features) in float32.

        Up to rounding, an image has the same features in any batch.
        """
        check_is_fitted(self)
        self._check_pooling()
        images = self._images(X, reset=False)
        # On the device of fit, if this machine has it; net_ itself stays on the CPU, for pickle.
        device = self._device if torch.cuda.is_available() else "cpu"
        net = self.net_ if device == "cpu" else copy.deepcopy(self.net_).to(device)
        features = np.empty((len(images), self._n_features_out), np.float32)
        for start in range(0, len(images), self._chunk):
            part = slice(start, start + self._chunk)
            z = self._maps(net, images[part])
            features[part] = self._pooled(z).cpu().numpy()
        return features

    @plain
    def inverse_transform(self, Z: ArrayLike) -> np.ndarray:
        """Images reconstructed from the maps Z (N, features), in the shape and units of X.

        For Z = transform(X) they approximate X, more closely for larger lam. With `preprocessing`
        they are the images without what its steps removed: (N, planes, H, W) for 4-D X, rows for
        2-D. Raises ValueError with a grid, and if there is pooling between layers, whose switches
        are not part of Z.
        """
        check_is_fitted(self)
        if self.grid is not None:
            raise ValueError(
                f"grid={self.grid!r}: cell means cannot be inverted to maps; use grid=None"
            )
        for number, layer in enumerate(self.net_.layers, 1):
            for key, simple in (("coding", "convolution"), ("split_signs", False)):
                if (value := getattr(layer.settings, key)) != simple:
                    raise ValueError(
                        f"{key}={value} of layer {number}: the images of its features also need "
                        f"what inference remembers; use layers with {key}={simple}, or "
                        "net_.reconstruct"
                    )
        *below, _ = self.net_.layers
        for number, layer in enumerate(below, 1):
            if layer.settings.pool is not None:
                raise ValueError(
                    f"pool={list(layer.settings.pool)} of layer {number}: its switches are not "
                    "part of the features; use layers with pool=None, or net_.reconstruct"
                )
        Z = check_array(as_array(Z), dtype=np.float32)
        if Z.shape[1] != self._n_features_out:
            raise ValueError(
                f"Z has {Z.shape[1]} features, but maps of the shape {self.map_shape_} have "
                f"{self._n_features_out}"
            )
        z = torch.from_numpy(np.array(Z)).view(-1, *self.map_shape_)
        y = torch.cat([self._reconstruct(part) for part in z.split(self._chunk)])
        images = y.numpy() * self.scale_ + self.mean_
        # In the shape of X: rows, without the channel, or unchanged.
        shape = {1: (-1,), 2: images.shape[2:], 3: images.shape[1:]}[len(self._fit_shape)]
        return images.reshape(len(images), *shape)

    @property
    def _n_features_out(self) -> int:
        if self.grid is None:
            return math.prod(self.map_shape_)
        return (1 + self.split_signs) * self.map_shape_[0] * num_cells(self.grid)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _check_pooling(self) -> None:
        """Raise ValueError for a wrong grid, or a pooling without one."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r}: choose one of {', '.join(POOLINGS)}")
        if self.grid is not None:
            num_cells(self.grid)
        elif self.pooling != "mean" or self.split_signs:
            key = "split_signs" if self.split_signs else "pooling"
            raise ValueError(f"{key}={getattr(self, key)}: needs a grid")

    def _pooled(self, z: Tensor) -> Tensor:
        """The features (N, features) of maps z (N, K, rows, columns)."""
        if self.grid is None:
            return z.flatten(1)
        return grid_features(z, self.grid, pooling=self.pooling, split_signs=self.split_signs)

    def _learned_from(self, images: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """The images from which filters are learned, in their order."""
        most = self.max_images
        if most is None:
            return images
        if not is_positive_int(most):
            raise ValueError(f"max_images={most!r}: must be a whole number from 1, or None")
        if len(images) <= most:
            return images
        return images[np.sort(random.choice(len(images), most, replace=False))]

    def _images(self, X: ArrayLike, *, reset: bool) -> np.ndarray:
        """X as (N, C, H, W), checked; with reset, later calls must have the same shape."""
        rows, shape = validated_rows(self, X, ndims=(3, 4), reset=reset)
        if reset:
            self.image_shape_ = self._image_shape(shape, rows.shape[1])
            self._fit_shape = shape or rows.shape[1:]
        elif shape is not None and _with_channels(shape) != self.image_shape_:
            raise ValueError(f"X has images of {shape}, but fit had {self.image_shape_}")
        return rows.reshape(-1, *self.image_shape_)

    def _image_shape(self, shape: tuple[int, ...] | None, numbers: int) -> tuple[int, int, int]:
        """(C, H, W) of images of this shape, or of rows of this many numbers if it is None."""
        given = self.image_shape
        if given is None:
            image_shape = (1, 1, numbers) if shape is None else _with_channels(shape)
            if shape is None:
                _warn_of_rows_of_images(numbers)
        else:
            sides = given if isinstance(given, Sequence) else ()
            if len(sides) not in (2, 3) or not all(map(is_positive_int, sides)):
                raise ValueError(f"image_shape={given}: must be (H, W) or (C, H, W)")
            image_shape = _with_channels(given)
            if shape is not None and _with_channels(shape) != image_shape:
                raise ValueError(f"image_shape={given}: X has images of {shape}")
            if math.prod(image_shape) != numbers:
                raise ValueError(
                    f"image_shape={given}: X has rows of {numbers} numbers, "
                    f"not {math.prod(image_shape)}"
                )
        channels, rows, last = image_shape
        if self.preprocessing is not None and channels not in (1, 3):
            raise ValueError(
                f"images of {image_shape}: with preprocessing, the number of channels, which comes "
                "first, must be 1 or 3"
            )
        if given is None and last in (3, 4) and min(channels, rows) > 4:
            raise ValueError(
                f"images of {image_shape}: the number of channels comes first; if there are "
                f"{channels}, say image_shape={image_shape}"
            )
        return image_shape

    def _layers(self, images: int, device: torch.device) -> list[LayerSettings]:
        """A copy of the given layers, or one layer for this many images."""
        if self.layers is not None:
            layers = list(self.layers)
            if not layers or not all(isinstance(layer, LayerSettings) for layer in layers):
                raise ValueError(
                    f"layers={self.layers}: must be a list of LayerSettings, at least one"
                )
            return copy.deepcopy(layers)
        for key in ("num_maps", "epochs", "batch_size"):
            value = getattr(self, key)
            if not is_positive_int(value) and (key != "batch_size" or value is not None):
                raise ValueError(f"{key}={value!r}: must be a whole number from 1")
        if not isinstance(self.lam, Real):
            raise ValueError(f"lam={self.lam!r}: must be a positive number")
        batch_size = batch_size_of(self.batch_size, images)
        learning = LearningSettings(epochs=int(self.epochs), batch_size=batch_size)
        solver = default_solver(torch.empty(0, device=device))
        maps, lam = int(self.num_maps), float(self.lam)
        return [LayerSettings(maps, self._fitting_size(), lam, solver=solver, learning=learning)]

    def _fitting_size(self) -> tuple[int, int]:
        """(h, w) of the filters, reduced to fit the images."""
        (h, w), (_, H, W) = as_filter_size(self.filter_size), self.image_shape_
        if h == w and min(H, W) > 1:
            h = w = min(h, H, W)
        return min(h, H), min(w, W)

    def _preprocessing(self) -> PreprocessingSettings:
        """The preprocessing of the network, which leaves centring and scaling to this class."""
        channels = self.image_shape_[0]
        if self.preprocessing is None:
            color = {1: "grey", 3: "rgb"}.get(channels, "none")
            number = channels if color == "none" else None
            return PreprocessingSettings(color=color, channels=number, steps=[], scale="none")
        if not isinstance(self.preprocessing, PreprocessingSettings):
            raise ValueError(
                f"preprocessing={self.preprocessing!r}: must be None or PreprocessingSettings(...)"
            )
        if channels == 1 and self.preprocessing.color != "grey":
            raise ValueError(
                f"preprocessing.color={self.preprocessing.color}: X has one channel; use grey"
            )
        return copy.deepcopy(self.preprocessing)

    def _fit_center(self, net: DeconvNet, images: np.ndarray) -> None:
        """Choose mean_ and scale_, or fit the preprocessing."""
        if self.preprocessing is None:
            # One mean for all pixels: a mean image would leave its negative in every image.
            self.mean_, self.scale_ = center_and_scale(images)
        else:
            net.preprocessing.fit(torch.from_numpy(images.astype(np.float32)).to(net.device))
            self.mean_, self.scale_ = 0.0, float(net.preprocessing.scale)

    def _network_input(self, net: DeconvNet, images: np.ndarray) -> Tensor:
        """y (N, C, H, W), the target of the network."""
        if self.preprocessing is None:
            images = (images - self.mean_) / self.scale_
        y = torch.from_numpy(images.astype(np.float32)).to(net.device)
        if self.preprocessing is not None:
            y, _ = net.preprocessing(y)
        return y

    def _maps(self, net: DeconvNet, images: np.ndarray) -> Tensor:
        """z (N, K, rows, columns) of the top layer."""
        codes = Codes((), self._network_input(net, images), [])
        for _ in net.layers:
            codes = net.infer_next_layer(codes, chunk=len(images))
        return codes.layer(net.depth).z

    def _reconstruct(self, z: Tensor) -> Tensor:
        """R z (N, planes, H, W), through layers without pooling in between."""
        for layer in reversed(self.net_.layers):
            z = layer.operator()(z) * layer.scale
        return z


@functools.cache
def _warn_of_rows_of_images(numbers: int) -> None:
    """Warn, once, that rows are taken for signals if they may be the pixels of square images."""
    for channels in (1, 3):
        side = math.isqrt(numbers // channels)
        if side > 4 and channels * side**2 == numbers:
            image = (side, side) if channels == 1 else (channels, side, side)
            logger.warning(
                f"X has rows of {numbers} numbers, taken for signals: if they are images, give "
                f"image_shape={image}; image_shape=(1, {numbers}) says that they are signals"
            )


def _with_channels(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return (1, *map(int, shape)) if len(shape) == 2 else tuple(map(int, shape))
