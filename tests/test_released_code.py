"""The released code itself beside ours: same weights under its names, same timesteps, same samples.

Skipped where it is not installed; its own requirements are years old, so it is installed without them:

    uv pip install --no-deps stable-diffusion-sdkit==2.1.5 omegaconf "antlr4-python3-runtime==4.9.*"

That package wraps the authors' later repository (Stable Diffusion 2), which knows all that the paper's models need but
the quantiser.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from compvis_first_stage import RELEASED, released
from compvis_unet import CELEBA, STABLE_DIFFUSION
from denoisers import Draws, Network, normal
from first_stages import close, equal
from first_stages import same_outputs as same_pictures
from first_stages import stirred as stirred_stage
from test_interop_compvis_unet import CONFIGS
from torch import Tensor, nn
from unets import same_outputs, stirred

from ldm_edu.diffusion import Schedule, ddim, dpm_solver, guided, plms, spaced_timesteps
from ldm_edu.interop import (
    first_stage_from_compvis,
    first_stage_to_compvis,
    unet_from_compvis,
    unet_to_compvis,
)
from ldm_edu.training.fit import update_ema

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
REASON = "compares with the released code; how to install it is said in this file"
pytest.importorskip("omegaconf", reason=REASON)
model, openaimodel, util = (
    pytest.importorskip(f"ldm.modules.diffusionmodules.{name}", reason=REASON)
    for name in ("model", "openaimodel", "util")
)
ema = pytest.importorskip("ldm.modules.ema", reason=REASON)
samplers = {
    name: getattr(pytest.importorskip(f"ldm.models.diffusion.{file}", reason=REASON), name)
    for file, name in (("ddim", "DDIMSampler"), ("plms", "PLMSSampler"), ("dpm_solver", "DPMSolverSampler"))
}


@pytest.mark.parametrize("name", CONFIGS)
def test_unets(name: str):
    params = CONFIGS[name]
    depth = params.get("transformer_depth", 1)
    more = {"context_dim": [params["context_dim"]] * depth} if "context_dim" in params else {}
    torch.manual_seed(0)
    theirs = stirred(openaimodel.UNetModel(**(params | more | {"use_checkpoint": False})))
    mine = unet_from_compvis(params, theirs.state_dict())
    assert equal(unet_to_compvis(mine)[1], theirs.state_dict())

    def call(theirs: nn.Module, z: Tensor, t: Tensor, context: Tensor | None, labels: Tensor | None) -> Tensor:
        return theirs(z, t, context=None if context is None else [context] * depth, y=labels)

    same_outputs(mine, theirs, call, dtypes=(torch.float32,))  # its norms know no other


@pytest.mark.parametrize("params", [STABLE_DIFFUSION, CELEBA], ids=["Stable Diffusion 1", "CelebA-HQ"])
def test_unets_of_full_size(params: dict):
    """Without memory: on the meta device, where tensors have shapes only."""
    with torch.device("meta"):
        theirs = openaimodel.UNetModel(**params).state_dict()
        mine = unet_to_compvis(unet_from_compvis(params, theirs))[1]
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    if params is STABLE_DIFFUSION:
        assert sum(t.numel() for t in theirs.values()) == 859_520_964


@pytest.mark.parametrize("name", RELEASED)
def test_first_stages(name: str):
    params = released(name)
    shape = params["ddconfig"]
    shape |= {"ch": 32, "num_res_blocks": 1, "ch_mult": [min(m, 2) for m in shape["ch_mult"]]}
    twice = 1 + shape["double_z"]
    torch.manual_seed(0)
    theirs = nn.ModuleDict({
        "encoder": model.Encoder(**shape), "decoder": model.Decoder(**shape),
        "quant_conv": nn.Conv2d(twice * shape["z_channels"], twice * params["embed_dim"], 1),
        "post_quant_conv": nn.Conv2d(params["embed_dim"], shape["z_channels"], 1),
    })  # fmt: skip
    if params["n_embed"]:  # a quantiser is not in that package
        theirs["quantize"] = nn.ModuleDict({"embedding": nn.Embedding(params["n_embed"], params["embed_dim"])})
    stirred_stage(theirs)
    mine = first_stage_from_compvis(tensors=theirs.state_dict(), **params)
    assert equal(first_stage_to_compvis(mine)[1], theirs.state_dict())
    same_pictures(
        mine, lambda images: theirs["quant_conv"](theirs["encoder"](images)),
        lambda latent: theirs["decoder"](theirs["post_quant_conv"](latent)), side=2 * mine.f, dtypes=[torch.float32],
    )  # fmt: skip


@pytest.mark.parametrize(
    "theirs, mine, ends",
    [
        ("linear", "sqrt_linear", (0.0015, 0.0195)),
        ("sqrt_linear", "linear", (1e-4, 0.02)),
        ("cosine", "cosine", (0, 0.999)),
    ],
)
def test_schedules(theirs: str, mine: str, ends: tuple[float, float]):
    """What is linear there is linear in the roots; its cosine has ends of its own."""
    betas = util.make_beta_schedule(theirs, 1000, *ends)
    ours = Schedule(mine, 1000, *ends).alphas_cumprod
    torch.testing.assert_close(ours, torch.from_numpy(np.cumprod(1 - betas)).to(ours), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("theirs, mine", [("uniform", "uniform"), ("quad", "quadratic")])
def test_timesteps(theirs: str, mine: str, steps: int):
    assert spaced_timesteps(1000, steps, mine)[::-1] == util.make_ddim_timesteps(theirs, steps, 1000, False).tolist()


class Model:
    """Stands for the released `LatentDiffusion`, as its samplers see it, and for our denoiser."""

    num_timesteps, device, parameterization = 1000, torch.device("cpu"), "eps"

    def __init__(self) -> None:
        self.alphas_cumprod = Schedule("sqrt_linear").alphas_cumprod
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        self.asked: list[int] = []

    def apply_model(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Other answers at each timestep and for each condition."""
        self.asked.append(round(t[0].item()))
        return Network()(z, t.round()) * (1 + condition.view(-1, 1, 1, 1))


