"""The speed of coding and learning compared with SPORCO, on the same problems in one run.

python benchmarks/peers.py                      everything below, at one thread and at two: hours
python benchmarks/peers.py coding --problems grey dense
python benchmarks/peers.py --quick              tiny forms of everything, to see whether it runs
python benchmarks/peers.py coding --show        the tables and plots of the last run once more

coding     seconds until the objective is within 1e-1 to 1e-4 of the true minimum
learning   seconds to dictionaries, and how good they are: for the images and for images held out
batch      ten images at once against one after the other
memory     the peak above what was there before, in units of the size of the maps

Needs SPORCO (pip install sporco); photographs come with scikit-image. The solvers take turns; every
number of threads has a process of its own, and so has every learner. What takes part of a second at
the start of a process (planning of Fourier transforms, compilation, building the solver) is not
timed on either side, nor is the evaluation of objectives, which is one function for all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import clocks
import numpy as np
import problems
import report

TASKS = ("coding", "learning", "batch", "memory")
POOLS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")
# The relative duality gap that the true minimum is looked for to, and that of codes which say how
# good a dictionary is.
GAP, SCORE_GAP = 1e-6, 1e-3
MEMORY_ITERATIONS = 30


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    options = arguments()
    if options.child:
        job = json.loads(Path(options.child).read_text())
        print(json.dumps(CHILDREN[job["task"]](argparse.Namespace(**job))))
        return
    if not options.show and importlib.util.find_spec("sporco") is None:
        sys.exit("benchmarks/peers.py needs SPORCO: pip install sporco")
    options.output.mkdir(parents=True, exist_ok=True)
    for task in options.what:
        file = options.output / f"{task}.json"
        if not options.show:
            started = time.time()
            found = {
                "command": " ".join(sys.argv),
                "date": time.strftime("%Y-%m-%d %H:%M"),
                "machine": clocks.machine(),
                "options": {**vars(options), "output": str(options.output)},
                **PARENTS[task](options),
            }
            found["minutes"] = (time.time() - started) / 60
            file.write_text(json.dumps(found, indent=1))
        elif not file.exists():
            sys.exit(f"--show: there is no {file}; run {task} first")
        print(report.show(task, json.loads(file.read_text()), options.output))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="what", help=f"{', '.join(TASKS)} (default: all of them)"
    )
    parser.add_argument(
        "--problems", nargs="+", choices=list(problems.SPECS), default=list(problems.SPECS),
        help="coding, memory: some of the problems only",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}),
        help="of the CPU, one run for each number (default: 1 and 2)",
    )  # fmt: skip
    parser.add_argument(
        "--solvers", nargs="+", metavar="WORD",
        help="coding, batch: those whose names contain a word, as in: SPORCO coordinate",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument(
        "--limit", type=float, default=120.0,
        help="seconds that a solver has to come within 1e-4 (default 120; learners: three times)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=float, default=600.0,
        help="seconds to look for the true minimum of a problem, once (default 600)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu",
        help="of deconvnet; SPORCO stays on the CPU (default cpu)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny images, two problems, one round")
    parser.add_argument("--show", action="store_true", help="run nothing, show the last results")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"),
        help="folder of results, plots, dictionaries and minima (default runs/benchmark)",
    )  # fmt: skip
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.what if name not in TASKS]:
        parser.error(f"what={' '.join(unknown)}: choose of {', '.join(TASKS)}")
    for key in ("repeats", "limit", "patience"):
        if not getattr(options, key) > 0:
            parser.error(f"--{key}={getattr(options, key)}: must be positive")
    if min(options.threads) < 1:
        parser.error(f"--threads={min(options.threads)}: must be at least 1")
    options.what = options.what or list(TASKS)
    if options.quick:
        options.output = options.output / "quick"
        options.threads, options.repeats = options.threads[:1], 1
        options.problems = options.problems[:2]
        options.limit, options.patience = min(options.limit, 5.0), min(options.patience, 20.0)
    return options


# What the command itself does: to send out children, one at a time, and to gather what they found.


def coding(options: argparse.Namespace) -> dict:
    described = {name: prepare(options, name) for name in options.problems}
    runs = []
    for threads in options.threads:
        for name in options.problems:
            runs += child(options, "coding", threads, problem=name)
    return {"problems": described, "runs": runs}


def batch(options: argparse.Namespace) -> dict:
    described = {"batch": prepare(options, "batch")}
    runs = [run for n in options.threads for run in child(options, "batch", n, problem="batch")]
    return {"problems": described, "runs": runs}


def memory(options: argparse.Namespace) -> dict:
    described, runs = {}, []
    for name in options.problems:
        described[name] = child(options, "describe", os.cpu_count() or 1, problem=name)
        threads = options.threads[0]
        for solver in described[name].pop("solvers"):
            runs.append(child(options, "memory", threads, problem=name, solver=solver))
    return {"problems": described, "runs": runs}


def learning(options: argparse.Namespace) -> dict:
    """Every learner once in each round; then all that they found is judged."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        names = child(options, "learners", 1)
        for threads in options.threads:
            for turn in range(options.repeats):
                for name in in_turn(names, turn):
                    file = f"{folder}/{len(runs)}.npz"
                    run = child(options, "learning", threads, learner=name, file=file)
                    runs.append({"turn": turn, **run})
        files = [run["file"] for run in runs]
        judged = child(options, "score", os.cpu_count() or 1, files=files)
    for run, points in zip(runs, judged["scores"], strict=True):
        both = zip(run.pop("seconds"), points, strict=True)
        run["points"] = [[*seconds, *scores] for seconds, scores in both]
        del run["file"]
    return {"runs": runs, "start": judged["start"], "gap": judged["gap"]}


