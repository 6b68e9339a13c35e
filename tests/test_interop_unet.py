"""diffusers' UNets in ours and back: same weights, same outputs, and worded refusals of the rest."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from first_stages import equal
from torch import Tensor, nn
from unets import ours, same_outputs, stirred

from ldm_edu.interop import load_diffusers_unet, unet_from_diffusers, unet_to_diffusers
from ldm_edu.runtime import UserError
from ldm_edu.unet import UNet, UNetConfig

SMALL = UNetConfig(channels=16, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2,
                   context_channels=12, groups=8)  # fmt: skip
PLAIN = replace(SMALL, context_channels=None, heads=8, head_channels=8)
CONFIGS = {
    "SD 1's shape, narrow": UNetConfig(channels=32, context_channels=24),
    "SD 2's shape, narrow": UNetConfig(channels=32, context_channels=24, head_channels=16),
    "scale and shift": replace(SMALL, scale_shift=True, in_channels=9),
    "attention at some levels": replace(SMALL, channel_multipliers=(1, 2, 3), attention_levels=(0, 2)),
    "several layers": replace(SMALL, transformer_depth=3),
    "layers by level": replace(SMALL, attention_levels=(0, 1), transformer_depth=(1, 2), blocks=2),
    "labels": replace(SMALL, num_classes=7, attention_levels=()),
    "plain": PLAIN,
    "plain, scale and shift, labels": replace(PLAIN, scale_shift=True, num_classes=3, attention_levels=(0, 1)),
    "plain, one head": replace(PLAIN, heads=1, head_channels=None, attention_levels=(0, 1)),
}
# Stable Diffusion 1's unet/config.json: without the settings that came to diffusers later.
STABLE_DIFFUSION = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip


def theirs(config: dict) -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, of the extra [test]")
    torch.manual_seed(0)
    return stirred(getattr(diffusers, config["_class_name"]).from_config(config))


def call(model: nn.Module, z: Tensor, t: Tensor, context: Tensor | None, labels: Tensor | None) -> Tensor:
    return model(z, t, **({} if context is None else {"encoder_hidden_states": context}), class_labels=labels).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_with_diffusers(name: str):
    mine = ours(CONFIGS[name])
    linear = name.startswith("SD 2")
    their_config, tensors = unet_to_diffusers(mine, linear_projection=linear)
    model = theirs(their_config)
    back = unet_from_diffusers(dict(model.config) | their_config, model.state_dict())
    assert back.config == CONFIGS[name] and not back.training
    round_trip = unet_to_diffusers(back, linear_projection=linear)
    assert round_trip[0] == their_config and equal(round_trip[1], model.state_dict())
    same_outputs(back, model, call)  # from diffusers
    model.load_state_dict(tensors)
    same_outputs(mine, model, call)  # to diffusers


def test_stable_diffusions_own_unet_on_paper():
    """Without memory: on the meta device, where tensors have shapes only."""
    with torch.device("meta"):
        tensors = theirs_on_paper(STABLE_DIFFUSION)
        mine = unet_from_diffusers(STABLE_DIFFUSION, tensors)
    assert sum(p.numel() for p in mine.parameters()) == 859_520_964 and mine.config == UNetConfig()
    config, back = unet_to_diffusers(mine)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in tensors.items()}
    assert STABLE_DIFFUSION.items() <= (STABLE_DIFFUSION | config).items()


def theirs_on_paper(config: dict) -> dict[str, Tensor]:
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, of the extra [test]")
    return diffusers.UNet2DConditionModel.from_config(config).state_dict()


def test_heads_of_stable_diffusion_2():
    widths = {"block_out_channels": [32, 64, 128, 128], "attention_head_dim": [2, 4, 8, 8], "cross_attention_dim": 24}
    config = STABLE_DIFFUSION | widths | {"use_linear_projection": True}
    mine = unet_from_diffusers(config, theirs(config).state_dict())
    assert mine.config == replace(CONFIGS["SD 2's shape, narrow"]) and mine.config.heads_at(2) == 8


def test_a_folder_of_diffusers(tmp_path: Path):
    model = theirs(unet_to_diffusers(ours(SMALL))[0])
    model.save_pretrained(tmp_path)
    assert equal(unet_to_diffusers(load_diffusers_unet(tmp_path))[1], model.state_dict())
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    for other in ({"variant": "fp16"}, {"max_shard_size": "20KB"}):
        model.save_pretrained(tmp_path, **other)
        with pytest.raises(UserError, match="safetensors: No such file.*Variants .* and shards"):
            load_diffusers_unet(tmp_path)


NOW, WEIGHTS = unet_to_diffusers(ours(SMALL))
PLAIN_NOW, PLAIN_WEIGHTS = unet_to_diffusers(ours(replace(PLAIN, scale_shift=True)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"act_fn": "gelu"}, "A UNet here cannot have act_fn = 'gelu'"), ({"freq_shift": 1}, "freq_shift = 1, only 0"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"), ({"addition_embed_type": "text"}, "'text', only None"),
        ({"mid_block_type": None}, "UNetMidBlock2DCrossAttn"), ({"resnet_time_scale_shift": "spatial"}, "'spatial'"),
        ({"only_cross_attention": True}, "only_cross_attention"), ({"novelty": 1}, "novelty = 1 is not known"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"), ({"norm_eps": 1e-6}, "norm_eps = 1e-06"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "way up, reversed"), ({"layers_per_block": [1, 2]}, "one layers"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"block_out_channels": [16, 24]}, r"\[16, 24\]"), ({"cross_attention_dim": [8, 12]}, "one cross_attention"),
        ({"attention_head_dim": 3}, "divided among 3 heads"), ({"transformer_layers_per_block": [1]}, "each of 2"),
        ({"attention_head_dim": [2, 3], "down_block_types": ["CrossAttnDownBlock2D"] * 2,
          "up_block_types": ["CrossAttnUpBlock2D"] * 2}, r"\[2, 3\].*neither"),
        ({"_class_name": "UNet1DModel"}, "'UNet1DModel'"), ({"layers_per_block": 2}, "missing"),
        ({"cross_attention_dim": 8}, "of another shape"), ({"num_class_embeds": 4}, "class_embedding.weight"),
    ],
)  # fmt: skip
def test_a_unet_of_diffusers_that_does_not_fit_is_named(change: dict, words: str):
    with pytest.raises(UserError, match=words):
        unet_from_diffusers(NOW | change, WEIGHTS)


def test_a_plain_unet_of_diffusers_that_does_not_fit_is_named():
    assert isinstance(unet_from_diffusers(PLAIN_NOW, PLAIN_WEIGHTS), UNet)
    with pytest.raises(UserError, match="attn_norm_num_groups = None"):  # its middle attention would have no norm
        unet_from_diffusers({n: v for n, v in PLAIN_NOW.items() if n != "attn_norm_num_groups"}, PLAIN_WEIGHTS)
    with pytest.raises(UserError, match="downsample_type = 'resnet'"):
        unet_from_diffusers(PLAIN_NOW | {"downsample_type": "resnet"}, PLAIN_WEIGHTS)


def test_what_diffusers_does_not_have_is_not_exported():
    with pytest.raises(UserError, match=r"begin with 1.*\(2, 2\)"):
        unet_to_diffusers(ours(replace(SMALL, channel_multipliers=(2, 2))))
    with pytest.raises(UserError, match=r"equally wide.*\[8, 16\]"):
        unet_to_diffusers(ours(replace(PLAIN, head_channels=None, heads=2, attention_levels=(0, 1))))
