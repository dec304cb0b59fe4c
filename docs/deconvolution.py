"""Draws the pictures of deconvolution.md: `python docs/deconvolution.py`, half a minute.

Tables of numbers stand on a canvas whose unit is a cell; photographs are laid on the same canvas.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

import deconvnet
from deconvnet.images.datasets import load_images
from deconvnet.images.preprocessing import Preprocessing, PreprocessingSettings, to_color
from deconvnet.images.sources import DataSettings
from deconvnet.operators.arithmetic import correlation_matrix, undoing_padding
from deconvnet.operators.convolution import correlate, deconvolve
from deconvnet.visualization.drawing.canvas import quantile_magnitude, shade_signed

INCH = 0.31  # side of a cell
DPI = 110
COLORS = ["#9ecae1", "#fdae6b", "#a1d99b", "#d4b9da"]  # of the four values of a 2x2
QUARTERS = [COLORS[:2], COLORS[2:]]
EMPTY, GREY, DARK = "white", "#e9e9e9", "#555555"
KERNEL = torch.arange(1, 10).view(3, 3)
SMALL = torch.tensor([[1, 2], [4, 5]])


def convolution() -> Figure:
    """A 3x3 kernel takes 4x4 to 2x2."""
    x = torch.tensor([[1, 0, 2, 1], [0, 3, 1, 0], [2, 1, 0, 1], [0, 1, 1, 2]])
    y = F.conv2d(x[None, None], KERNEL[None, None])[0, 0]
    figure, axes = canvas(25, 5.6)
    cells(axes, 0.3, 1.2, x, title="input 4x4")
    for i, (row, column) in enumerate(np.ndindex(2, 2)):
        outline(axes, 0.3 + column, 1.2 + row, 3, COLORS[i], inset=0.09 * i)
    sign(axes, 5.1, 3.2, "*")
    cells(axes, 6, 1.7, KERNEL, title="kernel 3x3")
    sign(axes, 9.9, 3.2, "=")
    cells(axes, 10.8, 2.2, y, QUARTERS, title="output 2x2")
    products = zip(x[:3, :3].flatten(), KERNEL.flatten(), strict=True)
    terms = [f"{pixel}·{weight}" for pixel, weight in products]
    lines = (
        "Each output is the sum of the 9 products of\n"
        "the kernel and the window of the same colour.\n\n"
        f"The first:  {' + '.join(terms[:5])}\n + {' + '.join(terms[5:])} = {y[0, 0]}"
    )
    note(axes, 13.8, 3.2, lines)
    return figure


def matrix() -> Figure:
    """That convolution as a 4x16 matrix, its transpose, and the columns of the latter as 4x4."""
    M = correlation_matrix(KERNEL[None, None], (4, 4))
    filled = [
        [color if weight else EMPTY for weight in row] for row, color in zip(M, COLORS, strict=True)
    ]
    figure, axes = canvas(23.5, 18)
    cells(axes, 0.3, 1.3, M, filled, title="M: 4 outputs x 16 pixels")
    note(axes, 0.3, 6.1, "convolution:  y = M x", size=11)
    cells(axes, 18.7, 1.3, M.T, np.transpose(filled), title="M': 16 pixels x 4")
    note(axes, 0.3, 8.9, "transposed convolution:  M' y,\nthe columns of M' weighted by y", size=11)
    for i in range(4):
        square = np.reshape(filled[i], (4, 4))
        title = f"column {i + 1}, folded"
        cells(axes, 0.3 + 4.4 * i, 11.7, M[i].view(4, 4), square, title=title)
    return figure


def transposed() -> Figure:
    """The transpose by pasting and adding, and as a convolution with the rotated kernel."""
    figure, axes = canvas(28.1, 14)
    cells(axes, 0.3, 2.2, SMALL, QUARTERS, title="input 2x2")
    total = torch.zeros(4, 4, dtype=torch.long)
    for i, (row, column) in enumerate(np.ndindex(2, 2)):
        around = (column, 1 - column, row, 1 - row)
        pasted = F.pad(SMALL[row, column] * KERNEL, around)
        covered = F.pad(torch.ones(3, 3), around)
        filled = np.where(covered > 0, COLORS[i], EMPTY)
        cells(axes, 3.6 + 5 * i, 1.2, pasted, filled, title=f"{SMALL[row, column]} x kernel")
        sign(axes, 8.1 + 5 * i, 3.2, "+" if i < 3 else "=")
        total += pasted
    cells(axes, 23.7, 1.2, total, title="output 4x4")

    padding = undoing_padding(3, 0)
    padded = F.pad(SMALL, (padding,) * 4)
    filled = np.pad(QUARTERS, padding, constant_values=EMPTY)
    cells(axes, 3.6, 7.4, padded, filled, blank=False, title="input with 2 zeros around it")
    outline(axes, 3.6, 7.4, 3, DARK)
    sign(axes, 10.3, 10.4, "*")
    cells(axes, 11.2, 8.9, KERNEL.flip(0, 1), title="turned kernel")
    sign(axes, 15.2, 10.4, "=")
    cells(axes, 16.1, 8.4, total, title="output 4x4")
    return figure


def projection() -> Figure:
    """One ReLU and one max pooling upwards, and downwards with three rules for the ReLU."""
    z = torch.tensor([[1, 5, -1, 0], [-2, 3, 4, 2], [-2, -4, -3, -5], [-1, -3, -1, -2]]).float()
    y = F.relu(z)
    pooled, switches = F.max_pool2d(y[None, None], 2, return_indices=True)
    signal = torch.tensor([[2.0, -3], [1, -2]])
    unpooled = F.max_unpool2d(signal[None, None], switches, 2)[0, 0]
    windows = np.repeat(np.repeat(QUARTERS, 2, 0), 2, 1)

    def kept(values: Tensor) -> np.ndarray:
        return np.where(values != 0, windows, EMPTY)

    figure, axes = canvas(28.3, 15.1)
    note(axes, 0.3, 0.6, "up:  ReLU, then max pooling, which remembers places (switches)", size=11)
    cells(axes, 0.3, 2.4, z, windows, title="map")
    sign(axes, 5.3, 4.4, "→")
    cells(axes, 6.3, 2.4, y, windows, title="ReLU")
    for place in switches.flatten().tolist():
        outline(axes, 6.3 + place % 4, 2.4 + place // 4, 1, DARK)
    sign(axes, 11.3, 4.4, "→")
    cells(axes, 12.3, 3.4, pooled[0, 0], QUARTERS, title="max pooling")
    note(axes, 15.6, 4.4, "Outlined: the switches.\nOf equal values the first.")

    note(axes, 0.3, 8.1, "down:  unpooling by the switches, then a rule for the ReLU", size=11)
    cells(axes, 0.3, 10.9, signal, QUARTERS, title="from above")
    sign(axes, 3.3, 11.9, "→")
    cells(axes, 4.3, 9.9, unpooled, kept(unpooled), title="unpooled")
    sign(axes, 9.3, 11.9, "→")
    rules = {
        "gradient": unpooled * (z > 0),
        "deconvnet": unpooled.clamp(min=0),
        "guided": unpooled.clamp(min=0) * (z > 0),
    }
    kinds = ["where the ReLU\nwas open", "what is positive", "both"]
    for i, (name, values) in enumerate(rules.items()):
        left = 10.3 + 6 * i
        cells(axes, left, 9.9, values, kept(values), title=name)
        note(axes, left, 14.5, kinds[i])
    return figure


def coding() -> Figure:
    """Sparse maps of a photograph, next to a correlation with the same filters."""
    images = load_images(DataSettings(scale=0.35, max_images=12)).images
    preprocessing = Preprocessing(PreprocessingSettings(color="grey")).fit(images)
    y, _ = preprocessing(images)
    f = deconvnet.learn_filters(y, 16, filter_size=9, lam=5.0).filters
    photograph, patch = to_color(images[4:5], "grey")[..., :56, :56], y[4:5, :, :56, :56]
    solution = deconvnet.sparse_code(patch, f, lam=5.0)
    z, together = solution.z[0], patch - solution.residual
    decibels = 10 * torch.log10(patch.square().sum() / solution.residual.square().sum())
    density = torch.count_nonzero(z) / z.numel()

    figure, axes = canvas(28.3, 24.9)
    white = quantile_magnitude(patch)
    picture(axes, 5, 1.2, 5.2, rgb(photograph), "photograph")
    sign(axes, 11.1, 3.8, "→")
    picture(axes, 12, 1.2, 5.2, shade_signed(patch, white)[0], "y: its local contrast")
    sign(axes, 18.1, 3.8, "≈")
    title = f"all 16 parts added: {decibels:.0f} dB"
    picture(axes, 19, 1.2, 5.2, shade_signed(together, white)[0], title)

    notes = {
        8.3: "filter $f_k$",
        12.3: "y correlated\nwith $f_k$: one\nconvolution,\nnothing is zero",
        16.9: f"sparse map $z_k$:\ninferred,\n{density:.1%} of all\n16 not zero",
        21.5: "part $f_k * z_k$:\nfilters pasted\nwhere $z_k$ says",
    }
    correlated = correlate(patch, f)[0]
    for place, k in enumerate(z.abs().sum((1, 2)).argsort(descending=True)[:5].tolist()):
        left = 5 + 4.7 * place
        part = deconvolve(solution.z[:, k : k + 1], f[k : k + 1])
        picture(axes, left, 7.5, 2, shade_signed(f[k : k + 1])[0])
        picture(axes, left, 10.1, 4.4, shade_signed(correlated[None, k : k + 1])[0])
        picture(
            axes,
            left,
            14.9,
            4.4,
            shade_signed(z[None, k : k + 1], quantile_magnitude(z[None], 0.9))[0],
        )
        picture(axes, left, 19.7, 4.4, shade_signed(part, white)[0])
    for middle, lines in notes.items():
        note(axes, 0.3, middle + 0.3, lines)
    return figure


def upsampling() -> Figure:
    """A small photograph enlarged four times, by a bilinear and by a learned kernel."""
    stride = 4
    truth = grey(skimage.data.camera()[60:252, 150:342], 2)
    small = F.avg_pool2d(truth, stride)
    examples = grey(skimage.data.chelsea()[20:276, 100:356], 2)
    ramp = 1 - (torch.arange(2 * stride) + 0.5 - stride).abs() / stride
    kernels = {
        "bilinear": torch.outer(ramp, ramp),
        "learned": fitted_kernel(F.avg_pool2d(examples, stride), examples, 4 * stride, stride),
    }
    figure, axes = canvas(28.3, 14.3)
    width = 6.6
    picture(axes, 0.3, 1.2, width, rgb(small), f"given: {small.shape[2]}x{small.shape[3]}")
    for place, (name, kernel) in enumerate(kernels.items()):
        left = 7.3 + 7 * place
        large = upsampled(small, kernel, stride)
        decibels = -10 * torch.log10((large - truth).square().mean())
        picture(axes, left, 1.2, width, rgb(large), f"{name} kernel: {decibels:.1f} dB")
        side = len(kernel)
        picture(axes, left, 9.2, 0.3 * side, shade_signed(kernel[None, None])[0])
        note(axes, left + 0.3 * side + 0.2, 9.5, f"{side}x{side}")
    picture(axes, 21.3, 1.2, width, rgb(truth), "what was reduced to 24x24")
    lines = (
        "transposed convolution,\nstride 4: every pixel\npastes its kernel,\n4 pixels from the last"
    )
    note(axes, 0.3, 10.7, lines)
    return figure


def fitted_kernel(small: Tensor, large: Tensor, size: int, stride: int) -> Tensor:
    """The kernel with which a transposed convolution comes closest to the large images."""
    taps = torch.eye(size * size).view(size, size, size, size)
    columns = [upsampled(small, tap, stride).flatten() for tap in taps.flatten(0, 1)]
    return torch.linalg.lstsq(torch.stack(columns, 1), large.flatten()).solution.view(size, size)


def upsampled(small: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """A transposed convolution of stride times the size; the border is continued."""
    margin = 2
    padding = (len(kernel) - stride) // 2 + margin * stride
    around = F.pad(small, (margin,) * 4, mode="replicate")
    return F.conv_transpose2d(around, kernel[None, None], stride=stride, padding=padding)


# Three ways to twice the size: kernel, arguments of the transposed convolution (None: enlarge, then
# convolve), the weights that one input pastes along an axis, and their sums over equal inputs.
WAYS = {
    "transposed, 3x3, stride 2": (
        (3, {"stride": 2, "padding": 1, "output_padding": 1}),
        (["a", "b", "c"], "b and a + c in turn"),
    ),
    "transposed, 4x4, stride 2": (
        (4, {"stride": 2, "padding": 1}),
        (["a", "b", "c", "d"], "b + d and a + c in turn"),
    ),
    "enlarged, then 3x3": (
        (3, None),
        (["c", "b+c", "a+b", "a"], "a + b + c everywhere"),
    ),
}


def twice(x: Tensor, kernel: Tensor, window: dict[str, int] | None) -> Tensor:
    """x (1, 1, H, W) at twice its size in one of the three ways."""
    if window:
        return F.conv_transpose2d(x, kernel[None, None], **window)
    return F.conv2d(F.interpolate(x, scale_factor=2), kernel[None, None], padding=1)


def overlaps() -> Figure:
    """Which weights meet in each output along an axis, and how many terms each output sums."""
    figure, axes = canvas(28.3, 18.6)
    for place, (title, ((size, window), (weights, sums))) in enumerate(WAYS.items()):
        left = 0.3 + 9.7 * place
        note(axes, left, 0.6, title, size=11)
        pasted = np.full((4, 8), "", dtype=object)
        for i in range(4):
            for m, weight in enumerate(weights):
                if 0 <= 2 * i - 1 + m < 8:
                    pasted[i, 2 * i - 1 + m] = weight
        filled = np.where(pasted != "", np.array(COLORS)[:, None], EMPTY)
        cells(axes, left, 2.2, pasted, filled, title="what each of 4 inputs pastes")
        note(axes, left, 6.8, f"sums: {sums}")
        counts = twice(torch.ones(1, 1, 4, 4), torch.ones(size, size), window)[0, 0]
        shades = [[str(1 - 0.35 * float(count / counts.max())) for count in row] for row in counts]
        cells(axes, left, 9.4, counts, shades, title="terms of each of 8x8 outputs")
    return figure


def checkerboard() -> Figure:
    """A photograph at twice its size in the three ways, with even and with random weights."""
    generator = torch.Generator().manual_seed(3)
    small = grey(skimage.data.camera()[60:252, 150:342], 6)
    figure, axes = canvas(28.3, 20)
    for place, (title, ((size, window), _)) in enumerate(WAYS.items()):
        left = 0.3 + 9.7 * place
        note(axes, left, 0.6, title, size=11)
        random = torch.rand(size, size, generator=generator)
        kernels = {"all weights 1": torch.ones(size, size), "random weights": random}
        for row, (name, kernel) in enumerate(kernels.items()):
            painted = twice(small, kernel, window)[:, :, 4:-4, 4:-4]
            painted = (painted - painted.min()) / (painted.max() - painted.min())
            picture(axes, left, 2.2 + 9.4 * row, 8, rgb(painted), name)
    return figure


def grey(photograph: np.ndarray, reduction: int) -> Tensor:
    """A photograph (H, W) or (H, W, 3) of bytes as (1, 1, H, W) in [0, 1], reduced in size."""
    pixels = torch.from_numpy(photograph.copy()).float() / 255
    pixels = pixels if pixels.ndim == 2 else pixels.mean(2)
    return F.avg_pool2d(pixels[None, None], reduction)


def rgb(image: Tensor) -> Tensor:
    return image[0].clamp(0, 1).expand(3, -1, -1)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A page of the given number of cells, with its origin at the top left."""
    figure = Figure(figsize=(width * INCH, height * INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.axis("off")
    return figure, axes


def cells(
    axes: Axes,
    left: float,
    top: float,
    values: Tensor | np.ndarray,
    filled: Sequence[Sequence[str]] | np.ndarray | None = None,
    *,
    blank: bool = True,
    title: str = "",
) -> None:
    """A table of numbers or words, filled with colours; blank: leave white cells empty."""
    for (row, column), value in np.ndenumerate(np.asarray(values)):
        color = GREY if filled is None else filled[row][column]
        corner = (left + column, top + row)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=color, edgecolor="#8a8a8a", linewidth=0.7))
        if color != EMPTY or not blank:
            shown = value if isinstance(value, str) else f"{value:g}"
            sign(axes, corner[0] + 0.5, corner[1] + 0.53, shown, size=9)
    axes.text(left, top - 0.3, title, fontsize=10)


