"""Kill training runs at random moments and check that they resume to the same result.

python benchmarks/kill_and_resume.py                 50 kills
python benchmarks/kill_and_resume.py --kills 200 --ranks 2

A small run is trained once without interruption. Then runs with the same settings are killed
(SIGKILL) at random moments, while they start, learn and save, and restarted with the same command,
until the given number of kills. After each kill, all checkpoints of the run are loaded. At the end
of each run, its network, TensorBoard curves and features over the epochs (bit by bit) and its
metrics (ten digits) are compared with those of the uninterrupted run. With --ranks, each attempt
has several processes; a random one is killed and the others are terminated.
Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

# Processes are compared with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deconvnet import load
from deconvnet.cli.commands import run
from deconvnet.storage.checkpoint_files import load_checkpoint
from deconvnet.storage.file_checks import InvalidFileError

# Imported before the first fork: attempts start quickly, and kills meet them at work.
LAZY = ("PIL.PngImagePlugin", "skimage.data._fetchers", "skimage.io", "skimage.transform")
for module in (*LAZY, "sklearn.datasets", "torch.utils.tensorboard", "deconvnet.cli.train"):
    importlib.import_module(module)
importlib.import_module("deconvnet.cli.launch")

SETTINGS = [
    *("progress=false", "device=cpu", "data.size=32", "data.max_images=7", "layers=2"),
    *(f"model.layer{n}.{key}" for n in (1, 2) for key in ("num_maps=5", "filter_size=5")),
    *(f"model.layer{n}.solver.iterations=10" for n in (1, 2)),
    *(f"model.layer{n}.learning.batch_size=3" for n in (1, 2)),
]
# Curves that depend on the clock.
TIMED = ("second", "memory")


def main() -> None:
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    chance = random.Random(options.seed)
    settings = [*SETTINGS, *(f"model.layer{n}.learning.epochs={options.epochs}" for n in (1, 2))]
    started = time.monotonic()
    attempt(settings, "uninterrupted", 1)
    whole = time.monotonic() - started
    expected = traces(Path("runs/uninterrupted"))
    print(f"uninterrupted: {whole:.1f} s; in {folder}")
    kills, unreadable, run, different = 0, 0, 0, []
    while kills < options.kills:
        run += 1
        name = f"killed-{run}"
        while True:
            after = chance.uniform(0, 0.6 * whole) if kills < options.kills else None
            if not attempt(settings, name, options.ranks, after, chance):
                break
            kills += 1
            unreadable += broken(Path("runs") / name / "checkpoints")
        actual = traces(Path("runs") / name)
        wrong = [key for key in expected if actual[key] != expected[key]]
        different += [f"{name}: {', '.join(wrong)}"] if wrong else []
        how = f"differs in {', '.join(wrong)}" if wrong else "the same"
        print(f"{name}: {kills} kills so far, {how}")
    print(
        f"{kills} kills in {run} runs, {unreadable} unreadable checkpoints, "
        f"{run - len(different)} of {run} runs end like the uninterrupted run"
    )
    if different or unreadable:
        sys.exit(1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default 50)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default 1)")
    parser.add_argument(
        "--epochs", type=int, default=40, help="epochs of each of two layers (default 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument(
        "--folder", type=Path, help="folder of the runs (default: a new temporary folder)"
    )
    return parser.parse_args()


def attempt(
    settings: list[str],
    name: str,
    ranks: int,
    after: float | None = None,
    chance: random.Random | None = None,
) -> bool:
    """Start or resume the run; returns whether it was killed `after` seconds, before it ended."""
    port = free_port()
    children = [begin([*settings, f"name={name}"], rank, ranks, port) for rank in range(ranks)]
    if after is not None:
        end = time.monotonic() + after
        left = set(children)
        while left and time.monotonic() < end:
            left = {child for child in left if not ended(child)}
            time.sleep(0.002)
        if left:
            victim = chance.choice(sorted(left))
            os.kill(victim, signal.SIGKILL)
            for child in left - {victim}:
                # As torchrun terminates the others.
                os.kill(child, signal.SIGTERM)
            for child in left:
                os.waitpid(child, 0)
            return True
        codes = [0]
    else:
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{name}: exit codes {codes}, see {Path('runs') / name}")
    return False


def begin(settings: list[str], rank: int, ranks: int, port: int) -> int:
    """The process of one rank, as torchrun would start it."""
    child = os.fork()
    if child:
        return child
    if ranks > 1:
        shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=ranks)
        own = dict(RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=ranks)
        os.environ.update({key: str(value) for key, value in {**shared, **own}.items()})
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = ["deconvnet", *settings]
    code = 0
    try:
        run("train", ("deconvnet", "train"))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        code = 70
    os._exit(code or 0)


def ended(child: int) -> bool:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid and (code := os.waitstatus_to_exitcode(status)):
        sys.exit(f"a process ended with {code} though it was not killed")
    return bool(pid)


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def broken(folder: Path) -> int:
    """The number of checkpoints that cannot be loaded."""
    count = 0
    for path in folder.glob("step-*.pt"):
        try:
            load_checkpoint(path)
        except InvalidFileError as error:
            print(error)
            count += 1
    return count


def traces(run: Path) -> dict[str, object]:
    """The results of a run, which must be the same to the last bit."""
    tensors = load(run / "network.safetensors").state_dict()
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    curves = {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if not any(word in tag for word in TIMED)
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for timed in ("seconds_per_image", "loads"):
            line.pop(timed, None)
        line.get("result", {}).pop("seconds", None)
    lines = [rounded(line) for line in lines]
    evolution = {path.name: path.read_bytes() for path in (run / "evolution").glob("*.npz")}
    return {
        "network": {key: tensor.tolist() for key, tensor in tensors.items()},
        "curves": curves,
        "metrics": lines,
        "evolution": evolution,
    }


def rounded(value: object) -> object:
    """Ten digits: an interrupted sum is added up in another order."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.10g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
