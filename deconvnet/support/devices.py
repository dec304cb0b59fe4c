"""The torch device that a setting names."""

import torch


def torch_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is cuda, else cpu."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: no such device; try auto, cpu or cuda") from None
    if found.type == "mps":
        raise ValueError(f"device={name}: the sums need float64, which mps lacks; use device=cpu")
    here = {"cpu": True, "cuda": cuda}.get(found.type, False)
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if not here or (found.index or 0) >= count:
        raise ValueError(f"device={name}: this machine has none; use device=auto or device=cpu")
    return found
