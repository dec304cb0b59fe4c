"""Charts as pictures (3, H, W) in [0, 1], sized in pixels so that they fit next to panels of tiles.

There are lines, bars with errors, heat maps with a scale and label maps with a legend. Colours are
distinguishable for the colour-blind (Okabe and Ito 2008), and lines also have different markers. A
map of positions has the frame of its image, so that positions in the map correspond to the image.
Charts have no titles: `canvas.with_title` adds them in the font of all other captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deconvnet.visualization.drawing.letters import legible

# Matplotlib takes a second to load, and most users of this package draw no chart.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
OTHER = "#BBBBBB"
NOWHERE = "#E8E8E8"
HEAT = "viridis"
REFERENCE = {"color": "black", "linewidth": 1, "linestyle": "--"}

DPI = 100
# Font sizes in points of 1/72 inch: 13 pixels at this resolution, as in `canvas`, and 11.
TYPE, SMALL = 9.4, 8
CHART = (230, 300)
SCALE = 74
LEGEND = 160
LEFT, BOTTOM, MARGIN = 56, 42, 12
LEGEND_LINE = 20
MOST_LABELS = 6
# From the left of a legend's entry to its name, and from its end to the next entry, in pixels.
ENTRY, BESIDE = 32, 12
# The opacity of a heat map over an image, and the range of greys of that image.
OPACITY = 0.6
DIMMED = (0.2, 0.9)


@dataclass(frozen=True)
class Cells:
    """The cells of a map (P, Q) of positions in an image of (H, W) pixels.

    Cell (p, q) is centred at first + (p, q) * strides and is as large as the strides.
    """

    image: tuple[int, int]
    first: tuple[float, float]
    strides: tuple[float, float]

    def extent(self, shape: tuple[int, int]) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) of a map of this shape, in pixels."""
        top, left = (
            first - stride / 2 for first, stride in zip(self.first, self.strides, strict=True)
        )
        return left, left + shape[1] * self.strides[1], top + shape[0] * self.strides[0], top


def color(number: int) -> Tensor:
    """(3,): the colour of a line, bar or label; colours repeat after seven."""
    return _rgb(COLORS[number % len(COLORS)])


