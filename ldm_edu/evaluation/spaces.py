"""Pixels against latents (section 4.1, figures 6 and 7): what samples are worth, and how fast they are drawn.

    python -m ldm_edu.evaluation.spaces runs/pixels-64/checkpoint runs/latents-64/checkpoint ...
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from ldm_edu.autoencoder import PerceptualNetwork
from ldm_edu.datasets.reader import agrees, read_scenes
from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.evaluation.comparison import frechet_distance
from ldm_edu.evaluation.faithfulness import wanted_things
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import batches, has_fast_bfloat16, progress


def measure(model: LatentDiffusion, pictures: int = 128, seed: int = 1, batch_size: int = 16) -> dict[str, Any]:
    """Draw scenes of one object from captions that training never used, and compare with the true scenes.

    25 DDIM steps, guidance 3, bfloat16 where the device is fast in it.

    Returns:
        "faithful" (share of pictures with the shape, colour and size of the caption), "readable" (share with one
        object of any kind), "frechet" (`frechet_distance` to the true scenes), "pictures_per_second" (drawn and
        decoded), "pictures" and "sampling_seed".
    """
    scenes = ShapeScenes(model.latent_size * model.first_stage.f, count=pictures, seed=seed, objects=(1, 1))
    captions, parts, began = scenes.captions(range(pictures), full=True), [], time.perf_counter()
    precision = "bfloat16" if has_fast_bfloat16(model.device) else "float32"
    for part in progress(list(batches(pictures, batch_size)), desc="drawing"):
        seeds = list(range(pictures)[part])
        parts.append(model.sample(captions[part], seeds=seeds, precision=precision))
    seconds, images = time.perf_counter() - began, torch.cat(parts)
    readings = read_scenes(images)
    right = sum(map(agrees, readings, wanted_things(scenes)))
    true = scenes.images(range(pictures)).cpu()
    return {
        "faithful": right / pictures,
        "readable": sum(len(reading.things) == 1 for reading in readings) / pictures,
        "frechet": frechet_distance(list(true), list(images), PerceptualNetwork.load("perceptual-judge")),
        "pictures_per_second": pictures / seconds,
        **{"pictures": pictures, "sampling_seed": seed},
    }


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(json.dumps({"checkpoint": folder, **measure(LatentDiffusion.load(folder))}), flush=True)
