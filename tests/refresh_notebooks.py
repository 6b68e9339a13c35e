"""Run the notebooks in order and store their outputs; the files change only where the results do.

    python tests/refresh_notebooks.py [NOTEBOOK...]

The budget is the reader's, or $LDM_EDU_BUDGET. A notebook that fails is left as it was, the cell shown.
"""

import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# A widget lives in its kernel. Stored, it names a model that is gone, and shows as an error in place of its picture.
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook in format 4.5. Cells keep their ids; one without is named by its place, not at random."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    for number, cell in enumerate(raw["cells"], 1):
        cell.setdefault("id", f"cell-{number}")
    raw["nbformat"], raw["nbformat_minor"] = 4, 5
    return nbformat.reads(json.dumps(raw), as_version=4)


def normalise(book: nbformat.NotebookNode) -> None:
    """Drop what belongs to one run, machine or editor: live widgets, times, versions, folded cells."""
    book.metadata = nbformat.from_dict(METADATA)
    for cell in book.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)


def refresh(path: Path) -> None:
    """Execute one notebook in its own folder; the file is replaced once every cell has run."""
    book = read(path)
    normalise(book)  # before running, too: the kernel is always python3
    NotebookClient(
        book, timeout=3600, record_timing=False, store_widget_state=False, coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()  # fmt: skip
    normalise(book)
    nbformat.validate(book)
    new = path.with_name(path.name + ".tmp")
    new.write_text(nbformat.writes(book).rstrip("\n") + "\n", encoding="utf-8")
    os.replace(new, path)


def main(arguments: list[str]) -> int:
    """Refresh the notebooks named, or all of them in order; 1 if any failed."""
    failed = False
    for path in [Path(a).resolve() for a in arguments] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        begun = time.monotonic()
        try:
            refresh(path)
        except CellExecutionError as error:
            failed = True
            print(f"{path.name}: failed, and left as it was\n{error}")
        else:
            print(f"{path.name}: {time.monotonic() - begun:.0f} s, {path.stat().st_size / 1024:.0f} KB")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
