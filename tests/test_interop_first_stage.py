"""diffusers' first stages in ours and back: same weights, same outputs, and worded refusals of the rest."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from first_stages import SMALL, VQ, close, equal, ours, same_outputs, stirred
from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderVQ, FirstStage, Identity
from ldm_edu.interop import (
    first_stage_from_compvis,
    first_stage_from_diffusers,
    first_stage_to_compvis,
    first_stage_to_diffusers,
    latent_scale,
    load_diffusers_first_stage,
)
from ldm_edu.runtime import UserError

CONFIGS = {
    "kl": SMALL,
    "kl, attention at two levels": replace(SMALL, attention_levels=(0, 2), blocks=2),
    "kl, no attention": replace(SMALL, middle_attention=False, channel_multipliers=(1, 3)),
    "kl, f = 1, grey": replace(SMALL, channel_multipliers=(1,), image_channels=1),
    "vq": VQ,
    "vq, attention at a level": replace(VQ, attention_levels=(1,)),
    "vq, no middle attention": replace(VQ, middle_attention=False, attention_levels=(0,)),
}
# Stable Diffusion 1's vae/config.json: without the settings that came to diffusers later.
STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "act_fn": "silu", "in_channels": 3,
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": 4,
    "layers_per_block": 2, "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def theirs(config: dict) -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, of the extra [test]")
    torch.manual_seed(0)
    return stirred(getattr(diffusers, config["_class_name"]).from_config(config))


def same_as_diffusers(mine: FirstStage, model: nn.Module, **arguments) -> None:
    vq = isinstance(mine, AutoencoderVQ)

    def encode(images: Tensor) -> Tensor:
        encoded = model.to(images.dtype).encode(images)
        return encoded.latents if vq else encoded.latent_dist.parameters

    same_outputs(
        mine, encode, lambda z: model.decode(z, **({"force_not_quantize": True} if vq else {})).sample, **arguments
    )



@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_both_ways_with_diffusers(config: AutoencoderConfig):
    mine = ours(config)
    their_config, tensors = first_stage_to_diffusers(mine)
    model = theirs(their_config)
    back = first_stage_from_diffusers(dict(model.config) | their_config, model.state_dict())
    assert back.config == config and not back.training
    round_trip = first_stage_to_diffusers(back)
    assert round_trip[0] == their_config and equal(round_trip[1], model.state_dict())
    same_as_diffusers(back, model)  # from diffusers
    model.float().load_state_dict(tensors)
    same_as_diffusers(mine, model)  # to diffusers
    again = first_stage_from_diffusers(*first_stage_to_diffusers(mine.float()))
    assert equal(again.state_dict(), mine.state_dict())


def test_stable_diffusions_own_first_stage():
    model = theirs(STABLE_DIFFUSION)
    tensors = model.state_dict()
    for new, old in OLD.items():  # its file has the old names
        tensors = {n.replace(new, old): t for n, t in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    mine = first_stage_from_diffusers(STABLE_DIFFUSION, tensors)
    assert sum(p.numel() for p in mine.parameters()) == 83_653_863
    assert mine.config == AutoencoderConfig() and latent_scale(STABLE_DIFFUSION) == 0.18215
    same_as_diffusers(mine, model, side=56, dtypes=[torch.float32])


@torch.no_grad()
def test_vq_picks_the_codes_that_diffusers_picks():
    config, tensors = first_stage_to_diffusers(mine := ours(replace(VQ, codebook_size=500)))
    (model := theirs(config)).load_state_dict(tensors)
    latent = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    codes = mine.quantizer.codes(latent)
    other = model.quantize(latent)[2][2].view_as(codes)
    distances = [(latent - mine.quantizer.lookup(c)).square().sum(1) for c in (codes, other)]
    assert (distances[0] - distances[1]).abs().max() < 1e-5 and (codes != other).float().mean() < 0.01
    assert len(codes.unique()) > 100
    close(mine.decode_codes(other), model.decode(latent).sample)
    images = torch.randn(1, 3, 16, 16)
    close(mine.encode(images), model.encode(images).latents)  # the latent before quantisation


@pytest.mark.parametrize("config", [SMALL, VQ], ids=["kl", "vq"])
def test_a_folder_of_diffusers(config: AutoencoderConfig, tmp_path: Path):
    mine = ours(config)
    model = theirs(first_stage_to_diffusers(mine, scaling_factor=0.7)[0])
    model.save_pretrained(tmp_path)
    loaded, scale = load_diffusers_first_stage(tmp_path)
    assert scale == 0.7 and equal(first_stage_to_diffusers(loaded)[1], model.state_dict())


def test_a_folder_that_cannot_be_read_is_described(tmp_path: Path):
    with pytest.raises(UserError, match="config.json: No such file"):
        load_diffusers_first_stage(tmp_path)
    theirs(first_stage_to_diffusers(ours(SMALL))[0]).save_pretrained(tmp_path)
    config, weights = (tmp_path / n for n in ("config.json", "diffusion_pytorch_model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="damaged"):
        load_diffusers_first_stage(tmp_path)
    weights.write_bytes(whole)
    for text in ("{", "[1, 2]", "3"):
        config.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            load_diffusers_first_stage(tmp_path)
    config.write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(UserError, match="AutoencoderTiny"):
        load_diffusers_first_stage(tmp_path)
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors: No such file.*pickle"):
        load_diffusers_first_stage(tmp_path)


# what cannot be

KL_NOW, WEIGHTS = first_stage_to_diffusers(ours(SMALL))
VQ_NOW = first_stage_to_diffusers(ours(VQ))[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"), ({"norm_type": "spatial"}, "norm_type = 'spatial'"),
        ({"use_quant_conv": False}, "use_quant_conv = False"), ({"shift_factor": 0.1}, "shift_factor = 0.1"),
        ({"latents_mean": [0.0]}, "latents_mean"), ({"out_channels": 4}, "out_channels = 4"),
        ({"block_out_channels": [8, 12, 16]}, r"\[8, 12, 16\]"), ({"novelty": 1}, "novelty = 1"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] + ["DownEncoderBlock2D"] * 2}, "reversed.*AttnDownEnc"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "'DownBlock2D'"), ({"block_out_channels": [8, 16]}, r"\[8, 16\]"),
        ({"norm_num_groups": 3}, "multiple of the 3 groups"),
        ({"layers_per_block": "two"}, "config.json is incomplete or wrong"),
        ({"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny'"), ({"layers_per_block": 2}, "missing"),
        ({"mid_block_add_attention": False}, "20 unknown.*mid_block.attentions.0.*[.]{3}"),
        ({"_class_name": "VQModel"}, "num_vq_embeddings"), (VQ_NOW | {"vq_embed_dim": 5}, "vq_embed_dim = 5"),
    ],
)  # fmt: skip
def test_a_first_stage_of_diffusers_that_does_not_fit_is_named(change: dict, words: str):
    with pytest.raises(UserError, match=words):
        first_stage_from_diffusers(KL_NOW | change, WEIGHTS)


@pytest.mark.parametrize("whose", ["diffusers", "CompVis"])
def test_tensors_that_do_not_fit_are_named(whose: str):
    mine = ours(replace(SMALL, channels=32, groups=32))
    if whose == "diffusers":
        config, tensors = first_stage_to_diffusers(mine)

        def load(tensors: dict) -> FirstStage:
            return first_stage_from_diffusers(config, tensors)
    else:
        params, tensors = first_stage_to_compvis(mine)

        def load(tensors: dict) -> FirstStage:
            return first_stage_from_compvis(tensors=tensors, **params)

    name = "decoder.conv_in.weight"
    assert load(tensors) is not None
    with pytest.raises(UserError, match=re.escape(f"1 missing ({name})")):
        load({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(UserError, match=re.escape("1 unknown (encoder.surplus)")):
        load(tensors | {"encoder.surplus": torch.zeros(1)})
    with pytest.raises(UserError, match=re.escape(f"1 of another shape ({name} (64, 3, 3, 3), not (64, 2, 3, 3))")):
        load(tensors | {name: torch.zeros(64, 3, 3, 3)})
    with pytest.raises(UserError, match=r"\d\d missing \(.+, .+, .+, \.\.\.\)"):
        load({})
    both = {"encoder.mid_block.attentions.0.query.bias": torch.zeros(64)}  # beside to_q, which is there
    with pytest.raises(UserError, match=re.escape(f"1 unknown ({next(iter(both))})")):
        load(tensors | both)


def test_what_others_do_not_have_is_not_exported():
    for export in (first_stage_to_diffusers, first_stage_to_compvis):
        with pytest.raises(UserError, match="identity"):
            export(Identity())
    with pytest.raises(UserError, match="32 groups"):
        first_stage_to_compvis(ours(SMALL))
    with pytest.raises(UserError, match="any in the middle"):
        config = replace(SMALL, channels=32, groups=32, middle_attention=False, attention_levels=(0,))
        first_stage_to_compvis(ours(config))
    with pytest.raises(UserError, match=re.escape("(2, 2)")):
        first_stage_to_diffusers(ours(replace(SMALL, channel_multipliers=(2, 2))))
