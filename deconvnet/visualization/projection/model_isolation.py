"""Checks of a user's torch module, and a context in which it runs without being changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers that distribute or compile it."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def check_model(model: nn.Module) -> nn.Module:
    """Return the model if its layers can be inspected; else raise ValueError with the reason."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        hint = "; give its .module()" if kind == "ExportedProgram" else ""
        raise ValueError(f"model is {kind}: expected torch.nn.Module{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"model is TorchScript ({kind}), whose layers cannot be inspected: build the Python "
            "class that it was made from and load its state_dict()"
        )
    for name, part in model.named_modules():
        if "quantized" in type(part).__module__.split("."):
            raise ValueError(
                f"model is quantised ({name or kind}: {type(part).__name__}), which has no "
                "gradients: pass the model from before quantisation"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"model: {name} has no shape yet: run it once on an image")
        if tensor.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device, without values: build it on another device "
                "and load its state_dict()"
            )
    return model


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode with frozen parameters, without autocast,
    compilation and gradient hooks. Afterwards the model is restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device.type if tensors else "cpu"
    try:
        model.eval()
        for p, _ in requires_grad:
            p.requires_grad_(False)
        with (
            torch.inference_mode(False),
            torch.autocast(device, enabled=False),
            _uncompiled(model),
            _without_backward_hooks(model),
            _buffers_kept(model),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, required in requires_grad:
            p.requires_grad_(required)


@contextmanager
def _without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Gradient hooks, such as those of Grad-CAM, neither see nor change the projected signal."""
    kinds = ("_backward_hooks", "_backward_pre_hooks")
    hooked = [
        (module, kind, getattr(module, kind))
        for module in model.modules()
        for kind in kinds
        if getattr(module, kind, None)
    ]
    try:
        for module, kind, _ in hooked:
            setattr(module, kind, OrderedDict())
        yield
    finally:
        for module, kind, hooks in hooked:
            setattr(module, kind, hooks)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a model writes into its buffers, such as counts and averages."""
    saved = [
        (buffer, buffer._version, buffer.clone())
        for buffer in model.buffers()
        if not buffer.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, values in saved:
                if buffer._version != version:
                    buffer.copy_(values)


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled parts as they were written, because compiled code hides its operations."""
    compiled = [
        (module, module._compiled_call_impl)
        for module in model.modules()
        if getattr(module, "_compiled_call_impl", None) is not None
    ]
    with ExitStack() as stack:
        # From PyTorch 2.6 on, this also works for functions; before, they are refused by name.
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.jit.optimized_execution(False))
        try:
            for module, _ in compiled:
                module._compiled_call_impl = None
            yield
        finally:
            for module, call in compiled:
                module._compiled_call_impl = call
