"""The benchmarks: problems, objective, bounds, clocks and tables."""

import argparse
import math
import warnings
from dataclasses import replace

import architectures
import comparison_tables
import gpu
import numpy as np
import problems
import pytest
import restoration
import scaling
import timing
import torch
from scipy.signal import convolve2d
from scipy.stats import linregress


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    y = random.standard_normal((2, 3, 9, 8)).astype(np.float32)
    f = random.standard_normal((4, 3, 3, 2)).astype(np.float32)
    return problems.Problem("small", y, f, 0.3)


def maps(problem, boundary, seed=1):
    (N, _, H, W), (K, _, h, w) = problem.y.shape, problem.f.shape
    grow = (h - 1, w - 1) if boundary == "valid" else (0, 0)
    return np.random.default_rng(seed).standard_normal((N, K, H + grow[0], W + grow[1]))


def synthesized_by_hand(z, f, boundary):
    """By sums of shifted filters (circular), or scipy's direct convolution (valid)."""
    (N, K), (_, C, h, w) = z.shape[:2], f.shape
    image = 0
    for k in range(K):
        if boundary == "circular":
            shifted = [(i, j, np.roll(z[:, k], (i, j), (1, 2))) for i in range(h) for j in range(w)]
            image = image + sum(f[k, :, i, j][:, None, None] * s[:, None] for i, j, s in shifted)
        else:
            rows = [[convolve2d(z[n, k], f[k, c], "valid") for c in range(C)] for n in range(N)]
            image = image + np.array(rows)
    return image


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_the_objective_is_that_of_a_convolution_done_by_hand(problem, boundary):
    z = maps(problem, boundary)
    error = problem.y - synthesized_by_hand(z, problem.f.astype(float), boundary)
    expected = np.square(error).sum((1, 2, 3)) / 2 + 0.3 * np.abs(z).sum((1, 2, 3))
    assert np.allclose(problems.Objective(problem, boundary)(z), expected, rtol=1e-12)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_correlation_is_the_adjoint_of_synthesis(problem, boundary):
    objective, z = problems.Objective(problem, boundary), maps(problem, boundary)
    y = np.random.default_rng(2).standard_normal(problem.y.shape)
    assert (objective.synthesize(z) * y).sum() == pytest.approx(
        (z * objective.correlate(y)).sum(), rel=1e-12
    )


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_no_maps_are_below_the_bound_of_any_others(problem, boundary):
    objective = problems.Objective(problem, boundary)
    candidates = [s * maps(problem, boundary, seed) for seed in range(4) for s in (0, 1e-2, 0.1, 1)]
    lowest = np.min([objective(z) for z in candidates], 0)
    highest = np.max([objective.dual(z) for z in candidates], 0)
    assert (highest <= lowest).all() and (highest > 0).all()


def test_the_bound_touches_the_minimum():
    """Of one filter of one pixel: the minimum is the soft threshold of the image."""
    y = np.random.default_rng(0).standard_normal((2, 1, 6, 6)).astype(np.float32)
    objective = problems.Objective(
        problems.Problem("dots", y, np.ones((1, 1, 1, 1), np.float32), 0.5)
    )
    z = np.sign(y) * np.maximum(np.abs(y.astype(float)) - 0.5, 0)
    assert np.allclose(objective.dual(z), objective(z), rtol=1e-12)


def test_the_low_frequencies_solve_their_normal_equations():
    image = np.random.default_rng(0).standard_normal((1, 40, 30))
    low = image - problems.high_pass(image, strength=5.0, border=16)
    mirrored = np.pad(image, ((0, 0), (16, 16), (16, 16)), "symmetric")
    # Mirrored again, the low frequencies are those of the padded image, except where it wraps.
    padded = np.pad(low, ((0, 0), (16, 16), (16, 16)), "symmetric")
    neighbours = sum(np.roll(padded, shift, axis) for shift in (1, -1) for axis in (1, 2))
    residual = padded + 5.0 * (4 * padded - neighbours) - mirrored
    assert np.abs(residual[:, 16:-16, 16:-16]).max() < 1e-2
    assert np.abs(problems.high_pass(np.full((1, 40, 30), 0.7))).max() < 1e-12


