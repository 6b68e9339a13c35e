"""Without a network everything committed works: sockets are blocked, and each checkpoint does what it is for."""

import re
import socket

import pytest
import torch
import torch.nn.functional as F

from ldm_edu import checkpoint
from ldm_edu.autoencoder import AutoencoderKL, AutoencoderVQ, FirstStage, PerceptualLoss, PerceptualNetwork
from ldm_edu.datasets import ShapeScenes, agrees, photographs, read_scenes
from ldm_edu.evaluation import reconstruct
from ldm_edu.evaluation.reconstruction import score
from ldm_edu.pipeline import LatentDiffusion

PROMPT = "a small red star above a large blue circle"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something asked for the network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # nothing may even try


def kind_of(name: str) -> str:
    return checkpoint.read(checkpoint.find(name))[0]["kind"]


def test_the_block_blocks_and_something_is_committed():
    with pytest.raises(AssertionError, match="network"):
        socket.socket()
    assert {"shapes-kl-f4", "shapes-text", "photos-kl-f4"} <= set(checkpoint.names())


@pytest.mark.parametrize("name", checkpoint.names())
def test_every_committed_checkpoint_does_what_it_is_for(name: str):
    folder = checkpoint.find(name)
    assert {p.name for p in folder.iterdir()} == set(checkpoint.FILES)
    card = (folder / "README.md").read_text()
    assert card.startswith(f"# {name}") and "Trained in" in card and re.search("Licence|CC BY", card)
    if kind_of(name) == PerceptualNetwork.kind:
        distance, cup = PerceptualLoss(PerceptualNetwork.load(name)), photographs(128)["coffee"][None]
        shifted, small = cup.roll(1, dims=3), F.avg_pool2d(cup, 4)
        near, far = (distance(other, cup).item() for other in (shifted, F.interpolate(small, scale_factor=4.0)))
        assert distance(cup, cup).item() == 0 < near < far < 2
    elif kind_of(name) in (AutoencoderKL.kind, AutoencoderVQ.kind):
        first_stage = FirstStage.load(name)
        image = photographs(128)["coffee"]
        scored = score(reconstruct(first_stage, image), image, first_stage.f)
        assert scored.psnr > (scored.bicubic_psnr if name.startswith("photos") else 15)
    else:
        model = LatentDiffusion.load(name, device="cpu")
        images = model.sample([PROMPT], num_steps=2)
        side = model.latent_size * model.first_stage.f
        assert images.shape == (1, 3, side, side) and images.isfinite().all() and images.std() > 0.05


def test_scenes_survive_the_first_stage_made_for_them():
    """The ceiling of caption faithfulness: what the first stage spoils, no sample can show."""
    first_stage, scenes = AutoencoderKL.load("shapes-kl-f4"), ShapeScenes(64, count=60, seed=2)
    drawn = scenes.scenes(range(60))
    with torch.no_grad():
        restored = reconstruct(first_stage, scenes.images(range(60)))
    readings = read_scenes(restored)
    assert sum(agrees(reading, drawn.things(i)) for i, reading in enumerate(readings)) >= 0.93 * 60


def test_a_picture_shows_what_its_caption_says():
    model = LatentDiffusion.load("shapes-text", device="cpu")
    scenes = ShapeScenes(64, count=6, seed=2, objects=(1, 1))
    drawn = scenes.scenes(range(6))
    images = model.sample(scenes.captions(range(6), full=True), num_steps=10)
    assert sum(agrees(reading, drawn.things(i)) for i, reading in enumerate(read_scenes(images))) >= 4
