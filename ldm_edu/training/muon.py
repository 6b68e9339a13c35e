"""Muon (Jordan et al. 2024) for matrices and convolutions, AdamW for everything else, as one optimiser.

Muon turns the momentum of each weight matrix into the nearest orthogonal one, so that every direction of the matrix
learns at one speed. torch has it for 2-D weights alone (`torch.optim.Muon`); here a convolution counts as the matrix
(out channels) × (in channels · height · width).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def orthogonalized(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: `(B, m, n)` to bfloat16 of the same shape.

    Five Newton-Schulz iterations with the quintic of the reference. Singular values that are not tiny come out between
    about 0.7 and 1.2, which is near enough.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        inner = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # -4.7750 G + 2.0315 G²
        x = torch.baddbmm(x, inner, x, beta=3.4445)  # 3.4445 X + inner X
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on the weights of linear layers and convolutions, AdamW on the others, both with decoupled weight decay.

    The step of a matrix is scaled by 0.2 √max(m, n), so that it is as large as AdamW's would be (Liu et al. 2025), and
    one learning rate serves both.

    Args:
        model: whose trainable weights. Embeddings and codebooks are lists of vectors, not maps: AdamW's.
        lr: learning rate; set each group's "lr" before each step for a schedule.
        betas: AdamW's; Muon's momentum is 0.95, with Nesterov's look ahead.
        others: more groups of weights, all AdamW's, with settings of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        others: Sequence[dict] = (),
    ) -> None:
        matrices = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
        }
        groups: dict[tuple[int, int] | None, list[nn.Parameter]] = {}
        grouped = {id(p) for group in others for p in group["params"]}
        for p in (p for p in model.parameters() if p.requires_grad and id(p) not in grouped):
            shape = (p.shape[0], p[0].numel()) if id(p) in matrices else None
            groups.setdefault(shape, []).append(p)
        # Matrices of one shape are orthogonalised together: many small ones would cost more than they hold.
        super().__init__(
            [dict(params=params, matrix=shape is not None) for shape, params in groups.items()]
            + [dict(group, matrix=False) for group in others],
            dict(lr=lr, betas=betas, weight_decay=weight_decay, momentum=0.95, eps=1e-8),
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step, from the gradients that are there."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                directions = (self._muon if group["matrix"] else self._adam)(weights, group)
                torch._foreach_add_(weights, directions, alpha=-group["lr"])

    def _muon(self, weights: list[nn.Parameter], group: dict) -> list[Tensor]:
        momentum = [self._kept(p, "momentum") for p in weights]
        torch._foreach_lerp_(momentum, [p.grad for p in weights], 1 - group["momentum"])
        ahead = [p.grad.lerp(m, group["momentum"]).flatten(1) for p, m in zip(weights, momentum, strict=True)]
        size = 0.2 * max(ahead[0].shape) ** 0.5
        steps = orthogonalized(torch.stack(ahead)).to(weights[0].dtype) * size
        return [step.reshape(p.shape) for step, p in zip(steps, weights, strict=True)]

    def _adam(self, weights: list[nn.Parameter], group: dict) -> list[Tensor]:
        directions, (beta1, beta2) = [], group["betas"]
        for p in weights:
            state = self.state[p]
            mean, square = self._kept(p, "mean"), self._kept(p, "square")
            step = state.setdefault("step", torch.zeros(()))
            step += 1
            mean.lerp_(p.grad, 1 - beta1)
            square.lerp_(p.grad.square(), 1 - beta2)
            n = float(step)
            directions.append((mean / (1 - beta1**n)) / ((square / (1 - beta2**n)).sqrt() + group["eps"]))
        return directions

    def _kept(self, p: nn.Parameter, name: str) -> Tensor:
        """A running mean of the gradients of `p`; zero at first."""
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p)
        return state[name]
