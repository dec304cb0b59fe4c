"""Preprocessing of images, and its inverse.

    N images · C planes (1 for "grey", `channels` for "none", else 3) · H, W pixels
    images (N, 1 or 3, H, W) in [0, 1]     y (N, C, H, W), the preprocessed domain
    with color "none", arrays (N, C, H, W) of any number of channels, in any units
    frames (N, 4) int64: top, left, height, width of the picture in each image; pixels outside are
    ignored; None: pictures fill their images

The steps run in the order of the settings, after the colour conversion and before the division by
`scale`:

- "mean": subtract the mean of each plane of each image. (The authors' toolbox then scales to
  [-1, 1] by one number for the whole data set; here `scale` takes that role.)
- "laplacian": 3x3 high-pass filter on every plane, Zeiler et al. 2010.
- "contrast": local subtractive and divisive normalisation, Zeiler et al. 2011.
- "whiten": a linear filter, learned from training images, that makes their patches nearly white.
- "channel_mean": subtract the mean of each plane over all pixels of all training images.

The components that a step removes are stored in a record: a list with one dict of tensors per step.
The first axis of all tensors is that of the images, so records can be sliced and concatenated like
images.

With frames, each picture is preprocessed as if it were alone and then padded with zeros (Zeiler et
al. 2011: to 150x150). The record then ends with one more dict, {"frame": frames}.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from deconvnet.images import highpass
from deconvnet.operators.convolution import conv2d
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.renaming import renamed
from deconvnet.support.torch_modes import full_precision, plain

COLORS = ("rgb", "grey", "ycbcr")
# The colour of arrays, whose channels are left as they are.
NO_COLOR = "none"
STEPS = ("mean", "laplacian", "contrast", "whiten", "channel_mean")
SCALES = ("rms", "max", "norm", "none")

Record = list[dict[str, Tensor]]
Frame = tuple[int, int, int, int]  # top, left, height, width in pixels
Groups = list[tuple[Tensor, Frame]]  # the indices of the images with a frame, and that frame

# A smaller local deviation counts as 0: it is a quarter of one of 256 grey levels, and in float32
# E[x^2] - E[x]^2 may be a few 1e-4 where it should be 0. Of arrays, which may have any units, it is
# this share of the largest deviation.
FLAT = 1e-3
# Patches of pixels with a smaller variance are constant, and so are images with a smaller scale.
CONSTANT_VARIANCE, CONSTANT_SCALE = 1e-10, 1e-6


@renamed(window="contrast_size", sigma="contrast_sigma", divide="contrast_divide")
@dataclass
class PreprocessingSettings:
    """The preprocessing of images before inference."""

    # the planes of y: rgb | grey | ycbcr | none (the channels of arrays, in any units)
    color: str = "rgb"
    steps: list[str] = field(  # any of mean, laplacian, contrast, whiten, channel_mean, in order
        default_factory=lambda: ["contrast"]
    )
    contrast_size: int = 13  # contrast: side of the Gaussian neighbourhood in pixels, odd
    # contrast: standard deviation of the Gaussian in pixels (Zeiler et al. 2011: 4.773)
    contrast_sigma: float = 4.773
    # contrast: divide by the local standard deviation; false: only subtract the local mean
    contrast_divide: bool = True
    whitening_size: int = 7  # whiten: side of the filter in pixels, odd
    whitening_floor: float = 0.01  # whiten: added to all variances, relative to the largest
    # which statistic of all images is scaled to 1: rms | max (magnitude) | norm (mean over the
    # pixels, of the norm of their channels) | none
    scale: str = "rms"
    channels: int | None = None  # of color=none: how many; null: as many as the arrays have

    def __post_init__(self) -> None:
        if self.color not in (*COLORS, NO_COLOR):
            choices = ", ".join((*COLORS, NO_COLOR))
            raise ValueError(f"preprocessing.color={self.color!r}: choose {choices}")
        if self.channels is not None and (self.color != NO_COLOR or self.channels < 1):
            right = "at least 1" if self.color == NO_COLOR else f"null with color={self.color}"
            raise ValueError(f"preprocessing.channels={self.channels}: must be {right}")
        if self.scale not in SCALES:
            raise ValueError(f"preprocessing.scale={self.scale!r}: choose {', '.join(SCALES)}")
        steps = list(self.steps)
        if set(steps) - set(STEPS) or len(set(steps)) < len(steps):
            raise ValueError(
                f"preprocessing.steps={steps}: choose from {', '.join(STEPS)}, each at most once"
            )
        for key in ("contrast_size", "whitening_size"):
            value = getattr(self, key)
            if value < 3 or value % 2 == 0:
                raise ValueError(f"preprocessing.{key}={value}: must be odd and at least 3")
        for key in ("contrast_sigma", "whitening_floor"):
            value = getattr(self, key)
            if not 0 < value < math.inf:
                raise ValueError(f"preprocessing.{key}={value}: must be a positive number")

    @property
    def has_whitening(self) -> bool:
        """Whether there is a whitening filter: not for arrays, of any number of channels, unless
        they are whitened."""
        return self.color != NO_COLOR or "whiten" in self.steps


class Preprocessing(torch.nn.Module):
    """Maps images to the preprocessed domain and back; the state_dict contains the result of `fit`.

    scale: () float32, by which all values are divided, so that lam does not depend on the units.
    whitening: (C, C, size, size) float32, the filter of "whiten". Before `fit` they are 1 and an
    impulse. With color "none", whose channels may be hundreds, only that step has this filter.
    channel_mean: (C,) float32, of that step only, what it subtracts; before `fit`, 0.
    energy: (C,) float32, of color "none" only: the share of each channel in the sum of squares of
    all.
    """

    def __init__(self, settings: PreprocessingSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or PreprocessingSettings()
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        if self.settings.has_whitening:
            self.register_buffer("whitening", _impulse(self.channels, self.settings.whitening_size))
        if "channel_mean" in self.settings.steps:
            self.register_buffer("channel_mean", torch.zeros(self.channels, dtype=torch.float32))
        if self.are_arrays:
            shares = torch.full((self.channels,), 1 / self.channels, dtype=torch.float32)
            self.register_buffer("energy", shares)

    @property
    def are_arrays(self) -> bool:
        """Whether images are arrays of any number of channels, not pixels in [0, 1]."""
        return self.settings.color == NO_COLOR

    @property
    def channels(self) -> int:
        """The number of planes of y: 1 for grey, 3 for colour, that of the settings for arrays."""
        if not self.are_arrays:
            return 1 if self.settings.color == "grey" else 3
        if self.settings.channels is None:
            raise ValueError("preprocessing.channels=None: color=none needs the number of channels")
        return self.settings.channels

    @property
    def shown_channels(self) -> list[int]:
        """The planes that pictures show, one (grey) or three (red, green and blue).

        Of arrays these are the three channels with the most energy, in their order; of two
        channels, the second is both green and blue.
        """
        if self.channels <= 3:
            return {1: [0], 2: [0, 1, 1], 3: [0, 1, 2]}[self.channels]
        return sorted(self.energy.argsort(descending=True, stable=True)[:3].tolist())

    def fit(self, images: Tensor, frames: Tensor | None = None) -> "Preprocessing":
        """Learn whitening filter, channel means and scale from images (N, 1 or 3, H, W).

        Returns self. The scale is a statistic of all preprocessed values inside the frames (N, 4),
        such as their root mean square. Images are processed one at a time and summed in float64 on
        the CPU, so memory does not grow with N.
        """
        if len(images) == 0:
            raise ValueError("preprocessing cannot be fitted to 0 images")
        return self.fit_parts(lambda: [(images, frames, None)])

    @plain
    def fit_parts(
        self,
        parts: Callable[[], Iterable[tuple[Tensor, Tensor | None, Tensor | None]]],
        communicator: Communicator = SINGLE,
    ) -> "Preprocessing":
        """`fit` to images in parts; every call of parts() yields all (images, frames, mask) again.

        mask: as in `forward`; only seen pixels determine the scale. communicator: fit to the images
        of all ranks, some of which may have none.
        """

        def pictures(steps: Sequence[str]) -> Iterator[tuple[Tensor, Tensor | None]]:
            for images, frames, mask in parts():
                _check(images, frames, self.settings)
                masks = [None] * len(images) if mask is None else _pictures(mask, frames)
                for picture, seen in zip(_pictures(images, frames), masks, strict=True):
                    yield self._preprocess(picture, steps, seen)[0], seen

        steps = list(self.settings.steps)
        for number, step in enumerate(steps):
            if step == "whiten":
                size, floor = self.settings.whitening_size, self.settings.whitening_floor
                self.whitening.copy_(
                    whitening_filter(
                        (planes for planes, _ in pictures(steps[:number])),
                        size,
                        floor=floor,
                        least=0.0 if self.are_arrays else CONSTANT_VARIANCE,
                        communicator=communicator,
                    )
                )
            elif step == "channel_mean":
                mean = _channel_mean(pictures(steps[:number]), self.channels, communicator)
                self.channel_mean.copy_(mean)
        spread, energy = Spread(), torch.zeros(self.channels, dtype=torch.float64)
        for values, seen in pictures(steps):
            values = values if seen is None else values[..., seen[0, 0] > 0][..., None]
            spread.add(values)
            if self.are_arrays:
                energy += values.double().square().sum((0, 2, 3)).cpu()
        least = 0.0 if self.are_arrays else CONSTANT_SCALE
        self.scale.fill_(spread.shared(communicator).scale(self.settings.scale, least=least))
        if self.are_arrays:
            energy = sum(communicator.all_gather(energy))
            self.energy.copy_(energy / energy.sum().clamp(min=1e-300))
        return self

    @full_precision
    def forward(
        self, images: Tensor, frames: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Record]:
        """y (N, C, H, W) and its record, from images (N, 1 or 3, H, W) in [0, 1].

        Grey images are repeated for a colour network, colour images converted to grey for a grey
        one; arrays (N, C, H, W) may have any finite values. With frames (N, 4), y and the planes of
        the record are 0 outside them. mask: (N, 1, H, W), not 0 where a pixel is seen; the images
        have stand-ins for the others (`fill_holes`), which "mean" and "contrast" disregard.
        """
        _check(images, frames, self.settings)
        if frames is None:
            planes, record = self._preprocess(images, self.settings.steps, mask)
        else:
            planes, record = self._preprocess_in_frames(images, frames.to(images.device), mask)
        return planes / self.scale, record

    @full_precision
    def inverse(self, y: Tensor, record: Record) -> Tensor:
        """Pixels (N, 1 or 3, H, W), grey or RGB, from y (N, C, H, W) and the record of its images.

        The inverse of `forward` up to rounding. Nothing is clamped: for a reconstruction, pixels
        can lie outside [0, 1]. Outside the frames all pixels are black, whatever y is there.
        """
        self._check_record(y, record)
        planes = y * self.scale
        if not _has_frames(record):
            return self._inverse_steps(planes, record)
        *record, last = record
        groups = _groups(last["frame"])
        pixels = []
        for index, frame in groups:
            inside = [
                {key: _cut(removed[key][index], frame) for key in removed} for removed in record
            ]
            pixels.append(self._inverse_steps(_cut(planes[index], frame), inside))
        return _join(pixels, groups, y.shape)

    def pixels(self, y: Tensor, record: Record) -> Tensor:
        """`inverse`, limited to [0, 1] unless images are arrays in any units."""
        images = self.inverse(y, record)
        return images if self.are_arrays else images.clamp(0, 1)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError if images of H x W pixels are too small for one of the steps."""
        _check_size("images", size, self.settings)

    def _inverse_steps(self, planes: Tensor, record: Record) -> Tensor:
        """Pixels from planes that fill their images, already multiplied by the scale."""
        for step, removed in zip(reversed(self.settings.steps), reversed(record), strict=True):
            if step == "mean":
                planes = planes + removed["mean"]
            elif step == "channel_mean":
                planes = planes + self.channel_mean.to(planes)[:, None, None]
            elif step == "contrast":
                planes = planes * removed["deviation"] + removed["mean"]
            else:
                planes = highpass.invert(planes, removed["low"], self._filter(step))
        return ycbcr_to_rgb(planes) if self.settings.color == "ycbcr" else planes

    def _preprocess(
        self, images: Tensor, steps: list[str], mask: Tensor | None = None
    ) -> tuple[Tensor, Record]:
        planes, record = to_color(images, self.settings.color), []
        for step in steps:
            if step == "mean":
                mean = _mean(planes, mask)
                planes, removed = planes - mean, {"mean": mean}
            elif step == "channel_mean":
                planes, removed = planes - self.channel_mean.to(planes)[:, None, None], {}
            elif step == "contrast":
                mean, deviation = local_moments(
                    planes,
                    self.settings.contrast_size,
                    self.settings.contrast_sigma,
                    relative=self.are_arrays,
                    mask=mask,
                )
                deviation = (
                    _floored(deviation, mask)
                    if self.settings.contrast_divide
                    else torch.ones_like(deviation)
                )
                planes = (planes - mean) / deviation
                removed = {"mean": mean, "deviation": deviation}
            else:
                removed = {"low": highpass.blur(planes)}
                planes = highpass.correlate(planes, self._filter(step))
            record.append(removed)
        return planes, record

    def _preprocess_in_frames(
        self, images: Tensor, frames: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Record]:
        """Preprocess each picture as if it were alone; those with equal frames form a batch."""
        groups = _groups(frames)
        parts = [
            self._preprocess(
                _cut(images[index], frame),
                self.settings.steps,
                None if mask is None else _cut(mask[index], frame),
            )
            for index, frame in groups
        ]
        planes = _join([planes for planes, _ in parts], groups, images.shape)
        record = [
            {key: _join([part[key] for part in step], groups, images.shape) for key in step[0]}
            for step in zip(*(record for _, record in parts), strict=True)
        ]
        return planes, [*record, {"frame": frames}]

    def _filter(self, step: str) -> Tensor:
        return self.whitening if step == "whiten" else _laplacian(self.channels).to(self.scale)

    def _check_record(self, y: Tensor, record: Record) -> None:
        if y.ndim != 4 or y.shape[1] != self.channels:
            raise ValueError(
                f"y must have the shape (N, {self.channels}, H, W), got {tuple(y.shape)}"
            )
        steps = record[:-1] if _has_frames(record) else record
        if len(steps) != len(self.settings.steps):
            raise ValueError(f"record of {len(steps)} steps, expected {list(self.settings.steps)}")
        if _has_frames(record):
            _check_frames(record[-1]["frame"], y)
        for shape in (tensor.shape for step in steps for tensor in step.values()):
            if shape[0] != y.shape[0] or shape[2:] not in ((1, 1), y.shape[2:]):
                raise ValueError(
                    f"record with a tensor of shape {tuple(shape)} does not belong to y of shape "
                    f"{tuple(y.shape)}"
                )


