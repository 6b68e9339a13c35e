"""A checkpoint is a folder: config.json, model.safetensors, README.md (its model card) and history.csv.

It is written whole or not at all, and reading it never runs code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ldm_edu import __version__
from ldm_edu.parts import uncompiled
from ldm_edu.runtime import REPOSITORY, UserError

FORMAT = 1
FILES = ("config.json", "model.safetensors", "README.md", "history.csv")
HOME = REPOSITORY / "data" / "checkpoints"
Config = TypeVar("Config")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or not what was asked for."""


def names(prefix: str = "") -> list[str]:
    """The committed checkpoints whose names begin with `prefix`."""
    folders = (p.parent for p in HOME.glob(f"{prefix}*/config.json"))
    return sorted(f.name for f in folders if f.suffix not in (".tmp", ".old"))  # those of a writing that was killed


def find(name: str | Path) -> Path:
    """The folder of a checkpoint, given that folder or a committed checkpoint's name.

    Only a name that begins with "hub:" uses the network: "hub:owner/repository" is fetched from the Hugging Face hub.

    Raises:
        CheckpointError: there is none, with the names there are.
    """
    if str(name).startswith("hub:"):
        return _fetch(str(name).removeprefix("hub:"))
    try:
        for folder in (Path(name).expanduser(), HOME / str(name)):
            for place in (folder, _beside(folder, "old")):  # where write_folder was killed between its renames
                if (place / "config.json").is_file():
                    return place
    except (OSError, RuntimeError) as error:  # a name too long for a file, the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"There is no checkpoint {str(name)!r}: {reason}.") from error
    if Path(name).is_dir():
        raise CheckpointError(f"The folder {name} holds no config.json, so it is no checkpoint.")
    raise CheckpointError(
        f"There is no checkpoint {str(name)!r}. Committed ones: {', '.join(names()) or 'none'}."
    )


def find_by_fingerprint(sha256: str) -> Path:
    """The committed checkpoint whose weights have this fingerprint.

    Raises:
        CheckpointError: none has.
    """
    if folder := committed(sha256):
        return folder
    raise CheckpointError(
        f"No committed checkpoint has the weights {sha256[:12]}…, which this model's first stage needs."
    )


def committed(sha256: str) -> Path | None:
    """The committed checkpoint whose weights have this fingerprint, if there is one."""
    for name in names():
        with settings_of(HOME / name):
            if json.loads((HOME / name / "config.json").read_text()).get("sha256") == sha256:
                return HOME / name
    return None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the weights as they are stored: in half precision, by name."""
    return hashlib.sha256(save(_stored(tensors))).hexdigest()


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        uncompiled(n): (t.half() if t.is_floating_point() else t).detach().cpu().contiguous().clone()  # tied ones, too
        for n, t in sorted(tensors.items())
    }


@contextmanager
def settings_of(folder: Path) -> Iterator[None]:
    """Turns what goes wrong while a configuration is read into a worded error."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever a network, a tokenizer or a schedule makes of a value it cannot take
        words = error if isinstance(error, UserError) else repr(error)
        raise CheckpointError(f"The configuration in {folder} is incomplete or wrong: {words}") from error


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, allow_patterns=["config.json", "model.safetensors", "README.md"])
        )
    except Exception as error:  # a dozen kinds, for no network, no such repository, no right to it, ...
        raise CheckpointError(f"Cannot fetch {repository!r} from the Hugging Face hub: {error}") from error


def to_json(value: Any, indent: int | None = None) -> str:
    """As JSON: numpy's and torch's numbers like Python's, a path as text."""
    return json.dumps(value, indent=indent, default=lambda v: v.item() if hasattr(v, "item") else os.fspath(v))


def write(
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
    history: str | None,
) -> None:
    """Write a checkpoint: all its files into a new folder, then one rename.

    Floating-point tensors are stored in half precision: half the size, and far finer than the model's own error.

    Raises:
        CheckpointError: a weight is not finite, the parent folder does not exist, the folder holds other files, or
            there is no room. Then what was there is as before.
    """
    folder = Path(folder).expanduser()
    if not folder.parent.is_dir():
        raise CheckpointError(
            f"Cannot write {folder}: the folder {folder.parent} does not exist. Create it first."
        )
    there = [p.name for p in folder.iterdir()] if folder.is_dir() else [folder.name] if folder.exists() else []
    strangers = sorted(set(there) - set(FILES))
    if strangers:
        raise CheckpointError(
            f"Cannot write {folder}: a checkpoint would take the place of what is there ({strangers[0]}). "
            "Choose another folder."
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.half()).all():
            raise CheckpointError(
                f"The weight {name} is not finite in half precision; the checkpoint was not written."
            )
    weights = save(_stored(tensors))
    full = {
        "format": FORMAT,
        "version": __version__,
        **config,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    files = {
        "config.json": (to_json(full, indent=2) + "\n").encode(),
        "model.safetensors": weights,
        "README.md": card.encode(),
    }
    if history:
        files["history.csv"] = history.encode()
    try:
        write_folder(folder, files)
    except OSError as error:
        raise CheckpointError(f"Cannot write {folder}: {error.strerror or error}.") from error


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace `folder` by one with these files, so that at every moment the old or the new one is whole.

    Between two renames the old one is called `folder.old`; `find` looks there too.
    """
    new, old = _beside(folder, "tmp"), _beside(folder, "old")
    if old.exists() and not folder.exists():  # a writing before this one was killed between them
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        for name, content in files.items():
            with open(new / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, word: str) -> Path:
    folder = folder.absolute()
    return folder.parent / f"{folder.name}.{word}"


def read(folder: Path, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors (float32) of a checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated, altered since it was written, of a newer format or another kind.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = (folder / "model.safetensors").read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read the checkpoint {folder}: {error.strerror} ({error.filename})."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is not valid JSON ({error}); fetch the checkpoint again."
        ) from error
    found = config.get("format") if isinstance(config, dict) else None
    if not isinstance(found, int) or found > FORMAT:
        raise CheckpointError(
            f"The checkpoint {folder} has format {found!r}; this version of ldm-edu reads formats up to {FORMAT}. "
            "Update the package."
        )
    if kind and config.get("kind") != kind:
        raise CheckpointError(
            f"The checkpoint {folder} is a {config.get('kind')!r}; a {kind!r} was asked for."
        )
    if hashlib.sha256(weights).hexdigest() != config.get("sha256"):
        raise CheckpointError(
            f"{folder / 'model.safetensors'} is not the file that was saved: it is truncated or altered "
            f"({len(weights):,} bytes). Fetch the checkpoint again."
        )
    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} is no safetensors file: {error}.") from error
    return config, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def build(kind: type[Config], values: Mapping[str, Any], folder: Path) -> Config:
    """A configuration dataclass from JSON (lists become tuples).

    Raises:
        CheckpointError: a setting that the dataclass does not have.
    """
    unknown = set(values) - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise CheckpointError(f"{folder / 'config.json'} has unknown settings: {', '.join(sorted(unknown))}.")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fill(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load the weights into a model that must fit them exactly.

    Raises:
        CheckpointError: names or shapes differ: the configuration does not belong to these weights.
    """
    own = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    given = {n: tuple(t.shape) for n, t in tensors.items()}
    wrong = [n for n in sorted(own.keys() | given.keys()) if own.get(n) != given.get(n)]
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"The configuration in {folder} does not fit its weights: {len(wrong)} differ, the first is {first} "
            f"(configuration: {own.get(first)}, file: {given.get(first)})."
        )
    model.load_state_dict(dict(tensors))
