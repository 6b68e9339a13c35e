"""The variational bound on -log p(z_0), term by term, and how the simple objective weighs the same errors.

-log p(z_0) ≤ L_0 + L_1 + ... + L_{T-1} + L_T, equation 5 of Ho et al. 2020 (appendix B of the paper):
L_T = KL(q(z_T | z_0) ‖ p(z_T)), L_{t-1} = KL(q(z_{t-1} | z_t, z_0) ‖ p(z_{t-1} | z_t)), L_0 = -log p(z_0 | z_1).
The paper counts t from 1: its z_t is our timestep t - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

from ldm_edu.diffusion.samplers import Denoiser, Draw, clean_and_noise, fresh_noise
from ldm_edu.diffusion.spacing import respaced_betas
from ldm_edu.runtime import UserError


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    z0: Tensor,
    alphas_cumprod: Tensor,
    draw: Draw,
    prediction: str = "eps",
    variance: str | Tensor = "beta",
    decoder: str = "gaussian",
    prior: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """The terms of the bound in nats, `(B, T+1)`: L_0, L_1, ..., L_{T-1}, L_T. Their sum bounds -log p(z_0).

    Each term but L_T is a mean over q(z_t | z_0), estimated from one draw: average over more for less noise.
    For measuring, not for training: it has no gradient.

    Args:
        z0: `(B, ...)`, clean data.
        alphas_cumprod: `(T,)`; the denoiser is called once at each t.
        draw: gives noise for a batch, as for `ddim`.
        variance: of p(z_{t-1} | z_t), as in `reverse_variances`.
        decoder: L_0. "gaussian": the density N(z_0; μ(z_1), σ_1²), for latents and other continuous data; it may
            be negative. "pixels": the probability of one of 256 values in [-1, 1], equation 13 of Ho et al.
        prior: mean and variance of p(z_T).

    Raises:
        UserError: ᾱ that do not fall from below 1, or end at 0 for "eps"; variances not above 0; unknown words.
    """
    first, last = (alphas_cumprod[i].item() for i in (0, -1)) if len(alphas_cumprod) else (1.0, 1.0)
    if not (alphas_cumprod.diff() < 0).all() or not 0 <= last <= first < 1:
        raise UserError(f"alphas_cumprod falls with t, from below 1; it goes from {first:.6g} to {last:.6g}.")
    if last == 0 and prediction == "eps":
        raise UserError("The last ᾱ is 0: no signal, and of the noise alone no z_0 follows. Take a model of x0 or v.")
    if decoder not in ("gaussian", "pixels"):
        raise UserError(f"The decoder is 'gaussian' or 'pixels', not {decoder!r}.")
    if not prior[1] > 0:
        raise UserError(f"The prior is a mean and a variance above 0, not {prior}.")
    sigmas2 = reverse_variances(alphas_cumprod, variance).tolist()
    levels = [1.0, *alphas_cumprod.tolist()]
    terms = []
    for t, sigma2 in enumerate(sigmas2):
        before, now = levels[t], levels[t + 1]
        z = now**0.5 * z0 + (1 - now) ** 0.5 * fresh_noise(draw, z0)
        guess, _ = clean_and_noise(denoiser, z, t, now, prediction)
        # Equation 7: the true and the guessed mean differ by this much of what z_0 and its guess differ.
        beta = 1 - now / before
        share = before**0.5 * beta / (1 - now)
        if t:
            term = _gaussian_kl(share * (z0 - guess), beta * (1 - before) / (1 - now), sigma2)
        elif decoder == "gaussian":
            term = 0.5 * ((z0 - guess).square() / sigma2 + math.log(2 * math.pi * sigma2))
        else:
            term = -_log_probability_of_pixels(z0, guess, sigma2**0.5)
        terms.append(term.flatten(1).sum(1))
    terms.append(_gaussian_kl(levels[-1] ** 0.5 * z0 - prior[0], 1 - levels[-1], prior[1]).flatten(1).sum(1))
    return torch.stack(terms, dim=1)


def reverse_variances(alphas_cumprod: Tensor, variance: str | Tensor) -> Tensor:
    """σ_t² of the reverse steps, `(T,)`: "beta" for β_t, "posterior" for β̃_t (Ho et al., section 3.2), or a tensor.

    β_t is exact for data N(0, I), β̃_t for a single point. At the decoder's step, the first, β̃ would be 0:
    as in Ho et al.'s code it takes the second's.

    Raises:
        UserError: another word, or a tensor of another length, or with variances not above 0.
    """
    if isinstance(variance, Tensor):
        if variance.shape != alphas_cumprod.shape:
            raise UserError(
                f"Give a variance for each of {len(alphas_cumprod)} steps, not {tuple(variance.shape)}."
            )
        if not (variance > 0).all():
            raise UserError(
                f"Variances are above 0; the smallest is {variance.min():.6g}. (β̃ is 0 at the first step: 'posterior' "
                "takes the second's there.)"
            )
        return variance
    betas = respaced_betas(alphas_cumprod, range(len(alphas_cumprod)))
    if variance == "beta":
        return betas
    if variance != "posterior" or len(betas) < 2:
        raise UserError(
            f"The variance is 'beta', or from T = 2 on 'posterior', or a tensor; not {variance!r}."
        )
    posterior = betas[1:] * (1 - alphas_cumprod[:-1]) / (1 - alphas_cumprod[1:])
    return torch.cat([posterior[:1], posterior])


def bound_weights(alphas_cumprod: Tensor, variance: str | Tensor = "posterior") -> Tensor:
    """What each L_t counts of ‖ε - ε_θ‖², `(T,)`: β² / (2 σ² α (1-ᾱ)), equation 12 of Ho et al.

    The simple objective (equation 14; equation 1 of the paper) puts 1 in place of all of them. With β̃_t it is
    ½ (SNR(t-1) - SNR(t)) of ‖z_0 - guess‖² (appendix B of the paper), from the second timestep on.
    """
    betas = respaced_betas(alphas_cumprod, range(len(alphas_cumprod)))
    return betas**2 / (2 * reverse_variances(alphas_cumprod, variance) * (1 - betas) * (1 - alphas_cumprod))


def bits_per_dimension(nats: Tensor, dimensions: int) -> Tensor:
    """Nats of a whole picture or latent as bits for each of its numbers."""
    return nats / (dimensions * math.log(2))


def _gaussian_kl(difference: Tensor, variance: float, other: float) -> Tensor:
    """KL(N(a, variance) ‖ N(b, other)) in nats, for each number of `difference` = a - b."""
    return 0.5 * ((variance + difference.square()) / other - 1 + math.log(other / variance))


def _log_probability_of_pixels(pixels: Tensor, mean: Tensor, std: float) -> Tensor:
    """Equation 13 of Ho et al.: what a Gaussian gives to the 1/255 on each side of a value, all beyond at the ends."""
    away, half = pixels - mean, 1 / 255
    # Counted from the nearer tail, where the difference of the two logarithms keeps its digits.
    upper, lower = log_ndtr((half - away.abs()) / std), log_ndtr((-half - away.abs()) / std)
    inside = upper + torch.log(-torch.expm1(lower - upper))
    darkest, brightest = log_ndtr((away + half) / std), log_ndtr((half - away) / std)
    return torch.where(pixels < -0.999, darkest, torch.where(pixels > 0.999, brightest, inside))
