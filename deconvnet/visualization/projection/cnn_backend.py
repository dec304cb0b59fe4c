"""Projections of any network that was trained: its own backward pass, under other rules.

The forward pass is that of the unchanged model. Nothing is hooked but the layer that is asked for,
where the pass also stops: whatever stands above, and whatever is done in place to the layer's
output afterwards, plays no part.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from deconvnet.visualization.projection import autograd_graph
from deconvnet.visualization.projection.backward_rules import (
    METHODS,
    OVERLAPS,
    BackwardRules,
    SkippedNormalization,
    node_rules,
    overlaps_unevenly,
)
from deconvnet.visualization.projection.hidden_dependence import DependenceTracker, differing_calls
from deconvnet.visualization.projection.local_windows import WindowPlan, plan_windows
from deconvnet.visualization.projection.map_axis import MapAxes
from deconvnet.visualization.projection.model_isolation import check_model, isolated, unwrap
from deconvnet.visualization.projection.projection import (
    LayerInfo,
    Projection,
    ProjectionReport,
    UnevenOverlap,
    check_units,
    crop,
    suggest_layers,
    unknown_layer,
)
from deconvnet.visualization.projection.receptive_fields import (
    FieldGeometries,
    FieldGeometry,
    trace_fields,
)

GATES = ("constant", "gradient")
MOST_WINDOWS = 64
# Images that tell constants of a model from those of an image.
OTHERS = 2
# Of the largest activation: what another size of input may change, with room to spare.
ROUNDING = 1e-3

# The name of a module, the number of its call, what it gives, and the node of that.
Seen = tuple[str, int, Tensor, Node | None]

logger = logging.getLogger(__name__)


class _Reached(BaseException):
    """The layer has its output. No Exception, so that no model can swallow it."""


class _Unlike(Exception):
    """A model does not treat a window as it treats the image."""


class CnnBackend:
    """Layers, activations and projections of a torch module; see `Projector`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str,
        strict: bool,
        gates: str,
        overlap: str,
        batch: int,
        local: bool,
    ):
        for key, value, choices in (
            ("method", method, METHODS),
            ("gates", gates, GATES),
            ("overlap", overlap, OVERLAPS),
        ):
            if value not in choices:
                raise ValueError(f"{key}={value}: choose one of {', '.join(choices)}")
        self.model = check_model(unwrap(model))
        # TorchScript takes no hooks: what is scripted is passed, but is no layer.
        self.modules = {
            name: module
            for name, module in self.model.named_modules()
            if name and not isinstance(module, torch.jit.ScriptModule)
        }
        self.method, self.strict, self.gates = method, strict, gates
        self.overlap, self.batch, self.local = overlap, batch, local
        # By the shape of an image: what a model calls may depend on it.
        self._calls: dict[tuple[int, ...], Counter[str]] = {}
        # Calls of modules whose maps are (N, H, W, K).
        self._last: set[tuple[str, int]] = set()
        # What modules give that is no maps, in words.
        self._others: dict[str, str] = {}
        self._uncalled = "the model does not call it for these images"
        self._places: dict[tuple[str | int, ...], WindowPlan | None] = {}
        self._suspects: dict[str, frozenset[int]] = {}

    @property
    def device(self) -> torch.device:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def layers(self, x: Tensor) -> list[LayerInfo]:
        found, calls, lattices = self._look(x)
        layers = []
        for name, call, y, node in found:
            # Tables that a model makes of its parameters alone are no layers.
            if node is None:
                continue
            kind, shape = type(self.modules[name]).__name__, tuple(self._maps(y, name, call).shape)
            info = LayerInfo(_call_name(name, call, calls), kind, shape[1:])
            if y.dim() == 4:
                info = _located(info, lattices.of(node))
            layers.append(info)
        return layers

    def _look(self, x: Tensor) -> tuple[list[Seen], Counter[str], FieldGeometries]:
        """All layers as the first of some images x passes them, and how often each is called."""
        found: list[Seen] = []
        leaves: list[Tensor] = [x]

        def note(name: str, call: int, y: Tensor, leaf: Tensor) -> None:
            leaves[0] = leaf
            # The node as it is now: what is done in place to y later has a node of its own.
            found.append((name, call, y, y.grad_fn))

        with isolated(self.model), torch.enable_grad():
            calls = self._calls[x.shape[1:]] = self._pass(x[:1].detach(), note)
            autograd_graph.record_shapes([y for _, _, y, node in found if node is not None])
        layouts = MapAxes()
        self._last |= {(name, call) for name, call, _, node in found if layouts.last(node)}
        return found, calls, FieldGeometries(leaves[0], constant_gates=self._constant_gates)

    def _maps(self, y: Tensor, name: str, call: int) -> Tensor:
        """Maps (N, K, H, W) of what a module gives; of vectors (N, K) maps of one place."""
        if y.dim() == 2:
            return y[:, :, None, None]
        return y.movedim(3, 1) if (name, call) in self._last else y

    def responses(
        self, x: Tensor, layers: list[str], reduce: Callable[[str, Tensor], object]
    ) -> dict[str, object]:
        wanted = self._wanted(x, layers)
        found: dict[str, object] = {}

        def note(name: str, call: int, y: Tensor, leaf: Tensor) -> None:
            key = wanted.get((name, call))
            if key is None:
                return
            found[key] = reduce(key, self._maps(y, name, call))
            if len(found) == len(wanted):
                raise _Reached

        with isolated(self.model), torch.no_grad():
            self._pass(x, note, {name for name, _ in wanted})
        return found

    def outputs(self, x: Tensor) -> Tensor | None:
        with isolated(self.model), torch.no_grad():
            try:
                y = _tensor(self.model(x.detach().clone()))
            except Exception as error:
                raise self._failure(x, error) from error
        return y if y is not None and y.dim() == 2 else None

    def project(
        self, x: Tensor, layer: str, units: Tensor | list, seeds: Tensor | None
    ) -> Projection:
        # Maps and places can be checked once the shape of the layer is known.
        units = check_units(units, len(x), layer)
        images = torch.unique(units[:, 0])
        result = None
        with isolated(self.model), torch.enable_grad():
            if len(units):
                self._suspect(x[:1], layer)
            place = self._place(x, layer) if self.local and len(units) else None
            if place is not None:
                check_units(units, len(x), layer, place.shape)
                try:
                    return self._project_in_windows(x, layer, units, seeds, place)
                except _Unlike:
                    self._places[_place_key(x, layer)] = None
            for some in images.split(self.batch) if len(images) else ():
                chosen = torch.isin(units[:, 0], some).nonzero()[:, 0]
                given = None if seeds is None else seeds[chosen.to(seeds.device)]
                part = self._project_some(x, some, layer, units[chosen], given)
                result = result or _Result(len(units), x, part)
                result.put(chosen, part)
        if result is None:
            report = ProjectionReport(self.method)
            empty = units.new_zeros(0, 4)
            return Projection(units, x[:0], empty, empty, x.new_zeros(0), report)
        return result.projection(units)

    def _place(self, x: Tensor, layer: str) -> WindowPlan | None:
        """Where the units of a layer lie, if windows of the images are enough for them."""
        key = _place_key(x, layer)
        if key not in self._places:
            leaf, y, _ = self._up_to(x[:1], layer)
            found = autograd_graph.read_operations(y, constant_gates=self._constant_gates)
            maps = self._maps(y, *_split(layer))
            lattice = FieldGeometries(leaf, constant_gates=self._constant_gates).of(y.grad_fn)
            place = plan_windows(found, tuple(maps.shape[1:]), lattice, tuple(x.shape[2:]))
            if place is not None and not self._answers_alike(x[:1], layer, maps.detach()[0], place):
                place = None
            self._places[key] = place
        return self._places[key]

    def _answers_alike(self, x: Tensor, layer: str, maps: Tensor, place: WindowPlan) -> bool:
        """Whether windows give the maps (K, H, W) of the image x, tried where these are strongest
        and in the middle. A model may take coordinates from the size of what it is given, which no
        list of operations tells."""
        W = maps.shape[2]
        for spot in (int(maps.abs().amax(0).argmax()), maps[0].numel() // 2 + W // 2):
            unit = torch.tensor([[0, 0, spot // W % maps.shape[1], spot % W]])
            window = place.windows(unit)
            i, j = place.within(unit, window)[0, 2:].tolist()
            try:
                y = self._up_to(crop(x, window), layer, known=True)[1]
                found = self._maps(y, *_split(layer)).detach()[0, :, i, j]
            except Exception:  # whatever a model does with a size that it was not made for
                return False
            expected = maps[:, unit[0, 2], unit[0, 3]]
            if (found - expected).abs().max() > ROUNDING * maps.abs().max():
                return False
        return True

    def _project_in_windows(
        self, x: Tensor, layer: str, units: Tensor, seeds: Tensor | None, place: WindowPlan
    ) -> Projection:
        """The projections of units from windows of their images, those of one size together.

        Raises _Unlike if the model does other things with a window than with the image.
        """
        windows = place.windows(units)
        sizes, group = torch.unique(windows[:, 2:] - windows[:, :2], dim=0, return_inverse=True)
        result = None
        for number, (height, width) in enumerate(sizes.tolist()):
            # As many pixels at a time as `batch` images have.
            count = max(1, self.batch * x.shape[2] * x.shape[3] // (height * width))
            for chosen in (group == number).nonzero()[:, 0].split(min(count, MOST_WINDOWS)):
                some, boxes = units[chosen], windows[chosen]
                cropped = crop(x[some[:, 0].to(x.device)], boxes)
                given = None if seeds is None else seeds[chosen.to(seeds.device)]
                part = self._project_window(cropped, layer, place.within(some, boxes), given, place)
                result = result or _Result(len(units), x, part)
                result.put_windows(chosen, part, boxes)
        return result.projection(units)

    def _project_window(
        self, x: Tensor, layer: str, units: Tensor, seeds: Tensor | None, place: WindowPlan
    ) -> Projection:
        """The projections of units of windows x (U, C, h, w), one of each."""
        try:
            leaf, y, watched = self._up_to(x, layer, known=True)
        except Exception as error:  # whatever a model does with a size that it was not made for
            raise _Unlike from error
        found = autograd_graph.read_operations(
            y, constant_gates=self._constant_gates, marked=watched.marked
        )
        if [op.name for op in found.order] != place.operations:
            raise _Unlike
        return self._project_graph(found, leaf, y, torch.arange(len(x)), layer, units, seeds)

    def _project_some(
        self, x: Tensor, some: Tensor, layer: str, units: Tensor, seeds: Tensor | None
    ) -> Projection:
        """The projections of units of some images, which go through the network together."""
        leaf, y, watched = self._up_to(x[some.to(x.device)], layer)
        shape = tuple(self._maps(y, *_split(layer)).shape[1:])
        check_units(units, len(x), layer, shape)
        found = autograd_graph.read_operations(
            y, constant_gates=self._constant_gates, marked=watched.marked
        )
        return self._project_graph(found, leaf, y, some, layer, units, seeds)

    def _project_graph(
        self,
        found: autograd_graph.Operations,
        leaf: Tensor,
        y: Tensor,
        some: Tensor,
        layer: str,
        units: Tensor,
        seeds: Tensor | None,
    ) -> Projection:
        """The projections of units down what has led from the leaf to y; some: its images."""
        self._refuse(found, layer)
        maps, last = self._maps(y, *_split(layer)), _split(layer) in self._last
        fields, boxes = (self._boxes(found, units, leaf, clip, last) for clip in (False, True))
        uneven = self._uneven(found, leaf)
        n, k, i, j = units.to(maps.device).unbind(1)
        n = torch.searchsorted(some.to(n.device), n.contiguous())
        values = maps.detach()[n, k, i, j]
        seeds = values if seeds is None else seeds.to(values)
        images = leaf.new_zeros(len(units), *leaf.shape[1:])
        turns = _turns(units[:, 0])
        for turn in range(int(turns.max()) + 1):
            chosen = (turns == turn).nonzero()[:, 0].to(maps.device)
            at = n[chosen], k[chosen], i[chosen], j[chosen]
            seed = torch.zeros_like(maps)
            seed[at] = seeds[chosen]
            seed = seed.movedim(1, 3) if last else seed.reshape(y.shape)
            signal, met = self._down(found, y, leaf, seed)
            images[chosen] = signal[n[chosen]]
        report = ProjectionReport(
            self.method,
            found.exact,
            found.linear,
            found.extended,
            found.skipped,
            found.unsupported,
            rectified=met["rectified"] + len(found.clamps),
            switched=met["switched"],
            uneven=uneven,
            overlap=self.overlap,
        )
        return Projection(units, images, boxes, fields, values, report)

    def _down(
        self, found: autograd_graph.Operations, y: Tensor, leaf: Tensor, seed: Tensor
    ) -> tuple[Tensor, Counter[str]]:
        rules = BackwardRules(self.method, overlap=self.overlap, local=self.local)
        with node_rules(found, self.method, self.gates), rules:
            (signal,) = torch.autograd.grad(
                y, leaf, seed, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        return signal, rules.met

    def _up_to(
        self, x: Tensor, layer: str, *, known: bool = False
    ) -> tuple[Tensor, Tensor, DependenceTracker]:
        """The leaf that holds x, what the layer makes of it, and what was seen on the way.

        known: the name of the layer has been checked, for images of another size.
        """
        ((name, call),) = [_split(layer)] if known else self._wanted(x, [layer])
        reached: list[Tensor] = []
        leaves: list[Tensor] = []

        def note(module: str, number: int, y: Tensor, leaf: Tensor) -> None:
            if (module, number) == (name, call):
                reached.append(y)
                leaves.append(leaf)
                raise _Reached

        watched = DependenceTracker(self._suspects.get(layer))
        self._pass(x, note, {name}, watched)
        if not reached:
            raise ValueError(f"layer {layer!r}: the model does not call it for these images")
        y = reached[0]
        if y.grad_fn is None:
            raise ValueError(f"layer {layer!r}: its output does not depend on the image")
        return leaves[0], y, watched

    def _suspect(self, x: Tensor, layer: str) -> None:
        """Find constants on the way to a layer that depend on the image, although it cannot be
        seen how: other images have others."""
        if layer in self._suspects:
            return
        watched = self._up_to(x, layer)[2]
        generator = torch.Generator().manual_seed(0)
        found: frozenset[int] = frozenset()
        for _ in range(OTHERS):
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
            try:
                other = self._up_to(0.75 * x.flip(1, 2, 3) + 0.1 * noise, layer)[2]
            except Exception:  # whatever a model does with an image that it does not expect
                break
            found |= differing_calls(watched, other)
        self._suspects[layer] = found

    def _wanted(self, x: Tensor, layers: list[str]) -> dict[tuple[str, int], str]:
        """The module and the number of the call that each name means."""
        calls = self._calls.get(x.shape[1:])
        if calls is None:
            calls = self._look(x)[1]
        known = [_call_name(name, call, calls) for name in calls for call in range(calls[name])]
        wanted = {}
        for layer in layers:
            if layer not in known:
                raise self._no_layer(layer, known)
            wanted[_split(layer)] = layer
        return wanted

    def _no_layer(self, layer: str, known: list[str]) -> ValueError:
        """The error for a layer that is none, with the reason where a module has that name."""
        name = _split(layer)[0]
        part = dict(self.model.named_modules()).get(name) if name else None
        if part is None or any(_split(each)[0] == name for each in known):
            return unknown_layer(layer, known)
        if isinstance(part, torch.jit.ScriptModule):
            says = "it is TorchScript, which cannot be inspected"
        else:
            says = self._others.get(name, self._uncalled)
        return ValueError(f"layer {layer!r}: {says}; {suggest_layers(layer, known)}")

    def _failure(self, x: Tensor, error: Exception) -> ValueError:
        """What the model itself raises for images x, in one line."""
        reason = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        known = isinstance(error, RuntimeError | ValueError | AssertionError) and reason
        says = reason if known else f"{kind}: {reason}" if reason else kind
        shape = "x".join(map(str, x.shape[1:]))
        return ValueError(
            f"the model {type(self.model).__name__} fails on images of {shape}: {says}"
        )

    def _pass(
        self,
        x: Tensor,
        note: Callable[[str, int, Tensor, Tensor], None],
        names: set[str] | None = None,
        watched: DependenceTracker | None = None,
    ) -> Counter[str]:
        """Run the model on x; note(name, call, output, leaf) for modules, in their order.

        How often each module was called. Layers that come before a failure of the model are known
        all the same: a head often wants one size of images, and the layers below it do not.
        """
        calls: Counter[str] = Counter()
        ours: list[Exception] = []
        leaf = x.detach().clone().requires_grad_(torch.is_grad_enabled())

        def hook(name: str) -> Callable[[nn.Module, tuple, object], None]:
            def call(module: nn.Module, given: tuple, output: object) -> None:
                y = _tensor(output)
                self._others[name] = _described(y, len(leaf))
                # Not what a model folds into the dimension of the images.
                if y is not None and y.dim() in (2, 4) and len(y) == len(leaf):
                    calls[name] += 1
                    try:
                        note(name, calls[name] - 1, y, leaf)
                    except Exception as error:
                        ours.append(error)
                        raise

            return call

        skip = self.method != "gradient"
        with ExitStack() as stack:
            for name, module in self.modules.items():
                if names is None or name in names:
                    stack.callback(module.register_forward_hook(hook(name)).remove)
            if skip:
                stack.enter_context(SkippedNormalization())
            if watched is not None:
                watched.begin(leaf)
                stack.callback(watched.finish)
                stack.enter_context(watched)
            try:
                # A copy: models that begin with an operation in place may not write into a leaf.
                self.model(leaf.clone())
            except _Reached:
                pass
            except Exception as error:
                if not ours and (names is not None or not calls):
                    raise self._failure(x, error) from error
                if not ours:
                    says = str(error).split("\n")[0] or type(error).__name__
                    self._uncalled = f"the model fails before it: {says}"
                    logger.warning("the model fails above its layers: %s", says)
            if ours:  # which the model did not let through
                raise ours[0]
        return calls

    @property
    def _constant_gates(self) -> bool:
        return self.gates == "constant" and self.method != "gradient"

    def _boxes(
        self, found: autograd_graph.Operations, units: Tensor, leaf: Tensor, clip: bool, last: bool
    ) -> Tensor:
        """(U, 4) top, left, bottom, right."""
        rows_columns = trace_fields(found, units[:, 1:].numpy(), leaf, clip=clip, last=last)
        return torch.from_numpy(np.ascontiguousarray(rows_columns.transpose(0, 2, 1))).flatten(1)

    def _uneven(self, found: autograd_graph.Operations, leaf: Tensor) -> tuple[UnevenOverlap, ...]:
        names = {p.data_ptr(): name for name, p in self.model.named_parameters()}
        lattices = FieldGeometries(leaf, constant_gates=self._constant_gates)
        uneven = []
        for op in found.convolutions:
            weight, stride = op.saved("weight"), op.pair("stride")
            kernel = tuple(weight.shape[2:])
            if overlaps_unevenly(kernel, stride, op.pair("dilation")):
                name = names.get(weight.data_ptr(), "a convolution").removesuffix(".weight")
                lattice = lattices.of(op.node)
                uneven.append(
                    UnevenOverlap(name, kernel, stride, lattice.stride if lattice else (0, 0))
                )
        return tuple(uneven)

    def _refuse(self, found: autograd_graph.Operations, layer: str) -> None:
        if self.strict and self.method != "gradient" and found.unsupported:
            names = ", ".join(f"{name} x{n}" for name, n in sorted(found.unsupported.items()))
            remedy = (
                "compiled parts hide their operations; pass the uncompiled model"
                if any("compiled" in name for name in found.unsupported)
                else "strict=False uses their gradients and reports them, method='gradient' needs "
                "no rules"
            )
            raise ValueError(f"layer {layer!r}: {self.method} has no rule for {names}; {remedy}")


def _place_key(x: Tensor, layer: str) -> tuple[str | int, ...]:
    return layer, x.shape[2], x.shape[3]


class _Result:
    """Projections of units that came in parts, put together."""

    def __init__(self, count: int, x: Tensor, first: Projection):
        self.images = x.new_zeros(count, *x.shape[1:])
        self.boxes, self.fields = (torch.zeros(count, 4, dtype=torch.long) for _ in range(2))
        self.values = first.values.new_zeros(count)
        self.report = first.report

    def put(self, chosen: Tensor, part: Projection) -> None:
        self.images[chosen.to(self.images.device)] = part.images
        self.values[chosen.to(self.values.device)] = part.values
        self.boxes[chosen], self.fields[chosen] = part.boxes, part.fields

    def put_windows(self, chosen: Tensor, part: Projection, windows: Tensor) -> None:
        """Projections of windows (U, 4) of the images, in their places."""
        for number, image, (top, left, bottom, right) in zip(
            chosen.tolist(), part.images, windows.tolist(), strict=True
        ):
            self.images[number, :, top:bottom, left:right] = image
        self.values[chosen.to(self.values.device)] = part.values
        corners = windows[:, :2].repeat(1, 2)
        empty = (part.boxes[:, 2:] <= part.boxes[:, :2]).any(1)
        self.boxes[chosen] = (part.boxes + corners) * ~empty[:, None]
        self.fields[chosen] = part.fields + corners

    def projection(self, units: Tensor) -> Projection:
        return Projection(units, self.images, self.boxes, self.fields, self.values, self.report)


def _located(info: LayerInfo, found: FieldGeometry | None) -> LayerInfo:
    if found is None or not any(found.stride) or not all(found.size):
        return info
    return replace(info, field=found.size, stride=found.stride, offset=found.first)


def _turns(images: Tensor) -> Tensor:
    """Of units of images (U,) the number of those of the same image before each."""
    seen: Counter[int] = Counter()
    turns = []
    for image in images.tolist():
        turns.append(seen[image])
        seen[image] += 1
    return torch.tensor(turns)


def _described(y: Tensor | None, images: int) -> str:
    """The output of a module that gives no maps, in words."""
    if y is None:
        return "it gives no tensor"
    images_first = y.dim() > 0 and len(y) == images
    shape = ", ".join(["N"] * images_first + list(map(str, y.shape[images_first:])))
    kind = "tokens, not maps" if images_first and y.dim() == 3 else "no maps (N, K, H, W)"
    return f"its output is ({shape}): {kind}"


def _tensor(output: object) -> Tensor | None:
    """The output of a module, or the first of several."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, dict) else output
    if isinstance(values, list | tuple):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return None


def _split(name: str) -> tuple[str, int]:
    module, _, call = name.partition("#")
    return module, int(call) if call.isdigit() else 0


def _call_name(name: str, call: int, calls: Counter[str]) -> str:
    """The name of a module, and the number of the call if it is called more than once."""
    return f"{name}#{call}" if calls[name] > 1 else name
