"""Images restored by the filters of a network: noise taken out, missing pixels filled in.

    images = clean + white Gaussian noise of standard deviation sigma, seen where mask is not 0

    minimise over z_0, z_1
        1/2 ||mask (z_0 + F_1 z_1 - images)||^2
            + psi/2 ||grad z_0||^2 + strength sigma sum_i w_i |z_1i|

    z_0     the low frequencies, which no filter has to explain (Zeiler et al. 2010, denoising)
    z_1     the maps of layer 1; w_i is smaller in maps that are strong in clean images, and for
            entries whose filter fits the image, or what was restored of it, well
    z_2 ... explain the maps below them, by the settings of the network

Missing pixels are those of z_0 + R_l z_l, of layer l. Noise is taken out in two looks. The first is
this minimum, with the z_0 of the noisy images alone. The second has z_0 from what the first has
found, where less noise is in it, and the w_i from that and the image; and it is the mean over all
lattices of the minimum with entries at every second row and column only. One minimum decides for
one of many explanations that are nearly as good; their mean is nearer to the expected image (Simon
and Elad 2019). Layer l > 1 adds a look with w_i from R_l z_l too, on coarser lattices, and restored
is the mean of the second look and those of the layers 2 to l.

Of the network's preprocessing only the colours count: a division by the local deviation would make
much of the noise in flat places. Filters serve best that were learned where only low frequencies
had been taken away (`+experiment=denoise`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deconvnet.images.highpass import tikhonov_lowpass
from deconvnet.images.preprocessing import to_color
from deconvnet.network import tiling
from deconvnet.network.codes import Codes
from deconvnet.network.layer import check_input_size
from deconvnet.network.network import DeconvNet, Progress
from deconvnet.network.tiling import MEMORY, Tile
from deconvnet.operators.linear import Deconvolution
from deconvnet.operators.pooling import max_pool
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.solve import default_solver, solve
from deconvnet.sparse_coding.whole_image import SparseSolution, Thresholds, solve_whole_image
from deconvnet.support.modes import plain
from deconvnet.support.validation import as_images, as_tensor, as_weights, positive, whole

# Of the first look, found on photographs with noise of 25/255 and filters that had learned from
# others: strengths of 3 and 3.6 cost 0.1 dB, psi 2 costs 0.2.
STRENGTH = 3.2
PSI = 4.0
# Of the second look and of those of the layers above: entries at every so manieth row and column,
# thresholds of that share of the strength, and how much of the noisy image is in what decides on
# the weights w_i. (Coffee and rocket, 25/255, dB: the first look 29.5; with its z_0, on lattices,
# with the w_i of the image 29.8; the second look 30.0.)
LAYER_1, ABOVE = (2, 0.72, 0.25), (3, 0.66, 0.5)
# With a mask the low frequencies are the freer to follow seen pixels the less noise these have: psi
# is this multiple of sigma, up to PSI (at sigma 0.01, psi 4 costs 0.6 dB). Thresholds of entries
# fall from three times the common one on. (Rounds with common thresholds, with those of entries.)
PSI_BY_SIGMA = 30.0
REACH_MISSING = 3.0
ROUNDS = (8, 6)
# Coordinate descent: nearer to the minimum nothing is won, and with next to no noise it takes
# minutes.
ITERATIONS, TOLERANCE = 25, 1e-3
# A map's share of the threshold is this power of how strong it is in clean images, coded at a
# threshold of SIGMA. A Laplacian prior of each map would say -1; it spares strong maps too much.
POWER = -0.3
SIGMA = 0.1

# Rows of pooled maps that are looked at together.
STRIP = 16
# Bytes for every pixel and plane of a network that layer 1 takes on a CPU, and for every pixel and
# map on a GPU. Measured, and rounded up.
OF_A_PIXEL, DENSE = 100, 60


class Restorer:
    """Restores images with a trained network.

    strength: the threshold of every map, in standard deviations of the noise in it; larger is
    smoother. psi: how low the low frequencies are where nothing is missing. weights: (K,) those of
    maps, all 1 until `fit`.
    Raises ValueError for a network that explains other planes than rgb or grey, in which the noise
    of pixels is not white.
    """

    def __init__(self, net: DeconvNet, *, strength: float = STRENGTH, psi: float = PSI):
        if not isinstance(net, DeconvNet):
            raise ValueError(f"net must be a DeconvNet, got {type(net).__name__}")
        for key, value in (("strength", strength), ("psi", psi)):
            positive(value, key)
        if (color := net.preprocessing.settings.color) not in ("rgb", "grey"):
            raise ValueError(f"preprocessing.color={color}: use a network for rgb or grey")
        self.net, self.strength, self.psi = net, float(strength), float(psi)
        self.filters = net.layer(1).filters
        self.weights = torch.ones_like(self.filters[:, 0, 0, 0])

    @plain
    def fit(self, images: Iterable[Tensor]) -> Restorer:
        """Find out which maps are strong in clean images (1 or 3, H, W) in [0, 1], of any sizes."""
        total = torch.zeros_like(self.weights, dtype=torch.float64)
        for image in images:
            for y in self._parts(self._planes(self._checked(as_tensor(image, "image")[None]))):
                found = self._infer(y - tikhonov_lowpass(y, self.psi), threshold=SIGMA)
                total += found.magnitudes().to(total)
        if not total.any():
            raise ValueError("images: there are none, or nothing in them that the filters explain")
        share = (total / total.mean()).clamp(min=0.01) ** POWER
        self.weights = share.to(self.filters)
        return self

    @plain
    def denoise(
        self,
        images: Tensor,
        sigma: float | Tensor | None = None,
        *,
        depth: int = 1,
        memory: float = MEMORY,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """What every layer up to `depth` makes of noisy images: depth times (N, C, H, W).

        images: (N, 1 or 3, H, W), of any size, in the units of [0, 1] but not confined to it, as
        what is returned is not. sigma: of the noise, one number or one for each image; None:
        estimated (`estimate_noise`). A grey network takes the planes of colour images one by one.

        memory: in GiB, beside the images themselves. On a CPU layer 1 is one problem whatever the
        size, for which no maps are made; the layers above are explained in tiles (`tiling`) where
        they would not fit. ValueError, before any work, where that is not enough.
        progress(done, total) hears how far it is.
        """
        images = self._checked(images)
        sigma = self._sigma(images, sigma)
        y = self._planes(images)
        cut = self.check(tuple(y.shape[2:]), depth, memory, planes=len(y))
        solves = 1 + _lattices(LAYER_1, self.filters)
        if depth > 1:
            solves += 1 + (depth - 1) * (len(cut) + _lattices(ABOVE, self.filters))
        parts = list(zip(self._parts(y), self._parts(sigma), strict=True))
        steps = _Steps(progress, len(parts) * solves)
        each = [self._denoised(*part, depth, cut, steps) for part in parts]
        return [self._pixels(torch.cat(layer), images) for layer in zip(*each, strict=True)]

    def _denoised(
        self, y: Tensor, sigma: Tensor, depth: int, cut: list[Tile], steps: _Steps
    ) -> list[Tensor]:
        """`denoise` of planes that are explained together."""
        low = tikhonov_lowpass(y, self.psi)
        b = (y - low) / sigma
        rough = low + sigma * (b - self._infer(b, pilot=b, steps=steps).residual)
        low, b, known = self._parted(y, rough, sigma)
        del rough
        restored = [low + sigma * self._averaged(b, known, LAYER_1, steps)]
        if depth > 1:
            low, b, known = self._parted(y, restored[0], sigma)
            found = self._infer(b, pilot=known, steps=steps)
            for painted in self._above(found, b, depth, cut, steps):
                painted = self._averaged(b, (known + painted) / 2, ABOVE, steps)
                restored.append(low + sigma * painted)
        for n in range(1, depth):
            restored[n] = restored[n] + restored[n - 1]
        return [total / n for n, total in enumerate(restored, 1)]

    @plain
    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        sigma: float | Tensor = 0.01,
        *,
        depth: int = 1,
        keep: bool = True,
        memory: float = MEMORY,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """As `denoise`, of images that are only seen where a mask is 1.

        mask: (N or 1, 1, H, W) of 0 and 1; where it is 0 the images may be anything, NaN too.
        sigma: of the noise in what is seen; 0.01 for clean photographs, the smaller the more is
        made of every detail at the edge of a hole. keep: seen pixels stay what they are.
        """
        images, mask = as_tensor(images, "images"), as_tensor(mask, "mask")
        self._check_shape(images)
        mask = self._checked_mask(images, mask)
        seen = torch.where(mask > 0, images, torch.zeros_like(images))
        seen, sigma = self._checked(seen), self._sigma(seen, sigma)
        y = self._planes(seen)
        cut = self.check(tuple(y.shape[2:]), depth, memory, planes=len(y))
        own = mask.expand(len(images), -1, -1, -1).to(y)
        own = own.repeat_interleave(len(y) // len(images), 0)
        parts = list(zip(*map(self._parts, (y, own, sigma)), strict=True))
        steps = _Steps(progress, len(parts) * (sum(ROUNDS) + (depth - 1) * len(cut)))
        each = [self._inpainted(*part, depth, cut, steps) for part in parts]
        restored = [self._pixels(torch.cat(layer), seen) for layer in zip(*each, strict=True)]
        return [torch.where(mask > 0, seen, layer) for layer in restored] if keep else restored

    def _inpainted(
        self, y: Tensor, own: Tensor, sigma: Tensor, depth: int, cut: list[Tile], steps: _Steps
    ) -> list[Tensor]:
        """`inpaint` of planes that are explained together."""
        y = y / sigma
        psi = (PSI_BY_SIGMA * sigma).clamp(max=self.psi)
        low, painted, found = tikhonov_lowpass(y, psi, own), None, None
        for count in range(sum(ROUNDS)):
            found = self._infer(
                *(own * (y - low), own),
                pilot=None if count < ROUNDS[0] else painted,
                reach=REACH_MISSING,
                start=found,
                steps=steps,
            )
            painted = found.synthesis()
            low = tikhonov_lowpass(y - painted, psi, own)
        layers = [painted, *self._above(found, painted, depth, cut, steps)]
        return [sigma * (low + layer) for layer in layers]

    def _parts(self, planes: Tensor) -> tuple[Tensor, ...]:
        """One by one on a CPU, whose memory this bounds; together on a GPU, which is faster."""
        return planes.split(1 if self.filters.device.type == "cpu" else len(planes))

    def check(
        self, size: tuple[int, int], depth: int, memory: float = MEMORY, *, planes: int = 3
    ) -> list[Tile]:
        """Refuse, before any work, images of H x W pixels that are too small, or too large for so
        many GiB; else the tiles of the layers above the first. planes: of all images that are
        restored together, a grey network restoring one by one.
        """
        self.net.layer(whole(depth, "depth"))
        self._check_size(size)
        tiling.check_memory(memory)
        pixels = math.prod(size)
        device = self.filters.device
        if device.type == "cpu":
            needed = OF_A_PIXEL * self.filters.shape[1] * pixels / tiling.GIB
        else:
            # All at once, and what there is of memory is that of the device.
            memory = torch.cuda.get_device_properties(device).total_memory / tiling.GIB
            needed = DENSE * len(self.filters) * planes * pixels / tiling.GIB
        if needed > memory:
            tiling.raise_too_large(size, needed, memory)
        if depth == 1:
            return []
        return tiling.plan(self.net, size, depth, memory, first=2, planes=needed)

    def _checked(self, images: Tensor) -> Tensor:
        images = as_tensor(images, "images")
        self._check_shape(images)
        if not torch.isfinite(images).all():
            raise ValueError("images must be finite: there are NaN or infinite values")
        if len(images) == 0:
            raise ValueError("0 images: must be at least 1")
        self._check_size(tuple(images.shape[2:]))
        return images

    def _check_shape(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise ValueError(
                f"images must be floating and (N, 1 or 3, H, W), got {tuple(images.shape)} of "
                f"{images.dtype}"
            )
        if images.numel() == 0:
            raise ValueError(f"images must not be empty, got the shape {tuple(images.shape)}")

    def _check_size(self, size: tuple[int, int]) -> None:
        (H, W), side = size, max(self.filters.shape[2:])
        if min(H, W) < side:
            raise ValueError(f"images of {H}x{W} are smaller than the {side}x{side} filters")

    def _checked_mask(self, images: Tensor, mask: Tensor) -> Tensor:
        fits = mask.ndim == 4 and mask.shape[1] == 1 and len(mask) in (1, len(images))
        if not fits or mask.shape[2:] != images.shape[2:]:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)}: expected (N or 1, 1, H, W) for images of "
                f"shape {tuple(images.shape)}"
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask must be 0 or 1 everywhere")
        if not mask.flatten(1).any(1).all():
            raise ValueError("mask: nothing is seen of an image")
        return mask.to(images.device)

    def _sigma(self, images: Tensor, sigma: float | Tensor | None) -> Tensor:
        """That of every plane that is explained by itself, (planes, 1, 1, 1)."""
        if sigma is None:
            sigma = estimate_noise(images)
            if not (sigma > 0).all():
                raise ValueError(
                    f"sigma=None: image {int((sigma == 0).nonzero()[0])} has no noise that could "
                    "be estimated; give sigma"
                )
        sigma = as_weights(sigma, "sigma")
        if sigma.numel() not in (1, len(images)):
            raise ValueError(
                f"sigma of the shape {tuple(sigma.shape)}: must be one number, or one for each of "
                f"{len(images)} images"
            )
        sigma = sigma.flatten()
        if not ((sigma > 0) & (sigma < math.inf)).all():
            given = sigma.tolist() if len(sigma) > 1 else sigma.item()
            raise ValueError(f"sigma={given}: must be positive")
        sigma = sigma.expand(len(images)).to(self.filters)
        C = self.filters.shape[1]
        if C == 1:
            sigma = sigma.repeat_interleave(images.shape[1])
        elif images.shape[1] == 1:
            # The same noise in three planes adds up in filters that have no colour.
            sigma = sigma * C**0.5
        return sigma.view(-1, 1, 1, 1)

    def _planes(self, images: Tensor) -> Tensor:
        """What the filters explain: RGB, grey, or, with grey filters, every plane by itself."""
        images = images.to(self.filters)
        if self.filters.shape[1] == 1:
            return images.flatten(0, 1)[:, None]
        return to_color(images, "rgb")

    def _pixels(self, y: Tensor, images: Tensor) -> Tensor:
        """The images (N, C, H, W) of their planes; grey if they were grey."""
        if self.filters.shape[1] == 1:
            return y.view(images.shape)
        return y if images.shape[1] == 3 else y.mean(1, keepdim=True)

    def _parted(self, y: Tensor, known: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The low frequencies of what is known of the images, which have less noise than those of
        the images y, and, in units of sigma, what these and what is known have beside them.
        """
        low = tikhonov_lowpass(known, self.psi)
        return low, (y - low) / sigma, (known - low) / sigma

    def _averaged(
        self, b: Tensor, known: Tensor, look: tuple[int, float, float], steps: _Steps | None = None
    ) -> Tensor:
        """What z_1 makes of b (N, C, H, W) if entries stand at every s-th row and column only, the
        mean over all s^2 such lattices; thresholds of entries by what is known, and by b.

        If the s x s pixels of a cell are channels of one place, filters on a lattice are a smaller
        convolution, and shifted images see the other lattices.
        """
        stride, share, image = look
        s, (H, W) = min(stride, *self.filters.shape[2:]), b.shape[2:]
        # With every shift whole cells cover the image.
        rows, columns = (-(-(size + s - 1) // s) * s for size in (H, W))
        h, w = self.filters.shape[2:]
        filters = functional.pad(self.filters, (0, -w % s, 0, -h % s))
        filters = functional.pixel_unshuffle(filters, s)
        pilot = image * b + (1 - image) * known
        total = torch.zeros_like(b)
        for i, j in ((i, j) for i in range(s) for j in range(s)):
            margin = (j, columns - W - j, i, rows - H - i)

            def cells(planes: Tensor, margin: tuple[int, ...] = margin) -> Tensor:
                moved = functional.pad(planes, margin, mode="replicate")
                return functional.pixel_unshuffle(moved, s)

            found = self._infer(
                cells(b),
                threshold=share * self.strength,
                pilot=cells(pilot),
                filters=filters,
                steps=steps,
            )
            rest = functional.pixel_shuffle(found.residual, s)
            total += rest[:, :, i : i + H, j : j + W]
        return b - total / s**2

    def _infer(
        self,
        b: Tensor,
        mask: Tensor | None = None,
        *,
        threshold: float | None = None,
        pilot: Tensor | None = None,
        reach: float = 1.0,
        start: SparseSolution | _Dense | None = None,
        filters: Tensor | None = None,
        steps: _Steps | None = None,
    ) -> SparseSolution | _Dense:
        """z_1, of one image on a CPU; threshold: of a map whose filter has the norm 1, by default
        the strength. filters: by default those of layer 1.

        pilot: an image whose correlations c = F'pilot divide the thresholds of entries by
        c / (reach threshold): what stands out is shrunk less, what does not is shrunk more (the
        adaptive lasso, Zou 2006; SPORCO's denoising divides by c^2).
        """
        threshold = self.strength if threshold is None else threshold
        settings = self.net.layer(1).settings
        filters = self.filters if filters is None else filters
        A = Deconvolution(filters, settings.boundary, mask)
        # The noise of a map has the norm of its filter.
        gain = torch.linalg.vector_norm(filters, dim=(1, 2, 3))
        limits = Thresholds(
            self.weights * gain, gain, settings.group, pilot=pilot, level=reach * threshold
        )
        steps = steps or _Steps(None, 1)
        if b.device.type == "cpu":
            found = solve_whole_image(
                *(A, b, limits),
                lam=1 / threshold,
                non_negative=settings.non_negative,
                iterations=ITERATIONS,
                tolerance=TOLERANCE,
                start=start,
                on_round=steps.round,
            )
        else:
            found = _dense(A, b, limits, 1 / threshold, settings.non_negative, start)
        steps.solved()
        return found

    def _above(
        self,
        found: SparseSolution | _Dense,
        b: Tensor,
        depth: int,
        cut: list[Tile] | None = None,
        steps: _Steps | None = None,
    ) -> list[Tensor]:
        """What the layers from 2 to depth make of b, through the maps of layer 1; cut: the tiles.

        The maps are brought to the size at which the network knows them, image by image, so that
        its own settings hold.
        """
        if depth == 1:
            return []
        size = self._pooled_size(found)
        scale = self.net.layer(2).scale / size
        factor = torch.where(size > 0, scale, torch.ones_like(scale))
        steps = steps or _Steps(None, 1)
        whole = [torch.zeros_like(b) for _ in range(2, depth + 1)]
        for tile in cut or [Tile.whole(*b.shape[2:])]:
            below = tiling.codes_of_tile(self.net, found, tile)
            dense = None if below.dense is None else below.dense * factor
            below = replace(below, pooled=below.pooled * factor, dense=dense)
            part = (slice(None), slice(None), tile.rows, tile.columns)
            codes = Codes((below,), b[part] * factor, [])
            for number, total in enumerate(whole, 2):
                layer, problem = self.net.layer(number), self.net.layer_problem(codes, number)
                check_input_size(self.net.layer_input(codes, number).shape, layer, number)
                solver = layer.settings.solver
                if solver.method == "coordinate" and problem.b.device.type != "cpu":
                    solver = default_solver(problem.b)
                above = layer.codes(layer.infer(problem, settings=solver))
                codes = Codes((*codes.layers, above), codes.y, codes.record)
                total[part] += tile.weights.to(b) * self.net.synthesize(codes, number) / factor
                steps.solved()
        return whole

    def _pooled_size(self, found: SparseSolution | _Dense) -> Tensor:
        """(N, 1, 1, 1): the root mean square of the pooled maps of layer 1, strip by strip."""
        layer, (_, rows, _) = self.net.layer(1), found.shape
        pool = layer.settings.pool
        step = (pool[1] if pool else 1) * STRIP
        squares, count = 0.0, 0
        for top in range(0, rows, step):
            z = found.maps(slice(top, min(top + step, rows)))
            pooled = z if pool is None else max_pool(z, tuple(pool))[0]
            squares = squares + pooled.square().sum((1, 2, 3), dtype=torch.float64)
            count += pooled[0].numel()
        return (squares / count).sqrt().to(self.filters).view(-1, 1, 1, 1)


class _Steps:
    """How far the work is: so many problems, of at most ITERATIONS rounds each."""

    def __init__(self, progress: Progress | None, problems: int):
        self.progress, self.total = progress, problems * ITERATIONS
        self.problems = self.rounds = 0

    def round(self) -> None:
        """One more round of a problem."""
        self.rounds = min(self.rounds + 1, ITERATIONS - 1)
        self._report()

    def solved(self) -> None:
        """One more problem."""
        self.problems, self.rounds = self.problems + 1, 0
        self._report()

    def _report(self) -> None:
        if self.progress:
            self.progress(self.problems * ITERATIONS + self.rounds, self.total)


@dataclass(frozen=True)
class _Dense:
    """`SparseSolution` for several images on any device, with all their maps."""

    solution: Solution
    A: Deconvolution

    @property
    def residual(self) -> Tensor:
        return self.solution.residual

    @property
    def reconstruction(self) -> Tensor:
        return self.solution.reconstruction

    @property
    def sparsity(self) -> Tensor:
        return self.solution.sparsity

    @property
    def iterations(self) -> int:
        return self.solution.iterations

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.solution.z.shape[1:])

    def maps(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        return self.solution.z[:, :, rows, columns]

    def magnitudes(self) -> Tensor:
        return self.solution.z.abs().sum((0, 2, 3), dtype=torch.float64)

    def synthesis(self) -> Tensor:
        return Deconvolution(self.A.f, self.A.boundary)(self.solution.z)


def _dense(
    A: Deconvolution,
    b: Tensor,
    thresholds: Thresholds,
    lam: float,
    non_negative: bool,
    start: _Dense | None,
) -> _Dense:
    """What `solve_whole_image` finds, by a method that any device knows."""
    if thresholds.pilot is None:
        weights = thresholds.per_map()
    else:
        plain = Deconvolution(A.f, A.boundary)
        weights = thresholds.per_coefficient(plain.adjoint(thresholds.pilot))
    solution = solve(
        *(A, b),
        lam=lam,
        prior=Prior(weights=weights, group=thresholds.group, non_negative=non_negative),
        settings=SolverSettings(),
        state=None if start is None else start.solution.state,
    )
    return _Dense(solution, A)


def _lattices(look: tuple[int, float, float], filters: Tensor) -> int:
    """How many of them a look is the mean of."""
    return min(look[0], *filters.shape[2:]) ** 2


def estimate_noise(images: Tensor) -> Tensor:
    """The standard deviation (N,) of the noise in images (N, C, H, W), the mean of their planes.

    From the median of the finest wavelet coefficients (Donoho and Johnstone 1994), by scikit-image.
    Fine texture counts as noise: of six clean photographs it finds 0.002 to 0.01. 0 where there are
    no such coefficients, as in an image of one colour.
    """
    from skimage.restoration import estimate_sigma

    images = as_images(images)
    planes = images.cpu().double().numpy()
    with warnings.catch_warnings():
        # The median of nothing.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = [estimate_sigma(image, channel_axis=0) for image in planes]
    sigma = torch.from_numpy(np.nan_to_num(np.asarray(found)).mean(1))
    rounding = torch.finfo(images.dtype).eps * images.cpu().abs().amax((1, 2, 3))
    return torch.where(sigma > rounding, sigma, 0.0).to(images.dtype)
