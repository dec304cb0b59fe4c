"""Occlusion, invariance and correspondence against plain loops, Captum and planted truths."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.visualization.drawing.canvas import GAP
from deconvnet.visualization.drawing.charts import LEGEND, SCALE, color
from deconvnet.visualization.experiments.correspondence import (
    RANDOM,
    CorrespondenceScore,
    correspondence,
    correspondence_picture,
    correspondence_table,
)
from deconvnet.visualization.experiments.invariance import (
    default_strengths,
    invariance,
    invariance_picture,
)
from deconvnet.visualization.experiments.occlusion import Occlusion, occlusion
from deconvnet.visualization.experiments.occlusion_picture import PANEL, occlusion_picture
from deconvnet.visualization.experiments.perturbation import (
    class_probabilities,
    cover_boxes,
    fill_values,
    layer_title,
    rotated,
    shifted,
    zoomed,
)
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.projection.projector import Projector

# Windows and strides; of an image of 13 x 17 pixels the last squares reach beyond it or do not.
SQUARES = [((4, 4), (2, 3)), ((5, 3), (5, 1)), ((6, 7), (6, 7))]
CENTRED = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Classifier(nn.Module):
    """Two convolutions, pooling and four classes; of images of any size."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.low = nn.Conv2d(3, 6, 3, padding=1)
            self.pool = nn.MaxPool2d(2)
            self.high = nn.Conv2d(6, 8, 3, padding=1)
            self.act = nn.ReLU()
            self.head = nn.Linear(8, 4)
            nn.init.normal_(self.head.weight)

    def forward(self, x):
        y = self.act(self.high(self.pool(torch.relu(self.low(x)))))
        return self.head(y.mean((2, 3)))


class Features(Classifier):
    """The same without classes."""

    def forward(self, x):
        return self.act(self.high(self.pool(torch.relu(self.low(x)))))


def classifier(batch=8, kind=Classifier):
    return Projector(kind().double(), normalization=CENTRED, batch=batch)


def image(H=13, W=17, N=1, seed=0):
    return torch.randn(N, 3, H, W, generator=torch.Generator().manual_seed(seed)).double()


def rectangle(top, left, bottom, right, shape):
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    return inside


# --- occlusion


@pytest.mark.parametrize(("occluder", "stride"), [*SQUARES, ((13, 17), (1, 1))])
def test_every_position_of_the_square_is_measured_independently(occluder, stride):
    x, projector = image(), classifier()
    found = occlusion(
        projector, x, layer="act", occluder_size=occluder, stride=stride, class_index=2, fill=0.3
    )
    assert found.activity.shape == tuple(
        math.ceil((size - w) / s) + 1 for size, w, s in zip((13, 17), occluder, stride, strict=True)
    )
    for p, q in product(*map(range, found.activity.shape)):
        top, left = p * stride[0], q * stride[1]
        covered = x.clone()
        covered[:, :, top : top + occluder[0], left : left + occluder[1]] = 0.3
        model = projector.model
        maps = model.act(model.high(model.pool(torch.relu(model.low(covered)))))
        answers = model(covered).softmax(1)[0]
        assert_close(found.activity[p, q], maps[0, found.unit[0]].sum(), atol=1e-12, rtol=0)
        assert_close(found.probability[p, q], answers[2], atol=1e-12, rtol=0)
        assert found.label[p, q] == answers.argmax()
        box = [top, left, min(top + occluder[0], 13), min(left + occluder[1], 17)]
        assert found.boxes[p, q].tolist() == box


def test_the_unit_is_the_strongest_of_all_maps_or_of_the_given_map():
    x, projector = image(), classifier()
    maps = projector.responses(x, ["act"])["act"][0]
    found = occlusion(projector, x, layer="act", occluder_size=13)
    # Of rows 2i - 3 to 2i + 5 and columns 2j - 3 to 2j + 5, these lie inside 13 x 17 pixels.
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[2:5, 2:7] = True
    assert maps[found.unit] == maps[:, inside].max() < maps.max()
    assert_close(torch.tensor(found.base_activity), maps[found.unit[0]].sum().float())
    other = (found.unit[0] + 1) % 8
    asked = occlusion(projector, x, layer="act", occluder_size=13, map_index=other)
    assert asked.unit[0] == other and maps[asked.unit] == maps[other][inside].max()
    assert_close(asked.base_activity, float(maps[other].sum()))
    projected = projector(x, "act", [(0, *asked.unit)])
    assert torch.equal(asked.projection, CENTRED.signed_rgb(projected.images)[0])
    assert torch.equal(asked.field, projected.boxes[0])


def test_if_all_units_reach_beyond_the_image_those_in_the_middle_are_considered():
    # Of 8 x 9 pixels, all of the 4 x 4 units see less than their field of 8 x 8.
    x, projector = image(8, 9, seed=1), classifier()
    maps = projector.responses(x, ["act"])["act"][0]
    found = occlusion(projector, x, layer="act", occluder_size=3)
    assert maps[found.unit] == maps[:, 1:3, 1:3].max() < maps.max()


