"""What does not fit is refused in words, before anything is computed or drawn."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from denoisers import Draws, Network, normal
from torch import Tensor

from ldm_edu.conditioning import TextConditioner
from ldm_edu.datasets import ShapeScenes
from ldm_edu.datasets.images import write_png
from ldm_edu.diffusion import Schedule, ddim, ddpm, dpm_solver, plms, spaced_timesteps, variational_bound
from ldm_edu.evaluation.attention import overlaps
from ldm_edu.evaluation.comparison import compare, frechet_distance
from ldm_edu.evaluation.reconstruction import psnr
from ldm_edu.evaluation.spaces import measure
from ldm_edu.interop import schedule_from_diffusers
from ldm_edu.layers import Attention
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import PictureNoise, UserError
from ldm_edu.training.diffusion import DiffusionObjective
from ldm_edu.unet import UNet, UNetConfig
from ldm_edu.unet.fast import Denoiser
from ldm_edu.widgets import AttentionExplorer, LossCurve, TimestepSlider

LEVELS = Schedule().alphas_cumprod
NO_SIGNAL = torch.cat([LEVELS[:-1], torch.zeros(1)])


@pytest.mark.parametrize("sampler", [ddim, ddpm, plms, dpm_solver])
@pytest.mark.parametrize(
    "timesteps, stop, words",
    [
        ([], -1, "at least one timestep"), ([1000, 500], -1, "between 0 and 999"), ([500, -2], -1, "-2"),
        ([-1, 500], -1, "-1, 500"), ([999.0, 500.5], -1, "integers.*float"), ([500], 1000, "stop is 1000"),
        ([500], -2, "stop is -2"), ([500, 999], -1, "timesteps fall"), ([500, 500], -1, "timesteps fall"),
    ],
)  # fmt: skip
def test_timesteps(sampler, timesteps: list, stop: int, words: str):
    network, draw = Network(), {"draw": Draws()} if sampler in (ddim, ddpm) else {}
    with pytest.raises(UserError, match=words):
        list(sampler(network, normal(1, 2, 4, 4), LEVELS, timesteps, stop=stop, **draw))
    assert not network.calls


@pytest.mark.parametrize("sampler", [ddim, plms, dpm_solver])
def test_timesteps_of_any_kind_of_integers(sampler):
    common = (Network(), normal(1, 2, 4, 4), LEVELS)
    *_, expected = sampler(*common, [999, 600, 200])
    for timesteps in (torch.tensor([999, 600, 200]), iter([999, 600, 200]), (999, 600, 200)):
        *_, end = sampler(*common, timesteps)
        assert torch.equal(end.z, expected.z)


@pytest.mark.parametrize("eta", [-1.0, 1.5, float("nan")])
def test_eta(eta: float):
    with pytest.raises(UserError, match=f"it is {eta}"):
        next(ddim(Network(), normal(1, 2, 4, 4), LEVELS, [500], eta=eta, draw=Draws()))


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 2, 4, 4)])
def test_noise_for_part_of_the_batch(shape: tuple[int, ...]):
    """torch.randn as `draw` would give every picture the same noise."""

    def draw(_shape) -> Tensor:
        return torch.zeros(shape)

    start = normal(3, 2, 4, 4)
    for run in (
        lambda: list(ddpm(Network(), start, LEVELS, [500, 200], draw=draw)),
        lambda: list(ddim(Network(), start, LEVELS, [500, 200], eta=1.0, draw=draw)),
        lambda: variational_bound(Network(), start, LEVELS[:5], draw),
    ):
        with pytest.raises(UserError, match=r"\(3, 2, 4, 4\); it gave"):
            run()


def test_no_signal_at_all():
    common = (Network(), normal(1, 2, 4, 4), NO_SIGNAL, [999, 500])
    for refused in (ddim(*common, "eps"), dpm_solver(*common, "eps"), plms(*common, "v")):
        with pytest.raises(UserError, match="no signal"):
            next(refused)
    for prediction in ("x0", "v"):
        for sampler in (ddim, dpm_solver):
            assert all(step.z.isfinite().all() for step in sampler(*common, prediction))


@pytest.mark.parametrize("shape", [(4,), (), (11,)])
def test_variances_of_another_length(shape: tuple[int, ...]):
    with pytest.raises(UserError, match="each of 10 steps"):
        variational_bound(Network(), normal(1, 2, 4, 4), LEVELS[:10], Draws(), variance=torch.full(shape, 0.1))


@pytest.mark.parametrize(
    "kind, T, start, end", [("linear", 10, 0.0, 0.02), ("sqrt_linear", 10, 0.0, 0.0), ("cosine", 10, 0.0, 0.0)]
)
def test_a_schedule_that_adds_no_noise(kind: str, T: int, start: float, end: float):
    with pytest.raises(UserError, match="0 < start"):
        Schedule(kind, T, start, end)


def test_other_refusals_of_schedules_and_steps():
    with pytest.raises(UserError, match="snr_shift_scale = 3.0"):
        schedule_from_diffusers({"beta_schedule": "scaled_linear", "snr_shift_scale": 3.0})
    assert schedule_from_diffusers({"beta_schedule": "scaled_linear", "snr_shift_scale": None})[1] == "eps"
    with pytest.raises(UserError, match="float32"):
        Schedule().add_noise(normal(1, 2, 4, 4), normal(1, 2, 4, 4), torch.tensor([5.0]))
    with pytest.raises(UserError, match="it is 2.5"):
        spaced_timesteps(1000, 2.5)
    assert spaced_timesteps(1000, 4.0) == spaced_timesteps(1000, 4)
    for seeds in ([0.5], [None], [2**64], ["a"]):
        with pytest.raises(UserError, match="Seeds are integers"):
            PictureNoise(seeds)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"heads": 3}, "Level 1, 16 channels wide.*3 heads"), ({"heads": 0}, "heads must be at least 1"),
        ({"groups": 3}, "multiple of the 3 groups"), ({"blocks": 0}, "blocks must be at least 1"),
        ({"channels": 9, "groups": 1, "heads": 1}, "channels must be even"), ({"num_classes": 0}, "1 or None, not 0"),
        ({"context_channels": 0}, "context_channels must be"), ({"attention_levels": (4, 2, 1)}, r"\(4, 2, 1\)"),
        ({"attention_levels": (-1,)}, r"\(-1,\)"), ({"transformer_depth": (1,)}, "transformer_depth"),
        ({"channel_multipliers": (1, 0)}, r"at least 1; they are \(1, 0\)"), ({"channels": 8.0}, "integer, not 8.0"),
        ({"channel_multipliers": (1, 1.5)}, r"are integers.*\(1, 1.5\)"), ({"in_channels": 0}, "in_channels must be"),
        ({"channel_multipliers": (1, -1)}, r"\(1, -1\)"), ({"out_channels": 0}, "out_channels must be at least 1"),
        ({"head_channels": 0}, "head_channels must be at least 1 or None, not 0"),
        ({"num_classes": 2.0}, "num_classes must be an integer or None, not 2.0"),
    ],
)  # fmt: skip
def test_the_shape_of_a_unet(change: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        replace(tiny.UNET, **change)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"z": (3, 3, 4, 4)}, r"takes \(B, 2, h, w\), not \(3, 3, 4, 4\)"), ({"z": (2, 4, 4)}, "takes"),
        ({"z": (3, 2, 5, 4)}, "5 × 4"), ({"t": ()}, "t must hold a number for each of 3"), ({"t": (2,)}, "t must"),
        ({"context": (3, 8, 12)}, r"\(B, M, 16\)"), ({"context": (8, 16)}, "B = 3"), ({"context": (2, 8, 16)}, "B = 3"),
        ({"labels": (3,)}, "without labels"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("compile", [False, True])
def test_what_a_unet_is_given(given: dict[str, tuple[int, ...]], words: str, compile: bool, monkeypatch):
    """Compiled, too, where a mistake of the caller's must not be taken for the compiler's."""
    monkeypatch.setattr("ldm_edu.unet.fast.compiled", lambda network: network)
    shapes = {"z": (3, 2, 4, 4), "t": (3,), "context": (3, 8, 16)} | given
    unet = UNet(tiny.UNET)
    call = unet if "labels" in given else Denoiser(unet, compile)
    with pytest.raises(UserError, match=words):
        call(**{n: torch.zeros(s, dtype=torch.long if n in ("t", "labels") else None) for n, s in shapes.items()})


@pytest.mark.parametrize("share", [2.0, -1.0, float("nan")])
def test_the_share_of_dropped_conditions(share: float):
    with pytest.raises(UserError, match=f"from 0 to 1; it is {share}"):
        DiffusionObjective(tiny.latent_diffusion(), share)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"in_channels": 4}, "give it in_channels and out_channels 2"), ({"out_channels": 4}, "out_channels 2"),
        ({"context_channels": 12}, r"context_channels 16 \(not 12\)"), ({"context_channels": None}, "length=1"),
        ({"num_classes": 5}, "no num_classes"),
    ],
)  # fmt: skip
def test_parts_of_a_model(change: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        LatentDiffusion(tiny.first_stage(), UNet(replace(tiny.UNET, **change)), tiny.conditioner(), Schedule())


def test_other_refusals_of_a_model(tmp_path):
    parts = (tiny.first_stage(), UNet(tiny.UNET), tiny.conditioner(), Schedule())
    with pytest.raises(UserError, match="multiple of 2, not 5"):
        LatentDiffusion(*parts, latent_size=5)
    model = LatentDiffusion(*parts, latent_scale=torch.tensor(0.5), latent_size=4)
    assert model.latent_scale == 0.5 and isinstance(model.latent_scale, float)
    model.save(tmp_path / "tiny", "# tiny")
    with pytest.raises(UserError, match="'gpu'"):
        LatentDiffusion.load(tmp_path / "tiny", "gpu")
    with pytest.raises(UserError, match="timesteps are 0 to 99"):
        overlaps(LatentDiffusion(*parts[:3], Schedule(T=100)), [], [])
    with pytest.raises(UserError, match="divided among 3 heads"):
        Attention(16, 3)


def test_refusals_of_measures():
    with pytest.raises(UserError, match="seed 0"):
        measure(None, pictures=4, seed=0)
    with pytest.raises(UserError, match=r"\(3, 8, 8\) and \(1, 8, 8\)"):
        psnr(torch.zeros(3, 8, 8), torch.zeros(1, 8, 8))
    with pytest.raises(UserError, match="two patches of 64"):
        frechet_distance([torch.zeros(3, 70, 70), torch.zeros(3, 63, 200)], [torch.zeros(3, 128, 128)], None)
    with pytest.raises(UserError, match="0 and 0"):
        compare({}, [])


def test_refusals_of_widgets():
    curve = LossCurve("los")
    with pytest.raises(UserError, match="draws los, but the metrics are loss"):
        curve(0, {"loss": 1.0})
    assert curve.steps == []
    slider = TimestepSlider()
    with pytest.raises(UserError, match="to_image"):
        next_steps = list(ddim(Network(), normal(1, 4, 8, 8), LEVELS, [500]))
        slider.append(slider.frame(next_steps[0]))
    assert slider.rows == {} and slider.labels == []
    with pytest.raises(UserError, match="maps"):
        AttentionExplorer(["a"], ["t = 0"], torch.zeros(1, 3, 8, 8), {})


def test_the_defaults_of_a_unet_fit_one_another():
    assert UNetConfig().widths == (320, 640, 1280, 1280)


BYTES = torch.randint(1, 256, (2, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize(
    "use",
    [
        lambda: psnr(BYTES[0], BYTES[1]), lambda: tiny.latent_diffusion().to_latent(BYTES),
        lambda: tiny.first_stage().encode(BYTES), lambda: write_png("never.png", BYTES[0]),
    ],
    ids=["psnr", "to_latent", "encode", "write_png"],
)  # fmt: skip
def test_bytes_are_no_pictures(use):
    with pytest.raises(UserError, match=r"floats in \[-1, 1\], not torch.uint8"):
        use()


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_that_the_schedule_has_not(t: int):
    with pytest.raises(UserError, match=f"from 0 to 999; these go from 3 to {t}|these go from {t} to 3"):
        Schedule().add_noise(normal(2, 1, 2, 2), normal(2, 1, 2, 2), torch.tensor([3, t]))


@pytest.mark.parametrize("seeds", [2**32, -1, [0, 2**32], torch.tensor([-1, 3])])
def test_seeds_of_which_torch_would_use_a_part(seeds):
    prompts = ["a star"] * (1 if isinstance(seeds, int) else 2)
    with pytest.raises(UserError, match=r"from 0 to 2\*\*32 - 1"):
        tiny.latent_diffusion().sample(prompts, num_steps=1, seeds=seeds)


def test_the_seed_of_scenes():
    with pytest.raises(UserError, match=r"2\*\*32 - 1, not 4294967297"):
        ShapeScenes(seed=1 + 2**32)


@pytest.mark.parametrize("three", [np.array(3), np.uint8(3), torch.tensor(3), np.array([3, 4]), torch.tensor([3, 4])])
def test_seeds_of_any_kind_of_integers(three):
    model = tiny.latent_diffusion()
    expected = model.sample(["a star", "a red star"], num_steps=1, seeds=3)
    assert torch.equal(model.sample(["a star", "a red star"], num_steps=1, seeds=three), expected)
    last = model.sample(["a star"] * 2, num_steps=1, seeds=np.uint8(255))  # 256 is no 0
    assert torch.equal(last, model.sample(["a star"] * 2, num_steps=1, seeds=[255, 256]))


def test_no_latents_are_no_pictures():
    assert tiny.latent_diffusion().to_image(torch.zeros(0, 2, 4, 4)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    "levels, words",
    [
        (LEVELS.flip(0), "falls with t.*0.00466"), (LEVELS * 0 + 0.5, "falls with t"), (LEVELS[:0], "falls with t"),
        (NO_SIGNAL, "no signal"),
    ],
)
def test_levels_of_a_bound(levels: Tensor, words: str):
    with pytest.raises(UserError, match=words):
        variational_bound(Network(), normal(1, 2, 4, 4), levels, Draws())
    if levels is NO_SIGNAL:
        short = torch.tensor([0.9, 0.5, 0.0])
        assert variational_bound(lambda z, t: z, normal(2, 2, 4, 4), short, Draws(), "x0").isfinite().all()


def test_words_are_a_list():
    with pytest.raises(UserError, match=r"such as \['cat', 'dog'\]"):
        TextConditioner.from_words("cat dog")
