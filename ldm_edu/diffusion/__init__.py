"""Section 3.2: the noise schedule, the objective, the samplers, guidance. Knows nothing of images or networks."""

from ldm_edu.diffusion.guidance import guided
from ldm_edu.diffusion.parametrisation import PREDICTIONS, split_prediction, training_target
from ldm_edu.diffusion.samplers import Step, ddim, ddpm, spaced_timesteps
from ldm_edu.diffusion.schedule import SCHEDULES, Schedule

__all__ = [
    "PREDICTIONS",
    "SCHEDULES",
    "Schedule",
    "Step",
    "ddim",
    "ddpm",
    "guided",
    "spaced_timesteps",
    "split_prediction",
    "training_target",
]