@dataclass
class Spread:
    """Statistics of values (N, C, H, W) for a scale: their count, sum of squares and largest
    magnitude; of the pixels, the count and the sum of the norms of their channels.
    """

    count: int = 0
    squares: float = 0.0
    largest: float = 0.0
    pixels: int = 0
    norms: float = 0.0

    def add(self, values: Tensor) -> None:
        """Include values (N, C, H, W); none of an image that is not seen at all."""
        if values.numel() == 0:
            return
        # Image by image, so that the result does not depend on the batches.
        squares = sum(float(image.double().square().sum()) for image in values)
        self.count += values.numel()
        self.squares += squares
        self.largest = max(self.largest, float(values.abs().max()))
        self.pixels += values[:, 0].numel()
        norms = (image.double().square().sum(0).sqrt() for image in values)
        self.norms += sum(float(image.sum()) for image in norms)

    def shared(self, communicator: Communicator) -> "Spread":
        """The statistics of the values of all ranks."""
        parts = communicator.all_gather(astuple(self))
        counts, squares, largest, pixels, norms = zip(*parts, strict=True)
        return Spread(sum(counts), sum(squares), max(largest), sum(pixels), sum(norms))

    def scale(self, kind: str, *, least: float = 1e-6) -> float:
        """The root mean square ("rms") or largest magnitude ("max") of the values, or the mean norm
        of the pixels ("norm"); 1 for "none".

        It is also 1 if it would be at most `least`: dividing by 1e-8 would make the values of real
        pictures, whose pixels are in [0, 1], huge.
        """
        if kind == "none":
            return 1.0
        scale = {
            "rms": math.sqrt(self.squares / max(self.count, 1)),
            "max": self.largest,
            "norm": self.norms / max(self.pixels, 1),
        }[kind]
        return scale if scale > least else 1.0


