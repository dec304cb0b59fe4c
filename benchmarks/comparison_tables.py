"""Tables and plots of the results of benchmarks/compare_sporco.py."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from timing import LEVELS, best, ratios, spread, time_to

BATCH_LEVELS = (1e-2, 1e-3)
# Ours in colours, the others in greys; one line style for each problem.
STYLES = {
    "SPORCO ADMM": ("0.35", "-"),
    "SPORCO PGM": ("0.6", "-"),
    "deconvnet coordinate": ("#d62728", "-"),
    "deconvnet ADMM": ("#1f77b4", "-"),
    "deconvnet FISTA": ("#2ca02c", "-"),
    "deconvnet coordinate, valid": ("#d62728", ":"),
    "deconvnet ADMM, valid": ("#1f77b4", ":"),
    "deconvnet FISTA, valid": ("#2ca02c", ":"),
}


def show(task: str, results: dict, folder: Path) -> str:
    """The tables as text; plots are saved in the folder."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    head = (
        f"\n# {task}\n{machine['processor']}, {machine['cores']} cores, load {machine['load']} at "
        f"the start; Python {machine['python']}, {versions}; deconvnet on "
        f"{results['options']['device']}; {results['options']['repeats']} rounds: medians, the "
        f"range in brackets\n"
    )
    tables = {"coding": coding, "learning": learning, "batch": batch, "memory": memory}
    return "\n".join([head, *tables[task](results, folder)])


def coding(results: dict, folder: Path) -> list[str]:
    lines = []
    for threads in dict.fromkeys(run["threads"] for run in results["runs"]):
        for name, problem in results["problems"].items():
            runs = [r for r in results["runs"] if (r["problem"], r["threads"]) == (name, threads)]
            lines += _one_problem(problem, runs, threads)
        file = folder / f"coding-{threads}.png"
        _plot_coding(results, threads, file)
        lines.append(f"\nplot: {file}")
    return lines


def _one_problem(problem: dict, runs: list[dict], threads: int) -> list[str]:
    lines = [f"\n## {problem['title']}, {_threads(threads)}\n"]
    for boundary, lowest in problem["minima"].items():
        lines.append(
            f"minimum ({boundary}): {sum(lowest['objective']):.6g}, duality gap {lowest['gap']:.1e}"
            + (", too wide for the last level" if lowest["gap"] > LEVELS[-1] / 2 else "")
        )
    levels = " | ".join(f"{level:.0e}" for level in LEVELS)
    lines += [
        f"\n| seconds to | {levels} | iterations to {LEVELS[-1]:.0e} | s per iteration |",
        "|---" * (len(LEVELS) + 3) + "|",
    ]
    times = _times(problem, runs)
    for solver, by_level in times.items():
        of_solver = [run for run in runs if run["solver"] == solver]
        lowest = _lowest(problem, of_solver[0]["boundary"])
        counts = [time_to(run["points"], lowest, LEVELS[-1])[1] for run in of_solver]
        each = [run["points"][-1][1] / max(run["points"][-1][0], 1) for run in of_solver]
        cells = " | ".join(spread(by_level[level]) for level in LEVELS)
        count = f"{statistics.median(counts):.0f}" if all(counts) else "never"
        lines.append(f"| {solver} | {cells} | {count} | {statistics.median(each):.4f} |")
    others = [by_level for solver, by_level in times.items() if solver.startswith("SPORCO")]
    if not others:
        return lines
    # With boundary "valid" it is another problem, which SPORCO does not solve.
    lines += [f"\n| SPORCO's best time (circular) relative to ours | {levels} |"]
    lines += ["|---" * (len(LEVELS) + 1) + "|"]
    fastest = {level: best([by_level[level] for by_level in others]) for level in LEVELS}
    for solver, by_level in times.items():
        if solver.startswith("deconvnet"):
            cells = " | ".join(_ratio(fastest[level], by_level[level]) for level in LEVELS)
            lines.append(f"| {solver} | {cells} |")
    return lines


