"""The checks on both stages: each takes the right solution, and names the mistake of each wrong one."""

from collections.abc import Callable

import pytest
import torch
from graded import refusals
from torch import Tensor, nn

from ldm_edu.diffusion import Schedule
from ldm_edu.exercises.latents import (
    check_condition_dropout,
    check_latent_scale,
    check_to_image,
    check_training_loss,
)

CHECKS = {
    check_latent_scale: "latent scale",
    check_to_image: "to image",
    check_condition_dropout: "condition dropout",
    check_training_loss: "training loss",
}


# The right solutions, written as a learner would: with nothing of the package.


def scale(latents: Tensor) -> float:
    mean = latents.mean()
    return float(((latents - mean) ** 2).mean() ** -0.5)


def to_image(decode: Callable, z: Tensor, s: float) -> Tensor:
    return decode(z * (1 / s))


def drop(tokens: Tensor, empty: Tensor, p: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(len(tokens), generator=generator) >= p
    result = empty.repeat(len(tokens), 1)
    result[kept] = tokens[kept]
    return result


def noisy(z0: Tensor, noise: Tensor, t: Tensor, levels: Tensor) -> Tensor:
    level = levels[t].reshape(-1, 1, 1, 1)
    return level**0.5 * z0 + (1 - level) ** 0.5 * noise


def loss(denoiser: nn.Module, z0: Tensor, noise: Tensor, t: Tensor, levels: Tensor) -> Tensor:
    return (denoiser(noisy(z0, noise, t, levels), t) - noise).pow(2).mean()


RIGHT = dict(zip(CHECKS, (scale, to_image, drop, loss), strict=True))


@pytest.mark.parametrize("check", CHECKS, ids=CHECKS.values())
def test_a_right_solution_passes(check: Callable, capsys: pytest.CaptureFixture):
    assert check(RIGHT[check]) is None
    assert capsys.readouterr().out == f"ok: {CHECKS[check]}\n"


def test_other_ways_of_writing_them_pass_too(capsys: pytest.CaptureFixture):
    check_latent_scale(lambda z: 1 / z.flatten().std())
    check_condition_dropout(lambda y, e, p, g: torch.where(torch.rand(len(y), 1, generator=g) < p, e, y))
    check_condition_dropout(lambda y, e, p, g: y.where(torch.rand(len(y), 1, generator=g) < 1 - p, e))
    check_to_image(torch.no_grad()(lambda decode, z, s: decode(z / s)))  # as the package's own
    assert capsys.readouterr().out.count("ok: ") == 4


def deviations(latents: Tensor, *dims: int) -> Tensor:
    return latents.std(dim=dims)


SCALE = {
    "that is the deviation": lambda z: z.std(),
    "1 / variance": lambda z: 1 / z.var(),
    "one scale for all channels": lambda z: 1 / deviations(z, 0, 2, 3).view(1, -1, 1, 1),
    "one scale for all channels: ": lambda z: 1 / deviations(z, 0, 2, 3).mean(),
    "over the whole batch": lambda z: 1 / deviations(z, 1, 2, 3),
    "over the whole batch: ": lambda z: (1 / deviations(z, 1, 2, 3)).mean(),
    "how pictures differ": lambda z: float(1 / z[0].std()),
    "the mean is not subtracted": lambda z: 1 / z.pow(2).mean().sqrt(),
    "a single outlier": lambda z: 1 / z.abs().amax(),
    "Stable Diffusion's": lambda z: 0.18215,
    "your answer is 1; it should be": lambda z: 1,
    "stops with TypeError": lambda z: 1 / z.std(samples=z),
}
TO_IMAGE = {
    "divide by it": lambda d, z, s: d(z * s),
    "unscaled latents only": lambda d, z, s: d(z),
    "not the picture": lambda d, z, s: d(z) / s,
    "not the picture\\.": lambda d, z, s: s * d(z),
    "the decoder is missing": lambda d, z, s: z / s,
    r"shape \(2, 4, 3, 3\); it should be": lambda d, z, s: z,
    "in place.*your caller": lambda d, z, s: d(z.div_(s)),
}


def tokens_dropped(y: Tensor, e: Tensor, p: float, g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(y.shape, generator=g) < p, e, y)


def in_place(y: Tensor, e: Tensor, p: float, g: torch.Generator) -> Tensor:
    y[torch.rand(len(y), generator=g) < p] = e[0]
    return y


def own_generator(y: Tensor, e: Tensor, p: float, g: torch.Generator) -> Tensor:
    return drop(y, e, p, torch.Generator().manual_seed(5))


def own_chance(y: Tensor, e: Tensor, p: float, g: torch.Generator) -> Tensor:
    fresh = torch.Generator()
    fresh.seed()
    return drop(y, e, p, fresh)


DROPOUT = {
    "single tokens": tokens_dropped,
    "becomes `empty`": lambda y, e, p, g: y * (torch.rand(len(y), 1, generator=g) >= p),
    "into the batch itself": in_place,
    "tokens are integers.*float32": lambda y, e, p, g: drop(y, e, p, g).float(),
    "nothing is ever dropped": lambda y, e, p, g: y,
    "one coin": lambda y, e, p, g: e.expand_as(y) if torch.rand(1, generator=g) < p else y,
    "you keep with chance p": lambda y, e, p, g: drop(y, e, 1 - p, g),
    "randn": lambda y, e, p, g: torch.where(torch.randn(len(y), 1, generator=g) < p, e, y),
    "the same captions": own_generator,
    "the same captions are": lambda y, e, p, g: torch.where(torch.arange(len(y))[:, None] % round(1 / p) == 0, e, y),
    "the same one must drop the same": own_chance,
    "yours is list": lambda y, e, p, g: y.tolist(),
    r"yours is \(1, 5\)": lambda y, e, p, g: e,
    "stops with RuntimeError": lambda y, e, p, g: y + torch.rand(3, generator=g),
}
LOSS = {
    "take ᾱ from alphas_cumprod": lambda d, z, e, t, a: loss(d, z, e, t, Schedule().alphas_cumprod.float()),
    "compare with z_0": lambda d, z, e, t, a: (d(noisy(z, e, t, a), t) - z).square().mean(),
    "compare with z_t": lambda d, z, e, t, a: (d(noisy(z, e, t, a), t) - noisy(z, e, t, a)).square().mean(),
    "the clean z_0": lambda d, z, e, t, a: (d(z, t) - e).square().mean(),
    "which is the answer": lambda d, z, e, t, a: (d(e, t) - e).square().mean(),
    "take the roots": lambda d, z, e, t, a: (
        d(noisy(z * noisy(1, 0, t, a), e * noisy(0, 1, t, a), t, a), t) - e
    ).square().mean(),
    "you summed; ": lambda d, z, e, t, a: (d(noisy(z, e, t, a), t) - e).square().sum(),
    "summed over each": lambda d, z, e, t, a: (d(noisy(z, e, t, a), t) - e).square().sum((1, 2, 3)).mean(),
    "that is L1": lambda d, z, e, t, a: (d(noisy(z, e, t, a), t) - e).abs().mean(),
    "the root of it": lambda d, z, e, t, a: loss(d, z, e, t, a) ** 0.5,
    "one ᾱ": lambda d, z, e, t, a: (d(noisy(z, e, t[0].repeat(3), a), t) - e).square().mean(),
    "the same t": lambda d, z, e, t, a: (d(noisy(z, e, t, a), t[0].repeat(3)) - e).square().mean(),
    "no gradient reaches": lambda d, z, e, t, a: loss(d, z, e, t, a).detach(),
    "not a tensor": lambda d, z, e, t, a: loss(d, z, e, t, a).item(),
    r"one number.*yours has \(3,\)": lambda d, z, e, t, a: (d(noisy(z, e, t, a), t) - e).square().mean((1, 2, 3)),
    "your answer is .*; it should be": lambda d, z, e, t, a: 2 * loss(d, z, e, t, a),
}
test_a_wrong_solution_is_refused_in_words, test_what_a_learner_leaves_undone_is_refused_in_words = refusals(
    CHECKS, (SCALE, TO_IMAGE, DROPOUT, LOSS)
)
