"""The code, links and references in the README and the guides work as written."""

import ast
import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import no_pictures

from deconvnet import DeconvNet, LayerSettings, LearningSettings
from deconvnet.monitoring.monitor import Monitor, save_picture
from deconvnet.training.loop import train
from deconvnet.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Guides whose Python is run, and the least number of values that their comments give.
GUIDES = {
    "activations": 4,
    "coding": 30,
    "deconvolution": 30,
    "gradients": 5,
    "upsampling": 20,
    "sklearn": 10,
    "signals": 12,
    "faq": 0,
    "features": 1,
    "visualization": 4,
    "classification": 1,
}


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_python_of_the_first_pages_runs_from_top_to_bottom(tmp_path, monkeypatch, textures):
    monkeypatch.chdir(tmp_path)
    images = textures(2, 3, 40, 40)
    quick = LearningSettings(epochs=1)
    layers = [
        LayerSettings(4, 5, pool=[1, 2, 2], learning=quick),
        LayerSettings(4, 3, learning=quick),
    ]
    with no_pictures(), Monitor(progress=False) as monitor:
        train(DeconvNet(layers), images, RunFolder(Path("runs/photographs"), {}), monitor)
    names, few = {}, "sample_photographs(2, size=40)"
    for block in blocks(README):
        code = block.replace("sample_photographs()", few)
        exec(compile(code, "README.md", "exec"), names)
    assert names["pixels"].shape == names["images"].shape == (2, 3, 40, 40)
    assert Path("photos.safetensors").is_file()
    assert names["learned"].filters.shape == (32, 3, 8, 8)
    assert names["learned"].encode(images).z.shape == (2, 32, 47, 47)
    Path("photos").mkdir()
    for number, image in enumerate(textures(8, 3, 70, 64)):
        save_picture(Path(f"photos/{number}.png"), image)
    shutil.copy("photos/0.png", "photo.jpg")
    names = {}
    shutil.copytree("runs/photographs", "runs/denoise-rgb")
    for page in ("start.md", "restoration.md"):
        for block in blocks((ROOT / "docs" / page).read_text()):
            exec(compile(block, page, "exec"), names)
    assert names["photo"].shape == (1, 3, 70, 64) and names["images"].shape == (8, 3, 64, 64)
    assert names["filters"].shape == (4, 3, 5, 5) and names["z"].shape == (8, 4, 68, 68)
    assert names["maps"].num_maps in (2, 4) and names["choice"].lam > 0
    assert names["filled"].shape == names["second"].shape == (1, 3, 96, 96)
    assert names["result"].pixels.shape == (1, 3, 70, 64)


def test_the_python_of_the_mathematics_runs(capsys):
    (block,) = blocks((ROOT / "docs/mathematics.md").read_text())
    assert "size=150" in block and "(15, 50, 100, 150)" in block
    exec(block.replace("size=150", "size=110").replace("15, 50, 100, 150", "6, 6, 6, 6"), {})
    norms = [
        ast.literal_eval(line.partition(" ")[2]) for line in capsys.readouterr().out.split("\n")[:2]
    ]
    # Planes of unit norm: a filter of C planes has the squared norm C.
    assert all(plane > norm > 0 for plane, norm in zip(*(row[1:] for row in norms), strict=True))


@pytest.mark.parametrize(("guide", "values"), GUIDES.items())
def test_the_python_of_a_guide_runs_and_gives_the_values_in_its_comments(guide, values):
    text = (ROOT / f"docs/{guide}.md").read_text()
    names, checked = {}, 0
    with torch.random.fork_rng():
        for block in blocks(text):
            lines = block.splitlines()
            for statement in ast.parse(block).body:
                code = ast.get_source_segment(block, statement)
                comment = lines[statement.end_lineno - 1][statement.end_col_offset :].strip()
                if isinstance(statement, ast.Expr) and comment:
                    assert f"# {eval(code, names)!r}" == comment, code
                    checked += 1
                else:
                    exec(code, names)
    assert checked > values


# Pages that building the site writes, from examples/ and notebooks/.
GENERATED = ("examples/", "notebooks/")
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_exist(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        assert link.startswith("http") or (ROOT / page).parent.joinpath(link).is_file(), link


@pytest.mark.parametrize("page", PAGES)
def test_sections_that_a_page_links_to_exist(page):
    text = (ROOT / page).read_text()
    for link, section in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert section in _sections(target.read_text()), f"{link}#{section}"


def _sections(text: str) -> set[str]:
    """The anchors of the headings of a Markdown page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_functions_named_in_the_mathematics_exist():
    text = (ROOT / "docs/mathematics.md").read_text()
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    paths = (path.relative_to(ROOT) for path in (ROOT / "deconvnet").rglob("*.py"))
    modules = {path.stem: ".".join(path.with_suffix("").parts) for path in paths}
    references = re.findall(r"\b([a-z_]+)\.(\w+(?:\.\w+)?)", text)
    named = {(module, name) for module, name in references if module in modules}
    assert len(named) > 40
    for module, name in named:
        thing = importlib.import_module(modules[module])
        for part in name.split("."):
            if part in ("py", "md"):
                break
            assert hasattr(thing, part), f"{module}.{name}"
            thing = getattr(thing, part)
    # Files given by their path.
    for path in re.findall(r"`((?:configs|tests|visualization)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).is_file() or (ROOT / "deconvnet" / path).is_file(), path


def test_every_page_of_docs_is_in_the_contents_of_the_site():
    docs, reached, waiting = ROOT / "docs", set(), ["index"]
    while waiting:
        page = waiting.pop()
        if page.startswith(GENERATED):
            continue
        reached.add(page)
        file = next(docs / f"{page}{suffix}" for suffix in (".md", ".rst") if exists(page, suffix))
        for contents in re.findall(r"```{toctree}\n(?::.*\n)*\n((?:.+\n)+?)```", file.read_text()):
            waiting += [str(Path(page).parent / name) for name in contents.split()]
    pages = [path.relative_to(docs).with_suffix("") for path in docs.rglob("*.[mr][ds]*")]
    pages = {page.as_posix() for page in pages}
    assert reached == {page for page in pages if not page.startswith(GENERATED)}


def exists(page: str, suffix: str) -> bool:
    return (ROOT / "docs" / f"{page}{suffix}").exists()
