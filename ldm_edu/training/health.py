"""Is this first stage training well? Its readings beside those of our own healthy runs, at the same point of the run.

The bands are no theory: each is what the committed histories of the same kind and factor f stayed in.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ldm_edu import checkpoint
from ldm_edu.autoencoder import FirstStage
from ldm_edu.runtime import REPOSITORY

SEEDS = REPOSITORY / "data" / "sweep"  # histories of further seeds, NAME-seedN.csv
MEANINGS = {
    "psnr": "dB, on training pictures",
    "kl": "KL in nats, divided by the picture's numbers",
    "perplexity": "codes used evenly, in one batch",
    "usage": "share of the codebook chosen in the last 100 steps",
    "latent_std_min": "of the narrowest latent channel",
    "latent_std_max": "of the widest latent channel",
    "perceptual": "LPIPS-style distance",
    "lambda": "the adversarial term's adaptive weight",
    "logits_real": "the discriminator on pictures",
    "logits_fake": "the discriminator on reconstructions",
    "hinge": "the discriminator's loss; 1 is guessing",
}


@dataclass(frozen=True)
class Reading:
    """One reading and the band that healthy runs stayed in."""

    name: str
    value: float
    low: float
    high: float

    @property
    def healthy(self) -> bool:
        """Whether it lies in the band, widened by a tenth of its own width or of its size."""
        slack = 0.1 * max(self.high - self.low, abs(self.high), abs(self.low))
        return self.low - slack <= self.value <= self.high + slack

    def __str__(self) -> str:
        verdict = "" if self.healthy else ("  <- low" if self.value < self.low else "  <- high")
        return f"{self.name:>14} {self.value:9.4g}   healthy {self.low:.4g} to {self.high:.4g}{verdict}"


def check(model: FirstStage, readings: Mapping[str, float], fraction: float) -> list[Reading]:
    """The readings that healthy runs of this kind and f have too, at `fraction` (0 to 1) of the run.

    A reading that depends on the loss (λ, logits) is compared with the runs that had that loss, one of the codebook
    with those that quantised already.
    """
    rows = [row for history in _histories(model.kind, model.f) for row in _near(history, fraction)]
    found = []
    for name in (n for n in MEANINGS if _means_something(n, readings)):
        values = [float(row[name]) for row in rows if _means_something(name, row)]
        if values:
            found.append(Reading(name, readings[name], min(values), max(values)))
    return found


def _means_something(name: str, row: Mapping[str, float | str]) -> bool:
    """Whether a row has this reading; those of the codebook begin where its loss does."""
    return name in row and not (name in ("perplexity", "usage") and float(row.get("codebook", 1)) == 0)


def _histories(kind: str, f: int) -> Iterator[list[dict[str, str]]]:
    for name in checkpoint.names("sweep-"):
        folder = checkpoint.HOME / name
        config = json.loads((folder / "config.json").read_text())
        if config["kind"] != kind or 2 ** (len(config["autoencoder"]["channel_multipliers"]) - 1) != f:
            continue
        for path in [folder / "history.csv", *sorted(SEEDS.glob(f"{name}-seed*.csv"))]:
            with open(path, newline="") as file:
                yield list(csv.DictReader(file))


def _near(history: list[dict[str, str]], fraction: float) -> list[dict[str, str]]:
    """The rows within a tenth of the run around this point of it."""
    last = int(history[-1]["step"])
    return [row for row in history if abs(int(row["step"]) / last - fraction) <= 0.1]
