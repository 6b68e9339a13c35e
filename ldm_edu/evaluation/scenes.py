"""ShapeScenes themselves: how fast they are drawn, and how often they are read back right."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from ldm_edu.autoencoder import FirstStage
from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.evaluation.faithfulness import share, wanted_things
from ldm_edu.evaluation.reconstruction import reconstruct
from ldm_edu.runtime import batches, pick_device, progress


def measure_scenes(count: int = 1000, seed: int = 1, first_stage: str = "shapes-kl-f4") -> dict[str, float | int]:
    """Draw `count` scenes of 64×64 pixels, and read them as drawn and as reconstructed.

    Returns:
        "pictures_per_second" (median over batches of 250), "read" and "read_reconstructed" (shares of scenes wholly
        right: every object, colour, shape, size and relation), "count", "seed".
    """
    device = pick_device()
    stage = FirstStage.load(first_stage).to(device)
    scenes = ShapeScenes(64, count=count, seed=seed, device=device)
    scenes.images(range(min(count, 250)))  # warm
    speeds, pictures, copies = [], [], []
    for part in progress(list(batches(count, 250)), desc="scenes"):
        index = range(part.start, part.stop)
        began = perf_counter()
        pictures.append(scenes.images(index).cpu())
        speeds.append(len(index) / (perf_counter() - began))
        copies.append(reconstruct(stage, pictures[-1].to(device)).cpu())
    wanted = wanted_things(scenes)
    shares = {"read": share(torch.cat(pictures), wanted), "read_reconstructed": share(torch.cat(copies), wanted)}
    return {"pictures_per_second": round(median(speeds)), **shares, "count": count, "seed": seed}
