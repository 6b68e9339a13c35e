"""The variational bound against exact likelihoods, and each of its terms against torch's own.

For Gaussian data every term is quadratic in the noise, so the noises +1 and -1 give its exact mean.
"""

import math

import pytest
import torch
from denoisers import Draws, Network, normal
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm_edu.diffusion import (
    PREDICTIONS,
    GaussianMixture,
    Schedule,
    bits_per_dimension,
    bound_weights,
    reverse_variances,
    snr,
    variational_bound,
)
from ldm_edu.runtime import UserError

SCHEDULES = {
    "sqrt_linear": Schedule(T=1000),
    "linear": Schedule("linear", 40, 0.001, 0.2),
    "two": Schedule(T=2),
}
Z0 = 1.3 * normal(2, 1, 2, 2).double() - 0.4


def exactly(denoiser, z0: Tensor, levels: Tensor, *arguments: object) -> Tensor:
    """The bound's terms, each averaged over its noise without error."""
    both = [
        variational_bound(
            denoiser, z0, levels, lambda shape, s=s: torch.full((len(z0), *shape), s), *arguments
        )
        for s in (1.0, -1.0)
    ]
    return (both[0] + both[1]) / 2


def gaussian(mean: float, std: float) -> GaussianMixture:
    return GaussianMixture(torch.full((1, 1, 2, 2), mean, dtype=torch.float64), std)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_for_standard_normal_data_the_bound_is_the_likelihood(name: str, prediction: str):
    """With β_t: the reverse of a step is N(√α z_t, β I) itself. With β̃_t, too narrow, a gap remains."""
    levels, data = SCHEDULES[name].alphas_cumprod, gaussian(0.0, 1.0)
    denoiser = data.denoiser(levels, prediction)
    terms = exactly(denoiser, Z0, levels, prediction, "beta")
    assert terms.shape == (2, len(levels) + 1) and terms.dtype == torch.float64
    nats = -Normal(0.0, 1.0).log_prob(Z0).sum((1, 2, 3))
    torch.testing.assert_close(terms.sum(1), nats, rtol=1e-9, atol=1e-9)
    gap = exactly(denoiser, Z0, levels, prediction, "posterior").sum(1) - nats
    assert (gap > 1e-6).all()
    # The gap of data whose square is 1 on average: KL(N(m, β) ‖ N(m, β̃)) at each step, for each of the four numbers.
    share = reverse_variances(levels, "beta") / reverse_variances(levels, "posterior")
    points = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    gap = exactly(denoiser, points, levels, prediction, "posterior") - exactly(
        denoiser, points, levels, prediction
    )
    assert gap.sum().item() == pytest.approx(2 * (share - 1 - share.log()).sum().item(), rel=1e-6)
    # Over the data, of which ±1 have the right moments: the entropy, ½ log 2πe a number.
    mean = exactly(denoiser, torch.cat([points, -points]), levels, prediction, "beta").sum(1).mean()
    entropy = 0.5 * math.log2(2 * math.pi * math.e)
    assert bits_per_dimension(mean, 4).item() == pytest.approx(entropy, rel=1e-9)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.5), (-0.3, 2.0)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_with_the_true_reverse_kernel_and_prior_it_is_any_gaussians_likelihood(
    name: str, mean: float, std: float
):
    levels, data = SCHEDULES[name].alphas_cumprod, gaussian(mean, std)
    spread = levels * std**2 + 1 - levels  # of q(z_t)
    before = torch.cat([torch.tensor([std**2], dtype=torch.float64), spread[:-1]])
    kernel = before / spread * reverse_variances(levels, "beta")
    prior = (levels[-1].sqrt().item() * mean, spread[-1].item())
    nats = -data.log_density(Z0)
    terms = exactly(data.denoiser(levels), Z0, levels, "eps", kernel, "gaussian", prior)
    torch.testing.assert_close(terms.sum(1), nats, rtol=1e-9, atol=1e-9)
    # Any other variance, denoiser or prior costs something on the mean over the data, and nothing can gain.
    points = mean + std * torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 2, 2)

    def on_average(denoiser, *arguments: object) -> float:
        return exactly(denoiser, points, levels, "eps", *arguments).sum(1).mean().item()

    best = on_average(data.denoiser(levels), kernel, "gaussian", prior)
    assert best == pytest.approx(4 * (0.5 * math.log(2 * math.pi * math.e) + math.log(std)), rel=1e-9)
    for other in (
        (data.denoiser(levels), 1.1 * kernel, "gaussian", prior),
        (data.denoiser(levels), 0.9 * kernel, "gaussian", prior),
        (gaussian(mean + 0.1, std).denoiser(levels), kernel, "gaussian", prior),
        (data.denoiser(levels), kernel, "gaussian", (prior[0] + 0.1, prior[1])),
    ):
        assert on_average(*other) > best + 1e-6


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_term_is_what_torch_says(prediction: str, variance: str):
    """For any denoiser: L_{t-1} and L_T are KLs of the Gaussians of equations 5 to 7, L_0 a density."""
    own = SCHEDULES["linear"]
    levels, betas = own.alphas_cumprod, own.betas
    draws, network = Draws(), Network()
    terms = variational_bound(network, Z0, levels, draws, prediction, variance)
    assert network.calls == list(range(40))
    sigma2 = {"beta": betas, "posterior": betas[1:] * (1 - levels[:-1]) / (1 - levels[1:])}[variance]
    for t in range(40):
        noise, level = draws.drawn[t].double(), levels[t]
        z = level.sqrt() * Z0 + (1 - level).sqrt() * noise
        output = Network()(z, torch.full((2,), t))
        if prediction == "eps":
            guess = (z - (1 - level).sqrt() * output) / level.sqrt()
        elif prediction == "x0":
            guess = output
        else:
            guess = level.sqrt() * z - (1 - level).sqrt() * output
        if t == 0:
            expected = -Normal(guess, sigma2[0].sqrt()).log_prob(Z0)  # with β̃, the second timestep's
        else:
            before, alpha = levels[t - 1], 1 - betas[t]

            def mean(z0: Tensor, z=z, t=t, level=level, before=before, alpha=alpha) -> Tensor:
                return (
                    before.sqrt() * betas[t] / (1 - level) * z0
                    + alpha.sqrt() * (1 - before) / (1 - level) * z
                )

            posterior = Normal(mean(Z0), ((1 - before) / (1 - level) * betas[t]).sqrt())
            std = (sigma2[t] if variance == "beta" else sigma2[t - 1]).sqrt()
            expected = kl_divergence(posterior, Normal(mean(guess), std))
        torch.testing.assert_close(terms[:, t], expected.sum((1, 2, 3)), rtol=1e-9, atol=1e-9)
    last = kl_divergence(Normal(levels[-1].sqrt() * Z0, (1 - levels[-1]).sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(terms[:, 40], last.sum((1, 2, 3)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_weights_of_the_noise_in_the_bound(name: str):
    """L_t = weight ‖ε - ε_θ‖² + what no network can change; with β̃ it is half the loss of SNR times ‖z_0 - guess‖²."""
    levels, draws = SCHEDULES[name].alphas_cumprod, Draws()
    variational_bound(Network(), Z0, levels, draws)  # the noises
    noise = [n.double() for n in draws.drawn]
    for variance in ("beta", "posterior"):
        calls = iter(noise)

        def perfect(z: Tensor, t: Tensor, calls=calls) -> Tensor:
            return next(calls)

        def off(z: Tensor, t: Tensor, calls=iter(noise)) -> Tensor:
            return next(calls) + 0.1

        same, moved = (variational_bound(f, Z0, levels, Draws(), "eps", variance) for f in (perfect, off))
        torch.testing.assert_close(
            (moved - same)[:, :-1],
            bound_weights(levels, variance).expand(2, -1) * 4 * 0.01,
            rtol=1e-6,
            atol=1e-9,
        )
        torch.testing.assert_close(moved[:, -1], same[:, -1])
    weights, ratio = bound_weights(levels, "posterior"), snr(levels)
    torch.testing.assert_close(weights[1:], (ratio[:-1] - ratio[1:]) / (2 * ratio[1:]), rtol=1e-6, atol=0)


def test_the_decoder_of_pixels_gives_each_of_256_values_its_probability():
    """Equation 13: for any mean and width they sum to 1, and are the Gaussian's mass around each value."""
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1)
    levels = torch.tensor([0.9999, 0.5], dtype=torch.float64)
    for mean in (-1.0, -0.2, 0.55, 1.0, 1.7):
        for std in (0.001, 0.01, 0.3, 3.0):

            def answer(z: Tensor, t: Tensor, mean=mean) -> Tensor:
                return torch.full_like(z, mean)

            variance = torch.tensor([std**2, 0.5], dtype=torch.float64)
            draw = lambda shape: torch.zeros(256, *shape)  # noqa: E731
            nats = variational_bound(answer, values, levels, draw, "x0", variance, "pixels")[:, 0]
            assert nats.isfinite().all() and (nats >= -1e-9).all()
            assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-6)
            theirs = Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
            inside = values[1:-1, 0, 0, 0]
            mass = theirs.cdf(inside + 1 / 255) - theirs.cdf(inside - 1 / 255)
            torch.testing.assert_close((-nats[1:-1]).exp(), mass, rtol=1e-6, atol=1e-12)
    assert bits_per_dimension(torch.tensor(math.log(256.0)), 1).item() == pytest.approx(
        8
    )  # a byte that says nothing


def test_what_is_no_variance_and_no_decoder_is_named():
    levels = Schedule(T=3).alphas_cumprod
    for arguments, words in ((("eps", "learned"), "'learned'"), (("eps", "beta", "jpeg"), "'jpeg'")):
        with pytest.raises(UserError, match=words):
            variational_bound(Network(), Z0, levels, Draws(), *arguments)
    with pytest.raises(UserError, match="from T = 2 on"):
        reverse_variances(levels[:1], "posterior")


@pytest.mark.parametrize("first", [0.0, -0.5, math.nan])
def test_variances_are_above_0(first: float):
    """β̃ as a formula gives it is 0 at the first step."""
    levels = Schedule(T=3).alphas_cumprod
    variance = torch.cat([torch.tensor([first]), reverse_variances(levels, "posterior")[1:]])
    for use in (
        lambda: variational_bound(Network(), Z0, levels, Draws(), variance=variance),
        lambda: bound_weights(levels, variance),
    ):
        with pytest.raises(UserError, match=f"above 0; the smallest is {first:g}.*'posterior' takes"):
            use()
    with pytest.raises(UserError, match=rf"prior.*above 0, not \(0.5, {first}\)"):
        variational_bound(Network(), Z0, levels, Draws(), prior=(0.5, first))
