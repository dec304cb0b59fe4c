"""SIFT-like descriptors of patches of maps.

    z maps (N, K, H, W)   d descriptors (P, D), D = K cells^2 (2 K cells^2 if signed)   P patches

The mean magnitudes of the maps in the cells of a small patch take the place of SIFT's histograms of
orientations (Zeiler et al. 2010 and 2011).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = ("magnitude", "square", "signed")

# As in SIFT: entries of a normalised descriptor are clipped at this value, then it is normalised
# again.
CLIP = 0.2


def descriptors(
    z: Tensor, *, patch: int = 16, cells: int = 4, step: int = 2, strength: str = "magnitude"
) -> Tensor:
    """Mean strengths of the maps in the cells of patches: (N, rows, columns, K cells^2).

    z: (N, K, H, W), padded with zeros at the end to one patch if it is smaller. A patch covers
    patch x patch positions of the maps and has cells x cells cells; patch (r, c) begins at
    (r step, c step). Entries are ordered by map, cell row, cell column. strength="signed" doubles
    the maps: positive parts first, then negative ones.
    """
    if z.ndim != 4:
        raise ValueError(f"maps must have the shape (N, K, H, W), got {tuple(z.shape)}")
    if strength not in STRENGTHS:
        raise ValueError(f"strength={strength}: choose one of {', '.join(STRENGTHS)}")
    if patch % cells:
        raise ValueError(f"patch={patch}: must be a multiple of cells={cells}")
    if strength == "signed":
        z = torch.cat([z.clamp(min=0), (-z).clamp(min=0)], 1)
    else:
        z = z.abs() if strength == "magnitude" else z.square()
    H, W = z.shape[2:]
    z = F.pad(z, (0, max(patch - W, 0), 0, max(patch - H, 0)))
    cell = patch // cells
    # The cells of all patches begin at multiples of this stride, so each mean is computed once.
    stride = math.gcd(cell, step)
    means = F.avg_pool2d(z, cell, stride=stride)
    columns = F.unfold(means, cells, dilation=cell // stride, stride=step // stride)
    rows = (z.shape[2] - patch) // step + 1
    return columns.mT.unflatten(1, (rows, -1))


def normalize_descriptors(d: Tensor, norm_floor: float) -> Tensor:
    """Descriptors (P, D) of length 1 with entries clipped at CLIP, as in SIFT (Lowe 2004).

    A descriptor shorter than `norm_floor` is divided by that instead and stays short, so that noise
    in flat regions is not amplified to the strength of an edge.
    """
    norm = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    clipped = (d / norm.clamp(min=norm_floor)).clamp(max=CLIP)
    clipped_norm = torch.linalg.vector_norm(clipped, dim=1, keepdim=True)
    final_norm = (norm / norm_floor).clamp(max=1)
    return clipped * (final_norm / clipped_norm.clamp(min=torch.finfo(d.dtype).tiny))
