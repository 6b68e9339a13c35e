"""The notebooks as files: executed in order, light, comparable, readable without a kernel or eyesight.

What they compute is nbval's to compare (`make test`); the last test here sees to it that nbval does compare.
"""

import ast
import configparser
import copy
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from refresh_notebooks import METADATA

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IGNORED = {"nbval-ignore-output", "nbval-skip"}
RAISES = {"raises-exception", "nbval-raises-exception"}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)


def code(path: Path) -> list[dict]:
    """The code cells, sources as one text."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    """The text of all markdown cells."""
    return "\n\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")


def tags(cell: dict) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", []))


def outputs(path: Path) -> Iterator[tuple[str, dict]]:
    """Every output with the name of its cell, as in `[7]`."""
    for cell in code(path):
        yield from ((f"[{cell.execution_count}]", output) for output in cell.outputs)


def printed(cell: dict) -> str:
    """The text that a cell prints or ends with; not the texts that stand for pictures and widgets."""
    texts = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
    texts += [o.data.get("text/plain", "") for o in cell.outputs if o.output_type == "execute_result"]
    return "".join(texts)


def is_contract(cell: dict) -> bool:
    """Whether nbval compares what this cell prints."""
    return bool(printed(cell).strip()) and not tags(cell) & IGNORED and "NBVAL_" not in cell.source


@each
def test_executed_once_in_order(path: Path):
    cells = code(path)
    assert all(cell.source.strip() for cell in cells), "an empty code cell"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "make refresh"


@each
def test_sections_are_numbered_without_a_gap(path: Path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    numbers = [int(number) for number in re.findall(r"^## (\d+) ·", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))


@each
def test_format_and_metadata(path: Path):
    book = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(book)
    ids = [cell.get("id") for cell in book["cells"]]
    assert all(ids) and len(set(ids)) == len(ids)
    assert book["metadata"] == METADATA, "widget state, an editor's settings or a Python version: make refresh"
    assert not [c["id"] for c in book["cells"] if set(c["metadata"]) - {"tags"}], (
        "timing or an editor's: make refresh"
    )


@each
def test_a_widget_is_stored_as_a_picture_and_words(path: Path):
    """Its kernel is gone: what would show it live shows an error where the notebook is only read."""
    live = [where for where, output in outputs(path) if any("widget" in kind for kind in output.get("data", {}))]
    assert not live, "make refresh"


@each
def test_sizes(path: Path):
    large = [
        f"{where} {len(json.dumps(out)) // 1024} KB"
        for where, out in outputs(path)
        if len(json.dumps(out)) > 150 * 1024
    ]
    assert not large
    assert path.stat().st_size <= 600 * 1024
    assert sum(p.stat().st_size for p in NOTEBOOKS) <= 6 * 2**20


@each
def test_cells_are_short_and_few(path: Path):
    lines = {cell.id: len(cell.source.splitlines()) for cell in code(path)}
    assert not {name: n for name, n in lines.items() if n > 25}
    assert statistics.median(lines.values()) <= 7
    every = len(nbformat.read(path, as_version=4).cells)
    assert len(lines) <= 35 and every <= 80
    if not path.name.startswith("00_"):  # the tour is short on purpose
        assert len(lines) >= 20 and every >= 40


@each
def test_enough_is_compared(path: Path):
    cells = [cell for cell in code(path) if printed(cell).strip()]
    contracts = [cell for cell in cells if is_contract(cell)]
    assert len(contracts) >= 3, "cells whose printed output nbval compares"
    assert 2 * len(contracts) >= len(cells), "at least half of the cells that print are compared"
    assert not [c.id for c in code(path) if "nbval-skip" in tags(c) or "NBVAL_SKIP" in c.source]


@each
def test_no_errors_and_nothing_on_stderr(path: Path):
    assert not [where for where, out in outputs(path) if out.get("name") == "stderr"]
    failed = [c for c in code(path) if any(o.output_type == "error" for o in c.outputs)]
    assert not [c.id for c in failed if not tags(c) & RAISES]


@each
def test_pictures_have_alt_text(path: Path):
    missing = []
    for where, output in outputs(path):
        data = output.get("data", {})
        html = data.get("text/html", "")
        missing += [f"{where} {tag[:60]}" for tag in re.findall(r"<img\b[^>]*>", html) if not has_alt(tag)]
        for kind in ("image/png", "image/jpeg"):
            if kind in data and not output.metadata.get(kind, {}).get("alt", "").strip():
                missing.append(
                    f'{where}: a figure needs display(figure, metadata={{"{kind}": {{"alt": "..."}}}})'
                )
        if "image/svg+xml" in data:
            missing.append(f"{where}: svg, which nbval would compare")
    missing += [alt for alt in re.findall(r"!\[(\s*)\]\(", prose(path))]
    missing += [tag[:60] for tag in re.findall(r"<img\b[^>]*>", prose(path)) if not has_alt(tag)]
    assert not missing


def has_alt(tag: str) -> bool:
    """Whether an `<img>` says what it shows."""
    return bool(re.search(r"""\balt=(["'])\s*\S.*?\1""", tag, flags=re.DOTALL))


