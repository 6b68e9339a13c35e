"""Muon: orthogonal steps, torch's own optimisers as oracles, and who gets which."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ldm_edu.autoencoder import AutoencoderVQ, PatchDiscriminator, VQConfig
from ldm_edu.autoencoder.objective import FirstStageObjective
from ldm_edu.runtime import UserError
from ldm_edu.training.fit import _optimizer, fit
from ldm_edu.training.muon import Muon, orthogonalized
from ldm_edu.training.settings import Settings


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 5, 40), (1, 40, 5), (3, 12, 30)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrices)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found.float())
    assert values.min() > 0.4 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.cosine_similarity(found.float().flatten(-2), (u @ vh).flatten(-2), dim=-1)
    assert cosine.min() > 0.97


def test_matrices_of_one_shape_do_not_mix():
    a, b = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
    together, alone = orthogonalized(torch.stack([a, 100 * b])), orthogonalized(a[None])
    torch.testing.assert_close(together[:1], alone, atol=0.02, rtol=0)


def test_it_is_torchs_muon_on_matrices_and_adamw_on_the_rest():
    torch.manual_seed(0)
    mine, theirs = (nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    optimizer = Muon(mine, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    matrices = [m.weight for m in theirs if isinstance(m, nn.Linear)]
    others = [p for p in theirs.parameters() if p.ndim == 1]
    oracles = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    ]
    start = [p.detach().clone() for p in mine.parameters()]
    for _ in range(5):
        for p, q in zip(mine.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for one in (optimizer, *oracles):
            one.step()
    for p, q, s in zip(mine.parameters(), theirs.parameters(), start):
        assert (p - q).norm() < 0.05 * (q - s).norm()  # both iterate in bfloat16


def test_a_convolution_is_a_matrix_and_an_embedding_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Embedding(7, 5))
    groups = Muon(model, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0).param_groups
    assert {tuple(p.shape) for g in groups if g["matrix"] for p in g["params"]} == {(4, 3, 3, 3)}
    before, gradient = model[0].weight.detach().clone(), torch.randn(4, 3, 3, 3)
    model[0].weight.grad = gradient
    Muon(model, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0).step()
    step = (before - model[0].weight.detach()).flatten(1)
    expected = 0.2 * 27**0.5 * orthogonalized(gradient.flatten(1)[None])[0].float()
    assert (step - expected).norm() < 0.1 * expected.norm()  # bfloat16, of two multiples of one gradient


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_discriminator_has_a_group_of_its_own(kind: str):
    torch.manual_seed(0)
    model = AutoencoderVQ(VQConfig(latent_channels=2, channels=4, channel_multipliers=(1, 1), blocks=1, groups=2))
    objective = FirstStageObjective(model, discriminator=PatchDiscriminator(4, 1))
    optimizer = _optimizer(objective, Settings(optimizer=kind))
    adversary = {id(p) for p in objective.discriminator.parameters()}
    for group in optimizer.param_groups:
        inside = {id(p) in adversary for p in group["params"]}
        assert len(inside) == 1
        assert (group["betas"], group.get("scale")) == (((0.5, 0.9), 0.5) if inside == {True} else ((0.9, 0.99), None))
    counted = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in objective.parameters())


class Line(nn.Module):
    """Fits a matrix to the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        return (self.layer(x) - x).square().mean(), {}


def test_training_with_muon_learns_and_follows_the_schedule(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LDM_EDU_DEVICE", "cpu")  # where its batches are
    torch.manual_seed(0)
    rate = dict(steps=60, warmup=5, learning_rate=0.2, optimizer="muon", precision="no")
    settings = replace(Settings(), **rate, log_every=10, save_every=10)
    history = fit(Line(), lambda g: torch.randn(32, 6, generator=g), settings)
    losses = [float(row["loss"]) for row in history.rows]
    assert losses[-1] < 0.1 * losses[0]


def test_unknown_optimisers_are_refused():
    with pytest.raises(UserError, match="adamw or muon.*'sgd'"):
        Settings(optimizer="sgd")
