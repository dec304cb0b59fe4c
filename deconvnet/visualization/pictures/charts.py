"""Charts as pictures (3, H, W) in [0, 1], sized in pixels so that they fit beside panels of tiles.

Lines, bars with errors, heat maps with a scale and maps of labels with a legend. Colours can be
told apart by the colour-blind (Okabe and Ito 2008), lines also by their marks. A map of positions
is drawn in a frame of the size of the image that it is about, every cell in its place there, so
that what is seen in the map can be found in the image. Charts carry no titles: `tiles.titled` sets
those, in the type of all other captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

# Matplotlib takes a second to load, and most of what imports this package draws no chart.
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
# Sizes of type in points of 1/72 inch: at this resolution 13 pixels, as in `tiles`, and 11.
TYPE, SMALL = 9.4, 8
CHART = (230, 300)
SCALE = 74
LEGEND = 140
LEFT, BOTTOM, MARGIN = 56, 42, 12
LEGEND_LINE = 20
MOST_LABELS = 6


@dataclass(frozen=True)
class Cells:
    """Where the cells of a map (P, Q) of positions lie in an image of (H, W) pixels.

    Cell (p, q) is about row + p * strides[0], column + q * strides[1], and as large as the strides.
    """

    image: tuple[int, int]
    first: tuple[float, float]
    strides: tuple[float, float]

    def extent(self, shape: tuple[int, int]) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) of all cells of a map of this shape, in pixels."""
        top, left = (
            first - stride / 2 for first, stride in zip(self.first, self.strides, strict=True)
        )
        return left, left + shape[1] * self.strides[1], top + shape[0] * self.strides[0], top