@pytest.mark.parametrize("spec", problems.SPECS.values(), ids=problems.SPECS)
def test_the_images_of_every_problem_have_its_size_and_come_without_download(spec):
    y = problems.images(spec)
    assert y.shape == (spec.count, spec.channels, spec.pixels, spec.pixels)
    assert y.dtype == np.float32 and np.abs(y).max() <= 1 and y.std((1, 2, 3)).min() > 0.01


def test_held_out_crops_are_of_other_photographs():
    trained, held_out = problems.learning_images(problems.LEARNING, problems.HELD_OUT)
    assert len(trained) == 10 and len(held_out) == 5
    assert not set(problems.CODED) & set(problems.OTHERS)


def test_random_filters_have_unit_norm_and_are_the_same_every_time():
    f = problems.random_filters(problems.LEARNING)
    assert np.allclose(np.square(f).sum((1, 2, 3)), 1, atol=1e-6)
    assert (f == problems.random_filters(problems.LEARNING)).all()


def test_every_iteration_is_due_up_to_the_twentieth_and_then_after_each_five_percent():
    due = timing.Due()
    seen = [i for i in range(1, 2000) if due(i)]
    assert seen[:20] == list(range(1, 21))
    late = [(a, b) for a, b in zip(seen, seen[1:], strict=False) if a >= 20]
    assert all(b <= max(a + 1, math.ceil(1.05 * a)) for a, b in late)
    assert len(seen) < 130


def test_the_clock_is_paused_while_maps_are_evaluated(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def objective(z):
        now[0] += 100
        return np.array([10.0, 10.0])

    recorder = timing.Recorder(objective, goal=1.0, limit=3.5)
    recorder.start()
    stopped = []
    for iteration in range(1, 5):
        now[0] += 1
        stopped.append(recorder(iteration, lambda: None))
    assert recorder.points == [(i, float(i), 20.0) for i in range(1, 5)]
    assert stopped == [False, False, False, True]


def test_a_recorder_stops_at_its_goal_and_without_objective_after_its_iterations():
    recorder = timing.Recorder(lambda z: np.array([z]), goal=2.0)
    recorder.start()
    assert [recorder(i, lambda i=i: 5.0 - i) for i in (1, 2, 3)] == [False, False, True]
    counting = timing.Recorder(None, iterations=2)
    counting.start()
    assert [counting(i, lambda: None) for i in (1, 2)] == [False, True]


def test_snapshots_are_of_the_same_iterations_however_long_these_take(monkeypatch):
    kept = []
    for step in (0.1, 10.0):
        now = [0.0]
        monkeypatch.setattr(timing.time, "perf_counter", lambda now=now: now[0])
        snapshots = timing.Snapshots(iterations=40)
        snapshots.start()
        for i in range(1, 41):
            now[0] += step
            snapshots(i, lambda: np.zeros(1))
        kept.append([iteration for iteration, _, _ in snapshots.recorded])
    assert kept[0] == kept[1] and kept[0][0] == 1 and kept[0][-1] == 40


def test_the_time_to_a_level_is_that_of_the_first_maps_below_it():
    points = [(1, 0.1, 20.0), (2, 0.2, 10.9), (3, 0.3, 11.5), (4, 0.4, 10.05)]
    assert timing.time_to(points, 10.0, 0.1) == (0.2, 2)
    assert timing.time_to(points, 10.0, 0.01) == (0.4, 4)
    assert timing.time_to(points, 10.0, 1e-3) == (math.inf, 0)


def test_ratios_are_those_of_the_best_in_every_round():
    fastest = timing.best([[4.0, 9.0], [6.0, 3.0]])
    assert fastest == [4.0, 3.0]
    assert timing.ratios(fastest, [2.0, 1.0]) == [2.0, 3.0]
    assert timing.spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0 to 3.0)"
    assert timing.spread([math.inf, 1.0, math.inf]) == "never"


