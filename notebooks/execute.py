"""Runs the notebooks and writes their output into them: python notebooks/execute.py [NOTEBOOK ...]

needs pip install -e '.[docs]' ipywidgets. Progress bars are left out of what is kept: a stored
widget shows only how it began. Pictures become JPEG files where these are smaller, to keep the
repository small.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
QUALITY = 70
WIDGET = "application/vnd.jupyter.widget-view+json"


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook, timeout=1800, kernel_name="python3", coalesce_streams=True
        )
        client.execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which differ in every run
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", ())]
                for output in cell.outputs:
                    shrink(output.get("data", {}))
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def shrink(data: dict) -> None:
    """Replace the PNG file in an output by a JPEG file, if that is smaller."""
    if "image/png" not in data:
        return
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    picture.convert("RGB").save(file, "jpeg", quality=QUALITY, optimize=True)
    encoded = base64.b64encode(file.getvalue()).decode()
    if len(encoded) < len(data["image/png"]):
        del data["image/png"]
        data["image/jpeg"] = encoded


if __name__ == "__main__":
    main()
