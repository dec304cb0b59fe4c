"""Compare dictionary learning with alphacsc and RoseCDL, on signals and on images.

python benchmarks/compare_alphacsc_rosecdl.py --alphacsc-python PYTHON --rosecdl CHECKOUT
python benchmarks/compare_alphacsc_rosecdl.py signals --samples 16384 --ratios 0.1 --threads 2 ...
python benchmarks/compare_alphacsc_rosecdl.py --quick ...   tiny versions, to check that it runs
python benchmarks/compare_alphacsc_rosecdl.py --show        the tables and plots of the last run

signals    RoseCDL's simulated signals: which learner finds the true atoms, and how soon
images     ten 128x128 crops of photographs; alphacsc codes signals only

All learn non-negative codes, with the same lambda and from the same random atoms. An objective is
that of codes inferred anew for the learned atoms, scaled to unit norm, by one function with a
duality gap, for training and held-out data; neither it nor compilation is timed.

PYTHON: an interpreter with alphacsc, which needs numpy below 2.4:
    python -m venv peers && peers/bin/pip install alphacsc 'numpy<2.4'
CHECKOUT: a checkout of github.com/tommoral/RoseCDL, which runs in this interpreter. Without one of
them its package is left out. The learners take turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import alphacsc_rosecdl_learners as peers
import alphacsc_rosecdl_tables as tables
import numpy as np
import problems
import timing
from processes import in_turn, result_of, say
from simulated_signals import SEEDS, SignalSpec, recovery, simulate

TASKS = ("signals", "images")
# The relative duality gap of the codes that score a dictionary, and the most seconds for them.
GAP, PATIENCE = 1e-2, 60.0
OURS = {
    "signals": {
        "deconvnet, 12 epochs": {"epochs": 12, "batch_size": 4},
        "deconvnet, 36 epochs": {"epochs": 36, "batch_size": 4},
    },
    "images": {
        "deconvnet, 12 epochs": {"epochs": 12, "batch_size": 5},
        "deconvnet, 36 epochs": {"epochs": 36, "batch_size": 5},
    },
}
CLOCKS = {"wall": "perf_counter", "cpu": "process_time"}


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    options = arguments()
    if options.child:
        job = json.loads(Path(options.child).read_text())
        print(json.dumps(CHILDREN[job["task"]](argparse.Namespace(**job))))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    for task in options.what:
        file = options.output / f"{task}.json"
        if not options.show:
            file.write_text(json.dumps(learned(options, task), indent=1))
        elif not file.exists():
            sys.exit(f"--show: there is no {file}; run {task} first")
        results = json.loads(file.read_text())
        if "gap" not in results and not options.unscored:
            results = scored(results)
            file.write_text(json.dumps(results, indent=1))
        if "gap" in results:
            print(tables.show(task, results, options.output))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", nargs="*", metavar="what", help=f"{', '.join(TASKS)} (default: both)")
    add("--alphacsc-python", metavar="PYTHON", help="an interpreter that has alphacsc")
    add("--rosecdl", metavar="CHECKOUT", help="a checkout of RoseCDL")
    add(
        "--samples", type=int, nargs="+", default=[16_384, 46_340, 131_072],
        help="signals: their lengths, at least 640 (default 16384 46340 131072, those of RoseCDL)",
    )  # fmt: skip
    add(
        "--ratios", type=float, nargs="+", default=[0.1, 0.3],
        help="signals: lambda relative to the largest (default 0.1 0.3)",
    )  # fmt: skip
    add(
        "--learners", nargs="+", metavar="WORD",
        help="only learners whose names contain one of these words",
    )  # fmt: skip
    add(
        "--threads", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}),
        help="threads of the CPU, one run for each number (default: 1 and 2)",
    )  # fmt: skip
    add("--repeats", type=int, default=1, help="rounds, each of another seed (default 1)")
    add(
        "--limit", type=float, default=120.0,
        help="seconds after which a learner stops, at the end of an iteration (default 120)",
    )  # fmt: skip
    add(
        "--clock", choices=list(CLOCKS), default="wall",
        help="cpu: seconds of the CPU, for a busy machine; with one thread only (default wall)",
    )  # fmt: skip
    add("--quick", action="store_true", help="tiny signals and images, one round")
    add("--show", action="store_true", help="learn nothing, show the results of the last run")
    add(
        "--unscored", action="store_true",
        help="learn only, while the machine is quiet; --show then scores the atoms",
    )  # fmt: skip
    add(
        "--output", type=Path, default=Path("runs/benchmark/alphacsc_rosecdl"),
        help="folder for results, plots and atoms (default runs/benchmark/alphacsc_rosecdl)",
    )  # fmt: skip
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.what if name not in TASKS]:
        parser.error(f"what={' '.join(unknown)}: choose from {', '.join(TASKS)}")
    for key, least in (("repeats", 1), ("threads", 1), ("samples", 640)):
        if np.min(getattr(options, key)) < least:
            parser.error(f"--{key}={np.min(getattr(options, key))}: must be at least {least}")
    if not options.limit > 0:
        parser.error(f"--limit={options.limit}: must be positive")
    if not 0 < min(options.ratios) <= max(options.ratios) < 1:
        parser.error(f"--ratios={options.ratios}: must lie between 0 and 1")
    if options.clock == "cpu" and options.threads != [1]:
        parser.error(f"--clock=cpu: needs --threads 1, not {options.threads}")
    if options.rosecdl and not (Path(options.rosecdl) / "rosecdl" / "rosecdl.py").is_file():
        parser.error(f"--rosecdl={options.rosecdl}: there is no rosecdl/rosecdl.py in it")
    if options.alphacsc_python and not os.access(options.alphacsc_python, os.X_OK):
        parser.error(f"--alphacsc-python={options.alphacsc_python}: is no program")
    options.what = options.what or list(TASKS)
    if options.quick:
        options.output = options.output / "quick"
        options.threads, options.repeats = options.threads[:1], 1
        options.samples, options.ratios = options.samples[:1], options.ratios[:1]
        options.limit = min(options.limit, 5.0)
    return options


# The parent process: it starts child processes, one at a time, and gathers their results.


def learned(options: argparse.Namespace, task: str) -> dict:
    """The seconds of every learner on every problem; its atoms go to files."""
    started, runs, described, versions = time.time(), [], {}, {}
    (options.output / "atoms").mkdir(exist_ok=True)
    for threads in options.threads:
        for turn in range(options.repeats):
            for problem in PROBLEMS[task](options, turn):
                data = str(options.output / "atoms" / f"problem-{problem.name}-{turn}.npz")
                problem.save(data)
                described[problem.name] = {"title": problem.title}
                for learner in in_turn(learners(options, task), turn):
                    file = str(options.output / "atoms" / f"learned-{task}-{len(runs)}.npz")
                    done = learn(options, {"learner": learner, "data": data, "file": file}, threads)
                    versions |= {learner.split()[0].rstrip(","): done["version"]}
                    run = {"problem": problem.name, "learner": learner, "threads": threads}
                    run |= {"turn": turn, "points": done["points"], "data": data, "file": file}
                    runs.append(run)
                    iteration, seconds = done["points"][-1]
                    count = f"{iteration} iterations, {seconds:.1f} s"
                    say(f"{problem.name}, {threads} threads, round {turn + 1}: {learner} {count}")
    return {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "minutes": (time.time() - started) / 60,
        "machine": timing.machine(),
        "versions": versions,
        "options": {**vars(options), "output": str(options.output)},
        "problems": described,
        "runs": runs,
    }


def scored(results: dict) -> dict:
    """The results with the objectives and the recovery of every dictionary."""
    files = [(run["data"], run["file"]) for run in results["runs"]]
    done = child("score", os.cpu_count() or 1, files=files)
    runs = []
    for run, scores in zip(results["runs"], done["scores"], strict=True):
        points = [[*point[:2], *score] for point, score in zip(run["points"], scores, strict=True)]
        references = {key: done[key][run["data"]] for key in ("start", "true")}
        runs.append({**run, "points": points, **references})
    return {**results, "runs": runs, "gap": done["gap"]}


def learners(options: argparse.Namespace, task: str) -> list[str]:
    names = [*OURS[task]]
    if options.rosecdl:
        names += peers.ROSECDL[task]
    if options.alphacsc_python and task == "signals":
        names += peers.ALPHACSC
    words = options.learners or [""]
    return [name for name in names if any(word in name for word in words)]


def learn(options: argparse.Namespace, job: dict, threads: int) -> dict:
    """{points: [(iteration, seconds)], version} of one learner, in a process of its own."""
    job = {**job, "threads": threads, "limit": options.limit, "clock": CLOCKS[options.clock]}
    job |= {"iterations": 3 if options.quick else None, "rosecdl": options.rosecdl}
    if job["learner"].startswith("deconvnet"):
        return child("learn", threads, **job)
    python = options.alphacsc_python if job["learner"] in peers.ALPHACSC else sys.executable
    return result_of([python, peers.__file__], job, threads, job["learner"])


def child(task: str, pool: int, **job) -> dict:
    command, name = [sys.executable, __file__, "--child"], job.get("learner", "")
    return result_of(command, {"task": task, **job}, pool, f"{task} {name}")


@dataclass(frozen=True)
class LearningProblem:
    """Training and held-out data (N, C, H, W), initial atoms (K, C, h, w), lambda, true atoms.

    tapered: whether the peers let atoms fade out at their ends. true_atoms: none for photographs.
    """

    name: str
    title: str
    train: np.ndarray
    held_out: np.ndarray
    start: np.ndarray
    weight: float
    tapered: bool
    true_atoms: np.ndarray

    def save(self, file: str) -> None:
        arrays = {"y": self.train, "held_out": self.held_out, "f": self.start}
        true = {"true_atoms": self.true_atoms, "tapered": self.tapered}
        np.savez(file, weight=self.weight, **arrays, **true)


def signal_problems(options: argparse.Namespace, turn: int) -> Iterator[LearningProblem]:
    for samples in options.samples:
        for ratio in options.ratios:
            spec = SignalSpec(samples, ratio, seed=SEEDS[turn % len(SEEDS)])
            spec = spec.tiny() if options.quick else spec
            s = simulate(spec)
            yield LearningProblem(
                f"signals-{samples}-{ratio:g}", spec.title, s.train, s.held_out, s.start, s.weight,
                tapered=True, true_atoms=s.true_atoms,
            )  # fmt: skip


def image_problems(options: argparse.Namespace, turn: int) -> Iterator[LearningProblem]:
    spec = problems.LEARNING.tiny() if options.quick else problems.LEARNING
    train, held_out = problems.learning_images(spec, 2 if options.quick else problems.HELD_OUT)
    start = problems.random_filters(spec)
    yield LearningProblem(
        "images", spec.title, train, held_out, start, spec.weight, False, start[:0]
    )


PROBLEMS = {"signals": signal_problems, "images": image_problems}


# The child processes. They import the solvers, whose thread pools then have the size of the job.


def learn_once(job: argparse.Namespace) -> dict:
    """One of our learners, after a warm-up on a corner."""
    import deconvnet_solvers

    deconvnet_solvers.torch.set_num_threads(job.threads)
    with np.load(job.data) as data:
        y, f, weight, signals = data["y"], data["f"], float(data["weight"]), data["tapered"]
    settings = OURS["signals" if signals else "images"][job.learner]
    run = partial(
        deconvnet_solvers.learn,
        boundary="valid",
        non_negative=True,
        given=True,
        init="patches",
        solver=deconvnet_solvers.by_coordinates,
        **settings,
    )
    run(*peers.corner(y, f), weight, timing.Snapshots(iterations=2))
    iterations = math.inf if job.iterations is None else job.iterations
    snapshots = timing.Snapshots(iterations=iterations, limit=job.limit, clock=job.clock)
    run(y, f, weight, snapshots)
    np.savez(job.file, *(filters for _, _, filters in snapshots.recorded))
    return {"points": [point[:2] for point in snapshots.recorded], "version": "this checkout"}


def score(job: argparse.Namespace) -> dict:
    """The objectives and the recovery of every dictionary in some files, and of their problems.

    scores: for each file and each of its dictionaries [training, held out, recovery]; start, true:
    the same of the initial and of the true atoms of each problem; gap: the widest duality gap.
    """
    import deconvnet_solvers

    known, widest = {}, 0.0

    def objective(y: np.ndarray, f: np.ndarray, weight: float) -> float:
        nonlocal widest
        problem = problems.Problem("learning", y, f, weight, non_negative=True)
        minimum = deconvnet_solvers.search(
            problem, "valid", gap=GAP, patience=PATIENCE, dtype=deconvnet_solvers.torch.float32
        )
        widest = max(widest, minimum.gap)
        return sum(minimum.objective)

    def scores(data: str, f: np.ndarray) -> list[float | None]:
        if (data, f.tobytes()) not in known:
            p = loaded[data]
            unit = f / np.sqrt(np.square(f).sum((1, 2, 3), keepdims=True)).clip(1e-12)
            both = [objective(p[y], unit, float(p["weight"])) for y in ("y", "held_out")]
            true = p["true_atoms"]
            known[data, f.tobytes()] = [*both, recovery(true, f) if len(true) else None]
        return known[data, f.tobytes()]

    loaded = {data: dict(np.load(data)) for data, _ in job.files}
    result = {"scores": [], "start": {}, "true": {}}
    for data, p in loaded.items():
        true = np.concatenate([p["true_atoms"], p["f"][len(p["true_atoms"]) :]])
        result["start"][data], result["true"][data] = scores(data, p["f"]), scores(data, true)
    for data, file in job.files:
        with np.load(file) as stored:
            result["scores"].append([scores(data, stored[name]) for name in stored.files])
        last = result["scores"][-1][-1]
        say(f"scored {len(result['scores'])} of {len(job.files)}: {last[0]:.6g}")
    return {**result, "gap": widest}


CHILDREN = {"learn": learn_once, "score": score}


if __name__ == "__main__":
    main()