def test_tables_give_the_ratio_of_the_times_and_a_plot_is_drawn(tmp_path):
    curve = [[1, 1.0, 30.0], [2, 2.0, 10.5], [3, 3.0, 10.0]]
    faster = [[i, seconds / 4, value] for i, seconds, value in curve]
    runs = [
        dict(problem="grey", boundary="circular", threads=1, turn=turn, solver=name, points=points)
        for turn in range(2)
        for name, points in (("SPORCO ADMM", curve), ("deconvnet ADMM", faster))
    ]
    minima = {"circular": {"objective": [6.0, 4.0], "gap": 1e-7}}
    found = {
        "machine": timing.machine(),
        "options": {"device": "cpu", "repeats": 2},
        "problems": {"grey": {"title": "grey", "minima": minima}},
        "runs": runs,
    }
    text = comparison_tables.show("coding", found, tmp_path)
    assert "| deconvnet ADMM | 4.0 (4.0 to 4.0) | 4.0 (4.0 to 4.0) |" in text
    assert "| SPORCO ADMM | 2.00 (2.00 to 2.00) | 3.00 (3.00 to 3.00) |" in text
    assert (tmp_path / "coding-1.png").stat().st_size > 10_000


def test_the_exponent_of_a_power_is_exact_and_its_error_that_of_a_regression():
    x = [1, 2, 4, 8, 16]
    slope, error = scaling.exponent(x, [3 * value**1.5 for value in x])
    assert slope == pytest.approx(1.5) and error == pytest.approx(0, abs=1e-12)
    noisy = np.exp(np.random.default_rng(0).standard_normal(5)) * np.array(x)
    expected = linregress(np.log(x), np.log(noisy))
    assert scaling.exponent(x, noisy) == pytest.approx((expected.slope, expected.stderr))
    of_two = scaling.exponent([1, 2], [1, 4])
    assert of_two[0] == pytest.approx(2) and math.isnan(of_two[1])
    assert all(map(math.isnan, scaling.exponent(x, [0, 1, 2, 3, 4])))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cells_of_an_axis_differ_only_along_it(device):
    options = argparse.Namespace(device=device, threads=1, repeats=3, quick=False)
    cells = scaling.cases(options)
    assert {cell.axis for cell in cells} == set(scaling.AXES)
    for axis in scaling.AXES:
        of_axis = [replace(cell, **{axis: 0}) for cell in cells if cell.axis == axis]
        methods = {cell.method for cell in of_axis}
        assert len(set(of_axis)) == len(methods)
        assert len(of_axis) == len(methods) * len(scaling.AXES[axis])
        assert device == "cpu" or "coordinate" not in methods


@pytest.mark.parametrize("method", [*scaling.CODERS, scaling.EPOCH])
def test_a_cell_is_coded_to_near_its_minimum_and_knows_the_size_of_its_maps(method):
    cell = scaling.Case("images", method, "cpu", 1, 2, images=2, pixels=40, maps=6, size=5)
    found = scaling.measure(cell)
    assert found["maps_bytes"] == 4 * 2 * 6 * 44**2
    assert 1 <= len(found["seconds"]) <= 2 and min(found["seconds"]) > 0
    assert method == scaling.EPOCH or 0 <= found["gap"] < 0.1


def test_layers_of_a_cell_are_inferred_through_those_below():
    shape = dict(images=1, pixels=48, maps=8, size=6)
    found = scaling.measure(scaling.Case("layers", "fista", "cpu", 1, 1, **shape, layers=2))
    # Three maps of 53x53 are pooled to one of 18x18, which 12 maps of 23x23 explain.
    assert found["maps_bytes"] == 4 * 12 * 23**2


def test_the_peak_counts_memory_that_was_freed_during_the_run():
    scaling.peak_of(lambda: np.ones(2**18), "cpu")
    used = scaling.peak_of(lambda: np.ones(2**23), "cpu")
    # The kernel counts pages in batches.
    assert 0.9 * 2**26 < used < 1.2 * 2**26


