"""The patch discriminator, its hinge loss, and the adaptive weight λ (Esser et al. 2021; appendix G of the paper)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for each patch of the picture, high where the patch looks real.

    Args:
        channels: width of the first layer, doubled by each next one up to eightfold; 64 in the paper.
        layers: convolutions of stride 2; 3 in the paper (2 for its VQ models with f = 8 and 16).
    """

    def __init__(self, channels: int = 64, layers: int = 3, image_channels: int = 3) -> None:
        super().__init__()
        self.layers = layers
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        steps: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            steps.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False))
            steps += [nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2)]
        self.network = nn.Sequential(*steps, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @property
    def receptive_field(self) -> int:
        """The side in pixels of the patch that one logit sees: 70 for three layers, 34 for two, 16 for one."""
        size = 1
        for stride in [1, 1] + [2] * self.layers:
            size = (size - 1) * stride + 4
        return size

    def forward(self, images: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` to logits `(B, 1, h, w)`."""
        return self.network(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ mean(max(0, 1 - real)) + ½ mean(max(0, 1 + fake)): the discriminator's loss, from its logits.

    1 for a discriminator that says 0 to everything, 0 for one that tells all apart by a margin of 1.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-4), within 0 and 1e4, both gradients at D's last layer.

    So both terms pull on the decoder equally hard, whatever the discriminator's scale. (The paper's appendix G; the
    released code has 1e-4 where the VQGAN paper has 1e-6.)

    Args:
        reconstruction, adversarial: the two scalar losses.
        last_layer: the weight of the decoder's last convolution.
    """
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (pull / (push + 1e-4)).clamp(0.0, 1e4).detach()
