"""Solutions of notebook 01, perceptual compression. Run this file, and the checks say whether they are right."""

import torch
from torch import Tensor

from ldm_edu.exercises.compression import check_adaptive_weight, check_hinge_loss, check_receptive_field


def hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """½ mean(max(0, 1 - real)) + ½ mean(max(0, 1 + fake)): a scalar.

    The maximum is taken patch by patch, and the mean afterwards: a patch beyond the margin must not make up
    for another.
    """
    real = (1 - real_logits).clamp(min=0).mean()
    fake = (1 + fake_logits).clamp(min=0).mean()
    return (real + fake) / 2


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer_weight: Tensor) -> Tensor:
    """λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-4), both at the decoder's last layer, within 0 and 1e4.

    `retain_graph` leaves the graph for the training step that follows; `detach` makes λ a number to multiply with.
    """
    (pull,) = torch.autograd.grad(reconstruction_loss, last_layer_weight, retain_graph=True)
    (push,) = torch.autograd.grad(adversarial_loss, last_layer_weight, retain_graph=True)
    return (pull.norm() / (push.norm() + 1e-4)).clamp(0, 1e4).detach()


def patch_side(layers: int) -> int:
    """The side in pixels of what one logit sees.

    One place of a layer's output sees 4 of its input. Neighbouring places look `stride` apart, so `side` places in
    a row see (side - 1) · stride + 4. Walking back from the logit, the two layers of stride 1 come first.
    """
    side = 1
    for stride in [1, 1] + [2] * layers:
        side = (side - 1) * stride + 4
    return side


if __name__ == "__main__":
    check_hinge_loss(hinge)
    check_adaptive_weight(adaptive_weight)
    check_receptive_field(patch_side)
