"""What a run says of its epochs: a bar on a terminal of any width, lines in files."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from deconvnet import DeconvNet, LayerSettings, SolverSettings
from deconvnet.monitoring import monitor, progress_bar, time_left
from deconvnet.monitoring.monitor import Monitor, not_in_bar
from deconvnet.monitoring.statistics import EpochStats
from deconvnet.monitoring.time_left import LayerCost, TimeLeft, in_words
from deconvnet.training.layer_costs import layer_costs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def stats(epoch, layer=1):
    return EpochStats(layer, epoch, 12, 1234.0, 0.5, 10.08, 0.12, 2, 0, 1.0)


def learn(folder=None, *, progress=True, epochs=range(1, 13)):
    with Monitor(folder, progress=progress) as shown:
        shown.start(0)
        shown.layer(1, 0, 12)
        for epoch in epochs:
            shown.advance()
            shown.epoch(stats(epoch), epoch)


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_the_figures_that_matter_fit_on_a_terminal_of_any_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", Terminal())
    learn()
    *_, before, last = (line.rstrip() for line in sys.stderr.getvalue().split("\r"))
    assert max(len(before), len(last)) <= columns
    for part in ("layer 1", "12/12", "1234.5", "10.1 dB"):
        assert part in last
    # What stays on the screen does not say that something is left.
    assert "left" not in last
    assert ("density 12.0%, 2 dead" in last) == (columns == 200)


@pytest.mark.parametrize("progress", [True, False])
def test_in_a_file_there_is_a_line_for_epochs_and_no_bar(progress, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(monitor, "LOG_INTERVAL", 0)
    with caplog.at_level(logging.INFO):
        learn(progress=progress)
    assert sys.stderr.getvalue() == ""
    assert len(caplog.records) == 12 and all(map(not_in_bar, caplog.records))
    expected = "layer 1/1, epoch 12/12: objective 1234.5, SNR 10.1 dB, density 12.0%, 2 dead"
    assert caplog.messages[-1] == expected


@pytest.mark.parametrize(("columns", "words"), [(60, "2 min left"), (80, "about 2 min left")])
def test_the_bar_says_the_time_left_until_the_last_update(columns, words, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Monitor() as shown:
        shown.layer(1, 0, 12)
        for epoch in range(1, 12):
            clock.now += 120
            shown.advance()
            shown.epoch(stats(epoch), epoch)
        assert shown._bar.postfix.endswith(f"obj 1234.5, SNR 10.1 dB, {words}")
        shown.advance()
        assert "left" not in shown._bar.postfix


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in (monitor, time_left):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_fast_epochs_have_few_lines_but_the_last_has_one(monkeypatch, caplog):
    clock = Clock(monkeypatch)
    with caplog.at_level(logging.INFO), Monitor(progress=False) as shown:
        shown.layer(1, 0, 12)
        for epoch in range(1, 13):
            clock.now += 1
            shown.advance()
            shown.epoch(stats(epoch), epoch)
    said = [int(line.split("epoch ")[1].split("/")[0]) for line in caplog.messages]
    assert said == [1, 6, 11, 12]


def test_the_time_left_is_that_of_all_layers_and_exact_if_their_costs_are(monkeypatch):
    """A unit of cost takes 2 seconds; the process resumes after 1 of 4 updates of layer 2 of 3."""
    clock = Clock(monkeypatch)
    costs = [LayerCost(100, 50), LayerCost(40, 20), LayerCost(12, 6)]
    left = TimeLeft(costs)
    left.begin(2, 1, 4)
    assert left.run_seconds() is None
    for done in (2, 3, 4):
        clock.now += 2 * 10
        left.advance()
        assert left.layer_seconds() == pytest.approx(20 * (4 - done))
        assert left.run_seconds() == pytest.approx(2 * (10 * (4 - done) + 20 + 12 + 6))
    clock.now += 2 * 20  # inference
    left.begin(3, 0, 3)
    for done in (1, 2, 3):
        clock.now += 2 * 4
        left.advance()
        assert left.run_seconds() == pytest.approx(2 * (4 * (3 - done) + 6))
    # A layer whose updates take longer than its cost says.
    left.begin(3, 0, 3)
    clock.now += 100
    left.advance()
    assert left.layer_seconds() == pytest.approx(200) and left.run_seconds() > 200
    # A stream, whose length is not known.
    stream = TimeLeft([LayerCost(1, 0)])
    stream.begin(1, 0, 0)
    stream.advance()
    assert stream.layer_seconds() is None and stream.run_seconds() is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "5 s"), (9, "10 s"), (44, "40 s"), (58, "1 min"), (400, "7 min"), (1700, "30 min")]
    + [(3500, "1 h"), (2 * 3600 + 1000, "2.5 h"), (20 * 3600, "20 h"), (72 * 3600, "3 days")],
)
def test_the_time_left_is_no_more_precise_than_an_estimate(seconds, words):
    assert in_words(seconds) == words


def test_a_layer_costs_as_much_more_as_it_does():
    def costs(images=10, size=(40, 40), **upper):
        layers = [LayerSettings(8, 5, pool=[1, 2, 2]), LayerSettings(8, 5, **upper)]
        return layer_costs(DeconvNet(layers), size, images)

    first, second = costs()
    assert costs(images=20)[0].learning == pytest.approx(2 * first.learning)
    assert 3.5 * first.learning < costs(size=(80, 80))[0].learning < 4 * first.learning
    image = costs(target="image")[1]
    assert second.learning < image.learning and second.inference < image.inference
    # Coordinate descent needs few of its many iterations.
    rounds = SolverSettings("coordinate", iterations=200, training_iterations=1)
    descent = costs(solver=rounds)[1]
    assert descent.inference < descent.learning


def test_what_the_bar_shows_is_not_printed_again_but_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO):
        learn()
    assert caplog.records and not any(map(not_in_bar, caplog.records))


def test_in_a_notebook_the_bar_is_a_widget_or_without_ipywidgets_a_line(monkeypatch, capsys):
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(progress_bar, "find_spec", lambda name: None)
    learn()
    assert "layer 1/1: 100%" in capsys.readouterr().out
    learn(progress=False)
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    bar = progress_bar.open_bar(total=3)
    assert type(bar).__name__ == "tqdm_notebook" and not bar.disable
    bar.close()
