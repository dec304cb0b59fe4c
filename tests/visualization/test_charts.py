"""Charts have the requested size and show every value in its position."""

import math

import matplotlib
import matplotlib._pylab_helpers
import pytest
import torch
from matplotlib.colors import to_rgb
from torch.testing import assert_close

from deconvnet.visualization.drawing import charts
from deconvnet.visualization.drawing.charts import (
    HEAT,
    LEGEND,
    LEGEND_LINE,
    NOWHERE,
    OTHER,
    SCALE,
    Cells,
    bar_chart,
    color,
    heat_map,
    label_map,
    legend_row,
    line_chart,
)


def painted(picture, paint, tolerance=0.02):
    """(H, W): where a picture has this colour."""
    paint = torch.tensor(to_rgb(paint)) if isinstance(paint, str) else paint
    return (picture - paint[:, None, None]).abs().amax(0) < tolerance


def bar_height(column):
    """Of a column (H,) of what is painted: how far it reaches up without a gap from its foot."""
    up = column.flip(0).int()[charts.BOTTOM + 5 :]
    return 5 + int(up.cumprod(0).sum())


def heat(share):
    return torch.tensor(matplotlib.colormaps[HEAT](share)[:3])


def cells_of(image, window, stride):
    return Cells(image, (window / 2, window / 2), (stride, stride))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", ["constrained_layout.use", "autolayout"])
def test_the_layout_that_a_user_sets_for_figures_moves_nothing(layout):
    x = torch.arange(5.0)
    plain = line_chart(x, [("a", x)], xlabel="x", size=(120, 200))
    with matplotlib.rc_context({f"figure.{layout}": True}):
        assert torch.equal(line_chart(x, [("a", x)], xlabel="x", size=(120, 200)), plain)


def test_pictures_have_exactly_the_requested_size():
    x, cells = torch.arange(5.0), cells_of((20, 30), 4, 4)
    lines = line_chart(x, [("a", x)], xlabel="x", size=(171, 233))
    bars = bar_chart({"a": [(1, 0.1)]}, ["g"], ylabel="y", size=(199, 301))
    assert lines.shape == (3, 171, 233) and bars.shape == (3, 199, 301)
    assert heat_map(torch.rand(5, 7), cells, size=(77, 113)).shape == (3, 77, 113 + SCALE)
    labels = label_map(torch.zeros(5, 7).long(), cells, {}, size=(77, 113))
    assert labels.shape == (3, 77, 113 + LEGEND)
    row = legend_row(["a", "b", "c"], width=2 * LEGEND + 5)
    assert row.shape == (3, 2 * LEGEND_LINE, 2 * LEGEND + 5)
    for picture in (lines, bars, labels, row):
        assert picture.dtype == torch.float32 and picture.min() >= 0 and picture.max() <= 1


def test_every_line_goes_through_its_values():
    x = torch.linspace(0, 1, 50)
    picture = line_chart(
        x, [("low", 0.25 + 0 * x), ("high", 0.75 + 0 * x)], xlabel="x", limits=(0, 1), legend=False
    )
    height = charts.CHART[0] - charts.MARGIN - charts.BOTTOM
    for number, value in enumerate((0.25, 0.75)):
        rows = painted(picture, color(number)).nonzero()[:, 0].double()
        assert rows.mean().item() == pytest.approx(charts.MARGIN + (1 - value) * height, abs=1.5)


def test_a_line_has_a_gap_where_a_value_is_not_finite():
    x = torch.linspace(0, 1, 50)
    y = 0.5 + 0 * x
    y[20:30] = math.nan
    picture = line_chart(x, [("a", y)], xlabel="x", limits=(0, 1), legend=False)
    columns = painted(picture, color(0)).any(0).nonzero()[:, 0]
    longest = int(columns.diff().max())
    width = (charts.CHART[1] - charts.LEFT - charts.MARGIN) / 1.04
    assert longest == pytest.approx(11 / 49 * width, abs=12)


def test_two_lines_may_have_the_same_name():
    x = torch.linspace(0, 1, 9)
    picture = line_chart(x, [("cat", x), ("cat", 1 - x)], xlabel="x", legend=False)
    assert painted(picture, color(0)).any() and painted(picture, color(1)).any()


