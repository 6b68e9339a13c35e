"""Which pictures a folder holds and what is known of each, from metadata.jsonl or class sub-folders."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm_edu.datasets.images import SUFFIXES
from ldm_edu.runtime import UserError

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Entry:
    """One picture of a folder and what is known of it."""

    path: Path
    caption: str | None = None
    label: int | str | None = None  # as written: a number, or a class's name
    mask: Path | None = None


def list_pictures(folder: str | Path) -> list[Entry]:
    """The pictures of `folder`, in an order that depends on their names only (with metadata: on its lines).

    Files that metadata.jsonl names and that are not there are skipped and named in one warning. Without it, sub-folders
    are classes, unless pictures lie beside them: then these alone are read, and a warning names the sub-folders.

    Raises:
        UserError: the folder is missing or without pictures, or its metadata.jsonl cannot be used.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; expected a folder of pictures.")
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Check the path (now in {Path.cwd()}).")
    if (folder / METADATA).is_file():
        return _from_metadata(folder)
    if (folder / "metadata.csv").is_file():
        raise UserError(f"{folder} has metadata.csv; write it as {METADATA}, one JSON object a line.")
    entries = [Entry(path) for path in _pictures_in(folder)]
    if entries and (unread := [path.name for path in _subfolders(folder) if _pictures_in(path)]):
        warnings.warn(
            f"{folder} holds pictures of its own, so those in its sub-folders ({_names(unread)}) are not read. Move "
            "its own away, and the sub-folders are classes.",
            stacklevel=2,
        )
    entries = entries or _from_class_folders(folder)
    if not entries:
        kinds = " ".join(sorted(SUFFIXES))
        raise UserError(f"{folder} holds no pictures ({kinds}), and neither do its sub-folders.")
    return entries


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_picture(path))


def is_picture(path: Path) -> bool:
    """Whether a file's name says that it is a picture. Hidden files are not (.DS_Store, ._photo.jpg)."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _from_class_folders(folder: Path) -> list[Entry]:
    subfolders = _subfolders(folder)
    with_metadata = [str(path) for path in subfolders if (path / METADATA).is_file()]
    if with_metadata:  # FOLDER/train, FOLDER/test: splits, which must not be taken for classes
        raise UserError(f"{folder} holds several data sets. Name one of them: {', '.join(with_metadata)}")
    return [
        Entry(path, label=subfolder.name)
        for subfolder in subfolders
        for path in sorted(subfolder.rglob("*"))
        if is_picture(path)
    ]


def _from_metadata(folder: Path) -> list[Entry]:
    entries, missing = [], []
    try:
        text = (folder / METADATA).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / METADATA} is not UTF-8 text: {error}.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{folder / METADATA}, line {number}"
        entry = _entry(line, folder, where)
        gone = [path for path in (entry.path, entry.mask) if path is not None and not path.is_file()]
        missing += gone
        if not gone:
            entries.append(entry)
    if not entries and missing:
        raise UserError(
            f"None of the {len(missing)} files named in {folder / METADATA} exists: {_names(missing)}."
        )
    if not entries:
        raise UserError(f"{folder / METADATA} is empty. Give it one JSON object a line, or remove it.")
    if missing:
        warn_skipped(missing, f"named in {folder / METADATA} but not there")
    return entries


def _entry(line: str, folder: Path, where: str) -> Entry:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f'{where}: expected an object with "file_name", got {line.strip()[:80]}')
    caption = row.get("caption", row.get("text"))
    label = row.get("label")
    mask = row.get("mask_file_name")
    if not isinstance(caption, str | None):
        raise UserError(f"{where}: the caption must be text, not {caption!r}.")
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise UserError(f"{where}: the label must be a class's number or name, not {label!r}.")
    if not isinstance(mask, str | None):
        raise UserError(f"{where}: mask_file_name must be text, not {mask!r}.")
    mask_path = None if mask is None else _inside(folder, mask, where)
    return Entry(_inside(folder, row["file_name"], where), caption, label, mask_path)


def _inside(folder: Path, name: str, where: str) -> Path:
    """`folder / name`, refused if it leaves the folder: metadata may come from a stranger."""
    home, path = Path(os.path.normpath(folder)), Path(os.path.normpath(folder / name))
    if "\0" in name or home not in path.parents:
        raise UserError(f"{where}: {name!r} is not inside {folder}. Only files inside the folder are read.")
    return path


def warn_skipped(paths: Sequence[Path], reason: str) -> None:
    """One warning that names the pictures left out."""
    plural = "picture" if len(paths) == 1 else "pictures"
    warnings.warn(f"Skipped {len(paths)} {plural} ({reason}): {_names(paths)}.", stacklevel=3)


def _names(paths: Sequence[Path | str], most: int = 10) -> str:
    rest = len(paths) - most
    return ", ".join(str(path) for path in paths[:most]) + (f" and {rest} more" if rest > 0 else "")
