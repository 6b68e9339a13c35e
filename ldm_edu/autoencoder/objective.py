"""The first stage's objective (equation 25 in appendix G of the paper): reconstruction, regulariser, discriminator.

Convention: every term is a mean, over the picture's C·H·W numbers or over places. The released code sums
reconstruction and KL over them instead, which scales both alike and changes nothing; what goes wrong is to average one
and to sum the other, a factor of C·H·W. (For VQ the released code averages, too.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm_edu.autoencoder.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from ldm_edu.autoencoder.first_stage import FirstStage


class FirstStageObjective(nn.Module):
    """L1 + l2 · L2 + perceptual + regulariser, and after `disc_start` steps λ · disc_weight · adversarial.

    The released code alternates between two optimisers, for the autoencoder and for the discriminator. Here one
    backward pass serves both: the adversarial term reaches only the autoencoder, the hinge loss only the discriminator.

    Args:
        regulariser_weight: of the KL (1e-6 in the paper; the mean convention leaves that number as it is) or of the
            codebook loss (1 in the paper).
        l2_weight: of the squared error beside L1; 0 in the paper.
        perceptual: (images, originals) to a distance `(B,)`; None for pixels alone.
        discriminator: None for no adversarial term.
        disc_start: the first step of the adversarial term.
        disc_warmup: so many steps earlier the discriminator begins to learn, without a say. One that starts from
            nothing pulls the decoder anywhere at first.
    """

    def __init__(
        self,
        model: FirstStage,
        regulariser_weight: float = 1e-6,
        l2_weight: float = 0.0,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        discriminator: PatchDiscriminator | None = None,
        disc_start: int = 0,
        disc_weight: float = 0.5,
        disc_warmup: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.perceptual, self.discriminator = model, perceptual, discriminator
        self.regulariser_weight, self.l2_weight = regulariser_weight, l2_weight
        self.perceptual_weight, self.disc_weight = perceptual_weight, disc_weight
        self.disc_start, self.disc_warmup = disc_start, disc_warmup
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures `(B, 3, H, W)` in [-1, 1] to the loss and the readings worth watching."""
        latent, penalty, readings = self.model.regularised(images, generator)
        restored = self.model.to_picture(latent).float()
        error = restored - images
        reconstruction = error.abs().mean() + self.l2_weight * error.square().mean()
        readings = {"l1": error.detach().abs().mean(), **readings}
        if self.perceptual is not None:
            distance = self.perceptual(restored, images).mean()
            reconstruction = reconstruction + self.perceptual_weight * distance
            readings["perceptual"] = distance.detach()
        loss = reconstruction + self.regulariser_weight * penalty
        if self.discriminator is not None:
            adversarial, more = self._adversarial(reconstruction, restored, images)
            loss = loss + adversarial
            readings |= more
        mse = (restored.detach().clamp(-1, 1) - images).square().mean()
        self.step += 1
        return loss, {**readings, "psnr": 10 * torch.log10(4 / mse)}

    def _adversarial(
        self, reconstruction: Tensor, restored: Tensor, images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both players' terms; zeros before the discriminator's warm-up, and before `disc_start` its own alone."""
        zero = torch.zeros((), device=images.device)
        if self.step < self.disc_start - self.disc_warmup:
            return zero, {"lambda": zero, "logits_real": zero, "logits_fake": zero, "hinge": zero + 1}
        real, fake = self.discriminator(images).float(), self.discriminator(restored.detach()).float()
        hinge, weight, ours = hinge_loss(real, fake), zero, zero
        if self.step >= self.disc_start:
            # Through the discriminator to the picture, and not into its weights.
            fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            fooling = -functional_call(self.discriminator, fixed, restored).float().mean()
            weight = adaptive_weight(reconstruction, fooling, self.model.decoder.conv_out.weight)
            ours = self.disc_weight * weight * fooling
        readings = {"lambda": weight, "logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        return ours + hinge, {**readings, "hinge": hinge.detach()}