@each
def test_links_lead_somewhere_and_to_the_neighbours(path: Path):
    links = set(re.findall(r"\]\((?!https?:|#|attachment:)([^)\s#]+)", prose(path)))
    assert not [link for link in links if not (path.parent / link).exists()]
    place = NOTEBOOKS.index(path)
    neighbours = NOTEBOOKS[max(place - 1, 0) : place] + NOTEBOOKS[place + 1 : place + 2]
    assert {p.name for p in neighbours} <= links


@each
def test_code_is_plain(path: Path):
    found = []
    for cell in code(path):
        found += [
            f"{cell.id}: {line}"
            for line in cell.source.splitlines()
            if re.match(r"\s*([!%]|get_ipython)", line)
        ]
        plain = "\n".join(line for line in cell.source.splitlines() if not re.match(r"\s*[!%]", line))
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                found += [
                    f"{cell.id}: imports {name}" for name in names if name.startswith("_") or name == "*"
                ]
    assert not [line for line in found if "__future__" not in line]


@each
def test_no_path_of_one_machine(path: Path):
    text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", path.read_text(encoding="utf-8"))  # pictures
    assert not re.findall(
        r"(?<![\w.])/(?:root|home|Users|tmp|content|mnt|work|var)/[\w.-]+|[A-Z]:\\+Users", text
    )


def cheapest_contract() -> tuple[Path, int]:
    """The contract cell with a number that has the fewest cells before it: its notebook and its place."""
    found = []
    for path in NOTEBOOKS:
        for place, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if (
                cell.cell_type == "code"
                and is_contract(cell)
                and re.search(r"\b\d", sanitized(printed(cell)))
            ):
                found.append((place, path))
    place, path = min(found)
    return path, place


def sanitized(text: str) -> str:
    """A text as nbval compares it."""
    rules = configparser.ConfigParser()
    rules.read(ROOT / "tests/nbval.cfg")
    for rule in rules.sections():
        text = re.sub(rules[rule]["regex"], rules[rule]["replace"], text)
    return text


def with_another_number(text: str) -> str:
    """The text with its last number changed in its first digit."""
    return re.sub(r"\b(\d)(?=[\d.,]*\D*$)", lambda m: str((int(m[1]) + 1) % 10), text, count=1)


@pytest.mark.skipif(not NOTEBOOKS, reason="there is no notebook yet")
def test_nbval_sees_one_wrong_number(tmp_path: Path):
    """Of two copies, one with a stored digit changed, nbval passes one and fails the other in that cell."""
    path, place = cheapest_contract()
    book = nbformat.read(path, as_version=4)
    book.cells = book.cells[: place + 1]
    nbformat.write(book, tmp_path / "true.ipynb")
    wrong = copy.deepcopy(book)
    for output in reversed(wrong.cells[place].outputs):
        holder, key = (
            (output, "text") if output.output_type == "stream" else (output.get("data", {}), "text/plain")
        )
        changed = with_another_number(holder.get(key, ""))
        if sanitized(changed) != sanitized(holder.get(key, "")):
            holder[key] = changed
            break
    assert wrong != book
    nbformat.write(wrong, tmp_path / "wrong.ipynb")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--nbval",
            "--nbval-current-env", "--nbval-sanitize-with", str(ROOT / "tests/nbval.cfg"),
            "--nbval-cell-timeout", "120", ".",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )  # fmt: skip
    last = sum(cell.cell_type == "code" for cell in book.cells) - 1
    failures = re.findall(r"^(?:FAILED|ERROR) \S*?(\w+\.ipynb::Cell \d+)", run.stdout, flags=re.MULTILINE)
    assert failures == [f"wrong.ipynb::Cell {last}"], run.stdout[-3000:]