def test_a_reference_is_a_dashed_black_line_across_the_chart():
    x = torch.linspace(0, 1, 9)
    given = {"xlabel": "x", "limits": (0, 1), "legend": False}
    plain = line_chart(x, [("a", 0 * x)], **given)
    picture = line_chart(x, [("a", 0 * x)], reference=("half", 0.5), **given)
    changed = (picture != plain).any(0)
    rows, columns = (changed.any(axis).nonzero()[:, 0] for axis in (1, 0))
    assert len(rows) <= 3
    assert columns[-1] - columns[0] > 0.95 * (charts.CHART[1] - charts.LEFT - charts.MARGIN)
    assert 0.4 < changed.any(0).float().sum() / (columns[-1] - columns[0]) < 0.9


def test_bars_are_as_high_as_their_values_and_the_control_is_grey():
    bars = {"left": [(1.0, 0.2), (2.0, 0.2)], "right": [(0.5, 0.1), (1.5, 0.3)]}
    bars["random"] = [(3.0, math.nan)] * 2
    picture = bar_chart(bars, ["low", "high"], ylabel="y", size=(400, 500), plain=["random"])
    bottom = 400 - charts.BOTTOM
    middle = charts.LEFT + (500 - charts.LEFT - charts.MARGIN) // 2
    unit = None
    for paint, values in ((OTHER, (3, 3)), (color(0), (1, 2)), (color(1), (0.5, 1.5))):
        here = painted(picture, paint)
        for value, part in zip(values, (here[:, :middle], here[:, middle:]), strict=True):
            height = bar_height(part[:, part[bottom - 5].nonzero()[2, 0]])
            unit = unit or height / value
            assert height == pytest.approx(unit * value, abs=0.05 * unit + 2)


def test_error_bars_are_centred_at_the_end_of_a_bar_and_left_out_if_not_finite():
    given = {"groups": ["g"], "ylabel": "y", "size": (400, 300)}
    known, unknown = (
        bar_chart({"a": [(2.0, error)], "b": [(2.5, 0.0)]}, **given) for error in (0.4, math.nan)
    )
    changed = (known != unknown).any(0).any(1).nonzero()[:, 0]
    bar = painted(unknown, color(0))
    height = bar_height(bar[:, bar[400 - charts.BOTTOM - 5].nonzero()[3, 0]])
    top, unit = 400 - charts.BOTTOM - height, height / 2.0
    assert changed[0].item() == pytest.approx(top - 0.4 * unit, abs=3)
    assert changed[-1].item() == pytest.approx(top + 0.4 * unit, abs=3)


def test_a_heat_map_shows_every_value_at_its_position_in_the_image():
    values = torch.tensor([[0.0, 1.0, 0.5], [0.25, 0.75, math.nan]])
    cells = cells_of((12, 20), 6, 4)  # middles at rows 3, 7 and columns 3, 7, 11
    picture = heat_map(values, cells, size=(120, 200))
    for p in range(2):
        for q in range(3):
            value = values[p, q]
            wanted = heat(float(value)) if value.isfinite() else torch.tensor(to_rgb(NOWHERE))
            for row, column in ((-1.5, -1.5), (0, 0), (1.5, 1.5)):
                at = int(10 * (3 + 4 * p + row)), int(10 * (3 + 4 * q + column))
                assert_close(picture[:, at[0], at[1]], wanted.float(), atol=0.01, rtol=0)
    nowhere = painted(picture[:, :, :200], NOWHERE)
    assert nowhere[:, 140:].all() and nowhere[100:].all()
    assert nowhere[:9].all() and nowhere[:, :9].all()


def test_the_limits_of_a_heat_map_are_the_ends_of_its_scale():
    values, cells = torch.full((2, 2), 0.5), cells_of((8, 8), 4, 4)
    for limits, share in (((0.0, 1.0), 0.5), ((0.5, 1.0), 0.0), ((0.0, 0.5), 1.0), (None, 0.5)):
        picture = heat_map(values, cells, size=(80, 80), limits=limits)
        assert_close(picture[:, 40, 40], heat(share).float(), atol=0.01, rtol=0)


def test_the_value_of_the_whole_image_is_marked_at_the_scale():
    values, cells = torch.tensor([[0.0, 1.0]]), Cells((8, 8), (4, 2), (8, 4))
    plain = heat_map(values, cells, size=(200, 200))
    for share in (0.25, 0.8):
        marked = heat_map(values, cells, size=(200, 200), marked=share)
        rows = (marked != plain).any(0).any(1).nonzero()[:, 0].double()
        assert rows.mean().item() == pytest.approx(4 + (1 - share) * 192, abs=2)
    assert torch.equal(heat_map(values, cells, size=(200, 200), marked=3.0), plain)


