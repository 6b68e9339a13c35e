"""How good a model is: reconstructions of a first stage, and faithfulness of samples to their captions."""

from ldm_edu.evaluation.reconstruction import pad_to_multiple, psnr, reconstruct, ssim

__all__ = ["pad_to_multiple", "psnr", "reconstruct", "ssim"]
