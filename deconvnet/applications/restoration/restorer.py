"""Denoising and inpainting with the filters of a network.

    images = clean + white Gaussian noise of standard deviation sigma, observed where mask is 1

    minimise over z_0, z_1
        1/2 ||mask (z_0 + F_1 z_1 - images)||^2
            + psi/2 ||grad z_0||^2 + strength sigma sum_i w_i |z_1i|

    z_0     the low frequencies, which the filters need not explain (Zeiler et al. 2010, denoising)
    z_1     the maps of layer 1; w_i is smaller in maps that are strong in clean images, and for
            coefficients whose filter correlates with the pilot, an estimate of the clean image
    z_2 ... explain the maps below them, by the settings of the network

Missing pixels are filled in from z_0 + R_l z_l, for layer l.

Denoising takes two passes. The first computes this minimum, with z_0 from the noisy images. The
second takes z_0 from the result of the first, which has less noise, and w_i from a mixture of this
result and the noisy image. It also uses cycle spinning: coefficients are allowed only at every
second row and column, and the minima on all such lattices are averaged. A single minimum selects
one of many nearly equally good explanations; their mean is closer to the expected image (Simon and
Elad 2019). Layer l > 1 adds a pass in which w_i also depends on R_l z_l, on coarser lattices; the
result of layer l is the mean of the second pass and the passes of layers 2 to l.

Only the colour conversion of the network's preprocessing is used: dividing by the local deviation
would amplify the noise in flat regions. The best filters are learned from images from which only
the low frequencies were removed (`+experiment=denoise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from deconvnet.applications.restoration.dense_solution import DenseSolution, solve_dense
from deconvnet.applications.restoration.inputs import (
    check_shape,
    check_size,
    checked_images,
    checked_mask,
    noise_level,
)
from deconvnet.images.highpass import tikhonov_lowpass
from deconvnet.images.preprocessing import to_color
from deconvnet.network import tiling
from deconvnet.network.codes import Codes
from deconvnet.network.layer import check_input_size
from deconvnet.network.network import DeconvNet, Progress
from deconvnet.network.tiling import MEMORY, Tile
from deconvnet.operators.linear import Deconvolution
from deconvnet.operators.pooling import max_pool
from deconvnet.sparse_coding.solve import default_solver
from deconvnet.sparse_coding.whole_image import SparseSolution, Thresholds, solve_whole_image
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import as_positive_integer, as_positive_number, as_tensor


@dataclass(frozen=True)
class LatticePass:
    """A pass with cycle spinning: its threshold, as a fraction of the strength, and its pilot.

    stride: coefficients are allowed at every stride-th row and column. noisy_weight: the weight of
    the noisy image in the pilot; the rest is the result of the previous pass.
    """

    stride: int
    threshold: float
    noisy_weight: float

    def num_lattices(self, filters: Tensor) -> int:
        return min(self.stride, *filters.shape[2:]) ** 2


# For the first pass, chosen on photographs with noise of 25/255 and filters learned from other
# images: strengths of 3 and 3.6 cost 0.1 dB, psi 2 costs 0.2 dB.
STRENGTH = 3.2
PSI = 4.0
# The second pass, and those of upper layers. (Coffee and rocket, 25/255, in dB: the first pass
# 29.5; on lattices, with its z_0 and with w_i from the image alone, 29.8; the second pass 30.0.)
SECOND_PASS = LatticePass(stride=2, threshold=0.72, noisy_weight=0.25)
UPPER_PASS = LatticePass(stride=3, threshold=0.66, noisy_weight=0.5)
# Inpainting: the less noise the observed pixels have, the closer the low frequencies should follow
# them: psi is PSI_PER_SIGMA sigma, at most PSI (at sigma 0.01, psi 4 costs 0.6 dB). A pilot lowers
# thresholds where it exceeds INPAINTING_LEVEL times the common threshold. ROUNDS without a pilot,
# then with one.
PSI_PER_SIGMA = 30.0
INPAINTING_LEVEL = 3.0
ROUNDS = (8, 6)
# Of coordinate descent: a more accurate minimum gains nothing, and with very little noise it takes
# minutes.
ITERATIONS, TOLERANCE = 25, 1e-3
# The weight of a map is this power of its mean magnitude in clean images, which are coded with a
# threshold of FIT_THRESHOLD. A Laplacian prior per map would give -1, which penalises strong maps
# too little.
WEIGHT_EXPONENT = -0.3
FIT_THRESHOLD = 0.1

# Rows of pooled maps in memory at a time.
ROWS_AT_A_TIME = 16
# Memory of layer 1: on a CPU bytes per pixel and plane, on a GPU per pixel and map. Measured, and
# rounded up.
CPU_BYTES, GPU_BYTES = 100, 60


class Restorer:
    """Restores images with a trained network.

    strength: the threshold of every map, in standard deviations of the noise in it; larger is
    smoother. psi: the weight of the gradient of the low frequencies, in denoising. weights: (K,),
    of the maps, all 1 before `fit`.
    Raises ValueError for a network of other planes than rgb or grey: there, white noise of the
    pixels is not white.
    """

    def __init__(self, net: DeconvNet, *, strength: float = STRENGTH, psi: float = PSI):
        if not isinstance(net, DeconvNet):
            raise ValueError(f"net must be a DeconvNet, got {type(net).__name__}")
        for key, value in (("strength", strength), ("psi", psi)):
            as_positive_number(value, key)
        if (color := net.preprocessing.settings.color) not in ("rgb", "grey"):
            raise ValueError(f"preprocessing.color={color}: use a network for rgb or grey")
        for number, layer in enumerate(net.layers, 1):
            if layer.settings.coding != "convolution":
                raise ValueError(
                    f"layer{number}.coding={layer.settings.coding}: images are restored by layers "
                    "with coding=convolution"
                )
        self.net, self.strength, self.psi = net, float(strength), float(psi)
        self.filters = net.layer(1).filters
        self.weights = torch.ones_like(self.filters[:, 0, 0, 0])

    @plain
    def fit(self, images: Iterable[Tensor]) -> Restorer:
        """Learn the weights of the maps from clean images (1 or 3, H, W) in [0, 1], of any sizes.

        Maps that are strong in clean images get smaller weights.
        """
        total = torch.zeros_like(self.weights, dtype=torch.float64)
        for image in images:
            image = checked_images(as_tensor(image, "image")[None], self._filter_shape)
            for y in self._batches(self._planes(image)):
                codes = self._infer(y - tikhonov_lowpass(y, self.psi), threshold=FIT_THRESHOLD)
                total += codes.magnitudes().to(total)
        if not total.any():
            raise ValueError("images: there are none, or the filters explain nothing in them")
        weights = (total / total.mean()).clamp(min=0.01) ** WEIGHT_EXPONENT
        self.weights = weights.to(self.filters)
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
        """The denoised images of each layer up to `depth`: a list of (N, C, H, W).

        images: (N, 1 or 3, H, W) of any size, in units of [0, 1]; they and the result may exceed
        this range. sigma: the standard deviation of the noise, one number or one per image;
        None: estimated (`estimate_noise`). A grey network denoises the planes of colour images one
        by one.

        memory: in GiB, in addition to the images. On a CPU, layer 1 is solved as one problem for an
        image of any size, without maps in memory; upper layers are inferred in tiles (`tiling`) if
        they would not fit. Raises ValueError, before any work, if the memory is insufficient.
        progress(done, total) is called as the work proceeds.
        """
        images = checked_images(images, self._filter_shape)
        sigma = self._sigma_per_plane(noise_level(sigma, images), images)
        y = self._planes(images)
        tiles = self.plan_tiles(tuple(y.shape[2:]), depth, memory, planes=len(y))
        problems = 1 + SECOND_PASS.num_lattices(self.filters)
        if depth > 1:
            upper = len(tiles) + UPPER_PASS.num_lattices(self.filters)
            problems += 1 + (depth - 1) * upper
        batches = list(zip(self._batches(y), self._batches(sigma), strict=True))
        counter = _ProgressCounter(progress, len(batches) * problems)
        results = [self._denoise(*batch, depth, tiles, counter) for batch in batches]
        return [self._pixels(torch.cat(layer), images) for layer in zip(*results, strict=True)]

    def _denoise(
        self, y: Tensor, sigma: Tensor, depth: int, tiles: list[Tile], counter: _ProgressCounter
    ) -> list[Tensor]:
        """`denoise` for planes that are coded together."""
        low = tikhonov_lowpass(y, self.psi)
        b = (y - low) / sigma
        estimate = low + sigma * (b - self._infer(b, pilot=b, counter=counter).residual)
        low, b, estimate = self._split(y, estimate, sigma)
        results = [low + sigma * self._cycle_spin(b, estimate, SECOND_PASS, counter)]
        if depth > 1:
            low, b, estimate = self._split(y, results[0], sigma)
            codes = self._infer(b, pilot=estimate, counter=counter)
            for synthesis in self._infer_upper(codes, b, depth, tiles, counter):
                estimate_above = (estimate + synthesis) / 2
                spun = self._cycle_spin(b, estimate_above, UPPER_PASS, counter)
                results.append(low + sigma * spun)
        for n in range(1, depth):
            results[n] = results[n] + results[n - 1]
        return [total / n for n, total in enumerate(results, 1)]

    @plain
    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        sigma: float | Tensor = 0.01,
        *,
        depth: int = 1,
        keep_observed: bool = True,
        memory: float = MEMORY,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Like `denoise`, for images that are observed only where a mask is 1.

        mask: (N or 1, 1, H, W) of 0 and 1; where it is 0, the images may have any value, including
        NaN. sigma: of the noise in the observed pixels; 0.01 for clean photographs. The smaller it
        is, the more the result follows each detail at the edge of a hole. keep_observed: do not
        change observed pixels.
        """
        images = as_tensor(images, "images")
        mask = as_tensor(mask, "mask")
        check_shape(images)
        mask = checked_mask(mask, images)
        observed = torch.where(mask > 0, images, torch.zeros_like(images))
        observed = checked_images(observed, self._filter_shape)
        sigma = self._sigma_per_plane(noise_level(sigma, observed), observed)
        y = self._planes(observed)
        tiles = self.plan_tiles(tuple(y.shape[2:]), depth, memory, planes=len(y))
        plane_mask = mask.expand(len(images), -1, -1, -1).to(y)
        plane_mask = plane_mask.repeat_interleave(len(y) // len(images), 0)
        batches = list(zip(*map(self._batches, (y, plane_mask, sigma)), strict=True))
        problems = sum(ROUNDS) + (depth - 1) * len(tiles)
        counter = _ProgressCounter(progress, len(batches) * problems)
        results = [self._inpaint(*batch, depth, tiles, counter) for batch in batches]
        layers = [self._pixels(torch.cat(layer), observed) for layer in zip(*results, strict=True)]
        if not keep_observed:
            return layers
        return [torch.where(mask > 0, observed, layer) for layer in layers]

    def _inpaint(
        self,
        y: Tensor,
        mask: Tensor,
        sigma: Tensor,
        depth: int,
        tiles: list[Tile],
        counter: _ProgressCounter,
    ) -> list[Tensor]:
        """`inpaint` for planes that are coded together: alternates between z_0 and z_1."""
        y = y / sigma
        psi = (PSI_PER_SIGMA * sigma).clamp(max=self.psi)
        low, synthesis, codes = tikhonov_lowpass(y, psi, mask), None, None
        for number in range(sum(ROUNDS)):
            codes = self._infer(
                *(mask * (y - low), mask),
                pilot=None if number < ROUNDS[0] else synthesis,
                level=INPAINTING_LEVEL,
                start=codes,
                counter=counter,
            )
            synthesis = codes.synthesis()
            low = tikhonov_lowpass(y - synthesis, psi, mask)
        layers = [synthesis, *self._infer_upper(codes, synthesis, depth, tiles, counter)]
        return [sigma * (low + layer) for layer in layers]

    def plan_tiles(
        self, size: tuple[int, int], depth: int, memory: float = MEMORY, *, planes: int = 3
    ) -> list[Tile]:
        """The tiles of the layers above the first, for images of H x W pixels.

        Raises ValueError, before any work, if the images are too small, or too large for this
        memory in GiB. planes: the number of planes that are coded together, of all images.
        """
        self.net.layer(as_positive_integer(depth, "depth"))
        check_size(size, self._filter_shape)
        tiling.check_memory(memory)
        pixels = math.prod(size)
        device = self.filters.device
        if device.type == "cpu":
            needed = CPU_BYTES * self.filters.shape[1] * pixels / tiling.GIB
        else:
            # All planes at once; the limit is the memory of the device.
            memory = torch.cuda.get_device_properties(device).total_memory / tiling.GIB
            needed = GPU_BYTES * len(self.filters) * planes * pixels / tiling.GIB
        if needed > memory:
            tiling.raise_too_large(size, needed, memory)
        if depth == 1:
            return []
        return tiling.plan(self.net, size, depth, memory, first=2, planes=needed)

    # Conversion between images and the planes that the filters explain.

    @property
    def _filter_shape(self) -> tuple[int, int]:
        return tuple(self.filters.shape[2:])

    def _batches(self, planes: Tensor) -> tuple[Tensor, ...]:
        """One plane at a time on a CPU, which bounds memory; all on a GPU, which is faster."""
        return planes.split(1 if self.filters.device.type == "cpu" else len(planes))

    def _sigma_per_plane(self, sigma: Tensor, images: Tensor) -> Tensor:
        """The noise level (planes, 1, 1, 1) of the coded planes, from that of the images (N,)."""
        sigma = sigma.to(self.filters)
        C = self.filters.shape[1]
        if C == 1:
            sigma = sigma.repeat_interleave(images.shape[1])
        elif images.shape[1] == 1:
            # The same noise in three planes adds up in filters without colour.
            sigma = sigma * C**0.5
        return sigma.view(-1, 1, 1, 1)

    def _planes(self, images: Tensor) -> Tensor:
        """The planes to code: RGB, grey, or, with grey filters, every plane separately."""
        images = images.to(self.filters)
        if self.filters.shape[1] == 1:
            return images.flatten(0, 1)[:, None]
        return to_color(images, "rgb")

    def _pixels(self, y: Tensor, images: Tensor) -> Tensor:
        """The images (N, C, H, W) from their planes; grey if they were grey."""
        if self.filters.shape[1] == 1:
            return y.view(images.shape)
        return y if images.shape[1] == 3 else y.mean(1, keepdim=True)

    # Layer 1.

    def _split(self, y: Tensor, estimate: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z_0, high frequencies of y, high frequencies of the estimate), the latter over sigma.

        z_0 comes from the estimate, whose low frequencies have less noise than those of y.
        """
        low = tikhonov_lowpass(estimate, self.psi)
        return low, (y - low) / sigma, (estimate - low) / sigma

    def _cycle_spin(
        self,
        b: Tensor,
        estimate: Tensor,
        lattice: LatticePass,
        counter: _ProgressCounter | None = None,
    ) -> Tensor:
        """F_1 z_1 for b (N, C, H, W), averaged over the s^2 lattices on which z_1 may be non-zero.

        With the s x s pixels of a cell as the channels of one position, filters on a lattice become
        a smaller convolution, and shifting the image gives the other lattices.
        """
        s, (H, W) = min(lattice.stride, *self.filters.shape[2:]), b.shape[2:]
        # Whole cells that cover the image under every shift.
        rows, columns = (-(-(size + s - 1) // s) * s for size in (H, W))
        h, w = self.filters.shape[2:]
        filters = functional.pad(self.filters, (0, -w % s, 0, -h % s))
        filters = functional.pixel_unshuffle(filters, s)
        pilot = lattice.noisy_weight * b + (1 - lattice.noisy_weight) * estimate
        total = torch.zeros_like(b)
        for i, j in ((i, j) for i in range(s) for j in range(s)):
            margin = (j, columns - W - j, i, rows - H - i)

            def to_cells(planes: Tensor, margin: tuple[int, ...] = margin) -> Tensor:
                shifted = functional.pad(planes, margin, mode="replicate")
                return functional.pixel_unshuffle(shifted, s)

            codes = self._infer(
                to_cells(b),
                threshold=lattice.threshold * self.strength,
                pilot=to_cells(pilot),
                filters=filters,
                counter=counter,
            )
            residual = functional.pixel_shuffle(codes.residual, s)
            total += residual[:, :, i : i + H, j : j + W]
        return b - total / s**2

    def _infer(
        self,
        b: Tensor,
        mask: Tensor | None = None,
        *,
        threshold: float | None = None,
        pilot: Tensor | None = None,
        level: float = 1.0,
        start: SparseSolution | DenseSolution | None = None,
        filters: Tensor | None = None,
        counter: _ProgressCounter | None = None,
    ) -> SparseSolution | DenseSolution:
        """z_1; on a CPU of a single plane.

        threshold: of a map whose filter has norm 1, by default the strength. filters: by default
        those of layer 1.
        pilot: an image with correlations c = F'pilot; the threshold of each coefficient is divided
        by c / (level threshold): strong structures are shrunk less, weak ones more (the adaptive
        lasso, Zou 2006; SPORCO's denoising divides by c^2).
        """
        threshold = self.strength if threshold is None else threshold
        settings = self.net.layer(1).settings
        filters = self.filters if filters is None else filters
        A = Deconvolution(filters, settings.boundary, mask)
        # The noise in a map is proportional to the norm of its filter.
        gain = torch.linalg.vector_norm(filters, dim=(1, 2, 3))
        thresholds = Thresholds(
            self.weights * gain, gain, settings.group, pilot=pilot, level=level * threshold
        )
        common = dict(lam=1 / threshold, non_negative=settings.non_negative, start=start)
        counter = counter or _ProgressCounter(None, 1)
        if b.device.type == "cpu":
            codes = solve_whole_image(
                *(A, b, thresholds),
                **common,
                iterations=ITERATIONS,
                tolerance=TOLERANCE,
                on_round=counter.iteration,
            )
        else:
            codes = solve_dense(A, b, thresholds, **common)
        counter.solved()
        return codes

    # Upper layers.

    def _infer_upper(
        self,
        codes_1: SparseSolution | DenseSolution,
        b: Tensor,
        depth: int,
        tiles: list[Tile] | None = None,
        counter: _ProgressCounter | None = None,
    ) -> list[Tensor]:
        """R_l z_l (N, C, H, W) of layers 2 to depth, inferred from the codes of layer 1.

        The maps of each image are scaled to the magnitude on which the network was trained, so that
        its settings apply.
        """
        if depth == 1:
            return []
        size = self._pooled_rms(codes_1)
        scale = self.net.layer(2).scale / size
        factor = torch.where(size > 0, scale, torch.ones_like(scale))
        counter = counter or _ProgressCounter(None, 1)
        totals = [torch.zeros_like(b) for _ in range(2, depth + 1)]
        for tile in tiles or [Tile.whole(*b.shape[2:])]:
            below = tiling.codes_of_tile(self.net, codes_1, tile)
            dense = None if below.dense is None else below.dense * factor
            below = replace(below, pooled=below.pooled * factor, dense=dense)
            part = (slice(None), slice(None), tile.rows, tile.columns)
            codes = Codes((below,), b[part] * factor, [])
            for number, total in enumerate(totals, 2):
                layer, problem = self.net.layer(number), self.net.layer_problem(codes, number)
                check_input_size(self.net.layer_input(codes, number).shape, layer, number)
                solver = layer.settings.solver
                if solver.method == "coordinate" and problem.b.device.type != "cpu":
                    solver = default_solver(problem.b)
                above = layer.codes(layer.infer(problem, settings=solver))
                codes = Codes((*codes.layers, above), codes.y, codes.record)
                total[part] += tile.weights.to(b) * self.net.synthesize(codes, number) / factor
                counter.solved()
        return totals

    def _pooled_rms(self, codes: SparseSolution | DenseSolution) -> Tensor:
        """(N, 1, 1, 1): the root mean square of the pooled maps of layer 1, strip by strip."""
        layer, (_, rows, _) = self.net.layer(1), codes.shape
        pool = layer.settings.pool
        step = (pool[1] if pool else 1) * ROWS_AT_A_TIME
        squares, count = 0.0, 0
        for top in range(0, rows, step):
            z = codes.maps(slice(top, min(top + step, rows)))
            pooled = z if pool is None else max_pool(z, tuple(pool))[0]
            squares = squares + pooled.square().sum((1, 2, 3), dtype=torch.float64)
            count += pooled[0].numel()
        return (squares / count).sqrt().to(self.filters).view(-1, 1, 1, 1)


class _ProgressCounter:
    """Counts and reports solved problems, of at most ITERATIONS iterations each."""

    def __init__(self, progress: Progress | None, problems: int):
        self.progress, self.total = progress, problems * ITERATIONS
        self.problems = self.iterations = 0

    def iteration(self) -> None:
        """Count one more iteration of a problem."""
        self.iterations = min(self.iterations + 1, ITERATIONS - 1)
        self._report()

    def solved(self) -> None:
        """Count one more solved problem."""
        self.problems, self.iterations = self.problems + 1, 0
        self._report()

    def _report(self) -> None:
        if self.progress:
            self.progress(self.problems * ITERATIONS + self.iterations, self.total)
