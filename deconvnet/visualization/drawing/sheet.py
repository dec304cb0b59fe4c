"""Sheets: pictures of many equal cells, drawn as one picture or as several small ones.

TensorBoard scales a picture to the size of a card, so that the text of a large picture becomes
illegible there. A sheet is therefore also drawn as pictures that are about as large as a card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.drawing.canvas import (
    GAP,
    LINE,
    PAGE,
    PAPER,
    hstack,
    resize_tiles,
    text_block,
    vstack,
    with_title,
)

# The largest height of a whole picture in pixels, that of about 350 features next to patches: a
# viewer shows a larger one too small, if at all.
PAGE_HEIGHT = 5000
# The largest width and height of a card in pixels: TensorBoard shows it with about four fifths of
# this size. The most cards of a sheet.
CARD, CARD_HEIGHT = 480, 280
MOST_CARDS = 12
# Cards are cut out of other pictures where at least so many columns or rows are white.
CUT = GAP, 10
# The least size of a piece, so that a title stays with what is below it.
LEAST = 60


@dataclass(frozen=True)
class Sheet:
    """A picture of equal cells (3, h, w) in [0, 1], in rows.

    columns: the number of cells in a row of the whole picture; None: such that it is a bit wider
    than high. labels: (3, h, *), to the left of every row. head: (3, *, w), above every column.
    title: above the whole picture.
    """

    cells: list[Tensor]
    columns: int | None = None
    labels: Tensor | None = None
    head: Tensor | None = None
    title: str = ""

    def picture(self) -> Tensor:
        """All cells in one picture (3, H, W), or as many rows as fit into PAGE_HEIGHT, with a title
        that says so.
        """
        columns = self.columns or _columns(self.cells)
        room = PAGE - (0 if self.labels is None else self.labels.shape[2] + GAP)
        columns = min(columns, max(1, room // self._width))
        rows = max(1, PAGE_HEIGHT // (self.cells[0].shape[1] + GAP))
        shown, title = self.cells[: rows * columns], self.title
        if len(shown) < len(self.cells):
            title = f"{title}{': ' if title else ''}the first {len(shown)} of {len(self.cells)}"
        page = self._page(shown, columns)
        return with_title(title, page) if title else page

    def cards(self) -> list[Tensor]:
        """The cells in pictures of at most CARD_HEIGHT x CARD pixels, if no cell is larger.

        The first MOST_CARDS of them, so that a large layer does not fill the page.
        """
        room = CARD - (0 if self.labels is None else self.labels.shape[2] + GAP)
        columns = min(len(self.cells), max(1, room // self._width))
        rows = max(1, CARD_HEIGHT // (self.cells[0].shape[1] + GAP))
        # Cards of about equal size, rather than a last one with a single row.
        needed = -(-len(self.cells) // columns)
        rows = -(-needed // -(-needed // rows))
        starts = range(0, len(self.cells), rows * columns)[:MOST_CARDS]
        columns = -(-min(len(self.cells), rows * columns) // rows) if len(starts) == 1 else columns
        return [self._page(self.cells[n : n + rows * columns], columns) for n in starts]

    @property
    def _width(self) -> int:
        return self.cells[0].shape[2] + GAP

    def _page(self, cells: list[Tensor], columns: int) -> Tensor:
        lines = [hstack(cells[n : n + columns], GAP) for n in range(0, len(cells), columns)]
        head = None if self.head is None else hstack([self.head] * min(columns, len(cells)), GAP)
        if self.labels is not None:
            lines = [hstack([self.labels, line], GAP) for line in lines]
            head = None if head is None else F.pad(head, (self.labels.shape[2] + GAP, 0), value=1)
        lines = lines if head is None else [head, *lines]
        return vstack(lines, GAP)


def captioned(tile: Tensor, caption: str) -> Tensor:
    """A tile (3, h, w) with a line of text below it, cut off at its width."""
    return vstack([tile, text_block(caption, tile.shape[2], LINE)])


def enlarged(tiles: Tensor, width: int) -> Tensor:
    """Tiles (K, 3, h, w) between `width` and 2 `width` pixels wide: enlarged by a whole factor, or
    reduced, only if they are not."""
    return resize_tiles(tiles, min(math.ceil(width / tiles.shape[3]) * tiles.shape[3], 2 * width))


def cut_into_cards(picture: Tensor) -> list[Tensor]:
    """Any picture (3, H, W), and then its pieces of about CARD_HEIGHT x CARD pixels, in reading
    order, if it is larger.

    It is cut only through white rows, and these pieces through white columns, so a piece may be
    larger.
    """
    pieces = []
    for band in _pieces(picture, 1, CARD_HEIGHT, CUT[1]):
        pieces += [p for p in _pieces(band, 2, CARD, CUT[0]) if (p != PAPER).any()]
    return [picture, *pieces][:MOST_CARDS] if len(pieces) > 1 else [picture]


def _columns(cells: list[Tensor]) -> int:
    """The number of columns that makes a page of cells about 1.5 times as wide as high, with the
    fewest empty cells in the last row."""
    count, (_, h, w) = len(cells), cells[0].shape
    best = math.sqrt(1.5 * count * h / w)
    widths = range(max(1, round(0.8 * best)), max(1, round(1.2 * best)) + 1)
    return min(widths, key=lambda width: (-count % width, abs(width - best)))


def _pieces(picture: Tensor, axis: int, most: int, gap: int) -> list[Tensor]:
    """A picture cut along an axis into pieces of at most this size, through `gap` white lines."""
    white = (picture == PAPER).all(0).all(2 - axis)
    middles, run = [], 0
    for position, is_white in enumerate([*white.tolist(), False]):
        if not is_white and run >= gap:
            middles.append(position - run // 2)
        run = run + 1 if is_white else 0
    size, start, pieces = len(white), 0, []
    while size - start > most:
        after = [cut for cut in middles if cut >= start + LEAST and cut <= size - LEAST]
        if not after:
            break
        end = max([cut for cut in after if cut - start <= most], default=after[0])
        pieces.append(picture.narrow(axis, start, end - start))
        start = end
    return [*pieces, picture.narrow(axis, start, size - start)]
