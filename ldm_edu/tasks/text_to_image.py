"""Text to image: many prompts and seeds, a few pictures at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import batches, progress


def draw(
    model: LatentDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
) -> Tensor:
    """A picture for each prompt, from its seed: `(len(prompts), 3, H, W)` in [-1, 1]. With a progress bar a batch.

    Raises:
        UserError: as `LatentDiffusion.steps`.
    """
    images = []
    for part in batches(len(prompts), 16):
        stream = model.steps(prompts[part], num_steps, guidance_scale, seeds[part], sampler)
        for step in progress(stream, total=num_steps + 1, desc="denoising"):
            last = step
        images.append(model.to_image(last.z))
    return torch.cat(images)


def file_name(place: int, prompt: str, seed: int) -> str:
    """Of the picture of the prompt at this place: 00-a-red-circle-seed7.png."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
    return f"{place:02d}-{words}-seed{seed}.png"
