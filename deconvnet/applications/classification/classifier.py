"""Images put into classes by the maps of a network: descriptors, words, spatial pyramids, an SVM.

    z maps (N, K, H, W)   d descriptors (P, D), D = K cells^2   P windows of an image   V words

The strengths of maps in the cells of a small window take the place of SIFT (Zeiler et al. 2010 and
2011), and what follows is spatial pyramid matching (Lazebnik et al. 2006): every descriptor becomes
the nearest of V words, words are counted in the cells of grids over the picture, two pictures are
as alike as their counts overlap. Maps of upper layers stand on switches, which differ from image to
image, so they are not compared: each of their strongest activations is projected alone to the maps
of layer 1, where all images speak one language, and an image is the mean of the pyramids of these.

Only the words of training images and their labels are learned from; nothing here reads files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.images.fit import FITS, MAX_SIDE, MIN_SIDE
from deconvnet.images.preprocessing import Frame
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.arithmetic import Field
from deconvnet.operators.linear import LinearOperator, Scaling
from deconvnet.support.compiling import compiled
from deconvnet.support.modes import plain
from deconvnet.visualization.projection.pixel_features import layer_field

STRENGTHS = ("magnitude", "square", "signed")
UPPER = ("project", "maps")
SVMS = ("one_vs_rest", "one_vs_one")

# As SIFT does it: no part of a descriptor of length 1 is above this before it is normalised again.
CLIP = 0.2
# Descriptors shorter than this share of the median are too weak to be given the length 1.
WEAK = 0.3
# Activations projected at a time, and descriptors compared with words at a time.
CHUNK = 16
ROWS = 4096
# Of the pyramids that are compared: so many columns at a time, which stay in a cache.
COLUMNS = 1024
# Rounds of k-means.
ROUNDS = 30


@dataclass
class ClassData:
    """The images to put into classes: a folder with a folder for every class."""

    path: str
    # the same of images that are only tested; null: others of `path`
    test: str | None = None
    # side of the squares in pixels, and crop | pad; null: as the network has learned
    size: int | None = None
    fit: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not MIN_SIDE <= self.size <= MAX_SIDE:
            raise ValueError(
                f"data.size={self.size}: must be from {MIN_SIDE} to {MAX_SIDE}, or null"
            )
        if self.fit is not None and self.fit not in FITS:
            raise ValueError(f"data.fit={self.fit}: choose {', '.join(FITS)}, or null")


@dataclass
class FeatureSettings:
    """How an image becomes counts of words."""

    # sides of windows in pixels; each size has a codebook of its own
    patch: list[int] = field(default_factory=lambda: [16, 24])
    # cells of a window along a side
    cells: int = 4
    # pixels from window to window
    step: int = 2
    # the same in maps that were projected from upper layers
    projected_step: int = 4
    # what a coefficient contributes: magnitude |z|, square z^2, or signed: max(0, z) and max(0, -z)
    # apart
    strength: str = "magnitude"
    # true: descriptors of length 1 with no part above 0.2, as SIFT's; false: as they are
    normalize: bool = True
    # layers above the first: project, their strongest activations to the maps of layer 1, each
    # alone; or maps, as layer 1
    upper: str = "project"
    # strongest activations of an image that are projected
    strongest: int = 50
    # size of a codebook
    words: int = 1000
    # the nearest words that share a descriptor; 1: hard assignment
    neighbours: int = 5
    # sides of the grids of the pyramid; all must divide the last
    levels: list[int] = field(default_factory=lambda: [1, 2, 4])
    # counts in a cell are raised to this power before they are compared, so that many windows of a
    # word count little more than a few; 1: as they are (the papers)
    power: float = 0.5

    def __post_init__(self) -> None:
        sizes = ("cells", "step", "projected_step", "strongest", "words", "neighbours")
        for key in sizes:
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        if not self.patch or any(side < 1 or side % self.cells for side in self.patch):
            raise ValueError(f"patch={self.patch}: must be multiples of cells={self.cells}")
        if not 2 <= self.words <= 65535:
            raise ValueError(f"words={self.words}: must be 2 to 65535")
        if self.neighbours > self.words:
            raise ValueError(f"neighbours={self.neighbours}: there are words={self.words}")
        for key, choices in (("strength", STRENGTHS), ("upper", UPPER)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)}: choose one of {', '.join(choices)}")
        if not 0 < self.power <= 1:
            raise ValueError(f"power={self.power}: must be above 0 and at most 1")
        check_levels(self.levels)


# Descriptors.


def descriptors(
    z: Tensor, *, patch: int = 16, cells: int = 4, step: int = 2, strength: str = "magnitude"
) -> Tensor:
    """Mean strengths of maps in the cells of windows: (N, rows, columns, K cells^2).

    z: (N, K, H, W), padded with zeros at the end to one window where it is smaller. A window has
    patch x patch places and cells x cells cells; (r, c) begins at (r step, c step). The order is
    map, cell row, cell column; with strength="signed" there are 2 K maps, positive ones first.
    """
    if z.ndim != 4:
        raise ValueError(f"maps must have the shape (N, K, H, W), got {tuple(z.shape)}")
    if strength not in STRENGTHS:
        raise ValueError(f"strength={strength}: choose one of {', '.join(STRENGTHS)}")
    if patch % cells:
        raise ValueError(f"patch={patch}: must be a multiple of cells={cells}")
    if strength == "signed":
        z = torch.cat([z.clamp(min=0), (-z).clamp(min=0)], 1)
    else:
        z = z.abs() if strength == "magnitude" else z.square()
    H, W = z.shape[2:]
    z = F.pad(z, (0, max(patch - W, 0), 0, max(patch - H, 0)))
    cell = patch // cells
    # Cells of all windows begin at multiples of this: each mean is taken once.
    grain = math.gcd(cell, step)
    means = F.avg_pool2d(z, cell, stride=grain)
    columns = F.unfold(means, cells, dilation=cell // grain, stride=step // grain)
    rows = (z.shape[2] - patch) // step + 1
    return columns.mT.unflatten(1, (rows, -1))


def normalized(d: Tensor, floor: float) -> Tensor:
    """Descriptors (P, D) of length 1 with no part above CLIP of it, as Lowe (2004) makes SIFT.

    Those shorter than `floor` are divided by it instead and stay short: noise in flat places is not
    blown up to what a strong edge is.
    """
    length = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    clipped = (d / length.clamp(min=floor)).clamp(max=CLIP)
    again = torch.linalg.vector_norm(clipped, dim=1, keepdim=True)
    target = (length / floor).clamp(max=1)
    return clipped * (target / again.clamp(min=torch.finfo(d.dtype).tiny))


# Windows of an image.


@dataclass(frozen=True)
class Windows:
    """Some windows of one image: d (P, D), their centres (P, 2) as row and column in [0, 1) of the
    picture, and weights (P,): those of one activation add up to 1. patch: their side in pixels.
    """

    patch: int
    d: Tensor
    places: Tensor
    weights: Tensor


def image_windows(
    net: DeconvNet, codes: Codes, image: int, layer: int, settings: FeatureSettings
) -> Iterator[Windows]:
    """The windows of one image of the codes in a layer, of one size and some activations at a time.

    Of layer 1, and of others with upper="maps", all windows over the picture, as of one activation;
    there patch and step are pixels, in maps of a larger stride so many places as that is nearest.
    Of projected activations only windows in which something is.
    """
    frame = _frame(codes, image)
    if layer == 1 or settings.upper == "maps":
        z = codes.layer(layer).select(slice(image, image + 1)).z
        z, stride = _cut(z, net, layer, frame), _stride(net, layer)
        yield from (_windows(z, patch, settings, stride=stride) for patch in settings.patch)
        return
    for z in projected(net, codes, image, layer, settings.strongest):
        z = _cut(z, net, 1, frame)
        yield from (_windows(z, patch, settings) for patch in settings.patch)


@plain
def projected(net: DeconvNet, codes: Codes, image: int, layer: int, count: int) -> Iterator[Tensor]:
    """The strongest |z_l| of an image, each alone in the maps of layer 1: (up to CHUNK, K, H, W).

    Strongest first, `count` in all or as many as are not 0 (Zeiler et al. 2011, classification).
    """
    z = codes.layer(layer).select(slice(image, image + 1)).z[0]
    values = z.flatten()
    order = values.abs().topk(min(count, values.numel())).indices
    order = order[values[order] != 0]
    for places in order.split(CHUNK) if len(order) else ():
        one = z.new_zeros(len(places), *z.shape)
        one.flatten(1)[torch.arange(len(places), device=z.device), places] = values[places]
        yield to_first(net, codes, layer, torch.full_like(places, image))(one)


def to_first(net: DeconvNet, codes: Codes, layer: int, images: Tensor) -> LinearOperator:
    """U_1 S_2 F_2 U_2 ... S_l F_l: maps of layer l >= 2 -> maps of layer 1, R_l without F_1.

    images: (M,) whose switches each of M maps takes.
    """
    if layer < 2:
        raise ValueError(f"layer={layer}: layers from 2 are projected to layer 1")
    operator = net.layer(1).unpooling(codes.layer(1), images)
    for level in range(2, layer + 1):
        operator = operator @ Scaling(float(net.layer(level).scale)) @ net.layer(level).operator()
        if level < layer:
            unpooling = net.layer(level).unpooling(codes.layer(level), images)
            operator = operator @ unpooling
    return operator


def _windows(
    z: Tensor, side: int, settings: FeatureSettings, *, stride: int | None = None
) -> Windows:
    """Windows over maps (M, K, H, W) that are cut to the picture: all of them for a stride of the
    maps in pixels, else those where something is in the maps of an activation.
    """
    patch, step = side, settings.projected_step
    if stride is not None:
        patch = max(1, round(side / settings.cells / stride)) * settings.cells
        step = max(1, round(settings.step / stride))
    d = descriptors(z, patch=patch, cells=settings.cells, step=step, strength=settings.strength)
    M, rows, columns, _ = d.shape
    i, j = (
        ((torch.arange(n, device=z.device) * step + patch / 2) / max(length, patch))
        for n, length in ((rows, z.shape[2]), (columns, z.shape[3]))
    )
    places = torch.stack(torch.meshgrid(i, j, indexing="ij"), -1).flatten(0, 1)
    d, places = d.flatten(1, 2), places.expand(M, -1, -1)
    some = torch.ones_like(d[..., 0], dtype=torch.bool) if stride else (d != 0).any(2)
    weights = some / some.sum(1, keepdim=True).clamp(min=1)
    return Windows(side, d[some], places[some], weights[some])


def _stride(net: DeconvNet, layer: int) -> int:
    return max(layer_field(net, layer, axis).stride for axis in (0, 1))


def _frame(codes: Codes, image: int) -> Frame:
    """Where the picture is in its image; the record of preprocessing ends with frames, if any."""
    if codes.record and "frame" in codes.record[-1]:
        return tuple(codes.record[-1]["frame"][image].tolist())
    return (0, 0, *codes.y.shape[2:])


def _cut(z: Tensor, net: DeconvNet, layer: int, frame: Frame) -> Tensor:
    """The part of maps whose entries reach into the picture."""
    top, left, height, width = frame
    for axis, first, length in ((2, top, height), (3, left, width)):
        low, high = _reaching(layer_field(net, layer, axis - 2), first, length, z.shape[axis])
        z = z.narrow(axis, low, high - low)
    return z


def _reaching(reach: Field, first: int, length: int, units: int) -> tuple[int, int]:
    """The range of units whose fields reach into the pixels first to first + length."""
    low = (first - reach.offset - reach.size) // reach.stride + 1
    high = -((reach.offset - first - length) // reach.stride)
    return max(low, 0), min(high, units)


# Words.


@dataclass(frozen=True)
class Codebook:
    """Words (V, D), found by k-means. floor: that of `normalized`; None: descriptors as they are.
    spread: the mean squared distance from a descriptor to its word.
    """

    centers: Tensor
    floor: float | None
    spread: float

    @classmethod
    def fit(cls, d: Tensor, words: int, *, normalize: bool = True, seed: int = 0) -> Codebook:
        """The words of descriptors (P, D), of training images only."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        floor = None
        if normalize:
            length = torch.linalg.vector_norm(d, dim=1)
            if not (length > 0).any():
                raise ValueError("descriptors: all are zero; the maps of these images are empty")
            floor = WEAK * float(length[length > 0].median())
            d = normalized(d, floor)
        d = d.cpu()
        distinct = len(d)
        # A random start is as good and costs a third; it can leave words empty, the other cannot.
        for start in ("random", "k-means++") if distinct >= words else ():
            with warnings.catch_warnings():
                # That there are fewer different windows than words is an error here.
                warnings.simplefilter("ignore", ConvergenceWarning)
                means = KMeans(words, init=start, n_init=1, max_iter=ROUNDS, random_state=seed)
                found = means.fit(d.numpy())
            if (distinct := len(np.unique(found.labels_))) == words:
                break
        if distinct < words:
            raise ValueError(
                f"words={words}: the training images have only {distinct} different windows; "
                "choose fewer words, or more images"
            )
        return cls(torch.from_numpy(found.cluster_centers_), floor, found.inertia_ / len(d))

    def assign(self, d: Tensor, neighbours: int = 1) -> tuple[Tensor, Tensor]:
        """The nearest words of descriptors (P, D) and how they share them, (P, neighbours) each.

        Shares add up to 1 and go as exp(-distance^2 / spread); of one neighbour it has all. Memory
        is bounded: some descriptors at a time.
        """
        words, shares = [], []
        half = 0.5 * self.centers.square().sum(1)
        for part in d.split(ROWS):
            part = part if self.floor is None else normalized(part, self.floor)
            # |d - c|^2 / 2 without |d|^2, which is the same for all words.
            distance = torch.addmm(half, part, self.centers.T, alpha=-1)
            if neighbours == 1:
                words.append(distance.argmin(1, keepdim=True))
                shares.append(torch.ones_like(distance[:, :1]))
            else:
                near = distance.topk(neighbours, largest=False)
                words.append(near.indices)
                shares.append((-2 / max(self.spread, 1e-12) * near.values).softmax(1))
        return torch.cat(words), torch.cat(shares)


