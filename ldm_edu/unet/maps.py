"""Which place looks at which word: the maps of the cross-attentions, read while the network runs as ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_edu.unet.transformer import SpatialTransformer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    """
    maps: list[AttentionMap] = []
    hooks, changed = [], []
    for name, module in unet.named_modules():
        if isinstance(module, SpatialTransformer):
            size = _Size()
            hooks.append(module.register_forward_pre_hook(size.note))
            for i, block in enumerate(module.blocks):
                layer = block.cross_attention
                changed.append((layer, layer.attend))
                layer.attend = _recording(f"{name}.blocks.{i}.cross_attention", layer.attend, size, maps)
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
        for layer, before in changed:
            layer.attend = before


class _Size:
    """Height and width of a SpatialTransformer's feature map, in the call that runs."""

    def note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.height, self.width = inputs[0].shape[2:]


def _recording(name: str, attend: Attend, size: _Size, maps: list[AttentionMap]) -> Attend:
    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        maps.append(AttentionMap(name, weights, size.height, size.width))
        return attend(q, k, v)

    return recorded
