"""Where words look: how much of a word's cross-attention falls into its object's box, over the box's own share.

The boxes are known exactly: true scenes are encoded and noised, and the UNet is called once with their caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_edu.datasets.captions import SIZES, Thing
from ldm_edu.datasets.shapes import RADII, SHAPE_NAMES, ShapeScenes
from ldm_edu.datasets.signed_distance import UNIT_BOXES
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


def pairs(
    model: LatentDiffusion, captions: Sequence[str], things: Sequence[Sequence[Thing]], boxes: Tensor | None = None
) -> Pairs:
    """Every object that its caption names with every box of its scene under `LARGEST_BOX`.

    Args:
        things: of each scene, as drawn, or as read from a picture.
        boxes: `(B, objects, 4)`, of the things; by default as `box_of` sees them.
    """
    rows: list[tuple[int, int, bool]] = []
    found: list[Tensor] = []
    for i, (caption, here) in enumerate(zip(captions, things, strict=True)):
        words = model.conditioner.tokenizer.encode(caption).tokens
        named = list(zip(words, words[1:], strict=False))
        its_boxes = [box_of(thing) for thing in here] if boxes is None else boxes[i, : len(here)].cpu().unbind()
        for thing in here:
            for other, box in zip(here, its_boxes, strict=True):
                if (thing.colour, thing.shape) in named and (box[2:] - box[:2]).prod() < LARGEST_BOX:
                    rows.append((i, named.index((thing.colour, thing.shape)), other is thing))
                    found.append(box)
    scene, token, own = torch.tensor(rows, dtype=torch.long).view(-1, 3).unbind(1)
    return Pairs(scene, token, torch.stack(found) if found else torch.zeros(0, 4), own.bool())


def true_pairs(model: LatentDiffusion, scenes: ShapeScenes) -> Pairs:
    """The pairs of all `scenes`, with their full captions and exact boxes."""
    index = range(len(scenes))
    drawn = scenes.scenes(index)
    return pairs(model, scenes.captions(index, full=True), [drawn.things(i) for i in index], drawn.boxes())


def box_of(thing: Thing) -> Tensor:
    """The box `(4,)` of an object that was read from a picture, as if it had its size's middle radius (within 5 %)."""
    centre, radius = torch.tensor([thing.x, thing.y] * 2), RADII[SIZES.index(thing.size)]
    return centre + UNIT_BOXES[SHAPE_NAMES.index(thing.shape)] * radius


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


class Overlaps(NamedTuple):
    """`ratios` (layers, rows, WORDS, timesteps, heads + 1), the last head being the mean of all; the layers' names."""

    ratios: Tensor
    layers: list[str]


@torch.no_grad()
def overlaps(
    model: LatentDiffusion,
    scenes: ShapeScenes,
    found: Pairs,
    timesteps: tuple[int, ...] = TIMESTEPS,
    other_picture: bool = False,
) -> Overlaps:
    """The overlap of each of `true_pairs`. Equal weights make 1. Picture i has noise of seed i at every timestep.

    Args:
        other_picture: each caption gets the picture of the scene before. What is left of the overlap is what words
            know without looking: "above", say, already tells where.

    Raises:
        UserError: a timestep that the model's schedule does not have.
    """
    if not 0 <= min(timesteps) <= max(timesteps) < model.schedule.T:
        raise UserError(f"The model's timesteps are 0 to {model.schedule.T - 1}; these are {timesteps}.")
    index = range(len(scenes))
    z0 = torch.cat([model.to_latent(scenes.images(index[part])) for part in batches(len(scenes), 64)])
    z0 = z0.roll(int(other_picture), 0)
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
    return Overlaps(torch.stack([torch.stack(r, 2) for r in results.values()]), list(results))


def best(ratios: Tensor) -> list[tuple[int, int]]:
    """For each of `WORDS` the layer and the head of the highest mean over rows and timesteps."""
    means = ratios.mean((1, 3))  # (layers, WORDS, heads + 1)
    return [divmod(int(of_word.argmax()), of_word.shape[1]) for of_word in means.unbind(1)]


def measure_attention(name: str = "shapes-text", captions: int = 512, seed: int = 1) -> dict[str, object]:
    """For each of `WORDS` the overlap in its box, mean over objects and `TIMESTEPS`, in one layer and one head.

    Layer and head (or the mean of the heads) are the `best` on other captions, of seed + 1. With them come the
    deviation between objects, the overlap in the boxes of other objects of the scene, and the mean at each timestep;
    both means also with the picture of another scene.
    """
    if captions < 2 or seed == 0:
        raise UserError(f"Ask for at least two captions, and not of seed 0, which trains: {captions}, seed {seed}.")
    model = LatentDiffusion.load(name)
    here, others = ShapeScenes(64, captions, seed), ShapeScenes(64, captions, seed + 1)
    texts = set(here.captions(range(captions), full=True))
    new = torch.tensor([text not in texts for text in others.captions(range(captions), full=True)])
    found, choosing = true_pairs(model, here), true_pairs(model, others)
    chosen_from = choosing.own & new[choosing.scene]
    if found.own.sum() < 2 or found.own.all() or not chosen_from.any():
        raise UserError(
            f"The {captions} captions of seed {seed}, or those of seed {seed + 1}, name too few small objects: ask for "
            "more captions."
        )
    chosen = best(overlaps(model, others, choosing).ratios[:, chosen_from])
    ratios, layers = overlaps(model, here, found)
    blind = overlaps(model, here, found, other_picture=True).ratios[:, found.own].mean(1)
    result: dict[str, object] = {}
    for word, (layer, head), of_word, of_blind in zip(WORDS, chosen, ratios.unbind(2), blind.unbind(1), strict=True):
        mean, without = of_word[layer, :, :, head].mean(1), of_blind[layer, :, head]
        own, other = mean[found.own], mean[~found.own]
        by_timestep = {"": of_word[layer, found.own, :, head].mean(0), "other_picture_": without}
        result |= {
            word: round(own.mean().item(), 3), f"{word}_deviation": round(own.std().item(), 3),
            f"{word}_other_box": round(other.mean().item(), 3),
            f"{word}_other_picture": round(without.mean().item(), 3), f"{word}_layer": layers[layer],
            f"{word}_head": "mean" if head == ratios.shape[-1] - 1 else head,
        }  # fmt: skip
        for which, values in by_timestep.items():
            result[f"{word}_{which}by_timestep"] = {
                t: round(value, 3) for t, value in zip(TIMESTEPS, values.tolist(), strict=True)
            }
    return result | {"boxes": int(found.own.sum()), "captions": captions, "seed": seed}