def test_tables_of_scaling_have_a_row_for_every_size_and_the_exponents():
    shape = dict(axis="images", method="admm", pixels=64, maps=4, size=5)
    runs = [
        dict(shape, images=n, value=n, seconds=[0.5 * n, 0.1 * n, 0.2 * n], iterations=10,
             bytes=800 * n, maps_bytes=100 * n)
        for n in (1, 2, 4)
    ]  # fmt: skip
    *_, first, _, last, exponents = scaling.table("images", runs)
    assert first == "| 1 | 0.2 s, 20 ms x 10, 8.0 z |"
    assert last == "| 4 | 0.8 s, 80 ms x 10, 8.0 z |"
    assert exponents == "| exponent | 1.00 ± 0.00, 1.00 ± 0.00, 1.00 ± 0.00 |"


def test_differences_are_relative_to_the_largest_entry():
    a = torch.tensor([1.0, -4.0])
    assert gpu.difference(a, a) == 0
    assert gpu.difference(a + torch.tensor([0.0, 1.0]), a) == pytest.approx(0.25)
    assert gpu.difference(torch.zeros(2), torch.zeros(2)) == 0
    assert gpu.difference(a, torch.zeros(2)) == math.inf
    assert gpu.difference(torch.tensor([math.nan, 0.0]), a) == math.inf


def test_computations_that_are_compared_repeat_themselves_and_find_something():
    with torch.no_grad():
        for name, run in gpu._computations(quick=True).items():
            once, again = run("cpu", torch.float64), run("cpu", torch.float64)
            assert all(t.dtype == torch.float64 and t.abs().max() > 0 for t in once), name
            assert max(gpu.difference(a, b) for a, b in zip(once, again, strict=True)) < 1e-10


def test_only_waits_for_the_device_are_counted_at_the_line_where_they_happen():
    def run():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    counted = gpu.waited(run, "cpu")
    assert sum(counted.values()) == 3 and len(counted) == 1
    assert next(iter(counted)).startswith("test_benchmarks.py:")


def test_no_photograph_is_restored_by_a_network_that_has_seen_it(monkeypatch, tmp_path):
    seen = []

    class Stub:
        def __init__(self, crops):
            self.crops = crops

        def fit(self, crops):
            assert crops is not None and len(crops) == len(self.crops)
            return self

    monkeypatch.setattr(restoration, "network", lambda crops, *_: seen.append(crops) or crops)
    monkeypatch.setattr(restoration, "Restorer", Stub)
    photographs = restoration.images_of("photographs")
    options = argparse.Namespace(output=tmp_path, quick=True, depth=1)
    restorer = restoration.networks(photographs, options)
    assert len(seen) == 2
    for name, image in photographs.items():
        own = {tuple(crop.flatten()[:50].tolist()) for crop in restoration.cut(image).clamp(0, 1)}
        of_others = {tuple(crop.flatten()[:50].tolist()) for crop in restorer(name).crops}
        assert len(of_others) > 5 and not own & of_others


NETS = """
from torch import nn

def good():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3),
                         nn.SiLU())

def attention():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Softmax(1), nn.Conv2d(4, 4, 3))

def fixed():
    return nn.Linear(5, 5)
"""


def test_the_survey_of_architectures_says_what_each_allows(tmp_path, monkeypatch):
    (tmp_path / "surveyed.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    found = {name: architectures.outcome(f"surveyed:{name}") for name in ("good", "attention")}
    assert [outcome.kind for outcome in found.values()] == ["in full", "in full"]
    good, attention = (architectures.row(outcome) for outcome in found.values())
    assert "deconv 1" in good and "gelu, silu" in good and good.endswith("|  |")
    assert "gradient 2" in attention and attention.endswith("| no rule for softmax |")
    fixed = architectures.outcome("surveyed:fixed")
    assert fixed.kind == "refused"
    assert "all refused: the model Linear fails on images of 3x96x96" in architectures.row(fixed)
    text = architectures.summary([*found.values(), fixed])
    assert text.startswith("3 networks: 2 in full (1 of them by the gradient alone), 0 in part, 1 ")


def test_pictures_that_do_not_depend_on_the_image_are_noticed():
    one, other = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert architectures.same(torch.cat([one, 2 * one]))
    assert not architectures.same(torch.cat([one, other]))
