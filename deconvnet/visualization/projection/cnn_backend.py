"""Projections of any trained network: its backward pass with modified rules.

The method auto chooses one for each layer, from the operations between the layer and the pixels.
With deconv, the image enters only through the switches of max pooling, so a network without them
would give the same picture for every image: there the method is guided.

If the model allows it, a unit is projected from a window of its image that is little larger than
its receptive field (`local_windows`), otherwise from the whole image.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deconvnet.visualization.models.model_error import ModelError, described
from deconvnet.visualization.projection.backward_rules import (
    AUTO,
    METHODS,
    OVERLAPS,
    BackwardRules,
    node_rules,
    overlaps_unevenly,
)
from deconvnet.visualization.projection.boxes import crop
from deconvnet.visualization.projection.field_geometry import FieldGeometries
from deconvnet.visualization.projection.forward_pass import ForwardPass, LayerOutput
from deconvnet.visualization.projection.local_windows import WindowPlan, plan_windows
from deconvnet.visualization.projection.model_isolation import isolated
from deconvnet.visualization.projection.operations import Operations, read_operations
from deconvnet.visualization.projection.projection import (
    LayerInfo,
    Projection,
    ProjectionReport,
    UnevenOverlap,
    check_units,
    counted,
)
from deconvnet.visualization.projection.receptive_fields import trace_fields
from deconvnet.visualization.projection.starts import Footprint, Starts

GATES = ("constant", "gradient")
# Windows that go through the model at a time.
MOST_WINDOWS = 64
# The difference that another input size may make, relative to the largest activation; rounding
# makes far less.
ROUNDING = 1e-3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MethodChoice:
    """The methods for a layer, the most informative first, and why, in words."""

    methods: tuple[str, ...]
    reason: str


class CnnBackend:
    """Layers, responses and projections of a torch module; see `Projector`."""

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
            ("method", method, (AUTO, *METHODS)),
            ("gates", gates, GATES),
            ("overlap", overlap, OVERLAPS),
        ):
            if value not in choices:
                raise ValueError(f"{key}={value}: choose one of {', '.join(choices)}")
        self.method, self.strict, self.gates = method, strict, gates
        self.overlap, self.batch, self.local = overlap, batch, local
        self._forward = ForwardPass(model)
        self._plans: dict[tuple[object, ...], WindowPlan | None] = {}
        self._choices: dict[tuple[str | int | bool, ...], MethodChoice] = {}

    @property
    def model(self) -> nn.Module:
        return self._forward.model

    @property
    def device(self) -> torch.device:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def layers(self, x: Tensor) -> list[LayerInfo]:
        modified = self.method != "gradient"
        with isolated(self.model):
            return self._forward.layers(x, skip_normalization=modified, **self._constants(modified))

    def responses(
        self, x: Tensor, layers: list[str], reduce: Callable[[str, Tensor], object]
    ) -> dict[str, object]:
        with isolated(self.model), torch.no_grad():
            return self._forward.responses(x, layers, reduce)

    def contributions(self, x: Tensor, layer: str, units: Tensor | list, below: str) -> Tensor:
        """See `Projector.contributions`."""
        units, parts = check_units(units, len(x), layer), {}
        with isolated(self.model), torch.enable_grad():
            for images in torch.unique(units[:, 0]).split(self.batch):
                pixels = x[images.to(x.device)]
                found = self._forward.responses(pixels, [below, layer], lambda _, maps: maps)
                chosen = torch.isin(units[:, 0], images).nonzero()[:, 0]
                n = torch.searchsorted(images, units[chosen, 0].contiguous())
                rounds = _occurrences(n)
                # One unit of each image at a time.
                for number in range(int(rounds.max()) + 1):
                    now = (rounds == number).nonzero()[:, 0]
                    index = (n[now], *units[chosen[now], 1:].unbind(1))
                    total = found[layer][tuple(part.to(x.device) for part in index)].sum()
                    (gradient,) = torch.autograd.grad(
                        total,
                        found[below],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    sums = (gradient * found[below]).detach().sum((2, 3))
                    parts |= dict(zip(chosen[now].tolist(), sums[n[now].to(x.device)], strict=True))
        return torch.stack([parts[number] for number in range(len(units))])

    def outputs(self, x: Tensor) -> Tensor | None:
        with isolated(self.model), torch.no_grad():
            return self._forward.outputs(x)

    def methods_of(self, x: Tensor, layer: str) -> tuple[str, ...]:
        if self.method == "gradient":
            return ("gradient",)
        if self.method != AUTO:
            return self.method, "guided" if self.method == "deconv" else "deconv"
        return self._choose(x, layer).methods

    def _choose(self, x: Tensor, layer: str) -> MethodChoice:
        """The methods for a layer with auto, read from a forward pass of the first image."""
        key = _key(x, layer)
        if key not in self._choices:
            with isolated(self.model), torch.enable_grad():
                self._forward.find_suspects(x[:1], layer, skip_normalization=True)
                operations = self._read(self._up_to(x[:1], layer, True), True)
            self._choices[key] = choice = _choice(operations, strict=self.strict)
            if choice.methods == ("gradient",):
                logger.warning("layer %s: its gradient is shown, because %s", layer, choice.reason)
        return self._choices[key]

    def _reasons(self, x: Tensor, layer: str) -> dict[str, str]:
        choice = self._choices.get(_key(x, layer))
        return {choice.methods[0]: choice.reason} if choice else {}

    def project(
        self,
        x: Tensor,
        layer: str,
        units: Tensor | list,
        seeds: Tensor | None,
        methods: Sequence[str],
    ) -> dict[str, Projection]:
        """{method: projection of the units}; deconv and guided share one forward pass."""
        # Maps and positions are checked once the shape of the layer is known.
        return self.project_starts(
            x, layer, Starts(check_units(units, len(x), layer), seeds), methods
        )

    def project_starts(
        self, x: Tensor, layer: str, starts: Starts, methods: Sequence[str]
    ) -> dict[str, Projection]:
        """{method: projection of whatever signals start in the maps of a layer}."""
        units = starts.units
        if len(units) == 0:
            empty = units.new_zeros(0, 4)
            return {
                method: Projection(
                    units, x[:0], empty, empty, x.new_zeros(0), ProjectionReport(method)
                )
                for method in methods
            }
        results: dict[str, Projection] = {}
        with isolated(self.model), torch.enable_grad():
            for modified in (True, False):
                group = [method for method in methods if (method != "gradient") == modified]
                if group:
                    footprint = starts.patterns and starts.patterns.footprint
                    task = _Task(layer, tuple(group), modified, self._reasons(x, layer), footprint)
                    results |= self._project(x, task, starts)
        return {method: results[method] for method in methods}

    def _project(self, x: Tensor, task: _Task, starts: Starts) -> dict[str, Projection]:
        self._forward.find_suspects(x[:1], task.layer, skip_normalization=task.modified)
        plan = self._window_plan(x, task) if self.local else None
        if plan is not None:
            if starts.patterns is None:
                check_units(starts.units, len(x), task.layer, plan.shape)
            try:
                return self._project_in_windows(x, task, starts, plan)
            except _WindowMismatch:
                self._plans[task.key(x)] = None
        return self._project_in_images(x, task, starts)

    def _project_in_images(self, x: Tensor, task: _Task, starts: Starts) -> dict[str, Projection]:
        """Project units from their whole images, `batch` images at a time."""
        results: dict[str, _Result] = {}
        units = starts.units
        for images in torch.unique(units[:, 0]).split(self.batch):
            chosen = torch.isin(units[:, 0], images).nonzero()[:, 0]
            output = self._up_to(x[images.to(x.device)], task.layer, task.modified)
            if starts.patterns is None:
                check_units(units[chosen], len(x), task.layer, tuple(output.maps.shape[1:]))
            operations = self._read(output, task.modified)
            parts = self._project_graph(operations, output, images, task, starts.select(chosen))
            for method, part in parts.items():
                if method not in results:
                    results[method] = _Result(len(units), x, part)
                results[method].put(chosen, part)
        return {method: result.projection(units) for method, result in results.items()}

    def _project_in_windows(
        self, x: Tensor, task: _Task, starts: Starts, plan: WindowPlan
    ) -> dict[str, Projection]:
        """Project units from windows of their images, those of one size together.

        Raises _WindowMismatch if the model performs other operations on a window than on the image.
        """
        units = starts.units
        windows = plan.windows(units)
        sizes, group = torch.unique(windows[:, 2:] - windows[:, :2], dim=0, return_inverse=True)
        results: dict[str, _Result] = {}
        for number, (height, width) in enumerate(sizes.tolist()):
            # As many pixels at a time as `batch` images have.
            count = max(1, self.batch * x.shape[2] * x.shape[3] // (height * width))
            for chosen in (group == number).nonzero()[:, 0].split(min(count, MOST_WINDOWS)):
                boxes = windows[chosen]
                cropped = crop(x[units[chosen, 0].to(x.device)], boxes)
                parts = self._project_window(cropped, task, starts.select(chosen), plan, boxes)
                for method, part in parts.items():
                    if method not in results:
                        results[method] = _Result(len(units), x, part)
                    results[method].put_windows(chosen, part, boxes)
        return {method: result.projection(units) for method, result in results.items()}

    def _project_window(
        self, x: Tensor, task: _Task, starts: Starts, plan: WindowPlan, boxes: Tensor
    ) -> dict[str, Projection]:
        """Project one unit from each of some windows x (U, C, h, w); boxes: (U, 4), of these."""
        try:
            output = self._up_to(x, task.layer, task.modified, checked=True)
        except Exception as error:  # a model may raise anything for an unexpected size
            raise _WindowMismatch from error
        operations = self._read(output, task.modified)
        if [op.name for op in operations.order] != plan.operations:
            raise _WindowMismatch
        units, corners = plan.units_in_windows(starts.units, boxes), plan.map_corners(boxes)
        starts = starts.in_windows(units, corners, tuple(output.maps.shape[2:]))
        return self._project_graph(operations, output, torch.arange(len(x)), task, starts)

    def _window_plan(self, x: Tensor, task: _Task) -> WindowPlan | None:
        """The windows for the units of a layer; None if they need the whole image."""
        key = task.key(x)
        if key not in self._plans:
            output = self._up_to(x[:1], task.layer, task.modified)
            constants = self._constants(task.modified)
            operations = read_operations(output.y, **constants)
            geometries = FieldGeometries(output.leaf, **constants)
            geometry, shape = geometries.at(output.y.grad_fn), tuple(output.maps.shape[1:])
            image, footprint = tuple(x.shape[2:]), task.footprint
            plan = plan_windows(operations, shape, geometry, image, footprint)
            maps = output.maps.detach()[0]
            if plan is not None and not self._windows_agree(x[:1], task, maps, plan):
                plan = None
            self._plans[key] = plan
        return self._plans[key]

    def _windows_agree(self, x: Tensor, task: _Task, maps: Tensor, plan: WindowPlan) -> bool:
        """Whether windows of the image x give its maps (K, H, W), tested at the strongest response
        and in the middle. A model may use coordinates that depend on the size of its input, which
        the list of operations does not show."""
        W = maps.shape[2]
        for index in (int(maps.abs().amax(0).argmax()), maps[0].numel() // 2 + W // 2):
            unit = torch.tensor([[0, 0, index // W % maps.shape[1], index % W]])
            window = plan.windows(unit)
            i, j = plan.units_in_windows(unit, window)[0, 2:].tolist()
            try:
                output = self._up_to(crop(x, window), task.layer, task.modified, checked=True)
                response = output.maps.detach()[0, :, i, j]
            except Exception:  # a model may raise anything for an unexpected size
                return False
            expected = maps[:, unit[0, 2], unit[0, 3]]
            if (response - expected).abs().max() > ROUNDING * maps.abs().max():
                return False
        return True

    def _constants(self, modified: bool) -> dict[str, bool]:
        """What is constant on the way down; modified: with deconv and guided, not the gradient."""
        return {
            "constant_gates": modified and self.gates == "constant",
            "constant_statistics": modified,
        }

    def _up_to(
        self, x: Tensor, layer: str, modified: bool, *, checked: bool = False
    ) -> LayerOutput:
        return self._forward.up_to(x, layer, skip_normalization=modified, checked=checked)

    def _read(self, output: LayerOutput, modified: bool) -> Operations:
        return read_operations(output.y, marked=output.marked, **self._constants(modified))

    def _project_graph(
        self,
        operations: Operations,
        output: LayerOutput,
        images: Tensor,
        task: _Task,
        starts: Starts,
    ) -> dict[str, Projection]:
        """Project units through the graph of a forward pass; images: the numbers of its images."""
        self._refuse_unsupported(operations, task)
        leaf, maps, units = output.leaf, output.maps, starts.units
        fields, boxes = (self._boxes(operations, starts, output, clip) for clip in (False, True))
        uneven = self._uneven(operations, leaf, task.modified)
        n = units[:, 0].to(maps.device).contiguous()
        n = torch.searchsorted(images.to(n.device), n)
        values = starts.values(maps, n)
        projections = {
            method: leaf.new_zeros(len(units), *leaf.shape[1:]) for method in task.methods
        }
        counts: dict[str, Counter[str]] = {}
        # Project one unit of each image at a time.
        rounds = _occurrences(units[:, 0])
        for number in range(int(rounds.max()) + 1):
            chosen = (rounds == number).nonzero()[:, 0].to(maps.device)
            seed = output.as_output(starts.signal(maps, n, chosen))
            for method in task.methods:
                signal, counts[method] = self._backward(method, operations, output.y, leaf, seed)
                projections[method][chosen] = signal[n[chosen]]
        return {
            method: Projection(
                units,
                projections[method],
                boxes,
                fields,
                values,
                self._report(method, operations, counts[method], uneven, task),
            )
            for method in task.methods
        }

    def _report(
        self,
        method: str,
        operations: Operations,
        counts: Counter[str],
        uneven: tuple[UnevenOverlap, ...],
        task: _Task,
    ) -> ProjectionReport:
        return ProjectionReport(
            method,
            operations.exact,
            operations.linear,
            operations.extended,
            operations.skipped,
            operations.unsupported,
            rectified=counts["rectified"] + len(operations.clamps) + len(operations.hand_written),
            switched=counts["switched"],
            uneven=uneven,
            overlap=self.overlap,
            reason=task.reasons.get(method, ""),
        )

    def _backward(
        self, method: str, operations: Operations, y: Tensor, leaf: Tensor, seed: Tensor
    ) -> tuple[Tensor, Counter[str]]:
        """The signal at the leaf for a seed at y, and how often rules were applied."""
        rules = BackwardRules(method, overlap=self.overlap, local=self.local)
        try:
            with node_rules(operations, method, self.gates), rules:
                (signal,) = torch.autograd.grad(
                    y, leaf, seed, retain_graph=True, allow_unused=True, materialize_grads=True
                )
        except Exception as error:
            if _raised_here(error):
                raise
            kind = type(self.model).__name__
            message = f"the model {kind} fails in its backward pass: {described(error)}"
            raise ModelError(message) from error
        return signal, rules.counts

    def _boxes(
        self, operations: Operations, starts: Starts, output: LayerOutput, clip: bool
    ) -> Tensor:
        """(U, 4): top, left, bottom, right of the receptive fields."""
        fields = trace_fields(
            operations, starts.boxes(), output.leaf, clip=clip, last=output.form.maps_last
        )
        return torch.from_numpy(np.ascontiguousarray(fields.transpose(0, 2, 1))).flatten(1)

    def _uneven(
        self, operations: Operations, leaf: Tensor, modified: bool
    ) -> tuple[UnevenOverlap, ...]:
        names = {p.data_ptr(): name for name, p in self.model.named_parameters()}
        geometries = FieldGeometries(leaf, **self._constants(modified))
        uneven = []
        for op in operations.convolutions:
            weight, stride = op.saved("weight"), op.pair("stride")
            kernel = tuple(weight.shape[2:])
            if overlaps_unevenly(kernel, stride, op.pair("dilation")):
                name = names.get(weight.data_ptr(), "a convolution").removesuffix(".weight")
                geometry = geometries.at(op.node)
                period = geometry.stride if geometry else (0, 0)
                # Above upsampling, the pattern has no period of whole pixels.
                period = tuple(step if isinstance(step, int) else 0 for step in period)
                uneven.append(UnevenOverlap(name, kernel, stride, period))
        return tuple(uneven)

    def _refuse_unsupported(self, operations: Operations, task: _Task) -> None:
        unsupported = operations.unsupported
        if self.strict and task.modified and unsupported:
            remedy = _uncompiled(unsupported) or (
                "strict=False uses their gradients and reports them, method='gradient' needs no "
                "rules"
            )
            raise ValueError(
                f"layer {task.layer!r}: {task.methods[0]} has no rule for "
                f"{counted(unsupported)}; {remedy}"
            )


@dataclass(frozen=True)
class _Task:
    """A layer to project, with methods that share a forward pass.

    modified: whether they are deconv and guided, whose backward pass differs from the gradient.
    reasons: by method, why it was chosen. footprint: of the patterns that they start from.
    """

    layer: str
    methods: tuple[str, ...]
    modified: bool
    reasons: dict[str, str]
    footprint: Footprint | None

    def key(self, x: Tensor) -> tuple[object, ...]:
        """What the windows of units in images of the size of x (N, C, H, W) depend on."""
        return (*_key(x, self.layer), self.modified, self.footprint)


class _WindowMismatch(Exception):
    """A model does not process a window as it processes the image."""


class _Result:
    """Collects projections of units that are computed in parts."""

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
        """Put projections in windows (U, 4) into their images."""
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


def _choice(operations: Operations, *, strict: bool) -> MethodChoice:
    """The methods for a layer above these operations."""
    if strict and operations.unsupported:
        reason = f"deconv has no rule for {counted(operations.unsupported)}"
        if remedy := _uncompiled(operations.unsupported):
            reason = f"{reason} ({remedy})"
        return MethodChoice(("gradient",), reason)
    if operations.switches:
        return MethodChoice(("deconv", "guided"), "")
    return MethodChoice(("guided", "deconv"), "no switch of max pooling is passed")


def _uncompiled(unsupported: dict[str, int]) -> str:
    """What to do if compiled code is among operations without a rule, else nothing."""
    is_compiled = any("compiled" in name for name in unsupported)
    return "compiled parts hide their operations; pass the uncompiled model" if is_compiled else ""


def _key(x: Tensor, layer: str) -> tuple[str | int, ...]:
    return layer, x.shape[2], x.shape[3]


def _raised_here(error: Exception) -> bool:
    """Whether an error comes from this package, such as a rule that refuses an operation."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("deconvnet.")


def _occurrences(images: Tensor) -> Tensor:
    """(U,): for each unit, the number of earlier units of the same image; images: (U,)."""
    counts: Counter[int] = Counter()
    occurrences = []
    for image in images.tolist():
        occurrences.append(counts[image])
        counts[image] += 1
    return torch.tensor(occurrences)
