"""What the gallery says of the concepts of a dictionary beyond what it says of any map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deconvnet.filters.matching import filter_cosines
from deconvnet.visualization.experiments.importance import IMAGES, Importance, importance
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.heat import Heat, heats

# Removing a concept changes no class if it changes the probability of each by less.
LEAST_CHANGE = 5e-4


@dataclass(frozen=True)
class ConceptContent:
    """The concepts that a layer shows.

    heats: by row of the projections and rank; similar: (M, M), cosines of the filters; importance:
    of each, None if the network has no classes; labels: of the classes.
    """

    heats: dict[tuple[int, int], Heat]
    similar: np.ndarray
    importance: Importance | None
    labels: tuple[str, ...] | None

    @classmethod
    def of(cls, result: VisualizationResult, layer: str) -> ConceptContent | None:
        """The content of a layer of concepts, None for any other layer."""
        model = result.projector.model
        if not (isinstance(model, ConceptModel) and layer in model.concept_layers):
            return None
        found, number = result.projections[layer], model.concept_layers.index(layer) + 1
        of_dictionary = model.dictionary.layer(number)
        f, signed = of_dictionary.filters[found.maps], not of_dictionary.settings.non_negative
        searched = result.projector, result.images, layer, found.units
        return cls(
            heats(*searched, found.values),
            filter_cosines(f, f, either_sign=signed),
            importance(*searched),
            result.model.labels,
        )

    def statistics(self, row: int) -> dict[str, str | float]:
        """What the page says of one concept, in a row of the projections."""
        if self.importance is None:
            return {}
        kl, number = float(self.importance.kl[row]), int(self.importance.classes[row])
        change = float(self.importance.changes[row])
        said: dict[str, str | float] = {"importance, nats": kl}
        if number >= 0 and abs(change) >= LEAST_CHANGE:
            name = self.labels[number] if self.labels else f"class {number}"
            sign = "−" if change < 0 else "+"
            said["without it"] = f"{name} {sign}{abs(change):.1%}"
        return said

    @property
    def notes(self) -> list[str]:
        """How the numbers of the concepts were measured."""
        if self.importance is None:
            return ["The importance of concepts is not known: this network has no classes."]
        return [
            "Importance: the mean divergence of the class probabilities, in nats, when the concept "
            f"is removed from the reconstruction of its {IMAGES} strongest images."
        ]
