"""Parts of a benchmark in processes of their own, with a fixed number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

POOLS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")


def result_of(command: list[str], job: dict, threads: int, name: str) -> dict | list:
    """What `command JOB.json` prints in its last line, with `threads` threads in all of its pools.

    If it fails, this process ends, with a line that has the name.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        environment = {f"{pool}_NUM_THREADS": str(threads) for pool in POOLS}
        # Threads that spin while they wait slow down other threads.
        environment = {**os.environ, "GOMP_SPINCOUNT": "10000", **environment}
        done = subprocess.run(
            [*command, file.name], env=environment, stdout=subprocess.PIPE, text=True
        )
    if done.returncode:
        sys.exit(f"{name} with {threads} threads failed: its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(names: list[str], turn: int) -> list[str]:
    """The names, starting with another one in each round."""
    turn %= len(names)
    return names[turn:] + names[:turn]


def say(line: str) -> None:
    """Print progress; the standard output of these processes is reserved for their result."""
    print(line, file=sys.stderr, flush=True)
