"""The least there is to train, and what a run leaves."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_edu.training import Settings

SHORT = Settings(steps=6, batch_size=2, learning_rate=0.01, warmup=2, log_every=1, save_every=2)


class Line(nn.Module):
    """A line through noisy points."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 3)

    def forward(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        noise = torch.randn(batch.shape, generator=generator)
        return (self.line(batch) - batch.flip(1) - 0.1 * noise).square().mean(), {"noise": noise.std()}


def three_numbers(generator: torch.Generator) -> Tensor:
    return torch.randn(5, 3, generator=generator)


def tables(folder: Path) -> tuple[dict[str, Tensor], str]:
    """What a finished run leaves: the tensors of its last state (weights, averages, optimiser), and its history."""
    (state,) = folder.glob("step-*")
    return load_file(state / "state.safetensors"), (folder / "history.csv").read_text()


def assert_same(one: Path, other: Path) -> None:
    (tensors, history), (others, other_history) = tables(one), tables(other)
    assert history == other_history and tensors.keys() == others.keys()
    assert {name.split(".")[0] for name in tensors} == {"model", "ema", "optimizer"}
    assert not [name for name in tensors if not torch.equal(tensors[name], others[name])]
