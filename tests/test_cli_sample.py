"""`ldm-edu sample`: what it draws and writes, and what it refuses in words."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import PROMPT, refused, run
from PIL import Image
from typer.testing import Result

pytest_plugins = ["commands"]


def sample(models: SimpleNamespace, *arguments: object) -> Result:
    return run("sample", "--checkpoint", models.text, "--steps", 2, *arguments)


def test_sample_writes_one_sheet(models: SimpleNamespace, here: Path):
    result = sample(models, PROMPT, "--num", 4, "--out", "sheet.png")
    assert result.exit_code == 0 and result.stdout == "sheet.png\n"
    assert Image.open("sheet.png").size == (34, 34)  # four of 16 x 16, a gap of 2
    assert os.listdir(here) == ["sheet.png"]


def test_sample_writes_a_row_a_prompt(models: SimpleNamespace, here: Path):
    assert sample(models, PROMPT, "a blue circle", "--num", 3).exit_code == 0
    assert Image.open("sample.png").size == (3 * 16 + 4, 2 * 16 + 2)


def test_sample_writes_a_folder(models: SimpleNamespace, here: Path):
    result = sample(models, PROMPT, PROMPT, "--num", 2, "--seed", 5, "--out", "pictures")
    names = [f"0{p}-a-red-circle-seed{s}.png" for p in (0, 1) for s in (5, 6)]
    assert sorted(os.listdir("pictures")) == names and len(result.stdout.splitlines()) == 4
    first, other, again, _ = (Path("pictures", name).read_bytes() for name in names)
    assert first == again and first != other  # the same prompt and seed, the same picture
    assert (
        sample(models, "a blue circle", "--num", 1, "--out", "pictures").exit_code == 0
    )  # an existing folder


def test_all_is_written_before_a_name_is_printed(models: SimpleNamespace, here: Path, monkeypatch: pytest.MonkeyPatch):
    """`| head -1` closes the pipe."""

    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("ldm_edu.cli.typer.echo", closed)
    assert sample(models, PROMPT, "--num", 3, "--out", "pictures").exit_code == 1
    assert len(os.listdir("pictures")) == 3


def test_sample_is_the_same_in_any_batch(models: SimpleNamespace, here: Path):
    assert sample(models, PROMPT, "--num", 20, "--out", "many").exit_code == 0  # two batches
    assert sample(models, PROMPT, "--num", 1, "--seed", 18, "--out", "one").exit_code == 0
    name = "00-a-red-circle-seed18.png"
    many, one = (np.array(Image.open(Path(folder, name))).astype(int) for folder in ("many", "one"))
    assert abs(many - one).max() <= 1


def test_guidance_changes_the_picture(models: SimpleNamespace, here: Path):
    for guidance in (1, 3):
        sample(models, PROMPT, "--guidance", guidance, "--out", f"{guidance}.png")
    sample(models, PROMPT, "--out", "default.png")
    assert Path("3.png").read_bytes() == Path("default.png").read_bytes() != Path("1.png").read_bytes()


def test_each_sampler_draws_a_picture_of_its_own(models: SimpleNamespace, here: Path):
    for sampler in ("ddim", "ddpm", "plms", "dpm-solver"):
        sample(models, PROMPT, "--steps", 4, "--sampler", sampler, "--out", f"{sampler}.png")
    sample(models, PROMPT, "--steps", 4, "--out", "default.png")
    assert Path("ddim.png").read_bytes() == Path("default.png").read_bytes()
    assert len({path.read_bytes() for path in here.glob("*.png")}) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], ["Prompt 1 is empty"]),
        ([PROMPT, "  "], ["Prompt 2 is empty"]),
        (["a green circle"], ["'green'", "above"]),
        ([PROMPT, "--num", "0"], ["--num", "0"]),
        ([PROMPT, "--num", "-3"], ["--num", "-3"]),
        ([PROMPT, "--num", "two"], ["--num"]),
        ([PROMPT, "--steps", "0"], ["--steps", "0"]),
        ([PROMPT, "--steps", "100000"], ["100000", "1000"]),
        ([PROMPT, "--seed", "-1"], ["--seed", "-1"]),
        ([PROMPT, "--guidance", "nan"], ["--guidance is nan"]),
        ([PROMPT, "--guidance", "inf"], ["--guidance is inf"]),
        ([PROMPT, "--guidance", "-1"], ["-1"]),
        ([PROMPT, "--out", "no/such/folder"], ["no/such does not exist. Create it"]),
        ([PROMPT, "--out", "nowhere/sheet.png"], ["nowhere does not exist. Create it"]),
        ([PROMPT, "--out", "sheet.jpg"], ["sheet.jpg", "PNG"]),
        ([PROMPT, "--sampler", "euler"], ["'euler'", "plms, dpm-solver"]),
        ([PROMPT, "--checkpoint", "nowhere"], ["no checkpoint 'nowhere'"]),
        ([PROMPT, "--checkpoint", "x" * 300], ["no checkpoint 'xxx"]),
        ([PROMPT, "--checkpoint", "~nobody-at-all/x"], ["no checkpoint '~nobody-at-all/x'", "home"]),
        ([PROMPT, "--out", "y" * 300], ["File name too long", "yyy"]),
        ([], ["PROMPT"]),
    ],
)
def test_sample_refuses(models: SimpleNamespace, here: Path, arguments: list[str], words: list[str]):
    refused(sample(models, *arguments), *words)
    assert os.listdir(here) == []


def test_a_folder_that_cannot_be_made_is_told_before_the_drawing(
    models: SimpleNamespace, here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ldm_edu.tasks.text_to_image.draw", lambda *_: pytest.fail("it was drawn"))
    refused(sample(models, "a green circle", "--out", "pictures"), "'green'")
    assert os.listdir(here) == []

    def full(folder: Path, **_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(Path, "mkdir", full)
    refused(sample(models, PROMPT, "--out", "pictures"), "Error: No space left on device: pictures")


def test_sample_refuses_a_first_stage_and_a_file_as_folder(models: SimpleNamespace, here: Path):
    refused(run("sample", PROMPT, "--checkpoint", models.first), "latent-diffusion")
    Path("notes").write_text("keep me")
    refused(sample(models, PROMPT, "--out", "notes"), "notes")
    assert Path("notes").read_text() == "keep me"
