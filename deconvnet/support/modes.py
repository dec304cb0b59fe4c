"""What a caller may have switched on around a call, and which must not change its result.

Inference and learning work on plain tensors in the type of the data: no graph for autograd is made,
and autocast, which would turn some of the convolutions into float16 or bfloat16, is off inside.
What is drawn at random is drawn on the CPU, also where torch's default device is another.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P, R = ParamSpec("P"), TypeVar("R")
# Devices for which torch has autocast.
DEVICES = ("cpu", "cuda", "mps", "xpu")


def plain(function: Callable[P, R]) -> Callable[P, R]:
    """The function without autograd, without autocast and with the CPU as the default device."""
    return torch.no_grad()(full_precision(function))


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function without autocast and with the CPU as the default device."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            for device in filter(autocasts, DEVICES):
                stack.enter_context(torch.autocast(device, enabled=False))
            if default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return call


def default_device() -> torch.device:
    """Where torch makes tensors that nobody gives a device."""
    return torch.empty(0).device


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device."""
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # torch before 2.4 asks by the name of the function
        enabled = {"cpu": torch.is_autocast_cpu_enabled, "cuda": torch.is_autocast_enabled}
        return device in enabled and enabled[device]()
