"""The picture of a confusion matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deconvnet.visualization.drawing.canvas import LINE, hstack, text_block, vstack
from deconvnet.visualization.drawing.letters import legible


def confusion_picture(matrix: np.ndarray, class_names: list[str]) -> Tensor:
    """(3, H, W): the share of images of each class (rows) predicted to be of each (columns).

    White is none, dark blue all. Class names are on the left and, from bottom to top, above.
    """
    side = LINE
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    dark = torch.tensor([0.03, 0.19, 0.42]).view(3, 1, 1)
    # The square root makes a few percent visible.
    ink = torch.from_numpy(shares).float().sqrt()
    cells = 1 - ink * (1 - dark)
    cells = cells.repeat_interleave(side, 1).repeat_interleave(side, 2)
    cells[:, ::side], cells[:, :, ::side] = 0.9, 0.9
    width = 9 * max(len(legible(name)) for name in class_names) + 8
    labels = [text_block(name, width, side) for name in class_names]
    above = torch.cat([torch.rot90(label, 1, (1, 2)) for label in labels], 2)
    corner = torch.ones(3, width, width)
    rows = hstack([vstack(labels), cells])
    return vstack([hstack([corner, above]), rows])
