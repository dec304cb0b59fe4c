"""The torch device that a setting names."""

import torch


def torch_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is cuda where there is one, else cpu.

    Raises ValueError where torch knows no such device or this machine has none.
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
