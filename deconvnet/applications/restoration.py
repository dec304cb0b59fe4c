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
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deconvnet.codes import Codes
from deconvnet.filtering import low_frequencies
from deconvnet.network import DeconvNet, check_size
from deconvnet.operators import Deconvolution
from deconvnet.preprocessing import to_color
from deconvnet.solvers import Solution, SolverSettings, default_solver, solve

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
# Thresholds of entries rise by no more than this factor.
WORST = 50.0
# A map's share of the threshold is this power of how strong it is in clean images, coded at a
# threshold of SIGMA. A Laplacian prior of each map would say -1; it spares strong maps too much.
POWER = -0.3
SIGMA = 0.1


class Restorer:
    """Restores images with a trained network.

    strength: the threshold of every map, in standard deviations of the noise in it; larger is
    smoother. psi: how low the low frequencies are where nothing is missing. weights: (K,) those of
    maps, all 1 until `fit`.
    Raises ValueError for a network that explains other planes than rgb or grey, in which the noise
    of pixels is not white.
    """

    def __init__(self, net: DeconvNet, *, strength: float = STRENGTH, psi: float = PSI):
        for key, value in (("strength", strength), ("psi", psi)):
            if not 0 < value < math.inf:
                raise ValueError(f"{key}={value}: must be a positive number")
        if (color := net.preprocessing.settings.color) not in ("rgb", "grey"):
            raise ValueError(f"preprocessing.color={color}: use a network for rgb or grey")
        self.net, self.strength, self.psi = net, strength, psi
        self.filters = net.layer(1).filters
        self.weights = torch.ones_like(self.filters[:, 0, 0, 0])

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor]) -> Restorer:
        """Find out which maps are strong in clean images (1 or 3, H, W) in [0, 1], of any sizes."""
        total = torch.zeros_like(self.weights, dtype=torch.float64)
        for image in images:
            y = self._planes(self._checked(image[None]))
            z = self._infer(y - low_frequencies(y, self.psi), threshold=SIGMA).z
            total += z.abs().sum((0, 2, 3), dtype=torch.float64)
        if not total.any():
            raise ValueError("images: there are none, or nothing in them that the filters explain")
        share = (total / total.mean()).clamp(min=0.01) ** POWER
        self.weights = share.to(self.filters)
        return self

    @torch.no_grad()
    def denoise(
        self, images: Tensor, sigma: float | Tensor | None = None, *, depth: int = 1
    ) -> list[Tensor]:
        """What every layer up to `depth` makes of noisy images: depth times (N, C, H, W).

        images: (N, 1 or 3, H, W), of any size, in the units of [0, 1] but not confined to it, as
        what is returned is not. sigma: of the noise, one number or one for each image; None:
        estimated (`estimate_noise`). A grey network takes the planes of colour images one by one.
        """
        images, sigma = self._checked(images), self._sigma(images, sigma)
        y = self._planes(images)
        low = low_frequencies(y, self.psi)
        b = (y - low) / sigma
        rough = low + sigma * (b - self._infer(b, pilot=b).residual)
        low, b, known = self._parted(y, rough, sigma)
        restored = [low + sigma * self._averaged(b, known, LAYER_1)]
        if depth > 1:
            low, b, known = self._parted(y, restored[0], sigma)
            found = self._infer(b, pilot=known)
            for painted in self._above(found, b, depth):
                restored.append(low + sigma * self._averaged(b, (known + painted) / 2, ABOVE))
        means = torch.stack(restored).cumsum(0)
        return [self._pixels(total / n, images) for n, total in enumerate(means, 1)]

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        sigma: float | Tensor = 0.01,
        *,
        depth: int = 1,
        keep: bool = True,
    ) -> list[Tensor]:
        """As `denoise`, of images that are only seen where a mask is 1.

        mask: (N or 1, 1, H, W) of 0 and 1; where it is 0 the images may be anything, NaN too.
        sigma: of the noise in what is seen; 0.01 for clean photographs, the smaller the more is
        made of every detail at the edge of a hole. keep: seen pixels stay what they are.
        """
        mask = self._checked_mask(images, mask)
        seen = torch.where(mask > 0, images, torch.zeros_like(images))
        seen, sigma = self._checked(seen), self._sigma(seen, sigma)
        y, state = self._planes(seen) / sigma, None
        own = mask.expand(len(images), -1, -1, -1).to(y)
        own = own.repeat_interleave(len(y) // len(images), 0)
        A = Deconvolution(self.filters, self.net.layer(1).settings.boundary)
        psi = (PSI_BY_SIGMA * sigma).clamp(max=self.psi)
        low, painted = low_frequencies(y, psi, own), None
        for count in range(sum(ROUNDS)):
            pilot = None if count < ROUNDS[0] else painted
            found = self._infer(own * (y - low), own, pilot=pilot, reach=REACH_MISSING, state=state)
            state, painted = found.state, A(found.z)
            low = low_frequencies(y - painted, psi, own)
        layers = [painted, *self._above(found, painted, depth)]
        restored = [self._pixels(sigma * (low + layer), seen) for layer in layers]
        return [torch.where(mask > 0, seen, each) for each in restored] if keep else restored

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise ValueError(
                f"images must be floating and (N, 1 or 3, H, W), got {tuple(images.shape)} of "
                f"{images.dtype}"
            )
        if not torch.isfinite(images).all():
            raise ValueError("images must be finite: there are NaN or infinite values")
        (H, W), size = images.shape[2:], max(self.filters.shape[2:])
        if min(H, W) < size:
            raise ValueError(f"images of {H}x{W} are smaller than the {size}x{size} filters")
        return images

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
        sigma = estimate_noise(images) if sigma is None else torch.as_tensor(sigma)
        if not ((sigma > 0) & (sigma < math.inf)).all():
            raise ValueError(f"sigma={sigma.tolist()}: must be positive")
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
        low = low_frequencies(known, self.psi)
        return low, (y - low) / sigma, (known - low) / sigma

    def _averaged(self, b: Tensor, known: Tensor, look: tuple[int, float, float]) -> Tensor:
        """What z_1 makes of b (N, C, H, W) if entries stand at every s-th row and column only, the
        mean over all s^2 such lattices; thresholds of entries by what is known, and by b.

        If the s x s pixels of a cell are channels of one place, filters on a lattice are a smaller
        convolution, and shifted images see the other lattices.
        """
        stride, share, image = look
        s, (H, W) = min(stride, *self.filters.shape[2:]), b.shape[2:]
        shifts = [(i, j) for i in range(s) for j in range(s)]
        # With every shift whole cells cover the image.
        rows, columns = (-(-(size + s - 1) // s) * s for size in (H, W))

        def cells(planes: Tensor) -> Tensor:
            margins = [(j, columns - W - j, i, rows - H - i) for i, j in shifts]
            moved = [functional.pad(planes, margin, mode="replicate") for margin in margins]
            return functional.pixel_unshuffle(torch.cat(moved), s)

        h, w = self.filters.shape[2:]
        filters = functional.pad(self.filters, (0, -w % s, 0, -h % s))
        found = self._infer(
            cells(b),
            threshold=share * self.strength,
            pilot=cells(image * b + (1 - image) * known),
            filters=functional.pixel_unshuffle(filters, s),
        )
        rests = functional.pixel_shuffle(found.residual, s).split(len(b))
        each = zip(shifts, rests, strict=True)
        return b - sum(rest[:, :, i : i + H, j : j + W] for (i, j), rest in each) / s**2

    def _infer(
        self,
        b: Tensor,
        mask: Tensor | None = None,
        *,
        threshold: float | None = None,
        pilot: Tensor | None = None,
        reach: float = 1.0,
        state: Tensor | None = None,
        filters: Tensor | None = None,
    ) -> Solution:
        """z_1; threshold: of a map whose filter has the norm 1, by default the strength. filters:
        by default those of layer 1.

        pilot: an image whose correlations c = F'pilot divide the thresholds of entries by
        c / (reach threshold): what stands out is shrunk less, what does not is shrunk more (the
        adaptive lasso, Zou 2006; SPORCO's denoising divides by c^2).
        """
        threshold = self.strength if threshold is None else threshold
        settings = self.net.layer(1).settings
        filters = self.filters if filters is None else filters
        A = Deconvolution(filters, settings.boundary, mask)
        # The noise of a map has the norm of its filter.
        gain = torch.linalg.vector_norm(filters, dim=(1, 2, 3)).view(-1, 1, 1)
        weights = _of_groups(self.weights.view(-1, 1, 1) * gain, settings.group)
        if pilot is not None:
            c = Deconvolution(filters, settings.boundary).adjoint(pilot)
            fit = _of_groups(c.abs() / gain.clamp(min=1e-30), settings.group)
            weights = weights / (fit / (reach * threshold)).clamp(min=1 / WORST)
        solver = default_solver(b)
        if solver.method == "coordinate":
            solver = replace(solver, iterations=ITERATIONS, tolerance=TOLERANCE)
        else:
            solver = SolverSettings()
        return solve(
            A,
            b,
            lam=1 / threshold,
            weights=weights,
            group=settings.group,
            non_negative=settings.non_negative,
            settings=solver,
            state=state,
        )

    def _above(self, found: Solution, b: Tensor, depth: int) -> list[Tensor]:
        """What the layers from 2 to depth make of b, through the maps of layer 1.

        The maps are brought to the size at which the network knows them, image by image, so that
        its own settings hold.
        """
        if depth == 1:
            return []
        below = self.net.layer(1).codes(found)
        size = below.pooled.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-30)
        factor = self.net.layer(2).scale / size
        dense = None if below.dense is None else below.dense * factor
        below = replace(below, pooled=below.pooled * factor, dense=dense)
        codes, painted = Codes((below,), b * factor, []), []
        for number in range(2, depth + 1):
            layer, target = self.net.layer(number), self.net.target(codes, number)
            check_size(self.net.below(codes, number).shape, layer, number)
            solver = layer.settings.solver
            if solver.method == "coordinate" and target.b.device.type != "cpu":
                solver = default_solver(target.b)
            found = layer.codes(layer.infer(target, settings=solver))
            codes = Codes((*codes.layers, found), codes.y, codes.record)
            painted.append(self.net.paint(codes, number) / factor)
        return painted


def estimate_noise(images: Tensor) -> Tensor:
    """The standard deviation (N,) of the noise in images (N, C, H, W), the mean of their planes.

    From the median of the finest wavelet coefficients (Donoho and Johnstone 1994), by scikit-image.
    Fine texture counts as noise: of six clean photographs it finds 0.002 to 0.01.
    """
    from skimage.restoration import estimate_sigma

    planes = images.detach().cpu().double().numpy()
    found = [estimate_sigma(image, channel_axis=0, average_sigmas=True) for image in planes]
    return torch.tensor(np.asarray(found), dtype=images.dtype)


def _of_groups(maps: Tensor, group: int) -> Tensor:
    """(.., K, rows, columns) with the mean over the maps of each group in all of them."""
    if group == 1:
        return maps
    return maps.unflatten(-3, (-1, group)).mean(-3).repeat_interleave(group, -3)


def psnr(clean: Tensor, image: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) in dB of every image (N,), for pixels in [0, 1]."""
    return -10 * (clean.double() - image.double()).square().mean((1, 2, 3)).log10()
