"""Text in pictures can be read whatever its letters."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from deconvnet.visualization.drawing.canvas import FONT, GAP, text_block, text_width
from deconvnet.visualization.drawing.charts import Cells, bar_chart, label_map, legend_row
from deconvnet.visualization.drawing.letters import MISSING, font_for, legible


@pytest.mark.parametrize("letter", ["é", "ü", "ß", "ł", "λ", "Ж", "א", "…", "−"])
def test_letters_of_other_alphabets_are_drawn(letter):
    font = font_for(letter, FONT)
    missing = font.getmask(MISSING)
    assert legible(letter) == letter
    drawn = font.getmask(letter)
    assert (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
    # A box has ink in most of its border; the text is drawn with the same font.
    assert (text_block(letter, 20, 20) < 1).any()


def test_letters_that_no_font_has_are_replaced_by_their_numbers():
    assert legible("中文.png") == "[U+4E2D][U+6587].png"
    assert legible("unreadable \udcff") == "unreadable [U+DCFF]"
    assert text_width("中") > text_width("[U+4E2D")


def test_an_accent_as_a_separate_character_is_the_same_letter():
    assert legible("e\u0301te\u0301") == legible("\u00e9t\u00e9") == "\u00e9t\u00e9"
    assert legible("ﬁ") in ("ﬁ", "fi")


@pytest.mark.parametrize("text", ["map 3", "relu4 · ReLU", "“so” …"])
def test_text_that_pillows_own_font_has_is_drawn_with_it(text):
    canvas = Image.new("RGB", (90, 20), "white")
    font = ImageFont.load_default(FONT)
    ImageDraw.Draw(canvas).multiline_text((GAP, GAP), text, fill="black", font=font, spacing=4)
    expected = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
    assert torch.equal(text_block(text, 90, 20), expected)


def test_charts_have_a_letter_for_every_name():
    """matplotlib warns of a missing glyph, and draws a box."""
    cells = Cells((20, 20), (5.0, 5.0), (10.0, 10.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label_map(torch.tensor([[0, 1], [1, 0]]), cells, {0: "中", 1: "über"}, size=(60, 60))
        bar_chart({"鼻": [(1, 0.1)]}, ["目"], ylabel="y")
        legend_row(["文", "été"], width=300)
