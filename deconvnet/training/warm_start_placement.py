"""The choice of where to store the warm starts of a layer: in memory, on disk, or nowhere."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from deconvnet.training.layer_data import LayerData
from deconvnet.training.session import Session
from deconvnet.training.warm_starts import DiskWarmStarts, Placement, warm_starts_size

log = logging.getLogger(__name__)


def place_warm_starts(
    session: Session, data: LayerData, number: int, resumed: dict | None
) -> Placement:
    """The placement of the warm starts of layer `number` that the limits of the session allow.

    resumed: the state of the trainer if the layer is resumed. Whether warm starts are kept must not
    change while a layer learns, because it affects the learned filters.
    """
    run, limits, communicator = session.run, session.limits, session.communicator
    token = communicator.broadcast(run and run.token) or ""
    needed = warm_starts_size(session.net.layer(number), data) / 2**30
    on_disk = DiskWarmStarts.NUM_FILES * needed
    root = communicator.broadcast(run and str(run.warm_starts))
    folder = root and Path(root) / f"layer{number}"
    were_kept, were_on_disk = _earlier_placement(resumed)
    if were_kept is not False and not were_on_disk and needed <= limits.memory:
        return Placement(True, None, token)
    if folder and (were_on_disk or (were_kept is not False and on_disk <= limits.disk)):
        where = f"they are kept in {folder}, at most {on_disk:.3g} GiB"
    elif were_kept:
        raise ValueError(
            f"memory={limits.memory:g}, disk={limits.disk:g}: layer {number} learns with the "
            f"states of inference of {data.num_images} images; resume with "
            f"memory={1.01 * needed:.3g} or disk={1.01 * on_disk:.3g} (GiB)"
        )
    else:
        folder, where = None, "every visit infers from the beginning"
    if communicator.is_main:
        exceeds = f", which is more than memory={limits.memory:g}" if needed > limits.memory else ""
        log.info(
            "layer %d: the states of inference of %d images would take %.3g GiB%s: %s",
            *(number, data.num_images, needed, exceeds, where),
        )
        if folder:
            _check_free_space(folder, on_disk)
    return Placement(folder is not None, folder, token)


def _earlier_placement(resumed: dict | None) -> tuple[bool | None, bool]:
    """Whether the resumed layer keeps warm starts (None: undecided), and whether on disk."""
    if resumed is None:
        return None, False
    codes = resumed["codes"]
    # Old checkpoints do not have this key; their layers keep warm starts if there are any.
    keep = resumed.get("keep", codes["shape"] is not None or None)
    return keep, "now" in codes


def _check_free_space(folder: Path, needed: float) -> None:
    """Raise ValueError if the disk has less than `needed` GiB for the files in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # Count the blocks that the files occupy, because they have holes.
    occupied = sum(512 * path.stat().st_blocks for path in folder.iterdir())
    free = (shutil.disk_usage(folder).free + occupied) / 2**30
    if needed > free:
        raise ValueError(
            f"disk: {folder} needs up to {needed:.3g} GiB and has {free:.3g}; make room, or "
            "begin a run with disk=0, or on another disk"
        )
