"""The same code on a CUDA GPU: equal to the CPU in float32, close in bfloat16, and training goes down."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderKL, FirstStageObjective
from ldm_edu.datasets import ShapeScenes, read_scenes
from ldm_edu.evaluation.comparison import compare
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import has_fast_bfloat16, pick_device
from ldm_edu.training import Settings, fit
from ldm_edu.training.diffusion import DiffusionObjective
from ldm_edu.unet import UNet
from ldm_edu.unet.fast import Denoiser

pytestmark = pytest.mark.gpu

PROMPTS = ["a red star", "a blue circle above a red star"]
# Beside the float32 answer, of which bfloat16 keeps 8 bits: the mean error, as a share of the standard deviation.
BFLOAT16 = 0.05


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No TF32, which rounds factors to 10 bits, and the GPU chosen by default."""
    monkeypatch.delenv("LDM_EDU_DEVICE", raising=False)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def relative_error(one: Tensor, other: Tensor) -> float:
    return ((one.float().cpu() - other.float().cpu()).abs().mean() / other.float().std().cpu()).item()


def test_the_gpu_is_what_runs_by_default():
    assert pick_device().type == "cuda"


def test_the_unet_answers_as_on_the_cpu():
    torch.manual_seed(0)
    model = tiny.stirred(UNet(tiny.UNET)).eval()
    z, t, context = torch.randn(3, 2, 8, 8), torch.tensor([0, 400, 999]), torch.randn(3, 7, 16)
    with torch.no_grad():
        expected = model(z, t, context)
        answer = model.cuda()(z.cuda(), t.cuda(), context.cuda()).cpu()
    torch.testing.assert_close(answer, expected, atol=1e-3 * expected.abs().max().item(), rtol=0)


@pytest.mark.filterwarnings("error:Sampling without")
def test_the_compiled_unet_answers_as_the_eager_one():
    """In CUDA graphs, which write every answer to the same memory, and read every prompt from the same."""
    torch.manual_seed(0)
    unet = tiny.stirred(UNet(tiny.UNET)).eval().cuda()
    denoiser, z, t = Denoiser(unet, compile=True), torch.randn(2, 2, 8, 8).cuda(), torch.tensor([400, 400]).cuda()
    prompts = [torch.randn(2, 7, 16).cuda() for _ in range(2)]
    contexts = *prompts, *prompts, torch.stack(prompts)
    answers = [denoiser(z, t, context) for context in contexts]
    with torch.no_grad():
        for answer, context in zip(answers, contexts):
            expected = torch.cat([unet(z, t, each) for each in context.view(-1, 2, 7, 16)])
            torch.testing.assert_close(answer, expected, atol=1e-3 * expected.abs().max().item(), rtol=0)


def test_the_first_stage_answers_as_on_the_cpu():
    model, images = tiny.first_stage(), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latent = model.encode(images)
        restored = model.decode(latent)
        model.cuda()
        on_gpu = model.encode(images.cuda())
        torch.testing.assert_close(on_gpu.cpu(), latent, atol=1e-3 * latent.abs().max().item(), rtol=0)
        again = model.decode(latent.cuda()).cpu()
    torch.testing.assert_close(again, restored, atol=1e-3 * restored.abs().max().item(), rtol=0)


def test_first_stages_are_compared_as_on_the_cpu():
    images = list(ShapeScenes(64, count=3).images(range(3)))
    stages = tiny.first_stage(), tiny.first_stage().cuda()
    (here, _), (there, _) = (compare({"it": stage}, images)["rows"] for stage in stages)
    for name in ("psnr", "ssim", "perceptual", "frechet"):
        assert there[name] == pytest.approx(here[name], rel=0.1), name


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_the_same_seed_is_the_same_picture(sampler: str, eta: float):
    """The noise is drawn on the CPU; what differs is rounding, carried through the steps."""
    model = tiny.latent_diffusion()
    arguments = dict(num_steps=5, seeds=4, sampler=sampler, eta=eta, precision="float32")
    expected = model.sample(PROMPTS, **arguments)
    torch.testing.assert_close(model.cuda().sample(PROMPTS, **arguments), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "shapes-text"])
