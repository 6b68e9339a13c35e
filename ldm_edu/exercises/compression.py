"""The exercises of notebook 01: hinge loss, adaptive weight, and what a patch discriminator sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_edu.autoencoder import PatchDiscriminator, adaptive_weight, hinge_loss
from ldm_edu.exercises.grading import Answer, ExerciseError, Mistake, grade


def check_hinge_loss(answer: Answer) -> None:
    """Check `answer(real_logits, fake_logits)`, the discriminator's loss: a scalar."""
    draw = torch.Generator().manual_seed(0)
    real, fake = 2 * torch.randn(4, 1, 6, 6, generator=draw), 2 * torch.randn(2, 1, 3, 3, generator=draw)
    cases = [(real, fake), (torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), -3.0)), (0 * fake, 0 * real)]
    mistakes: list[Mistake] = [
        ("you forgot the ½: for a discriminator that says 0 to all it is 1.", lambda x, y: 2 * hinge_loss(x, y)),
        ("real and fake are exchanged: real logits belong above 1, fake ones below -1.", lambda x, y: hinge_loss(y, x)),
        ("the sign of the fake logits: they belong below -1, so their term is max(0, 1 + fake).", lambda x, y:
            hinge_loss(x, -y)),
        ("take max(0, ...): beyond the margin of 1 a logit costs nothing, and earns nothing.", lambda x, y:
            0.5 * ((1 - x).mean() + (1 + y).mean())),
        ("that is the Wasserstein loss; the hinge is max(0, 1 - real) and max(0, 1 + fake).", lambda x, y:
            y.mean() - x.mean()),
        ("take max(0, ...) of each logit, then the mean: you took the mean first.", lambda x, y:
            hinge_loss(x.mean(), y.mean())),
        ("you summed over the patches; take the mean.", lambda x, y: 0.5 * (F.relu(1 - x).sum() + F.relu(1 + y).sum())),
        ("the margin is missing: max(0, 1 - real), not max(0, -real).", lambda x, y: hinge_loss(1 + x, y - 1)),
        ("that is the logistic loss (softplus); the hinge is max(0, 1 - real).", lambda x, y:
            0.5 * (F.softplus(-x).mean() + F.softplus(y).mean())),
        ("that is the autoencoder's term, -mean(fake); asked for is the discriminator's.", lambda x, y: -y.mean()),
    ]  # fmt: skip
    grade("hinge loss", answer, hinge_loss, cases, mistakes)


def check_adaptive_weight(answer: Answer) -> None:
    """Check `answer(reconstruction_loss, adversarial_loss, last_layer_weight)`: λ, a scalar without a gradient."""
    features = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(1))

    def measured(rule: Answer) -> Answer:
        def run(weight: Tensor, pull: float, push: float) -> Tensor:
            restored = F.conv2d(features, weight)
            reconstruction, adversarial = pull * (restored - 0.3).abs().mean(), -push * restored.tanh().mean()
            try:
                found = rule(reconstruction, adversarial, weight)
                torch.autograd.grad(reconstruction + adversarial, weight, retain_graph=True)
            except RuntimeError as error:
                if "second time" not in str(error):
                    raise
                used_up = "your gradients use up the graph, which training still needs: retain_graph=True."
                raise ExerciseError(used_up) from None
            if weight.grad is not None:
                raise ExerciseError(".backward() adds to the weights' .grad; use torch.autograd.grad, which does not.")
            return found if found is None else torch.as_tensor(found, dtype=torch.float32)

        return run

    def variant(power: float = 2, epsilon: float = 1e-4, most: float = 1e4, graph: bool = False) -> Answer:
        def rule(pull: Tensor, push: Tensor, weight: Tensor) -> Tensor:
            both = [torch.autograd.grad(x, weight, retain_graph=True, create_graph=graph)[0] for x in (pull, push)]
            return (both[0].norm(power) / (both[1].norm(power) + epsilon)).clamp(0, most)

        return measured(rule)

    mistakes = [
        ("it is upside down: the gradient of the reconstruction goes above the line.",
         measured(lambda pull, push, weight: adaptive_weight(push, pull, weight))),
        ("you divided the losses; divide the norms of their gradients at the last layer.",
         measured(lambda pull, push, _: (pull / (push + 1e-4)).clamp(0, 1e4).detach())),
        ("the 1e-4 below the line is missing: a discriminator without gradient gives 1/0.", variant(epsilon=0)),
        ("1e-6 is the VQGAN paper's; here it is 1e-4, as in the released code.", variant(epsilon=1e-6)),
        ("clamp it: λ lies between 0 and 1e4.", variant(most=torch.inf)),
        ("take the Euclidean norm of the gradients, not the sum of their absolute values.", variant(power=1)),
        ("λ is a weight, not something to minimise: detach it.", variant(graph=True)),
    ]  # fmt: skip
    cases = [(weight, pull, push) for pull, push in ((1.0, 1.0), (0.1, 2.0), (1.0, 1e-3), (30.0, 0.0))]
    grade("adaptive weight", measured(answer), measured(adaptive_weight), cases, mistakes)


def check_receptive_field(answer: Answer) -> None:
    """Check `answer(layers)`: the side in pixels of what one logit of a PatchGAN with so many strided layers sees.

    All its convolutions are 4×4 with padding 1: `layers` of stride 2, then two of stride 1.
    """

    def walk(strides: list[int], kernel: int = 4) -> int:
        size = 1
        for stride in strides:
            size = (size - 1) * stride + kernel
        return size

    def right(layers: int) -> int:
        return PatchDiscriminator(1, layers).receptive_field

    mistakes: list[Mistake] = [
        ("two convolutions of stride 1 follow the strided ones; you left them out.", lambda n: walk([2] * n)),
        ("two convolutions of stride 1 follow the strided ones; you counted one.", lambda n: walk([1] + [2] * n)),
        ("the last two convolutions have stride 1, not 2.", lambda n: walk([2] * (n + 2))),
        ("the kernels are 4×4, not 3×3.", lambda n: walk([1, 1] + [2] * n, kernel=3)),
        ("walk back from the logit to the picture: stride 1 comes first.", lambda n: walk([2] * n + [1, 1])),
        ("a stride multiplies what lies before it: (size - 1) · stride + 4 a layer.", lambda n: 1 + 3 * (n + 2)),
    ]
    grade("receptive field", answer, right, [(1,), (2,), (3,), (5,)], mistakes)
