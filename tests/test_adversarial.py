"""The patch discriminator, the adaptive weight, and the objective in which two networks share a backward pass."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ldm_edu.autoencoder import (
    AutoencoderVQ,
    FirstStageObjective,
    PatchDiscriminator,
    PerceptualConfig,
    PerceptualLoss,
    PerceptualNetwork,
    VQConfig,
    adaptive_weight,
    hinge_loss,
)
from ldm_edu.training import Settings, fit

SHORT = Settings(
    steps=6, batch_size=2, learning_rate=0.01, warmup=2, log_every=1, save_every=2, precision="no", ema_decay=0.5
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_EDU_DEVICE", "cpu")


def pictures(generator: torch.Generator | None = None) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=generator or torch.Generator().manual_seed(3)) * 2 - 1


def gan(vq: bool = False, perceptual: bool = False, vq_start: int = 0, **arguments: object) -> FirstStageObjective:
    """A small first stage with a discriminator that says something."""
    torch.manual_seed(0)
    model = tiny.first_stage()
    if vq:
        model = tiny.stirred(AutoencoderVQ(VQConfig(
            latent_channels=2, channels=8, channel_multipliers=(1, 1, 2), blocks=1, groups=4, codebook_size=16
        )))  # fmt: skip
        model.quantizer.restart_after, model.quantizer.start = 3, vq_start
    network = tiny.stirred(PerceptualNetwork(PerceptualConfig(widths=(4, 8)))) if perceptual else None
    discriminator = tiny.stirred(PatchDiscriminator(4, layers=1))
    return FirstStageObjective(
        model,
        **{
            "regulariser_weight": 1e-3,
            "perceptual": PerceptualLoss(network) if network else None,
            "discriminator": discriminator,
        }
        | arguments,
    ).train()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}


def backward(objective: FirstStageObjective) -> tuple[Tensor, dict[str, Tensor]]:
    loss, readings = objective(pictures(), torch.Generator().manual_seed(1))
    loss.backward()
    return loss.detach(), readings


# the discriminator


@pytest.mark.parametrize("layers, field", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_receptive_field(layers: int, field: int):
    torch.manual_seed(0)
    network = PatchDiscriminator(2, layers).eval()
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = network(images)
    side = 160 // 2**layers - 2
    assert logits.shape == (1, 1, side, side) and network.receptive_field == field
    logits[0, 0, side // 2, side // 2].backward()
    seen = images.grad[0].abs().sum(0)
    for along in (0, 1):
        places = seen.sum(along).nonzero()
        assert places.max() - places.min() + 1 == field


def test_the_paper_s_discriminator():
    torch.manual_seed(0)
    network = PatchDiscriminator()
    assert sum(p.numel() for p in network.parameters()) == 2_765_633  # pix2pix's, with batch norm
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    for layer in network.network:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            followed = layer not in (network.network[0], network.network[-1])
            assert (layer.bias is None) == followed  # a batch norm follows, with a bias of its own
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)


# the hinge


@pytest.mark.parametrize(
    "real, fake, loss", [(0, 0, 1), (1, -1, 0), (5, -5, 0), (0.5, -0.5, 0.5), (-1, 1, 2), (-1, -3, 1), (3, 2, 1.5)]
)
def test_the_hinge_loss_of_equal_logits(real: float, fake: float, loss: float):
    assert hinge_loss(torch.full((2, 1, 3, 3), float(real)), torch.full((1, 1, 4, 4), float(fake))).item() == loss


def test_the_hinge_stops_teaching_at_the_margin():
    real, fake = torch.tensor([0.9, 1.1], requires_grad=True), torch.tensor([-1.1, -0.9], requires_grad=True)
    hinge_loss(real, fake).backward()
    assert real.grad.tolist() == [-0.25, 0] and fake.grad.tolist() == [0, 0.25]


# the adaptive weight


def weight_of(pull: float, push: float) -> Tensor:
    """λ where the gradients at the last layer have the norms `pull` and `push`."""
    last = torch.zeros(3, 4, requires_grad=True)
    one, other = torch.zeros(3, 4), torch.zeros(3, 4)
    one[0, 0], one[2, 1], other[1, 3] = 0.6, -0.8, 1.0
    value = adaptive_weight(pull * (last * one).sum(), push * (last * other).sum(), last)
    assert last.grad is None and not value.requires_grad and value.shape == ()
    return value


@hypothesis_settings(max_examples=50, deadline=None)
@given(pull=st.floats(1e-3, 1e2), push=st.floats(1e-2, 1e2), factor=st.floats(1, 1e3))
def test_the_weight_is_inverse_to_the_adversarial_loss(pull: float, push: float, factor: float):
    assert weight_of(pull, push).item() == pytest.approx(min(pull / (push + 1e-4), 1e4), rel=1e-4)
    ratio = weight_of(pull, push) / weight_of(pull, push * factor)
    assert ratio.item() == pytest.approx((push * factor + 1e-4) / (push + 1e-4), rel=1e-4)


@pytest.mark.parametrize("pull, push, weight", [(0, 1, 0), (0, 0, 0), (0.5, 0, 5e3), (2, 0, 1e4), (1e9, 1, 1e4)])
def test_the_weight_is_finite(pull: float, push: float, weight: float):
    assert weight_of(pull, push).item() == pytest.approx(weight)


# one backward pass for both players


@pytest.mark.parametrize("vq", [False, True])
def test_each_player_learns_from_its_own_term_alone(vq: bool):
    alone, without, with_much = (
        gan(vq, **a) for a in ({"discriminator": None}, {"disc_weight": 0.0}, {"disc_weight": 1e3})
    )
    readings = [backward(o)[1] for o in (alone, without, with_much)]
    # The hinge gives nothing to the autoencoder, the adversarial term nothing to the discriminator.
    own, same, more = (gradients(o.model) for o in (alone, without, with_much))
    assert all(torch.equal(own[n], same[n]) for n in own)
    one, other = gradients(without.discriminator), gradients(with_much.discriminator)
    assert all(g.any() for g in one.values()) and all(torch.equal(one[n], other[n]) for n in one)
    # But the adversarial term reaches both halves of the autoencoder.
    for name in ("decoder.conv_out.weight", "encoder.conv_in.weight"):
        assert readings[2]["lambda"] > 0 and not torch.equal(own[name], more[name])
    assert "lambda" not in readings[0] and all(p.requires_grad for p in with_much.discriminator.parameters())


def test_the_discriminator_s_gradient_is_that_of_the_hinge():
    objective, images = gan(), pictures()
    backward(objective)
    found = gradients(objective.discriminator)
    fresh = gan()
    latent = fresh.model.regularised(images, torch.Generator().manual_seed(1))[0]
    restored = fresh.model.to_picture(latent).detach()
    hinge_loss(fresh.discriminator(images), fresh.discriminator(restored)).backward()
    for name, gradient in gradients(fresh.discriminator).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_both_terms_pull_on_the_decoder_equally_hard():
    plain, full = gan(discriminator=None), gan(disc_weight=1.0)
    backward(plain), backward(full)
    last = "decoder.conv_out.weight"
    pull, push = gradients(plain.model)[last], gradients(full.model)[last] - gradients(plain.model)[last]
    assert push.norm().item() == pytest.approx(pull.norm().item(), rel=0.01)
    assert cosine_similarity(pull.flatten(), push.flatten(), dim=0) < 0.99


@pytest.mark.parametrize("vq", [False, True])
def test_the_loss_is_the_sum_of_its_terms(vq: bool):
    weights = dict(regulariser_weight=0.3, l2_weight=2.0, perceptual_weight=0.7, disc_weight=0.4)
    objective = gan(vq, perceptual=True, **weights)
    loss, r = backward(objective)
    penalty = r["codebook" if vq else "kl"]
    mse = 4 / 10 ** (r["psnr"] / 10)
    restored = gan(vq).model
    restored = restored.to_picture(restored.regularised(pictures(), torch.Generator().manual_seed(1))[0]).detach()
    torch.testing.assert_close(mse, (restored.clamp(-1, 1) - pictures()).square().mean())
    torch.testing.assert_close(r["l1"], (restored - pictures()).abs().mean())
    l2 = (restored - pictures()).square().mean()
    expected = r["l1"] + 2.0 * l2 + 0.7 * r["perceptual"] + 0.3 * penalty
    expected += 0.4 * r["lambda"] * -r["logits_fake"] + r["hinge"]
    torch.testing.assert_close(loss, expected)
    assert not any(reading.requires_grad for reading in r.values())


# disc_start


def test_before_its_start_nothing_of_the_discriminator_moves():
    objective = gan(disc_start=3)
    before = {n: t.clone() for n, t in objective.discriminator.state_dict().items()}
    seen: list[dict[str, float]] = []

    def look(step: int, readings: dict[str, float]) -> None:
        seen.append(readings)
        now = objective.discriminator.state_dict()
        still = all(torch.equal(now[n], t) for n, t in before.items())
        assert still == (step <= 3), f"step {step}"

    fit(objective, pictures, SHORT, on_step=look)
    assert objective.step == 6 and [r["lambda"] > 0 for r in seen] == [False] * 3 + [True] * 3
    for readings in seen[:3]:  # 1 is the hinge loss of a discriminator that says 0 to all
        assert [readings[name] for name in ("lambda", "logits_real", "logits_fake", "hinge")] == [0, 0, 0, 1]
    assert {frozenset(r) for r in seen} == {frozenset(seen[0])}, "a history has the same columns in every row"


def test_before_its_start_the_autoencoder_trains_as_if_there_were_none():
    waiting, none = gan(disc_start=1), gan(discriminator=None)
    losses = [backward(o)[0] for o in (waiting, none)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(gradients(waiting.model).values(), gradients(none.model).values()))
    assert backward(waiting)[0] != losses[0], "the second step has the adversarial term"


def test_in_its_warm_up_the_discriminator_learns_and_has_no_say():
    warming, none = gan(disc_start=9, disc_warmup=7), gan(discriminator=None)
    before, seen = {n: t.clone() for n, t in warming.discriminator.state_dict().items()}, []
    fit(warming, pictures, replace(SHORT, gradient_clip=1e-3), on_step=lambda step, readings: seen.append(readings))
    fit(none, pictures, replace(SHORT, gradient_clip=1e-3))
    assert [r["hinge"] != 1 for r in seen] == [False] * 2 + [True] * 4 and not any(r["lambda"] for r in seen)
    assert not all(torch.equal(before[n], t) for n, t in warming.discriminator.state_dict().items())
    same = [torch.equal(t, none.model.state_dict()[n]) for n, t in warming.model.state_dict().items()]
    assert all(same), "not even by the clipping of gradients"


# resuming


class Stopped(Exception):
    pass


def stop_at_four(step: int, readings: dict[str, float]) -> None:
    if step == 4:
        raise Stopped


@pytest.mark.parametrize("disc_start, vq_start", [(1, 0), (3, 0), (1, 3)])
def test_a_resumed_gan_training_equals_one_that_never_stopped(
    disc_start: int, vq_start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a busy disk takes seconds, and no power fails here

    def build() -> FirstStageObjective:
        return gan(vq=True, perceptual=True, vq_start=vq_start, disc_start=disc_start)

    def run(folder: str, **arguments: object) -> tuple[dict[str, Tensor], str]:
        objective = build()
        fit(objective, pictures, SHORT, tmp_path / folder, **arguments)
        (state,) = (tmp_path / folder).glob("step-*")
        tensors = load_file(state / "state.safetensors")
        weights = {f"fitted.{n}": t for n, t in objective.state_dict().items()}
        return tensors | weights, (tmp_path / folder / "history.csv").read_text()

    whole, history = run("whole")
    with pytest.raises(Stopped):
        run("broken", on_step=stop_at_four)
    assert [p.name for p in (tmp_path / "broken").glob("step-*")] == ["step-0000002"]
    resumed, resumed_history = run("broken", resume=True)
    assert resumed_history == history
    assert whole.keys() == resumed.keys() and whole["model.step"] == 6
    assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == []
    before = build().state_dict()
    moved = {n for n, t in before.items() if not torch.equal(t, whole[f"model.{n}"])}
    assert {"step", "model.quantizer.codebook.weight", "discriminator.network.0.weight"} <= moved
    assert not [n for n in moved if n.startswith("perceptual")], "the yardstick does not learn"
