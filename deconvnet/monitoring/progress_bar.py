"""Progress bars: in a terminal a line, in a notebook a widget, and nothing in files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm


def open_bar(iterable: Iterable | None = None, *, show: bool = True, **options: Any) -> tqdm:
    """A tqdm bar for where this process runs; show=False: none. options: as of tqdm.

    In a notebook without ipywidgets, the bar is a line of text. `tqdm.auto` would warn there and,
    because the output is no terminal, show nothing; it also takes 90 ms to import.
    """
    if not show or not in_notebook():
        # disable=None: only in a terminal. In a file, every state of the bar would remain.
        return tqdm(iterable, disable=None if show else True, **options)
    if find_spec("ipywidgets") is None:
        return tqdm(iterable, file=sys.stdout, **options)
    from tqdm.notebook import tqdm as notebook_bar

    return notebook_bar(iterable, **options)


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, which has loaded IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config
