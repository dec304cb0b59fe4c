"""alphacsc's and RoseCDL's dictionary learning, for benchmarks/compare_alphacsc_rosecdl.py.

python benchmarks/alphacsc_rosecdl_learners.py JOB.json

runs one learner in the interpreter that has its package; this file needs numpy and that alone. Job:
learner, threads, limit (seconds), iterations (or null), clock, data, file (to which the atoms go)
and rosecdl (the path of its checkout). data: an .npz file of images y (N, C, H, W), atoms f
(K, C, h, w), weight, which is SPORCO's lambda, and tapered, whether atoms fade out at their ends.

Both packages learn non-negative codes, of atoms that lie inside the signal, and alternate between
codes and atoms. An iteration is one of alphacsc's updates of all atoms, or one of RoseCDL's epochs.
Settings are those of RoseCDL's benchmark (`benchmark/solvers`), unless a name says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from timing import Snapshots, StopSolver

ENDLESS = 10_000


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    with np.load(job["data"]) as data:
        y, f, weight, tapered = data["y"], data["f"], float(data["weight"]), bool(data["tapered"])
    if job["rosecdl"]:
        sys.path.insert(0, job["rosecdl"])
    run = {**ALPHACSC, **ROSECDL["signals"], **ROSECDL["images"]}[job["learner"]]
    learn = partial(run, tapered=tapered, threads=job["threads"])
    iterations = math.inf if job["iterations"] is None else job["iterations"]
    snapshots = Snapshots(iterations=iterations, limit=job["limit"], clock=job["clock"])
    # The standard output is for the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        learn(*corner(y, f), weight, Snapshots(iterations=2))
        learn(y, f, weight, snapshots)
    np.savez(job["file"], *(atoms for _, _, atoms in snapshots.recorded))
    points = [point[:2] for point in snapshots.recorded]
    version = metadata.version("alphacsc") if job["learner"] in ALPHACSC else "a checkout"
    print(json.dumps({"points": points, "version": f"{version}, numpy {np.__version__}"}))


def learn_by_alphacsc(
    y: np.ndarray,
    f: np.ndarray,
    weight: float,
    recorder: Snapshots,
    *,
    kind: str,
    tapered: bool,
    threads: int,
) -> None:
    """alphacsc's BatchCDL or OnlineCDL on signals y (N, C, 1, T), from atoms f (K, C, 1, L)."""
    import alphacsc

    iteration = 0

    def watch(z_encoder: object, _: object) -> None:
        # It is called once before the first update; what it returns is ignored.
        nonlocal iteration
        if iteration and recorder(iteration, lambda: _as_filters(z_encoder.D_hat)):
            raise StopSolver
        iteration += 1

    model = getattr(alphacsc, kind)(
        n_atoms=len(f),
        n_times_atom=f.shape[3],
        D_init=f[:, :, 0].astype(np.float64),
        reg=weight,
        lmbd_max="fixed",
        solver_z="lgcd",
        solver_z_kwargs={"tol": 1e-2},
        rank1=False,
        window=tapered,
        n_iter=ENDLESS,
        n_jobs=threads,
        verbose=0,
    )
    model.raise_on_increase, model.callback = False, watch
    recorder.start()
    with contextlib.suppress(StopSolver):
        model.fit(y[:, :, 0].astype(np.float64))


def learn_by_rosecdl(
    y: np.ndarray,
    f: np.ndarray,
    weight: float,
    recorder: Snapshots,
    *,
    tapered: bool,
    threads: int,
    epochs: int = ENDLESS,
    **settings: object,
) -> None:
    """RoseCDL on images y (N, C, H, W), or on signals if H = 1, from atoms f (K, C, h, w)."""
    import torch
    from rosecdl.rosecdl import RoseCDL

    def watch(model: RoseCDL, epoch: int, loss: float) -> bool:
        return recorder(epoch + 1, lambda: _as_filters(model.D_hat_))

    torch.set_num_threads(threads)
    images, start = torch.from_numpy(y), torch.from_numpy(f)
    if y.shape[2] == 1:
        images, start = images[:, :, 0], start[:, :, 0]
    model = RoseCDL(
        lmbd=weight,
        scale_lmbd=False,
        D_init=start,
        window=tapered,
        epochs=epochs,
        random_state=0,
        callbacks=[watch],
        **settings,
    )
    recorder.start()
    with (
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        model.fit(images)


def _as_filters(atoms: np.ndarray) -> np.ndarray:
    """Atoms (K, C, L) or (K, C, h, w) as float32 (K, C, h, w)."""
    return (atoms[:, :, None] if atoms.ndim == 3 else atoms).astype(np.float32)


def corner(y: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some data (2, C, h, w) of four times the size of the atoms, and the atoms: for a warm-up."""
    rows, columns = (4 * n if n > 1 else 1 for n in f.shape[2:])
    return np.ascontiguousarray(y[:2, :, :rows, :columns]), f


ALPHACSC = {
    "alphacsc batch": partial(learn_by_alphacsc, kind="BatchCDL"),
    "alphacsc online": partial(learn_by_alphacsc, kind="OnlineCDL"),
}
_all_windows = {"max_batch": None, "n_iterations": 50}
ROSECDL = {
    "signals": {
        # The settings of its benchmark: windows of 32 atoms, all of them (80) at each step.
        "RoseCDL Adam": partial(
            learn_by_rosecdl,
            optimizer="adam",
            sample_window=2048,
            mini_batch_size=128,
            **_all_windows,
        ),
        "RoseCDL Adam, 10 windows a step": partial(
            learn_by_rosecdl,
            optimizer="adam",
            sample_window=2048,
            mini_batch_size=10,
            **_all_windows,
        ),
        "RoseCDL defaults (line search)": learn_by_rosecdl,
    },
    "images": {
        "RoseCDL Adam, windows of 32": partial(
            learn_by_rosecdl,
            optimizer="adam",
            sample_window=32,
            mini_batch_size=10,
            **_all_windows,
        ),
        "RoseCDL line search, windows of 32": partial(
            learn_by_rosecdl, sample_window=32, mini_batch_size=10, **_all_windows
        ),
        "RoseCDL Adam, whole images": partial(
            learn_by_rosecdl,
            optimizer="adam",
            sample_window=None,
            mini_batch_size=2,
            **_all_windows,
        ),
    },
}


if __name__ == "__main__":
    main()
