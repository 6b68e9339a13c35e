"""DDIM and DDPM against diffusers' step by step, guidance, and an oracle whose samples are known."""

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from denoisers import Draws, Network, normal
from torch import Tensor

from ldm_edu.diffusion import (
    PREDICTIONS,
    GaussianMixture,
    Schedule,
    ddim,
    ddpm,
    dpm_solver,
    guided,
    plms,
    spaced_timesteps,
    training_target,
)
from ldm_edu.runtime import UserError

BETAS = {"linear": (1e-4, 0.02), "sqrt_linear": (0.00085, 0.012), "cosine": (0.0, 0.999)}
THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """diffusers' schedulers."""
    return pytest.importorskip("diffusers.schedulers", reason="compares with diffusers, of the extra [test]")


def schedule(kind: str = "sqrt_linear", T: int = 1000) -> Schedule:
    return Schedule(kind, T, *BETAS[kind])


def assert_same_step(ours: Tensor, theirs: Tensor) -> None:
    """1e-5 of the largest number (z0 can be a hundred at t = 999, where it is a difference divided by 0.07)."""
    tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs, atol=tolerance * max(1.0, theirs.abs().max().item()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_steps_as_in_diffusers(
    prediction: str, eta: float, num_steps: int, dtype: torch.dtype, theirs: ModuleType
):
    """Spacing "trailing", no clipping, the last step to a clean latent (set_alpha_to_one); the same noise."""
    levels, draws = schedule().alphas_cumprod.to(dtype), Draws()
    scheduler = theirs.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
        prediction_type=THEIR_PREDICTION[prediction],
    )  # fmt: skip
    scheduler.alphas_cumprod = levels
    scheduler.set_timesteps(num_steps)
    network, start = Network(), normal(2, 3, 4, 4).to(dtype)
    ours = list(ddim(network, start, levels, scheduler.timesteps.tolist(), prediction, eta, draws))
    assert len(draws.drawn) == (num_steps - 1 if eta else 0)  # the last step adds none
    loop = start
    for i, (step, following) in enumerate(pairwise(ours)):
        fresh = draws.drawn[i].to(dtype) if i < len(draws.drawn) else torch.zeros_like(start)

        def theirs_from(z: Tensor, t: int = step.t, fresh: Tensor = fresh) -> tuple[Tensor, Tensor]:
            output = Network()(z, torch.full((2,), t))
            answer = scheduler.step(output, t, z, eta=eta, variance_noise=fresh if eta else None)
            return answer.prev_sample, answer.pred_original_sample

        z, z0 = theirs_from(step.z)
        assert_same_step(following.z, z)
        assert_same_step(step.z0, z0)
        loop = theirs_from(loop)[0]
    assert (ours[-1].z - loop).abs().max() < 1e-4 * loop.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("T, num_steps", [(1000, 10), (40, 40)])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_steps_as_in_diffusers(
    prediction: str, variance: str, T: int, num_steps: int, dtype: torch.dtype, theirs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """As above; noise is injected. Unless it is at t = 0, diffusers adds noise in its last step too; we never do."""
    levels, draws = schedule(T=T).alphas_cumprod.to(dtype), Draws()
    scheduler = theirs.DDPMScheduler(
        T, clip_sample=False, timestep_spacing="trailing", prediction_type=THEIR_PREDICTION[prediction],
        variance_type={"posterior": "fixed_small", "beta": "fixed_large"}[variance],
    )  # fmt: skip
    scheduler.alphas_cumprod = levels
    scheduler.set_timesteps(num_steps)
    start = normal(2, 3, 4, 4).to(dtype)
    ours = list(ddpm(Network(), start, levels, scheduler.timesteps.tolist(), prediction, variance, draws))
    assert len(draws.drawn) == num_steps - 1
    for i, (step, following) in enumerate(pairwise(ours)):
        fresh = draws.drawn[i].to(dtype) if i < len(draws.drawn) else torch.zeros_like(start)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, fresh=fresh, **__: fresh
        )
        answer = scheduler.step(Network()(step.z, torch.full((2,), step.t)), step.t, step.z)
        assert_same_step(following.z, answer.prev_sample)
        assert_same_step(step.z0, answer.pred_original_sample)


