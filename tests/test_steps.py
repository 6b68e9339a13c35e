"""`ldm-edu evaluate samplers`: what is counted, with which captions and noise, and how it is printed."""

import json
from types import SimpleNamespace

import pytest
import torch
from commands import refused, run
from torch import Tensor

from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.diffusion import SPACINGS
from ldm_edu.evaluation import steps
from ldm_edu.evaluation.steps import SETTINGS, Setting, measure_samplers, table
from ldm_edu.pipeline import SAMPLERS, LatentDiffusion
from ldm_edu.runtime import REPOSITORY, UserError


class Painter:
    """Stands in for a model: DDIM paints what was asked for, any other sampler paints each caption's neighbour."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def sample(self, prompts: list[str], **options: object) -> Tensor:
        self.calls.append({"prompts": prompts} | options)
        scenes = ShapeScenes(64, count=8, seed=options["seeds"][0] // 1_000_000, objects=(2, 2))
        captions = scenes.captions(range(8), full=True)
        shift = options["sampler"] != "ddim"
        return scenes.images([(captions.index(prompt) + shift) % 8 for prompt in prompts])


def test_shares_are_of_each_setting_and_seed():
    painter, settings = Painter(), (Setting("ddim", 5), Setting("plms", 8, "uniform"))
    measured = measure_samplers(painter, 6, (1, 2), settings, guidance_scale=2.0, batch_size=4)
    assert measured["rows"] == [
        {"sampler": "ddim", "num_steps": 5, "spacing": "trailing", "eta": 0.0, "faithful": [1.0, 1.0]},
        {"sampler": "plms", "num_steps": 8, "spacing": "uniform", "eta": 0.0, "faithful": [0.0, 0.0]},
    ]
    assert measured["captions"] == 6 and measured["seeds"] == [1, 2] and measured["guidance_scale"] == 2
    assert measured["minutes"] >= 0 and "thread" in measured["hardware"] or "GPU" in measured["hardware"]
    json.dumps(measured, allow_nan=False)
    first, rest, plms, *_ = painter.calls
    assert (first["num_steps"], first["eta"], first["guidance_scale"]) == (5, 0.0, 2.0)
    assert (plms["sampler"], plms["spacing"], plms["num_steps"]) == ("plms", "uniform", 8)
    assert (len(first["prompts"]), len(rest["prompts"])) == (4, 2)
    # Every setting gets the same captions and noise, no two pictures the same noise, in any seed.
    used = [(call["prompts"], call["seeds"]) for call in painter.calls]
    assert used[:2] == used[2:4] and used[4:6] == used[6:]
    noises = [seed for _, seeds in used[:2] + used[4:6] for seed in seeds]
    assert len(set(noises)) == 12


def test_noise_of_a_large_seed_is_noise_that_torch_can_draw():
    class Blank(Painter):
        def sample(self, prompts: list[str], **options: object) -> Tensor:
            self.calls.append(options)
            return torch.zeros(len(prompts), 3, 64, 64)

    painter = Blank()
    measure_samplers(painter, 3, (1, 5000, 2**32 - 1), (Setting("ddim", 5),))
    seeds = [seed for call in painter.calls for seed in call["seeds"]]
    assert len(set(seeds)) == 9 and min(seeds) == 1_000_000 and max(seeds) < 2**32


def test_refused():
    for arguments in (dict(captions=0), dict(seeds=(0, 1))):
        with pytest.raises(UserError, match="caption|Seed 0"):
            measure_samplers(Painter(), settings=(), **arguments)
    refused(run("evaluate", "samplers", "--captions", 0), "--captions")


def test_the_command(monkeypatch: pytest.MonkeyPatch):
    asked = []
    measured = measure_samplers(Painter(), 2, (1, 2), (Setting("ddim", 5, eta=0.5),))
    monkeypatch.setattr(steps, "evaluate", lambda *arguments: asked.append(arguments) or measured)
    assert json.loads(run("evaluate", "samplers", "--captions", 2, "--json").stdout) == measured
    assert asked == [("shapes-text", 2, 1)]
    words = run("evaluate", "samplers", "--captions", 2, "--seed", 7).stdout
    assert asked[1] == ("shapes-text", 2, 7)
    assert words == table(measured) + "\n" and "ddim" in words and "100.0% ± 0.0%" in words


def test_a_checkpoint_is_measured_from_three_seeds(monkeypatch: pytest.MonkeyPatch):
    painter = Painter()
    monkeypatch.setattr(LatentDiffusion, "load", lambda name: painter)
    monkeypatch.setattr(steps.measure_samplers, "__defaults__", (64, (1, 2, 3), (Setting("ddim", 5),), 3.0, 64))
    assert steps.evaluate("any", 2, 4)["seeds"] == [4, 5, 6]
    assert [call["seeds"] for call in painter.calls] == [[s * 1_000_000, s * 1_000_000 + 1] for s in (4, 5, 6)]


def test_every_setting_can_be_sampled():
    assert {setting.sampler for setting in SETTINGS} == set(SAMPLERS) and len(set(SETTINGS)) == len(SETTINGS)
    assert {setting.spacing for setting in SETTINGS} == set(SPACINGS)


def test_the_committed_numbers_are_of_these_settings():
    measured = json.loads((REPOSITORY / "data/samplers.json").read_text(encoding="utf-8"))
    assert [Setting(*(row[name] for name in Setting._fields)) for row in measured["rows"]] == list(SETTINGS)
    assert all(len(row["faithful"]) == len(measured["seeds"]) >= 3 for row in measured["rows"])


def test_a_model_samples_on_the_spacing_asked_for(models: SimpleNamespace):
    model = LatentDiffusion.load(models.text, device="cpu")
    for spacing, first in (("trailing", 999), ("uniform", 751), ("quadratic", 801)):
        assert next(model.steps("a red circle", num_steps=4, spacing=spacing)).t == first
    with pytest.raises(UserError, match="no spacing 'even'"):
        model.steps("a red circle", num_steps=4, spacing="even")


pytest_plugins = ["commands"]
