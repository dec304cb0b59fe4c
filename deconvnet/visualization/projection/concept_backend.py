"""Projections of the concepts of a dictionary over a layer of a trained network.

A concept is projected in two steps: the dictionary paints its activation into the maps of the
layer, with the filter of the concept, and from there this pattern is sent down through the network
like any signal (`cnn_backend`). The layers of the network itself are projected as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.projection.backward_rules import AUTO
from deconvnet.visualization.projection.cnn_backend import CnnBackend
from deconvnet.visualization.projection.deconvnet_backend import DeconvNetBackend
from deconvnet.visualization.projection.feature_projection import layer_field, project_units
from deconvnet.visualization.projection.field_geometry import FieldGeometry
from deconvnet.visualization.projection.projection import (
    CONCEPTS,
    LayerInfo,
    Projection,
    check_units,
)
from deconvnet.visualization.projection.starts import Footprint, Patterns, Starts


class ConceptBackend:
    """Layers, responses and projections of a network with a dictionary; see `Projector`."""

    def __init__(self, model: ConceptModel, cnn: CnnBackend, *, batch: int):
        self.model, self.cnn, self.batch = model, cnn, batch
        self.dictionary = DeconvNetBackend(model.dictionary, batch=batch)
        # By name of a concept layer, its name in the dictionary.
        self.names = dict(zip(model.concept_layers, self.dictionary.names, strict=True))

    @property
    def device(self) -> torch.device:
        return self.cnn.device

    def layers(self, x: Tensor) -> list[LayerInfo]:
        infos = self.cnn.layers(x)
        at = next((n for n, info in enumerate(infos) if info.name == self.model.layer), None)
        if at is None:
            self.activations(x[:1])  # which says what is wrong with the name
            raise ValueError(f"layer {self.model.layer!r}: its receptive fields are not known")
        below = infos[at]
        maps = self.dictionary.layers(torch.empty(1, *below.shape))
        concepts = [
            self._info(name, info, below) for name, info in zip(self.names, maps, strict=True)
        ]
        return [*infos[: at + 1], *concepts, *infos[at + 1 :]]

    def _info(self, name: str, info: LayerInfo, below: LayerInfo) -> LayerInfo:
        """The layer of concepts above a layer of the network; info: its maps in the dictionary."""
        located = LayerInfo(name, CONCEPTS, info.shape)
        if below.field is None:
            return located
        fields = self._footprint(name).fields(
            FieldGeometry(below.offset, below.field, below.stride)
        )
        return replace(located, field=fields.size, stride=fields.stride, offset=fields.offset)

    def activations(self, x: Tensor) -> Tensor:
        """(N, C, H, W): the maps of the layer that the dictionary explains, float32."""
        layer = self.model.layer
        return self.cnn.responses(x, [layer], lambda _, maps: maps.float().clone())[layer]

    def responses(
        self, x: Tensor, layers: list[str], reduce: Callable[[str, Tensor], object]
    ) -> dict[str, object]:
        own = [layer for layer in layers if layer not in self.names]
        found = self.cnn.responses(x, own, reduce) if own else {}
        concepts = {self.names[layer]: layer for layer in layers if layer in self.names}
        if concepts:
            maps = self.activations(x)
            reduced = self.dictionary.responses(
                maps, list(concepts), lambda name, z: reduce(concepts[name], z)
            )
            found |= {concepts[name]: value for name, value in reduced.items()}
        return {layer: found[layer] for layer in layers}

    def contributions(self, x: Tensor, layer: str, units: Tensor | list, below: str) -> Tensor:
        """See `Projector.contributions`. Of a concept only the layer that it explains contributes:
        the share of each channel in the product of the activations there with its filter."""
        if layer not in self.names:
            return self.cnn.contributions(x, layer, units, below)
        units = check_units(units, len(x), layer)
        if below != self.model.layer:
            return x.new_zeros(len(units), self._channels(x, below))
        patterns = self._patterns(x, layer, units, None)
        y = self._centred(self.activations(x))[units[:, 0].to(self.device)]
        products = (patterns.signals * y).sum((2, 3))
        totals = products.sum(1, keepdim=True)
        shares = products / torch.where(totals > 0, totals, torch.ones_like(totals))
        return shares * patterns.values.to(shares)[:, None]

    def outputs(self, x: Tensor) -> Tensor | None:
        return self.cnn.outputs(x)

    def methods_of(self, x: Tensor, layer: str) -> tuple[str, ...]:
        """Those of the layer that is explained; of concepts, without deconv if auto does not put it
        first, as the picture of a concept is then the same in every image."""
        methods = self.cnn.methods_of(x, self.model.layer if layer in self.names else layer)
        if layer in self.names and self.cnn.method == AUTO and methods[0] == "guided":
            return methods[:1]
        return methods

    def project(
        self,
        x: Tensor,
        layer: str,
        units: Tensor | list,
        seeds: Tensor | None,
        methods: Sequence[str],
    ) -> dict[str, Projection]:
        if layer not in self.names:
            return self.cnn.project(x, layer, units, seeds, methods)
        units = check_units(units, len(x), layer)
        starts = Starts(units)
        if len(units):
            starts = replace(starts, patterns=self._patterns(x, layer, units, seeds))
        return self.cnn.project_starts(x, self.model.layer, starts, methods)

    def _patterns(self, x: Tensor, layer: str, units: Tensor, seeds: Tensor | None) -> Patterns:
        """What units of a concept layer paint into the maps of the layer of the network."""
        number = self.dictionary.names.index(self.names[layer]) + 1
        images, n = torch.unique(units[:, 0], return_inverse=True)
        codes = self.dictionary.codes(self.activations(x[images.to(x.device)]), number)
        check_units(units, len(x), layer, codes.layer(number).shape)
        net = self.dictionary.model
        positions = tuple(index.to(net.device) for index in (n, *units[:, 1:].unbind(1)))
        values = codes.layer(number).z[positions]
        coefficients = values if seeds is None else seeds.to(values)
        painted = torch.stack(list(project_units(net, codes, number, positions, coefficients)))
        # In the units of the maps; what the preprocessing subtracts is no part of a concept.
        signals = painted * net.preprocessing.scale
        return Patterns(signals.to(self.device), values, self._footprint(layer))

    def _footprint(self, layer: str) -> Footprint:
        number = self.dictionary.names.index(self.names[layer]) + 1
        axes = [layer_field(self.dictionary.model, number, axis) for axis in (0, 1)]
        return Footprint(
            *(tuple(getattr(axis, key) for axis in axes) for key in ("offset", "size", "stride"))
        )

    def _centred(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) as the dictionary explains them, in their own units."""
        preprocessing = self.dictionary.model.preprocessing
        return preprocessing(maps)[0].to(maps) * preprocessing.scale.to(maps)

    def _channels(self, x: Tensor, layer: str) -> int:
        return next(info.shape[0] for info in self.layers(x[:1]) if info.name == layer)