def to_color(images: Tensor, color: str) -> Tensor:
    """Grey or RGB images (N, 1 or 3, H, W) as planes (N, 1 or 3, H, W) of another colour space.

    With color "none", images of any number of channels are returned as they are.
    """
    if color == NO_COLOR:
        return images
    if color == "grey":
        return images if images.shape[1] == 1 else _luma(images)
    rgb = images.expand(-1, 3, -1, -1)
    return rgb_to_ycbcr(rgb) if color == "ycbcr" else rgb


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """Y, Cb and Cr of (N, 3, H, W), all in [0, 1], grey at Cb = Cr = 1/2 (Rec. 601, full range)."""
    luma = _luma(rgb)
    return torch.cat(
        [luma, (rgb[:, 2:] - luma) / 1.772 + 0.5, (rgb[:, :1] - luma) / 1.402 + 0.5], 1
    )


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """RGB of YCbCr (N, 3, H, W), the inverse of `rgb_to_ycbcr` up to rounding; not clamped."""
    luma, blue, red = ycbcr.split(1, 1)
    red = luma + 1.402 * (red - 0.5)
    blue = luma + 1.772 * (blue - 0.5)
    return torch.cat([red, (luma - 0.299 * red - 0.114 * blue) / 0.587, blue], 1)