def prepare(options: argparse.Namespace, name: str) -> dict:
    return child(options, "minima", os.cpu_count() or 1, problem=name)


def child(options: argparse.Namespace, task: str, threads: int, **more) -> dict | list:
    """The result of another process of this file, with `threads` threads in all of its pools."""
    job = {**vars(options), "output": str(options.output), "task": task, **more, "pool": threads}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        environment = {f"{pool}_NUM_THREADS": str(threads) for pool in POOLS}
        # Threads that spin while they wait take the time of others.
        environment = {**os.environ, "GOMP_SPINCOUNT": "10000", **environment}
        command = [sys.executable, __file__, "--child", file.name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{task} {more} with {threads} threads failed: its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(names: list[str], turn: int) -> list[str]:
    """Another one is first in every round."""
    turn %= len(names)
    return names[turn:] + names[:turn]


PARENTS = {"coding": coding, "learning": learning, "batch": batch, "memory": memory}


# What children do. They import the solvers, whose pools of threads are then of the size of the job.


def minima_of(job: argparse.Namespace) -> dict:
    import ours

    problem, shape = made(job), describe(job)
    shape["minima"] = {}
    compile_search(problem, job.device)
    for boundary in ("circular", "valid"):
        found = ours.minimum(
            problem, boundary, Path(job.output), gap=GAP, patience=job.patience, device=job.device
        )
        shape["minima"][boundary] = {**asdict(found), "gap": found.gap}
        say(f"{job.problem} {boundary}: minimum {sum(found.objective):.6g}, gap {found.gap:.1e}")
    return shape


def describe(job: argparse.Namespace) -> dict:
    problem, spec = made(job), spec_of(job)
    shape = {"images": problem.y.shape, "filters": problem.f.shape, "weight": problem.weight}
    return {"title": spec.title, **shape, "solvers": list(all_solvers(job))}


def code_in_turns(job: argparse.Namespace) -> list[dict]:
    import ours

    problem, solvers, runs = made(job), all_solvers(job), []
    minima = {b: ours.kept_minimum(problem, b, Path(job.output)) for b in ("circular", "valid")}
    for name in solvers:
        warm_up(problem, solvers[name])
    for turn in range(job.repeats):
        for name in in_turn(list(solvers), turn):
            boundary = ours.boundary_of(name)
            lowest = sum(minima[boundary].objective)
            points = timed(job, problem, solvers[name], boundary, lowest, clocks.LEVELS[-1])
            runs.append(
                {
                    "problem": job.problem,
                    "solver": name,
                    "boundary": boundary,
                    "threads": job.pool,
                    "turn": turn,
                    "points": points,
                }
            )
            say(f"{job.problem}, {job.pool} threads, round {turn + 1}: {name} {closing(points)}")
    return runs


def batch_in_turns(job: argparse.Namespace) -> list[dict]:
    """Each solver on all images at once, and on one after the other."""
    import ours

    problem, runs = made(job), []
    lowest = ours.kept_minimum(problem, "circular", Path(job.output)).objective
    solvers = {k: run for k, run in all_solvers(job).items() if not k.endswith(", valid")}
    for run in solvers.values():
        warm_up(problem, run)
        warm_up(problem.one(0), run)
    once = partial(timed, job, boundary="circular", level=report.BATCH_LEVELS[-1])
    for turn in range(job.repeats):
        for name in in_turn(list(solvers), turn):
            together = once(problem, solvers[name], lowest=sum(lowest))
            single = [
                once(problem.one(n), solvers[name], lowest=one) for n, one in enumerate(lowest)
            ]
            say(f"batch, {job.pool} threads, round {turn + 1}: {name} {closing(together)}")
            runs.append(
                {
                    "solver": name,
                    "threads": job.pool,
                    "turn": turn,
                    "together": together,
                    "single": single,
                }
            )
    return runs


def memory_of(job: argparse.Namespace) -> dict:
    import ours

    problem, run = made(job), all_solvers(job)[job.solver]
    warm_up(problem, run, at_size=False)
    before, on_device = clocks.fresh_peak(), ours.peak_on_device(job.device)
    run(problem, clocks.Recorder(None, iterations=MEMORY_ITERATIONS))
    used = clocks.peak() - before
    if on_device is not None and job.solver.startswith("deconvnet"):
        used = ours.peak_on_device(job.device)
    (N, _, *image), K = problem.y.shape, len(problem.f)
    found = {"problem": job.problem, "solver": job.solver, "threads": job.pool, "bytes": used}
    found["maps"] = 4 * N * K * int(np.prod(image))
    say(f"{job.problem}: {job.solver} {used / found['maps']:.1f} times its maps")
    return found


def names_of_learners(job: argparse.Namespace) -> list[str]:
    import ours
    import sporco_peers

    return [*sporco_peers.LEARNERS, *ours.LEARNERS]


def learn_once(job: argparse.Namespace) -> dict:
    """Filters and seconds of one learner, which has run for two iterations before."""
    import ours
    import sporco_peers

    spec = learning_spec(job)
    y, f = problems.images(spec), problems.random_filters(spec)
    ours.torch.set_num_threads(job.pool)
    sporco_peers.set_threads(job.pool)
    if job.learner in ours.LEARNERS:
        settings = ours.LEARNERS[job.learner]
        run, iterations = partial(ours.learn, device=job.device, **settings), float("inf")
    else:
        learner, iterations = sporco_peers.LEARNERS[job.learner]
        run = partial(learner, threads=job.pool)
    if job.quick:
        iterations = 6
    run(y, f, spec.weight, clocks.Snapshots(iterations=2))
    snapshots = clocks.Snapshots(
        iterations=iterations, limit=3 * job.limit, synchronize=ours.synchronizer(job.device)
    )
    run(y, f, spec.weight, snapshots)
    np.savez(job.file, *(filters for _, _, filters in snapshots.kept))
    seconds = [(iteration, t) for iteration, t, _ in snapshots.kept]
    say(f"{job.pool} threads: {job.learner} {seconds[-1][0]} iterations, {seconds[-1][1]:.1f} s")
    return {"learner": job.learner, "threads": job.pool, "seconds": seconds, "file": job.file}


def score(job: argparse.Namespace) -> dict:
    """For every dictionary of some files the objective of the images that it was learned from and
    of those held out, each coded again.
    """
    import ours

    spec = learning_spec(job)
    both = problems.learning_images(spec, 2 if job.quick else problems.HELD_OUT)
    known, widest = {}, 0.0

    def judge(f: np.ndarray) -> list[float]:
        nonlocal widest
        key = f.tobytes()
        if key not in known:
            found = []
            for y in both:
                problem = problems.Problem("learning", y, f, spec.weight)
                search = partial(ours.search, problem, "circular", device=job.device)
                found.append(
                    search(gap=SCORE_GAP, patience=job.patience / 5, dtype=ours.torch.float32)
                )
            known[key] = [sum(each.objective) for each in found]
            widest = max(widest, *(each.gap for each in found))
        return known[key]

    start = problems.Problem("learning", both[0], problems.random_filters(spec), spec.weight)
    compile_search(start, job.device)
    scores = []
    for file in job.files:
        with np.load(file) as kept:
            scores.append([judge(kept[name]) for name in kept.files])
        say(f"judged {len(scores)} of {len(job.files)}: {scores[-1][-1][0]:.1f}")
    return {"scores": scores, "start": judge(start.f), "gap": widest}


CHILDREN = {
    "minima": minima_of,
    "describe": describe,
    "learners": names_of_learners,
    "coding": code_in_turns,
    "batch": batch_in_turns,
    "memory": memory_of,
    "learning": learn_once,
    "score": score,
}


def all_solvers(job: argparse.Namespace) -> dict[str, Callable]:
    import ours
    import sporco_peers

    ours.torch.set_num_threads(job.pool)
    sporco_peers.set_threads(job.pool)
    every = {**sporco_peers.SOLVERS, **ours.solvers(job.device)}
    words = job.solvers or [""]
    return {name: run for name, run in every.items() if any(word in name for word in words)}


def spec_of(job: argparse.Namespace) -> problems.Spec:
    spec = problems.SPECS[job.problem]
    return spec.tiny() if job.quick else spec


def learning_spec(job: argparse.Namespace) -> problems.Spec:
    return problems.LEARNING.tiny() if job.quick else problems.LEARNING


def made(job: argparse.Namespace) -> problems.Problem:
    return problems.make(spec_of(job), Path(job.output))


def warm_up(problem: problems.Problem, run: Callable, at_size: bool = True) -> None:
    """Compile all that a solver comes upon, on a corner; plan for the size of the images."""
    run(corner(problem), clocks.Recorder(None, iterations=60))
    if at_size:
        run(problem, clocks.Recorder(None, iterations=2))


def compile_search(problem: problems.Problem, device: str) -> None:
    import ours

    for dtype in (ours.torch.float32, ours.torch.float64):
        ours.search(
            corner(problem), "circular", gap=1e-2, patience=60.0, device=device, dtype=dtype
        )


def corner(problem: problems.Problem) -> problems.Problem:
    return replace(problem, y=np.ascontiguousarray(problem.y[..., :32, :32]))


def timed(
    job: argparse.Namespace,
    problem: problems.Problem,
    run: Callable,
    boundary: str,
    lowest: float,
    level: float,
) -> list[clocks.Point]:
    import ours

    recorder = clocks.Recorder(
        problems.Objective(problem, boundary),
        goal=lowest * (1 + level),
        limit=job.limit,
        synchronize=ours.synchronizer(job.device),
    )
    run(problem, recorder)
    return recorder.points


def closing(points: list[clocks.Point]) -> str:
    iteration, seconds, value = points[-1]
    return f"{iteration} iterations, {seconds:.2f} s, objective {value:.6g}"


def say(line: str) -> None:
    """Print progress; the standard output of a child is reserved for its result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