@pytest.mark.parametrize("num_steps", [1, 4, 1000])
@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_the_stream_of_steps(sampler, num_steps: int):
    timesteps, network, start = spaced_timesteps(1000, num_steps), Network(), normal(2, 3, 4, 4)
    steps = list(sampler(network, start, schedule().alphas_cumprod, timesteps, "v", draw=Draws()))
    assert steps[0].z is start and [s.t for s in steps] == [*timesteps, -1] == [*network.calls, -1]
    assert steps[-1].z is steps[-1].z0 and torch.equal(steps[-1].z, steps[-2].z0)
    assert all(s.z.shape == s.z0.shape == start.shape and s.z.dtype == torch.float32 for s in steps)


def test_a_sampler_works_only_when_asked():
    network = Network()
    stream = ddim(network, normal(2, 3, 4, 4), schedule().alphas_cumprod, spaced_timesteps(1000, 10))
    assert network.calls == []
    next(stream), next(stream)
    assert network.calls == [999, 899]


@pytest.mark.parametrize("num_steps", [10, 1000])
def test_ddim_at_eta_1_is_ddpm(num_steps: int):
    """Mean and variance of every step: with the same noise they walk the same way."""
    common = (normal(2, 3, 4, 4).double(), schedule().alphas_cumprod, spaced_timesteps(1000, num_steps))
    network = Network()
    one = list(ddim(network, *common, eta=1.0, draw=Draws()))
    other = list(ddpm(network, *common, draw=Draws()))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.z, b.z, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "sqrt_linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", [ddim, ddpm, plms, dpm_solver])
def test_half_precision_is_that_of_latents_and_not_of_noise_levels(sampler, prediction: str, kind: str, dtype):
    """Down to t = 0, where in bfloat16 ᾱ = 0.99915 would be 1 and nothing be left to divide by."""
    own, world = schedule(kind), GaussianMixture(torch.zeros(1, 2, 4, 4), 0.5)
    start, timesteps = normal(2, 2, 4, 4), [*spaced_timesteps(1000, 50)[:-1], 1, 0]
    ends = []
    for z in (start, start.to(dtype)):
        draw = {"draw": Draws()} if sampler is ddpm else {}
        *_, end = sampler(
            world.denoiser(own.alphas_cumprod, prediction), z, own.alphas_cumprod, timesteps, prediction, **draw
        )
        ends.append(end.z)
    assert ends[1].dtype == dtype and ends[1].isfinite().all()
    assert (ends[1].float() - ends[0]).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("sampler", [ddim, ddpm, plms, dpm_solver])
def test_many_small_steps_are_not_lost_in_half_precision(sampler):
    """1000 steps, each of which moves the latent by less than bfloat16 can tell; what the denoiser sees is rounded."""
    own, world, start = schedule(), GaussianMixture(torch.zeros(1, 2, 4, 4), 0.5), normal(2, 2, 4, 4)
    seen, ends = set(), []

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        seen.add(z.dtype)
        return world.denoiser(own.alphas_cumprod)(z, t)

    for dtype in (torch.float32, torch.bfloat16):
        draw = {"draw": Draws()} if sampler is ddpm else {}
        *_, end = sampler(denoiser, start.to(dtype), own.alphas_cumprod, range(999, -1, -1), **draw)
        ends.append(end.z.float())
        assert seen == {dtype} and end.z.dtype == end.z0.dtype == dtype
        seen.clear()
    assert (ends[1] - ends[0]).square().mean().sqrt() < 0.01


@pytest.mark.parametrize("sampler", [ddim, ddpm, plms, dpm_solver])
@pytest.mark.parametrize("answer", [lambda z: z[:1], lambda z: z[:, :1], lambda z: torch.cat([z, z], 1)])
def test_an_answer_of_another_shape_is_refused(sampler, answer: Callable[[Tensor], Tensor]):
    draw = {"draw": Draws()} if sampler in (ddim, ddpm) else {}
    with pytest.raises(UserError, match=r"shape of z, \(2, 3, 4, 4\); its answer is \([12], [136], 4, 4\)"):
        next(sampler(lambda z, _: answer(z), normal(2, 3, 4, 4), schedule().alphas_cumprod, [999, 499], **draw))


