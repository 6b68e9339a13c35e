"""`ldm-edu reconstruct` and `evaluate`: the numbers, the JSON, the pictures written, and what is refused."""

import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import photo, png_header, refused, run
from PIL import Image
from typer.testing import Result

from ldm_edu.evaluation import faithfulness

pytest_plugins = ["commands"]


def reconstruct(models: SimpleNamespace, *arguments: object) -> Result:
    return run("reconstruct", "--checkpoint", models.first, *arguments)


def test_reconstruct_prints_one_json_object(models: SimpleNamespace, here: Path):
    photo(here / "photo.png")
    result = reconstruct(models, "photo.png", "--json")
    scores = json.loads(result.stdout)
    assert list(scores) == ["psnr", "ssim", "bicubic_psnr", "images"] and scores["images"] == 1
    assert result.exit_code == 0 and 0 < scores["psnr"] < 100 and os.listdir(here) == ["photo.png"]


def test_reconstruct_folder_takes_the_mean(models: SimpleNamespace, here: Path):
    photo(here / "set" / "1.png", 21, 30)
    photo(here / "set" / "2.png", 3, 50)
    one, two, both = (
        json.loads(reconstruct(models, f"set{name}", "--json").stdout) for name in ("/1.png", "/2.png", "")
    )
    assert both["images"] == 2
    for key in ("psnr", "ssim", "bicubic_psnr"):
        assert both[key] == pytest.approx((one[key] + two[key]) / 2)
    lines = reconstruct(models, "set").stdout.splitlines()
    assert len(lines) == 4 and lines[-1].endswith("mean of 2") and f"{both['psnr']:.2f} dB" in lines[-1]


def test_reconstruct_writes_pictures_of_the_same_size(models: SimpleNamespace, here: Path):
    photo(here / "photo.png", 21, 30)
    assert reconstruct(models, "photo.png", "--out", "after.png").exit_code == 0
    assert Image.open("after.png").size == (30, 21)
    photo(here / "set" / "deep" / "a.png")
    photo(here / "set" / "deep" / "a.bmp")
    assert reconstruct(models, "set", "--out", "results").exit_code == 0
    assert sorted(os.listdir("results")) == ["deep-a.bmp.png", "deep-a.png.png"]
    assert reconstruct(models, "photo.png", "--out", "results").exit_code == 0
    assert Path("results/photo.png").is_file()


def test_reconstruct_skips_and_names_what_is_broken(models: SimpleNamespace, here: Path):
    photo(here / "set" / "good.png")
    (here / "set" / "empty.png").write_bytes(b"")
    (here / "set" / "huge.png").write_bytes(png_header(5000))
    result = reconstruct(models, "set", "--json", "--out", "results")
    assert json.loads(result.stdout)["images"] == 1 and os.listdir("results") == ["good.png"]
    assert "empty.png" in result.stderr and "huge.png" in result.stderr and "25 megapixels" in result.stderr


def test_reconstruct_refuses(models: SimpleNamespace, here: Path):
    photo(here / "set" / "photo.png")
    (here / "empty").mkdir()
    (here / "bad").mkdir()
    for name in ("1.png", "2.png"):
        (here / "bad" / name).write_bytes(b"")
    (here / "huge.png").write_bytes(png_header(5000))
    before = (here / "set" / "photo.png").read_bytes()
    refused(reconstruct(models, "nowhere.png"), "There is no file nowhere.png")
    refused(reconstruct(models, "empty"), "holds no pictures")
    refused(reconstruct(models, "bad", "--out", "results"), "no picture to score", "1.png", "2.png")
    refused(reconstruct(models, "bad/1.png", "--json"), "0 bytes")
    refused(reconstruct(models, "huge.png"), "25 megapixels", "smaller copy")
    refused(reconstruct(models, "set", "--out", "set"), "overwrite the original")
    refused(reconstruct(models, "set/photo.png", "--out", "set/photo.png"), "overwrite the original")
    refused(reconstruct(models, "set", "--out", "sheet.png"), "must name a folder")
    photo(here / "jpegs" / "1.jpg")  # its result would have a name of its own
    refused(reconstruct(models, "jpegs", "--out", "./jpegs"), "holds the originals")
    photo(here / "classes" / "a" / "1.png")
    refused(reconstruct(models, "classes", "--out", "classes"), "holds the originals")
    refused(reconstruct(models, "classes", "--out", "classes/a"), "holds the originals")
    photo(here / "set" / "other.jpg")  # beside a picture that is none of the sources
    (here / "set" / "other.png").write_bytes(before)
    refused(reconstruct(models, "set/other.jpg", "--out", "set"), "overwrite set/other.png", "beside the originals")
    for folder, name in (("twice/a/b", "c.png"), ("twice/a-b", "c.png"), ("twice/a", "b-c.jpg")):
        (here / folder).mkdir(parents=True, exist_ok=True)
        photo(here / folder / name)
    refused(reconstruct(models, "twice", "--out", "results"), "a-b-c.png.png", "rename")
    refused(reconstruct(models, "set", "--out", "no/such"), "does not exist. Create it")
    refused(run("reconstruct", "set", "--checkpoint", "nowhere"), "no checkpoint 'nowhere'")
    refused(run("reconstruct", "set", "--checkpoint", models.text), "autoencoder-kl")
    assert not (here / "results").exists() and (here / "set" / "photo.png").read_bytes() == before


