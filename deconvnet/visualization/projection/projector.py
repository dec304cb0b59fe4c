"""The projector: projects units of any network to the image, with one interface for all networks.

    projector = Projector(model)
    projection = projector(x, "features.8", units=[(0, 17, 5, 6)])     image, map, row, column
    projection.images, projection.boxes, projection.values, projection.report
    projector.by_method(x, "features.8", units)["guided"]              the same in several methods

A CNN is run backwards, with the rules of Zeiler and Fergus (ECCV 2014, section 2.1;
`backward_rules`). A deconvolutional network is its own generative model, with the switches of
inference (Zeiler et al. 2011). A concept of a dictionary over a layer of a CNN is first painted
into this layer by the dictionary, and then sent down through the CNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from deconvnet.network.network import DeconvNet
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.projection.backward_rules import AUTO, METHODS
from deconvnet.visualization.projection.cnn_backend import CnnBackend
from deconvnet.visualization.projection.concept_backend import ConceptBackend
from deconvnet.visualization.projection.deconvnet_backend import DeconvNetBackend
from deconvnet.visualization.projection.feature_projection import shown_pixels, signed_rgb
from deconvnet.visualization.projection.projection import (
    LayerInfo,
    Projection,
    Source,
    Units,
    check_input,
)


class Projector:
    """Projects units of a network into the space of its input.

    model: any module that takes images (N, C, H, W), or a DeconvNet, which takes pixels in [0, 1].
    It runs in evaluation mode and is not changed. Of a `ConceptModel`, the concepts are one more
    layer: each is projected by what it paints into the maps of the layer that it explains.

    method: deconv, guided, gradient, or auto (the default), which depends on the layer: deconv if
    a switch of max pooling lies between the layer and the pixels, else guided, as the picture of
    deconv would not depend on the image. A DeconvNet is always generative.
    strict: if an operation below a layer has no rule, refuse deconv and guided, and let auto choose
    the gradient, with a warning; otherwise the gradient of that operation is used, and the report
    says so.
    gates: sigmoids that multiply maps (squeeze and excitation) are constant on the way down, or
    have their "gradient".
    overlap: "normalised" divides out the pattern that a transposed convolution leaves if its stride
    does not divide its kernel.
    normalization: how pixels are normalised for the model; for `prepare` and `signed_rgb`.
    batch: images that go through the model at a time, which bounds memory.
    local: compute transposed convolutions only where there is a signal. This is many times faster
    and equal up to rounding; without it, the result is bit-equal to the full backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str | None = None,
        strict: bool = True,
        gates: str = "constant",
        overlap: str = "sum",
        normalization: Normalization | None = None,
        batch: int = 8,
        local: bool = True,
    ):
        if batch < 1:
            raise ValueError(f"batch={batch}: must be at least 1")
        self.normalization = normalization or Normalization()
        self.is_deconvnet = isinstance(model, DeconvNet)
        self.batch = batch
        if self.is_deconvnet:
            if method not in (None, "generative"):
                raise ValueError(f"method={method}: a DeconvNet is always projected as generative")
            self.method = "generative"
            self.backend = DeconvNetBackend(model, batch=batch)
        else:
            self.method = method or AUTO
            has_concepts = isinstance(model, ConceptModel)
            cnn = CnnBackend(
                model.base if has_concepts else model,
                method=self.method,
                strict=strict,
                gates=gates,
                overlap=overlap,
                batch=batch,
                local=local,
            )
            self.backend = ConceptBackend(model, cnn, batch=batch) if has_concepts else cnn

    @property
    def model(self) -> nn.Module:
        return self.backend.model

    @property
    def device(self) -> torch.device:
        return self.backend.device

    def layers(self, x: Tensor) -> list[LayerInfo]:
        """The layers that can be projected, in the order in which x (N, C, H, W) passes them.

        If a module is called more than once, the number of the call follows its name: relu#0.
        """
        return self.backend.layers(check_input(x))

    def methods_of(self, x: Tensor, layer: str) -> tuple[str, ...]:
        """The methods in which a layer should be shown, its own first; x: (N, C, H, W).

        These are deconv and guided, in the order that auto chooses or that the projector was made
        with; only gradient where the others have no rules, or if it was asked for; only generative
        for a DeconvNet. Costs a few forward passes of one image, once for each layer.
        """
        return self.backend.methods_of(check_input(x), layer)

    def __call__(
        self,
        x: Tensor,
        layer: str,
        units: Units,
        *,
        seeds: Tensor | None = None,
        method: str | None = None,
    ) -> Projection:
        """Project units of a layer, each separately, with the switches of its image.

        x: (N, C, H, W), the model's input. units: rows of (image in x, map, row, column); layers of
        vectors have row and column 0. seeds: (U,), the starting value at each unit, by default its
        activation. A positive seed only scales the projection. method: by default the first of
        `methods_of`.
        """
        method = method or self.methods_of(x, layer)[0]
        return self.by_method(x, layer, units, seeds=seeds, methods=[method])[method]

    def by_method(
        self,
        x: Tensor,
        layer: str,
        units: Units,
        *,
        seeds: Tensor | None = None,
        methods: Sequence[str] | None = None,
    ) -> dict[str, Projection]:
        """{method: projection}: the same units in several methods, by default all of `methods_of`.

        deconv and guided share the forward pass, so both together cost less than twice as much as
        one. Other arguments: see `__call__`.
        """
        x = check_input(x)
        if seeds is not None and tuple(seeds.shape) != (len(units),):
            raise ValueError(
                f"seeds of shape {tuple(seeds.shape)} for {len(units)} units: expected one for each"
            )
        known = ("generative",) if self.is_deconvnet else METHODS
        for method in methods or ():
            if method not in known:
                raise ValueError(f"method={method}: choose one of {', '.join(known)}")
        methods = self.methods_of(x, layer) if methods is None else methods
        projections = self.backend.project(x, layer, units, seeds, methods)
        source = Source(self, x, layer)
        return {key: replace(found, source=source) for key, found in projections.items()}

    def responses(
        self,
        x: Tensor,
        layers: list[str],
        reduce: Callable[[str, Tensor], object] = lambda layer, maps: maps.clone(),
    ) -> dict[str, Tensor]:
        """{layer: (N, K, H, W)}: the responses of all units of these layers to x.

        Responses are activations; for a DeconvNet, whose maps have signs, their magnitudes. Vectors
        become maps with one position. reduce: a function of a layer's name and maps; what it
        returns is kept instead of the maps.
        """
        return self.backend.responses(check_input(x), layers, reduce)

    def contributions(self, x: Tensor, layer: str, units: Units, below: str) -> Tensor:
        """(U, C): how much each map of the layer `below` contributes to the activation of a unit.

        The gradient times the maps, summed over positions. Where everything between the two layers
        is linear or rectified, a unit is the sum of its contributions and those of the biases. Zero
        if the layer does not see the other. Not for a DeconvNet, whose maps are inferred.
        """
        return self.backend.contributions(check_input(x), layer, units, below)

    def outputs(self, x: Tensor) -> Tensor | None:
        """(N, classes): the output of the whole model; None if the output is not a table."""
        return self.backend.outputs(check_input(x))

    def prepare(self, pixels: Tensor) -> Tensor:
        """Convert RGB pixels (N, 3, H, W) in [0, 1] to the model's input, on its device.

        A DeconvNet for arrays takes these, (N, C, H, W).
        """
        pixels = pixels.to(self.device)
        return pixels if self.is_deconvnet else self.normalization.apply(pixels)

    def shown(self, pixels: Tensor) -> Tensor:
        """RGB pixels (N, 3, H, W) for pictures, from what `prepare` takes.

        They are the same, except for a DeconvNet that takes arrays of other channels.
        """
        is_array = self.is_deconvnet and self.model.preprocessing.are_arrays
        return shown_pixels(self.model, pixels) if is_array else pixels

    def pixels(self, x: Tensor) -> Tensor:
        """Convert the model's input (N, C, H, W) to RGB pixels (N, 3, H, W), clipped to [0, 1]."""
        pixels = shown_pixels(self.model, x) if self.is_deconvnet else self.normalization.pixels(x)
        return pixels.clamp(0, 1)

    def signed_rgb(self, images: Tensor) -> Tensor:
        """Projections (U, C, H, W) as signed red, green and blue (U, 3, H, W), in units of pixels;
        zero is grey."""
        if self.is_deconvnet:
            return signed_rgb(self.model, images).expand(-1, 3, -1, -1)
        return self.normalization.signed_rgb(images)
