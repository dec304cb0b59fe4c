"""A dictionary of signals as a scikit-learn transformer from signals to sparse activations.

    N trials · C channels · T times · K atoms · L times of an atom

`fit` learns the atoms, `transform` finds their activations, and `inverse_transform` reconstructs
signals from them. Signals are centred by the mean of each channel over all trials of `fit` and
divided by one number, so X may have any units, such as volts.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_array, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional

from deconvnet.dictionary import Learned, learn_filters
from deconvnet.filters.update import LearningSettings
from deconvnet.monitoring.statistics import EpochStats
from deconvnet.operators.convolution import deconvolve
from deconvnet.signals import as_images, as_signals, factors
from deconvnet.sklearn.arrays import (
    as_array,
    batch_size_of,
    center_and_scale,
    chunk_of,
    validated_rows,
)
from deconvnet.sparse_coding.problem import Solution
from deconvnet.support.devices import torch_device
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import as_positive_integer


class SignalDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Learns atoms from signals; transforms each trial into the sparse activations of the atoms.

    X: signals (N, C, T), trials, channels and times, such as `get_data()` of MNE's epochs; or
    (N, T), trials of one channel. An array, a list or a tensor of real numbers in any units.
    Results are numpy arrays.

    Parameters
    ----------
    num_maps : int
        Number of atoms.
    filter_size : int
        Length of the atoms in samples; at most T is used.
    lam_ratio : float
        Weight of the sparsity relative to the smallest that leaves no activation under the initial
        atoms, in (0, 1]; smaller values give denser activations.
    lam_max_quantile : float
        That smallest weight is this quantile over the trials, in (0, 1]; below 1, a few trials with
        artefacts do not change it.
    non_negative : bool
        Whether activations must not be negative.
    rank1 : bool
        Whether each atom is one pattern over the channels times one over time.
    taper : float
        Fraction of their length, 0 to 0.5, over which atoms fall to zero at each end; 0: none.
    epochs : int
        Passes over the trials.
    batch_size : int or None
        Trials per update of the atoms. None: a tenth of the trials, at least 8 and at most 64.
    intervals : int or None
        None: the features are the activations at all times, atom by atom. n: the mean magnitude of
        the activations of each atom in n equal intervals of time. May be changed after `fit`.
    random_state : int, RandomState or None
        An int gives the same atoms every time.
    device : str
        "auto" (cuda if available, else cpu), or a torch device.

    Attributes
    ----------
    atoms_ : array (K, C, L)
        Each of unit norm.
    u_, v_ : array (K, C) and (K, L)
        With rank1: the patterns over the channels, of unit norm, and over time (`signals.factors`).
    learned_ : Learned
        Filters (K, C, 1, L) on the CPU, with lam and the history, for (X - mean_) / scale_.
    history_ : list of EpochStats
        The statistics of each epoch.
    mean_, scale_ : array (C, 1) and float
    signal_shape_ : (C, T)
    map_shape_ : (K, T + L - 1)
        Of the activations: an atom may be cut off at both ends of a trial.
    n_features_in_ : int
        Numbers per trial.

    `fit` holds the activations of all trials in memory.
    """

    atoms_: np.ndarray
    u_: np.ndarray
    v_: np.ndarray
    learned_: Learned
    history_: list[EpochStats]
    mean_: np.ndarray
    scale_: float
    signal_shape_: tuple[int, int]
    map_shape_: tuple[int, int]

    def __init__(
        self,
        num_maps: int = 8,
        filter_size: int = 64,
        *,
        lam_ratio: float = 0.1,
        lam_max_quantile: float = 1.0,
        non_negative: bool = True,
        rank1: bool = False,
        taper: float = 0.0,
        epochs: int = 30,
        batch_size: int | None = None,
        intervals: int | None = None,
        random_state: int | np.random.RandomState | None = 0,
        device: str = "auto",
    ):
        self.num_maps = num_maps
        self.filter_size = filter_size
        self.lam_ratio = lam_ratio
        self.lam_max_quantile = lam_max_quantile
        self.non_negative = non_negative
        self.rank1 = rank1
        self.taper = taper
        self.epochs = epochs
        self.batch_size = batch_size
        self.intervals = intervals
        self.random_state = random_state
        self.device = device

    @plain
    def fit(self, X: ArrayLike, y: object = None) -> SignalDictionary:
        """Learn the atoms from X; y is ignored.

        Raises ValueError if X or a parameter is out of range, and Diverged if the objective becomes
        infinite or NaN.
        """
        self._check_intervals()
        signals = self._signals(X, reset=True)
        device = torch_device(self.device)
        self._device = str(device)
        mean, self.scale_ = center_and_scale(signals[:, :, None])
        self.mean_ = mean[:, 0]
        images = self._centred(signals).to(device)
        length = min(as_positive_integer(self.filter_size, "filter_size"), images.shape[3])
        # Signals that are constant have no largest correlation; any lam leaves them as they are.
        ratio = dict(lam_ratio=self.lam_ratio, lam_max_quantile=self.lam_max_quantile)
        weight = ratio if images.any() else dict(lam=1.0)
        learned = learn_filters(
            images,
            as_positive_integer(self.num_maps, "num_maps"),
            (1, length),
            **weight,
            non_negative=self.non_negative,
            learning=self._learning(len(images)),
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
        )
        self.learned_ = dataclasses.replace(learned, filters=learned.filters.cpu())
        self.history_ = learned.history
        self.atoms_ = as_signals(self.learned_.filters).numpy()
        if self.rank1:
            self.u_, self.v_ = (part.numpy() for part in factors(self.learned_.filters))
        self.map_shape_ = (len(self.atoms_), images.shape[3] + length - 1)
        return self

    @plain
    def transform(self, X: ArrayLike) -> np.ndarray:
        """The features of trials, (N, features) in float32."""
        check_is_fitted(self)
        self._check_intervals()
        signals = self._signals(X, reset=False)
        parts = []
        chunk = chunk_of(math.prod(self.map_shape_))
        for start in range(0, len(signals), chunk):
            z = as_signals(self._encoded(signals[start : start + chunk]).z)
            if self.intervals is not None:
                z = functional.adaptive_avg_pool1d(z.abs(), int(self.intervals))
            parts.append(z.flatten(1).cpu())
        return torch.cat(parts).numpy()

    @plain
    def encode(self, X: ArrayLike) -> Solution:
        """The code of trials: `.z`, maps (N, K, 1, T+L-1), and `.events()`, a table of activations.

        It is that of (X - mean_) / scale_, in float32.
        """
        check_is_fitted(self)
        return self._encoded(self._signals(X, reset=False))

    @plain
    def inverse_transform(self, Z: ArrayLike) -> np.ndarray:
        """Signals reconstructed from the activations Z (N, features), in the shape and units of X.

        For Z = transform(X) they approximate X, more closely for smaller lam_ratio. Raises
        ValueError with intervals.
        """
        check_is_fitted(self)
        if self.intervals is not None:
            raise ValueError(
                f"intervals={self.intervals!r}: means cannot be inverted to activations; use "
                "intervals=None"
            )
        Z = check_array(as_array(Z), dtype=np.float32)
        if Z.shape[1] != self._n_features_out:
            raise ValueError(
                f"Z has {Z.shape[1]} features, but activations of the shape {self.map_shape_} have "
                f"{self._n_features_out}"
            )
        z = torch.from_numpy(np.array(Z)).view(-1, *self.map_shape_)
        signals = as_signals(deconvolve(as_images(z), self.learned_.filters))
        X = signals.numpy() * self.scale_ + self.mean_
        return X.reshape(len(X), *self._fit_shape)

    @property
    def _n_features_out(self) -> int:
        K, times = self.map_shape_
        return K * (times if self.intervals is None else int(self.intervals))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _signals(self, X: ArrayLike, *, reset: bool) -> np.ndarray:
        """X as (N, C, T), checked; with reset, later calls must have the same shape."""
        if getattr(X, "ndim", 0) > 3:
            raise ValueError(
                f"X of the shape {tuple(X.shape)}: must be (N, C, T), trials, channels and times, "
                "or (N, T), trials of one channel"
            )
        rows, shape = validated_rows(self, X, ndims=(3,), reset=reset)
        if reset:
            self._fit_shape = shape or rows.shape[1:]
            self.signal_shape_ = shape or (1, rows.shape[1])
        elif (shape or rows.shape[1:]) != self._fit_shape:
            raise ValueError(
                f"X has trials of {shape or rows.shape[1:]}, but fit had {self._fit_shape}"
            )
        return rows.reshape(-1, *self.signal_shape_)

    def _centred(self, signals: np.ndarray) -> Tensor:
        """Images (N, C, 1, T), the input of the learner."""
        y = (signals - self.mean_) / self.scale_
        return as_images(torch.from_numpy(y.astype(np.float32)))

    def _encoded(self, signals: np.ndarray) -> Solution:
        # On the device of fit, if this machine has it; learned_ stays on the CPU, for pickle.
        device = self._device if torch.cuda.is_available() else "cpu"
        filters = self.learned_.filters.to(device)
        learned = dataclasses.replace(self.learned_, filters=filters)
        return learned.encode(self._centred(signals).to(device))

    def _learning(self, trials: int) -> LearningSettings:
        if self.batch_size is not None:
            as_positive_integer(self.batch_size, "batch_size")
        return LearningSettings(
            epochs=as_positive_integer(self.epochs, "epochs"),
            batch_size=batch_size_of(self.batch_size, trials),
            rank1=self.rank1,
            taper=self.taper,
        )

    def _check_intervals(self) -> None:
        if self.intervals is not None:
            as_positive_integer(self.intervals, "intervals")
