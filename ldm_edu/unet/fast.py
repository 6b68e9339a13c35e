"""What only makes sampling faster.

K and V of the prompt kept from step to step, what several conditions share computed once, and the network compiled.
"""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm_edu.layers.attention import Attention, Context, KeyValue
from ldm_edu.unet.transformer import TransformerBlock
from ldm_edu.unet.unet import UNet

NUMBERS = itertools.count()
ONE_AT_A_TIME = threading.Lock()
OURS = ("ldm_edu.unet.", "ldm_edu.layers.", "torch.nn.")  # where the parts come from that take K and V for a context


def keys_and_values(unet: UNet, context: Tensor) -> dict[Attention, KeyValue]:
    """What the cross-attentions make of a context `(B, M, d)`; the UNet takes it in the context's place.

    Of a context `(k * B, M, d)`, the UNet makes k predictions for each of B latents, those of the first B rows first:
    `(k * B, c, h, w)`. What it computes before its first cross-attention is the same for all k, and is computed once.
    """
    blocks = (module for module in unet.modules() if isinstance(module, TransformerBlock))
    return {block.cross_attention: block.cross_attention.project(context) for block in blocks}


def compiled(network: nn.Module) -> Callable[..., Any]:
    """The network by torch.compile, for inputs of one shape, and weights that will not change any more.

    On a CPU the weights become constants of the program, laid out for its matrix units, the fastest kernel for each
    matrix product is looked for, and the kernels are called from C++, not from Python. On a GPU the kernels of a call
    are recorded in a CUDA graph. Calls are made without checking that the modules are still the same.
    """

    def forward(*arguments: Any, **named: Any) -> Any:
        return network(*arguments, **named)

    # Programs are kept with a function's code, and whose weights are in them is what is not checked. So each network
    # gets code of its own: with the class's, the next one would be answered by the first one's program.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{next(NUMBERS)}")
    guards = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if next(network.parameters()).device.type != "cpu":
        return torch.compile(forward, dynamic=False, options={"triton.cudagraphs": True, **guards})
    from torch._inductor import config as inductor  # takes seconds to import

    program = torch.compile(forward, dynamic=False, options=guards)

    def call(*arguments: Any, **named: Any) -> Any:
        # Settings of the compiler that it reads outside the reach of `options`, too. The last two keep it quiet.
        with inductor.patch(
            freezing=True, max_autotune=True, cpp_wrapper=True,
            autotune_num_choices_displayed=0, max_autotune_report_choices_stats=False,
        ):  # fmt: skip
            return program(*arguments, **named)

    return call


def has_hooks(network: nn.Module) -> bool:
    """Whether anything listens to its calls, as `attention_maps` does."""
    return any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


class Denoiser:
    """`(z, t, context) -> prediction` for the many calls of a sampling loop, without gradients.

    As long as it gets the same context, its K and V are computed once; so is what its predictions with several contexts
    have in common (see `keys_and_values`), which hooks then hear of once. A network of your own, or with a part that
    is, is given the context itself.

    Compiled (see `compiled`), it works on a copy of the weights, and the first call with a new shape takes a minute or
    several. Where the compiler fails, a warning says why, and the calls run as they would have without it; so do they
    where the network has hooks, which nobody would hear from a copy.

    Args:
        dtype: of the compiled network's weights and activations.
    """

    def __init__(self, unet: UNet, compile: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.unet, self._kept = unet, None  # the last context, and its K and V
        own = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps
        self._checks = isinstance(own, UNet)
        self.shares = type(own) is UNet and all(type(part).__module__.startswith(OURS) for part in own.modules())
        if compile and has_hooks(unet):
            warnings.warn("Sampling without the compiler: hooks (of attention_maps?) listen to the UNet.", stacklevel=2)
            compile = False
        self._programs: dict[Any, Callable[..., Any]] | None = {} if compile else None
        if compile:
            self.unet = copy.deepcopy(unet).eval().requires_grad_(False).to(dtype)
            if next(unet.parameters()).device.type == "cuda":
                self.unet.to(memory_format=torch.channels_last)

    def is_of(self, unet: UNet) -> bool:
        """Whether the weights are still those of `unet`, not trained on, moved or replaced since.

        Compared number by number: no version counter tells of a fused optimiser's step.
        """
        mine, theirs = list(self.unet.parameters()), list(unet.parameters())
        same = self.unet.config == unet.config and len(mine) == len(theirs)
        return same and all(a.device == b.device and torch.equal(a, b.to(a.dtype)) for a, b in zip(mine, theirs))

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """`z` (B, c, h, w), `t` (B,), `context` (B, M, d): the prediction, in single precision.

        Where it `shares`, it also takes k contexts for each latent, (k, B, M, d): `(k * B, c, h, w)`.
        """
        if self._checks:
            for each in [context] if context is None or context.ndim < 4 else context:
                self.unet.check(z, t, each)
        dtype = next(self.unet.parameters()).dtype
        kept = None if context is None else self._project(context, dtype)
        shapes = z.shape, None if context is None else context.shape
        # In one memory order, whichever the sampler left: another would be compiled for again.
        z = z.to(dtype).contiguous()
        if self._programs is None:
            return self.unet(z, t, kept).to(torch.float32)
        with ONE_AT_A_TIME:  # the next call of a CUDA graph, of any thread, writes to the same memory
            return self._answer(z, t, kept, shapes).to(torch.float32, copy=True)

    def _project(self, context: Tensor, dtype: torch.dtype) -> Context:
        version = None if context.is_inference() else context._version  # rises when it is written into
        last = self._kept  # read once, written whole: another thread may be sampling, too
        if last is None or last[0] is not context or last[1] != version:
            given = context.to(dtype)
            kept = keys_and_values(self.unet, given.flatten(0, -3)) if self.shares else given
            self._kept = last = context, version, kept
        return last[2]

    def _answer(self, z: Tensor, t: Tensor, kept: Context, shapes: Any) -> Tensor:
        if self._programs is None:
            return self.unet(z, t, kept)
        try:
            if shapes not in self._programs:
                self._programs[shapes] = compiled(self.unet)
            return self._programs[shapes](z, t, kept)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"Sampling without the compiler, which failed: {reason[0]}", stacklevel=3)
            self._programs = None
            return self.unet(z, t, kept)