def _times(problem: dict, runs: list[dict]) -> dict[str, dict[float, list[float]]]:
    """The seconds of each solver to each level, round by round."""
    times: dict[str, dict[float, list[float]]] = {}
    for run in sorted(runs, key=lambda run: run["turn"]):
        lowest = _lowest(problem, run["boundary"])
        for level in LEVELS:
            seconds, _ = time_to(run["points"], lowest, level)
            times.setdefault(run["solver"], {}).setdefault(level, []).append(seconds)
    return {name: times[name] for name in sorted(times, key=_rank)}


def _plot_coding(results: dict, threads: int, file: Path) -> None:
    names, lines = list(results["problems"]), {}
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.7 * rows + 0.7), squeeze=False, sharey=True
    )
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.set_axis_off()
            continue
        problem = results["problems"][names[place]]
        axis.set_title(problem["title"], fontsize=9)
        for run in results["runs"]:
            if (run["problem"], run["threads"]) != (names[place], threads):
                continue
            color, style = STYLES.get(run["solver"], ("black", "--"))
            above = _above(run["points"], _lowest(problem, run["boundary"]))
            width = 1.8 if style == "-" else 1.2
            (line,) = axis.loglog(*above, style, color=color, lw=width, alpha=0.8)
            lines[run["solver"]] = line
        axis.set_ylim(LEVELS[-1] / 2, 3)
        axis.grid(alpha=0.3)
        if place % columns == 0:
            axis.set_ylabel("objective above the minimum,\nrelative", fontsize=9)
        if place + columns >= len(names):
            axis.set_xlabel("seconds", fontsize=9)
    order = sorted(lines, key=_rank)
    figure.legend(
        [lines[name] for name in order],
        order,
        loc="lower center",
        ncols=min(4, 2 * columns),
        fontsize=9,
        frameon=False,
    )
    figure.suptitle(f"Convolutional sparse coding, {_threads(threads)}, every round", fontsize=11)
    figure.tight_layout(rect=(0, 0.9 / (3.7 * rows + 0.7), 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _above(points: list[list[float]], minimum: float) -> tuple[list[float], list[float]]:
    relative = [(seconds, value / minimum - 1) for _, seconds, value in points]
    return [s for s, _ in relative], [max(a, LEVELS[-1] / 10) for _, a in relative]


def learning(results: dict, folder: Path) -> list[str]:
    runs = results["runs"]
    lines = [
        f"objective of the training images and of images held out, coded again to a duality gap of "
        f"{results['gap']:.1e}; the random start: {results['start'][0]:.1f} and "
        f"{results['start'][1]:.1f}"
    ]
    for threads in dict.fromkeys(run["threads"] for run in runs):
        by_name: dict[str, list[dict]] = {}
        for run in runs:
            if run["threads"] == threads:
                by_name.setdefault(run["learner"], []).append(run)
        lines += [
            f"\n## {_threads(threads)}\n",
            "| learner | seconds -> training objective | seconds in all | training | held out |",
            "|---|---|---|---|---|",
        ]
        for name, several in by_name.items():
            seconds = [run["points"][-1][1] for run in several]
            *_, trained, held_out = several[0]["points"][-1]
            lines.append(
                f"| {name} | {_course(several)} | {spread(seconds, 1)} | {trained:.1f} | "
                f"{held_out:.1f} |"
            )
        lines += _overtaking(by_name)
        file = folder / f"learning-{threads}.png"
        _plot_learning(by_name, threads, file)
        lines.append(f"\nplot: {file}")
    return lines


def _course(runs: list[dict], marks: int = 6) -> str:
    """Median seconds over the rounds and the objective at some of the iterations."""
    count = min(len(run["points"]) for run in runs)
    chosen = sorted({round(i * (count - 1) / (marks - 1)) for i in range(marks)})
    seconds = [statistics.median(run["points"][i][1] for run in runs) for i in chosen]
    values = [runs[0]["points"][i][2] for i in chosen]
    return ", ".join(f"{s:.1f} -> {v:.1f}" for s, v in zip(seconds, values, strict=True))


def _overtaking(by_name: dict[str, list[dict]]) -> list[str]:
    """Seconds of ours until they are as low as SPORCO's learners end, and SPORCO's for that."""
    ours = [name for name in by_name if name.startswith("deconvnet")]
    peers = [name for name in by_name if name.startswith("SPORCO")]
    if not ours or not peers:
        return []
    lines = [
        f"\n| training objective | of | its seconds | {' | '.join(ours)} |",
        "|---" * (3 + len(ours)) + "|",
    ]
    for peer in peers:
        final = by_name[peer][0]["points"][-1][2]
        cells = []
        for name in ours:
            reached = [
                next((s for _, s, value, _ in run["points"] if value <= final), math.inf)
                for run in by_name[name]
            ]
            cells.append(spread(reached, 1))
        own = spread([run["points"][-1][1] for run in by_name[peer]], 1)
        lines.append(f"| {final:.1f} | {peer} | {own} | {' | '.join(cells)} |")
    return lines


def _plot_learning(by_name: dict[str, list[dict]], threads: int, file: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.4))
    greys = itertools.cycle(["0.1", "0.25", "0.4", "0.55", "0.7", "0.8"])
    colors = itertools.cycle(["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e"])
    marks = itertools.cycle("osv^Dx+*p")
    for name, runs in by_name.items():
        color = next(colors) if name.startswith("deconvnet") else next(greys)
        points = runs[len(runs) // 2]["points"]
        mark = next(marks)
        for axis, column in zip(axes, (2, 3), strict=True):
            axis.plot(
                [p[1] for p in points], [p[column] for p in points], f"-{mark}",
                color=color, ms=3.5, lw=1.4, label=name,
            )  # fmt: skip
    for axis, what in zip(axes, ("training images", "images held out"), strict=True):
        axis.set(xscale="log", xlabel="seconds", title=f"objective of the {what}, coded again")
        axis.grid(alpha=0.3)
        values = [line.get_ydata()[-1] for line in axis.lines]
        axis.set_ylim(min(values) * 0.985, max(values) * 1.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
    figure.suptitle(f"Dictionary learning, {_threads(threads)}", fontsize=11)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def batch(results: dict, folder: Path) -> list[str]:
    (problem,) = results["problems"].values()
    each = problem["minima"]["circular"]["objective"]
    lines = [problem["title"]]
    for threads in dict.fromkeys(run["threads"] for run in results["runs"]):
        lines += [
            f"\n## {_threads(threads)}\n",
            "| solver | to | all at once, s | one by one, s | one by one / all at once |",
            "|---|---|---|---|---|",
        ]
        runs = [run for run in results["runs"] if run["threads"] == threads]
        for name in sorted({run["solver"] for run in runs}, key=_rank):
            for level in BATCH_LEVELS:
                together, single = [], []
                for run in (run for run in runs if run["solver"] == name):
                    together.append(time_to(run["together"], sum(each), level)[0])
                    both = zip(run["single"], each, strict=True)
                    single.append(sum(time_to(points, one, level)[0] for points, one in both))
                lines.append(
                    f"| {name} | {level:.0e} | {spread(together)} | {spread(single)} | "
                    f"{_ratio(single, together)} |"
                )
    return lines


def memory(results: dict, folder: Path) -> list[str]:
    names = sorted({run["solver"] for run in results["runs"]}, key=_rank)
    lines = [
        "peak memory above what was in use before, in units of the float32 maps\n",
        f"| problem | maps, MiB | {' | '.join(names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for name, problem in results["problems"].items():
        runs = {run["solver"]: run for run in results["runs"] if run["problem"] == name}
        maps = next(iter(runs.values()))["maps"]
        cells = " | ".join(f"{runs[solver]['bytes'] / maps:.1f}" for solver in names)
        lines.append(f"| {problem['title']} | {maps / 2**20:.0f} | {cells} |")
    return lines


def _lowest(problem: dict, boundary: str) -> float:
    return sum(problem["minima"][boundary]["objective"])


def _ratio(others: list[float], ours: list[float]) -> str:
    """The spread of the ratios; "-" if ours never reached the level, "only ours" if others never
    did.
    """
    values = ratios(others, ours)
    if any(map(math.isnan, values)):
        return "-"
    return "only ours" if any(map(math.isinf, values)) else spread(values, 1)


def _rank(name: str) -> int:
    return list(STYLES).index(name) if name in STYLES else len(STYLES)


def _threads(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