# Pyramids and kernels.


def check_levels(levels: Sequence[int]) -> None:
    """Refuse grids that are not made of the cells of the last."""
    if not levels or min(levels) < 1 or any(levels[-1] % g for g in levels):
        raise ValueError(
            f"levels={list(levels)}: must be sides of grids that all divide the last, as [1, 2, 4]"
        )


def counts(
    words: Tensor, shares: Tensor, places: Tensor, weights: Tensor, *, side: int, size: int
) -> Tensor:
    """(side^2, size) float64: the words in each cell of a grid over the picture.

    words, shares: (P, neighbours) as `Codebook.assign` gives them; places (P, 2) in [0, 1); weights
    (P,). Their sum is that of the weights.
    """
    cell = (places * side).long().clamp(max=side - 1)
    bins = (cell[:, :1] * side + cell[:, 1:]) * size + words
    votes = (shares * weights[:, None]).double()
    return torch.bincount(bins.flatten(), votes.flatten(), side**2 * size).view(side**2, size)


def pyramid(histograms: Tensor, levels: Sequence[int] = (1, 2, 4), *, power: float = 1.0) -> Tensor:
    """(N, V sum of g^2): the counts in all grids, each level with Lazebnik's weight, sum 1.

    histograms: (N, side^2, V) the counts in the cells of the last grid. Of L + 1 levels the first
    weighs 1 / 2^L, level l 1 / 2^(L - l + 1). With a power below 1 a word that fills a cell counts
    less, for many windows of it say little more than some do. Images without a window stay zero.
    """
    check_levels(levels)
    N, cells, V = histograms.shape
    side, L = levels[-1], len(levels) - 1
    if cells != side * side:
        raise ValueError(f"histograms of {cells} cells: levels={list(levels)} has {side * side}")
    fine, parts = histograms.view(N, side, side, V), []
    for number, g in enumerate(levels):
        weight = 2.0 ** -(L if number == 0 else L - number + 1)
        coarse = fine.view(N, g, side // g, g, side // g, V).sum((2, 4)).flatten(1)
        coarse = coarse if power == 1 else coarse**power
        total = coarse.sum(1, keepdim=True).clamp(min=torch.finfo(coarse.dtype).tiny)
        parts.append(weight * coarse / total)
    return torch.cat(parts, 1)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) float64: sum_v min(a_nv, b_mv), of a (N, D) and b (M, D); on the CPU.

    Rows are shared by as many threads as torch has.
    """
    left, right = (each.detach().cpu().numpy() for each in (a, b))
    total = np.zeros((len(left), len(right)))
    threads = torch.get_num_threads()
    share = max(1, -(-len(left) // threads))

    def rows(start: int) -> None:
        mine = slice(start, start + share)
        for first in range(0, left.shape[1], COLUMNS):
            some = slice(first, first + COLUMNS)
            parts = (np.ascontiguousarray(each) for each in (left[mine, some], right[:, some]))
            _overlap(*parts, total[mine])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(rows, range(0, len(left), share)))
    return torch.from_numpy(total)


@compiled(fastmath=True, nogil=True)
def _overlap(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> None:
    """total (N, M) += sum_v min(a_nv, b_mv): 4 times as fast as torch, which stores minima."""
    for n in range(len(a)):
        for m in range(len(b)):
            x, y = a[n], b[m]
            found = x[:0].sum()
            for v in range(len(x)):
                found += min(x[v], y[v])
            total[n, m] += found


def linear(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) float64: sum_v sqrt(a_nv b_mv), a linear machine's kernel (Bhattacharyya's).

    Of pyramids with the power 1 that is the kernel of the roots of counts.
    """
    return (a.sqrt() @ b.sqrt().T).double().cpu()


