"""Where words look: how much of a word's cross-attention falls into its object's box, over the box's own share.

The boxes are known exactly: true scenes are encoded and noised, and the UNet is called once with their caption.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError, batches, noise, progress
from ldm_edu.unet import attention_maps

WORDS = ("colour", "shape", "both")
TIMESTEPS = (999, 900, 750, 600, 450, 300, 150, 0)
LARGEST_BOX = 0.15  # of the picture: into a larger one much attention falls by chance


class Pairs(NamedTuple):
    """An object's words and a small box of the same scene, `(rows,)` each.

    Args:
        scene: which of the scenes.
        token: where the object's colour stands in the caption, when first named; its shape is the next word.
        box: `(rows, 4)`.
        own: whether the box is that of the object that the words name.
    """

    scene: Tensor
    token: Tensor
    box: Tensor
    own: Tensor


def pairs(model: LatentDiffusion, scenes: ShapeScenes) -> Pairs:
    """Every object's words with every box of its scene under `LARGEST_BOX`."""
    drawn, rows = scenes.scenes(range(len(scenes))), []
    boxes = drawn.boxes().cpu()
    small = (boxes[..., 2:] - boxes[..., :2]).prod(-1) < LARGEST_BOX
    for i, caption in enumerate(scenes.captions(range(len(scenes)), full=True)):
        words = model.conditioner.tokenizer.tokenize(caption)
        for k, thing in enumerate(drawn.things(i)):
            token = list(zip(words, words[1:], strict=False)).index((thing.colour, thing.shape))
            rows += [(i, token, j, j == k) for j in range(int(drawn.count[i])) if small[i, j]]
    scene, token, box, own = torch.tensor(rows, dtype=torch.long).view(-1, 4).unbind(1)
    return Pairs(scene, token, boxes[scene, box], own.bool())


def box_cover(boxes: Tensor, height: int, width: int) -> Tensor:
    """How much of each place of a feature map boxes `(..., 4)` in [0, 1] cover: `(..., height * width)` in [0, 1]."""

    def along(low: Tensor, high: Tensor, count: int) -> Tensor:
        start = torch.arange(count) / count
        return ((high[..., None].minimum(start + 1 / count) - low[..., None].maximum(start)) * count).clamp(min=0)

    left, top, right, bottom = boxes.unbind(-1)
    return (along(top, bottom, height)[..., :, None] * along(left, right, width)[..., None, :]).flatten(-2)


def overlap(weights: Tensor, cover: Tensor) -> Tensor:
    """The share of `weights` (..., places) where `cover` (..., places) is, over that of equal weights: `(...)`."""
    return (weights * cover).sum(-1) / weights.sum(-1) / cover.mean(-1)


@torch.no_grad()
def overlaps(
    model: LatentDiffusion, scenes: ShapeScenes, found: Pairs, timesteps: tuple[int, ...] = TIMESTEPS
) -> dict[str, Tensor]:
    """For each cross-attention `(rows, WORDS, timesteps, heads + 1)`, the last head being the mean of all.

    Equal weights make 1. Picture i has noise of seed i, the same at each timestep.
    """
    index = range(len(scenes))
    z0 = torch.cat([model.to_latent(scenes.images(index[part])) for part in batches(len(scenes), 64)])
    context, draws = model.context(scenes.captions(index, full=True)), noise(z0.shape[1:], index).to(z0)
    place, row = torch.stack([found.token, found.token + 1], 1), found.scene[:, None]
    results: dict[str, list[Tensor]] = {}
    for t in progress(timesteps, desc="attention"):
        time = torch.full((len(z0),), t, device=z0.device)
        with attention_maps(model.unet) as maps:
            model.unet(model.schedule.add_noise(z0, draws, time), time, context)
        for m in maps:
            weights = m.probabilities.cpu().movedim(3, 1)[row, place]  # (rows, 2, heads, places)
            weights = torch.cat([weights, weights.sum(1, keepdim=True)], 1)
            weights = torch.cat([weights, weights.mean(2, keepdim=True)], 2)
            cover = box_cover(found.box, m.height, m.width)[:, None, None]
            results.setdefault(m.layer, []).append(overlap(weights, cover))
    return {layer: torch.stack(ratios, 2) for layer, ratios in results.items()}


def measure_attention(name: str = "shapes-text", captions: int = 512, seed: int = 1) -> dict[str, object]:
    """For each of `WORDS` the overlap in its box, mean over objects and `TIMESTEPS`, in one layer and one head.

    Layer and head (or the mean of the heads) are those of the highest mean on other captions, of seed + 1. With it
    come the deviation between objects and the overlap in the boxes of other objects of the scene.
    """
    if captions < 1 or seed == 0:
        raise UserError(f"Ask for at least one caption, and not of seed 0, which trains: {captions}, seed {seed}.")
    model = LatentDiffusion.load(name)
    sets = [ShapeScenes(64, captions, s) for s in (seed, seed + 1)]
    texts, others = (scenes.captions(range(captions), full=True) for scenes in sets)
    found = [pairs(model, scenes) for scenes in sets]
    measured, choosing = (overlaps(model, scenes, p) for scenes, p in zip(sets, found, strict=True))
    new = torch.tensor([text not in set(texts) for text in others])
    kept, own = found[1].own & new[found[1].scene], found[0].own
    result: dict[str, object] = {}
    for w, word in enumerate(WORDS):
        means = torch.stack([ratios[kept, w].mean((0, 1)) for ratios in choosing.values()])  # (layers, heads + 1)
        layer, head = divmod(int(means.argmax()), means.shape[1])
        layer = list(measured)[layer]
        ratios = measured[layer][:, w, :, head].mean(1)
        result |= {
            word: round(ratios[own].mean().item(), 3), f"{word}_deviation": round(ratios[own].std().item(), 3),
            f"{word}_other_box": round(ratios[~own].mean().item(), 3), f"{word}_layer": layer,
            f"{word}_head": "mean" if head == means.shape[1] - 1 else head,
        }  # fmt: skip
    return result | {"boxes": int(own.sum()), "captions": captions, "seed": seed}
