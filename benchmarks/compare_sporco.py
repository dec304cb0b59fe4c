"""Compare the speed of sparse coding and filter learning with SPORCO, on the same problems.

python benchmarks/compare_sporco.py                  everything below, one and two threads: hours
python benchmarks/compare_sporco.py coding --problems grey dense
python benchmarks/compare_sporco.py --quick          tiny versions, to check that it runs
python benchmarks/compare_sporco.py coding --show    the tables and plots of the last run again

coding     seconds until the objective is within 1e-1 to 1e-4 of the true minimum
learning   seconds to learn dictionaries, and their objective on training and held-out images
batch      ten images at once against one after the other
memory     the peak memory above what was in use before, in units of the size of the maps

Needs SPORCO (pip install -e '.[benchmark]'); photographs come with scikit-image. The solvers take
turns; each number of threads and each learner has a process of its own. Planning of Fourier
transforms, compilation and construction of solvers are not timed on either side, nor is the
evaluation of objectives, which one function does for all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import comparison_tables
import numpy as np
import problems
import timing
from processes import in_turn, result_of, say

TASKS = ("coding", "learning", "batch", "memory")
# The relative duality gap of the true minimum, and of the codes by which a dictionary is scored.
GAP, SCORE_GAP = 1e-6, 1e-3
CLOCKS = {"wall": "perf_counter", "cpu": "process_time"}
MEMORY_ITERATIONS = 30


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    options = arguments()
    if options.child:
        job = json.loads(Path(options.child).read_text())
        print(json.dumps(CHILDREN[job["task"]](argparse.Namespace(**job))))
        return
    if not options.show and importlib.util.find_spec("sporco") is None:
        sys.exit("benchmarks/compare_sporco.py needs SPORCO: pip install -e '.[benchmark]'")
    options.output.mkdir(parents=True, exist_ok=True)
    for task in options.what:
        file = options.output / f"{task}.json"
        if not options.show:
            started = time.time()
            results = {
                "command": " ".join(sys.argv),
                "date": time.strftime("%Y-%m-%d %H:%M"),
                "machine": timing.machine(),
                "options": {**vars(options), "output": str(options.output)},
                **PARENTS[task](options),
            }
            results["minutes"] = (time.time() - started) / 60
            file.write_text(json.dumps(results, indent=1))
        elif not file.exists():
            sys.exit(f"--show: there is no {file}; run {task} first")
        print(comparison_tables.show(task, json.loads(file.read_text()), options.output))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="what", help=f"{', '.join(TASKS)} (default: all of them)"
    )
    parser.add_argument(
        "--problems", nargs="+", choices=list(problems.SPECS), default=list(problems.SPECS),
        help="coding, memory: only these problems",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}),
        help="threads of the CPU, one run for each number (default: 1 and 2)",
    )  # fmt: skip
    parser.add_argument(
        "--solvers", nargs="+", metavar="WORD",
        help="coding, batch: only solvers whose names contain one of these words",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument(
        "--scico-python", metavar="PYTHON",
        help="coding: an interpreter that has SCICO and scikit-image; grey problems of one image",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=120.0,
        help="seconds within which a solver must reach 1e-4 (default 120; learners: three times)",
    )  # fmt: skip
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall",
        help="cpu: seconds of the CPU, for a busy machine; with one thread only (default wall)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=float, default=600.0,
        help="seconds to search for the true minimum of a problem, once (default 600)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu",
        help="of deconvnet; SPORCO always runs on the CPU (default cpu)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny images, two problems, one round")
    parser.add_argument(
        "--show", action="store_true", help="run nothing, show the results of the last run"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"),
        help="folder for results, plots, dictionaries and minima (default runs/benchmark)",
    )  # fmt: skip
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.what if name not in TASKS]:
        parser.error(f"what={' '.join(unknown)}: choose from {', '.join(TASKS)}")
    for key in ("repeats", "limit", "patience"):
        if not getattr(options, key) > 0:
            parser.error(f"--{key}={getattr(options, key)}: must be positive")
    if min(options.threads) < 1:
        parser.error(f"--threads={min(options.threads)}: must be at least 1")
    if options.clock == "cpu" and options.threads != [1]:
        parser.error(f"--clock=cpu: needs --threads 1, not {options.threads}")
    options.what = options.what or list(TASKS)
    if options.quick:
        options.output = options.output / "quick"
        options.threads, options.repeats = options.threads[:1], 1
        options.problems = options.problems[:2]
        options.limit, options.patience = min(options.limit, 5.0), min(options.patience, 20.0)
    return options


# The parent process: it starts child processes, one at a time, and gathers their results.


def coding(options: argparse.Namespace) -> dict:
    described = {name: prepare(options, name) for name in options.problems}
    runs = []
    for threads in options.threads:
        for name in options.problems:
            runs += child(options, "coding", threads, problem=name)
            if options.scico_python:
                runs += scico(options, threads, name, described[name])
    return {"problems": described, "runs": runs}


def scico(options: argparse.Namespace, threads: int, name: str, described: dict) -> list[dict]:
    """The runs of SCICO's ADMM, with several rho, on a problem of one image of one channel."""
    problem = make_problem(argparse.Namespace(**vars(options), problem=name))
    if problem.y.shape[:2] != (1, 1):
        say(f"{name}: not a problem for SCICO's solver, which takes one image of one channel")
        return []
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/problem.npz"
        np.savez(data, y=problem.y, f=problem.f, weight=problem.weight)
        lowest = sum(described["minima"]["circular"]["objective"])
        goal = lowest * (1 + timing.LEVELS[-1])
        job = {"data": data, "goal": goal, "limit": options.limit, "repeats": options.repeats}
        command = [options.scico_python, str(Path(__file__).with_name("scico_solver.py"))]
        found = result_of(command, {**job, "threads": threads}, threads, f"SCICO on {name}")
    said = {"problem": name, "boundary": "circular", "threads": threads}
    return [
        {"solver": f"SCICO ADMM, rho {run.pop('rho'):g}", **said, **run} for run in found["runs"]
    ]


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
    """Run each learner once per round, then score all dictionaries."""
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
        scored = child(options, "score", os.cpu_count() or 1, files=files)
    for run, points in zip(runs, scored["scores"], strict=True):
        both = zip(run.pop("seconds"), points, strict=True)
        run["points"] = [[*seconds, *scores] for seconds, scores in both]
        del run["file"]
    return {"runs": runs, "start": scored["start"], "gap": scored["gap"]}