def test_the_activity_of_a_map_is_the_sum_of_its_positive_values():
    x, projector = image(), classifier()
    maps = projector.responses(x, ["high"])["high"][0]
    found = occlusion(projector, x, layer="high", occluder_size=13, map_index=1)
    assert (maps[1] < 0).any()
    assert_close(found.base_activity, float(maps[1].clamp(min=0).sum()))
    assert (found.activity >= 0).all()


@pytest.mark.parametrize(("occluder", "stride"), SQUARES)
def test_the_drop_of_a_pixel_is_the_mean_over_the_squares_that_cover_it(occluder, stride):
    found = occlusion(classifier(), image(), layer="act", occluder_size=occluder, stride=stride)
    base = float(found.base_probabilities[found.class_index])
    for drop, values, whole in (
        (found.activity_drop, found.activity, found.base_activity),
        (found.probability_drop, found.probability, base),
    ):
        for row, column in product(range(13), range(17)):
            lost = [
                whole - float(values[p, q])
                for p, q in product(*map(range, values.shape))
                if p * stride[0] <= row < p * stride[0] + occluder[0]
                and q * stride[1] <= column < q * stride[1] + occluder[1]
            ]
            assert drop[row, column].item() == pytest.approx(sum(lost) / len(lost), abs=1e-12)


@pytest.mark.parametrize(("occluder", "stride"), SQUARES)
def test_the_drop_is_the_attribution_that_captum_finds(occluder, stride):
    attr = pytest.importorskip("captum.attr")
    x, projector = image(), classifier()
    found = occlusion(
        projector, x, layer="act", occluder_size=occluder, stride=stride, class_index=1, fill=0.2
    )
    model = projector.model
    given = {
        "sliding_window_shapes": (3, *occluder),
        "strides": (3, *stride),
        "baselines": 0.2,
    }
    probability = attr.Occlusion(lambda y: model(y).softmax(1)).attribute(x, target=1, **given)
    activity = attr.Occlusion(lambda y: Features.forward(model, y).sum((2, 3))).attribute(
        x, target=found.unit[0], **given
    )
    for channel in range(3):
        # It sums in float32, activities of about 30.
        for ours, theirs in (
            (found.probability_drop, probability),
            (found.activity_drop, activity),
        ):
            assert_close(ours, theirs[0, channel].double(), atol=3e-5, rtol=0)


class Planted(nn.Module):
    """One map that sees nothing but a block of pixels; class 1 as long as a corner of it is lit."""

    def __init__(self):
        super().__init__()
        self.block = nn.Conv2d(3, 2, 1, bias=False)
        self.block.weight.data = torch.tensor([[1.0, 1, 1], [0, 0, 0]])[:, :, None, None]
        mask = rectangle(6, 9, 10, 13, (16, 20)).float()
        self.register_buffer("mask", mask)
        self.seen = nn.Identity()

    def forward(self, x):
        y = self.seen(self.block(x) * self.mask)
        return torch.stack([torch.full((len(x),), 2.0), 4 * y[:, 0, 6, 9]], 1)


def test_a_planted_block_of_pixels_is_found():
    projector = Projector(Planted(), normalization=CENTRED, strict=False, method="gradient")
    x = torch.ones(1, 3, 16, 20)
    found = occlusion(projector, x, layer="seen", occluder_size=6, stride=1)
    assert found.base_activity == 48.0 and found.class_index == 1
    for p, q in product(*map(range, found.activity.shape)):
        rows = max(0, min(p + 6, 10) - max(p, 6))
        columns = max(0, min(q + 6, 13) - max(q, 9))
        assert found.activity[p, q] == 48 - 3 * rows * columns
        corner = p <= 6 < p + 6 and q <= 9 < q + 6
        assert found.label[p, q] == (0 if corner else 1)
        wanted = torch.tensor([2.0, 0.0 if corner else 12.0]).double().softmax(0)[1]
        assert_close(found.probability[p, q], wanted)
    assert found.activity[found.worst] == 0 and found.worst == (4, 7)
    drop = found.activity_drop
    inside = rectangle(6, 9, 10, 13, (16, 20))
    assert drop[inside].min() > drop[~inside].max()


def test_the_batch_size_changes_nothing_but_rounding():
    found = [
        occlusion(
            classifier(batch), image(), layer="act", occluder_size=4, stride=2, others=image(N=2)
        )
        for batch in (1, 7, 500)
    ]
    for other in found[1:]:
        for key in ("activity", "probability", "projection", "tiles", "base_probabilities"):
            assert_close(getattr(other, key), getattr(found[0], key), atol=1e-12, rtol=0)
        assert torch.equal(other.label, found[0].label)


class Bounded(Classifier):
    """Fails if more than three images come at a time."""

    def forward(self, x):
        assert len(x) <= 3
        return super().forward(x)


def test_no_batch_is_larger_than_the_projector_allows():
    projector = classifier(3, Bounded)
    x, boxes = image(N=5), torch.tensor([[2, 3, 6, 7]]).expand(5, 4)
    occlusion(projector, x[:1], layer="act", occluder_size=4, others=x)
    invariance(projector, x, ["act"], strengths={"scale": [1.5]})
    correspondence(projector, x, {"part": boxes}, ["act"], draws=1)


