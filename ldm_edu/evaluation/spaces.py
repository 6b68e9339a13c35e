"""Pixels against latents (section 4.1, figures 6 and 7): what samples are worth, and how fast they are drawn.

    python -m ldm_edu.evaluation.spaces runs/pixels-64/checkpoint runs/latents-64/checkpoint ...

With `--samples FILE` it draws the picture of samples instead, a row for each checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_edu.autoencoder import PerceptualNetwork
from ldm_edu.datasets.images import contact_sheet, write_png
from ldm_edu.datasets.reader import agrees, read_scenes
from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.evaluation.comparison import frechet_distance
from ldm_edu.evaluation.faithfulness import drawn, wanted_things
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError, progress


def measure(model: LatentDiffusion, pictures: int = 128, seed: int = 1, batch_size: int = 16) -> dict[str, Any]:
    """Draw scenes of one object from their captions, and compare with the true scenes.

    25 DDIM steps, guidance 3, bfloat16 where the device is fast in it. The scenes are none of the training's; their
    captions are: of one object there is not enough to say.

    Returns:
        "faithful" (share of pictures with the shape, colour and size of the caption), "readable" (share with one
        object of any kind), "shape", "colour" and "size" (share of the readable in which it is right; None if none is
        readable), "frechet" (`frechet_distance` to the true scenes), "frechet_floor" (that of as many other true
        scenes), "pictures_per_second" (drawn and decoded), "pictures" and "scenes_seed" (of the captions; picture i
        is drawn from seed i).

    Raises:
        UserError: no picture, or seed 0, which makes the training scenes.
    """
    if pictures < 1 or seed == 0:
        raise UserError(f"Ask for at least one picture, and not of seed 0, which trains: {pictures}, seed {seed}.")
    size = model.latent_size * model.first_stage.f
    scenes, others = (ShapeScenes(size, count=pictures, seed=s, objects=(1, 1)) for s in (seed, seed + 1))
    captions, began = scenes.captions(range(pictures), full=True), time.perf_counter()
    with progress(total=pictures, desc="drawing") as bar:
        images = drawn(model, captions, range(pictures), batch_size, bar)
    seconds = time.perf_counter() - began
    readings = read_scenes(images)
    wanted = wanted_things(scenes)
    right = sum(map(agrees, readings, wanted))
    read = [(r.things[0], w[0]) for r, w in zip(readings, wanted, strict=True) if len(r.things) == 1]
    true, other = (list(each.images(range(pictures)).cpu()) for each in (scenes, others))
    judge = PerceptualNetwork.load("perceptual-judge")
    return {
        "faithful": right / pictures,
        "readable": len(read) / pictures,
        **{
            name: fmean(getattr(seen, name) == getattr(asked, name) for seen, asked in read) if read else None
            for name in ("shape", "colour", "size")
        },
        "frechet": frechet_distance(true, list(images), judge),
        "frechet_floor": frechet_distance(true, other, judge),
        "pictures_per_second": pictures / seconds,
        "pictures": pictures,
        "scenes_seed": seed,
    }


def rows_of_samples(models: Sequence[LatentDiffusion], count: int = 8) -> Tensor:
    """The same captions and seeds drawn by each model, a row each, on one picture `(3, H, W)` in [-1, 1].

    Captions as in `measure`, 25 DDIM steps, guidance 3, single precision.
    """
    captions, rows = ShapeScenes(64, count=128, seed=1, objects=(1, 1)).captions(range(count), full=True), []
    for model in progress(models, desc="drawing"):
        images = model.sample(captions, seeds=list(range(count)), precision="float32")
        rows.append(contact_sheet(images, columns=count, gap=0))
    width = max(row.shape[-1] for row in rows)
    return torch.cat([F.pad(row, (0, width - row.shape[-1]), value=1.0) for row in rows], dim=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ldm_edu.evaluation.spaces")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--samples", metavar="FILE", type=Path, help="draw a picture of samples instead of measuring")
    arguments = parser.parse_args()
    if arguments.samples:
        write_png(arguments.samples, rows_of_samples([LatentDiffusion.load(f) for f in arguments.checkpoints]))
    else:
        for folder in arguments.checkpoints:
            print(json.dumps({"checkpoint": str(folder), **measure(LatentDiffusion.load(folder))}), flush=True)