def prepare(options: argparse.Namespace, name: str) -> dict:
    return child(options, "minima", os.cpu_count() or 1, problem=name)


def child(options: argparse.Namespace, task: str, threads: int, **more) -> dict | list:
    """The result of another process of this file, with `threads` threads in all of its pools."""
    job = {**vars(options), "output": str(options.output), "task": task, **more, "pool": threads}
    return result_of([sys.executable, __file__, "--child"], job, threads, f"{task} {more}")


PARENTS = {"coding": coding, "learning": learning, "batch": batch, "memory": memory}


# The child processes. They import the solvers, whose thread pools then have the size of the job.


def minima_of(job: argparse.Namespace) -> dict:
    import deconvnet_solvers

    problem, shape = make_problem(job), describe(job)
    shape["minima"] = {}
    compile_search(problem, job.device)
    for boundary in ("circular", "valid"):
        lowest = deconvnet_solvers.minimum(
            problem, boundary, Path(job.output), gap=GAP, patience=job.patience, device=job.device
        )
        shape["minima"][boundary] = {**asdict(lowest), "gap": lowest.gap}
        say(f"{job.problem} {boundary}: minimum {sum(lowest.objective):.6g}, gap {lowest.gap:.1e}")
    return shape


def describe(job: argparse.Namespace) -> dict:
    problem, spec = make_problem(job), spec_of(job)
    shape = {"images": problem.y.shape, "filters": problem.f.shape, "weight": problem.weight}
    return {"title": spec.title, **shape, "solvers": list(all_solvers(job))}