@pytest.mark.parametrize("sampler", [ddim, ddpm, plms, dpm_solver])
def test_what_is_no_schedule_and_no_index_is_named(sampler):
    draw = {"draw": Draws()} if sampler in (ddim, ddpm) else {}
    levels = schedule().alphas_cumprod
    for given, words in (
        ((Schedule(), [999]), "a schedule's .alphas_cumprod; this is .*Schedule"),
        ((levels.tolist(), [999]), r"alphas_cumprod is a tensor \(T,\)"),
        ((levels, ["999"]), "integers.*'str'"),
        ((levels, [999.0]), "integers.*'float'"),
    ):
        with pytest.raises(UserError, match=words):
            next(sampler(Network(), normal(2, 3, 4, 4), *given, **draw))
    with pytest.raises(UserError, match="stop are integers.*'float'"):
        next(sampler(Network(), normal(2, 3, 4, 4), levels, [999], stop=0.0, **draw))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_is_added_in_half_precision(dtype: torch.dtype):
    own, t = schedule(), torch.arange(20)
    noisy = own.add_noise(torch.zeros(20, 2, 4, 4, dtype=dtype), torch.ones(20, 2, 4, 4, dtype=dtype), t)
    expected = (1 - own.alphas_cumprod[:20]).sqrt().float().view(20, 1, 1, 1)
    torch.testing.assert_close(noisy.float(), expected.expand(20, 2, 4, 4), rtol=0.005, atol=0)
    assert noisy.dtype == dtype


def test_samplers_that_add_noise_ask_where_from():
    common = (Network(), normal(2, 3, 4, 4), schedule().alphas_cumprod, [999, 499])
    generator = torch.Generator()
    for stream in (ddim(*common, eta=0.3), ddpm(*common), ddpm(*common, draw=generator)):
        with pytest.raises(UserError, match="draw"):
            next(stream)
    with pytest.raises(UserError, match="'learned'"):
        next(ddpm(*common, variance="learned", draw=Draws()))


# guidance


class Conditioned:
    """A network whose answer is linear in its context; it counts its calls and their sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.sizes.append(len(z))
        assert len(z) == len(t) == len(context)
        return (
            torch.sin(z) + context.mean((1, 2)).view(-1, 1, 1, 1) * torch.cos(z) + t.view(-1, 1, 1, 1) / 1000
        )


def test_guidance_goes_from_without_through_with_and_beyond():
    network, z, t = Conditioned(), normal(2, 3, 4, 4), torch.tensor([500, 500])
    context, null = normal(2, 5, 6, seed=1), normal(2, 5, 6, seed=2)
    answers = {scale: guided(network, context, null, scale)(z, t) for scale in (0, 0.5, 1, 3, 7.5)}
    assert network.sizes == [4, 4, 2, 4, 4]  # one batch for both predictions; at scale 1 only one of them
    with_condition, without = network(z, t, context), network(z, t, null)
    torch.testing.assert_close(answers[0], without)
    torch.testing.assert_close(answers[1], with_condition)
    for scale, answer in answers.items():
        torch.testing.assert_close(answer, without + scale * (with_condition - without), atol=1e-5, rtol=1e-5)
    assert (answers[3] - answers[1]).abs().max() > 0.01


# an oracle: for data N(mean, std²), what the best network answers is a formula

MEAN, STD = 0.7, 0.5


def oracle(levels: Tensor, prediction: str):
    """E[target | z_t] for independent numbers from N(MEAN, STD²)."""

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        level = levels[t[0]]
        variance = level * STD**2 + 1 - level
        epsilon = (1 - level).sqrt() * (z - level.sqrt() * MEAN) / variance
        z0 = (z - (1 - level).sqrt() * epsilon) / level.sqrt()
        return training_target(prediction, z0, epsilon, level)

    return denoiser


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", BETAS)
def test_ddim_with_the_best_network_follows_the_exact_path(kind: str, prediction: str):
    """The path keeps (z - its mean) / (its standard deviation); every number of the noise is a data point then."""
    levels, noise = schedule(kind).alphas_cumprod, normal(1, 1, 100, 100).double()
    last = levels[-1]
    exact = MEAN + STD * (noise - last.sqrt() * MEAN) / (last * STD**2 + 1 - last).sqrt()
    errors = []
    for num_steps in (20, 100, 1000):
        *_, end = ddim(
            oracle(levels, prediction), noise, levels, spaced_timesteps(1000, num_steps), prediction
        )
        errors.append((end.z - exact).abs().max().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.02, errors
    assert end.z.mean().item() == pytest.approx(MEAN, abs=0.05) and end.z.std().item() == pytest.approx(
        STD, abs=0.02
    )


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_with_the_best_network_has_the_right_moments(variance: str):
    levels = schedule().alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 1, 120, 120, generator=generator, dtype=torch.float64)

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    *_, end = ddpm(oracle(levels, "eps"), start, levels, spaced_timesteps(1000, 1000), "eps", variance, draw)
    assert end.z.mean().item() == pytest.approx(MEAN, abs=0.025)
    assert end.z.std().item() == pytest.approx(STD, abs=0.02)
