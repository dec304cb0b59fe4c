"""Feature maps of this package and of other ways to learn or draw filters, with one interface.

    fit(images)     learns without labels from images (N, 1 or 3, H, W), floats in [0, 1]
    maps(images)    maps (N, K, H+h-1, W+w-1) of these or other images, float32, on the device

    N images · C planes · K maps · H, W pixels · h = w = filter_size     y preprocessed images

All methods see the same images, preprocessed with the same settings, so only the method differs.
All maps have a value for each place at which a filter overlaps the image, except that those of
`patch_layer` have one for each pixel. Beyond the border, methods on patches see its pixels
repeated; sparse inference has no pixel to explain there; `patch_layer` and the autoencoder see
zeros.

| class | filters | maps |
|---|---|---|
| `SparseMaps` | the network's, learned layer by layer | its sparse inference |
| the same, of `patch_layer` | the same, for single patches | sparse codes of single patches |
| `LearnedFilters` | those of one such layer | the same inference, or rectified correlation |
| `RandomFilters` | Gaussian noise of unit norm | the same two |
| `PatchDictionary` | dictionary of patches (Mairal et al. 2009) | the same two |
| `PatchPCA` | principal components of patches | correlation |
| `KMeansMaps` | k-means of whitened patches (Coates, Lee, Ng 2011) | "triangle" |
| `RandomPatches` | random whitened patches (Coates, Ng 2011) | soft thresholds |
| `Autoencoder` | by gradients, its pooling inverted by switches | rectified, before pooling |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, MiniBatchDictionaryLearning
from torch import Tensor, nn
from torch.nn import functional

from deconvnet.filters.initial import initial_filters
from deconvnet.filters.update import LearningSettings
from deconvnet.images.preprocessing import Preprocessing, PreprocessingSettings
from deconvnet.network.codes import Codes
from deconvnet.network.layer import LayerProblem, LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.operators.convolution import correlate, deconvolve
from deconvnet.operators.pooling import pool, strongest, unpool
from deconvnet.sparse_coding.solve import default_solver
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import plain
from deconvnet.training.in_memory import learn_layers

# Pixels of the images whose maps are computed at a time: 83 images of 28x28, 7 of 96x96.
PIXELS_AT_A_TIME = 2**16
# Patches from which k-means, PCA and dictionaries learn.
PATCHES = 50_000
# A filter must match a patch of norm 1 better than this before it takes part in the code.
PATCH_LAM = 1 / 0.15
DICTIONARY_PATCHES = 20_000


def one_layer(
    num_maps: int,
    filter_size: int,
    *,
    lam: float = 2.0,
    epochs: int = 5,
    seed: int = 0,
    preprocessing: PreprocessingSettings | None = None,
    device: str | torch.device = "cpu",
) -> DeconvNet:
    """An untrained network of one layer, with the fastest solver of the device."""
    layer = LayerSettings(
        num_maps,
        filter_size,
        lam,
        solver=default_solver(torch.empty(0, device=device)),
        learning=LearningSettings(epochs=epochs, batch_size=32),
    )
    return DeconvNet([layer], preprocessing, seed=seed).to(device)


def patch_layer(
    num_maps: int,
    filter_size: int,
    *,
    lam: float = PATCH_LAM,
    epochs: int = 2,
    seed: int = 0,
    preprocessing: PreprocessingSettings | None = None,
    device: str | torch.device = "cpu",
) -> DeconvNet:
    """An untrained network of one layer that codes patches, as in configs/model/patches.yaml.

    The maps have the size of the images.
    """
    layer = LayerSettings(
        num_maps,
        filter_size,
        lam,
        coding="patches",
        normalize=0.1,
        boundary="zero",
        solver=replace(
            default_solver(torch.empty(0, device=device)), iterations=20, tolerance=1e-2
        ),
        learning=LearningSettings(epochs=epochs, batch_size=32),
    )
    return DeconvNet([layer], preprocessing, seed=seed).to(device)


class Method(ABC):
    """A way to learn filters and compute maps; subclasses implement _learn(y) and _maps(y)."""

    # Whether maps have coefficients of both signs.
    signed = True

    def __init__(self, preprocessing: Preprocessing, seed: int):
        self.preprocessing, self.seed = preprocessing, seed
        self.fitted = False

    @property
    def device(self) -> torch.device:
        return self.preprocessing.scale.device

    def fit(self, images: Tensor) -> Method:
        """Learn from images (N, 1 or 3, H, W) in [0, 1]; the seed determines the result."""
        self.preprocessing.fit(images)
        self._learn(self._preprocess(images))
        self.fitted = True
        return self

    @plain
    def maps(self, images: Tensor) -> Tensor:
        """(N, K, H+h-1, W+w-1) of images (N, 1 or 3, H, W) in [0, 1]."""
        if not self.fitted:
            raise ValueError(f"{type(self).__name__}: has not learned yet; call fit(images) first")
        return torch.cat(
            [self._maps(self._preprocess(part)) for part in images.split(_images_at_a_time(images))]
        )

    def _preprocess(self, images: Tensor) -> Tensor:
        return self.preprocessing(images.to(self.device))[0]

    @abstractmethod
    def _learn(self, y: Tensor) -> None: ...

    @abstractmethod
    def _maps(self, y: Tensor) -> Tensor: ...


class SparseMaps(Method):
    """The sparse maps of a layer of a network, by default the highest, before its pooling.

    fit learns the network from scratch, from preprocessing to this layer; a network learned
    elsewhere needs no fit. The maps of higher layers have the size that pooling leaves.
    """

    def __init__(self, net: DeconvNet, layer: int | None = None, *, seed: int = 0):
        super().__init__(net.preprocessing, seed)
        self.net, self.depth = net, net.depth if layer is None else layer
        net.layer(self.depth)
        self.fitted = True

    def _learn(self, y: Tensor) -> None:
        learn_layers(self.net, y, depth=self.depth, seed=self.seed, chunk=_images_at_a_time(y))

    def _maps(self, y: Tensor) -> Tensor:
        codes = Codes((), y, [])
        for _ in range(self.depth):
            codes = self.net.infer_next_layer(codes, chunk=len(y))
        return codes.layer(self.depth).z


class FilterMaps(Method):
    """One layer of filters, with the sparse inference of this package or rectified correlations.

    rectified: maps are the correlations c of the image with the filters, shrunk towards zero by
    `threshold` times the root mean square of their map over the training images:
    sign(c) max(0, |c| - t_k), a two-sided rectification. epochs: of learning, if there is any.
    """

    def __init__(
        self,
        num_maps: int,
        filter_size: int,
        *,
        rectified: bool = False,
        threshold: float = 1.0,
        lam: float = 2.0,
        epochs: int = 5,
        seed: int = 0,
        preprocessing: PreprocessingSettings | None = None,
        device: str | torch.device = "cpu",
    ):
        if not threshold >= 0:
            raise ValueError(f"threshold={threshold}: must not be negative")
        self.net = one_layer(
            num_maps,
            filter_size,
            lam=lam,
            epochs=epochs,
            seed=seed,
            preprocessing=preprocessing,
            device=device,
        )
        super().__init__(self.net.preprocessing, seed)
        self.rectified, self.threshold = rectified, threshold
        self.thresholds = torch.zeros(num_maps, 1, 1)

    @property
    def filters(self) -> Tensor:
        """(K, C, h, w), of unit norm."""
        return self.net.layer(1).filters

    def _learn(self, y: Tensor) -> None:
        self.net.layer(1).set_filters(self._filters(y).to(y))
        squares = sum(
            correlations(part, self.filters).double().square().sum((0, 2, 3))
            for part in y.split(_images_at_a_time(y))
        )
        size = self.filters.shape[2]
        places = len(y) * (y.shape[2] + size - 1) * (y.shape[3] + size - 1)
        self.thresholds = self.threshold * (squares / places).sqrt().to(y).view(-1, 1, 1)

    def _maps(self, y: Tensor) -> Tensor:
        if not self.rectified:
            return self.net.layer(1).infer(LayerProblem(y)).z
        c = correlations(y, self.filters)
        return c.sign() * (c.abs() - self.thresholds).clamp(min=0)

    @abstractmethod
    def _filters(self, y: Tensor) -> Tensor: ...


class LearnedFilters(FilterMaps):
    """The filters that this package learns; with its inference, the same as `SparseMaps`."""

    def _filters(self, y: Tensor) -> Tensor:
        learn_layers(self.net, y, seed=self.seed, chunk=_images_at_a_time(y))
        return self.filters


class RandomFilters(FilterMaps):
    """Gaussian filters of unit norm: the value of inference without learning."""

    def _filters(self, y: Tensor) -> Tensor:
        num_maps, _, size, _ = self.filters.shape
        return initial_filters(num_maps, y, size, "random", seeded_generator(self.seed, 1))


class PatchDictionary(FilterMaps):
    """The atoms of a dictionary under which single patches are sparse, as filters.

    scikit-learn's online learning minimises the cost of this package for each patch alone,
    1/2 ||patch - sum z_k f_k||^2 + 1/lam sum |z_k|, so atoms are learned again for each shift.
    """

    def _filters(self, y: Tensor) -> Tensor:
        num_maps, _, size, _ = self.filters.shape
        patches = draw_patches(y, size, DICTIONARY_PATCHES, seeded_generator(self.seed, 2))
        layer = self.net.layer(1).settings
        learner = MiniBatchDictionaryLearning(
            num_maps,
            alpha=1 / layer.lam,
            batch_size=256,
            max_iter=layer.learning.epochs,
            fit_algorithm="cd",
            random_state=self.seed,
        )
        atoms = learner.fit(patches.flatten(1).cpu().double().numpy()).components_
        return torch.from_numpy(atoms).view(self.filters.shape)


class PatchPCA(Method):
    """The coefficients of each patch in the first principal components of patches.

    maps: (patch - mean patch) . component, with components of unit norm.
    """

    def __init__(
        self,
        num_maps: int,
        filter_size: int,
        *,
        seed: int = 0,
        preprocessing: PreprocessingSettings | None = None,
        device: str | torch.device = "cpu",
    ):
        super().__init__(_preprocessing(preprocessing, device), seed)
        self.num_maps, self.filter_size = _whole(num_maps=num_maps, filter_size=filter_size)
        numbers = self.preprocessing.channels * filter_size**2
        if num_maps > numbers:
            raise ValueError(
                f"num_maps={num_maps}: must be at most {numbers}, the values of a patch of "
                f"filter_size={filter_size}"
            )

    def _learn(self, y: Tensor) -> None:
        patches = draw_patches(y, self.filter_size, PATCHES, seeded_generator(self.seed, 2))
        pca = PCA(self.num_maps, svd_solver="full").fit(patches.flatten(1).cpu().double().numpy())
        shape = (self.num_maps, *patches.shape[1:])
        self.filters = torch.from_numpy(pca.components_).view(shape).to(y)
        self.offset = torch.from_numpy(pca.components_ @ pca.mean_).to(y)

    def _maps(self, y: Tensor) -> Tensor:
        return correlations(y, self.filters) - self.offset.view(-1, 1, 1)


class WhitePatches(Method):
    """Maps from patches that are made even: normalised, then whitened (Coates, Lee, Ng 2011).

    Patches have their mean subtracted, are divided by their standard deviation, and whitened (ZCA).
    As in the paper, 0.1 is added to the variances of the whitening. The 10 that it adds to the
    variance of a patch of pixels 0..255 is here a hundredth of the mean variance of all patches.
    """

    def __init__(
        self,
        num_maps: int,
        filter_size: int,
        *,
        seed: int = 0,
        preprocessing: PreprocessingSettings | None = None,
        device: str | torch.device = "cpu",
    ):
        super().__init__(_preprocessing(preprocessing, device), seed)
        self.num_maps, self.filter_size = _whole(num_maps=num_maps, filter_size=filter_size)

    def _learn(self, y: Tensor) -> None:
        patches = draw_patches(
            y, self.filter_size, PATCHES, seeded_generator(self.seed, 2)
        ).flatten(1)
        self.floor = float(0.01 * patches.var(1, correction=0).mean().clamp(min=1e-12))
        normalised = self._normalised(patches).double()
        self.mean = normalised.mean(0)
        variances, directions = torch.linalg.eigh((normalised - self.mean).T.cov(correction=0))
        gains = (variances.clamp(min=0) + 0.1).rsqrt()
        self.whitening = ((directions * gains) @ directions.T).to(y)
        self.mean = self.mean.to(y)
        self.centroids = self._centroids(self._white(patches)).to(y)

    def _maps(self, y: Tensor) -> Tensor:
        patches = functional.unfold(_pad_border(y, self.filter_size), self.filter_size)
        maps = self._responses(self._white(patches.transpose(1, 2)))
        rows, columns = (side + self.filter_size - 1 for side in y.shape[2:])
        return maps.transpose(1, 2).reshape(len(y), -1, rows, columns)

    def _normalised(self, patches: Tensor) -> Tensor:
        """Patches (..., values) with mean 0, and variance 1 where there is contrast."""
        even = patches - patches.mean(-1, keepdim=True)
        return even / (even.square().mean(-1, keepdim=True) + self.floor).sqrt()

    def _white(self, patches: Tensor) -> Tensor:
        return (self._normalised(patches) - self.mean) @ self.whitening

    @abstractmethod
    def _centroids(self, white: Tensor) -> Tensor:
        """(K, values), from whitened patches (N, values)."""

    @abstractmethod
    def _responses(self, white: Tensor) -> Tensor:
        """(N, positions, K), from whitened patches (N, positions, values)."""


class KMeansMaps(WhitePatches):
    """How much closer than average each centroid is to a patch (Coates, Lee, Ng 2011).

    maps: max(0, mean_j d_j - d_k), d_k = ||x - c_k||, for whitened patches x.
    """

    signed = False

    def _centroids(self, white: Tensor) -> Tensor:
        kmeans = KMeans(self.num_maps, n_init=1, max_iter=100, random_state=self.seed)
        return torch.from_numpy(kmeans.fit(white.cpu().double().numpy()).cluster_centers_)

    def _responses(self, white: Tensor) -> Tensor:
        squares = white.square().sum(-1, keepdim=True) + self.centroids.square().sum(1)
        distance = (squares - 2 * white @ self.centroids.T).clamp(min=0).sqrt()
        return (distance.mean(-1, keepdim=True) - distance).clamp(min=0)


class RandomPatches(WhitePatches):
    """Soft thresholds of products with random patches (Coates, Ng 2011, and its published code).

    maps: sign(c) max(0, |c| - 1/4), c = d_k'x, for whitened patches x and d_k, these of norm 1.
    """

    def _centroids(self, white: Tensor) -> Tensor:
        # Without those that have no contrast, which are all alike.
        lively = white[white.var(1) > 0.1 * white.var(1).mean()]
        draws = torch.randperm(len(lively), generator=seeded_generator(self.seed, 3))
        return functional.normalize(lively[draws[: self.num_maps].to(lively.device)])

    def _responses(self, white: Tensor) -> Tensor:
        return functional.softshrink(white @ self.centroids.T, 0.25)


class WhatWhere(nn.Module):
    """One layer of a what-where autoencoder: maxima go up, switches tell the decoder their places.

    z = max(0, F_up' y + bias)   pooled, switches = P(z)   decoded = F_down U_s pooled
    """

    def __init__(
        self, num_maps: int, channels: int, size: int, window: int, generator: torch.Generator
    ):
        super().__init__()
        shape = (num_maps, channels, size, size)
        self.window = (1, window, window)
        self.up = nn.Parameter(torch.randn(shape, generator=generator) / (shape[1] ** 0.5 * size))
        self.bias = nn.Parameter(torch.zeros(num_maps, 1, 1))
        self.down = nn.Parameter(torch.randn(shape, generator=generator) / (num_maps**0.5 * size))

    def encode(self, y: Tensor) -> Tensor:
        """z (N, K, H+h-1, W+w-1), >= 0."""
        return functional.relu(correlate(y, self.up) + self.bias)

    def pool(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum of each window, and its switches."""
        switches = strongest(z.detach(), self.window)
        return pool(z, switches), switches

    def decode(self, pooled: Tensor, switches: Tensor, shape: torch.Size) -> Tensor:
        """The image decoded from pooled values at their switches; shape: that of the maps."""
        return deconvolve(unpool(pooled, switches, shape), self.down)

    def forward(self, y: Tensor) -> Tensor:
        z = self.encode(y)
        return self.decode(*self.pool(z), z.shape)


class Autoencoder(Method):
    """The maps of a convolutional autoencoder that unpools with its pooling switches.

    The lowest layer of the stacked what-where autoencoders of Zhao et al. 2015, without labels:
    Adam on the mean squared error of y, no other loss. maps: rectified, before pooling.
    After `fit`, history holds the mean squared error of each epoch, of each batch before its step.
    """

    signed = False

    def __init__(
        self,
        num_maps: int,
        filter_size: int,
        *,
        window: int = 2,
        epochs: int = 5,
        batch_size: int = 32,
        rate: float = 3e-3,
        seed: int = 0,
        preprocessing: PreprocessingSettings | None = None,
        device: str | torch.device = "cpu",
    ):
        super().__init__(_preprocessing(preprocessing, device), seed)
        num_maps, filter_size, window, self.epochs, self.batch_size = _whole(
            num_maps=num_maps,
            filter_size=filter_size,
            window=window,
            epochs=epochs,
            batch_size=batch_size,
        )
        if not rate > 0:
            raise ValueError(f"rate={rate}: must be positive")
        self.rate = rate
        self._shape = (num_maps, self.preprocessing.channels, filter_size, window)
        self.history: list[float] = []

    @torch.enable_grad()
    def _learn(self, y: Tensor) -> None:
        self.model = WhatWhere(*self._shape, seeded_generator(self.seed, 1)).to(y.device)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.rate)
        self.history = []
        for epoch in range(self.epochs):
            order = torch.randperm(len(y), generator=seeded_generator(self.seed, 2, epoch))
            total = 0.0
            for batch in order.split(self.batch_size):
                loss = functional.mse_loss(self.model(y[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            self.history.append(total / len(y))

    def _maps(self, y: Tensor) -> Tensor:
        return self.model.encode(y)


def correlations(y: Tensor, f: Tensor) -> Tensor:
    """(N, K, H+h-1, W+w-1): images (N, C, H, W) correlated with filters (K, C, h, w), not flipped.

    Unlike `convolution.correlate` this repeats the border, so that there is no edge.
    """
    return functional.conv2d(_pad_border(y, f.shape[2]), f)


def draw_patches(y: Tensor, size: int, num: int, generator: torch.Generator) -> Tensor:
    """(num, C, size, size): random patches inside images (N, C, H, W)."""
    if min(y.shape[2:]) < size:
        raise ValueError(
            f"filter_size={size}: must be at most the smaller side of images of "
            f"{y.shape[2]}x{y.shape[3]} pixels"
        )
    windows = y.unfold(2, size, 1).unfold(3, size, 1)
    n, i, j = (
        torch.randint(windows.shape[axis], (num,), generator=generator).to(y.device)
        for axis in (0, 2, 3)
    )
    return windows[n, :, i, j]


def _images_at_a_time(images: Tensor) -> int:
    return max(1, PIXELS_AT_A_TIME // (images.shape[2] * images.shape[3]))


def _pad_border(y: Tensor, size: int) -> Tensor:
    return functional.pad(y, (size - 1,) * 4, mode="replicate")


def _preprocessing(
    settings: PreprocessingSettings | None, device: str | torch.device
) -> Preprocessing:
    return Preprocessing(settings).to(device)


def _whole(**values: int) -> list[int]:
    for key, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r}: must be a whole number from 1")
    return list(values.values())
