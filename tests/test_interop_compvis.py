"""CompVis's first stages in ours and back: the released names, same outputs, and worded refusals of the rest."""

from dataclasses import replace

import pytest
import torch
from compvis_first_stage import RELEASED, CompVis, released
from first_stages import SMALL, equal, ours, same_outputs, stirred

from ldm_edu.autoencoder import AutoencoderConfig
from ldm_edu.interop import first_stage_from_compvis, first_stage_to_compvis, first_stage_to_diffusers
from ldm_edu.runtime import UserError


@pytest.mark.parametrize("name", RELEASED)
def test_the_names_and_shapes_of_the_released_first_stages(name: str):
    """Without memory: on the meta device, where tensors have shapes only."""
    params = released(name)
    with torch.device("meta"):
        tensors = CompVis(**params).state_dict()
        mine = first_stage_from_compvis(tensors=tensors, **params)
    back, renamed = first_stage_to_compvis(mine)
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in tensors.items()}
    assert back["ddconfig"] == {"attn_type": "vanilla"} | params["ddconfig"]
    assert (back["embed_dim"], back.get("n_embed")) == (params["embed_dim"], params["n_embed"])
    if name == "kl-f8":
        assert mine.config == AutoencoderConfig()


def test_names_as_they_are_in_the_released_files():
    with torch.device("meta"):
        kl, vq = (CompVis(**released(name)).state_dict().keys() for name in ("kl-f8", "vq-f8"))
    assert len(kl) == 248 and kl >= {
        "encoder.down.0.block.0.norm1.weight", "encoder.down.1.block.0.nin_shortcut.bias", "quant_conv.weight",
        "encoder.down.2.downsample.conv.weight", "encoder.mid.block_1.conv1.weight", "encoder.mid.attn_1.q.weight",
        "decoder.mid.attn_1.proj_out.bias", "decoder.up.0.block.2.conv2.weight", "decoder.up.3.upsample.conv.weight",
        "decoder.norm_out.weight", "decoder.up.1.block.0.nin_shortcut.weight", "post_quant_conv.bias",
    }  # fmt: skip
    assert vq >= {
        "quantize.embedding.weight", "encoder.down.3.attn.1.k.weight", "encoder.down.3.attn.0.norm.weight",
        "decoder.up.3.attn.2.v.bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_both_ways_with_compvis(name: str):
    params = released(name)
    params["ddconfig"] |= {"ch": 32, "num_res_blocks": 1, "ch_mult": [min(m, 2) for m in params["ddconfig"]["ch_mult"]]}
    torch.manual_seed(0)
    model = stirred(CompVis(**params))
    ballast = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    mine = first_stage_from_compvis(tensors=model.state_dict() | ballast, **params)
    back, tensors = first_stage_to_compvis(mine)
    assert equal(tensors, model.state_dict())
    assert equal(first_stage_from_compvis(tensors=tensors, **back).state_dict(), mine.state_dict())
    model.double()
    same_outputs(mine, model.encode, model.decode, side=2 * mine.f, dtypes=[torch.float64])


def test_diffusers_own_conversion_agrees():
    """diffusers turns CompVis's names into its own, too."""
    theirs = pytest.importorskip("diffusers.loaders.single_file_utils", reason="of the extra [test]")
    mine = ours(replace(SMALL, channels=32, groups=32, channel_multipliers=(1, 2, 2)))
    config, expected = first_stage_to_diffusers(mine)
    tensors = first_stage_to_compvis(mine)[1]
    assert equal(theirs.convert_ldm_vae_checkpoint(dict(tensors), config), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"embed_dim": 8}, "embed_dim = 8, only 4"), ({"n_embed": 16}, "double_z = True"),
        ({"ddconfig": {"attn_type": "linear"}}, "attn_type = 'linear'"), ({"ddconfig": {"out_ch": 4}}, "out_ch = 4"),
        ({"ddconfig": {"resamp_with_conv": False}}, "resamp_with_conv"), ({"ddconfig": {"tanh_out": True}}, "tanh_out"),
        ({"ddconfig": {"novelty": 1}}, "novelty = 1"), ({"ddconfig": {"ch": 48}}, "multiple of the 32 groups"),
        ({"ddconfig": {"ch_mult": None}}, "ddconfig is incomplete or wrong"),
    ],
)  # fmt: skip
def test_a_first_stage_of_compvis_that_does_not_fit_is_named(change: dict, words: str):
    params = released("kl-f8")
    params |= change | {"ddconfig": params["ddconfig"] | change.get("ddconfig", {})}
    with pytest.raises(UserError, match=words):
        first_stage_from_compvis(tensors={}, **params)
    del params["ddconfig"]["z_channels"]
    with pytest.raises(UserError, match="z_channels"):
        first_stage_from_compvis(tensors={}, **params)
