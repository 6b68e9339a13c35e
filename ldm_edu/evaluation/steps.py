"""Samplers against numbers of steps: how many pictures show what their caption says."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from time import perf_counter
from typing import NamedTuple

from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.evaluation.faithfulness import drawn, share, wanted_things
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError, fast_precision, progress
from ldm_edu.training.card import hardware


class Setting(NamedTuple):
    """One way to sample; see `LatentDiffusion.steps`."""

    sampler: str
    num_steps: int
    spacing: str = "trailing"
    eta: float = 0.0


SETTINGS = (
    *(Setting(name, n) for name in ("ddim", "ddpm", "dpm-solver") for n in (5, 8, 12, 25, 50)),
    *(Setting("plms", n) for n in (5, 8, 12, 16, 20, 25, 50)),
    *(Setting("ddim", n, spacing) for spacing in ("uniform", "quadratic") for n in (5, 8, 25)),
    *(Setting("plms", n, "uniform") for n in (12, 25, 50)),
    *(Setting("ddim", n, eta=0.5) for n in (8, 25)),
)


def measure_samplers(
    model: LatentDiffusion,
    captions: int = 64,
    seeds: Sequence[int] = (1, 2, 3),
    settings: Sequence[Setting] = SETTINGS,
    guidance_scale: float = 3.0,
    batch_size: int = 64,
) -> dict[str, object]:
    """The share of faithful pictures of two objects for each setting and seed, as in `faithfulness`.

    A seed stands for scenes of its own and for noise of its own, the same for every setting: so settings are compared
    in pairs.

    Args:
        captions: how many for each seed.
        seeds: none of them 0, which made the training scenes.

    Returns:
        {"rows": [{"sampler", "num_steps", "spacing", "eta", "faithful": [share for each seed]}], and beside it how it
        was measured: captions, seeds, guidance_scale, precision, hardware, minutes}

    Raises:
        UserError: fewer than one caption, or seed 0.
    """
    if captions < 1:
        raise UserError(f"The number of captions must be at least 1; it is {captions}.")
    if 0 in seeds:
        raise UserError("Seed 0 makes the training scenes; evaluate with others (1, 2 and 3 by default).")
    faithful: list[list[float]] = [[] for _ in settings]
    bar = progress(total=len(seeds) * len(settings) * captions, desc="sampling")
    began = perf_counter()
    for seed in seeds:
        scenes = ShapeScenes(64, count=captions, seed=seed, objects=(2, 2))
        texts, wanted = scenes.captions(range(captions), full=True), wanted_things(scenes)
        for shares, setting in zip(faithful, settings, strict=True):
            first = seed * 1_000_000 % (2**32 - captions)
            noise_seeds = range(first, first + captions)
            images = drawn(
                model, texts, noise_seeds, batch_size, bar, guidance_scale=guidance_scale, **setting._asdict()
            )
            shares.append(share(images, wanted))
            bar.set_postfix_str(f"seed {seed}, {' '.join(map(str, setting))}: {shares[-1]}")
    bar.close()
    rows = [setting._asdict() | {"faithful": shares} for setting, shares in zip(settings, faithful)]
    return {
        "captions": captions,
        "seeds": list(seeds),
        "guidance_scale": guidance_scale,
        "precision": fast_precision(model.device),
        "hardware": hardware(),
        "minutes": round((perf_counter() - began) / 60, 1),
        "rows": rows,
    }


def evaluate(name: str, captions: int, seed: int) -> dict[str, object]:
    """`measure_samplers` of a checkpoint, from this seed and the next two."""
    return measure_samplers(LatentDiffusion.load(name), captions, range(seed, seed + 3))


def table(measured: dict) -> str:
    """What `measure_samplers` returned, in words: mean ± standard deviation over the seeds."""
    lines = [f"{'sampler':<11} {'spacing':<10} eta {'steps':>5}  faithful"]
    for row in measured["rows"]:
        mean, spread = fmean(row["faithful"]), stdev(row["faithful"]) if len(row["faithful"]) > 1 else 0.0
        setting = f"{row['sampler']:<11} {row['spacing']:<10} {row['eta']:<3} {row['num_steps']:>5}"
        lines.append(f"{setting}  {mean:6.1%} ± {spread:.1%}")
    lines.append(
        f"{measured['captions']} captions a seed, seeds {measured['seeds']}, {measured['minutes']} minutes"
    )
    return "\n".join(lines)
