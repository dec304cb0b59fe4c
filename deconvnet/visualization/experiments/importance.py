"""How much a network relies on a concept: the change of its outputs when the concept is removed.

The layer is replaced by its reconstruction, once with the concept and once without it, in the
images that activate the concept most; both times the rest of the network computes its outputs. The
error of the reconstruction is the same both times, so the difference is that of the concept.

M concepts · k images of each
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.support.torch_modes import plain
from deconvnet.visualization.experiments.faithfulness import divergences, log_probabilities
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.projection.model_isolation import isolated
from deconvnet.visualization.projection.patching import Patch
from deconvnet.visualization.projection.projector import Projector

# Images of each concept: those that activate it most.
IMAGES = 4


@dataclass(frozen=True)
class Importance:
    """The effect of removing each of M concepts, on average over its images.

    kl: (M,), the Kullback-Leibler divergence of the class probabilities without the concept from
    those with it, in nats; NaN for a concept without images. classes: (M,), the class whose
    probability changes most, -1 without images; changes: (M,), by how much, negative if it is less
    likely without the concept.
    """

    kl: np.ndarray
    classes: np.ndarray
    changes: np.ndarray


@torch.no_grad()
def importance(
    projector: Projector,
    images: Sequence[Tensor],
    layer: str,
    units: np.ndarray,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Importance | None:
    """The importance of some concepts; None if the outputs of the network are no classes.

    projector: of a `ConceptModel`. images: (3, H, W) each; layer: of concepts; units: (M, k, 4),
    image, concept, row, column of the strongest activations of each, strongest first, -1 for none.
    """
    model: ConceptModel = projector.model
    number = model.concept_layers.index(layer) + 1
    if not len(images) or projector.outputs(projector.prepare(images[0][None])) is None:
        return None
    of_image: dict[int, list[int]] = {}
    for row, ranked in enumerate(units[:, :IMAGES, 0]):
        for image in ranked[ranked >= 0].tolist():
            of_image.setdefault(image, []).append(row)
    sums, replaced = [_Sums() for _ in units], _Replaced(model)
    for done, image in enumerate(sorted(of_image), 1):
        rows = of_image[image]
        x = projector.prepare(images[image][None])
        concepts = [int(units[row, 0, 1]) for row in rows]
        own, changed = _outputs_without(projector, replaced, x, number, concepts)
        log_p, log_q = log_probabilities(own), log_probabilities(changed)
        kl = divergences(log_p, log_q)
        for row, each, difference in zip(rows, kl, log_q.exp() - log_p.exp(), strict=True):
            sums[row].add(float(each), difference)
        if progress:
            progress(done, len(of_image))
    return _means(sums)


class _Replaced:
    """The network with given maps in the layer of its concepts. One patch serves all images, since
    it looks at the whole network first."""

    def __init__(self, model: ConceptModel):
        self.patch = Patch(model.base, model.layer, lambda _: self.maps)

    def outputs(self, x: Tensor, maps: Tensor) -> Tensor:
        """(n, classes) in float64: for an image x (1, C, H, W), with each of the maps (n, ...)."""
        self.maps = maps
        with isolated(self.patch.model):
            return self.patch(x.expand(len(maps), -1, -1, -1)).double()


def _outputs_without(
    projector: Projector, replaced: _Replaced, x: Tensor, number: int, concepts: list[int]
) -> tuple[Tensor, Tensor]:
    """The outputs (1, classes) for an image x (1, C, H, W) with the reconstruction, and (n,
    classes) without each of n concepts, in float64."""
    model, backend = projector.model, projector.backend
    codes = backend.dictionary.codes(backend.activations(x), number)
    whole = model.dictionary.reconstruct(codes, number)
    parts = [
        replaced.outputs(x, whole - _painted(model, codes, number, some))
        for some in (
            concepts[n : n + projector.batch] for n in range(0, len(concepts), projector.batch)
        )
    ]
    return replaced.outputs(x, whole), torch.cat(parts)


@plain
def _painted(model: ConceptModel, codes: Codes, number: int, concepts: list[int]) -> Tensor:
    """(n, C, H, W): what each of n concepts alone paints into the layer of one image."""
    net, z = model.dictionary, codes.layer(number).z
    alone = z.new_zeros(len(concepts), *z.shape[1:])
    for row, concept in enumerate(concepts):
        alone[row, concept] = z[0, concept]
    image = torch.zeros(len(concepts), dtype=torch.long, device=z.device)
    return net.operator(codes, number, image)(alone) * net.preprocessing.scale


class _Sums:
    """Sums over the images of one concept."""

    def __init__(self) -> None:
        self.images, self.kl = 0, 0.0
        self.differences: Tensor | None = None

    def add(self, kl: float, differences: Tensor) -> None:
        self.images += 1
        self.kl += kl
        self.differences = differences if self.images == 1 else self.differences + differences


def _means(sums: list[_Sums]) -> Importance:
    kl, changes = (np.full(len(sums), np.nan) for _ in range(2))
    classes = np.full(len(sums), -1)
    for row, each in enumerate(sums):
        if each.images:
            kl[row] = each.kl / each.images
            classes[row] = int(each.differences.abs().argmax())
            changes[row] = float(each.differences[classes[row]]) / each.images
    return Importance(kl, classes, changes)
