"""Without a GPU: tensors that say they are on one, so that none meets a tensor of the CPU unnoticed.

They have no numbers (`FakeTensorMode`), so this shows where everything would run, not what comes out of it; for that
there is test_gpu.py.
"""

from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ldm_edu.autoencoder import FirstStageObjective
from ldm_edu.diffusion import Schedule, samplers
from ldm_edu.pipeline import SAMPLERS
from ldm_edu.training.diffusion import DiffusionObjective
from ldm_edu.unet.fast import Denoiser, compiled, keys_and_values

PROMPTS = ["a red star", "a blue circle above a red star"]


@pytest.fixture
def pretence(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Within it, what is moved to the GPU is there, and what is made is on a CPU that is as unreal."""
    levels = samplers._levels

    def read_levels(*given: Any) -> list[tuple[int, float, float]]:  # from the schedule, which is real
        with unset_fake_temporarily():
            return levels(*given)

    monkeypatch.setattr(samplers, "_levels", read_levels)
    monkeypatch.setattr(Schedule, "check", lambda schedule, t: None)  # it looks at numbers
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            on_gpu(1)
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"this torch cannot pretend: {str(error).splitlines()[0]}")
    return mode


def on_gpu(*shape: int) -> Tensor:
    return torch.randn(*shape).to("cuda")


def test_a_tensor_of_the_cpu_is_noticed(pretence: FakeTensorMode):
    unet = tiny.latent_diffusion().unet
    with pretence, pytest.raises(RuntimeError, match="device"):
        unet.to("cuda")(torch.randn(2, 2, 4, 4), torch.tensor([1, 2]), on_gpu(2, 8, 16))


@pytest.mark.parametrize("sampler, eta", [*((sampler, 0.0) for sampler in SAMPLERS), ("ddim", 1.0)])
def test_sampling(sampler: str, eta: float, pretence: FakeTensorMode):
    model = tiny.latent_diffusion()
    with pretence:
        model.to("cuda")
        steps = list(model.steps(PROMPTS, num_steps=4, seeds=4, sampler=sampler, eta=eta, precision="float32"))
        assert len(steps) == 5 and all(step.z.is_cuda and step.z0.is_cuda for step in steps)
        assert model.to_image(steps[-1].z0).shape == (2, 3, 16, 16)


def test_a_denoiser_that_keeps_keys_and_values(pretence: FakeTensorMode):
    unet = tiny.latent_diffusion().unet
    with pretence:
        denoiser, context = Denoiser(unet.to("cuda")), on_gpu(2, 8, 16)
        for _ in range(2):
            assert denoiser(on_gpu(2, 2, 4, 4), torch.tensor([400, 400]).to("cuda"), context).is_cuda


@pytest.mark.parametrize("stage", ["first stage", "diffusion"])
def test_the_loss_of_a_training_step(stage: str, pretence: FakeTensorMode):
    first = stage == "first stage"
    objective = FirstStageObjective(tiny.first_stage()) if first else DiffusionObjective(tiny.latent_diffusion(), 0.5)
    with pretence:
        tokens = torch.zeros(2, 8, dtype=torch.int64).to("cuda")
        batch = on_gpu(2, 3, 16, 16) if first else (on_gpu(2, 2, 4, 4), tokens)
        loss, readings = objective.to("cuda")(batch, torch.Generator())
        assert loss.is_cuda and loss.requires_grad and all(reading.is_cuda for reading in readings.values())


def test_the_compiled_network_fits_into_one_cuda_graph(pretence: FakeTensorMode, monkeypatch: pytest.MonkeyPatch):
    """One program without a break, and no tensor of the CPU in it: torch would then leave the CUDA graph out."""
    programs: list[tuple[torch.fx.GraphModule, dict[str, Any]]] = []

    def note(program: torch.fx.GraphModule, inputs: list[Tensor], **named: Any) -> Any:
        programs.append((program, named["options"]))
        return program.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    unet = tiny.latent_diffusion().unet
    with pretence, torch.no_grad():
        call = compiled(unet.to("cuda"))
        for context in (on_gpu(4, 8, 16), on_gpu(4, 8, 16)):  # with a condition and without, of two latents
            kept = keys_and_values(unet, context)
            answer = call(on_gpu(2, 2, 4, 4), torch.tensor([400, 400]).to("cuda"), kept)
            assert answer.is_cuda and answer.shape == (4, 2, 4, 4)
    ((program, options),) = programs
    assert options["triton.cudagraphs"]
    values = [node.meta["example_value"] for node in program.graph.nodes if "example_value" in node.meta]
    tensors = [value for value in values if isinstance(value, Tensor)]
    assert len(tensors) > 100 and all(tensor.is_cuda for tensor in tensors)
