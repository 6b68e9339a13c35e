"""A stand-in for the network, and noise that both sides of a comparison share."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Network:
    """Answers every call with other numbers, and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(z),) and t.unique().numel() == 1
        self.calls.append(int(t[0]))
        return 0.6 * torch.tanh(z.flip(-1)) + 0.4 * normal(*z.shape, seed=int(t[0]))


class Draws:
    """Fresh noise at each call, kept, so that the other side gets the same."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def __call__(self, shape: torch.Size) -> Tensor:
        self.drawn.append(normal(2, *shape, seed=1000 + len(self.drawn)))
        return self.drawn[-1]