def line_chart(
    x: Tensor,
    lines: Sequence[tuple[str, Tensor]],
    *,
    xlabel: str,
    ylabel: str = "",
    size: tuple[int, int] = CHART,
    limits: tuple[float, float] | None = None,
    reference: tuple[str, float] | None = None,
    legend: bool = True,
) -> Tensor:
    """Lines (T,) over x (T,) with a legend, as a picture of `size` (height, width) pixels.

    Values that are not finite leave gaps. limits: of y, by default the range of the lines.
    reference: name and value of a dashed horizontal line.
    """
    for name, y in lines:
        if y.shape != x.shape:
            raise ValueError(
                f"line {name}: {len(y)} values over {len(x)} positions; expected one for each"
            )
    figure, axes = _chart(size)
    marked = max(1, len(x) // 12)
    for number, (name, y) in enumerate(lines):
        axes.plot(
            *(np.asarray(values.detach().cpu().double()) for values in (x, y)),
            **_line(number),
            markevery=marked,
            label=legible(name),
        )
    if reference:
        axes.axhline(reference[1], **REFERENCE, label=reference[0])
    if limits:
        axes.set_ylim(*limits)
    axes.margins(x=0.02)
    axes.grid(color=NOWHERE, linewidth=0.8)
    axes.set_xlabel(xlabel, fontsize=TYPE)
    axes.set_ylabel(ylabel, fontsize=TYPE)
    if legend and (lines or reference):
        _legend(axes)
    return _picture(figure)


def bar_chart(
    bars: dict[str, Sequence[tuple[float, float]]],
    groups: Sequence[str],
    *,
    ylabel: str,
    size: tuple[int, int] = CHART,
    plain: Sequence[str] = (),
) -> Tensor:
    """Groups of bars with errors.

    bars: for each kind of bar, (value, error) in every group; an error that is not finite is not
    drawn. plain: the kinds to draw in grey, such as controls.
    """
    for name, values in bars.items():
        if len(values) != len(groups):
            raise ValueError(
                f"bars {name}: {len(values)} values for {len(groups)} groups; expected one for each"
            )
    figure, axes = _chart(size)
    width = 0.8 / max(1, len(bars))
    colored = 0
    for number, (name, values) in enumerate(bars.items()):
        positions = np.arange(len(groups)) + (number - (len(bars) - 1) / 2) * width
        heights, errors = np.asarray(values, dtype=float).reshape(-1, 2).T
        fill = OTHER if name in plain else COLORS[colored % len(COLORS)]
        colored += name not in plain
        axes.bar(positions, heights, 0.9 * width, color=fill, label=legible(name))
        finite = np.isfinite(errors)
        axes.errorbar(
            positions[finite],
            heights[finite],
            errors[finite],
            fmt="none",
            ecolor="black",
            elinewidth=1.2,
            capsize=3,
        )
    axes.set_xticks(range(len(groups)), list(map(legible, groups)), fontsize=SMALL)
    axes.set_ylabel(ylabel, fontsize=TYPE)
    legend_rows = -(-len(bars) // 2)
    axes.set_ylim(0, (1.12 + 0.12 * legend_rows) * axes.get_ylim()[1])  # room for the legend
    axes.grid(axis="y", color=NOWHERE, linewidth=0.8)
    if bars:
        _legend(axes, columns=2)
    return _picture(figure)


def legend_row(names: Sequence[str], *, width: int, reference: str | None = None) -> Tensor:
    """A legend in rows, for several charts with the same lines and dashed reference line.

    All entries are as wide as the widest, so that no name overlaps the next entry.
    """
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **_line(number)) for number in range(len(names))]
    names = [shortened(name) for name in names]
    if reference:
        lines.append(Line2D([], [], **REFERENCE))
        names.append(reference)
    entry = max([LEGEND, *(ENTRY + _text_width(name) + BESIDE for name in names)])
    columns = max(1, width // entry)
    figure = _figure(LEGEND_LINE * -(-len(lines) // columns), width)
    for number, (line, name) in enumerate(zip(lines, names, strict=True)):
        row, column = divmod(number, columns)
        axes = _axes(figure, row * LEGEND_LINE, column * entry, LEGEND_LINE, entry)
        axes.set_axis_off()
        axes.set_xlim(0, entry)
        axes.set_ylim(-1, 1)
        line.set_data([4, 15, 26], [0, 0, 0])
        line.set_markevery([1])
        axes.add_line(line)
        axes.text(ENTRY, 0, name, fontsize=TYPE, va="center_baseline", ha="left")
    return _picture(figure)


def heat_map(
    values: Tensor,
    cells: Cells,
    *,
    size: tuple[int, int],
    limits: tuple[float, float] | None = None,
    marked: float | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A map (P, Q) of an image in a frame of `size` (height, width) pixels, with a scale.

    The frame is at the top left of the picture, so that it lines up with a tile of this size; the
    scale adds SCALE pixels on the right. Positions without a cell or a finite value are pale grey.
    limits: of the scale, by default the range of the values. marked: a value to mark on the scale,
    such as that of the whole image. image: (3, h, w) in [0, 1], to show in grey through the map.
    """
    values = values.detach().cpu().double()
    finite = values[values.isfinite()].tolist()
    low, high = limits or (min(finite, default=0.0), max(finite, default=1.0))
    if low == high:  # a scale needs a length; the only value is then in its middle
        low, high = low - 0.5, high + 0.5
    figure, axes, left = _map_frame(cells, size, SCALE)
    if image is not None:
        axes.imshow(_dimmed(image), extent=(0, cells.image[1], cells.image[0], 0), aspect="auto")
    heat = axes.imshow(
        np.ma.masked_invalid(np.asarray(values)),
        cmap=HEAT,
        alpha=1 if image is None else OPACITY,
        vmin=low,
        vmax=high,
        extent=cells.extent(tuple(values.shape)),
        interpolation="nearest",
        aspect="auto",
    )
    _framed(axes, cells)
    bar = _axes(figure, 4, left + 8, size[0] - 8, 12)
    bar.set_facecolor(str(sum(DIMMED) / 2))  # as behind the map, so that colours are equal
    figure.colorbar(heat, cax=bar)
    bar.tick_params(labelsize=SMALL, length=3)
    bar.ticklabel_format(axis="y", style="plain", useOffset=False)
    if marked is not None and low <= marked <= high:
        bar.plot(-0.35, marked, marker=">", color="black", clip_on=False, markersize=5)
    return _picture(figure)


def label_map(
    labels: Tensor, cells: Cells, names: dict[int, str], *, size: tuple[int, int]
) -> Tensor:
    """A map (P, Q) of labels as coloured areas, with a legend on the right.

    The most frequent labels have colours, in the order of their areas; all others are grey. names:
    of labels; a label without a name appears as its number. The frame is as in `heat_map`; the
    legend adds LEGEND pixels.
    """
    labels = labels.detach().cpu()
    present, areas = labels.unique(return_counts=True)
    order = areas.sort(descending=True, stable=True).indices
    count = MOST_LABELS if len(present) > MOST_LABELS + 1 else len(present)
    coloured = present[order][:count].tolist()
    picture = _rgb(OTHER).expand(*labels.shape, 3).clone()
    entries = []
    for number, label in enumerate(coloured):
        picture[labels == label] = color(number)
        entries.append((COLORS[number], str(names.get(label, label))))
    if len(coloured) < len(present):
        entries.append((OTHER, f"{len(present) - len(coloured)} others"))
    figure, axes, left = _map_frame(cells, size, LEGEND)
    axes.imshow(
        picture.numpy(),
        extent=cells.extent(tuple(labels.shape)),
        interpolation="nearest",
        aspect="auto",
    )
    _framed(axes, cells)
    legend = _axes(figure, 0, left, size[0], LEGEND)
    legend.set_axis_off()
    legend.set_xlim(0, LEGEND)
    legend.set_ylim(size[0], 0)
    for number, (fill, name) in enumerate(entries):
        line = 4 + number * LEGEND_LINE
        legend.fill([8, 20, 20, 8], [line, line, line + 12, line + 12], color=fill, linewidth=0)
        legend.text(26, line + 6, _fitted(name, LEGEND - 28), fontsize=TYPE, va="center", ha="left")
    return _picture(figure)


def _dimmed(image: Tensor) -> np.ndarray:
    """(h, w, 3): an image (3, h, w) in grey, with less contrast."""
    low, high = DIMMED
    grey = low + (high - low) * image.detach().cpu().mean(0, keepdim=True)
    return grey.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _text_width(text: str) -> int:
    """The width of a text of the size of legends in pixels."""
    from matplotlib.textpath import TextPath

    # TextPath sizes letters in points; at DPI pixels an inch a point is DPI / 72 pixels.
    return math.ceil(TextPath((0, 0), text or " ", size=TYPE).get_extents().x1 * DPI / 72)


def _fitted(name: str, width: int) -> str:
    """A name shortened to this width in pixels; the first of class names such as "a, b, c"."""
    name = shortened(name)
    while len(name) > 1 and _text_width(name) > width:
        name = f"{name.removesuffix('…')[:-1]}…"
    return name


def _line(number: int) -> dict[str, object]:
    """The style of a line."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKS[number % len(MARKS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _chart(size: tuple[int, int]) -> tuple[Figure, Axes]:
    """A figure of (height, width) pixels, and axes with room for their labels."""
    figure = _figure(*size)
    axes = _axes(figure, MARGIN, LEFT, size[0] - MARGIN - BOTTOM, size[1] - LEFT - MARGIN)
    axes.tick_params(labelsize=SMALL, length=3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _map_frame(cells: Cells, size: tuple[int, int], extra: int) -> tuple[Figure, Axes, int]:
    """A figure, the axes of a map in its top left corner, and the first column to the right."""
    height, width = size
    figure = _figure(height, width + extra)
    axes = _axes(figure, 0, 0, height, width)
    axes.set_facecolor(NOWHERE)
    return figure, axes, width


def _framed(axes: Axes, cells: Cells) -> None:
    """Limit the axes to the pixels of the image."""
    H, W = cells.image
    axes.set_xlim(0, W)
    axes.set_ylim(H, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(axes: Axes, columns: int = 1) -> None:
    axes.legend(
        loc="upper left" if columns > 1 else "best",
        ncols=columns,
        fontsize=SMALL,
        framealpha=0.8,
        edgecolor="none",
        borderpad=0.2,
        labelspacing=0.3,
        handlelength=1.6,
        columnspacing=1.0,
    )


def shortened(name: str, longest: int = 17) -> str:
    """A name that fits into a legend; the first of class names such as "a, b, c"."""
    first = legible(name.split(",")[0])
    return first if len(first) <= longest else first[: longest - 1] + "…"


def _rgb(color: str) -> Tensor:
    """(3,): a colour #RRGGBB."""
    return torch.tensor(list(bytes.fromhex(color[1:]))) / 255


def _figure(height: int, width: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (width / DPI, height / DPI)
    # No layout, whatever the user's rcParams say: axes cover exactly the pixels they are given.
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="none")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, top: int, left: int, height: int, width: int) -> Axes:
    """Axes that cover these pixels of a figure."""
    W, H = (round(DPI * inches) for inches in figure.get_size_inches())
    if min(height, width) < 1:
        raise ValueError(f"a chart of {H} x {W} pixels is too small for its content")
    return figure.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))


def _picture(figure: Figure) -> Tensor:
    """(3, H, W) in [0, 1]: the drawn figure."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
