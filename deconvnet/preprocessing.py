"""What is done to images before they are explained, and how it is undone.

    N images · C planes (1 for "grey", else 3) · H, W pixels
    images (N, 1 or 3, H, W) in [0, 1]     y (N, C, H, W), the normalised domain

The steps run in the order of the settings, after the change of colour, before division by `scale`:

- "mean": every plane of every image loses its mean. (The authors' toolbox then scales to [-1, 1] by
  one number for the whole data set; `scale` has that place here.)
- "laplacian": 3x3 high-pass filter on every plane, Zeiler et al. 2010.
- "contrast": local subtractive and divisive normalisation, Zeiler et al. 2011.
- "whiten": a linear filter, learned from training images, that makes their patches nearly white.

What a step takes away and y does not hold goes into a record: a list with one dict of tensors for
every step. Images are the first axis of all of them, so a record is sliced and joined like images.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

COLORS = ("rgb", "grey", "ycbcr")
STEPS = ("mean", "laplacian", "contrast", "whiten")
SCALES = ("rms", "max")

Record = list[dict[str, Tensor]]

# A local deviation below this counts as 0: it is a quarter of a grey level of 256, and
# E[x^2] - E[x]^2 in float32 leaves a few 1e-4 where it should leave 0.
FLAT = 1e-3

# Undoing a filter: the record keeps the picture blurred by LOW_SIGMA pixels, whose agreement weighs
# LOW_WEIGHT times the mean squared gain of the filter. Measured on the default photographs: the
# round trip errs by 1e-6; with white noise of 0.1 in y the pixels come back with 41 dB ("laplacian"
# and "whiten"; "contrast" has the same), while the blurred picture alone has 20 dB. With the weight
# 1e-4 "laplacian" falls to 33 dB; with 10 it has 43 dB, but then the blur decides frequencies that
# y is there to explain.
LOW_SIGMA = 4.0
LOW_WEIGHT = 0.1


@dataclass
class PreprocessingSettings:
    color: str = "rgb"  # planes to explain: rgb | grey | ycbcr
    steps: list[str] = field(  # any of mean, laplacian, contrast, whiten, in order
        default_factory=lambda: ["contrast"]
    )
    window: int = 13  # contrast: side of the Gaussian window in pixels, odd
    sigma: float = 4.773  # contrast: its standard deviation in pixels, 3 * 1.591 as in Zeiler 2011
    divide: bool = True  # contrast: divide by the local deviation; false: only subtract the mean
    whitening_size: int = 7  # whiten: side of the filter in pixels, odd
    whitening_floor: float = 0.01  # whiten: added to all variances, relative to the largest
    scale: str = "rms"  # what becomes 1 over the training images: rms | max, the largest magnitude

    def __post_init__(self) -> None:
        if self.color not in COLORS:
            raise ValueError(f"preprocessing.color={self.color!r}: choose {', '.join(COLORS)}")
        if self.scale not in SCALES:
            raise ValueError(f"preprocessing.scale={self.scale!r}: choose {', '.join(SCALES)}")
        steps = list(self.steps)
        if set(steps) - set(STEPS) or len(set(steps)) < len(steps):
            raise ValueError(
                f"preprocessing.steps={steps}: choose from {', '.join(STEPS)}, each at most once"
            )
        for key in ("window", "whitening_size"):
            value = getattr(self, key)
            if value < 3 or value % 2 == 0:
                raise ValueError(f"preprocessing.{key}={value}: must be odd and at least 3")
        for key in ("sigma", "whitening_floor"):
            value = getattr(self, key)
            if not 0 < value < math.inf:
                raise ValueError(f"preprocessing.{key}={value}: must be a positive number")


class Preprocessing(torch.nn.Module):
    """Images to the normalised domain and back; what `fit` learned is in the state_dict.

    scale: () float32, the number by which all values are divided, so that lam means the same on any
    data. whitening: (C, C, size, size) float32, the filter of "whiten". Until `fit`: 1, an impulse.
    """

    def __init__(self, settings: PreprocessingSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or PreprocessingSettings()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("whitening", _impulse(self.channels, self.settings.whitening_size))

    @property
    def channels(self) -> int:
        """The number of planes of y: 1 for grey, 3 for colour."""
        return 1 if self.settings.color == "grey" else 3

    @torch.no_grad()
    def fit(self, images: Tensor) -> "Preprocessing":
        """Learns the whitening filter, then the scale, from images (N, 1 or 3, H, W); returns self.

        scale is the root mean square of all preprocessed values, or their largest magnitude.
        One image at a time, summed in float64 on the CPU: memory does not grow with N.
        """
        _check(images, self.settings)
        if len(images) == 0:
            raise ValueError("preprocessing cannot be fitted to 0 images")
        steps = list(self.settings.steps)
        if "whiten" in steps:
            before = steps[: steps.index("whiten")]
            planes = (self._preprocess(image, before)[0] for image in images.split(1))
            size, floor = self.settings.whitening_size, self.settings.whitening_floor
            self.whitening.copy_(whitening_filter(planes, size, floor=floor))
        planes = (self._preprocess(image, steps)[0] for image in images.split(1))
        self.scale.fill_(common_scale(planes, self.settings.scale))
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Record]:
        """y (N, C, H, W) and its record, from images (N, 1 or 3, H, W) in [0, 1].

        Grey images are repeated for a colour network, colour images turned grey for a grey one.
        """
        _check(images, self.settings)
        planes, record = self._preprocess(images, self.settings.steps)
        return planes / self.scale, record

    def inverse(self, y: Tensor, record: Record) -> Tensor:
        """Pixels (N, 1 or 3, H, W), grey or RGB, from y (N, C, H, W) and the record of its images.

        Undoes `forward` up to rounding. Nothing is clamped: a y that is not the image's own, like
        that of a reconstruction, can lead outside [0, 1].
        """
        self._check_record(y, record)
        planes = y * self.scale
        for step, kept in zip(reversed(self.settings.steps), reversed(record), strict=True):
            if step == "mean":
                planes = planes + kept["mean"]
            elif step == "contrast":
                planes = planes * kept["deviation"] + kept["mean"]
            else:
                planes = _undo_filter(planes, kept["low"], self._filter(step))
        return ycbcr_to_rgb(planes) if self.settings.color == "ycbcr" else planes

    def _preprocess(self, images: Tensor, steps: list[str]) -> tuple[Tensor, Record]:
        planes, record = to_color(images, self.settings.color), []
        for step in steps:
            if step == "mean":
                mean = planes.mean((2, 3), keepdim=True)
                planes, kept = planes - mean, {"mean": mean}
            elif step == "contrast":
                mean, deviation = local_moments(planes, self.settings.window, self.settings.sigma)
                deviation = (
                    _floored(deviation) if self.settings.divide else torch.ones_like(deviation)
                )
                planes = (planes - mean) / deviation
                kept = {"mean": mean, "deviation": deviation}
            else:
                kept = {"low": _blur(planes)}
                planes = _correlate_mirrored(planes, self._filter(step))
            record.append(kept)
        return planes, record

    def _filter(self, step: str) -> Tensor:
        return self.whitening if step == "whiten" else _laplacian(self.channels).to(self.whitening)

    def _check_record(self, y: Tensor, record: Record) -> None:
        if y.ndim != 4 or y.shape[1] != self.channels:
            raise ValueError(
                f"y must have the shape (N, {self.channels}, H, W), got {tuple(y.shape)}"
            )
        if len(record) != len(self.settings.steps):
            raise ValueError(f"record of {len(record)} steps, expected {list(self.settings.steps)}")
        for shape in (tensor.shape for kept in record for tensor in kept.values()):
            if shape[0] != y.shape[0] or shape[2:] not in ((1, 1), y.shape[2:]):
                raise ValueError(
                    f"record with a tensor of shape {tuple(shape)} does not belong to y of shape "
                    f"{tuple(y.shape)}"
                )


def common_scale(parts: Iterable[Tensor], kind: str) -> float:
    """The root mean square ("rms") or the largest magnitude ("max") of all values of some tensors.

    1 where there is next to nothing: a scale of 1e-8 would blow up the first real image.
    """
    count, squares, largest = 0, 0.0, 0.0
    for part in parts:
        count += part.numel()
        squares += float(part.double().square().sum())
        largest = max(largest, float(part.abs().max()))
    scale = largest if kind == "max" else math.sqrt(squares / max(count, 1))
    return scale if scale > 1e-6 else 1.0


def to_color(images: Tensor, color: str) -> Tensor:
    """The planes to explain, (N, 1 or 3, H, W), of grey or RGB images (N, 1 or 3, H, W)."""
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
    """RGB of (N, 3, H, W), the inverse of `rgb_to_ycbcr` up to rounding; not clamped."""
    luma, blue, red = ycbcr.split(1, 1)
    red = luma + 1.402 * (red - 0.5)
    blue = luma + 1.772 * (blue - 0.5)
    return torch.cat([red, (luma - 0.299 * red - 0.114 * blue) / 0.587, blue], 1)


def local_moments(images: Tensor, window: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Gaussian-weighted local mean (N, C, H, W) and deviation (N, 1, H, W) of images (N, C, H, W).

    The window is window x window; the border is reflected and the edge not repeated. The variance
    is averaged over the planes: one deviation for all keeps the hue. It is E[x^2] - E[x]^2 as in
    the authors' code, but of values that first lose their plane's mean (equal, and less
    cancellation); a deviation below FLAT is 0.
    """
    offset = images.mean((2, 3), keepdim=True)
    centred = images - offset
    mean = _gaussian(centred, window, sigma)
    variance = _gaussian(centred.square(), window, sigma) - mean.square()
    deviation = variance.mean(1, keepdim=True).clamp(min=0).sqrt()
    return mean + offset, torch.where(deviation < FLAT, 0.0, deviation)


