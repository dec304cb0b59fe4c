"""Units of a network in the space of the image: one interface for every network.

    projector = Projector(model)
    found = projector(x, "features.8", units=[(0, 17, 5, 6)])      image, map, row, column
    found.images, found.boxes, found.values, found.report

For a trained network the way down is its own backward pass under the rules of Zeiler and Fergus
(ECCV 2014, section 2.1; `rules`). For a network learned by deconvolution it is the generative model
with the switches of inference (Zeiler et al. 2011).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deconvnet.network.network import DeconvNet
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.projection.cnn_backend import CnnBackend
from deconvnet.visualization.projection.deconvnet_backend import DeconvNetBackend
from deconvnet.visualization.projection.pixel_features import signed_rgb
from deconvnet.visualization.projection.projection import LayerInfo, Projection, Units, check_input


class Projector:
    """Projects units of a network into the space of its input.

    model: any module that takes images (N, C, H, W), or a DeconvNet, which takes pixels in [0, 1].
    It is used in evaluation mode, and left as it was.

    method: deconv (the default) | guided | gradient; of a DeconvNet always generative.
    strict: refuse a layer below which stands an operation that the method has no rule for; else
    its gradient is used, and the report says so. gates: sigmoids that multiply maps (squeeze and
    excitation) are constant on the way down, or have their "gradient". overlap: "normalised"
    divides out the pattern that a transposed convolution leaves where its stride does not divide
    its kernel. normalization: what is done to pixels before the model sees them, for `prepare` and
    `signed_rgb`. batch: images that go through the model at a time, which bounds memory. local:
    compute transposed convolutions only where there is a signal: many times faster, equal up to
    rounding; without it the result is that of the full backward pass to the bit.
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
                raise ValueError(f"method={method}: of a DeconvNet it is always generative")
            self.method = "generative"
            self.network = DeconvNetBackend(model, batch=batch)
        else:
            self.method = method or "deconv"
            self.network = CnnBackend(
                model,
                method=self.method,
                strict=strict,
                gates=gates,
                overlap=overlap,
                batch=batch,
                local=local,
            )

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def device(self) -> torch.device:
        return self.network.device

    def layers(self, x: Tensor) -> list[LayerInfo]:
        """The layers that can be projected, in the order in which x (N, C, H, W) passes them.

        A module that is called more than once has a number behind its name for each call: relu#0.
        """
        x = check_input(x)
        return self.network.layers(x)

    def __call__(
        self, x: Tensor, layer: str, units: Units, *, seeds: Tensor | None = None
    ) -> Projection:
        """Units of a layer, each projected alone, with the switches of its image.

        x: (N, C, H, W), as the model takes it. units: rows of (image in x, map, row, column);
        layers of vectors have row and column 0. seeds: (U,), what goes down from each unit; by
        default its activation. Of the projection it only sets the scale, as long as it is positive.
        """
        x = check_input(x)
        if seeds is not None and tuple(seeds.shape) != (len(units),):
            raise ValueError(
                f"seeds of shape {tuple(seeds.shape)} for {len(units)} units: expected one for each"
            )
        return self.network.project(x, layer, units, seeds)

    def responses(
        self,
        x: Tensor,
        layers: list[str],
        reduce: Callable[[str, Tensor], object] = lambda layer, maps: maps.clone(),
    ) -> dict[str, Tensor]:
        """{layer: (N, K, H, W)}: how strongly all units of some layers respond to x.

        Activations; of a DeconvNet, whose maps have signs, their magnitudes. Vectors come as maps
        of one place. reduce: what is kept of the name and the maps of each layer, before the model
        goes on; by default the maps.
        """
        x = check_input(x)
        return self.network.responses(x, layers, reduce)

    def outputs(self, x: Tensor) -> Tensor | None:
        """(N, classes): what the whole model makes of x; None if it is no such table."""
        x = check_input(x)
        return self.network.outputs(x)

    def prepare(self, pixels: Tensor) -> Tensor:
        """RGB pixels (N, 3, H, W) in [0, 1] as the model takes them, on its device."""
        pixels = pixels.to(self.device)
        return pixels if self.is_deconvnet else self.normalization.apply(pixels)

    def signed_rgb(self, images: Tensor) -> Tensor:
        """Projections (U, C, H, W) as signed red, green and blue (U, 3, H, W); zero is grey."""
        if self.is_deconvnet:
            return signed_rgb(self.model, images).expand(-1, 3, -1, -1)
        return self.normalization.signed_rgb(images)
