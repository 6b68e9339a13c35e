"""First stage on real photographs: f = 4, four latent channels, KL."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm_edu.autoencoder import AutoencoderKL
from ldm_edu.datasets.folder import ImageFolder
from ldm_edu.datasets.public import PublicSet
from ldm_edu.runtime import data_folder, pick_device
from ldm_edu.training.first_stage import FirstStageSettings, train_first_stage
from ldm_edu.training.fit import OnStep

NAME = "photos-kl-f4"
ABOUT = """First stage (section 3.1 of the paper) for photographs: f = 4, four latent channels, KL. The training starts
from the weights of shapes-kl-f4, to save time; how much that saves was not measured.

Data: the training pictures of Caltech-101 (L. Fei-Fei, R. Fergus, P. Perona, CVPR Workshop 2004; the collection is
tagged CC BY 4.0, the photographs come from the web and their individual rights are not cleared: their copyright stays
with their owners), without pictures of identifiable people and protected characters, at 128 pixels, in random crops
and mirrored. No picture of it is part of this project. With a network the set comes by itself; a folder
`caltech101/train` under `$LDM_EDU_DATA` is used first.
Licence of the weights: MIT, as for the rest of this project; it covers no photograph."""

SETTINGS = {
    "cpu": FirstStageSettings(
        steps=2000, batch_size=16, learning_rate=2e-3, ema_decay=0.998, kl_weight=1e-4, l2_weight=5.0, save_every=250
    ),
    "gpu": FirstStageSettings(
        steps=40_000, batch_size=64, learning_rate=1e-3, ema_decay=0.9995, kl_weight=1e-4, l2_weight=5.0,
        save_every=5000,
    ),
}  # fmt: skip


def photographs(side: int = 128) -> Tensor:
    """The training pictures, uint8 `(N, 3, side, side)`."""
    folder = data_folder() / "caltech101" / "train"
    if folder.is_dir():
        return ImageFolder(folder, side, check=False).as_tensor_cache()
    return PublicSet("caltech101", side).as_tensor_cache()[0]


def train(
    settings: FirstStageSettings, out: Path | None, resume: bool = False, on_step: OnStep | None = None
) -> AutoencoderKL:
    """Train it; see `train_first_stage`."""
    pictures, device = photographs(), pick_device()

    def get_images(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (count,), generator=generator).tolist()
        corners = torch.randint(
            pictures.shape[-1] - settings.size + 1, (count, 2), generator=generator
        ).tolist()
        crops = [
            pictures[i, :, top : top + settings.size, left : left + settings.size]
            for i, (top, left) in zip(chosen, corners, strict=True)
        ]
        mirrored = torch.rand(count, generator=generator) < 0.5
        crops = [crop.flip(-1) if flip else crop for crop, flip in zip(crops, mirrored, strict=True)]
        return torch.stack(crops).to(device).float() / 127.5 - 1

    start = AutoencoderKL.load("shapes-kl-f4")
    return train_first_stage(NAME, start.config, settings, get_images, ABOUT, out, resume, on_step, start)
