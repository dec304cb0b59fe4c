"""Conversion of a device setting ("auto", "cpu", "cuda:1") to a torch device."""

import torch


def torch_device(name: str) -> torch.device:
    """The torch device with this name; "auto" is cuda if available, else cpu.

    Raises ValueError if torch does not know the device or this machine does not have it.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: no such device; try auto, cpu or cuda") from None
    if chosen.type == "mps":
        raise ValueError(f"device={name}: the sums need float64, which mps lacks; use device=cpu")
    present = {"cpu": True, "cuda": cuda}.get(chosen.type, False)
    count = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if not present or (chosen.index or 0) >= count:
        raise ValueError(f"device={name}: this machine has none; use device=auto or device=cpu")
    return chosen
