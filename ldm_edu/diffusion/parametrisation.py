"""What the network predicts: the noise ε (the paper), the clean latent x0, or the velocity v; each gives the others."""

from __future__ import annotations

from torch import Tensor

from ldm_edu.runtime import UserError

PREDICTIONS = ("eps", "x0", "v")


def training_target(prediction: str, z0: Tensor, noise: Tensor, alpha_cumprod: Tensor) -> Tensor:
    """What the network should answer at z_t = √ᾱ z_0 + √(1-ᾱ) ε.

    "eps": ε (equation 1 of the paper); "x0": z_0; "v": √ᾱ ε - √(1-ᾱ) z_0 (Salimans and Ho 2022, appendix D).
    """
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return z0
    if prediction == "v":
        return alpha_cumprod.sqrt() * noise - (1 - alpha_cumprod).sqrt() * z0
    raise UserError(f"A model predicts one of {', '.join(PREDICTIONS)}, not {prediction!r}.")


def split_prediction(
    prediction: str, output: Tensor, z: Tensor, alpha_cumprod: Tensor
) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise (x0, ε) that the network's answer at z_t means."""
    signal, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    if prediction == "eps":
        return (z - sigma * output) / signal, output
    if prediction == "x0":
        return output, (z - signal * output) / sigma
    if prediction == "v":
        return signal * z - sigma * output, sigma * z + signal * output
    raise UserError(f"A model predicts one of {', '.join(PREDICTIONS)}, not {prediction!r}.")
