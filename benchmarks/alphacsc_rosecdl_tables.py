"""Tables and plots of the results of benchmarks/compare_alphacsc_rosecdl.py."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from timing import spread

# A learner has arrived once its objective is this close to the lowest that it reaches, relatively.
ARRIVED = 1e-2
# [iteration, seconds, objective of the training data, of the held-out data, recovery or null]
SECONDS, TRAIN, HELD_OUT, RECOVERY = 1, 2, 3, 4


def show(task: str, results: dict, folder: Path) -> str:
    """The tables as text; plots are saved in the folder."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    peers = "; ".join(f"{name}: {number}" for name, number in results["versions"].items())
    kind = "seconds of the CPU" if results["options"]["clock"] == "cpu" else "seconds"
    lines = [
        f"\n# {task}\n{machine['processor']}, {machine['cores']} cores, load {machine['load']} at "
        f"the start; Python {machine['python']}, {versions}; {peers}; {kind}; rounds: "
        f"{results['options']['repeats']}; codes for scores within {results['gap']:.1e} of the "
        "minimum"
    ]
    for threads in dict.fromkeys(run["threads"] for run in results["runs"]):
        for name, problem in results["problems"].items():
            runs = [r for r in results["runs"] if (r["problem"], r["threads"]) == (name, threads)]
            lines += [f"\n## {problem['title']}, {_threads(threads)}\n", *_table(runs)]
        file = folder / f"{task}-{threads}.png"
        _plot(results, threads, file)
        lines.append(f"\nplot: {file}")
    return "\n".join(lines)


def _table(runs: list[dict]) -> list[str]:
    by_name: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: run["turn"]):
        by_name.setdefault(run["learner"], []).append(run)
    ours = {name: runs for name, runs in by_name.items() if name.startswith("deconvnet")}
    lines = [
        f"seconds: until the objective is within {ARRIVED:.0%} of the lowest, and in all; the last "
        "columns: seconds in which ours reach that lowest objective, and how much sooner that is\n",
        "| learner | iterations | seconds | objective | held out | recovery | "
        + "".join(f"{name} | " for name in ours),
        "|---" * (6 + len(ours)) + "|",
    ]
    for key, label in (("start", "initial atoms"), ("true", "true atoms")):
        values = [[None, 0.0, *run[key]] for run in next(iter(by_name.values()))]
        if key == "start" or values[0][RECOVERY] is not None:
            lines.append(f"| {label} | | | {_scores(values)} | " + " | " * len(ours))
    for name, of_name in by_name.items():
        best = [min(run["points"], key=lambda point: point[TRAIN]) for run in of_name]
        arrived = [time_to(r, (1 + ARRIVED) * b[TRAIN]) for r, b in zip(of_name, best, strict=True)]
        whole = [run["points"][-1][SECONDS] for run in of_name]
        count = "/".join(str(run["points"][-1][0]) for run in of_name)
        cells = []
        for own in ours.values() if name not in ours else ():
            reached = [time_to(r, b[TRAIN]) for r, b in zip(own, best, strict=False)]
            faster = [a / r for a, r in zip(arrived, reached, strict=False)]
            cells.append(f"{spread(reached)}, {spread(faster, 1)} times")
        cells = cells or [""] * len(ours)
        lines.append(
            f"| {name} | {count} | {spread(arrived)} of {spread(whole)} | {_scores(best)} | "
            + "".join(f"{cell} | " for cell in cells)
        )
    return lines


def time_to(run: dict, objective: float) -> float:
    """Seconds until the training objective is at most this; inf if it never is."""
    return next((p[SECONDS] for p in run["points"] if p[TRAIN] <= objective), math.inf)


def _scores(points: list[list]) -> str:
    train, held_out = (spread([p[column] for p in points], 1) for column in (TRAIN, HELD_OUT))
    found = [p[RECOVERY] for p in points]
    return f"{train} | {held_out} | {'-' if None in found else spread(found, 4)}"


def _plot(results: dict, threads: int, file: Path) -> None:
    names = list(results["problems"])
    recovered = results["runs"][0]["points"][0][RECOVERY] is not None
    columns = (TRAIN, RECOVERY) if recovered else (TRAIN, HELD_OUT)
    figure, axes = plt.subplots(
        2, len(names), figsize=(max(6.5, 4.4 * len(names)), 6.8), squeeze=False, sharex="col"
    )
    styles: dict[str, tuple] = {}
    greys = itertools.cycle(["0.1", "0.35", "0.5", "0.65", "0.8"])
    colors = itertools.cycle(["#d62728", "#1f77b4", "#2ca02c", "#9467bd"])
    for column, name in enumerate(names):
        for run in results["runs"]:
            if (run["problem"], run["threads"]) != (name, threads):
                continue
            learner = run["learner"]
            if learner not in styles:
                color = next(colors) if learner.startswith("deconvnet") else next(greys)
                styles[learner] = color, "o^sDvx+*"[len(styles) % 8]
            color, mark = styles[learner]
            label = None if column or run["turn"] else learner
            for axis, value in zip(axes[:, column], columns, strict=True):
                axis.plot(
                    [p[SECONDS] for p in run["points"]], [p[value] for p in run["points"]],
                    f"-{mark}", color=color, ms=3.5, lw=1.4, label=label,
                )  # fmt: skip
        what = ("objective, training", "recovery" if recovered else "objective, held out")
        for axis, text in zip(axes[:, column], what, strict=True):
            axis.set(xscale="log", ylabel=text)
            axis.grid(alpha=0.3)
            if text.startswith("objective"):
                lowest = min(min(line.get_ydata()) for line in axis.lines)
                axis.set_ylim(0.97 * lowest, 2.5 * lowest)
        axes[1, column].set_xlabel("seconds")
        axes[0, column].set_title(results["problems"][name]["title"].replace(", ", "\n", 1), size=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
    figure.suptitle(f"Dictionary learning with codes >= 0, {_threads(threads)}", fontsize=11)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _threads(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
