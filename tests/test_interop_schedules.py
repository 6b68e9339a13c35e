"""diffusers' noise schedules in ours and back, and worded refusals of the rest."""

import json

import pytest
import torch

from ldm_edu.diffusion import Schedule
from ldm_edu.interop import schedule_from_diffusers, schedule_to_diffusers
from ldm_edu.runtime import UserError

# Stable Diffusion 1's scheduler/scheduler_config.json.
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
SCHEDULES = [
    (Schedule(), "eps"), (Schedule("linear", 200, 1e-4, 0.02), "x0"), (Schedule("cosine", 500, 0.0, 0.999), "v"),
]  # fmt: skip


@pytest.mark.parametrize("schedule, prediction", SCHEDULES, ids=[s.kind for s, _ in SCHEDULES])
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_both_ways_with_diffusers(schedule: Schedule, prediction: str, name: str):
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, of the extra [test]")
    kind = getattr(diffusers, name)
    if name == "PNDMScheduler" and prediction == "x0":
        prediction = "eps"  # it has no other but v
    config = schedule_to_diffusers(schedule, prediction)
    theirs = kind(**config)
    assert config.items() <= dict(theirs.config).items()
    back, answer = schedule_from_diffusers(json.loads(theirs.to_json_string()))
    assert back.config() == schedule.config() and answer == prediction
    ours, other = back.alphas_cumprod, theirs.alphas_cumprod.double()  # single precision, as diffusers computes
    assert len(ours) == len(other) and ((ours - other).abs() <= 1e-4 * ours + 1e-7).all()
    assert (torch.from_numpy(back.betas.numpy()) - theirs.betas).abs().max() < 1e-6


def test_stable_diffusions_own_schedule():
    schedule, prediction = schedule_from_diffusers(STABLE_DIFFUSION)
    assert schedule.config() == Schedule().config() and prediction == "eps"
    assert (STABLE_DIFFUSION | schedule_to_diffusers(schedule)).items() >= STABLE_DIFFUSION.items()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"beta_schedule": "sigmoid"}, "'scaled_linear'.*not 'sigmoid'"), ({"beta_schedule": None}, "not None"),
        ({"prediction_type": "flow_prediction"}, "'v_prediction', not 'flow_prediction'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"), ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_start": 0.5}, "start=0.5, end=0.012"), ({"beta_end": "much"}, "incomplete or wrong"),
    ],
)  # fmt: skip
def test_a_schedule_of_diffusers_that_does_not_fit_is_named(change: dict, words: str):
    with pytest.raises(UserError, match=words):
        schedule_from_diffusers(STABLE_DIFFUSION | change)


def test_a_schedule_that_diffusers_does_not_have_is_not_exported():
    with pytest.raises(UserError, match="0.999; this one's is 0.9"):
        schedule_to_diffusers(Schedule("cosine", 10, 0.0, 0.9))
    with pytest.raises(UserError, match="predicts 'score'"):
        schedule_to_diffusers(Schedule(), "score")
