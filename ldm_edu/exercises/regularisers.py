"""The exercises of notebook 02: the KL of a diagonal Gaussian, the straight-through gradient, the two terms of VQ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.autoencoder import DiagonalGaussian, VectorQuantizer
from ldm_edu.exercises.grading import Answer, Mistake, grade


def check_gaussian_kl(answer: Answer) -> None:
    """Check `answer(mean, logvar)`: KL(N(mean, σ²) ‖ N(0, I)) of latents `(B, c, h, w)`, in nats, `(B,)`."""
    draw = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(3, 2, 4, 5, generator=draw), torch.randn(3, 2, 4, 5, generator=draw)

    def right(mean: Tensor, logvar: Tensor) -> Tensor:
        return DiagonalGaussian(mean, logvar).kl()

    def half(rule: Answer) -> Answer:
        return lambda m, v: 0.5 * rule(m, v).sum(dim=(1, 2, 3))

    mistakes: list[Mistake] = [
        ("your KL is averaged over the latent; sum over it.", lambda m, v: right(m, v) / m[0].numel()),
        ("your KL is averaged over everything; sum over the latent.", lambda m, v: right(m, v).sum() / m.numel()),
        ("you summed over the batch too; there is one KL a picture, `(B,)`.", lambda m, v: right(m, v).sum()),
        ("you averaged over the batch; there is one KL a picture, `(B,)`.", lambda m, v: right(m, v).mean()),
        ("you forgot the ½.", lambda m, v: 2 * right(m, v)),
        ("the sign is wrong: a KL is never negative.", lambda m, v: -right(m, v)),
        ("you forgot the -1: the KL of N(0, I) from itself is 0.", half(lambda m, v: m**2 + v.exp() - v)),
        ("the mean enters squared.", half(lambda m, v: m + v.exp() - 1 - v)),
        ("logvar is log σ², not σ²: the variance is exp(logvar).", half(lambda m, v: m**2 + v - 1 - v.log())),
        ("logvar is log σ², not log σ: the variance is exp(logvar).", half(lambda m, v:
            m**2 + (2 * v).exp() - 1 - 2 * v)),
        ("exp(½ logvar) is the standard deviation; the variance is exp(logvar).", half(lambda m, v:
            m**2 + (v / 2).exp() - 1 - v)),
        ("that is KL(N(0, I) ‖ q); the posterior comes first: KL(q ‖ N(0, I)).", half(lambda m, v:
            (1 + m**2) * (-v).exp() - 1 + v)),
    ]  # fmt: skip
    grade("Gaussian KL", answer, right, [(mean, logvar), (mean, 0 * mean), (0 * mean, 0 * mean)], mistakes)


def check_straight_through(answer: Answer) -> None:
    """Check `answer(latent, codebook)`: each vector of latents `(B, c, h, w)` becomes the nearest one of `(n, c)`.

    Backwards, the latent gets the gradient as if nothing had been replaced, and the codebook none.
    """
    draw = torch.Generator().manual_seed(0)
    latent, codebook = torch.randn(2, 3, 4, 5, generator=draw), torch.randn(7, 3, generator=draw)

    def right(latent: Tensor, codebook: Tensor) -> Tensor:
        quantizer = VectorQuantizer(*codebook.shape)
        quantizer.codebook.weight = nn.Parameter(codebook.detach())
        return quantizer(latent)[0]

    def codes(z: Tensor, e: Tensor, score: Answer = lambda z, e: -torch.cdist(z, e)) -> Tensor:
        return score(z.detach().movedim(1, -1), e.detach()).argmax(-1)

    def near(z: Tensor, e: Tensor) -> Tensor:
        return e[codes(z, e)].movedim(-1, 1)

    def through(pick: Answer) -> Answer:
        """Something else than the nearest, passed straight through."""
        return lambda z, e: z + (pick(z, e) - z).detach()

    no_way = "the gradient does not reach the encoder: argmin has none. Add a detached difference to the latent."
    no_latent = "the latent gets its gradient with the wrong sign: detach the difference, not the latent."
    mistakes: list[Mistake] = [
        (no_way, near),
        (no_way, lambda z, e: near(z, e).detach()),
        (no_latent, lambda z, e: z.detach() + near(z, e) - z),
        (no_latent, lambda z, e: z.detach() + near(z, e).detach() - z),
        ("this moves the codebook too, which has a loss of its own: detach the whole difference.",
         lambda z, e: z + near(z, e) - z.detach()),
        ("forwards it is still the latent: latent + (nearest - latent).detach(), not the other way round.",
         lambda z, e: near(z, e) + (z - near(z, e)).detach()),
        ("forwards it is still the latent; it should be the nearest codebook vectors.", lambda z, e: 1 * z),
        ("these are the codes; asked for are their vectors, `(B, c, h, w)`.", codes),
        ("the largest dot product is not the smallest distance: ‖e‖² counts too.",
         through(lambda z, e: e[codes(z, e, lambda z, e: z @ e.T)].movedim(-1, 1))),
        ("you took the farthest vector: argmin, not argmax.",
         through(lambda z, e: e[codes(z, e, torch.cdist)].movedim(-1, 1))),
        ("move the channels last before you flatten: a vector is what lies at one place.",
         through(lambda z, e: e[torch.cdist(z.reshape(-1, z.shape[1]), e).argmin(1)].view(z.shape))),
        ("move the channels back to the second place; a reshape alone mixes the places.",
         through(lambda z, e: e[codes(z, e)].view(z.shape))),
    ]  # fmt: skip
    grade("straight-through", answer, right, [(latent, codebook), (latent[:1, :, :, :2], 3 * codebook)], mistakes)


def check_vq_loss(answer: Answer) -> None:
    """Check `answer(latent, quantized, commitment_weight)`: both terms of the VQ loss, each a mean, added."""
    draw = torch.Generator().manual_seed(0)
    latent, quantized = torch.randn(2, 3, 4, 4, generator=draw), torch.randn(2, 3, 4, 4, generator=draw)

    def terms(weights: Answer, reduction: str = "mean") -> Answer:
        """The loss whose two terms have the weights that `weights(β)` gives."""

        def loss(latent: Tensor, quantized: Tensor, commitment_weight: float) -> Tensor:
            to_codebook = F.mse_loss(quantized, latent.detach(), reduction=reduction)
            to_encoder = F.mse_loss(latent, quantized.detach(), reduction=reduction)
            return sum(w * t for w, t in zip(weights(commitment_weight), (to_codebook, to_encoder)))

        return loss

    mistakes: list[Mistake] = [
        ("β is on the codebook term (the historical mistake); it weighs the commitment, ‖z - sg[e]‖².",
         terms(lambda b: (b, 1))),
        ("nothing is detached: each term must move one side alone.", lambda z, e, b: (1 + b) * F.mse_loss(z, e)),
        ("the commitment term is missing: β ‖z - sg[e]‖².", terms(lambda b: (1, 0))),
        ("the codebook term is missing: ‖sg[z] - e‖².", terms(lambda b: (0, b))),
        ("β is missing: it weighs the commitment term.", terms(lambda b: (1, 1))),
        ("β is on both terms; it weighs the commitment alone.", terms(lambda b: (b, b))),
        ("you summed; each term is a mean.", terms(lambda b: (1, b), reduction="sum")),
    ]  # fmt: skip
    cases = [(latent, quantized, 0.25), (latent, 0.1 * quantized, 0.7)]
    grade("VQ loss", answer, terms(lambda b: (1, b)), cases, mistakes)