def local_moments(
    images: Tensor,
    size: int,
    sigma: float,
    *,
    relative: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gaussian-weighted local mean (N, C, H, W) and deviation (N, 1, H, W) of images (N, C, H, W).

    The Gaussian is cut off at size x size pixels; the border is reflected and the edge not
    repeated. The variance is averaged over the planes, since one deviation for all of them keeps
    the hue. It is E[x^2] - E[x]^2 as in the authors' code, but of values from which the mean of
    their plane is subtracted first (the same result with less cancellation). Deviations below FLAT
    become 0; with `relative`, below this share of the largest deviation of the image. mask: (N, 1,
    H, W), not 0 where a pixel is seen; the moments are those of the seen pixels of a neighbourhood
    (normalised convolution), or 0 if there are none.
    """
    offset = _mean(images, mask)
    centred = images - offset
    if mask is None:
        mean = _gaussian(centred, size, sigma)
        variance = _gaussian(centred.square(), size, sigma) - mean.square()
    else:
        seen = (mask > 0).to(images)
        share = _gaussian(seen, size, sigma)
        share = share.where(share > 0, torch.ones_like(share))
        mean = _gaussian(seen * centred, size, sigma) / share
        variance = _gaussian(seen * centred.square(), size, sigma) / share - mean.square()
    deviation = variance.mean(1, keepdim=True).clamp(min=0).sqrt()
    flat = FLAT * deviation.amax((1, 2, 3), keepdim=True) if relative else FLAT
    return mean + offset, torch.where(deviation < flat, 0.0, deviation)


def whitening_filter(
    images: Iterable[Tensor],
    size: int,
    *,
    floor: float,
    least: float = CONSTANT_VARIANCE,
    communicator: Communicator = SINGLE,
) -> Tensor:
    """The filter (C, C, size, size) that whitens the patches of images, tensors (N, C, H, W).

    W = V (E + floor max(E))^(-1/2) V' with V E V' the covariance of all size x size x C patches;
    the filter is the row of W for the middle pixel of each plane (zero-phase, "ZCA"). Mirrored
    patches are included, which makes the filter symmetric in both axes: it commutes with mirroring
    the image at its border and can be inverted exactly. An impulse if no direction has a variance
    above `least`.
    """
    count, total, products = 0, 0.0, 0.0
    for image in images:
        patches = functional.unfold(image.cpu().double(), size).transpose(1, 2).flatten(0, 1)
        count += len(patches)
        total, products = total + patches.sum(0), products + patches.T @ patches
    sums = [rank for rank in communicator.all_gather((count, total, products)) if rank[0]]
    count, total, products = (sum(values) for values in zip(*sums, strict=True))
    channels = len(total) // size**2
    covariance = products / count - torch.outer(total, total) / count**2
    covariance = covariance.view(channels, size, size, channels, size, size)
    for axes in ((1, 4), (2, 5)):
        covariance = (covariance + covariance.flip(axes)) / 2
    variances, directions = torch.linalg.eigh(covariance.reshape(channels * size**2, -1))
    if not variances[-1] > least:
        return _impulse(channels, size)
    gains = (variances.clamp(min=0) + floor * variances[-1]).rsqrt()
    rows = ((directions * gains) @ directions.T).view(covariance.shape)
    return rows[:, size // 2, size // 2].float()


def _channel_mean(
    pictures: Iterable[tuple[Tensor, Tensor | None]], channels: int, communicator: Communicator
) -> Tensor:
    """(C,) float64: the mean of each plane over the seen pixels of all pictures of all ranks."""
    count, total = 0, torch.zeros(channels, dtype=torch.float64)
    for planes, seen in pictures:
        values = planes[0].flatten(1) if seen is None else planes[0][:, seen[0, 0] > 0]
        count, total = count + values.shape[1], total + values.double().sum(1).cpu()
    counts, totals = zip(*communicator.all_gather((count, total)), strict=True)
    return sum(totals) / max(sum(counts), 1)


def _mean(planes: Tensor, mask: Tensor | None) -> Tensor:
    """(N, C, 1, 1): the mean of each plane, over the pixels where the mask (N, 1, H, W) is not 0;
    of a plane without such pixels, 0.
    """
    if mask is None:
        return planes.mean((2, 3), keepdim=True)
    seen = (mask > 0).to(planes)
    return (seen * planes).mean((2, 3), keepdim=True) / seen.mean((2, 3), keepdim=True).clamp(
        min=1 / seen[0].numel()
    )


def _floored(deviation: Tensor, mask: Tensor | None = None) -> Tensor:
    """The deviation (N, 1, H, W), raised to at least its median over the image.

    If the median is 0, the median of the non-zero values is used; an image without contrast gets 1.
    mask: the median is over the pixels where it is not 0.
    """
    floors = []
    for n, values in enumerate(deviation.flatten(1)):
        if mask is not None and mask[n].any():
            values = values[mask[n].flatten() > 0]
        floor = _median(values)
        if floor == 0 and values.any():
            floor = _median(values[values > 0])
        floors.append(floor if floor > 0 else torch.ones_like(floor))
    return torch.maximum(deviation, torch.stack(floors)[:, None, None, None])


def _median(values: Tensor) -> Tensor:
    # By sorting: torch.median returns the lower of two, and quantile rejects over 2^24 values.
    return values.sort().values[[(len(values) - 1) // 2, len(values) // 2]].mean()


def _gaussian(planes: Tensor, size: int, sigma: float) -> Tensor:
    """Planes averaged under a Gaussian of size x size pixels, cut off there.

    The border is reflected and the edge not repeated.
    """
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.softmax(-offsets.square() / (2 * sigma**2), 0).to(planes)
    padded = functional.pad(planes, (size // 2,) * 4, mode="reflect").flatten(0, 1)[:, None]
    rows = conv2d(padded, weights.view(1, 1, -1, 1))
    return conv2d(rows, weights.view(1, 1, 1, -1)).view(planes.shape)


def _laplacian(channels: int) -> Tensor:
    """Matlab's fspecial('laplacian', 0.2) on each plane separately, (channels, channels, 3, 3)."""
    alpha = 0.2
    corner, edge = alpha / 4, (1 - alpha) / 4
    rows = [[corner, edge, corner], [edge, -1.0, edge], [corner, edge, corner]]
    f = torch.tensor(rows, dtype=torch.float32)
    return torch.eye(channels, dtype=torch.float32)[:, :, None, None] * f * 4 / (alpha + 1)


def _impulse(channels: int, size: int) -> Tensor:
    f = torch.zeros(channels, channels, size, size, dtype=torch.float32)
    f[..., size // 2, size // 2] = torch.eye(channels)
    return f


def _luma(rgb: Tensor) -> Tensor:
    """Grey (N, 1, H, W) of RGB (N, 3, H, W) with the weights of Rec. 601."""
    return 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]


def _pictures(images: Tensor, frames: Tensor | None) -> list[Tensor]:
    """Each picture separately, (1, C, height, width)."""
    if frames is None:
        return list(images.split(1))
    return [
        _cut(image, frame) for image, frame in zip(images.split(1), frames.tolist(), strict=True)
    ]


def _groups(frames: Tensor) -> Groups:
    return [
        ((frames == frame).all(1).nonzero()[:, 0], tuple(frame.tolist()))
        for frame in frames.unique(dim=0)
    ]


def _cut(planes: Tensor, frame: Frame) -> Tensor:
    """A view of planes (N, C, H, W) inside a frame; planes of one number are returned unchanged."""
    if planes.shape[2:] == (1, 1):
        return planes
    top, left, height, width = frame
    return planes[:, :, top : top + height, left : left + width]


def _join(parts: list[Tensor], groups: Groups, shape: torch.Size) -> Tensor:
    """The inverse of `_cut`: planes (N, C, H, W), 0 outside the frames; N, H, W from `shape`."""
    size = (1, 1) if parts[0].shape[2:] == (1, 1) else shape[2:]
    joined = parts[0].new_zeros(shape[0], parts[0].shape[1], *size)
    for part, (index, frame) in zip(parts, groups, strict=True):
        _cut(joined, frame)[index] = part
    return joined


def _has_frames(record: Record) -> bool:
    return bool(record) and "frame" in record[-1]


def _check(images: Tensor, frames: Tensor | None, settings: PreprocessingSettings) -> None:
    are_arrays = settings.color == NO_COLOR
    planes = (settings.channels,) if are_arrays else (1, 3)
    if images.ndim != 4 or images.shape[1] not in planes:
        hint = ""
        if images.ndim == 4 and not are_arrays:
            hint = ": arrays of other channels need preprocessing.color=none"
        raise ValueError(
            f"images must have the shape (N, {' or '.join(map(str, planes))}, H, W), got "
            f"{tuple(images.shape)}{hint}"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}: must be floats in [0, 1]; divide 0..255 by 255"
        )
    if frames is None:
        _check_size("images", images.shape[2:], settings)
    else:
        _check_frames(frames, images)
        for index, (_, _, *size) in enumerate(frames.tolist()):
            _check_size(f"image {index}", size, settings)
    if are_arrays:
        if not torch.isfinite(images).all():
            raise ValueError("images must be finite: there are NaN or infinite values")
        return
    low, high = images.flatten(1).aminmax(dim=1)
    # Resampling in float32 can exceed the range by rounding. NaN is not inside either.
    outside = ~((low >= -1e-3) & (high <= 1 + 1e-3))
    if outside.any():
        index = int(outside.nonzero()[0])
        if not (low[index].isfinite() and high[index].isfinite()):
            raise ValueError(f"image {index} has pixels that are NaN or infinite")
        raise ValueError(
            f"image {index} has values from {low[index]:.4g} to {high[index]:.4g}: must be in "
            "[0, 1]; divide images of 0..255 by 255"
        )