def color(number: int) -> Tensor:
    """(3,): the colour of the line, bar or label of this number; they repeat after seven."""
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
    """Lines (T,) over x (T,) with their names in a legend, as a picture of (height, width) pixels.

    Places that are not finite are gaps. reference: a name and a value, drawn dashed all the way
    across. limits: of y, by default from the least to the largest of what is drawn.
    """
    for name, y in lines:
        if y.shape != x.shape:
            raise ValueError(f"line {name}: {len(y)} values over {len(x)} places; one for each")
    figure, axes = _chart(size)
    marked = max(1, len(x) // 12)
    for number, (name, y) in enumerate(lines):
        axes.plot(
            *(np.asarray(values.detach().cpu().double()) for values in (x, y)),
            **_line(number),
            markevery=marked,
            label=name,
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
    """Bars of several kinds side by side in groups, with their errors.

    bars: for every kind (value, error) in each group; an error that is not finite is not drawn.
    plain: the kinds that are drawn in grey, as controls are.
    """
    for name, values in bars.items():
        if len(values) != len(groups):
            raise ValueError(
                f"bars {name}: {len(values)} values for {len(groups)} groups; one for each"
            )
    figure, axes = _chart(size)
    width = 0.8 / max(1, len(bars))
    colored = 0
    for number, (name, values) in enumerate(bars.items()):
        places = np.arange(len(groups)) + (number - (len(bars) - 1) / 2) * width
        heights, errors = np.asarray(values, dtype=float).reshape(-1, 2).T
        fill = OTHER if name in plain else COLORS[colored % len(COLORS)]
        colored += name not in plain
        axes.bar(places, heights, 0.9 * width, color=fill, label=name)
        known = np.isfinite(errors)
        axes.errorbar(
            places[known],
            heights[known],
            errors[known],
            fmt="none",
            ecolor="black",
            elinewidth=1.2,
            capsize=3,
        )
    axes.set_xticks(range(len(groups)), groups, fontsize=SMALL)
    axes.set_ylabel(ylabel, fontsize=TYPE)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.grid(axis="y", color=NOWHERE, linewidth=0.8)
    if bars:
        _legend(axes, columns=2)
    return _picture(figure)


def legend_row(names: Sequence[str], *, width: int, reference: str | None = None) -> Tensor:
    """The names of the lines of several charts that share them, and of their dashed reference."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **_line(number)) for number in range(len(names))]
    names = [shortened(name) for name in names]
    if reference:
        lines.append(Line2D([], [], **REFERENCE))
        names.append(reference)
    columns = max(1, width // LEGEND)
    figure = _figure(LEGEND_LINE * -(-len(lines) // columns), width)
    for number, (line, name) in enumerate(zip(lines, names, strict=True)):
        row, column = divmod(number, columns)
        axes = _axes(figure, row * LEGEND_LINE, column * LEGEND, LEGEND_LINE, LEGEND)
        axes.set_axis_off()
        axes.set_xlim(0, LEGEND)
        axes.set_ylim(-1, 1)
        line.set_data([4, 15, 26], [0, 0, 0])
        line.set_markevery([1])
        axes.add_line(line)
        axes.text(32, 0, name, fontsize=TYPE, va="center_baseline", ha="left")
    return _picture(figure)


def heat_map(
    values: Tensor,
    cells: Cells,
    *,
    size: tuple[int, int],
    limits: tuple[float, float] | None = None,
    marked: float | None = None,
) -> Tensor:
    """A map (P, Q) over an image in a frame of (height, width) pixels, and its scale on the right.

    The frame is the top left of the picture, so that it lies beside the image as a tile of this
    size does; the scale takes another SCALE pixels. Pale grey is where no cell is, and where a
    value is not finite. marked: a value that the scale points out, such as that of the whole image.
    """
    values = values.detach().cpu().double()
    finite = values[values.isfinite()].tolist()
    low, high = limits or (min(finite, default=0.0), max(finite, default=1.0))
    if low == high:  # a scale needs a length; the one value is then in its middle
        low, high = low - 0.5, high + 0.5
    figure, axes, rest = _map_frame(cells, size, SCALE)
    shown = axes.imshow(
        np.ma.masked_invalid(np.asarray(values)),
        cmap=HEAT,
        vmin=low,
        vmax=high,
        extent=cells.extent(tuple(values.shape)),
        interpolation="nearest",
        aspect="auto",
    )
    _framed(axes, cells)
    bar = _axes(figure, 4, rest + 8, size[0] - 8, 12)
    figure.colorbar(shown, cax=bar)
    bar.tick_params(labelsize=SMALL, length=3)
    bar.yaxis.get_offset_text().set_fontsize(SMALL)
    if marked is not None and low <= marked <= high:
        bar.plot(-0.35, marked, marker=">", color="black", clip_on=False, markersize=5)
    return _picture(figure)


def label_map(
    labels: Tensor, cells: Cells, names: dict[int, str], *, size: tuple[int, int]
) -> Tensor:
    """A map (P, Q) of numbers of labels as areas of colour, with a legend on the right.

    The most frequent labels have a colour each, in the order of their areas, all others are grey.
    names: of labels; one without a name is shown as its number. The frame as in `heat_map`; the
    legend takes another LEGEND pixels.
    """
    labels = labels.detach().cpu()
    found, areas = labels.unique(return_counts=True)
    order = areas.sort(descending=True, stable=True).indices
    kept = found[order][: MOST_LABELS if len(found) > MOST_LABELS + 1 else len(found)].tolist()
    picture = _rgb(OTHER).expand(*labels.shape, 3).clone()
    entries = []
    for number, label in enumerate(kept):
        picture[labels == label] = color(number)
        entries.append((COLORS[number], str(names.get(label, label))))
    if len(kept) < len(found):
        entries.append((OTHER, f"{len(found) - len(kept)} others"))
    figure, axes, rest = _map_frame(cells, size, LEGEND)
    axes.imshow(
        picture.numpy(),
        extent=cells.extent(tuple(labels.shape)),
        interpolation="nearest",
        aspect="auto",
    )
    _framed(axes, cells)
    beside = _axes(figure, 0, rest, size[0], LEGEND)
    beside.set_axis_off()
    beside.set_xlim(0, LEGEND)
    beside.set_ylim(size[0], 0)
    for number, (fill, name) in enumerate(entries):
        line = 4 + number * LEGEND_LINE
        beside.fill([8, 20, 20, 8], [line, line, line + 12, line + 12], color=fill, linewidth=0)
        beside.text(26, line + 6, shortened(name), fontsize=TYPE, va="center", ha="left")
    return _picture(figure)


def _line(number: int) -> dict[str, object]:
    """How the line of this number is drawn."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKS[number % len(MARKS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _chart(size: tuple[int, int]) -> tuple[Figure, Axes]:
    """A figure of (height, width) pixels and axes with room for what is written about them."""
    figure = _figure(*size)
    axes = _axes(figure, MARGIN, LEFT, size[0] - MARGIN - BOTTOM, size[1] - LEFT - MARGIN)
    axes.tick_params(labelsize=SMALL, length=3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _map_frame(cells: Cells, size: tuple[int, int], beside: int) -> tuple[Figure, Axes, int]:
    """A figure, the axes of a map in its top left corner, and where the rest begins."""
    height, width = size
    figure = _figure(height, width + beside)
    axes = _axes(figure, 0, 0, height, width)
    axes.set_facecolor(NOWHERE)
    return figure, axes, width


def _framed(axes: Axes, cells: Cells) -> None:
    """The axes show the image's pixels, all of them and no more."""
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
    """What fits into a legend; of class names like "a, b, c" the first."""
    first = name.split(",")[0]
    return first if len(first) <= longest else first[: longest - 1] + "…"


def _rgb(color: str) -> Tensor:
    """(3,) of a colour written as #RRGGBB."""
    return torch.tensor(list(bytes.fromhex(color[1:]))) / 255


def _figure(height: int, width: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, top: int, left: int, height: int, width: int) -> Axes:
    """Axes that cover these pixels of a figure."""
    W, H = (round(DPI * inches) for inches in figure.get_size_inches())
    if min(height, width) < 1:
        raise ValueError(f"a chart of {H} x {W} pixels has no room for what it shows")
    return figure.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))


def _picture(figure: Figure) -> Tensor:
    """(3, H, W) in [0, 1]: the figure as it is drawn."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
