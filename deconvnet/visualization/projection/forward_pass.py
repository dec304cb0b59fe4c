"""Forward passes of a torch module: which layers it calls, and their outputs.

The model itself is not changed. Only the requested layers have forward hooks, and a pass stops once
it has reached them, so later operations, including those in place on the output of a layer, have no
effect.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from deconvnet.visualization.models.model_error import ModelError, described
from deconvnet.visualization.projection import autograd_graph
from deconvnet.visualization.projection.backward_rules import SkippedNormalization
from deconvnet.visualization.projection.field_geometry import FieldGeometries, FieldGeometry
from deconvnet.visualization.projection.hidden_dependence import DependenceTracker, differing_calls
from deconvnet.visualization.projection.layer_form import LayerForm, first_tensor
from deconvnet.visualization.projection.map_axis import MapAxes
from deconvnet.visualization.projection.model_isolation import check_model, unwrap
from deconvnet.visualization.projection.projection import LayerInfo, suggest_layers, unknown_layer
from deconvnet.visualization.projection.token_grids import TokenGrid, TokenGrids

# Further images passed through the model to find constants that depend on the image.
OTHER_IMAGES = 2

logger = logging.getLogger(__name__)

# Called with the name of a module, the number of its call, its output, and the leaf.
Note = Callable[[str, int, Tensor, Tensor], None]


@dataclass(frozen=True)
class LayerOutput:
    """The output of a layer, with the graph that leads to it.

    leaf: (N, C, H, W), the images; y: the output as the module returned it; form: how it holds the
    maps; marked: by node, how the pixels enter it without a gradient.
    """

    leaf: Tensor
    y: Tensor
    form: LayerForm
    marked: dict[Node, str]

    @property
    def maps(self) -> Tensor:
        """(N, K, H, W), the output as maps."""
        return self.form.maps(self.y)

    def as_output(self, maps: Tensor) -> Tensor:
        """Maps (N, K, H, W) in the shape of y; zeros in tokens beside the grid."""
        return self.form.with_maps(torch.zeros_like(self.y), maps)


class ForwardPass:
    """Runs a model on images, up to some of its layers. To be used within `isolated`.

    skip_normalization, an argument of its methods: the backward pass skips contrast normalisation.
    """

    def __init__(self, model: nn.Module):
        self.model = check_model(unwrap(model))
        # TorchScript takes no hooks: a scripted part is passed, but it is not a layer.
        self.modules = {
            name: module
            for name, module in self.model.named_modules()
            if name and not isinstance(module, torch.jit.ScriptModule)
        }
        # Of layers, by the shape of an image, on which the calls of a model may depend.
        self._names: dict[tuple[int, ...], list[str]] = {}
        # Calls of modules whose maps are (N, H, W, K).
        self._maps_last: set[tuple[str, int]] = set()
        # Calls of modules whose output is tokens, for each shape of an image.
        self._grids: dict[tuple[str, int, tuple[int, ...]], TokenGrid] = {}
        # Why the output of a module is not maps.
        self._not_maps: dict[str, str] = {}
        self._not_called = "the model does not call it for these images"
        self._suspects: dict[tuple[str, bool], frozenset[int]] = {}

    def layers(
        self,
        x: Tensor,
        *,
        skip_normalization: bool = True,
        constant_gates: bool = True,
        constant_statistics: bool = True,
    ) -> list[LayerInfo]:
        """The layers that the first of some images x passes, in their order.

        constant_gates, constant_statistics: units see nothing through sigmoids that multiply maps,
        and through the statistics of layer and group normalisation.
        """
        outputs: list[tuple[str, int, Tensor, Node | None]] = []
        leaves: list[Tensor] = [x]

        def note(name: str, call: int, y: Tensor, leaf: Tensor) -> None:
            leaves[0] = leaf
            # The node of y now: an operation in place on y later gives it another one.
            outputs.append((name, call, y, y.grad_fn))

        with torch.enable_grad():
            calls = self._run(x[:1].detach(), note, skip_normalization=skip_normalization)
            found = [y for *_, y, node in outputs if node is not None]
            autograd_graph.record_shapes(found, parts=True)
        axes = MapAxes()
        self._maps_last |= {(name, call) for name, call, _, node in outputs if axes.is_last(node)}
        grids = TokenGrids(axes)
        for name, call, _, node in outputs:
            if (grid := grids.of(node)) is not None:
                self._grids[name, call, x.shape[1:]] = grid
        # Heads and weights of attention are no maps, although they may have four dimensions.
        outputs = [
            output for output in outputs if output[2].dim() != 4 or not grids.is_inside(output[3])
        ]
        geometries = FieldGeometries(
            leaves[0], constant_gates=constant_gates, constant_statistics=constant_statistics
        )
        infos, names = [], []
        for name, call, y, node in outputs:
            if self._is_layer(y, name, call, x.shape[1:]):
                names.append(_call_name(name, call, calls))
            # A table that a model makes of its parameters alone is not a layer.
            if node is None or not self._is_layer(y, name, call, x.shape[1:]):
                continue
            maps = self._form(name, call, x.shape[1:]).maps(y)
            kind, shape = type(self.modules[name]).__name__, tuple(maps.shape)
            info = LayerInfo(_call_name(name, call, calls), kind, shape[1:])
            infos.append(_located(info, geometries.at(node)) if y.dim() == 4 else info)
        self._names[x.shape[1:]] = names
        return infos

    def responses(
        self, x: Tensor, layers: list[str], reduce: Callable[[str, Tensor], object]
    ) -> dict[str, object]:
        """{layer: reduce(layer, maps (N, K, H, W))}; maps of vectors have one position."""
        requested = self._resolve(x, layers)
        results: dict[str, object] = {}

        def note(name: str, call: int, y: Tensor, leaf: Tensor) -> None:
            layer = requested.get((name, call))
            if layer is None:
                return
            results[layer] = reduce(layer, self._form(name, call, x.shape[1:]).maps(y))
            if len(results) == len(requested):
                raise _Reached

        self._run(x, note, {name for name, _ in requested})
        return results

    def outputs(self, x: Tensor) -> Tensor | None:
        """(N, classes): the output of the whole model; None if the output is not a table."""
        try:
            y = first_tensor(self.model(x.detach().clone()))
        except Exception as error:
            raise self._failure(x, error) from error
        return y if y is not None and y.dim() == 2 else None

    def up_to(
        self, x: Tensor, layer: str, *, skip_normalization: bool, checked: bool = False
    ) -> LayerOutput:
        """The output of a layer for images x (N, C, H, W).

        checked: the name of the layer is known to exist, from images of another size.
        """
        name, call = split_call(layer)
        leaf, y, tracker = self._up_to(x, layer, skip_normalization, checked=checked)
        return LayerOutput(leaf, y, self._form(name, call, x.shape[1:]), tracker.marked)

    def form(self, x: Tensor, layer: str) -> LayerForm:
        """How the output of a layer holds its maps for images of the size of x (N, C, H, W)."""
        (call,) = self._resolve(x, [layer])
        return self._form(*call, x.shape[1:])

    def find_suspects(self, x: Tensor, layer: str, *, skip_normalization: bool) -> None:
        """Find constants below a layer that depend on the image although this cannot be followed:
        they differ for other images."""
        key = layer, skip_normalization
        if key in self._suspects:
            return
        tracker = self._up_to(x, layer, skip_normalization)[2]
        generator = torch.Generator().manual_seed(0)
        suspects: frozenset[int] = frozenset()
        for _ in range(OTHER_IMAGES):
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
            try:
                image = 0.75 * x.flip(1, 2, 3) + 0.1 * noise
                other = self._up_to(image, layer, skip_normalization)[2]
            except Exception:  # a model may raise anything for an unexpected image
                break
            suspects |= differing_calls(tracker, other)
        self._suspects[key] = suspects

    def _up_to(
        self, x: Tensor, layer: str, skip_normalization: bool, *, checked: bool = False
    ) -> tuple[Tensor, Tensor, DependenceTracker]:
        """The leaf that holds x, the output of the layer, and what was tracked on the way."""
        ((name, call),) = [split_call(layer)] if checked else self._resolve(x, [layer])
        reached: list[tuple[Tensor, Tensor]] = []

        def note(module: str, number: int, y: Tensor, leaf: Tensor) -> None:
            if (module, number) == (name, call):
                reached.append((leaf, y))
                raise _Reached

        tracker = DependenceTracker(self._suspects.get((layer, skip_normalization)))
        self._run(x, note, {name}, tracker, skip_normalization=skip_normalization)
        if not reached:
            raise ValueError(f"layer {layer!r}: the model does not call it for these images")
        leaf, y = reached[0]
        if y.grad_fn is None:
            raise ValueError(f"layer {layer!r}: its output does not depend on the image")
        return leaf, y, tracker

    def _is_layer(self, y: Tensor, name: str, call: int, image: tuple[int, ...]) -> bool:
        return y.dim() != 3 or (name, call, image) in self._grids

    def _form(self, name: str, call: int, image: tuple[int, ...]) -> LayerForm:
        """How a call of a module holds its maps; image: the shape of an image."""
        return LayerForm((name, call) in self._maps_last, self._grids.get((name, call, image)))

    def _resolve(self, x: Tensor, layers: list[str]) -> dict[tuple[str, int], str]:
        """{(module, number of the call): layer} for names of layers."""
        if x.shape[1:] not in self._names:
            self.layers(x)
        names = self._names[x.shape[1:]]
        for layer in layers:
            if layer not in names:
                raise self._no_layer(layer, names)
        return {split_call(layer): layer for layer in layers}

    def _no_layer(self, layer: str, names: list[str]) -> ValueError:
        """The error for a name that is not a layer, with the reason if it is a module."""
        if not isinstance(layer, str):
            return unknown_layer(layer, names)
        name = split_call(layer)[0]
        module = dict(self.model.named_modules()).get(name) if name else None
        if module is None or any(split_call(other)[0] == name for other in names):
            return unknown_layer(layer, names)
        if isinstance(module, torch.jit.ScriptModule):
            reason = "it is TorchScript, which cannot be inspected"
        else:
            reason = self._not_maps.get(name, self._not_called)
        return ValueError(f"layer {layer!r}: {reason}; {suggest_layers(layer, names)}")

    def _failure(self, x: Tensor, error: Exception) -> ModelError:
        """A one-line error for an exception of the model itself on images x."""
        shape = "x".join(map(str, x.shape[1:]))
        return ModelError(
            f"the model {type(self.model).__name__} fails on images of {shape}"
            f"{self._place(error)}: {described(error, longest=300)}"
        )

    def _place(self, error: Exception) -> str:
        """Where the model raised an error: the innermost of its modules that was called."""
        names = {id(module): name for name, module in self.model.named_modules() if name}
        called = [
            frame.f_locals.get("self")
            for frame, _ in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_name == "_call_impl"
        ]
        inner = [module for module in called if id(module) in names]
        return f" in {names[id(inner[-1])]} ({type(inner[-1]).__name__})" if inner else ""

    def _run(
        self,
        x: Tensor,
        note: Note,
        names: set[str] | None = None,
        tracker: DependenceTracker | None = None,
        *,
        skip_normalization: bool = False,
    ) -> Counter[str]:
        """Run the model on x; call `note` for the outputs of the named (by default all) modules.

        Returns how often each module was called. If the model fails, the layers before the failure
        still count: a head often requires one size of images, but the layers below it do not.
        """
        calls: Counter[str] = Counter()
        own_errors: list[Exception] = []
        leaf = x.detach().clone().requires_grad_(torch.is_grad_enabled())

        def hook(name: str) -> Callable[[nn.Module, tuple, object], None]:
            def after_call(module: nn.Module, inputs: tuple, output: object) -> None:
                y = first_tensor(output)
                self._not_maps[name] = _description(y, len(leaf))
                # Not if the model folds something into the dimension of the images.
                if y is not None and y.dim() in (2, 3, 4) and len(y) == len(leaf):
                    calls[name] += 1
                    try:
                        note(name, calls[name] - 1, y, leaf)
                    except Exception as error:
                        own_errors.append(error)
                        raise

            return after_call

        with ExitStack() as stack:
            for name, module in self.modules.items():
                if names is None or name in names:
                    stack.callback(module.register_forward_hook(hook(name)).remove)
            if skip_normalization:
                stack.enter_context(SkippedNormalization())
            if tracker is not None:
                tracker.begin(leaf)
                stack.callback(tracker.finish)
                stack.enter_context(tracker)
            try:
                # A copy: a model that begins with an operation in place may not write to a leaf.
                self.model(leaf.clone())
            except _Reached:
                pass
            except Exception as error:
                if not own_errors and (names is not None or not calls):
                    raise self._failure(x, error) from error
                if not own_errors:
                    reason = described(error, longest=300)
                    self._not_called = f"the model fails before it: {reason}"
                    logger.warning("the model fails above its layers: %s", reason)
            if own_errors:  # which the model may have caught
                raise own_errors[0]
        return calls


class _Reached(BaseException):
    """The layer has its output. Not an Exception, so that no model catches it."""


def _located(info: LayerInfo, geometry: FieldGeometry | None) -> LayerInfo:
    if geometry is None or not any(geometry.stride) or not all(geometry.size):
        return info
    return replace(info, field=geometry.size, stride=geometry.stride, offset=geometry.offset)


def _description(y: Tensor | None, images: int) -> str:
    """Why the output of a module is not maps."""
    if y is None:
        return "it returns no tensor"
    images_first = y.dim() > 0 and len(y) == images
    shape = ", ".join(["N"] * images_first + list(map(str, y.shape[images_first:])))
    is_table = images_first and y.dim() == 3
    kind = "not tokens of a grid of patches" if is_table else "not maps (N, K, H, W)"
    return f"its output is ({shape}): {kind}"


def split_call(layer: str) -> tuple[str, int]:
    """The name of the module, and the number of the call."""
    module, _, call = layer.partition("#")
    return module, int(call) if call.isdigit() else 0


def _call_name(name: str, call: int, calls: Counter[str]) -> str:
    """The name of a module, with the number of the call if it is called more than once."""
    return f"{name}#{call}" if calls[name] > 1 else name