def _check_size(what: str, size: Sequence[int], settings: PreprocessingSettings) -> None:
    """Each step needs a margin, since a mirrored border cannot be wider than the picture."""
    margins = {
        "laplacian": 3,
        "contrast": settings.contrast_size // 2 + 1,
        "whiten": settings.whitening_size,
    }
    for step, margin in ((step, margins.get(step, 1)) for step in settings.steps):
        if min(size) < margin:
            raise ValueError(
                f"{what} of {size[0]}x{size[1]} pixels: too small for the step {step!r}, "
                f"which needs at least {margin}x{margin}"
            )


def _check_frames(frames: Tensor, images: Tensor) -> None:
    number, (height, width) = len(images), images.shape[2:]
    if frames.shape != (number, 4) or frames.dtype != torch.int64:
        raise ValueError(
            f"frames must be whole numbers (int64) of shape ({number}, 4): top, left, height, "
            f"width; got {frames.dtype} of shape {tuple(frames.shape)}"
        )
    for index, (top, left, h, w) in enumerate(frames.tolist()):
        inside = 0 <= top <= height - h and 0 <= left <= width - w
        # A record distinguishes planes from single numbers by their size.
        if not inside or min(h, w) < 2:
            raise ValueError(
                f"frame {index} is {[top, left, h, w]}: top, left, height, width must be those of "
                f"2x2 pixels or more inside {height}x{width}"
            )
