"""The checks of the exercises: each takes the right solution, and names the mistake of each wrong one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graded import refusals
from torch import Tensor
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence

from ldm_edu.autoencoder import VectorQuantizer
from ldm_edu.exercises.compression import check_adaptive_weight, check_hinge_loss, check_receptive_field
from ldm_edu.exercises.regularisers import check_gaussian_kl, check_straight_through, check_vq_loss

CHECKS = {
    check_hinge_loss: "hinge loss",
    check_adaptive_weight: "adaptive weight",
    check_receptive_field: "receptive field",
    check_gaussian_kl: "Gaussian KL",
    check_straight_through: "straight-through",
    check_vq_loss: "VQ loss",
}


# The right solutions, written as a learner would: with nothing of the package.


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    return (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2


def weight(
    rec: Tensor, adv: Tensor, last: Tensor, norm: Callable = torch.linalg.norm, eps: float = 1e-4, most: float = 1e4,
    **options: bool,
) -> Tensor:  # fmt: skip
    options = {"retain_graph": True} | options
    (a,), (b,) = grad(rec, last, **options), grad(adv, last, **options)
    return torch.clamp(norm(a) / (norm(b) + eps), max=most)


def by_backward(rec: Tensor, adv: Tensor, last: Tensor) -> float:
    norms = []
    for loss in (rec, adv):
        last.grad = None
        loss.backward(retain_graph=True)
        norms.append(last.grad.norm())
    return min((norms[0] / (norms[1] + 1e-4)).item(), 1e4)


def field(layers: int) -> int:
    size, step = 1, 1
    for stride in [2] * layers + [1, 1]:
        size, step = size + 3 * step, step * stride
    return size


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return kl_divergence(Normal(mean, logvar.exp().sqrt()), Normal(0.0, 1.0)).sum((1, 2, 3))


def kl_terms(mean: Tensor, logvar: Tensor) -> Tensor:
    return mean**2 + logvar.exp() - logvar - 1


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    distances = (z[:, None] - codebook[None, :, :, None, None]).square().sum(2)
    return codebook[distances.argmin(1)].permute(0, 3, 1, 2)


def straight(z: Tensor, codebook: Tensor) -> Tensor:
    return z + (nearest(z, codebook) - z).detach()


def along(z: Tensor, vectors: Tensor) -> Tensor:
    return z + (vectors - z).detach()


def vq(z: Tensor, e: Tensor, beta: float) -> Tensor:
    return ((z.detach() - e) ** 2).mean() + beta * ((z - e.detach()) ** 2).mean()


def rows(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def quantizer_output(z: Tensor, codebook: Tensor) -> Tensor:
    quantizer = VectorQuantizer(*codebook.shape)
    quantizer.codebook.weight.data.copy_(codebook)
    return quantizer(z)[0]


@pytest.mark.parametrize(
    "check, answer",
    [
        (check_hinge_loss, hinge), (check_adaptive_weight, weight), (check_receptive_field, field),
        (check_adaptive_weight, lambda *a: weight(*a).item()), (check_gaussian_kl, kl),
        (check_gaussian_kl, lambda m, v: kl_terms(m, v).flatten(1).sum(1) / 2), (check_straight_through, straight),
        (check_straight_through, quantizer_output), (check_vq_loss, vq),
        (check_receptive_field, lambda n: torch.tensor(field(n))),
        (check_receptive_field, lambda n: torch.tensor(float(field(n)), requires_grad=True)),
        (check_receptive_field, lambda n: np.int64(field(n))),
    ],
)  # fmt: skip
def test_a_right_solution_passes(check: Callable, answer: Callable, capsys: pytest.CaptureFixture):
    assert check(answer) is None
    assert capsys.readouterr().out == f"ok: {CHECKS[check]}\n"


HINGE = {
    "forgot the ½": lambda x, y: F.relu(1 - x).mean() + F.relu(1 + y).mean(),
    "exchanged": lambda x, y: hinge(y, x),
    "sign of the fake": lambda x, y: 0.5 * (F.relu(1 - x).mean() + F.relu(1 - y).mean()),
    "take max": lambda x, y: (1 - x.mean() + 1 + y.mean()) / 2,
    "Wasserstein": lambda x, y: y.mean() - x.mean(),
    "mean first": lambda x, y: 0.5 * (F.relu(1 - x.mean()) + F.relu(1 + y.mean())),
    "summed over the patches": lambda x, y: (F.relu(1 - x).sum() + F.relu(1 + y).sum()) / 2,
    "margin is missing": lambda x, y: (F.relu(-x).mean() + F.relu(y).mean()) / 2,
    "logistic": lambda x, y: (F.softplus(-x).mean() + F.softplus(y).mean()) / 2,
    "autoencoder's term": lambda x, y: -y.mean(),
    "is a float, not a tensor": lambda x, y: hinge(x, y).item(),
    "real does not get the gradient": lambda x, y: hinge(x.detach(), y),
    "fake does not get the gradient": lambda x, y: hinge(x, y.detach()),
    "is 5; it should be": lambda x, y: hinge(x, y) * 0 + 5,
    "is nan; it should be": lambda x, y: hinge(x, y) * torch.nan,
    r"shape \(4, 1, 6, 6\); it should be \(\)": lambda x, y: x,
}
WEIGHT = {
    "upside down": lambda a, b, w: weight(b, a, w),
    "divided the losses": lambda a, b, w: (a / (b + 1e-4)).clamp(0, 1e4).detach(),
    "the 1e-4 below the line is missing": lambda a, b, w: weight(a, b, w, eps=0),
    "1e-6 is the VQGAN": lambda a, b, w: weight(a, b, w, eps=1e-6),
    "clamp it": lambda a, b, w: weight(a, b, w, most=float("inf")),
    "Euclidean": lambda a, b, w: weight(a, b, w, norm=lambda g: g.abs().sum()),
    "detach it": lambda a, b, w: weight(a, b, w, create_graph=True),
    "use up the graph.*retain_graph": lambda a, b, w: weight(a, b, w, retain_graph=False),
    "retain_graph=True": lambda a, b, w: grad(a, w, retain_graph=True)[0].norm() / grad(b, w)[0].norm(),
    r"\.grad": by_backward,
    "for pull = 1.0, push = 1.0 is 1; it should be": lambda a, b, w: torch.ones(()),
}
FIELD = {
    "left them out": lambda n: 3 * 2**n - 2,
    "counted one": lambda n: 6 * 2**n - 2,
    "stride 1, not 2": lambda n: 3 * 2 ** (n + 2) - 2,
    "4×4, not 3×3": lambda n: 6 * 2**n - 1,
    "stride 1 comes first": lambda n: 3 * 2**n - 2 + 6,
    "multiplies": lambda n: 1 + 3 * (n + 2),
    "for layers = 1 is 0; it should be 16": lambda n: 0,
    "None": lambda n: None,
}
KL = {
    "averaged over the latent": lambda m, v: kl_terms(m, v).mean((1, 2, 3)) / 2,
    "averaged over everything": lambda m, v: kl_terms(m, v).mean() / 2,
    "summed over the batch": lambda m, v: kl_terms(m, v).sum() / 2,
    "averaged over the batch": lambda m, v: kl(m, v).mean(),
    "forgot the ½": lambda m, v: kl_terms(m, v).sum((1, 2, 3)),
    "sign": lambda m, v: 0.5 * (1 + v - m.pow(2) - v.exp()).sum((1, 2, 3)),
    "forgot the -1": lambda m, v: 0.5 * (m**2 + v.exp() - v).sum((1, 2, 3)),
    "enters squared": lambda m, v: 0.5 * (m + v.exp() - v - 1).sum((1, 2, 3)),
    "not σ²": lambda m, v: 0.5 * (m**2 + v - 1 - torch.log(v)).sum((1, 2, 3)),
    "not log σ:": lambda m, v: 0.5 * (m**2 + v.exp() ** 2 - 1 - 2 * v).sum((1, 2, 3)),
    "standard deviation": lambda m, v: 0.5 * (m**2 + v.exp().sqrt() - 1 - v).sum((1, 2, 3)),
    "posterior comes first": lambda m, v: kl_divergence(
        Normal(torch.zeros(()), torch.ones(())), Normal(m, (v / 2).exp())).sum((1, 2, 3)),
    r"shape \(3, 2, 4, 5\); it should be \(3,\)": kl_terms,
    "logvar does not get the gradient": lambda m, v: kl(m, v.detach()),
}  # fmt: skip
THROUGH = {
    "does not reach the encoder": nearest,
    "not reach the encoder": lambda z, e: nearest(z, e.detach()),
    "argmin has none": lambda z, e: z + (nearest(z, e) - z),
    "detach the difference, not the latent": lambda z, e: z.detach() + (nearest(z, e) - z),
    "not the latent": lambda z, e: z.detach() + (nearest(z, e).detach() - z),
    "moves the codebook too": lambda z, e: nearest(z, e) + (z - z.detach()),
    "other way round": lambda z, e: nearest(z, e) + (z - nearest(z, e)).detach(),
    "nearest codebook vectors": lambda z, e: z,
    "these are the codes": lambda z, e: torch.cdist(rows(z), e).argmin(1).view(len(z), *z.shape[2:]),
    "dot product": lambda z, e: along(z, e[(z.movedim(1, 3) @ e.T).argmax(3)].permute(0, 3, 1, 2)),
    "farthest": lambda z, e: along(z, e[torch.cdist(z.permute(0, 2, 3, 1), e).argmax(3)].permute(0, 3, 1, 2)),
    "channels last": lambda z, e: along(z, e[torch.cdist(z.reshape(-1, 3), e).argmin(1)].reshape(z.shape)),
    "channels back": lambda z, e: along(z, e[torch.cdist(rows(z), e).argmin(1)].reshape(z.shape)),
    r"shape \(2, 4, 5, 3\)": lambda z, e: e[torch.cdist(z.movedim(1, 3), e).argmin(3)],
    "stops with RuntimeError": lambda z, e: e[torch.cdist(z, e).argmin(1)],
    "latent does not get the gradient": lambda z, e: straight(z, e) + z - z.detach(),
}
VQ = {
    "historical mistake": lambda z, e, b: b * F.mse_loss(z.detach(), e) + F.mse_loss(z, e.detach()),
    "nothing is detached": lambda z, e, b: F.mse_loss(z, e) + b * F.mse_loss(z, e),
    "commitment term is missing": lambda z, e, b: F.mse_loss(z.detach(), e),
    "codebook term is missing": lambda z, e, b: b * F.mse_loss(z, e.detach()),
    "β is missing": lambda z, e, b: vq(z, e, 1.0),
    "on both terms": lambda z, e, b: b * vq(z, e, 1.0),
    "you summed": lambda z, e, b: vq(z, e, b) * z.numel(),
    "commitment_weight = 0.25": lambda z, e, b: vq(z, e, 0.5),
}
test_a_wrong_solution_is_refused_in_words, test_what_a_learner_leaves_undone_is_refused_in_words = refusals(
    CHECKS, (HINGE, WEIGHT, FIELD, KL, THROUGH, VQ)
)
