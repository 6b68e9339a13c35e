"""Resuming: bit for bit as if the run had never stopped, however and whenever it was stopped."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch
from short_run import SHORT, assert_same
from torch import Tensor, nn

from ldm_edu import checkpoint, training
from ldm_edu.autoencoder import AutoencoderKL, FirstStageObjective
from ldm_edu.conditioning import TextConditioner
from ldm_edu.diffusion import Schedule
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError
from ldm_edu.training import fit, recipes
from ldm_edu.training.diffusion import DiffusionObjective, DiffusionSettings, encode_all, train_diffusion
from ldm_edu.training.recipes import shapes_kl_f4, shapes_text, spaces
from ldm_edu.training.state import load_state, save_state
from ldm_edu.unet import UNet

HERE = Path(__file__).parent
TINY = "steps=5 batch_size=2 warmup=2 log_every=1 save_every=1"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit is promised there."""
    monkeypatch.setenv("LDM_EDU_DEVICE", "cpu")


class Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[int, dict[str, float]], None]:
    """Breaks a run off at this step, before its state is saved."""

    def on_step(done: int, readings: dict[str, float]) -> None:
        if done == step:
            raise Stopped

    return on_step


@pytest.mark.parametrize("what", ["first stage", "diffusion"])
def test_a_resumed_run_equals_one_that_never_stopped(what: str, tmp_path: Path):
    def objective() -> nn.Module:
        if what == "first stage":
            return FirstStageObjective(tiny.first_stage(), regulariser_weight=1e-3)
        return DiffusionObjective(tiny.latent_diffusion(), condition_dropout=0.3)

    tokens = tiny.conditioner().tokenize(["a red star", "a blue circle above a star"])

    def get_batch(generator: torch.Generator) -> object:
        if what == "first stage":
            return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
        return torch.randn(2, 2, 4, 4, generator=generator), tokens

    whole, broken = objective(), objective()
    whole_history = fit(whole, get_batch, SHORT, tmp_path / "whole")
    with pytest.raises(Stopped):  # at step 4, so the newest state is step 2's
        fit(broken, get_batch, SHORT, tmp_path / "broken", on_step=stop_at(4))
    assert [p.name for p in (tmp_path / "broken").glob("step-*")] == ["step-0000002"]
    resumed = objective()
    history = fit(resumed, get_batch, SHORT, tmp_path / "broken", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert history.rows == whole_history.rows and len(history.rows) == 6
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    again = objective()  # and of a finished run there is nothing to do
    fit(again, get_batch, SHORT, tmp_path / "broken", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values()))


