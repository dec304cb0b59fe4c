"""The content of a run's checkpoint, its checks, and the filters that a new run may start from."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deconvnet.images.preprocessing import Spread
from deconvnet.monitoring.statistics import LayerResult
from deconvnet.network.network import DeconvNet, restore_network
from deconvnet.storage.checkpoint_files import load_checkpoint, load_newest_checkpoint
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import load_network

if TYPE_CHECKING:
    from deconvnet.training.layer_trainer import LayerTrainer
    from deconvnet.training.session import Session

# Bytes of the digest of an image that a checkpoint stores.
DIGEST = 8


@dataclass
class TrainingState:
    """The progress of a run.

    layer: the layer that is being learned; step: filter updates so far, in all layers; results: of
    the finished layers; pooled: the spread of the pooled maps of the last finished layer.
    """

    layer: int
    step: int
    results: list[LayerResult]
    pooled: Spread | None = None

    @classmethod
    def from_checkpoint(cls, state: dict | None) -> TrainingState:
        """The state in a checkpoint; None is the beginning of a run."""
        if state is None:
            return cls(1, 0, [])
        try:
            results = [LayerResult(**result) for result in state["results"]]
            pooled = state.get("pooled")
            return cls(state["layer"], state["step"], results, pooled and Spread(**pooled))
        except TypeError as error:
            raise InvalidFileError(
                f"the checkpoint does not hold a run of this version ({error}); resume from "
                "another one"
            ) from None

    def save(self, session: Session, trainer: LayerTrainer | None = None) -> None:
        """Save the state of all ranks; rank 0 writes. trainer: of a layer that has begun."""
        training = trainer and trainer.state_dict()
        if session.run is None:
            return
        # A layer whose training has not begun is not part of the learned network.
        depth = self.layer if trainer else self.layer - 1
        tensors, settings = session.net.to_parts(depth)
        state = {
            "network": {"tensors": tensors, "settings": settings},
            "layer": self.layer,
            "step": self.step,
            "results": [asdict(result) for result in self.results],
            "pooled": self.pooled and asdict(self.pooled),
            "trainer": training,
        }
        session.run.save(self.step, state)


def check_state(state: object, where: str | Path) -> None:
    """Raise InvalidFileError unless a checkpoint, possibly foreign, holds the state of a run.

    where: the checkpoint or run folder, for the message.
    """
    kinds = {"settings": dict, "network": dict, "layer": int, "step": int, "results": list}
    kinds |= {"trainer": dict | None, "token": str | None}
    state = state if isinstance(state, dict) else {}
    invalid = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
    invalid += [key for key in ("layer", "step") if key not in invalid and state[key] < 0]
    if isinstance(state.get("trainer"), dict) and not isinstance(
        state["trainer"].get("codes"), dict
    ):
        invalid.append("trainer")
    images = state.get("images")
    if images is not None and not _are_digests(images):
        invalid.append("images")
    if invalid:
        raise InvalidFileError(
            f"{where}: its checkpoint does not hold a run of this version ({', '.join(invalid)}); "
            "resume from another one"
        )
    restore_network(where, state["network"].get("tensors"), state["network"].get("settings"))


def state_at(path: Path) -> dict | None:
    """The state in a checkpoint file, or in the newest of a run folder; None if there is none."""
    if path.exists() and not path.is_dir():
        return load_checkpoint(path)
    newest = load_newest_checkpoint(path / "checkpoints")
    return newest and newest[0]


def network_parts(init: str) -> tuple[dict, dict]:
    """(tensors, settings) of the network in a run folder, a checkpoint or a network file."""
    path = Path(init).expanduser()
    if path.suffix == ".safetensors" and path.exists() and not path.is_dir():
        parts = load_network(path)
        restore_network(path, *parts)
        return parts
    state = state_at(path)
    if state is None:
        raise ValueError(
            f"init={init}: nothing to start from there; give a run folder, a .pt or a .safetensors "
            "file"
        )
    check_state(state, path)
    return parts_of(state)


def parts_of(state: dict) -> tuple[dict, dict]:
    """(tensors, settings) of the network in a checked checkpoint."""
    return state["network"]["tensors"], state["network"]["settings"]


def transferred_filters(net: DeconvNet, parts: tuple[dict, dict] | None) -> dict[int, Tensor]:
    """The initial filters (K, C, h, w) of the layers of `net`, by number, taken from a network
    given by its parts; layers that it does not have are omitted.
    """
    if parts is None:
        return {}
    start = DeconvNet.from_parts(*parts)
    initial = {}
    for number in range(1, min(net.depth, start.depth) + 1):
        current, filters = net.layer(number).filters, start.layer(number).filters
        if current.shape != filters.shape:
            here, there = ("x".join(map(str, f.shape)) for f in (current, filters))
            raise ValueError(
                f"layer {number} is to start from filters of {there} (maps, channels, rows, "
                f"columns), but has filters of {here}: use the same num_maps, filter_size and "
                "colours, and layers=... for fewer layers"
            )
        initial[number] = filters
    return initial


def typed(key: str, path: Path | str) -> str:
    """A setting as typed in a shell."""
    return shlex.quote(f"{key}={path}")


def _are_digests(images: object) -> bool:
    return (
        isinstance(images, torch.Tensor)
        and images.dtype == torch.uint8
        and images.ndim == 2
        and images.shape[1] == DIGEST
    )
