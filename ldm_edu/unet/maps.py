"""Which place looks at which word: the maps of the cross-attentions, read while the network runs as ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_edu.layers.attention import Attention, Context
from ldm_edu.unet.transformer import SpatialTransformer


@dataclass(frozen=True)
class AttentionMap:
    """What one cross-attention did in one call of the network.

    Args:
        layer: its name in the network, such as "down.1.blocks.0.transformer.blocks.0.cross_attention".
        probabilities: softmax(Q Kᵀ / √d), `(B, heads, height * width, M)`; over the M tokens they sum to 1.
        height, width: of the feature map, whose places are counted row by row.
    """

    layer: str
    probabilities: Tensor
    height: int
    width: int


@contextmanager
def attention_maps(unet: nn.Module) -> Iterator[list[AttentionMap]]:
    """`with attention_maps(unet) as maps:` adds a map to `maps` for each cross-attention of each call, in order.

    The outputs are those without it: the maps are computed beside the network's own attention, whichever kernel that
    takes. They have no gradient, and at least single precision. `maps.clear()` forgets them, for instance at each step.
    Several may be open at once, and close in any order; each then records all calls, whoever makes them.
    """
    maps: list[AttentionMap] = []
    hooks = []
    for name, module in unet.named_modules():
        if isinstance(module, SpatialTransformer):
            size = _Size()
            hooks.append(module.register_forward_pre_hook(size.note))
            for i, block in enumerate(module.blocks):
                record = _recorder(f"{name}.blocks.{i}.cross_attention", size, maps)
                hooks.append(block.cross_attention.register_forward_pre_hook(record))
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


class _Size:
    """Height and width of a SpatialTransformer's feature map, in the call that runs."""

    def note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.height, self.width = inputs[0].shape[2:]


def _recorder(name: str, size: _Size, maps: list[AttentionMap]) -> Callable[[Attention, tuple[Tensor, Context]], None]:
    @torch.no_grad()
    def record(layer: Attention, inputs: tuple[Tensor, Context]) -> None:
        q, (k, _) = layer.queries(inputs[0]), layer.keys_and_values(*inputs)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        maps.append(AttentionMap(name, weights, size.height, size.width))

    return record
