"""First stages as a whole: kinds and checkpoints, what training is made of, the recipes of the sweep."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from ldm_edu import checkpoint
from ldm_edu.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderVQ,
    FirstStage,
    Identity,
    PerceptualLoss,
    VQConfig,
)
from ldm_edu.autoencoder.strips import fits_whole
from ldm_edu.layers import AttentionBlock, ResidualBlock
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError
from ldm_edu.training import first_stage as module
from ldm_edu.training import photographs, recipes
from ldm_edu.training.diffusion import encode_all
from ldm_edu.training.first_stage import FirstStageSettings, new_first_stage, objective_of, train_first_stage
from ldm_edu.training.recipes import sweep
from ldm_edu.unet import UNet

VQ = VQConfig(latent_channels=2, channels=8, channel_multipliers=(1, 1, 2), blocks=1, groups=4, codebook_size=16)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and without waiting for a busy disk."""
    monkeypatch.setenv("LDM_EDU_DEVICE", "cpu")
    monkeypatch.setattr(os, "fsync", lambda file: None)


def vq() -> AutoencoderVQ:
    torch.manual_seed(0)
    model = tiny.stirred(AutoencoderVQ(VQ)).eval()
    with torch.no_grad():
        model.quantizer.codebook.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def pictures(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


KINDS = {"autoencoder-kl": tiny.first_stage, "autoencoder-vq": vq, "identity": Identity}
kinds = pytest.mark.parametrize("kind", KINDS)


# kinds and checkpoints


def test_the_identity_is_a_first_stage_with_f_1():
    model, images = Identity(), pictures()
    assert model.f == 1 and model.config.latent_channels == 3 and not list(model.parameters())
    assert torch.equal(model.encode(images), images) and torch.equal(model.decode(images), images)
    torch.testing.assert_close(model.posterior(images).sample(), images, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="3, 16, 16"):
        model.encode(images[0])
    for channels, multipliers in ((3, (1, 2)), (4, (1,))):
        with pytest.raises(UserError, match="f = 1.*this config has f = [12]"):
            Identity(AutoencoderConfig(latent_channels=channels, channel_multipliers=multipliers))


@kinds
def test_a_checkpoint_comes_back_as_what_it_is(kind: str, tmp_path: Path):
    model = KINDS[kind]()
    model.save(tmp_path / "model", "a card")
    for back in (FirstStage.load(tmp_path / "model"), type(model).load(tmp_path / "model")):
        assert type(back) is type(model) and back.kind == kind and back.config == model.config and not back.training
        assert back.state_dict().keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], weight.half().float()), name
    halved = KINDS[kind]()
    halved.load_state_dict({n: t.half().float() for n, t in model.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(back.decode(back.encode(pictures())), halved.decode(halved.encode(pictures())))


@kinds
def test_no_kind_is_taken_for_another(kind: str, tmp_path: Path):
    KINDS[kind]().save(tmp_path / "model", "a card")
    for other in {AutoencoderKL, AutoencoderVQ, Identity} - {type(KINDS[kind]())}:
        with pytest.raises(UserError, match=f"is a '{kind}'; a '{other.kind}' was asked for"):
            other.load(tmp_path / "model")
        with pytest.raises(UserError, match=f"'{kind}'; asked for was {other.kind}"):
            other.from_description(KINDS[kind]().description(), tmp_path)


def test_what_is_no_first_stage_is_named():
    for name, kind in (("shapes-text", "latent-diffusion"), ("perceptual", "perceptual")):
        with pytest.raises(UserError, match=f"^The checkpoint .* is a '{kind}'; asked for was (.* or ){{2}}"):
            FirstStage.load(name)
    with pytest.raises(UserError, match="no checkpoint 'nothing'"):
        FirstStage.load("nothing")


@kinds
@pytest.mark.parametrize("embedded", [True, False])
def test_a_diffusion_model_on_any_first_stage_comes_back(
    kind: str, embedded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint, "HOME", tmp_path)
    stage = KINDS[kind]()
    if kind != "identity":
        stage.save(tmp_path / "stage", "a card")
    c = stage.config.latent_channels
    unet = tiny.stirred(UNet(replace(tiny.UNET, in_channels=c, out_channels=c)))
    small = tiny.latent_diffusion()
    model = LatentDiffusion(stage, unet, small.conditioner, small.schedule, 0.7, "eps", 16 // stage.f).eval()
    model.save(tmp_path / "whole", "a card", embed_first_stage=embedded)
    back = LatentDiffusion.load(tmp_path / "whole", device="cpu")
    assert type(back.first_stage) is type(stage) and back.latent_shape == (c, 16 // stage.f, 16 // stage.f)
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.half().float()), name
    again = LatentDiffusion.load(tmp_path / "whole", device="cpu")
    image = back.sample("a red star", num_steps=3)
    assert image.shape == (1, 3, 16, 16) and torch.equal(image, again.sample("a red star", num_steps=3))
    restored = back.to_image(back.to_latent(pictures()))
    expected = back.first_stage.decode(back.first_stage.encode(pictures())).detach().clamp(-1, 1)
    assert (restored - expected).abs().mean() < 1e-3  # a code may flip at a near-tie


@kinds
def test_latents_of_any_kind_are_encoded_for_training(kind: str):
    model, images = KINDS[kind](), pictures(5)
    mean, std = encode_all(model, lambda index: images[index], 5, None)
    torch.testing.assert_close(mean.float(), model.encode(images).detach(), atol=0.02, rtol=0.02)
    assert std.shape == mean.shape and (std.max() < 1e-3) == (kind != "autoencoder-kl")


# what training is made of


def test_grey_pictures_have_a_grey_discriminator():
    grey = AutoencoderKL(replace(tiny.AUTOENCODER, image_channels=1))
    objective = objective_of(grey, FirstStageSettings(disc_weight=0.5, disc_channels=4))
    loss, readings = objective(pictures(2)[:, :1], torch.Generator().manual_seed(0))
    assert loss.isfinite() and readings["lambda"] > 0
    with pytest.raises(UserError, match="3 channels; with 1"):
        objective_of(grey, FirstStageSettings(perceptual="ours"))


@pytest.mark.parametrize("config", [tiny.AUTOENCODER, VQ], ids=["kl", "vq"])
def test_a_new_first_stage_begins_with_its_shortcuts(config: AutoencoderConfig):
    model, x = new_first_stage(config), torch.randn(1, 16, 4, 4)
    assert type(model) is (AutoencoderVQ if config is VQ else AutoencoderKL)
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock | AttentionBlock)]
    assert len(blocks) > 10
    same = [b for b in blocks if isinstance(b, AttentionBlock) or isinstance(b.shortcut, torch.nn.Identity)]
    for block in same:
        channels = block.norm.num_channels if isinstance(block, AttentionBlock) else block.norm1.num_channels
        assert torch.equal(block(x[:, :channels]), x[:, :channels])
    if config is not VQ:
        assert (model.posterior(pictures()).logvar < -4).all()


@pytest.mark.parametrize("f", [1, 2, 4])
@pytest.mark.parametrize("middle_attention", [True, False])
def test_any_f_and_optional_attention(f: int, middle_attention: bool):
    shape = dict(channel_multipliers=(1, 1, 2)[: f.bit_length()], middle_attention=middle_attention)
    for config in (replace(tiny.AUTOENCODER, attention_levels=(), **shape), replace(VQ, **shape)):
        model = new_first_stage(config)
        assert model.f == f and model.encode(pictures()).shape == (2, 2, 16 // f, 16 // f)
        assert model.decode(model.encode(pictures())).shape == (2, 3, 16, 16)
        assert bool([m for m in model.modules() if isinstance(m, AttentionBlock)]) == middle_attention


def test_a_training_can_begin_with_another_model(tmp_path: Path):
    old, config = tiny.first_stage(), tiny.first_stage().config
    old.save(tmp_path / "old", "a card")
    settings = FirstStageSettings(steps=1, batch_size=2, size=16, start=str(tmp_path / "old"), learning_rate=1e-9)

    def train(settings: FirstStageSettings, shape: AutoencoderConfig = config) -> FirstStage:
        return train_first_stage("new", shape, settings, lambda count, generator: pictures(), "data", None)

    def near(model: FirstStage) -> bool:
        return all(torch.allclose(t, old.state_dict()[n], atol=1e-2) for n, t in model.state_dict().items())

    assert near(train(settings)) and not near(train(replace(settings, start="")))
    with pytest.raises(UserError, match="old has another shape than new.*channels=8"):
        train(settings, replace(config, latent_channels=config.latent_channels + 1))


def test_the_settings_make_the_objective(monkeypatch: pytest.MonkeyPatch):
    settings = FirstStageSettings(
        kl_weight=0.01, codebook_weight=0.02, restart_after=7, vq_start=5, l2_weight=3.0, perceptual="ours",
        perceptual_weight=0.5, disc_weight=0.25, disc_start=9, disc_warmup=4, disc_channels=4, disc_layers=1,
    )  # fmt: skip
    model, plain = vq(), tiny.first_stage()
    full, kl = objective_of(model, settings), objective_of(plain, settings)
    assert (full.regulariser_weight, kl.regulariser_weight) == (0.02, 0.01)
    assert (model.quantizer.restart_after, model.quantizer.start) == (7, 5)
    assert (full.l2_weight, full.perceptual_weight, full.disc_weight) == (3.0, 0.5, 0.25)
    assert (full.disc_start, full.disc_warmup) == (9, 4)
    assert full.discriminator.layers == 1 and full.discriminator.network[0].out_channels == 4
    assert isinstance(full.perceptual, PerceptualLoss) and full.model is model
    monkeypatch.setattr(module, "lpips_vgg", lambda: torch.nn.Flatten())
    assert isinstance(objective_of(plain, replace(settings, perceptual="lpips-vgg")).perceptual, torch.nn.Flatten)
    for nothing in ({"perceptual": "none"}, {"perceptual_weight": 0.0}):
        assert objective_of(plain, replace(settings, **nothing)).perceptual is None
    assert objective_of(plain, replace(settings, disc_weight=0.0)).discriminator is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"perceptual": "nonsense"}, "none, ours or lpips-vgg, not 'nonsense'"), ({"disc_weight": -0.5}, "-0.5"),
        ({"disc_start": -1}, "disc_start.*at least 0.*-1"), ({"restart_after": -3}, "restart_after.*-3"),
        ({"disc_layers": 0}, "disc_layers.*at least 1"), ({"codebook_weight": float("nan")}, "codebook_weight.*nan"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(changes: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        FirstStageSettings(**changes)


def test_a_picture_that_fits_is_decoded_whole():
    model = tiny.first_stage()
    assert fits_whole(model.decoder, torch.empty(1, 2, 16, 16))
    assert not fits_whole(model.decoder, torch.empty(1, 2, 16, 16).expand(100_000, -1, -1, -1))


# the sweep


def test_the_sweep_s_names():
    expected = {f"sweep-{kind}-f{f}" for kind in ("kl", "vq") for f in (2, 4, 8, 16)}
    expected |= {f"sweep-kl-f4-{what}" for what in ("l1", "more", "gan", "w1e-3", "w1e-1")}
    assert expected == set(sweep.RECIPES) <= set(recipes.names())
    assert recipes.get("sweep-vq-f8") is sweep.RECIPES["sweep-vq-f8"]


@pytest.mark.parametrize("name", sweep.RECIPES)
def test_a_model_of_the_sweep(name: str):
    config = sweep.RECIPES[name].config
    f = int(name.split("-")[2][1:])
    assert config.f == f and isinstance(config, VQConfig) == ("vq" in name)
    if isinstance(config, VQConfig):
        assert config.codebook_size >= 1024
    model = new_first_stage(config)
    assert 2 * sum(p.numel() for p in model.parameters()) < 2**20
    latent = model.encode(torch.zeros(1, 3, 32, 32))
    assert latent.shape == (1, config.latent_channels, 32 // f, 32 // f)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_recipes_of_the_sweep_are_alike_but_for_one_thing(size: str):
    plain, more = (sweep.RECIPES[name].SETTINGS[size] for name in ("sweep-kl-f4", "sweep-kl-f4-more"))
    assert plain.perceptual == "ours" and plain.disc_weight == 0 and not plain.start
    assert 0 < plain.vq_start == plain.steps // 3
    assert more.start == "sweep-kl-f4" and 0 < more.disc_warmup == more.disc_start == more.steps // 3
    changes = {
        "-l1": (plain, {"perceptual": "none"}), "-more": (more, {}), "-gan": (more, {"disc_weight": 0.3}),
        "-w1e-3": (plain, {"kl_weight": 1e-3}), "-w1e-1": (plain, {"kl_weight": 1e-1}), "": (plain, {}),
    }  # fmt: skip
    for name, recipe in sweep.RECIPES.items():
        like, change = changes[re.sub(r"sweep-(kl|vq)-f\d+", "", name)]
        assert recipe.SETTINGS[size] == replace(like, **change), name


@pytest.mark.parametrize("name", ["sweep-kl-f4-gan", "sweep-vq-f8"])
def test_a_recipe_of_the_sweep_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = torch.randint(256, (6, 3, 40, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    monkeypatch.setattr(photographs, "photographs", lambda: (drawn, torch.zeros(6)))
    settings = replace(
        sweep.RECIPES[name].SETTINGS["cpu"], steps=2, batch_size=1, size=32, log_every=1, save_every=2,
        disc_start=1, vq_start=1,
    )  # fmt: skip
    model = sweep.RECIPES[name].train(settings, tmp_path / "run")
    back = FirstStage.load(tmp_path / "run/checkpoint")
    assert type(back) is type(model) and back.config == sweep.RECIPES[name].config and not model.training
    card = (tmp_path / "run/checkpoint/README.md").read_text()
    said = ("KL, f = 4", "| lambda |") if "kl" in name else ("VQ, f = 8", "| perplexity |")
    assert all(word in card for word in (f"# {name}", "Caltech-101", "Licence of the weights: MIT", *said))
