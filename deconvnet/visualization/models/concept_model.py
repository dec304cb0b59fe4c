"""A network together with a dictionary over the activations of one of its layers."""

from __future__ import annotations

from torch import Tensor, nn

from deconvnet.network.network import DeconvNet


class ConceptModel(nn.Module):
    """A network whose layer `layer` a dictionary explains; called, it is the network itself.

    base: any module that takes images (N, C, H, W); layer: as `Projector` names it; dictionary: a
    deconvolutional network that takes the maps of this layer. Its maps are called concepts, and are
    one more layer of the network: "concepts" or, if it has several layers, "concepts1" and so on.
    """

    def __init__(self, base: nn.Module, layer: str, dictionary: DeconvNet):
        super().__init__()
        if not dictionary.preprocessing.are_arrays:
            color = dictionary.preprocessing.settings.color
            raise ValueError(
                f"the dictionary takes images (preprocessing.color={color}), not the maps of "
                f"layer {layer!r}"
            )
        self.base, self.layer, self.dictionary = base, layer, dictionary

    @property
    def concept_layers(self) -> list[str]:
        """The names of the layers of the dictionary, lowest first."""
        depth = self.dictionary.depth
        return ["concepts"] if depth == 1 else [f"concepts{n}" for n in range(1, depth + 1)]

    def forward(self, x: Tensor) -> object:
        return self.base(x)
