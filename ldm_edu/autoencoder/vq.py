"""The first stage with vector quantisation (section 3.1): every latent vector becomes its nearest codebook entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.autoencoder.config import AutoencoderConfig
from ldm_edu.autoencoder.first_stage import FirstStage, spread
from ldm_edu.layers import check_counts


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """An autoencoder with a codebook of |Z| = `codebook_size` vectors of `latent_channels` numbers."""

    latent_channels: int = 3
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    codebook_size: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "codebook_size")


class VectorQuantizer(nn.Module):
    """The codebook Z, and the nearest vector in it.

    Training has two terms (van den Oord et al. 2017, equation 3; sg stops gradients):
    ‖sg[z] - e‖² moves the codebook to the encoder, β ‖z - sg[e]‖² commits the encoder to the codebook.

    Args:
        commitment_weight: β, 0.25.
        legacy: put β on the *codebook* term instead. taming-transformers' `VectorQuantizer2` did so by mistake and
            kept it as its default, so the released VQ first stages were trained that way. Off here: it slows the
            codebook fourfold.

    Two attributes concern training. `restart_after`: steps after which a code that no latent chose is moved; 0 is
    never. `start`: the first step that quantises; before it D gets the latents as they are, and with restarts the
    codes are moved onto them, so that quantising begins with a codebook that lies where the latents lie.
    """

    def __init__(self, size: int, channels: int, commitment_weight: float = 0.25, legacy: bool = False) -> None:
        super().__init__()
        self.commitment_weight, self.legacy = commitment_weight, legacy
        self.restart_after = self.start = 0
        self.codebook = nn.Embedding(size, channels)
        nn.init.uniform_(self.codebook.weight, -1 / size, 1 / size)
        # Training steps: all of them, those since each code was last chosen, and those since it was chosen or moved.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("unused", torch.full((size,), 100), persistent=False)
        self.register_buffer("idle", torch.zeros(size, dtype=torch.int64), persistent=False)

    def codes(self, latent: Tensor) -> Tensor:
        """The index of the nearest vector for each place: `(B, c, h, w)` to `(B, h, w)`, int64."""
        flat = latent.float().permute(0, 2, 3, 1).flatten(0, 2)
        codebook = self.codebook.weight.float()
        # ‖z - e‖² without ‖z‖², which is the same for every e. In float32 whatever the precision around it.
        with torch.autocast(latent.device.type, enabled=False):
            nearest = [
                torch.addmm(codebook.square().sum(1), part, codebook.T, alpha=-2).argmin(1)
                for part in flat.split(16384)
            ]
        return torch.cat(nearest).view(len(latent), *latent.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors of these codes: `(B, h, w)` to `(B, c, h, w)`."""
        return self.codebook(codes).permute(0, 3, 1, 2)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, c, h, w)` to the quantised latent, the loss of both terms (a mean), and the codes `(B, h, w)`.

        The gradient goes straight through: backwards, quantising counts as the identity.
        """
        latent = latent.float()
        codes = self.codes(latent)
        quantized = self.lookup(codes)
        to_codebook, to_encoder = F.mse_loss(quantized, latent.detach()), F.mse_loss(latent, quantized.detach())
        if self.legacy:
            loss = self.commitment_weight * to_codebook + to_encoder
        else:
            loss = to_codebook + self.commitment_weight * to_encoder
        return latent + (quantized - latent).detach(), loss, codes

    @torch.no_grad()
    def restart_dead_codes(self, latent: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Count idle steps; move codes that idled for `restart_after` onto latents of this batch, drawn at random.

        Of several processes, a code idles if no batch chose it, and all move it to where the first does.
        """
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        chosen = torch.zeros_like(self.idle)
        chosen[codes.flatten()] = 1
        if several:
            torch.distributed.all_reduce(chosen, torch.distributed.ReduceOp.MAX)
        for count in (self.unused, self.idle):
            count.add_(1).mul_(1 - chosen)
        dead = (self.idle >= self.restart_after).nonzero().flatten()
        if self.restart_after and len(dead):
            flat = latent.detach().permute(0, 2, 3, 1).flatten(0, 2)
            dead = dead[: len(flat)]  # no latent twice
            drawn = torch.randperm(len(flat), generator=generator)[: len(dead)].to(flat.device)
            moved = flat[drawn].to(self.codebook.weight)
            if several:
                torch.distributed.broadcast(moved, 0)
            self.codebook.weight[dead] = moved
            self.idle[dead] = 0


def perplexity(codes: Tensor, size: int) -> Tensor:
    """exp of the entropy of the codes' frequencies: how many codes are used evenly, 1 to `size`.

    At most the number of codes given, so a perplexity read off a small batch says little about a large codebook.
    """
    share = torch.bincount(codes.flatten(), minlength=size).float() / max(codes.numel(), 1)
    return torch.special.entr(share).sum().exp()


def usage(codes: Tensor, size: int) -> float:
    """The share of the codebook that occurs among these codes, 0 to 1."""
    return len(codes.unique()) / size


class AutoencoderVQ(FirstStage):
    """Encoder, codebook, decoder. The latent is the one *before* quantisation; the decoder quantises first.

    So a diffusion model works on continuous vectors, and small errors of it disappear in the codebook.
    """

    kind = "autoencoder-vq"
    config_class = VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config, encoder_channels=config.latent_channels)
        self.quantizer = VectorQuantizer(config.codebook_size, config.latent_channels)

    def encode(self, images: Tensor) -> Tensor:
        """The latent before quantisation: `(B, c, H/f, W/f)`."""
        return self.moments(images).float()

    def decode(self, latent: Tensor) -> Tensor:
        """The picture `(B, 3, H, W)` of the nearest codes; values can leave [-1, 1] slightly."""
        return self.decode_codes(self.quantizer.codes(latent))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """The picture of these codes `(B, h, w)`."""
        return self.to_picture(self.quantizer.lookup(codes))

    def regularised(
        self, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The quantised latent and the quantiser's loss."""
        latent, quantizer = self.encode(images), self.quantizer
        if quantizer.steps < quantizer.start:
            quantized, loss, codes = latent, latent.new_zeros(()), torch.empty(0, dtype=torch.int64)
        else:
            quantized, loss, codes = quantizer(latent)
        quantizer.restart_dead_codes(latent, codes, generator)
        quantizer.steps += 1
        readings = {"codebook": loss.detach(), **spread(latent)}
        if len(codes):  # it quantises
            readings["perplexity"] = perplexity(codes, self.config.codebook_size)
            readings["usage"] = (quantizer.unused < 100).float().mean()
        return quantized, loss, readings
