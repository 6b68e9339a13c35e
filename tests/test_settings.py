"""The settings of a training: what they refuse, and the command that a model card makes of them."""

import math
import re

import pytest
from short_run import SHORT, Line, three_numbers

from ldm_edu import training
from ldm_edu.runtime import UserError
from ldm_edu.training import Settings, fit, override
from ldm_edu.training.card import model_card
from ldm_edu.training.diffusion import DiffusionSettings
from ldm_edu.training.first_stage import FirstStageSettings


def test_a_number_is_a_number_and_counts_are_whole():
    settings = DiffusionSettings(condition_dropout=0, weight_decay=0, learning_rate=1e-3, warmup=0)
    assert settings.condition_dropout == settings.weight_decay == 0
    FirstStageSettings(kl_weight=0, disc_weight=0, perceptual_weight=1)
    for changes, words in (
        ({"steps": 1.5}, "steps must be a whole number, at least 1; it is 1.5"), ({"steps": "3"}, "steps .*'3'"),
        ({"ema_decay": "0.9"}, "ema_decay must be a number, at least 0; it is '0.9'"), ({"warmup": -1}, "warmup .*-1"),
        ({"weight_decay": math.nan}, "weight_decay .*nan"), ({"beta1": -0.1}, "beta1 .*-0.1"),
        ({"gradient_clip": 0}, "gradient_clip is 0, so nothing would be trained"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            Settings(**changes)


def test_the_command_in_a_card_says_what_was_changed():
    plain = training.recipes.get("sweep-kl-f4-gan").SETTINGS
    for size, changes in (("cpu", {}), ("cpu", {"steps": "20", "disc_start": "5"}), ("gpu", {"seed": "7"})):
        chosen = override(plain[size], changes)
        card = model_card("sweep-kl-f4-gan", "", chosen, fit(Line(), three_numbers, SHORT), Line())
        _, _, name, *sets = re.search("Command: `(.*)`", card)[1].split()
        assert name == "sweep-kl-f4-gan" and sets == [x for pair in changes.items() for x in ("--set", "=".join(pair))]