@pytest.fixture
def small_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes with small networks; committed is a small first stage."""
    home = tmp_path / "committed"
    home.mkdir()
    monkeypatch.setattr(checkpoint, "HOME", home)
    monkeypatch.setattr(shapes_kl_f4, "MODEL", tiny.AUTOENCODER)
    monkeypatch.setattr(shapes_text, "MODEL", replace(tiny.UNET, context_channels=128))
    tiny.first_stage().save(home / "shapes-kl-f4", "a card")


@pytest.mark.parametrize("recipe, more", [("shapes-kl-f4", "size=32"), ("shapes-text", "pictures=12")])
def test_a_recipe_resumes_and_makes_its_checkpoint(recipe: str, more: str, tmp_path: Path, small_recipes: None):
    changes = dict(pair.split("=") for pair in f"{TINY} {more}".split())
    arguments = dict(settings=changes, size="cpu")
    whole = training.train(recipe, tmp_path / "whole", **arguments)
    with pytest.raises(Stopped):
        training.train(recipe, tmp_path / "broken", on_step=stop_at(4), **arguments)
    assert not (tmp_path / "broken/checkpoint").exists()
    training.train(recipe, tmp_path / "broken", resume=True, **arguments)
    assert_same(tmp_path / "whole", tmp_path / "broken")

    folder = tmp_path / "broken/checkpoint"
    back = (AutoencoderKL if recipe == "shapes-kl-f4" else LatentDiffusion).load(folder)
    for name, weight in whole.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.half().float()), name
    card = (folder / "README.md").read_text()
    for said in (f"# {recipe}", "ShapeScenes", "Licence", f"ldm-edu train {recipe}", "| steps | 5 |", "Trained in"):
        assert said in card, said
    assert (folder / "history.csv").read_text() == (tmp_path / "broken/history.csv").read_text()
    if isinstance(whole, LatentDiffusion):
        assert whole.latent_size == 16 and whole.latent_scale > 0
        assert whole.sample("a small red star", num_steps=1).shape == (1, 3, 64, 64)


def test_every_recipe_says_what_it_is():
    for name in recipes.names():
        recipe = recipes.get(name)
        assert recipe.NAME == name and re.search(r"^Data: ", recipe.ABOUT, flags=re.MULTILINE)
        assert re.search(r"^Licence of the weights: \w", recipe.ABOUT, flags=re.MULTILINE)
        assert set(recipe.SETTINGS) == {"cpu", "gpu"}
        if name in spaces.RECIPES:  # of these only the measurements are kept
            continue
        card = (checkpoint.find(name) / "README.md").read_text(encoding="utf-8")
        assert recipe.ABOUT in card, f"the card of the {name} that is here says something else than its recipe"


def test_old_latents_are_not_taken_for_new_ones(tmp_path: Path):
    cache, pictures = tmp_path / "latents.safetensors", torch.rand(20, 3, 16, 16) * 2 - 1
    calls = []

    def get_images(index: Tensor) -> Tensor:
        calls.append(len(index))
        return pictures[index]

    model, other = tiny.first_stage(), tiny.first_stage(seed=1)
    mean, std = encode_all(model, get_images, 20, cache)
    assert (std > 0).all() and calls == [20]
    assert torch.equal(encode_all(model, get_images, 20, cache)[0], mean) and calls == [20, 16]

    def assert_right(model: AutoencoderKL, count: int) -> None:
        expected = model.encode(pictures[:count]).detach()
        mean = encode_all(model, get_images, count, cache)[0]
        assert mean.shape == expected.shape
        assert (mean - expected).norm() < 0.02 * expected.norm()  # one of them may be in bfloat16

    assert_right(model, 20)
    assert_right(model, 12)  # fewer than are kept
    assert_right(other, 12)  # another first stage
    pictures = pictures.flip(0)
    assert_right(other, 12)  # other pictures
    assert_right(other, 20)
    pictures = torch.cat([pictures[:19], -pictures[19:]])
    assert_right(other, 20)  # the last one alone is another


@pytest.mark.filterwarnings("ignore:No step was saved")
def test_a_new_run_takes_no_old_latents(tmp_path: Path):
    settings = DiffusionSettings(steps=1, pictures=40, batch_size=2, log_every=1, save_every=1)
    pictures = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    others = pictures.clone()
    others[[i for i in range(40) if i not in torch.linspace(0, 39, 16).long()]] = 1.0  # not those that are looked at

    def scale(pictures: Tensor, out: str | None, resume: bool = False) -> float:
        common = "it", tiny.latent_diffusion(), settings, pictures.__getitem__, ["a star"] * 40, ""
        return train_diffusion(*common, out, resume).latent_scale

    old = scale(pictures, str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    assert (tmp_path / "run.latents.safetensors").is_file()
    new = scale(others, str(tmp_path / "run"))
    assert new == scale(others, None) and abs(new - old) > 0.01
    shutil.rmtree(tmp_path / "run")  # and with --resume, where there is nothing to resume
    assert scale(pictures, str(tmp_path / "run"), resume=True) == old


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pictures": torch.zeros(40, 3, 16, 32)}, "square.*16 × 32"), ({"captions": ["a"] * 3}, "there are 3"),
        ({"captions": ["a"] * 39 + ["a dog"]}, "never saw 'dog'"), ({"prediction": "v"}, "predicts 'v', but .* 'eps'"),
        ({"pictures": torch.full((40, 3, 16, 16), 255.0)}, "reach 255.*/ 127.5 - 1"),
        ({"pictures": torch.full((40, 3, 16, 16), torch.nan)}, "reach nan"),
    ],
)  # fmt: skip
def test_what_a_diffusion_model_cannot_learn_from(changes: dict, words: str, tmp_path: Path):
    given = {"pictures": torch.zeros(40, 3, 16, 16), "captions": ["a"] * 40, "prediction": "eps"} | changes
    settings = DiffusionSettings(steps=1, pictures=40, batch_size=2, log_every=1, prediction=given["prediction"])
    asked = []

    def get_images(index: Tensor) -> Tensor:
        asked.extend(index)
        return given["pictures"][index]

    with pytest.raises(UserError, match=words):
        train_diffusion("it", tiny.latent_diffusion(), settings, get_images, given["captions"], "", tmp_path / "run")
    assert "reach" in words or (len(asked) <= 1 and not list(tmp_path.iterdir())), "before all are encoded"


def test_a_run_goes_on_with_the_model_captions_and_pictures_that_it_began_with(tmp_path: Path):
    settings = DiffusionSettings(steps=4, pictures=8, batch_size=2, log_every=1, save_every=2)
    pictures = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def run(resume: bool = True, on_step: object = None, **changes: object) -> None:
        model, shape = tiny.latent_diffusion(), tiny.UNET
        model.unet = UNet(replace(shape, heads=changes.get("heads", shape.heads)))
        model.schedule = Schedule(**changes.get("schedule", {}))
        if changes.get("words"):
            model.conditioner = TextConditioner.from_words(changes["words"], length=8, channels=16, layers=2, heads=2)
        images, captions = changes.get("pictures", pictures), changes.get("captions", ["a star"] * 8)
        train_diffusion("it", model, replace(settings, pictures=len(images)), images.__getitem__, captions, "",
                        tmp_path / "run", resume, on_step)  # fmt: skip

    with pytest.raises(Stopped):
        run(False, stop_at(3))
    for changes, words in (
        ({"schedule": {"T": 100}}, r"other settings \(schedule\)"), ({"heads": 4}, r"other settings \(unet\)"),
        ({"captions": ["a star"] * 7 + ["a red star"]}, r"other settings \(captions\)"),
        ({"words": [*tiny.WORDS[:-2], "star", "red"]}, r"other settings \(captions, conditioner\)"),
        ({"pictures": pictures.flip(0)}, "run.latents.safetensors are of other pictures"),
        ({"pictures": pictures.repeat(2, 1, 1, 1), "captions": ["a star"] * 16}, "are of 8 pictures, not 16"),
    ):
        with pytest.raises(UserError, match=words):
            run(**changes)
    (state,) = (tmp_path / "run").glob("step-*/state.json")
    whole = json.loads(state.read_text())
    old = whole | {"settings": {k: v for k, v in whole["settings"].items() if k != "captions"}}
    state.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"other settings \(captions: not recorded\)"):
        run()
    state.write_text(json.dumps(whole))
    latents = tmp_path / "run.latents.safetensors"
    kept = latents.read_bytes()
    latents.write_bytes(kept[:100])
    with pytest.raises(UserError, match="run.latents.safetensors is damaged .*Remove it"):
        run()
    latents.write_bytes(kept)
    run()
    card = (tmp_path / "run/checkpoint/README.md").read_text()
    assert "# it" in card and "Command" not in card, "no recipe is called so"


# killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What kill_and_resume.py found."""
    if not hasattr(os, "fork"):
        pytest.skip("kills forked processes; this system has no fork")
    command = [sys.executable, str(HERE / "kill_and_resume.py"), str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LDM_EDU_DEVICE": "cpu"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_killed_at_any_change_of_a_file_a_run_ends_as_if_it_never_was(killed: dict):
    assert killed["every_moment"]["moments"] >= 25 and killed["every_moment"]["wrong"] == []


def test_killed_ten_times_by_the_clock_too(killed: dict):
    assert killed["random"]["kills"] == 10 and killed["random"]["wrong"] == []
    assert killed["random"]["inside_saving"] >= 1
    state = {f"step-0000060/{name}" for name in ("state.json", "state.safetensors")}
    assert set(killed["random"]["expected"]) == {"history.csv", "final.safetensors"} | state


def test_the_same_kills_catch_saving_that_is_not_atomic(killed: dict):
    assert killed["in_place"]["moments"] >= 20 and killed["in_place"]["wrong"]


def test_the_optimisers_tensors_come_back_laid_out_like_their_weights(tmp_path: Path):
    """On a GPU weights are channels_last, and a fused step refuses moments that are laid out otherwise."""

    def one() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny.first_stage().to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = one()
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    save_state(tmp_path, 1, model, [], optimizer, {"settings": asdict(SHORT)})
    again, other = one()
    load_state(tmp_path, again, [], other, SHORT)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            mine, theirs = optimizer.state[p][name], other.state[q][name]
            assert torch.equal(mine, theirs) and mine.stride() == theirs.stride() == q.stride()
    assert any(p.ndim == 4 and not p.is_contiguous() for p in again.parameters())  # or this proves nothing
