"""What the network predicts: the noise ε (the paper), the clean latent x0, or the velocity v; each gives the others.

In all functions `alpha_cumprod` is ᾱ as one number, or shaped to multiply z, `(B, 1, 1, 1)` (see `Schedule.at`). Those
that take a z raise UserError for an ᾱ of fewer dimensions, such as `(B,)`, which would multiply something else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_edu.runtime import UserError

PREDICTIONS = ("eps", "x0", "v")


def training_target(prediction: str, z0: Tensor, noise: Tensor, alpha_cumprod: Tensor | float) -> Tensor:
    """What the network should answer at z_t = √ᾱ z_0 + √(1-ᾱ) ε.

    "eps": ε (equation 1 of the paper); "x0": z_0; "v": √ᾱ ε - √(1-ᾱ) z_0 (Salimans and Ho 2022, appendix D).
    """
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return z0
    if prediction == "v":
        signal, sigma = _roots(alpha_cumprod, z0)
        return signal * noise - sigma * z0
    raise UserError(f"A model predicts one of {', '.join(PREDICTIONS)}, not {prediction!r}.")


def split_prediction(
    prediction: str, output: Tensor, z: Tensor, alpha_cumprod: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise (x0, ε) that the network's answer at z_t means."""
    signal, sigma = _roots(alpha_cumprod, z)
    if prediction == "eps":
        return (z - sigma * output) / signal, output
    if prediction == "x0":
        return output, (z - signal * output) / sigma
    if prediction == "v":
        return signal * z - sigma * output, sigma * z + signal * output
    raise UserError(f"A model predicts one of {', '.join(PREDICTIONS)}, not {prediction!r}.")


def convert(output: Tensor, z: Tensor, alpha_cumprod: Tensor | float, given: str, wanted: str) -> Tensor:
    """The same answer at z_t in other words: each of "eps", "x0", "v", "score" as any other.

    The score, the gradient of log q(z_t), is -ε / √(1-ᾱ) (Song et al. 2021, "Score-based generative modeling").
    Between ε and z_0 one side is divided by √ᾱ or √(1-ᾱ), so an error grows at one end of the schedule.
    """
    _, sigma = _roots(alpha_cumprod, z)
    if given == "score":
        given, output = "eps", -sigma * output
    z0, noise = split_prediction(given, output, z, alpha_cumprod)
    return -noise / sigma if wanted == "score" else training_target(wanted, z0, noise, alpha_cumprod)


def snr(alpha_cumprod: Tensor | float) -> Tensor:
    """The signal-to-noise ratio ᾱ / (1-ᾱ), of variances (appendix B of the paper)."""
    level = _tensor(alpha_cumprod)
    return level / (1 - level)


def half_log_snr(alpha_cumprod: Tensor | float) -> Tensor:
    """λ = ½ log SNR = log(√ᾱ / √(1-ᾱ)), the time in which DPM-Solver takes its steps (Lu et al. 2022)."""
    return 0.5 * snr(alpha_cumprod).log()


def alpha_cumprod_at(half_log_snr: Tensor | float) -> Tensor:
    """ᾱ at λ = ½ log SNR: the way back, for schedules in continuous time."""
    return (2 * _tensor(half_log_snr)).sigmoid()


def _tensor(number: Tensor | float) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)


def _roots(alpha_cumprod: Tensor | float, z: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1-ᾱ), of one ᾱ or of one for each row of z."""
    level = _tensor(alpha_cumprod)
    if level.numel() > 1 and level.ndim < z.ndim:
        raise UserError(
            f"ᾱ is one number, or shaped to multiply z {tuple(z.shape)}, as Schedule.at(t, z) gives it; "
            f"it is {tuple(level.shape)}."
        )
    return level.sqrt(), (1 - level).sqrt()
