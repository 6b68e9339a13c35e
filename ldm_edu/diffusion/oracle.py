"""A world where the best denoiser is a formula: data drawn from a mixture of Gaussians."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_edu.diffusion.parametrisation import convert


class GaussianMixture:
    """Σ_k w_k N(μ_k, s_k² I), and what it becomes under noise: at ᾱ again a mixture, of N(√ᾱ μ_k, (ᾱ s_k² + 1-ᾱ) I).

    Computes in double precision on the CPU, wherever it is asked, and answers there.

    Args:
        means: `(K, ...)`, one mean a component; the rest is the shape of a point, `(2,)` or `(c, h, w)`.
        std: s, one number for all components, or `(K,)`.
        weights: `(K,)`, or None for equal ones; scaled to the sum 1.
    """

    def __init__(self, means: Tensor, std: float | Tensor = 0.1, weights: Tensor | None = None) -> None:
        self.means = means.cpu().double()
        self.std = torch.as_tensor(std, dtype=torch.float64, device="cpu").expand(len(means))
        weights = torch.ones(len(means)) if weights is None else weights.cpu()
        self.weights = weights.double() / weights.sum()

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """`(number, ...)` points of the data."""
        component = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        shape = (number, *self.means.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return self.means[component] + self.std[component].view(-1, *[1] * (len(shape) - 1)) * noise

    def log_density(self, z: Tensor, alpha_cumprod: Tensor | float = 1.0) -> Tensor:
        """log q(z_t) in nats, `(B,)`, at one ᾱ, or at one for each point `(B,)`; ᾱ = 1 is the data."""
        return self._components(z, alpha_cumprod)[0].logsumexp(1).to(z.device)

    def score(self, z: Tensor, alpha_cumprod: Tensor | float = 1.0) -> Tensor:
        """The gradient of the log-density at z: towards each component, by its share in the density there."""
        log_shares, level, variance = self._components(z, alpha_cumprod)
        pull = log_shares.softmax(1) / variance
        towards = level.sqrt() * (pull @ self.means.flatten(1))
        return (towards - pull.sum(1, keepdim=True) * z.cpu().double().flatten(1)).view(z.shape).to(z)

    def predict(self, prediction: str, z: Tensor, alpha_cumprod: Tensor) -> Tensor:
        """E[what a network learns | z_t]: "eps", "x0" or "v", as `training_target`, or "score"; 0 < ᾱ < 1."""
        exact = z.to(torch.promote_types(z.dtype, torch.float32))
        level = torch.as_tensor(alpha_cumprod, dtype=exact.dtype, device=z.device)
        shaped = level.view(-1, *[1] * (z.ndim - 1)) if level.ndim else level
        return convert(self.score(exact, alpha_cumprod), exact, shaped, "score", prediction).to(z.dtype)

    def denoiser(self, alphas_cumprod: Tensor, prediction: str = "eps") -> Callable[[Tensor, Tensor], Tensor]:
        """The best denoiser `(z, t) -> prediction` of this data, for a sampler on `alphas_cumprod`."""
        return lambda z, t: self.predict(prediction, z, alphas_cumprod.cpu()[t.cpu()])

    def _components(self, z: Tensor, alpha_cumprod: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """The log of each component's part in the density `(B, K)`, ᾱ `(1 or B, 1)`, the variances `(1 or B, K)`.

        The squared distances are multiplied out: with many components, all differences would fill the memory.
        """
        level = torch.as_tensor(alpha_cumprod, dtype=torch.float64, device="cpu").view(-1, 1)
        if level.equal(level[:1].expand_as(level)):
            level = level[:1]  # as in every sampler: what depends on ᾱ alone is computed for one row
        variance = level * self.std**2 + 1 - level
        points, means = z.cpu().double().flatten(1), self.means.flatten(1)
        peaks = self.weights.log() - 0.5 * points.shape[1] * (2 * torch.pi * variance).log()
        density = (level.sqrt() * points) @ means.T
        density.sub_(0.5 * points.square().sum(1, keepdim=True)).sub_(0.5 * level * means.square().sum(1))
        return density.div_(variance).add_(peaks), level, variance
