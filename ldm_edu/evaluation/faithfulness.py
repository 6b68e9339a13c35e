"""Caption faithfulness: how many samples show exactly what their caption says, counted with `read_scenes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_edu.datasets.captions import Thing, describe, leave_open
from ldm_edu.datasets.reader import agrees, read_scenes
from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError, batches, fast_precision, progress

GROUPS = {
    "one": dict(objects=(1, 1)),
    "two": dict(objects=(2, 2)),
    "three": dict(objects=(3, 3)),
    "no_sizes": dict(objects=(2, 2)),
    "no_colours": dict(objects=(2, 2)),
    "held_out": dict(objects=(1, 1), held_out="only"),
}
OPEN = {"no_sizes": dict(sizes=True), "no_colours": dict(colours=0b11)}  # what the captions do not say


def faithfulness(
    model: LatentDiffusion,
    captions: int = 512,
    seed: int = 1,
    num_steps: int = 25,
    guidance_scale: float = 3.0,
    batch_size: int = 64,
) -> dict[str, object]:
    """The share of samples with every object, colour, shape, size and relation as in the caption.

    Scenes come from a seed that training never used. Beside "one", "two" and "three" objects, two whose sizes or
    colours the captions leave open ("no_sizes", "no_colours") and pairs of shape and colour that training left out
    ("held_out") stand the "ceiling" (true pictures of two objects, through the first stage and back) and "shuffled"
    (the samples of "two" against each other's captions: chance).

    Args:
        captions: how many in each group; in "no_colours" fewer, since two objects of one shape need their colours.

    Returns:
        {"faithfulness": {group: share, None if there was nothing to ask}, "captions": captions, "seed": seed}

    Raises:
        UserError: fewer than two captions.
    """
    if captions < 2:
        raise UserError(f"The number of captions must be at least 2; it is {captions}.")
    if seed == 0:
        raise UserError("Seed 0 makes the training scenes; evaluate with another one (1 by default).")
    options = dict(num_steps=num_steps, guidance_scale=guidance_scale)
    shares: dict[str, float | None] = dict.fromkeys((*GROUPS, "ceiling", "shuffled"))
    bar = progress(total=len(GROUPS) * captions, desc="sampling")
    for group, arguments in GROUPS.items():
        scenes = ShapeScenes(64, count=captions, seed=seed, **arguments)
        wanted, texts, seeds = wanted_things(scenes), scenes.captions(range(captions), full=True), range(captions)
        if group in OPEN:
            wanted = [leave_open(things, **OPEN[group]) for things in wanted]
            texts = [describe(things, (i, 0, i, 0), full=True) for i, things in enumerate(wanted)]
        if group == "no_colours":
            seeds = [i for i in seeds if wanted[i][0].colour is None]
            wanted, texts = ([of_all[i] for i in seeds] for of_all in (wanted, texts))
            bar.total -= captions - len(seeds)
        if not seeds:
            continue
        images = drawn(model, texts, seeds, batch_size, bar, **options)
        shares[group] = share(images, wanted)
        if group == "two":
            shares["shuffled"] = share(images, wanted[1:] + wanted[:1])
            shares["ceiling"] = share(_reconstructed(model, scenes), wanted)
    bar.close()
    return {"faithfulness": shares, "captions": captions, "seed": seed}


def drawn(
    model: LatentDiffusion, captions: Sequence[str], seeds: Sequence[int], batch_size: int, bar: tqdm, **options: Any
) -> Tensor:
    """A picture for each caption, from its seed; in bfloat16 where the device is fast in it.

    Args:
        bar: moves on by a place for each picture.
        options: further ones of `LatentDiffusion.steps`.
    """
    precision, images = fast_precision(model.device), []
    for part in batches(len(captions), batch_size):
        images.append(model.sample(captions[part], seeds=list(seeds[part]), precision=precision, **options))
        bar.update(len(captions[part]))
    return torch.cat(images)


def wanted_things(scenes: ShapeScenes) -> list[tuple[Thing, ...]]:
    """What each scene's picture should show."""
    shown = scenes.scenes(range(len(scenes)))
    return [shown.things(i) for i in range(len(scenes))]


def share(images: Tensor, wanted: list[tuple[Thing, ...]]) -> float:
    """The share of pictures in which everything is read as wanted."""
    right = [agrees(reading, things) for reading, things in zip(read_scenes(images), wanted, strict=True)]
    return round(sum(right) / len(right), 4)


@torch.no_grad()
def _reconstructed(model: LatentDiffusion, scenes: ShapeScenes) -> Tensor:
    parts = [scenes.images(range(b.start, b.stop)) for b in batches(len(scenes), 64)]
    return torch.cat([model.to_image(model.to_latent(part)) for part in parts])
