"""CompVis's UNets in ours and back: the released names, same outputs, and worded refusals of the rest."""

from dataclasses import replace

import pytest
import torch
from compvis_unet import CELEBA, STABLE_DIFFUSION, CompVisUNet
from first_stages import equal
from torch import Tensor, nn
from unets import ours, same_outputs, stirred

from ldm_edu.interop import unet_from_compvis, unet_to_compvis, unet_to_diffusers
from ldm_edu.runtime import UserError
from ldm_edu.unet import UNetConfig

NARROW = {"model_channels": 32, "num_res_blocks": 1}
CONFIGS = {
    "Stable Diffusion 1": STABLE_DIFFUSION | NARROW | {"context_dim": 24, "num_res_blocks": 2},
    "CelebA-HQ": CELEBA | NARROW | {"num_head_channels": 16},
    "plain, heads by number, labels": CELEBA | NARROW | {"num_heads": 4, "num_classes": 5, "channel_mult": [1, 2]},
    "scale and shift, two layers": STABLE_DIFFUSION | NARROW | {
        "use_scale_shift_norm": True, "transformer_depth": 2, "channel_mult": [1, 2], "attention_resolutions": [2],
        "context_dim": 8},
}  # fmt: skip
del CONFIGS["plain, heads by number, labels"]["num_head_channels"]


def call(model: nn.Module, *given: Tensor | None) -> Tensor:
    return model(*given)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_with_compvis(name: str):
    torch.manual_seed(0)
    model = stirred(CompVisUNet(CONFIGS[name]))
    mine = unet_from_compvis(CONFIGS[name], model.state_dict())
    params, tensors = unet_to_compvis(mine)
    assert equal(tensors, model.state_dict())
    again = unet_from_compvis(params, tensors)
    assert again.config == mine.config and equal(again.state_dict(), mine.state_dict())
    same_outputs(mine, model, call, dtypes=(torch.float64,))


@pytest.mark.parametrize("params", [STABLE_DIFFUSION, CELEBA], ids=["Stable Diffusion 1", "CelebA-HQ"])
def test_the_names_and_shapes_of_the_released_unets(params: dict):
    """Without memory: on the meta device, where tensors have shapes only."""
    with torch.device("meta"):
        tensors = CompVisUNet(params).state_dict()
        mine = unet_from_compvis(params, tensors)
        back, renamed = unet_to_compvis(mine)
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in tensors.items()}
    unused = {"use_checkpoint", "legacy", "image_size"}
    assert {n: v for n, v in back.items() if n not in unused} == {n: v for n, v in params.items() if n not in unused}
    if params is STABLE_DIFFUSION:
        assert mine.config == UNetConfig() and sum(p.numel() for p in mine.parameters()) == 859_520_964
        assert len(tensors) == 686


def test_names_as_they_are_in_the_released_files():
    with torch.device("meta"):
        sd, plain = (CompVisUNet(params).state_dict().keys() for params in (STABLE_DIFFUSION, CELEBA))
    assert sd >= {
        "time_embed.2.bias", "input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.3.0.op.weight", "input_blocks.4.0.skip_connection.weight", "input_blocks.11.0.out_layers.3.bias",
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight", "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight", "output_blocks.11.1.proj_out.weight", "out.2.weight",
    }  # fmt: skip
    assert plain >= {"input_blocks.4.1.qkv.weight", "middle_block.1.proj_out.bias", "output_blocks.8.2.conv.bias"}


def test_diffusers_own_conversion_agrees():
    """diffusers turns CompVis's names into its own, too."""
    theirs = pytest.importorskip("diffusers.loaders.single_file_utils", reason="of the extra [test]")
    mine = ours(
        UNetConfig(channels=32, blocks=1, context_channels=8, channel_multipliers=(1, 2), attention_levels=(0, 1))
    )
    config, expected = unet_to_diffusers(mine)
    tensors = {f"model.diffusion_model.{n}": t for n, t in unet_to_compvis(mine)[1].items()}
    assert equal(theirs.convert_ldm_unet_checkpoint(tensors, config | {"class_embed_type": None}), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"resblock_updown": True}, "A UNet here cannot have resblock_updown"), ({"n_embed": 4}, "n_embed = 4"),
        ({"use_new_attention_order": True}, "use_new_attention_order"), ({"novelty": 1}, "novelty = 1 is not known"),
        ({"dims": 3}, "dims = 3, only 2"), ({"num_classes": "continuous"}, "'continuous'"),
        ({"context_dim": None}, "come together"), ({"use_spatial_transformer": False}, "come together"),
        ({"num_heads": -1}, "Neither num_heads nor"), ({"num_heads": 7}, "divided among 7 heads"),
        ({"num_head_channels": 48}, "heads of 48 channels"), ({"model_channels": 48}, "multiple of the 32 groups"),
        ({"channel_mult": None}, "unet_config is incomplete or wrong"), ({}, "686 missing"),
    ],
)  # fmt: skip
def test_a_unet_of_compvis_that_does_not_fit_is_named(change: dict, words: str):
    with torch.device("meta"), pytest.raises(UserError, match=words):
        unet_from_compvis(STABLE_DIFFUSION | change, {})


def test_what_compvis_does_not_have_is_not_exported():
    small = UNetConfig(channels=32, blocks=1, context_channels=8, channel_multipliers=(1, 2), attention_levels=(1,))
    for change, words in (
        ({"groups": 16}, "32 groups"), ({"transformer_depth": (1, 2)}, "one transformer_depth"),
        ({"channel_multipliers": (2, 2)}, "begins with 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            unet_to_compvis(ours(replace(small, **change)))
