"""Decorators that protect results from torch modes set by the caller: autograd, autocast and the
default device.

Inference and learning work on plain tensors of the data's dtype: they build no autograd graph and
disable autocast, which would run some of the convolutions in float16 or bfloat16. (`sparse_code`
gives its result a gradient afterwards.) Random numbers are drawn on the CPU, whatever torch's
default device is.
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
    """The device on which torch creates tensors when no device is given."""
    return torch.empty(0).device


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device."""
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # torch before 2.4 has no argument for the device type
        enabled = {"cpu": torch.is_autocast_cpu_enabled, "cuda": torch.is_autocast_enabled}
        return device in enabled and enabled[device]()
