"""The conversions between what a network can predict, and the mixture whose best denoiser is a formula."""

import pytest
import torch
from denoisers import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ldm_edu.diffusion import (
    PREDICTIONS,
    GaussianMixture,
    Schedule,
    alpha_cumprod_at,
    convert,
    half_log_snr,
    snr,
    split_prediction,
    training_target,
)
from ldm_edu.runtime import UserError

WORDS = (*PREDICTIONS, "score")
MEANS = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.0]])
STD, WEIGHTS = torch.tensor([0.2, 0.4, 0.3]), torch.tensor([0.3, 0.5, 0.2])
MIXTURE = GaussianMixture(MEANS, STD, WEIGHTS)


@settings(max_examples=60, deadline=None)
@given(
    given_=st.sampled_from(WORDS),
    wanted=st.sampled_from(WORDS),
    t=st.integers(0, 999),
    seed=st.integers(0, 2**31),
)
def test_every_answer_says_the_same(given_: str, wanted: str, t: int, seed: int):
    z0, noise = normal(2, 2, 3, 4, seed=seed).double()
    level = Schedule().alphas_cumprod[t]
    z = level.sqrt() * z0 + (1 - level).sqrt() * noise
    answers = {word: training_target(word, z0, noise, level) for word in PREDICTIONS}
    answers["score"] = torch.func.grad(lambda z: -(z - level.sqrt() * z0).square().sum() / (2 * (1 - level)))(
        z
    )
    answer = convert(answers[given_], z, level, given_, wanted)
    torch.testing.assert_close(answer, answers[wanted], rtol=1e-9, atol=1e-9)


def test_a_word_that_is_none_is_named():
    for words in (("flow", "eps"), ("eps", "flow")):
        with pytest.raises(UserError, match="'flow'"):
            convert(torch.zeros(1), torch.zeros(1), torch.tensor(0.5), *words)


def test_signal_to_noise():
    level = torch.tensor([0.5, 0.8, 0.1], dtype=torch.float64)
    torch.testing.assert_close(snr(level), torch.tensor([1.0, 4.0, 1 / 9], dtype=torch.float64))
    torch.testing.assert_close(half_log_snr(level), (level.sqrt() / (1 - level).sqrt()).log())
    torch.testing.assert_close(alpha_cumprod_at(half_log_snr(level)), level)
    assert (half_log_snr(Schedule().alphas_cumprod).diff() < 0).all()


def torchs(level: float) -> MixtureSameFamily:
    """The same mixture under noise, by torch."""
    std = (level * STD.double() ** 2 + 1 - level).sqrt()[:, None].expand(3, 2)
    return MixtureSameFamily(
        Categorical(WEIGHTS.double()), Independent(Normal(level**0.5 * MEANS.double(), std), 1)
    )


@pytest.mark.parametrize("level", [1.0, 0.9, 0.3, 0.001])
def test_density_and_score_are_those_of_the_mixture(level: float):
    z = 1.5 * normal(50, 2).double().requires_grad_()
    density = torchs(level).log_prob(z)
    torch.testing.assert_close(MIXTURE.log_density(z, level), density)
    torch.testing.assert_close(
        MIXTURE.score(z, level), torch.autograd.grad(density.sum(), z)[0], rtol=1e-9, atol=1e-9
    )


def test_the_prediction_is_the_mean_of_what_a_network_learns():
    """E[z_0 | z_t], from a hundred thousand points of the data weighted by how likely each would have led to z_t."""
    data, level = (
        MIXTURE.sample(100_000, torch.Generator().manual_seed(0)),
        torch.tensor(0.6, dtype=torch.float64),
    )
    z = normal(20, 2).double()
    shares = (-(z[:, None] - level.sqrt() * data).square().sum(2) / (2 * (1 - level))).softmax(1)
    mean = shares @ data
    torch.testing.assert_close(MIXTURE.predict("x0", z, level), mean, atol=0.03, rtol=0)
    noise = (z - level.sqrt() * mean) / (1 - level).sqrt()
    torch.testing.assert_close(MIXTURE.predict("eps", z, level), noise, atol=0.04, rtol=0)
    # No other answer has a smaller squared error.
    fresh = torch.randn(len(data), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = level.sqrt() * data + (1 - level).sqrt() * fresh
    best = MIXTURE.predict("eps", noisy, level)

    def loss(answer: Tensor) -> float:
        return (answer - fresh).square().mean().item()

    others = [0.95 * best, 1.05 * best, best + 0.05, MIXTURE.predict("eps", noisy, level - 0.05)]
    assert all(loss(best) < loss(other) for other in others) and loss(best) < 0.9


def test_samples_have_the_mixtures_moments():
    data = MIXTURE.sample(200_000, torch.Generator().manual_seed(0))
    theirs = torchs(1.0)
    torch.testing.assert_close(data.mean(0), theirs.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(data.var(0), theirs.variance, atol=0.01, rtol=0)
    one, other = (MIXTURE.sample(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("prediction", WORDS)
def test_points_of_any_shape_each_at_its_own_level(prediction: str):
    """A batch at different timesteps answers as each point alone; latents as their flattened numbers."""
    means = normal(4, 2, 3, 3, seed=5)
    latents, flat = GaussianMixture(means, 0.3), GaussianMixture(means.flatten(1), 0.3)
    levels, z, t = Schedule().alphas_cumprod, normal(3, 2, 3, 3), torch.tensor([10, 500, 990])
    answer = latents.denoiser(levels, prediction)(z, t)
    assert answer.shape == z.shape and answer.dtype == z.dtype
    for i in range(3):
        alone = flat.predict(prediction, z[i : i + 1].flatten(1), levels[t[i]])
        torch.testing.assert_close(answer[i].flatten(), alone[0], rtol=1e-4, atol=1e-4)
    assert latents.sample(7).shape == (7, 2, 3, 3)
    z0, noise = split_prediction(
        "eps", latents.predict("eps", z.double(), levels[500]), z.double(), levels[500]
    )
    torch.testing.assert_close(z0, latents.predict("x0", z.double(), levels[500]))
    torch.testing.assert_close(noise, -(1 - levels[500]).sqrt() * latents.score(z.double(), levels[500]))