def test_pictures_beside_class_folders_hide_those_and_it_is_said(models: SimpleNamespace, here: Path):
    for name in ("1.png", "cats/1.png", "dogs/1.png"):
        photo(here / "set" / name)
    (here / "set" / "notes").mkdir()
    result = reconstruct(models, "set", "--json")
    assert json.loads(result.stdout)["images"] == 1
    assert "Warning: set holds pictures of its own" in result.stderr and "(cats, dogs) are not read" in result.stderr


def test_reconstruct_refuses_an_altered_checkpoint(models: SimpleNamespace, here: Path):
    photo(here / "photo.png")
    for name in ("config.json", "model.safetensors"):
        (here / "copy").mkdir(exist_ok=True)
        (here / "copy" / name).write_bytes((models.first / name).read_bytes())
    weights = bytearray((here / "copy" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (here / "copy" / "model.safetensors").write_bytes(weights)
    refused(run("reconstruct", "photo.png", "--checkpoint", "copy"), "truncated or altered")


def test_the_stand_in_below_is_called_as_the_real_one():
    inspect.signature(faithfulness.faithfulness).bind(object(), captions=512, seed=1)


@pytest.fixture
def faithful(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A stand-in for the measurement of caption faithfulness, which takes minutes."""
    calls: list[dict] = []
    shares = {"one": 0.97, "two": 0.84, "no_colours": None, "held_out": 0.8, "ceiling": 0.99, "shuffled": 0.01}

    def evaluate(model: object, **options: int) -> dict:
        calls.append(options)
        return {"faithfulness": shares, **options}

    monkeypatch.setitem(sys.modules, "ldm_edu.evaluation.faithfulness", SimpleNamespace(faithfulness=evaluate))
    return calls


def test_evaluate_a_text_model(models: SimpleNamespace, faithful: list[dict]):
    result = run("evaluate", models.text, "--json")
    report = json.loads(result.stdout)
    assert list(report["faithfulness"]) == ["one", "two", "no_colours", "held_out", "ceiling", "shuffled"]
    assert (
        report["captions"] == 512
        and "seed" in report
        and faithful == [{"captions": 512, "seed": report["seed"]}]
    )
    words = run("evaluate", models.text, "--captions", 8).stdout
    assert "held_out" in words and "97.0%" in words and "8 captions" in words and "no_colours none asked" in words


def test_evaluate_a_first_stage(models: SimpleNamespace, here: Path):
    photo(here / "set" / "photo.png")
    result = run("evaluate", models.first, "--data", "set", "--json")
    assert json.loads(result.stdout) == json.loads(reconstruct(models, "set", "--json").stdout)


def test_evaluate_refuses(models: SimpleNamespace, here: Path):
    refused(run("evaluate", models.first), "--data")
    refused(run("evaluate", models.first, "--data", "nowhere"), "nowhere")
    refused(run("evaluate", models.text, "--data", "."), "leave out --data")
    for name in ("shapes", "attention", "samplers"):
        refused(run("evaluate", name, "--data", "."), name, "leave out --data")
    refused(run("evaluate", models.text, "--captions", 0), "--captions")
    refused(run("evaluate", "nowhere"), "no checkpoint 'nowhere'")