def test_a_model_without_classes_has_maps_of_activity_only():
    x, with_classes = image(), occlusion(classifier(), image(), layer="act", occluder_size=4)
    for projector, options in (
        (classifier(kind=Features), {}),
        (classifier(), {"classes": False}),
    ):
        found = occlusion(projector, x, layer="act", occluder_size=4, **options)
        assert torch.equal(found.activity, with_classes.activity)
        assert found.class_index is found.probability is found.label is None
        assert found.base_probabilities is found.probability_drop is None


@pytest.fixture(scope="module")
def learned(textures):
    images = textures(3, 3, 16, 18)
    layers = [
        LayerSettings(4, 3, lam=5.0, pool=[1, 2, 2], solver=SolverSettings(iterations=10)),
        LayerSettings(5, 3, lam=20.0, solver=SolverSettings(iterations=10)),
    ]
    net = DeconvNet(layers, PreprocessingSettings(steps=["mean"]), seed=0)
    net.preprocessing.fit(images)
    return Projector(net), images


def test_all_three_experiments_work_for_deconvnets(learned):
    projector, images = learned
    x = projector.prepare(images)
    found = occlusion(projector, x[:1], layer="layer2", occluder_size=8, stride=5)
    box = found.boxes[1, 2]
    covered = cover_boxes(x[:1], box[None], x[:1].mean((2, 3), keepdim=True))
    maps = projector.model.infer(covered).layer(2).z.abs()
    assert_close(
        found.activity[1, 2].item(), float(maps[0, found.unit[0]].sum()), rtol=1e-4, atol=0
    )
    assert found.probability is None and found.projection.shape == (3, 16, 18)
    assert occlusion_picture(found, images[0]).shape[0] == 3

    curves = invariance(projector, x, ["layer1", "layer2"], strengths={"translation": [0, 3]})
    (moved,) = curves.curves
    assert curves.classes is moved.probabilities is None
    for layer in ("layer1", "layer2"):
        assert (moved.distances[layer][:, 0] == 0).all() and (
            moved.distances[layer][:, 1] > 0
        ).all()

    part = torch.tensor([[2, 2, 8, 8]]).expand(3, 4)
    scores = correspondence(projector, x, {"part": part}, ["layer2"], draws=2)
    assert 0 < scores["part"]["layer2"].mean < 1


def test_progress_counts_every_position_once():
    calls = []
    occlusion(
        classifier(3),
        image(),
        layer="act",
        occluder_size=5,
        stride=4,
        progress=lambda *c: calls.append(c),
    )
    assert calls == [(3, 12), (6, 12), (9, 12), (12, 12)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"occluder_size": 14}, "occluder_size 14 x 14: expected 1 to 13 x 17 pixels"),
        ({"occluder_size": (4, 0)}, "occluder_size 4 x 0"),
        ({"occluder_size": 4, "stride": 5}, "stride 5 x 5: expected 1 to 4 x 4"),
        ({"stride": 0}, "stride 0 x 0"),
        ({"map_index": 8}, "map_index 8: the layer has 8 maps"),
        ({"class_index": 4}, r"classes \[4\]: the model has 4, numbered from 0"),
        ({"fill": torch.zeros(2)}, r"fill of shape \(2,\): one number, or one for each of 3"),
        ({"others": torch.zeros(2, 3, 5, 5)}, r"others of shape \(2, 3, 5, 5\)"),
        ({"layer": "akt"}, "no such layer"),
    ],
)
def test_invalid_input_of_occlusion_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        occlusion(classifier(), image(), **{"layer": "act", **options})


def test_occlusion_takes_one_image_and_a_class_index_needs_classes():
    with pytest.raises(ValueError, match="2 images: occlusion takes one image"):
        occlusion(classifier(), image(N=2), layer="act")
    with pytest.raises(ValueError, match="class_index 1: this model has no classes"):
        occlusion(classifier(kind=Features), image(), layer="act", class_index=1)
    with pytest.raises(ValueError, match=r"images of shape \(3, 13, 17\)"):
        occlusion(classifier(), image()[0], layer="act")


# --- its picture


def scene(**changed):
    """An occlusion of an image of 40 x 60 pixels with squares of 10 at 0, 10, ..., made by hand."""
    activity = torch.ones(4, 6)
    activity[1, 2] = 0.0
    given = {
        "image": (40, 60),
        "occluder_size": (10, 10),
        "corners": (10 * torch.arange(4), 10 * torch.arange(6)),
        "layer": "act",
        "unit": (0, 0, 0),
        "field": torch.tensor([0, 30, 40, 60]),
        "activity": activity,
        "base_activity": 1.0,
        "projection": torch.zeros(3, 40, 60),
        "tiles": torch.zeros(1, 3, 20, 20),
    }
    return Occlusion(**{**given, **changed})