KERNELS = {"intersection": intersection, "linear": linear}


def predict(
    kernel: np.ndarray, labels: np.ndarray, tests: np.ndarray, *, C: float, svm: str
) -> np.ndarray:
    """The classes (M,) that support vector machines give to tests.

    kernel: (N, N) of training images, whose classes are labels (N,); tests: (M, N) of test images
    with these. one_vs_rest: one machine a class, the loudest wins, as in the papers; one_vs_one:
    one for every pair of classes, which vote: faster, with more classes less accurate.
    """
    from sklearn.svm import SVC

    if svm not in SVMS:
        raise ValueError(f"svm={svm}: choose one of {', '.join(SVMS)}")
    classes = np.unique(labels)
    machine = SVC(kernel="precomputed", C=C)
    if svm == "one_vs_one" or len(classes) == 2:
        return machine.fit(kernel, labels).predict(tests)
    margins = [machine.fit(kernel, labels == c).decision_function(tests) for c in classes]
    return classes[np.argmax(margins, 0)]


# Splits and scores.


@dataclass(frozen=True)
class Split:
    """Indices of the images to learn from and of those to be tested on, sorted by class."""

    train: np.ndarray
    test: np.ndarray

    @cached_property
    def members(self) -> frozenset[int]:
        return frozenset([*self.train.tolist(), *self.test.tolist()])


