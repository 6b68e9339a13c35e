"""What each of several processes does for `test_processes.py`: a short training, then its weights into a file."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from ldm_edu.autoencoder import AutoencoderVQ, FirstStageObjective, PatchDiscriminator, VQConfig
from ldm_edu.training import Settings, fit

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.manual_seed(int(rank))
    discriminator = PatchDiscriminator(8, 1)  # begins otherwise in each; idle for the first steps
    objective = FirstStageObjective(tiny.first_stage().train(), discriminator=discriminator, disc_start=3)
    settings = Settings(steps=6, batch_size=2, warmup=1, log_every=2, save_every=4, precision="no")
    drawn = []

    def pictures(generator: torch.Generator) -> torch.Tensor:
        drawn.append(torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1)
        return drawn[-1]

    fit(objective, pictures, settings, folder / "run")
    weights = {name: weight.detach().clone() for name, weight in objective.named_parameters()}
    # And a codebook, whose idle codes are moved onto latents.
    torch.manual_seed(1)
    config = VQConfig(latent_channels=2, channels=4, channel_multipliers=(1, 2), blocks=1, groups=2, codebook_size=32)
    stage = AutoencoderVQ(config)
    stage.quantizer.restart_after = 2
    fit(FirstStageObjective(stage), pictures, replace(settings, save_every=2), folder / "vq")
    kept = dict(stage.named_parameters()) | dict(stage.named_buffers())
    weights |= {f"vq.{name}": tensor.detach().clone() for name, tensor in kept.items()}
    save_file(weights | {"first batch": drawn[0]}, folder / f"weights-{rank}.safetensors")