def whitening_filter(images: Iterable[Tensor], size: int, *, floor: float) -> Tensor:
    """The filter (C, C, size, size) that whitens the patches of images, tensors of (N, C, H, W).

    W = V (E + floor max(E))^(-1/2) V' with V E V' the covariance of all size x size x C patches;
    the filter is the row of W for the middle pixel of each plane (zero-phase, "ZCA"). Patches count
    together with their mirror images: that makes the filter symmetric in both axes, so it commutes
    with mirroring the image at its border and can be undone exactly. No variance: an impulse.
    """
    count, total, products = 0, 0.0, 0.0
    for image in images:
        channels = image.shape[1]
        patches = functional.unfold(image.cpu().double(), size).transpose(1, 2).flatten(0, 1)
        count += len(patches)
        total, products = total + patches.sum(0), products + patches.T @ patches
    covariance = products / count - torch.outer(total, total) / count**2
    covariance = covariance.view(channels, size, size, channels, size, size)
    for axes in ((1, 4), (2, 5)):
        covariance = (covariance + covariance.flip(axes)) / 2
    variances, directions = torch.linalg.eigh(covariance.reshape(channels * size**2, -1))
    if variances[-1] < 1e-10:
        return _impulse(channels, size)
    gains = (variances.clamp(min=0) + floor * variances[-1]).rsqrt()
    rows = ((directions * gains) @ directions.T).view(covariance.shape)
    return rows[:, size // 2, size // 2].float()


def _floored(deviation: Tensor) -> Tensor:
    """The deviation (N, 1, H, W), nowhere below its median over the image.

    Where the median is 0, the median of what is not 0 counts; an image without contrast gets 1.
    """
    floors = []
    for values in deviation.flatten(1):
        floor = _median(values)
        if floor == 0 and values.any():
            floor = _median(values[values > 0])
        floors.append(floor if floor > 0 else torch.ones_like(floor))
    return torch.maximum(deviation, torch.stack(floors)[:, None, None, None])


def _median(values: Tensor) -> Tensor:
    # By sorting: torch.median takes the lower of two, and quantile refuses more than 2^24 values.
    return values.sort().values[[(len(values) - 1) // 2, len(values) // 2]].mean()


def _correlate_mirrored(planes: Tensor, f: Tensor) -> Tensor:
    """Correlation with f (C, C, size, size); the border is mirrored and the edge repeated."""
    margin = f.shape[-1] // 2
    for axis in (2, 3):
        first = planes.narrow(axis, 0, margin).flip(axis)
        last = planes.narrow(axis, planes.shape[axis] - margin, margin).flip(axis)
        planes = torch.cat([first, planes, last], axis)
    return functional.conv2d(planes, f.to(planes))


def _undo_filter(filtered: Tensor, low: Tensor, f: Tensor) -> Tensor:
    """The planes (N, C, H, W) of which f makes `filtered` and `_blur` makes `low`, least squares:

        minimise |K x - filtered|^2 + weight |B x - low|^2,
        (K'K + weight B^2) x = K' filtered + weight B low,

    a C x C system for every frequency of the image mirrored to 2H x 2W, with the gains K of f and B
    of the blur. Both terms vanish at the original, so the round trip is exact whatever the weight;
    the weight says how little of an error of `filtered` reaches the low frequencies, where a
    high-pass filter has next to no gain to divide by.
    """
    gain, blur = _gain(f, filtered), _blur_gain(filtered)
    channels = gain.shape[-1]
    weight = LOW_WEIGHT * channels * gain.square().mean()
    system = gain.mT @ gain + (weight * blur.square())[..., None, None] * torch.eye(channels).to(
        gain
    )
    right = _mix(gain.mT, _spectrum(filtered)) + weight * blur * _spectrum(low)
    return _from_spectrum(_mix(torch.linalg.inv(system), right), filtered)


def _blur(planes: Tensor) -> Tensor:
    """The planes under a Gaussian of LOW_SIGMA pixels, mirrored at the border."""
    return _from_spectrum(_blur_gain(planes) * _spectrum(planes), planes)


def _blur_gain(planes: Tensor) -> Tensor:
    """The gain (2H, W+1) of `_blur`."""
    height, width = planes.shape[2:]
    u, v = torch.fft.fftfreq(2 * height), torch.fft.rfftfreq(2 * width)
    squares = u[:, None].square() + v.square()
    return torch.exp(-2 * (math.pi * LOW_SIGMA) ** 2 * squares).to(planes)


def _gain(f: Tensor, planes: Tensor) -> Tensor:
    """The gain (2H, W+1, C, C) of f, real because f is symmetric in both axes."""
    height, width = planes.shape[2:]
    size = f.shape[-1]
    padded = functional.pad(f.to(planes), (0, 2 * width - size, 0, 2 * height - size))
    centred = padded.roll((-(size // 2), -(size // 2)), (2, 3))
    return torch.fft.rfft2(centred).real.permute(2, 3, 0, 1)


def _spectrum(planes: Tensor) -> Tensor:
    """The transform (N, C, 2H, W+1) of planes continued by their mirror image, without a jump."""
    planes = torch.cat([planes, planes.flip(2)], 2)
    return torch.fft.rfft2(torch.cat([planes, planes.flip(3)], 3))


def _from_spectrum(spectrum: Tensor, planes: Tensor) -> Tensor:
    height, width = planes.shape[2:]
    return torch.fft.irfft2(spectrum, (2 * height, 2 * width))[..., :height, :width]


def _mix(gain: Tensor, spectrum: Tensor) -> Tensor:
    return torch.einsum("uvcd,nduv->ncuv", gain.to(spectrum.dtype), spectrum)


def _gaussian(planes: Tensor, window: int, sigma: float) -> Tensor:
    """Every plane averaged under a Gaussian window; the border reflected, the edge not repeated."""
    offsets = torch.arange(window, dtype=torch.float64) - window // 2
    weights = torch.softmax(-offsets.square() / (2 * sigma**2), 0).to(planes)
    padded = functional.pad(planes, (window // 2,) * 4, mode="reflect").flatten(0, 1)[:, None]
    rows = functional.conv2d(padded, weights.view(1, 1, -1, 1))
    return functional.conv2d(rows, weights.view(1, 1, 1, -1)).view(planes.shape)


def _laplacian(channels: int) -> Tensor:
    """Matlab's fspecial('laplacian', 0.2) for each plane alone, (channels, channels, 3, 3)."""
    alpha = 0.2
    corner, edge = alpha / 4, (1 - alpha) / 4
    f = torch.tensor([[corner, edge, corner], [edge, -1.0, edge], [corner, edge, corner]])
    return torch.eye(channels)[:, :, None, None] * f * 4 / (alpha + 1)


def _impulse(channels: int, size: int) -> Tensor:
    f = torch.zeros(channels, channels, size, size)
    f[..., size // 2, size // 2] = torch.eye(channels)
    return f


def _luma(rgb: Tensor) -> Tensor:
    """Grey (N, 1, H, W) of RGB (N, 3, H, W) with the weights of Rec. 601."""
    return 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]


def _check(images: Tensor, settings: PreprocessingSettings) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have the shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}: must be floats in [0, 1]; divide 0..255 by 255"
        )
    margins = {
        "laplacian": 3,
        "contrast": settings.window // 2 + 1,
        "whiten": settings.whitening_size,
    }
    for step, margin in ((step, margins.get(step, 1)) for step in settings.steps):
        if min(images.shape[2:]) < margin:
            height, width = images.shape[2:]
            raise ValueError(
                f"images of {height}x{width} pixels are too small for the step {step!r}: "
                f"it needs at least {margin}x{margin}"
            )
    for index, image in enumerate(images):
        low, high = image.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"image {index} has pixels that are NaN or infinite")
        # Resampling in float32 can overstep the range by rounding.
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(
                f"image {index} has values from {low:.4g} to {high:.4g}: must be in [0, 1]; "
                "divide images of 0..255 by 255"
            )