def test_panels_show_the_square_that_reduces_the_map_the_most():
    pixels = torch.ones(3, 40, 60)
    picture = occlusion_picture(scene(), pixels)
    top = picture.shape[1] - 160  # panels of 160 x 240 below their titles
    grey_ = (picture[:, top:, :PANEL] - 0.5).abs().amax(0) < 0.01
    assert torch.equal(grey_, rectangle(42, 82, 78, 118, (160, 240)))
    red = (picture[:, top:, :PANEL] - color(5)[:, None, None]).abs().amax(0) < 0.02
    ring = rectangle(40, 80, 80, 120, (160, 240)) & ~rectangle(42, 82, 78, 118, (160, 240))
    assert torch.equal(red, ring)
    # (b) darkest there, and brightest elsewhere, in line with the image
    left = PANEL + 2 * GAP
    heat = picture[:, top:, left : left + PANEL]
    dark = (heat - heat[:, 60, 100][:, None, None]).abs().amax(0) < 0.02
    assert torch.equal(dark, rectangle(40, 80, 80, 120, (160, 240)))
    # (c) a red frame there
    left += PANEL + SCALE + 2 * GAP
    frame = picture[:, top:, left : left + PANEL]
    red = (frame - color(5)[:, None, None]).abs().amax(0) < 0.02
    assert torch.equal(red, ring)
    assert picture.shape[2] == left + PANEL


def test_the_field_of_the_activation_is_framed_in_the_image():
    picture = occlusion_picture(scene(), torch.ones(1, 40, 60))
    first = picture[:, -160:, :PANEL]
    blue = (first - color(0)[:, None, None]).abs().amax(0) < 0.02
    ring = rectangle(0, 120, 160, 240, (160, 240)) & ~rectangle(2, 122, 158, 238, (160, 240))
    assert torch.equal(blue, ring)


def test_the_scale_includes_the_value_of_the_whole_image():
    left = PANEL + 2 * GAP + PANEL  # the triangle is between the map and its scale
    for base, rows in ((-1.0, slice(150, 160)), (0.5, slice(75, 85)), (3.0, slice(0, 10))):
        picture = occlusion_picture(scene(base_activity=base), torch.ones(3, 40, 60))
        beside = picture[:, -160:, left : left + 6].amax(0) < 0.2
        assert beside[rows].sum() > 5 and beside.sum() == beside[rows].sum()


def test_a_model_with_classes_has_two_more_panels_and_rows_of_several_images_line_up():
    label = torch.zeros(4, 6).long()
    label[0, 0] = 3
    classes = {
        "class_index": 0,
        "probability": torch.rand(4, 6),
        "label": label,
        "base_probabilities": torch.tensor([0.7, 0.1, 0.1, 0.1]),
    }
    pixels = torch.ones(3, 40, 60)
    three, five = (occlusion_picture(scene(**given), pixels) for given in ({}, classes))
    assert five.shape[2] == three.shape[2] + 2 * (2 * GAP + PANEL) + SCALE + LEGEND
    # The titles tell classes apart, and nothing else does of what the two have in common.
    assert torch.equal(five[:, :, : three.shape[2]], three)
    labels = five[:, -160:, -PANEL - LEGEND : -LEGEND]
    assert_close(labels[:, 20, 20], color(1), atol=0.01, rtol=0)
    assert_close(labels[:, 20, 60], color(0), atol=0.01, rtol=0)
    with_names = occlusion_picture(scene(**classes), pixels, names=["cat", "dog", "emu", "fox"])
    assert with_names.shape == five.shape and not torch.equal(with_names, five)
    assert torch.equal(
        occlusion_picture(scene(**classes), pixels, names={0: "cat", 3: "fox"}), with_names
    )