def code_in_turns(job: argparse.Namespace) -> list[dict]:
    import deconvnet_solvers

    problem, solvers, runs = make_problem(job), all_solvers(job), []
    minima = {
        b: deconvnet_solvers.stored_minimum(problem, b, Path(job.output))
        for b in ("circular", "valid")
    }
    for name in solvers:
        warm_up(problem, solvers[name])
    for turn in range(job.repeats):
        for name in in_turn(list(solvers), turn):
            boundary = deconvnet_solvers.boundary_of(name)
            lowest = sum(minima[boundary].objective)
            points = timed(job, problem, solvers[name], boundary, lowest, timing.LEVELS[-1])
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
            say(f"{job.problem}, {job.pool} threads, round {turn + 1}: {name} {last_point(points)}")
    return runs


def batch_in_turns(job: argparse.Namespace) -> list[dict]:
    """Run each solver on all images at once, and on one after the other."""
    import deconvnet_solvers

    problem, runs = make_problem(job), []
    lowest = deconvnet_solvers.stored_minimum(problem, "circular", Path(job.output)).objective
    solvers = {k: run for k, run in all_solvers(job).items() if not k.endswith(", valid")}
    for run in solvers.values():
        warm_up(problem, run)
        warm_up(problem.one(0), run)
    once = partial(timed, job, boundary="circular", level=comparison_tables.BATCH_LEVELS[-1])
    for turn in range(job.repeats):
        for name in in_turn(list(solvers), turn):
            together = once(problem, solvers[name], lowest=sum(lowest))
            single = [
                once(problem.one(n), solvers[name], lowest=one) for n, one in enumerate(lowest)
            ]
            say(f"batch, {job.pool} threads, round {turn + 1}: {name} {last_point(together)}")
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
    import deconvnet_solvers

    problem, run = make_problem(job), all_solvers(job)[job.solver]
    warm_up(problem, run, at_size=False)
    before, on_device = timing.fresh_peak(), deconvnet_solvers.peak_on_device(job.device)
    run(problem, timing.Recorder(None, iterations=MEMORY_ITERATIONS))
    used = timing.peak() - before
    if on_device is not None and job.solver.startswith("deconvnet"):
        used = deconvnet_solvers.peak_on_device(job.device)
    (N, _, *image), K = problem.y.shape, len(problem.f)
    results = {"problem": job.problem, "solver": job.solver, "threads": job.pool, "bytes": used}
    results["maps"] = 4 * N * K * int(np.prod(image))
    say(f"{job.problem}: {job.solver} {used / results['maps']:.1f} times its maps")
    return results


def names_of_learners(job: argparse.Namespace) -> list[str]:
    import deconvnet_solvers
    import sporco_solvers

    return [*sporco_solvers.LEARNERS, *deconvnet_solvers.LEARNERS]


def learn_once(job: argparse.Namespace) -> dict:
    """The filters and seconds of one learner, after a warm-up of two iterations."""
    import deconvnet_solvers
    import sporco_solvers

    spec = learning_spec(job)
    y, f = problems.images(spec), problems.random_filters(spec)
    deconvnet_solvers.torch.set_num_threads(job.pool)
    sporco_solvers.set_threads(job.pool)
    if job.learner in deconvnet_solvers.LEARNERS:
        settings = deconvnet_solvers.LEARNERS[job.learner]
        run, iterations = (
            partial(deconvnet_solvers.learn, device=job.device, **settings),
            float("inf"),
        )
    else:
        learner, iterations = sporco_solvers.LEARNERS[job.learner]
        run = partial(learner, threads=job.pool)
    if job.quick:
        iterations = 6
    run(y, f, spec.weight, timing.Snapshots(iterations=2))
    snapshots = timing.Snapshots(
        iterations=iterations,
        limit=3 * job.limit,
        synchronize=deconvnet_solvers.synchronizer(job.device),
        clock=CLOCKS[job.clock],
    )
    run(y, f, spec.weight, snapshots)
    np.savez(job.file, *(filters for _, _, filters in snapshots.recorded))
    seconds = [(iteration, t) for iteration, t, _ in snapshots.recorded]
    say(f"{job.pool} threads: {job.learner} {seconds[-1][0]} iterations, {seconds[-1][1]:.1f} s")
    return {"learner": job.learner, "threads": job.pool, "seconds": seconds, "file": job.file}