def outline(
    axes: Axes, left: float, top: float, size: float, color: str, *, inset: float = 0.0
) -> None:
    corner, side = (left + inset, top + inset), size - 2 * inset
    axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=color, linewidth=2.2))


def sign(axes: Axes, x: float, y: float, text: str, *, size: float = 15) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=size)


def note(axes: Axes, left: float, middle: float, text: str, *, size: float = 10) -> None:
    axes.text(left, middle, text, va="center", fontsize=size, linespacing=1.5)


def picture(
    axes: Axes, left: float, top: float, width: float, image: Tensor, title: str = ""
) -> None:
    """Draw an image (3, H, W) in [0, 1], `width` cells wide."""
    height = width * image.shape[1] / image.shape[2]
    extent = (left, left + width, top + height, top)
    pixels = image.permute(1, 2, 0).numpy()
    axes.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest")
    axes.text(left, top - 0.3, title, fontsize=10)


def save(figure: Figure, path: Path) -> None:
    """Save a small PNG with few colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


PICTURES = {
    "convolution": convolution,
    "matrix": matrix,
    "transposed": transposed,
    "projection": projection,
    "coding": coding,
    "upsampling": upsampling,
    "overlaps": overlaps,
    "checkerboard": checkerboard,
}


def main(folder: Path = Path(__file__).parent) -> None:
    for name, draw in PICTURES.items():
        save(draw(), folder / f"deconvolution-{name}.png")


if __name__ == "__main__":
    main()
