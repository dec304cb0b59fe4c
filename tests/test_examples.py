"""Examples and notebooks run from top to bottom in a small form, and their numbers are right."""

import ast
import json
import re
import warnings
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Constants of each example that make it small, and what must then hold for its variables and for
# the numbers that it prints.
SMALL = {
    "learn_filters": (
        {"NUM_FILTERS": 12, "EPOCHS": 2, "SIDE": 64},
        lambda v, numbers: v["density"] < 0.05 and v["error"] < 0.5,
    ),
    "sparse_codes": (
        {"NUM_FILTERS": 12, "EPOCHS": 2, "SIDE": 64, "LAMS": 6},
        lambda v, numbers: (v["snr"][1:] > v["snr"][:-1]).all() and v["snr"][-1] > 8,
    ),
    "two_layers": (
        {"EPOCHS": 1, "SIDE": 48, "NUM_MAPS": (6, 10)},
        lambda v, numbers: numbers[1] > numbers[3] > numbers[5] + 1,
    ),
    "see_a_cnn": (
        {"STEPS": 60, "WIDTH": 6, "FACES": 3},
        lambda v, numbers: v["accuracy"] > 0.7 and len(v["found"]) == 3,
    ),
    "denoise": (
        {"NUM_FILTERS": 16, "EPOCHS": 2, "SIDE": 64},
        lambda v, numbers: numbers[-1] > numbers[0] + 7,
    ),
    "holes": (
        {"NUM_FILTERS": 16, "EPOCHS": 3, "SIDE": 160},
        lambda v, numbers: v["ours"] > v["theirs"],
    ),
    "recordings": (
        {"SECONDS": 2, "EPOCHS": 15, "START": 0},
        lambda v, numbers: min(numbers[1::4]) > 90 and max(numbers[3::4]) < 5,
    ),
    "classify_digits": (
        {"DIGITS": 300, "NUM_MAPS": 24, "EPOCHS": 2},
        lambda v, numbers: v["scores"][1] > v["scores"][0] + 0.2,
    ),
}
# The same of the notebooks.
SMALL_NOTEBOOKS = {
    "first_hour": (
        {"SIZE": 48, "IMAGES": 6, "NEW": 1, "MAPS": (3, 4, 4, 4), "EPOCHS": 1},
        lambda v: (
            [result.layer for result in v["results"]] == [1, 2, 3, 4]
            and v["seen_snr"][0] > v["seen_snr"][1] > v["seen_snr"][2] > 0
        ),
    ),
    "open_a_cnn": (
        {"SIZE": 32, "WIDTH": 6, "STEPS": 50, "CONCEPTS": 6, "EPOCHS": 1},
        lambda v: v["accuracy"](v["model"]) > 0.7 and v["result"].layer == 1,
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_form_of_an_example_runs_and_its_numbers_are_right(name, capsys):
    constants, holds = SMALL[name]
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 60
    variables = run(source, constants, f"{name}.py")
    assert variables["figures"] == 1
    printed = capsys.readouterr().out
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", printed)]
    assert holds(variables, numbers), printed


@pytest.mark.parametrize("name", SMALL_NOTEBOOKS)
def test_a_small_form_of_a_notebook_runs_and_the_notebook_shows_its_output(name):
    constants, holds = SMALL_NOTEBOOKS[name]
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    variables = run(source, constants, f"{name}.ipynb")
    assert holds(variables)
    kinds = [
        kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {})
    ]
    pictures = sum(kind.startswith("image/") for kind in kinds)
    assert pictures > 5 and pictures >= variables["figures"] > 2
    assert not any("widget" in kind for kind in kinds)


def run(source: str, constants: dict[str, object], name: str) -> dict[str, object]:
    """The variables of a script that ran with other constants, and the number of its figures."""
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    code = compile(with_constants(source, constants), name, "exec")
    variables = {"__name__": "__main__"}
    try:
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
            exec(code, variables)
        variables["figures"] = len(plt.get_fignums())
    finally:
        plt.close("all")
    return variables


def with_constants(source: str, constants: dict[str, object]) -> ast.Module:
    """The code of a script with other values in the assignments to these names."""
    tree, left = ast.parse(source), dict(constants)
    for statement in tree.body:
        if not isinstance(statement, ast.Assign):
            continue
        target, value = statement.targets[0], statement.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        new = [
            ast.parse(repr(left.pop(name.id)), mode="eval").body
            if isinstance(name, ast.Name) and name.id in left
            else old
            for name, old in pairs
        ]
        statement.value = new[0] if pairs[0][0] is target else ast.Tuple(new, ast.Load())
    assert not left, f"the script has no constants {sorted(left)}"
    return ast.fix_missing_locations(tree)


def test_the_gallery_shows_every_example():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    listed = re.search(r"^EXAMPLES = \[(.*?)\]", (ROOT / "docs/conf.py").read_text(), re.M | re.S)
    assert set(re.findall(r'"(\w+)"', listed[1])) == names == set(SMALL)