def test_sampling_in_bfloat16_is_close(name: str):
    if not has_fast_bfloat16(torch.device("cuda")):
        pytest.skip("this GPU has no bfloat16")
    model = tiny.latent_diffusion().cuda() if name == "tiny" else LatentDiffusion.load(name, device="cuda")
    prompts = PROMPTS if name == "tiny" else ["a small red star above a large blue circle"] * 4
    exact, rounded, automatic = (
        torch.stack([s.z0 for s in model.steps(prompts, num_steps=10, precision=precision)])
        for precision in ("float32", "bfloat16", "auto")
    )
    assert rounded.dtype == torch.float32
    first = relative_error(rounded[0], exact[0])  # one answer of the network
    assert 1e-5 < first < BFLOAT16, first
    assert relative_error(automatic[0], rounded[0]) < 0.1 * first, "auto is bfloat16 on this GPU"
    # Ten steps carry the rounding on: still the same pictures, to the eye.
    images, expected = model.to_image(rounded[-1]), model.to_image(exact[-1])
    assert (images - expected).abs().mean() < 0.03


def test_scenes_are_the_same_and_read_the_same():
    here, there = ShapeScenes(64, count=200, seed=3), ShapeScenes(64, count=200, seed=3, device="cuda")
    images = there.images(range(200))
    assert images.is_cuda and there.captions(range(200)) == here.captions(range(200))
    torch.testing.assert_close(images.cpu(), here.images(range(200)), atol=1e-3, rtol=0)
    for one, other in zip(read_scenes(images), read_scenes(here.images(range(200)))):
        assert [t[:3] for t in one.things] == [t[:3] for t in other.things]


SHORT = Settings(steps=80, batch_size=8, learning_rate=3e-3, warmup=5, ema_decay=0.9, log_every=20, save_every=40)


def losses(objective: nn.Module, get_batch, settings: Settings, out: Path | None = None) -> list[float]:
    return [float(row["loss"]) for row in fit(objective, get_batch, settings, out).rows]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_first_stage_learns(precision: str, tmp_path: Path):
    torch.manual_seed(0)
    scenes = ShapeScenes(32, count=1000, device="cuda")

    def get_batch(generator: torch.Generator) -> Tensor:
        return scenes.images(torch.randint(1000, (8,), generator=generator))

    model = AutoencoderKL(tiny.AUTOENCODER)
    model.start_with_small_variance()
    seen = losses(FirstStageObjective(model), get_batch, replace(SHORT, precision=precision), tmp_path / "out")
    assert seen[-1] < 0.95 * seen[0], seen
    assert next(model.parameters()).is_cuda and next(model.parameters()).dtype == torch.float32
    model.save(tmp_path / "checkpoint", "a card")
    back = AutoencoderKL.load(tmp_path / "checkpoint")
    assert torch.equal(back.decoder.conv_out.weight, model.decoder.conv_out.weight.cpu().half().float())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_diffusion_model_learns(precision: str):
    torch.manual_seed(0)
    model = tiny.latent_diffusion()
    model.unet = UNet(tiny.UNET)
    tokens = model.conditioner.tokenize(PROMPTS * 4).cuda()
    # Latents without noise of their own, one for each prompt: easily learned.
    clean = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1)).repeat(4, 1, 1, 1).cuda()
    objective = DiffusionObjective(model, condition_dropout=0.1)
    seen = losses(objective, lambda generator: (clean, tokens), replace(SHORT, precision=precision))
    assert seen[-1] < 0.9 * seen[0], seen


def test_a_run_of_the_gpu_is_taken_up_again(tmp_path: Path):
    """Not bit for bit, as on a CPU: the GPU's sums have no fixed order."""

    class Stopped(Exception):
        pass

    def stop(step: int, readings: dict[str, float]) -> None:
        if step == 60:
            raise Stopped

    def get_batch(generator: torch.Generator) -> Tensor:
        return (torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1).cuda()

    whole, broken, resumed = (FirstStageObjective(tiny.first_stage()) for _ in range(3))
    settings = replace(SHORT, precision="no", learning_rate=1e-4)
    expected = fit(whole, get_batch, settings, tmp_path / "whole").rows
    with pytest.raises(Stopped):
        fit(broken, get_batch, settings, tmp_path / "broken", on_step=stop)
    rows = fit(resumed, get_batch, settings, tmp_path / "broken", resume=True).rows
    assert [row["step"] for row in rows] == ["20", "40", "60", "80"]
    assert float(rows[-1]["loss"]) == pytest.approx(float(expected[-1]["loss"]), rel=1e-2)
