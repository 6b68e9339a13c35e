"""Section 3.2: the noise schedule, the objective, the samplers, guidance. Knows nothing of images or networks."""

from ldm_edu.diffusion.bound import bits_per_dimension, bound_weights, reverse_variances, variational_bound
from ldm_edu.diffusion.guidance import guided
from ldm_edu.diffusion.oracle import GaussianMixture
from ldm_edu.diffusion.parametrisation import (
    PREDICTIONS,
    alpha_cumprod_at,
    convert,
    half_log_snr,
    snr,
    split_prediction,
    training_target,
)
from ldm_edu.diffusion.samplers import Step, ddim, ddpm, dpm_solver, plms
from ldm_edu.diffusion.schedule import SCHEDULES, Schedule
from ldm_edu.diffusion.spacing import SPACINGS, respaced_betas, spaced_timesteps

__all__ = [
    "PREDICTIONS",
    "SCHEDULES",
    "SPACINGS",
    "GaussianMixture",
    "Schedule",
    "Step",
    "alpha_cumprod_at",
    "bits_per_dimension",
    "bound_weights",
    "convert",
    "ddim",
    "ddpm",
    "dpm_solver",
    "guided",
    "half_log_snr",
    "plms",
    "respaced_betas",
    "reverse_variances",
    "snr",
    "spaced_timesteps",
    "split_prediction",
    "training_target",
    "variational_bound",
]