def test_projections_of_other_images_are_shown_next_to_that_of_this_image():
    tiles = torch.zeros(4, 3, 20, 20)
    tiles[2, :, 5:15, 5:15] = 1.0
    picture = occlusion_picture(scene(tiles=tiles), torch.ones(3, 40, 60))
    left = 2 * PANEL + SCALE + 4 * GAP
    grid = picture[:, -2 * 100 - GAP :, left:]
    size = 20 * (((PANEL - GAP) // 2) // 20)
    second_row = grid[:, size + GAP : 2 * size + GAP, :size]
    assert_close(second_row[:, size // 2, size // 2], torch.ones(3))
    assert_close(second_row[:, 2, 2], torch.full((3,), 0.5))
    blue = (grid - color(0)[:, None, None]).abs().amax(0) < 0.02
    assert blue[:size, :size].any() and not blue[size:].any() and not blue[:, size:].any()


def test_the_picture_requires_the_occluded_image():
    with pytest.raises(ValueError, match=r"expected \(1 or 3, 40, 60\)"):
        occlusion_picture(scene(), torch.ones(3, 40, 61))


# --- what is done to images


def test_a_mask_fills_the_box_of_each_image_and_nothing_else():
    x, fill = image(N=2), torch.tensor([1.0, 2.0]).double().view(2, 1, 1, 1).expand(2, 3, 1, 1)
    boxes = torch.tensor([[0, 2, 5, 9], [4, 4, 13, 17]])
    covered = cover_boxes(x, boxes, fill)
    for n, box in enumerate(boxes.tolist()):
        inside = rectangle(*box, (13, 17))
        assert (covered[n][:, inside] == n + 1).all()
        assert torch.equal(covered[n][:, ~inside], x[n][:, ~inside])


def test_mean_grey_is_zero_if_the_mean_is_subtracted_and_the_mean_of_the_image_otherwise(
    learned,
):
    x = image(N=2)
    assert (fill_values(classifier(), x) == 0).all() and fill_values(classifier(), x).shape == (
        2,
        3,
        1,
        1,
    )
    plain = Projector(Classifier().double())
    assert_close(fill_values(plain, x)[:, :, 0, 0], x.mean((2, 3)))
    assert_close(fill_values(learned[0], learned[1])[:, :, 0, 0], learned[1].mean((2, 3)))
    given = torch.tensor([0.1, 0.2, 0.3])
    assert_close(fill_values(plain, x, given)[1, :, 0, 0], given.double())
    assert (fill_values(plain, x, 0.7) == 0.7).all()


def test_outputs_that_are_probabilities_get_no_second_softmax():
    class Outputs(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x):
            y = x.mean((2, 3))
            return {"scores": y, "soft": y.softmax(1), "log": y.log_softmax(1)}[self.kind]

    x = 5 * image(N=3)
    wanted = x.mean((2, 3)).softmax(1)
    for kind in ("scores", "soft", "log"):
        assert_close(class_probabilities(Projector(Outputs(kind)), x), wanted)
    assert class_probabilities(classifier(kind=Features), x) is None


@pytest.mark.parametrize("rows", [0, 1, -1, 5, -12, 13, -40])
def test_shifted_images_move_by_whole_pixels_and_leave_grey(rows):
    x, fill = image(N=2), torch.full((2, 3, 1, 1), 7.0).double()
    moved = shifted(x, rows, fill)
    for row in range(13):
        source = row - rows
        wanted = x[:, :, source] if 0 <= source < 13 else fill[..., 0].expand(2, 3, 17)
        assert torch.equal(moved[:, :, row], wanted)


@pytest.mark.parametrize("size", [8, 9])
def test_rotations_by_right_angles_move_pixels_onto_pixels(size):
    x, fill = image(size, size, N=2), torch.full((2, 3, 1, 1), 3.0).double()
    for quarter in range(5):
        turned = rotated(x, 90 * quarter, fill)
        assert_close(turned, torch.rot90(x, quarter, (2, 3)), atol=1e-12, rtol=0)


def ramp(H, W, across, down):
    """An image whose value is across * column + down * row, about its middle."""
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    rows, columns = rows.double() - (H - 1) / 2, columns.double() - (W - 1) / 2
    return (across * columns + down * rows).expand(1, 3, H, W), rows, columns


@pytest.mark.parametrize("degrees", [0, 17, 90, 133, 270, 350])
def test_a_rotated_ramp_is_a_ramp_in_the_rotated_direction(degrees):
    x, rows, columns = ramp(21, 33, 2.0, -1.0)
    turned = rotated(x, degrees, torch.zeros(1, 3, 1, 1).double())[0, 0]
    # Counter-clockwise on a page on which rows go down: (c, r) comes from the place turned back.
    angle = math.radians(degrees)
    from_c = columns * math.cos(angle) - rows * math.sin(angle)
    from_r = columns * math.sin(angle) + rows * math.cos(angle)
    inside = (from_c.abs() <= 16) & (from_r.abs() <= 10)
    assert inside.sum() > 200
    assert_close(turned[inside], (2 * from_c - from_r)[inside], atol=1e-12, rtol=0)
    outside = (from_c.abs() >= 17) | (from_r.abs() >= 11)
    assert_close(turned[outside], torch.zeros_like(turned[outside]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("factor", [1.0, 1.3, 1.8, 0.5])
def test_a_zoomed_ramp_is_less_steep_about_the_same_centre(factor):
    x, rows, columns = ramp(21, 33, 2.0, -1.0)
    larger = zoomed(x + 5, factor, torch.full((1, 3, 1, 1), 5.0).double())[0, 0]
    inside = (columns.abs() <= 16 * factor) & (rows.abs() <= 10 * factor)
    wanted = 5 + (2 * columns - rows) / factor
    assert_close(larger[inside], wanted[inside], atol=1e-12, rtol=0)
    outside = (columns.abs() >= 17 * factor) | (rows.abs() >= 11 * factor)
    assert_close(larger[outside], torch.full_like(larger[outside], 5.0))


def test_rotations_are_those_of_torchvision():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    bilinear = functional.InterpolationMode.BILINEAR
    x, zero = image(20, 31, N=2), torch.zeros(2, 3, 1, 1).double()
    for degrees in (10, 100, 200):
        wanted = functional.rotate(x, degrees, interpolation=bilinear)
        assert_close(rotated(x, degrees, zero), wanted, atol=1e-5, rtol=0)


# --- invariance


class Sums(nn.Module):
    """The sums of all pixels of each channel: blind to where they are."""

    def __init__(self):
        super().__init__()
        self.sums = nn.Identity()

    def forward(self, x):
        return self.sums(x.sum((2, 3)))


def test_features_without_positions_are_invariant_to_shifts():
    x = torch.zeros(2, 3, 20, 20)
    x[:, :, 8:12, 7:13] = torch.randint(1, 9, (2, 3, 4, 6)).float()
    found = invariance(
        Projector(Sums(), normalization=CENTRED),
        x,
        ["sums"],
        strengths={"translation": range(-8, 9), "rotation": [0, 90, 180, 270], "scale": [2.0]},
        classes=False,
    )
    shift, turn, scale = found.curves
    assert (shift.distances["sums"] == 0).all()
    assert_close(turn.distances["sums"], torch.zeros(2, 4).double(), atol=1e-3, rtol=0)
    # Twice the size is four times the sum: three times the original away from it.
    assert_close(scale.relative["sums"], torch.full((2, 1), 3.0).double(), atol=1e-4, rtol=0)


def test_distances_are_those_of_the_features_of_the_transformed_images():
    x, projector = image(N=3), classifier()
    strengths = {"scale": [1.0, 1.5], "translation": [0, -2, 3], "rotation": [0, 30]}
    found = invariance(projector, x, ["low", "act"], strengths=strengths, fill=0.5)
    model, fill = projector.model, torch.full((3, 3, 1, 1), 0.5).double()
    layers = {"low": model.low, "act": lambda y: Features.forward(model, y)}
    moves = {"scale": zoomed, "translation": shifted, "rotation": rotated}
    classes = model(x).argmax(1)
    assert torch.equal(found.classes, classes)
    assert [curves.transform for curves in found.curves] == list(strengths)
    for curves in found.curves:
        assert curves.strengths.tolist() == strengths[curves.transform]
        for t, strength in enumerate(strengths[curves.transform]):
            moved = moves[curves.transform](x, strength, fill)
            for n in range(3):
                for layer, features in layers.items():
                    original, other = features(x[n : n + 1]), features(moved[n : n + 1])
                    away = (original - other).square().sum().sqrt()
                    assert_close(curves.distances[layer][n, t], away, atol=1e-12, rtol=0)
                    relative = away / original.square().sum().sqrt()
                    assert_close(curves.relative[layer][n, t], relative, atol=1e-12, rtol=0)
                wanted = model(moved[n : n + 1]).softmax(1)[0, classes[n]]
                assert_close(curves.probabilities[n, t], wanted, atol=1e-12, rtol=0)


def test_the_identity_has_distance_zero():
    found = invariance(
        classifier(),
        image(N=2),
        ["low"],
        strengths={"scale": [1], "translation": [0], "rotation": [0, 360]},
    )
    for curves in found.curves:
        assert curves.distances["low"].max() < 1e-12


def test_the_distance_between_images_is_that_of_a_loop_over_pairs():
    x, projector = image(N=4), classifier()
    features = Features.forward(projector.model, x).flatten(1)
    apart = [
        ((features[i] - features[j]).norm() / features[i].norm()).item()
        for i, j in product(range(4), repeat=2)
        if i != j
    ]
    found = invariance(projector, x, ["act"], strengths={"scale": [1]})
    assert found.between["act"] == pytest.approx(sum(apart) / 12)
    alone = invariance(projector, x[:1], ["act"], strengths={"scale": [1]})
    assert math.isnan(alone.between["act"])


def test_given_classes_are_used():
    x, projector = image(N=2), classifier()
    given = {"strengths": {"scale": [1.0]}}
    named = invariance(projector, x, ["act"], classes=[3, 1], **given)
    wanted = projector.model(x).softmax(1)
    assert_close(named.curves[0].probabilities[:, 0], wanted[[0, 1], [3, 1]])
    none = invariance(projector, x, ["act"], classes=False, **given)
    assert none.classes is none.curves[0].probabilities is None


def test_the_default_ranges_are_those_of_the_paper():
    ranges = default_strengths(224)
    assert ranges["translation"][0] == -60 and ranges["translation"][-1] == 60
    assert 0 in ranges["translation"] and all(isinstance(t, int) for t in ranges["translation"])
    assert ranges["scale"][0] == 1 and ranges["scale"][-1] == 1.8
    assert ranges["rotation"] == list(range(0, 360, 10))
    assert default_strengths(28)["translation"] == list(range(-8, 9))
    assert 0 in default_strengths(2)["translation"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": {"shear": [1]}}, "shear is not one of translation, scale, rotation"),
        ({"strengths": {"scale": []}}, "scale has none"),
        ({"strengths": {"scale": [0]}}, r"scale by \[0\]: expected factors above 0"),
        ({"strengths": {"translation": [0.5]}}, r"translation by \[0.5\]: expected whole pixels"),
        ({"strengths": {}}, "name at least one of"),
        ({"classes": [1]}, r"classes \[1\]: expected one number for each of 2 images"),
        ({"classes": [1, 4]}, r"classes \[1, 4\]: the model has 4"),
        ({"layers": []}, "layers: name at least one"),
    ],
)
def test_invalid_input_of_invariance_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        invariance(classifier(), image(N=2), **{"layers": ["act"], **options})


def test_classes_of_a_model_without_classes_are_refused():
    with pytest.raises(ValueError, match="classes: this model has none"):
        invariance(classifier(kind=Features), image(), ["act"], classes=[0])


def test_the_picture_has_a_row_for_every_transformation_and_a_colour_for_every_image():
    x, pixels = image(N=2), torch.rand(2, 1, 13, 17)
    strengths = {"translation": [0, 1, 2], "rotation": [0, 45]}
    with_classes, without = (
        invariance(classifier(), x, ["low", "act"], strengths=strengths, classes=classes)
        for classes in (True, False)
    )
    first = invariance_picture(with_classes, pixels, names=["cat", "cat"])
    second = invariance_picture(without, pixels, names=["cat", "cat"])
    assert first.shape[1] == second.shape[1]
    assert first.shape[2] == second.shape[2] + 300 + 2 * GAP
    one = invariance_picture(type(without)(without.curves[:1], without.between, None), pixels)
    assert second.shape[1] > 1.8 * one.shape[1] - 40
    for n in range(2):  # in frames, both charts and the legend
        assert ((first - color(n)[:, None, None]).abs().amax(0) < 0.02).sum() > 1000
    with pytest.raises(ValueError, match="3 pictures and 2 names: the curves are of 2 images"):
        invariance_picture(without, torch.rand(3, 1, 13, 17))


def test_a_layer_that_never_responds_has_an_empty_chart():
    projector = classifier()
    projector.model.high.bias.data.fill_(-100)
    found = invariance(projector, image(), ["act"], strengths={"scale": [1, 1.5]})
    assert found.curves[0].relative["act"].isnan().all()
    assert invariance_picture(found, torch.rand(1, 3, 13, 17)).isfinite().all()


# --- correspondence


def loop_score(before, after, tolerance=0.0):
    """Delta and the paper's definition of it, one feature at a time."""
    N = len(before)
    signs = []
    for a, b in zip(before.flatten(1), after.flatten(1), strict=True):
        least = tolerance * a.abs().max()
        signs.append([0 if abs(d) <= least else (1 if d > 0 else -1) for d in (b - a).tolist()])
    total = 0.0
    for i, j in product(range(N), repeat=2):
        if i != j:
            total += sum(s != t for s, t in zip(signs[i], signs[j], strict=True)) / len(signs[i])
    return total / (N * (N - 1))


def boxes_of(N, seed, size=(5, 6), image=(13, 17)):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randint(0, image[axis] - size[axis] + 1, (N,), generator=generator) for axis in (0, 1)
    )
    return torch.stack([rows, columns, rows + size[0], columns + size[1]], 1)


def test_scores_are_those_of_a_loop_over_images_and_features():
    x, projector = image(N=4), classifier()
    parts = {"eye": boxes_of(4, 0), "nose": boxes_of(4, 1)}
    scores = correspondence(projector, x, parts, ["low", "act"], draws=0, tolerance=0.0)
    assert list(scores) == ["eye", "nose"]
    model = projector.model
    layers = {"low": model.low, "act": lambda y: Features.forward(model, y)}
    for part, boxes in parts.items():
        covered = x.clone()
        for n, (top, left, bottom, right) in enumerate(boxes.tolist()):
            covered[n, :, top:bottom, left:right] = 0
        for layer, features in layers.items():
            before, after = features(x), features(covered)
            score = scores[part][layer]
            assert score.mean == pytest.approx(loop_score(before, after), abs=1e-12)
            changed = (before != after).flatten(1).double().mean(1)
            assert_close(score.changed[0], changed)


class Colours(nn.Module):
    """As many features as colours: how much of each there is, wherever it is."""

    def __init__(self):
        super().__init__()
        self.amounts = nn.Identity()

    def forward(self, x):
        levels = torch.arange(1, 9).view(1, 8, 1, 1)
        return self.amounts((x == levels).float().mean((2, 3)))


def test_a_planted_part_corresponds_and_random_boxes_do_not():
    # Pixels of colours 2 to 8 by chance, and in each image a patch of colour 1 somewhere else.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, 9, (5, 1, 24, 24), generator=generator).float()
    boxes = boxes_of(5, 3, (2, 2), (24, 24))
    for n, (top, left, bottom, right) in enumerate(boxes.tolist()):
        x[n, :, top:bottom, left:right] = 1
    projector = Projector(Colours(), batch=2)
    small = {"patch": boxes}
    scores = correspondence(projector, x, small, ["amounts"], fill=0.0, draws=5)
    patch, control = scores["patch"]["amounts"], scores[RANDOM]["amounts"]
    assert patch.mean == patch.error == patch.deviation == 0
    assert (patch.changed == 1 / 8).all()
    assert control.mean > 0.1
    assert control.distances.shape == (5, 5, 5)


def test_means_deviations_and_errors_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(2, 5, 5, generator=generator).double()
    distances = half + half.mT
    score = CorrespondenceScore(distances, torch.ones(2, 5))

    def values(without=None):
        kept = [n for n in range(5) if n != without]
        return [distances[d, i, j].item() for d in range(2) for i in kept for j in kept if i < j]

    every = values()
    mean = sum(every) / len(every)
    assert score.mean == pytest.approx(mean)
    assert score.deviation == pytest.approx(
        math.sqrt(sum((v - mean) ** 2 for v in every) / (len(every) - 1))
    )
    means = [sum(values(n)) / len(values(n)) for n in range(5)]
    middle = sum(means) / 5
    error = math.sqrt(4 / 5 * sum((m - middle) ** 2 for m in means))
    assert score.error == pytest.approx(error)
    two = CorrespondenceScore(distances[:, :2, :2], torch.ones(2, 2))
    assert math.isnan(two.error)


def test_the_error_is_that_of_the_mean_over_many_samples_of_images():
    # Of each image a number, of each pair their sum: pairs are not independent, images are.
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        a = torch.rand(6, generator=generator).double()
        score = CorrespondenceScore((a[:, None] + a)[None], torch.ones(1, 6))
        means.append(score.mean)
        errors.append(score.error**2)
    spread = torch.tensor(means).std().item()
    assert math.sqrt(sum(errors) / 400) == pytest.approx(spread, rel=0.1)


def test_random_boxes_keep_their_sizes_and_stay_inside_the_given_boxes():
    seen = []

    class Spy(Classifier):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    projector = classifier(kind=Spy)
    x = 1 + image(N=2).abs()
    parts = {"wide": torch.tensor([[0, 0, 2, 6]] * 2), "high": torch.tensor([[1, 1, 6, 3]] * 2)}
    within = torch.tensor([[2, 3, 12, 15], [0, 0, 13, 9]])
    correspondence(projector, x, parts, ["act"], within=within, draws=120)
    covered = [y for y in seen if len(y) == 2 and (y == 0).any()][2:]
    assert len(covered) == 120
    corners = set()
    for draw, y in enumerate(covered):
        for n in range(2):
            rows, columns = (y[n, 0] == 0).nonzero().unbind(1)
            box = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            top, left, bottom, right = map(int, box)
            assert (bottom - top, right - left) == ((2, 6) if draw % 2 == 0 else (5, 2))
            assert len(rows) == (bottom - top) * (right - left)
            a, b, c, d = within[n].tolist()
            assert a <= top and b <= left and bottom <= c and right <= d
            corners.add((n, draw % 2, top, left))
    for n in range(2):  # both ends are reached
        tops = [top for m, kind, top, _ in corners if m == n and kind == 0]
        assert (min(tops), max(tops)) == (within[n, 0], within[n, 2] - 2)


def test_random_boxes_come_from_the_generator():
    def control(seed):
        generator = torch.Generator().manual_seed(seed)
        given = {"draws": 3, "generator": generator}
        part = {"eye": boxes_of(3, 0)}
        return correspondence(classifier(), image(N=3), part, ["act"], **given)[RANDOM]["act"]

    assert torch.equal(control(0).distances, control(0).distances)
    assert not torch.equal(control(0).distances, control(1).distances)


def test_changes_that_are_rounding_have_no_sign():
    class Noisy(nn.Module):
        """The brightness of an image, and features in which nothing but rounding changes."""

        def __init__(self):
            super().__init__()
            self.out = nn.Identity()

        def forward(self, x):
            total = x.mean((1, 2, 3))
            small = 1 + 1e-7 * torch.sin(1e4 * torch.arange(1, 8) * total[:, None])
            return self.out(torch.cat([total[:, None], small], 1))

    x, part = image(N=3), {"eye": boxes_of(3, 0)}
    strict, kept = (
        correspondence(Projector(Noisy()), x, part, ["out"], draws=0, fill=9.0, **tolerance)
        for tolerance in ({"tolerance": 0.0}, {})
    )
    assert strict["eye"]["out"].mean > 0.1
    assert kept["eye"]["out"].mean == 0 and (kept["eye"]["out"].changed == 1 / 8).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": image(N=1)}, "a correspondence is between at least 2"),
        ({"parts": {}}, "parts none: name some"),
        ({"parts": {"random": boxes_of(3, 0)}}, "parts random: name some, none of them random"),
        ({"parts": {"eye": boxes_of(2, 0)}}, r"part eye: boxes of shape \(2, 4\)"),
        ({"parts": {"eye": boxes_of(3, 0).float()}}, "part eye: .* in whole pixels"),
        ({"parts": {"eye": torch.tensor([[0, 0, 5, 5]] * 2 + [[4, 0, 4, 5]])}}, r"\[4, 0, 4, 5\]"),
        ({"parts": {"eye": torch.tensor([[0, 0, 5, 18]] * 3)}}, "left < right <= 17"),
        ({"within": torch.tensor([[-1, 0, 5, 5]] * 3)}, "within: box"),
        ({"layers": []}, "layers: name at least one"),
    ],
)
def test_invalid_input_of_correspondence_is_refused(options, message):
    given = {"x": image(N=3), "parts": {"eye": boxes_of(3, 0)}, "layers": ["act"], **options}
    with pytest.raises(ValueError, match=message):
        correspondence(classifier(), given.pop("x"), given.pop("parts"), **given)


def test_the_table_has_means_and_errors_and_the_picture_a_grey_control():
    x = image(N=3)
    scores = correspondence(classifier(), x, {"eye": boxes_of(3, 0)}, ["low", "act"], draws=2)
    lines = correspondence_table(scores).splitlines()
    assert lines[0] == "| covered | low | act |" and lines[1] == "|---|---|---|"
    eye = scores["eye"]["low"]
    assert lines[2].startswith(f"| eye | {eye.mean:.3f} ± {eye.error:.3f} |")
    assert lines[3].startswith("| random |")
    picture = correspondence_picture(scores)
    for paint in (color(0), torch.full((3,), 0xBB / 255)):
        assert ((picture - paint[:, None, None]).abs().amax(0) < 0.02).sum() > 500


def test_long_names_of_layers_keep_their_ends_and_numbers_are_called_layers():
    assert layer_title("7") == "layer 7" and layer_title("features.8") == "features.8"
    short = layer_title("encoder.stages.3.blocks.17.conv2")
    assert len(short) == 20 and short.endswith("blocks.17.conv2") and short.startswith("…")
