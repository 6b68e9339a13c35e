"""A checkpoint is written whole or not at all, whatever happens meanwhile, and never over other files."""

import os
import re
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from interruption import contents, run_apart

from ldm_edu import checkpoint
from ldm_edu.checkpoint import CheckpointError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="cuts forked processes short; this system has no fork")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_half_precision_cannot_hold_are_not_written(value: float, tmp_path: Path):
    model = tiny.first_stage()
    model.save(tmp_path / "first", "the old one")
    before = contents(tmp_path)
    with torch.no_grad():
        model.decoder.conv_out.weight[0, 0, 0, 0] = value
    for name in ("first", "new"):
        with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.weight"):
            model.save(tmp_path / name, "a new one")
    assert contents(tmp_path) == before


def test_a_missing_parent_folder_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "no/such"))):
        tiny.first_stage().save(tmp_path / "no/such/place", "a card")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_never_takes_the_place_of_other_files(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("Once")
    (tmp_path / "file").write_text("upon")
    before = contents(tmp_path)
    for name, word in (("thesis", "chapter1.tex"), ("file", "file")):
        with pytest.raises(CheckpointError, match=word):
            tiny.first_stage().save(tmp_path / name, "a card")
    assert contents(tmp_path) == before


OLD = {"config.json": b"{}", "model.safetensors": b"old" * 1000, "history.csv": b"1\n"}
NEW = {"config.json": b"[]", "model.safetensors": b"new" * 1000}


@needs_fork
@pytest.mark.parametrize("how", ["kill", "error"])
@pytest.mark.parametrize("before", [{}, OLD], ids=["new", "overwriting"])
def test_writing_cut_short_at_any_moment(how: str, before: dict[str, bytes], tmp_path: Path):
    """At every single change to the files in turn: killed, or the disk full."""
    ends, at = [], 0
    while not ends or ends[-1] != "finished" or at < 5:
        at += 1
        place = tmp_path / str(at)
        place.mkdir()
        if before:
            checkpoint.write_folder(place / "model", before)
        ends.append(run_apart(partial(checkpoint.write_folder, place / "model", NEW), place, at, how))
        if ends[-1] == "finished" or before or (place / "model").exists():
            whole = contents(checkpoint.find(place / "model"))
            assert whole == NEW or (whole == before and ends[-1] != "finished"), at
        if how == "error":  # without a kill there is time to tidy up
            left = {p.name for p in place.iterdir()} - {"model.old"}
            assert left == ({"model"} if before or ends[-1] == "finished" else set()), at
        # And the next writing is not in the way of what this one left.
        checkpoint.write_folder(place / "model", NEW)
        assert contents(place) == {f"model/{name}": content for name, content in NEW.items()}
    assert ends.count("killed" if how == "kill" else "raised") >= 8, ends


def test_a_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny.first_stage()
    model.save(tmp_path / "first", "the old one")
    before = contents(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm_edu.checkpoint.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        model.save(tmp_path / "first", "a new one")
    assert contents(tmp_path) == before


@needs_fork
def test_a_writer_in_place_would_be_caught(tmp_path: Path):
    """The test of writing cut short can fail: a writer that overwrites the files where they are does."""

    def in_place() -> None:
        for name, content in NEW.items():
            with open(tmp_path / "model" / name, "wb") as file:
                file.write(content)

    checkpoint.write_folder(tmp_path / "model", OLD)
    assert run_apart(in_place, tmp_path, at=2) == "killed"
    assert contents(tmp_path / "model") not in (OLD, NEW)