def score(job: argparse.Namespace) -> dict:
    """The objectives of training and held-out images for each dictionary in some files.

    The images are coded again for each dictionary.
    """
    import deconvnet_solvers

    spec = learning_spec(job)
    both = problems.learning_images(spec, 2 if job.quick else problems.HELD_OUT)
    scores_of, widest = {}, 0.0

    def score_dictionary(f: np.ndarray) -> list[float]:
        nonlocal widest
        key = f.tobytes()
        if key not in scores_of:
            minima = []
            for y in both:
                problem = problems.Problem("learning", y, f, spec.weight)
                search = partial(deconvnet_solvers.search, problem, "circular", device=job.device)
                minima.append(
                    search(
                        gap=SCORE_GAP,
                        patience=job.patience / 5,
                        dtype=deconvnet_solvers.torch.float32,
                    )
                )
            scores_of[key] = [sum(minimum.objective) for minimum in minima]
            widest = max(widest, *(minimum.gap for minimum in minima))
        return scores_of[key]

    start = problems.Problem("learning", both[0], problems.random_filters(spec), spec.weight)
    compile_search(start, job.device)
    scores = []
    for file in job.files:
        with np.load(file) as stored:
            scores.append([score_dictionary(stored[name]) for name in stored.files])
        say(f"scored {len(scores)} of {len(job.files)}: {scores[-1][-1][0]:.1f}")
    return {"scores": scores, "start": score_dictionary(start.f), "gap": widest}


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
    import deconvnet_solvers
    import sporco_solvers

    deconvnet_solvers.torch.set_num_threads(job.pool)
    sporco_solvers.set_threads(job.pool)
    every = {**sporco_solvers.SOLVERS, **deconvnet_solvers.solvers(job.device)}
    words = job.solvers or [""]
    return {name: run for name, run in every.items() if any(word in name for word in words)}


def spec_of(job: argparse.Namespace) -> problems.Spec:
    spec = problems.SPECS[job.problem]
    return spec.tiny() if job.quick else spec


def learning_spec(job: argparse.Namespace) -> problems.Spec:
    return problems.LEARNING.tiny() if job.quick else problems.LEARNING


def make_problem(job: argparse.Namespace) -> problems.Problem:
    return problems.make(spec_of(job), Path(job.output))


def warm_up(problem: problems.Problem, run: Callable, at_size: bool = True) -> None:
    """Compile everything that a solver needs, on a corner; plan transforms of the image size."""
    run(crop_corner(problem), timing.Recorder(None, iterations=60))
    if at_size:
        run(problem, timing.Recorder(None, iterations=2))


def compile_search(problem: problems.Problem, device: str) -> None:
    import deconvnet_solvers

    for dtype in (deconvnet_solvers.torch.float32, deconvnet_solvers.torch.float64):
        deconvnet_solvers.search(
            crop_corner(problem), "circular", gap=1e-2, patience=60.0, device=device, dtype=dtype
        )


def crop_corner(problem: problems.Problem) -> problems.Problem:
    return replace(problem, y=np.ascontiguousarray(problem.y[..., :32, :32]))


def timed(
    job: argparse.Namespace,
    problem: problems.Problem,
    run: Callable,
    boundary: str,
    lowest: float,
    level: float,
) -> list[timing.Point]:
    import deconvnet_solvers

    recorder = timing.Recorder(
        problems.Objective(problem, boundary),
        goal=lowest * (1 + level),
        limit=job.limit,
        synchronize=deconvnet_solvers.synchronizer(job.device),
        clock=CLOCKS[job.clock],
    )
    run(problem, recorder)
    return recorder.points


def last_point(points: list[timing.Point]) -> str:
    iteration, seconds, value = points[-1]
    return f"{iteration} iterations, {seconds:.2f} s, objective {value:.6g}"


if __name__ == "__main__":
    main()
