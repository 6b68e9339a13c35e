"""Muon (Jordan et al. 2024) for matrices and convolutions, AdamW for everything else, as one optimiser.

Muon turns the momentum of each weight matrix into the nearest orthogonal one, so that every direction of the matrix
learns at one speed. torch has it for 2-D weights alone (`torch.optim.Muon`); here a convolution counts as the matrix
(out channels) × (in channels · height · width).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of a matrix U S Vᵀ `(m, n)`: Newton-Schulz iterations with the quintic of the reference, in bfloat16.

    Singular values come out between about 0.7 and 1.2, which is near enough.
    """
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon on the weights of linear layers and convolutions, AdamW on the others, both with decoupled weight decay.

    The step of a matrix is scaled by 0.2 √max(m, n), so that it is as large as AdamW's would be (Liu et al. 2025), and
    one learning rate serves both.

    Args:
        model: whose trainable weights. Embeddings and codebooks are lists of vectors, not maps: AdamW's.
        lr: learning rate; set each group's "lr" before each step for a schedule.
        betas: AdamW's; Muon's momentum is 0.95, with Nesterov's look ahead.
    """

    def __init__(self, model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        matrices = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
        }
        weights = [p for p in model.parameters() if p.requires_grad]
        groups = [dict(params=[p], matrix=id(p) in matrices) for p in weights]
        super().__init__(groups, dict(lr=lr, betas=betas, weight_decay=weight_decay, momentum=0.95, eps=1e-8))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step, from the gradients that are there."""
        for group in self.param_groups:
            (p,) = group["params"]
            if p.grad is not None:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((self._muon if group["matrix"] else self._adam)(p, group), alpha=-group["lr"])

    def _muon(self, p: nn.Parameter, group: dict) -> Tensor:
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 1 - group["momentum"])
        ahead = p.grad.lerp(momentum, group["momentum"]).flatten(1)
        return 0.2 * max(ahead.shape) ** 0.5 * orthogonalized(ahead).view(p.shape).to(p.dtype)

    def _adam(self, p: nn.Parameter, group: dict) -> Tensor:
        state, (beta1, beta2) = self.state[p], group["betas"]
        step = state.setdefault("step", torch.zeros(()))
        mean, square = (state.setdefault(name, torch.zeros_like(p)) for name in ("mean", "square"))
        step += 1
        mean.lerp_(p.grad, 1 - beta1)
        square.lerp_(p.grad.square(), 1 - beta2)
        n = float(step)
        return (mean / (1 - beta1**n)) / ((square / (1 - beta2**n)).sqrt() + group["eps"])
