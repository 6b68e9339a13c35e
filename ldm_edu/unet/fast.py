"""What only makes sampling faster: K and V of the prompt kept from step to step, and the network compiled."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from ldm_edu.layers.attention import Attention, KeyValue
from ldm_edu.unet.transformer import TransformerBlock
from ldm_edu.unet.unet import UNet


def keys_and_values(unet: UNet, context: Tensor) -> dict[Attention, KeyValue]:
    """What the cross-attentions make of a context `(B, M, d)`; the UNet takes it in the context's place."""
    blocks = (module for module in unet.modules() if isinstance(module, TransformerBlock))
    return {block.cross_attention: block.cross_attention.project(context) for block in blocks}


def compile_options(device: torch.device) -> dict[str, Any]:
    """For `torch.compile`, of a network whose weights stay as they are."""
    how = {"options": {"freezing": True}} if device.type == "cpu" else {"mode": "reduce-overhead"}
    return {"dynamic": False, **how}


class Denoiser:
    """`(z, t, context) -> prediction` for the many calls of a sampling loop, without gradients.

    As long as it gets the same context, its K and V are computed once. Compiled, it works on a copy of the weights:
    on a CPU they become constants of the compiled program, reordered for its matrix units; on a GPU the kernels of a
    call are recorded in CUDA graphs. The first call with a new shape then takes up to a minute or two. Where the
    compiler fails, a warning says why, and the calls run as they would have without it.

    Args:
        dtype: of the compiled network's weights and activations.
    """

    def __init__(self, unet: UNet, compiled: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.unet, self._network, self._context = unet, unet, None
        if compiled:
            device = next(unet.parameters()).device
            self.unet = copy.deepcopy(unet).eval().requires_grad_(False).to(dtype)
            if device.type == "cuda":
                self.unet = self.unet.to(memory_format=torch.channels_last)
            self._network = torch.compile(self.unet, **compile_options(device))
        self._versions = versions(unet)

    def is_of(self, unet: UNet) -> bool:
        """Whether the weights are still those of `unet`, not trained on or replaced since."""
        return self._versions == versions(unet)

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """`z` (B, c, h, w), `t` (B,), `context` (B, M, d): the prediction, in single precision."""
        dtype = self.unet.conv_in.weight.dtype
        if context is not None and context is not self._context:
            self._context, self._kept = context, keys_and_values(self.unet, context.to(dtype))
        kept = None if context is None else self._kept
        try:
            output = self._network(z.to(dtype), t, kept)
        except Exception as error:
            if self._network is self.unet:
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"Sampling without the compiler, which failed: {reason[0]}", stacklevel=2)
            self._network = self.unet
            output = self.unet(z.to(dtype), t, kept)
        return output.float().clone()  # the next call of a CUDA graph writes to the same memory


def versions(unet: UNet) -> list[tuple[int, int, torch.device]]:
    """Which weights these are: changes when they are trained, loaded or moved."""
    return [(id(p), p._version, p.device) for p in unet.parameters()]
