"""ShapeScenes themselves: how fast they are drawn, and how often they are read back right."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from ldm_edu.autoencoder import FirstStage
from ldm_edu.datasets.reader import agrees, read_scenes
from ldm_edu.datasets.shapes import ShapeScenes
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
    speeds, right, right_after = [], 0, 0
    for part in progress(list(batches(count, 250)), desc="scenes"):
        index = range(part.start, part.stop)
        began = perf_counter()
        images = scenes.images(index).cpu()
        speeds.append(len(images) / (perf_counter() - began))
        right += _right(scenes, index, images)
        right_after += _right(scenes, index, reconstruct(stage, images.to(device)).cpu())
    shares = {"read": right / count, "read_reconstructed": right_after / count}
    return {"pictures_per_second": round(median(speeds)), **shares, "count": count, "seed": seed}


def _right(scenes: ShapeScenes, index: range, images: Tensor) -> int:
    drawn = scenes.scenes(torch.tensor(index))
    return sum(agrees(reading, drawn.things(i)) for i, reading in enumerate(read_scenes(images)))
