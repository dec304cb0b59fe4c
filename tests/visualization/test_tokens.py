"""Tokens of vision transformers as maps: their grid, responses and projections."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deconvnet.visualization import Projector

ROWS, COLUMNS, CHANNELS = 3, 5, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(CHANNELS), nn.MultiheadAttention(CHANNELS, 2)
        self.up, self.act, self.down = nn.Linear(CHANNELS, 12), nn.GELU(), nn.Linear(12, CHANNELS)

    def forward(self, y):
        z = self.norm(y).transpose(0, 1)
        y = y + self.heads(z, z, z, need_weights=False)[0].transpose(0, 1)
        return y + self.down(self.act(self.up(y)))


class Transformer(nn.Module):
    """Patches of 4 x 4 pixels as tokens, with others in front of them and behind them."""

    def __init__(self, front=1, behind=0, *, last=False, again=False):
        super().__init__()
        self.again = again
        self.patches, self.last = nn.Conv2d(3, CHANNELS, 4, 4), last
        self.front = nn.Parameter(torch.randn(1, front, CHANNELS))
        self.behind = nn.Parameter(torch.randn(1, behind, CHANNELS))
        count = front + ROWS * COLUMNS + behind
        self.positions = nn.Parameter(torch.randn(1, count, CHANNELS))
        self.join = nn.Identity()
        self.blocks = nn.Sequential(Block(), Block())
        self.without = nn.Identity()
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, x):
        y = self.patches(x)
        y = y.permute(0, 2, 3, 1).flatten(1, 2) if self.last else y.flatten(2).transpose(1, 2)
        others = (tokens.expand(len(x), -1, -1) for tokens in (self.front, self.behind))
        front, behind = others
        y = torch.cat([front, y], 1) if front.shape[1] else y
        y = torch.cat([y, behind], 1) if behind.shape[1] else y
        y = self.join(y + self.positions)
        if self.again:
            y = torch.cat([self.blocks[0].norm(y[:, :1]) + y[:, 1:].mean(1, True), y[:, 1:]], 1)
        y = self.blocks(y)
        self.without(y[:, front.shape[1] :])
        return self.head(y[:, 0])


def transformer(*given, **options):
    torch.manual_seed(0)
    return Transformer(*given, **options).double().eval()


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 4 * ROWS, 4 * COLUMNS, generator=generator, dtype=torch.float64)


FORMS = [
    pytest.param((1, 0), {}, id="class token"),
    pytest.param((0, 0), {}, id="patches alone"),
    pytest.param((5, 0), {}, id="registers"),
    pytest.param((1, 2), {"last": True}, id="on both sides, channels last"),
    pytest.param((1, 0), {"again": True}, id="class token taken off and put back"),
]


@pytest.mark.parametrize(("others", "options"), FORMS)
def test_tokens_are_maps_of_their_patches_without_the_other_tokens(others, options):
    model, x = transformer(*others, **options), images()
    projector = Projector(model)
    infos = {info.name: info for info in projector.layers(x)}
    for name in ("join", "blocks.0", "blocks.1.norm", "blocks.1", "without"):
        assert infos[name].shape == (CHANNELS, ROWS, COLUMNS), name
        assert infos[name].field is None
    assert infos["blocks.1.act"].shape == (12, ROWS, COLUMNS)
    outputs = []
    model.blocks[0].register_forward_hook(lambda module, given, y: outputs.append(y))
    maps = projector.responses(x, ["blocks.0"])["blocks.0"]
    tokens = outputs[-1]
    for row in range(ROWS):
        for column in range(COLUMNS):
            token = tokens[:, others[0] + row * COLUMNS + column]
            assert_close(maps[:, :, row, column], token)


@pytest.mark.parametrize(("others", "options"), FORMS)
def test_a_token_is_projected_by_its_gradient_and_sees_the_whole_image(others, options):
    model, x = transformer(*others, **options), images()
    found = Projector(model)(x, "blocks.1", [(1, 6, 2, 1)], seeds=torch.ones(1))
    leaf = x.clone().requires_grad_()
    outputs = []
    model.blocks[1].register_forward_hook(lambda module, given, y: outputs.append(y))
    model(leaf)
    unit = outputs[0][1, others[0] + 2 * COLUMNS + 1, 6]
    (gradient,) = torch.autograd.grad(unit, leaf)
    assert_close(found.images[0], gradient[1], rtol=0, atol=1e-13)
    assert_close(found.values[0], unit)
    assert found.boxes.tolist() == [[0, 0, 4 * ROWS, 4 * COLUMNS]]
    assert "gradient" in str(found.report) and "no rule for attention x2" in found.report.reason


def test_deconv_of_tokens_above_attention_is_refused_with_what_works():
    message = "layer 'blocks.0': deconv has no rule for attention x1; .*method='gradient' needs no"
    with pytest.raises(ValueError, match=message):
        Projector(transformer(), method="deconv")(images(), "blocks.0", [(0, 0, 0, 0)])


def test_tokens_below_attention_have_rules():
    report = Projector(transformer())(images(), "join", [(0, 0, 0, 0)]).report
    assert report.method == "guided" and report.faithful


def test_a_grid_that_is_ambiguous_is_no_layer():
    class Square(nn.Module):
        """As many channels as tokens."""

        def __init__(self):
            super().__init__()
            self.patches, self.flat = nn.Conv2d(3, 4, 2, 2), nn.Flatten(2)
            self.tokens = nn.Identity()

        def forward(self, x):
            return self.tokens(self.flat(self.patches(x)).transpose(1, 2))

    projector = Projector(Square())
    x = torch.rand(1, 3, 4, 4)
    assert [info.name for info in projector.layers(x)] == ["patches"]
    with pytest.raises(ValueError, match=r"\(N, 4, 4\): not tokens of a grid of patches"):
        projector(x, "tokens", [(0, 0, 0, 0)])


def test_tokens_that_are_mixed_are_no_layers_but_those_around_them_are():
    """The linear layer of an MLP-Mixer works across positions, on (N, C, T)."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 4, 4, 4)
            self.up, self.down = nn.Linear(15, 7), nn.Linear(7, 15)
            self.block = nn.Identity()

        def forward(self, x):
            y = self.patches(x).flatten(2).transpose(1, 2)
            return self.block(y + self.down(self.up(y.transpose(1, 2))).transpose(1, 2))

    infos = Projector(Mixer()).layers(images().float())
    assert {info.name: info.shape for info in infos} == {
        "patches": (4, ROWS, COLUMNS),
        "block": (4, ROWS, COLUMNS),
    }


def test_a_layer_may_be_asked_for_with_images_of_several_sizes():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.tokens = nn.Conv2d(3, 4, 4, 4), nn.Identity()

        def forward(self, x):
            return self.tokens(self.patches(x).flatten(2).transpose(1, 2))

    projector = Projector(Patches())
    for rows, columns in ((3, 5), (2, 4), (3, 5)):
        x = torch.rand(2, 3, 4 * rows, 4 * columns)
        assert projector.responses(x, ["tokens"])["tokens"].shape == (2, 4, rows, columns)
        assert projector(x, "tokens", [(1, 2, 1, 3)]).images[0].any()