NOISE, CONDITION, NONE = normal(2, 3, 4, 4), torch.tensor([0.3, -0.4]), torch.zeros(2)


def theirs_and_ours(theirs: str, ours: Callable, timesteps: list[int], **settings: object) -> None:
    """Both from the same noise, with guidance: the same timesteps asked, the same sample."""
    their_model, mine = Model(), Model()
    expected = samplers[theirs](their_model).sample(
        len(timesteps), 2, (3, 4, 4), CONDITION, x_T=NOISE, verbose=False, unconditional_guidance_scale=3.0,
        unconditional_conditioning=NONE, **{name: value for name, value in settings.items() if name == "eta"},
    )[0]  # fmt: skip
    denoiser = guided(mine.apply_model, CONDITION, NONE, 3.0)
    *_, last = ours(denoiser, NOISE, mine.alphas_cumprod, timesteps, **settings, stop=0)
    assert mine.asked == their_model.asked and len(mine.asked) >= len(timesteps)
    close(last.z, expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [4, 50])
def test_ddim(steps: int, eta: float, monkeypatch: pytest.MonkeyPatch):
    draws = Draws()
    monkeypatch.setattr("ldm.models.diffusion.ddim.noise_like", lambda shape, *_: draws(shape[1:]))
    theirs_and_ours("DDIMSampler", ddim, spaced_timesteps(1000, steps, "uniform"), eta=eta, draw=Draws())


@pytest.mark.parametrize("steps", [4, 50])
def test_plms(steps: int):
    theirs_and_ours("PLMSSampler", plms, spaced_timesteps(1000, steps, "uniform"))


@pytest.mark.parametrize("steps", [9, 27])
def test_dpm_solver(steps: int):
    """Theirs runs in continuous time; numbers of steps that divide 999 meet whole timesteps."""
    timesteps = [999 - i * 999 // steps for i in range(steps)]
    theirs_and_ours("DPMSolverSampler", dpm_solver, timesteps, lower_order_final=steps < 15)


def test_averaged_weights():
    """Theirs counts steps from 1, ours from 0."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    mine, theirs = [w.detach().clone() for w in network.parameters()], ema.LitEma(network, decay=0.9)
    for step in range(1, 100):
        for weight in network.parameters():
            nn.init.normal_(weight)
        update_ema(mine, list(network.parameters()), 0.9, step)
        theirs(network)
    theirs.copy_to(network)
    for one, other in zip(mine, network.parameters()):
        close(one, other)
