"""Small first stages on photographs, alike but for one thing: the factor f, the regulariser, a loss, the KL weight.

    sweep-kl-f2 ... sweep-kl-f16, sweep-vq-f2 ... sweep-vq-f16    L1 + perceptual
    sweep-kl-f4-l1                   L1 alone
    sweep-kl-f4-gan                  sweep-kl-f4, trained on with the adversarial term
    sweep-kl-f4-more                 sweep-kl-f4, trained on for as long without it: the fair comparison
    sweep-kl-f4-w1e-3, ...           another weight of the KL term
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ldm_edu.autoencoder import AutoencoderConfig, FirstStage, VQConfig
from ldm_edu.training.first_stage import FirstStageSettings, train_first_stage
from ldm_edu.training.fit import OnStep
from ldm_edu.training.photographs import ABOUT as DATA
from ldm_edu.training.photographs import recoloured_crops

# As wide as a checkpoint of 1 MiB allows. More latent channels than in the paper's table 8 (2, 3, 4, 8): to pack
# colours into as few as those, networks must train for far longer.
MULTIPLIERS = {2: (1, 2), 4: (1, 2, 3), 8: (1, 1, 2, 3), 16: (1, 1, 1, 1, 3)}
CHANNELS = {2: 4, 4: 4, 8: 8, 16: 16}
CODEBOOK = {2: 16384, 4: 16384, 8: 8192, 16: 4096}  # at high f, fewer latents to learn from, each a longer vector
KL_WEIGHTS = ("1e-3", "1e-1")

# The adversarial term comes last, as in the paper, whose discriminator waits for 50,000 steps: on a first stage that
# still makes gross mistakes it teaches nothing else. A third of these steps is the discriminator's warm-up.
MORE = {"start": "sweep-kl-f4", "learning_rate": 2e-3}  # for three fifths of the steps

SETTINGS = {
    "cpu": FirstStageSettings(
        steps=1500, batch_size=8, optimizer="muon", learning_rate=4e-3, ema_decay=0.995, perceptual="ours",
        restart_after=100, save_every=500,
    ),
    "gpu": FirstStageSettings(
        steps=20_000, batch_size=32, optimizer="muon", learning_rate=4e-3, ema_decay=0.999, perceptual="ours",
        restart_after=100, save_every=2500,
    ),
}  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, object]]]:
    """Every name of the sweep, and the settings that it changes."""
    yield from ((f"sweep-{kind}-f{f}", {}) for kind in ("kl", "vq") for f in MULTIPLIERS)
    yield "sweep-kl-f4-l1", {"perceptual": "none"}
    yield "sweep-kl-f4-gan", MORE | {"disc_weight": 0.3}
    yield "sweep-kl-f4-more", MORE
    yield from ((f"sweep-kl-f4-w{weight}", {"kl_weight": float(weight)}) for weight in KL_WEIGHTS)


@dataclass(frozen=True)
class Recipe:
    """One of them, used as a recipe's module is."""

    NAME: str
    changes: dict[str, object]

    @property
    def ABOUT(self) -> str:
        """What the model card says."""
        more = "\nIt is sweep-kl-f4, trained on." if "start" in self.changes else ""
        return f"""One of the small first stages of the comparison of KL with VQ and of the losses (section 3.1 of the
paper), alike but for what the name says: {"VQ" if "vq" in self.NAME else "KL"}, f = {self.config.f}.{more}

{DATA}"""

    @property
    def SETTINGS(self) -> dict[str, FirstStageSettings]:
        """The sizes."""
        found = {}
        for size, settings in SETTINGS.items():
            steps = settings.steps * 3 // 5 if "start" in self.changes else settings.steps
            third = dict.fromkeys(("vq_start", "disc_start", "disc_warmup"), steps // 3)
            found[size] = replace(settings, steps=steps, **third, **self.changes)
        return found

    @property
    def config(self) -> AutoencoderConfig:
        """The model's shape."""
        _, kind, f, *_ = self.NAME.split("-")
        shape = dict(
            latent_channels=CHANNELS[int(f[1:])],
            channels=16,
            channel_multipliers=MULTIPLIERS[int(f[1:])],
            blocks=1,
            groups=2,
        )
        return VQConfig(**shape, codebook_size=CODEBOOK[int(f[1:])]) if kind == "vq" else AutoencoderConfig(**shape)

    def train(
        self, settings: FirstStageSettings, out: Path | None, resume: bool = False, on_step: OnStep | None = None
    ) -> FirstStage:
        """Train it; see `train_first_stage`."""
        crops = recoloured_crops(settings.size)
        return train_first_stage(self.NAME, self.config, settings, crops, self.ABOUT, out, resume, on_step)


RECIPES = {name: Recipe(name, changes) for name, changes in variants()}
