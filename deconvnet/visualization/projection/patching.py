"""Another output in one layer of a network: the reconstruction by a dictionary, or a constant.

    with patch(model, "layer3", net):
        y = model(x)                                         the activations as net paints them
    y = patch(model, "layer3", net, without=[17])(x)         without what map 17 paints
    y = patch(model, "layer3", 0.0)(x)                       zero ablation

How much of the outputs such a patch keeps says whether the codes of a layer can stand for its
activations (`experiments.faithfulness`).

N images · C channels and H, W positions of the layer · K maps of the dictionary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import as_positive_integer, as_tensor
from deconvnet.visualization.projection.forward_pass import ForwardPass, split_call
from deconvnet.visualization.projection.layer_form import (
    LayerForm,
    first_tensor,
    with_first_tensor,
)
from deconvnet.visualization.projection.model_isolation import isolated
from deconvnet.visualization.projection.projection import unknown_layer

# What takes the place of activations (N, C, H, W): what a function makes of them, the
# reconstruction by a network, or a constant.
Replacement = DeconvNet | Callable[[Tensor], Tensor] | Tensor | float


class Patch:
    """A model with other activations in one of its layers, while the patch is entered.

    activations: (N, C, H, W), those of the layer in the last forward pass, before they were
    replaced; patched: (N, C, H, W), what replaced them; codes: their codes, if the replacement is a
    network. All are None before the first pass. The patch may be entered again, and called: it then
    returns the output of the model on x (N, C, H, W).
    """

    activations: Tensor | None = None
    patched: Tensor | None = None
    codes: Codes | None = None

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        replacement: Replacement,
        *,
        without: Sequence[int] = (),
        chunk: int = 8,
    ):
        self.forward_pass, self.layer = ForwardPass(model), layer
        self.model, self.chunk = model, as_positive_integer(chunk, "chunk")
        name = split_call(layer)[0]
        if name not in self.forward_pass.modules:
            raise unknown_layer(layer, list(self.forward_pass.modules))
        self.replacement = replacement
        self.without = [*without]
        if isinstance(replacement, DeconvNet):
            _check_network(replacement, self.without)
        elif self.without:
            raise ValueError(f"without={self.without}: needs a network that reconstructs the layer")
        elif not callable(replacement) and not isinstance(replacement, (int, float)):
            self.replacement = as_tensor(replacement, "replacement")
        self._module, self._call = self.forward_pass.modules[name], split_call(layer)[1]
        self._calls, self._form, self._is_resolving = 0, LayerForm(), False
        self._hooks: ExitStack | None = None

    def __enter__(self) -> Patch:
        if self._hooks is not None:
            raise ValueError(f"patch of {self.layer!r}: it is entered already")
        with ExitStack() as hooks:
            whole = self.forward_pass.model
            before = whole.register_forward_pre_hook(self._before_model, with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(self._module.register_forward_hook(self._after_layer).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        hooks, self._hooks = self._hooks, None
        hooks.close()

    def __call__(self, x: Tensor) -> object:
        """The output of the model on x (N, C, H, W), with the patch."""
        if self._hooks is not None:
            return self.model(x)
        with self:
            return self.model(x)

    def _before_model(self, model: nn.Module, inputs: tuple, named: dict) -> None:
        """Find out how the layer holds its maps for images of this size."""
        if self._is_resolving:
            return
        self._calls, x = 0, first_tensor([*inputs, *named.values()])
        if x is None or x.dim() != 4:
            given = "no tensor" if x is None else f"a tensor {tuple(x.shape)}"
            raise ValueError(f"the patched model was called with {given}: expected (N, C, H, W)")
        self._is_resolving = True
        try:
            with isolated(model):
                self._form = self.forward_pass.form(x, self.layer)
        finally:
            self._is_resolving = False

    def _after_layer(self, module: nn.Module, inputs: tuple, output: object) -> object:
        """The output of the layer with the replacement in it."""
        if self._is_resolving:
            return None
        y = first_tensor(output)
        if y is None or y.dim() not in (2, 3, 4):
            return None
        self._calls += 1
        if self._calls - 1 != self._call:
            return None
        maps = self._form.maps(y)
        self.activations = maps.detach()
        self.patched = self._replaced(self.activations)
        return with_first_tensor(output, self._form.with_maps(y, self.patched.to(y)))

    def _replaced(self, maps: Tensor) -> Tensor:
        given = self.replacement
        if isinstance(given, DeconvNet):
            return self._reconstructed(given, maps)
        if callable(given):
            made = given(maps)
            shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        else:
            made = torch.as_tensor(given).to(maps)
            shape = tuple(made.shape)
            # A number of each channel is the same in all positions.
            made = made[:, None, None] if made.dim() == 1 else made
            made = made.expand_as(maps) if _broadcasts(made, maps) else made
        if not isinstance(made, Tensor) or made.shape != maps.shape:
            raise ValueError(
                f"replacement of layer {self.layer!r} is {shape}: expected {tuple(maps.shape)}, or "
                "as a constant a number, (C,) or (C, H, W)"
            )
        return made.detach()

    @plain
    def _reconstructed(self, net: DeconvNet, maps: Tensor) -> Tensor:
        channels = net.preprocessing.channels
        if maps.shape[1] != channels:
            raise ValueError(
                f"layer {self.layer!r} has {maps.shape[1]} channels, and the network takes "
                f"{channels}"
            )
        self.codes = net.infer(maps.float(), chunk=self.chunk)
        return net.reconstruct(without_maps(self.codes, self.without))


def patch(
    model: nn.Module,
    layer: str,
    replacement: Replacement,
    *,
    without: Sequence[int] = (),
    chunk: int = 8,
) -> Patch:
    """A context in which a layer of a model has other activations.

    model: any module that takes images (N, C, H, W); its mode, parameters and hooks are not
    changed, and everything is removed on leaving the context, also after an exception. layer: a
    name that `Projector.layers` lists. replacement: a network for arrays, which puts its
    reconstruction of the activations in their place; a number or a tensor (C,) or (C, H, W), such
    as 0.0 or the mean of each channel; or a function of the activations (N, C, H, W). without: maps
    of the highest layer of the network that are set to zero before the reconstruction. chunk:
    images whose codes are inferred at a time.

    No gradient passes a reconstruction. Of a vision transformer, tokens beside the grid of patches
    (the class token) keep their activations. Raises ValueError in one line if the layer does not
    exist or the replacement does not fit it.
    """
    return Patch(model, layer, replacement, without=without, chunk=chunk)


def without_maps(codes: Codes, maps: Sequence[int]) -> Codes:
    """The codes with these maps of the highest layer set to zero."""
    if not len(maps):
        return codes
    *below, highest = codes.layers
    z = highest.z.clone()
    z[:, list(maps)] = 0
    highest = replace(highest, pooled=z, switches=None, dense=None)
    return replace(codes, layers=(*below, highest))


def _check_network(net: DeconvNet, without: Sequence[int]) -> None:
    if not net.preprocessing.are_arrays:
        color = net.preprocessing.settings.color
        raise ValueError(
            f"the network takes images (preprocessing.color={color}), not activations: learn it "
            "from activations, with preprocessing.color=none"
        )
    count = net.layer(net.depth).settings.num_maps
    for number in without:
        if not (isinstance(number, int) and 0 <= number < count):
            raise ValueError(f"without={number}: the network has maps 0 to {count - 1}")


def _broadcasts(constant: Tensor, maps: Tensor) -> bool:
    sizes = zip(constant.shape[::-1], maps.shape[::-1], strict=False)
    return constant.dim() in (0, 3) and all(size in (1, whole) for size, whole in sizes)