def draw_split(
    labels: np.ndarray,
    names: Sequence[str],
    *,
    train: int,
    test: int | None,
    seed: int,
    fixed: np.ndarray | None = None,
) -> Split:
    """So many training images of every class at random, and of the others at most `test`.

    labels: (N,) class of every image, as an index into names. fixed: (N,) whether an image belongs
    to a given test set; then only the others are learned from and only these tested. Raises
    ValueError naming the class that has too few.
    """
    random = np.random.default_rng(seed)
    chosen, tested = [], []
    for label, name in enumerate(names):
        mine = np.flatnonzero(labels == label)
        candidates = mine if fixed is None else mine[~fixed[mine]]
        least = train + 1 if fixed is None else train
        if len(candidates) < least:
            raise ValueError(
                f"train={train}: class {name} has {len(candidates)} images, must have at least "
                f"{least}" + (" so that one is left to be tested" if fixed is None else "")
            )
        candidates = random.permutation(candidates)
        others = candidates[train:] if fixed is None else random.permutation(mine[fixed[mine]])
        chosen.append(np.sort(candidates[:train]))
        tested.append(np.sort(others[:test]))
    return Split(np.concatenate(chosen), np.concatenate(tested))


def confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: images of class i that were taken for class j."""
    return np.bincount(truth * classes + found, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class Scores:
    """confusions (splits, classes, classes): the counts of every split."""

    confusions: np.ndarray

    @property
    def by_class(self) -> np.ndarray:
        """(splits, classes): the share of the images of a class that were recognised; NaN where a
        split tests none.
        """
        right = np.diagonal(self.confusions, axis1=1, axis2=2)
        tested = self.confusions.sum(2)
        return np.where(tested > 0, right / np.maximum(tested, 1), np.nan)

    @property
    def accuracies(self) -> np.ndarray:
        """(splits,): the mean over the classes, which count alike however many images they have."""
        return np.nanmean(self.by_class, 1)

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def spread(self) -> float | None:
        """The standard deviation over the splits; None of a single one."""
        return float(self.accuracies.std(ddof=1)) if len(self.accuracies) > 1 else None
