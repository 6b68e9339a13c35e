"""Health readings: the bands are what the committed runs did; and VQ that begins to quantise later."""

import csv

import pytest
import torch

from ldm_edu import checkpoint
from ldm_edu.autoencoder import AutoencoderVQ, FirstStage, VQConfig
from ldm_edu.training import health


def history(name: str) -> list[dict[str, str]]:
    with open(checkpoint.HOME / name / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", checkpoint.names("sweep-"))
def test_every_committed_run_is_healthy_by_its_own_bands(name: str):
    model, rows = FirstStage.load(name), history(name)
    for row in rows[:: max(len(rows) // 5, 1)]:
        step = int(row["step"])
        readings = {key: float(value) for key, value in row.items() if key != "step"}
        found = health.check(model, readings, step / int(rows[-1]["step"]))
        early = {"usage", "perplexity"} if readings.get("codebook") == 0 else set()
        assert {r.name for r in found} == set(readings) & set(health.MEANINGS) - early
        assert all(r.healthy for r in found), "\n".join(map(str, found))


def test_a_sick_run_is_told():
    model, last = FirstStage.load("sweep-vq-f4"), history("sweep-vq-f4")[-1]
    readings = {key: float(value) for key, value in last.items()}
    sick = health.check(model, readings | {"usage": 0.05, "perplexity": 3.0, "latent_std_max": 900.0}, 1.0)
    told = {r.name: str(r).rsplit("<- ", 1)[-1] for r in sick if not r.healthy}
    assert told == {"usage": "low", "perplexity": "low", "latent_std_max": "high"}


@pytest.mark.parametrize("fraction", [0.36, 0.5, 1.0])
def test_a_collapsed_codebook_is_told_as_soon_as_there_is_one(fraction: float):
    model, readings = FirstStage.load("sweep-vq-f4"), {"codebook": 0.1, "usage": 0.02, "perplexity": 12.0}
    told = {r.name: str(r).rsplit("<- ", 1)[-1] for r in health.check(model, readings, fraction)}
    assert told == {"usage": "low", "perplexity": "low"}
    before = {"codebook": 0.0, "usage": float("nan"), "perplexity": float("nan")}
    assert health.check(model, before, 0.2) == []
    assert [r.name for r in health.check(model, {"usage": 0.9}, 0.5)] == ["usage"]


def test_readings_of_another_loss_have_no_band():
    assert health.check(FirstStage.load("sweep-vq-f8"), {"lambda": 1.0, "loss": 1.0}, 0.5) == []


def test_vq_can_begin_to_quantise_later_with_codes_where_latents_are():
    torch.manual_seed(0)
    config = VQConfig(latent_channels=2, channels=4, channel_multipliers=(1, 2), blocks=1, groups=2, codebook_size=32)
    model, generator = AutoencoderVQ(config), torch.Generator().manual_seed(0)
    model.quantizer.start, model.quantizer.restart_after = 4, 2
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for step in range(6):
        given, loss, readings = model.regularised(images, generator)
        plain = torch.equal(given, model.encode(images))
        assert plain == (step < 4) and (loss == 0) == (step < 4)
        assert step < 4 or readings["perplexity"] >= 1
    # Every code was moved onto a latent before the first quantising step, so the nearest is the latent itself, or near.
    latents = model.encode(images).permute(0, 2, 3, 1).flatten(0, 2)
    distances = (model.quantizer.codebook.weight[:, None] - latents).norm(dim=2)
    assert distances.amin(dim=1).max() < 1e-5
