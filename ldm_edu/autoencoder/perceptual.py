"""A perceptual distance: how far apart two pictures are in the features of a network that learned to see.

This is the recipe of LPIPS (Zhang et al., CVPR 2018, equation 1), with a small network of our own and without weights
fitted to human judgements, so it is called LPIPS-style and never LPIPS. The paper's own loss, LPIPS with VGG16, comes
with `lpips_vgg` where there is a network to fetch its weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu import checkpoint
from ldm_edu.runtime import UserError


@dataclass(frozen=True)
class PerceptualConfig:
    """The network's shape: two 3×3 convolutions a stage, each stage at half the resolution of the one before."""

    widths: tuple[int, ...] = (16, 32, 64, 128)
    image_channels: int = 3


class PerceptualNetwork(nn.Module):
    """A small VGG: pictures to feature maps at several resolutions. Trained to tell 97 kinds of photograph apart.

    Args:
        batch_norm: a batch norm after each convolution, for training; `folded` takes them out again.
    """

    kind = "perceptual"

    def __init__(self, config: PerceptualConfig, batch_norm: bool = False) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList()
        width = config.image_channels
        for next_width in config.widths:
            steps: list[nn.Module] = []
            for in_channels in (width, next_width):
                steps.append(nn.Conv2d(in_channels, next_width, 3, padding=1))
                steps += [nn.BatchNorm2d(next_width)] if batch_norm else []
                steps.append(nn.ReLU())
            self.stages.append(nn.Sequential(*steps))
            width = next_width

    def forward(self, images: Tensor) -> list[Tensor]:
        """Pictures `(B, 3, H, W)` in [-1, 1] to one feature map `(B, width, H/2^i, W/2^i)` a stage i."""
        features, x = [], images
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)
            features.append(x)
        return features

    def folded(self) -> PerceptualNetwork:
        """The same network in evaluation, its batch norms multiplied into the convolutions before them."""
        plain = PerceptualNetwork(self.config)
        for own, new in zip(self.stages, plain.stages, strict=True):
            for conv, norm, target in zip(own[::3], own[1::3], new[::2], strict=True):
                fused = nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval())
                target.load_state_dict(fused.state_dict())
        return plain.eval()

    def save(self, folder: Path | str, card: str, history: str | None = None) -> None:
        """Write a checkpoint, whole or not at all."""
        config = {"kind": self.kind, "network": asdict(self.config)}
        checkpoint.write(folder, config, self.state_dict(), card, history)

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """A checkpoint by name or folder, in evaluation mode, on the CPU.

        Raises:
            UserError: none there, damaged, or of another kind.
        """
        folder = checkpoint.find(name)
        config, tensors = checkpoint.read(folder, kind=cls.kind)
        with checkpoint.settings_of(folder):
            network = cls(checkpoint.build(PerceptualConfig, config["network"], folder))
        checkpoint.fill(network, tensors, folder)
        return network.eval()


class _Yardstick(nn.Module):
    """A distance by a network that stays as it is.

    Its weights are frozen, but gradients flow *through* it to the pictures: under `torch.no_grad` the loss would be a
    constant and teach nothing.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """The network stays in evaluation: it is no pupil."""
        return super().train(False)


class PerceptualLoss(_Yardstick):
    """The squared difference of a `PerceptualNetwork`'s unit feature vectors, averaged over places and stages.

    (LPIPS-style.) The weights are frozen; gradients flow through the network to the pictures.
    """

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Two batches of pictures `(B, 3, H, W)` in [-1, 1] to their distances `(B,)`, 0 to 2."""
        with torch.no_grad():
            target = self.network(originals)
        distance = torch.zeros(len(images), device=images.device)
        for one, other in zip(self.network(images), target, strict=True):
            difference = _unit(one.float()) - _unit(other.float())
            distance = distance + difference.square().sum(dim=1).mean(dim=(1, 2))
        return distance / len(target)


def _unit(features: Tensor) -> Tensor:
    """Each place's feature vector brought to length 1; near-zero vectors stay near zero."""
    return features * (features.square().sum(dim=1, keepdim=True) + 1e-4).rsqrt()


class _LPIPS(_Yardstick):
    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        return self.network(images, originals).flatten()


def lpips_vgg() -> nn.Module:
    """LPIPS with VGG16, the paper's perceptual loss; used like `PerceptualLoss`. torchvision fetches the weights.

    Raises:
        UserError: the weights (528 MB) are not here and cannot be fetched.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return _LPIPS(LearnedPerceptualImagePatchSimilarity(net_type="vgg").net)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"The weights of VGG16 cannot be fetched ({error}). On a computer with a network, torchvision puts them "
            "into ~/.cache/torch/hub/checkpoints; copy them there. Or use our own network: perceptual=ours."
        ) from error