def test_an_image_shows_through_a_heat_map():
    values, cells = torch.full((1, 2), 0.5), Cells((8, 8), (4, 2), (4, 4))
    image = torch.zeros(3, 80, 80)
    image[:, :, 40:] = 1.0
    picture = heat_map(values, cells, size=(80, 80), limits=(0, 1), image=image)
    for column, grey in ((30, charts.DIMMED[0]), (50, charts.DIMMED[1])):
        wanted = charts.OPACITY * heat(0.5) + (1 - charts.OPACITY) * grey
        assert_close(picture[:, 40, column], wanted.float(), atol=0.01, rtol=0)
        assert_close(picture[:, 5, column], torch.full((3,), grey), atol=0.01, rtol=0)


def test_long_names_in_a_legend_do_not_overlap_the_next_entry():
    names = ["WWWWWWWWWWWWWWWWW", "brontosaurus abcd", "x"]
    picture = legend_row(names, width=3 * 300)
    assert picture.shape[1] == LEGEND_LINE
    ink = (picture < 0.9).any(0).any(0)
    for number in (1, 2):
        start = int(painted(picture, color(number)).any(0).nonzero()[0, 0])
        assert not ink[start - 8 : start - 2].any(), names[number - 1]


def test_labels_are_coloured_in_the_order_of_their_areas():
    labels = torch.tensor([[7, 7, 2], [7, 2, 9]])
    cells = cells_of((12, 16), 4, 4)
    picture = label_map(labels, cells, {7: "seven"}, size=(120, 160))
    for p in range(2):
        for q in range(3):
            paint = color([7, 2, 9].index(labels[p, q]))
            assert_close(picture[:, 20 + 40 * p, 20 + 40 * q], paint, atol=0.01, rtol=0)
    for number in range(3):  # one swatch each, below one another
        line = slice(number * LEGEND_LINE + 4, number * LEGEND_LINE + 16)
        assert painted(picture[:, line, 160:], color(number)).sum() >= 100
    assert not painted(picture[:, :, 160 + 8 : 160 + 20], OTHER).any()


def test_the_names_of_labels_end_within_the_legend():
    cells = cells_of((8, 8), 4, 4)
    picture = label_map(torch.zeros(2, 2).long(), cells, {0: "W" * 30}, size=(80, 80))
    assert (picture[:, :, -2:] > 0.95).all() and (picture[:, :, -30:] < 0.5).any()


def test_less_frequent_labels_are_grouped_as_others():
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 0, -1))  # of 0 ten, of 1 nine ...
    labels = torch.cat([labels, labels[:1]])
    cells = Cells((4, 56), (2, 0.5), (4, 1))
    picture = label_map(labels[None], cells, {}, size=(40, 560))
    for column, label in enumerate(labels.tolist()):
        wanted = color(label) if label < 6 else torch.tensor(to_rgb(OTHER))
        assert_close(picture[:, 20, 10 * column + 5], wanted, atol=0.01, rtol=0)


def test_drawing_leaves_no_open_figures():
    before = dict(matplotlib.rcParams)
    x = torch.arange(4.0)
    first = line_chart(x, [("a", x)], xlabel="x")
    heat_map(torch.rand(3, 3), cells_of((9, 9), 3, 3), size=(90, 90))
    assert dict(matplotlib.rcParams) == before
    assert not matplotlib._pylab_helpers.Gcf.figs
    assert torch.equal(line_chart(x, [("a", x)], xlabel="x"), first)


def test_mismatched_input_is_refused_in_one_line():
    x = torch.arange(4.0)
    with pytest.raises(ValueError, match="line a: 3 values over 4 positions"):
        line_chart(x, [("a", x[:3])], xlabel="x")
    with pytest.raises(ValueError, match="bars a: 1 values for 2 groups"):
        bar_chart({"a": [(1, 1)]}, ["g", "h"], ylabel="y")
    with pytest.raises(ValueError, match="20 x 30 pixels is too small"):
        line_chart(x, [("a", x)], xlabel="x", size=(20, 30))
