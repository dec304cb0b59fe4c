"""The documentation site: pip install -e '.[docs]' && sphinx-build -W docs site

writes the folder site/, which can be opened without a server. Its first page is the README; the
API pages have every public name, documented by its docstring.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx_gallery.sorting import ExplicitOrder

import deconvnet

ROOT = Path(__file__).resolve().parents[1]

project = "deconvnet"
copyright = "the deconvnet developers"  # noqa: A001
version = release = deconvnet.__version__

extensions = [
    "myst_nb",  # notebooks, and all that myst_parser does
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
napoleon_google_docstring = False
exclude_patterns = ["*.py", "examples/*.ipynb"]  # notebooks of examples are downloads
nb_execution_mode = "off"  # notebooks are committed with their output
suppress_warnings = ["myst.xref_ambiguous"]

html_theme = "pydata_sphinx_theme"
html_title = "deconvnet"
html_static_path = ["static"]
html_css_files = ["site.css", "gallery.css"]
html_show_sourcelink = False
html_sidebars = {"start": []}  # a section of one page
html_theme_options = {
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 6,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
html_math_renderer = "mathml"

# The gallery: runs examples/ and shows each script with what it prints and draws. Scripts that have
# not changed since the last build are not run again.
EXAMPLES = [
    "learn_filters",
    "sparse_codes",
    "two_layers",
    "see_a_cnn",
    "denoise",
    "holes",
    "recordings",
    "classify_digits",
]
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "examples",
    "filename_pattern": "/",
    "within_subsection_order": ExplicitOrder([f"{name}.py" for name in EXAMPLES]),
    "backreferences_dir": "examples/of",
    "doc_module": ("deconvnet",),
    "reference_url": {"deconvnet": None},  # names in the code link to the API
    "thumbnail_size": (480, 330),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,  # this page would load scripts from elsewhere
}

# Headings have the anchors that they have on GitHub, and single dollars are no equations there.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "html_image"]
myst_fence_as_directive = ["math"]
myst_dmath_allow_space = False
myst_dmath_allow_digits = False

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
highlight_language = "none"  # blocks without a language are commands and formulas
python_use_unqualified_type_names = True
default_role = "code"
copybutton_exclude = ".linenos, .gp, .go"

# Files outside docs/, and the pages that show them.
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/README.md": "benchmarks",
    "LICENSE": "licence",
    "CITATION.cff": "citation",
}
# The pages of the API, and their modules.
API = {
    "api/deconvnet": "deconvnet",
    "api/visualization": "deconvnet.visualization",
    "api/nn": "deconvnet.nn",
    "api/signals": "deconvnet.signals",
    "api/sklearn": "deconvnet.sklearn",
}
# Folders outside docs/ that have pages of the same name on the site.
FOLDERS = ("examples/", "notebooks/")
NAMED_AFTER_FILE = re.compile(r"\[(?:docs/)?[\w-]+\.md\]\((?=[\w-]+\.md[)#])")
LINK = re.compile(r"""(\]\(|src="|href=")([^)"#\s]+)""")


def setup(app) -> None:
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", read_source)
    # Before napoleon, which turns sections of parameters into reStructuredText.
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.add_html_math_renderer("mathml", (inline_equation, None), (block_equation, None))


def copy_notebooks(app) -> None:
    """The notebooks as pages, with the links that these have on the site."""
    folder = ROOT / "docs" / "notebooks"
    folder.mkdir(exist_ok=True)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        text = notebook.read_text(encoding="utf-8").replace("](../docs/", "](../")
        (folder / notebook.name).write_text(text, encoding="utf-8")


def read_source(app, page: str, source: list[str]) -> None:
    """Pages that show other files, links out of docs/, and the API."""
    if page in API:
        source[0] = api_page(API[page])
        return
    shown = {name: file for file, name in PAGES.items()}
    if page in shown:
        file = ROOT / shown[page]
        text = file.read_text()
        if file.suffix != ".md":
            text = f"# {file.name}\n\n```text\n{text}```\n"
        stub = source[0].partition("\n\n")[2]
        source[0] = with_links_to_pages(text, file.parent, page) + "\n" + stub
    else:
        source[0] = with_links_to_pages(source[0], (ROOT / "docs" / page).parent, page)


def with_links_to_pages(text: str, folder: Path, page: str) -> str:
    """The text of a file in a folder, with the links that it has as a page of the site.

    A link that is named after a file gets the title of its page or section.
    """

    def link(match: re.Match) -> str:
        before, target = match.groups()
        if re.match(r"[a-z]+:", target) or "/" in page:
            return match[0]
        path = (folder / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if name in PAGES:
            name = f"{PAGES[name]}.md"
        elif name.startswith(FOLDERS):
            name = name.replace("README", "index").replace(".py", ".rst")
        target = name.removeprefix("docs/")
        return before + target

    return NAMED_AFTER_FILE.sub("[](", LINK.sub(link, text))


def api_page(name: str) -> str:
    """The page of a module: its description, and the docstrings of its public names."""
    module = importlib.import_module(name)
    lines = [name, "=" * len(name), "", *rst_lines(inspect.getdoc(module)), ""]
    for public in sorted(public_names(module), key=lambda n: (n[0].isupper(), n.lower())):
        value = getattr(module, public)
        lines += [public, "-" * len(public), ""]
        if inspect.isclass(value):
            lines += [f".. autoclass:: {name}.{public}", "   :members:"]
            # Written by scikit-learn, with references to its own guide.
            lines += ["   :exclude-members: set_inverse_transform_request", ""]
        elif callable(value):
            lines += [f".. autofunction:: {name}.{public}", ""]
        else:
            lines += [f".. autodata:: {name}.{public}", ""]
        lines += examples_of(f"{name}.{public}")
    return "\n".join(lines)


def examples_of(name: str) -> list[str]:
    """The gallery of the examples that use a public name; none, if none does."""
    file = ROOT / "docs" / sphinx_gallery_conf["backreferences_dir"] / f"{name}.examples"
    if not file.exists() or "thumbnail" not in file.read_text():
        return []
    return [".. rubric:: Examples", "", f".. minigallery:: {name}", ""]


def public_names(module) -> list[str]:
    """The names of a module that its users import."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def as_restructured_text(app, what, name, value, options, lines: list[str]) -> None:
    prose, heading, parameters = "\n".join(lines).partition("Parameters\n---")
    sections = f"{heading}{parameters}".splitlines()
    # The names of parameters, which are not indented, are for napoleon.
    sections = [plain(line) if line.startswith(" ") else line for line in sections]
    lines[:] = [*rst_lines(prose), *sections]


def rst_lines(docstring: str) -> list[str]:
    """A docstring of plain text as reStructuredText: indented paragraphs are literal, and stars and
    bars are themselves.
    """
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        if block.startswith("    ") and lines:
            lines += ["::", "", *block.splitlines(), ""]
            continue
        lines += [*plain(block).splitlines(), ""]
    return lines


def plain(text: str) -> str:
    """Text whose only markup is `code`, as reStructuredText."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("`", "``")


def inline_equation(translator, node: nodes.math) -> None:
    translator.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def block_equation(translator, node: nodes.math_block) -> None:
    translator.body.append(mathml(node, as_block=True))
    raise nodes.SkipNode


def mathml(node: nodes.math | nodes.math_block, as_block: bool) -> str:
    """The equation of a node; bars and angles keep one height, as browsers do not pair them."""
    return re.sub(
        r"<mo[^>]*>([|‖⟨⟩])</mo>",
        r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>',
        tex2mathml(node.astext(), as_block=as_block),
    )
