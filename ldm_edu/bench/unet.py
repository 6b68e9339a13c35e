"""Our UNet against diffusers' `UNet2DConditionModel`: one call, a training step, a whole sampling loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.bench.sides import Job, Row, Sides, as_theirs, devices, diffusers
from ldm_edu.diffusion import Schedule, guided, spaced_timesteps
from ldm_edu.diffusion.samplers import ddim
from ldm_edu.interop import schedule_to_diffusers, unet_to_diffusers
from ldm_edu.runtime import UserError, progress
from ldm_edu.training.fit import update_ema
from ldm_edu.training.recipes import shapes_text
from ldm_edu.unet import UNet, UNetConfig
from ldm_edu.unet.fast import Denoiser, compiled

TASKS = ("forward", "training step", "sampling")
STEPS, GUIDANCE, BATCH, TRAINING_BATCH = 25, 3.0, 4, 64
SMALL = 16  # places a side, in the latents of shapes-text


@dataclass(frozen=True)
class UNetJob(Job):
    """One task with a UNet; its latents have `size` places a side, its context `tokens` of them.

    forward: one call, of twice `batch` latents, as guidance makes it. training step: forward, backward, clipping,
    AdamW and the averaged weights, for `training_batch` latents. sampling: 25 steps of DDIM with guidance 3.
    """

    peer_class = "UNet2DConditionModel"

    config: UNetConfig = field(default_factory=UNetConfig)
    size: int = SMALL
    tokens: int = 32
    batch: int = BATCH
    training_batch: int = TRAINING_BATCH

    def call(self) -> Callable[[], Tensor]:
        """The task, on random weights and inputs."""
        return {"forward": self._forward, "training step": self._training, "sampling": self._sampling}[self.task]()

    @property
    def large(self) -> bool:
        """Whether it is Stable Diffusion's size, not that of shapes-text."""
        return self.size > SMALL

    @property
    def precisions(self) -> list[str]:
        """At Stable Diffusion's size a GPU is spared float32, in which it would take minutes for a row."""
        found = super().precisions
        return found[-1:] if self.large and self.device != "cpu" else found

    def _drawn(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (count, self.config.in_channels, self.size, self.size)
        z, t = torch.randn(shape, generator=generator), torch.randint(1000, (count,), generator=generator)
        context = torch.randn(count, self.tokens, self.config.context_channels, generator=generator)
        return z.to(self.device), t.to(self.device), context.to(self.device)

    def _network(self) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device), torch.no_grad():  # drawn there: on a CPU Stable Diffusion's take 20 seconds
            network = UNet(self.config)
            for p in network.parameters():  # a new UNet predicts zero
                p.add_(torch.randn_like(p), alpha=0.02)
        return (as_theirs(*unet_to_diffusers(network)) if self.peer else network).eval()

    def _predict(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The network for calls without gradients: `(z, t, context) -> prediction`, all as the job's dtype."""
        network = self.placed(self._network())
        if not self.peer:
            return (Insisting if self.compiler else Denoiser)(network, bool(self.compiler), self.dtype)
        if self.compiler:
            network = compiled(network) if self.compiler == "ours" else torch.compile(network)
        return lambda z, t, context: network(z, t, encoder_hidden_states=context).sample.clone()

    def _forward(self) -> Callable[[], Tensor]:
        predict, (z, t, context) = self._predict(), self._drawn(2 * self.batch)
        z, context = self.placed(z), context.to(self.dtype)
        # A new prompt at each call: ours would not make its K and V again, diffusers makes them in every call.
        return torch.no_grad()(lambda: predict(z, t, context.clone()))

    def _sampling(self) -> Callable[[], Tensor]:
        predict, (noise, _, context) = self._predict(), self._drawn(self.batch)
        schedule, null, context = Schedule(), torch.zeros_like(context).to(self.dtype), context.to(self.dtype)
        if not self.peer:
            timesteps = spaced_timesteps(schedule.T, STEPS)

            def ours() -> Tensor:
                denoiser = guided(predict, context, null, GUIDANCE)
                *_, last = ddim(denoiser, noise, schedule.alphas_cumprod, timesteps, "v")
                return last.z

            return torch.no_grad()(ours)
        scheduler = diffusers().DDIMScheduler(
            **schedule_to_diffusers(schedule, "v"), timestep_spacing="trailing", clip_sample=False
        )
        scheduler.set_timesteps(STEPS, device=self.device)
        both = torch.cat([null, context])

        def theirs() -> Tensor:  # as in diffusers' pipelines
            z = self.placed(noise)
            for t in scheduler.timesteps:
                without, with_condition = predict(torch.cat([z, z]), t, both).chunk(2)
                z = scheduler.step(without + GUIDANCE * (with_condition - without), t, z).prev_sample
            return z

        return torch.no_grad()(theirs)

    def _training(self) -> Callable[[], Tensor]:
        """Mixed precision: the weights stay in float32. Gives the loss and a gradient."""
        network = replace(self, precision="float32").placed(self._network()).train()
        z, t, context = self._drawn(self.training_batch)
        z = replace(self, precision="float32").placed(z)
        weights = list(network.parameters())
        optimizer = torch.optim.AdamW(weights, 1e-4, fused=True)
        if self.peer:
            from diffusers.training_utils import EMAModel

            average = EMAModel(weights, decay=0.999, foreach=True)
        else:
            ema = [w.detach().clone() for w in weights]

        def step() -> Tensor:
            with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.precision != "float32"):
                answer = network(z, t, encoder_hidden_states=context).sample if self.peer else network(z, t, context)
            loss = F.mse_loss(answer.float(), z)
            loss.backward()
            gradient = network.conv_in.weight.grad.flatten().clone()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if self.peer:
                average.step(weights)
            else:
                update_ema(ema, weights, 0.999, step=1000)
            return torch.cat([loss.detach()[None], gradient])

        return step


def unet(
    runs: int = 10, large: bool = False, device: str | None = None, task: str | None = None
) -> Iterator[Row]:
    """At the size of shapes-text, each task at equal precision and best against best.

    Best: each side in the precision and memory order that were its fastest in a short trial, compiled or not: ours as
    `Denoiser` does it, diffusers' by torch.compile as it is. A training step is never compiled. The row before it is
    that of the best without a compiler: of both sides on a CPU, on a GPU of diffusers alone.

    Args:
        runs: of each side, for each row.
        large: at Stable Diffusion 1's size instead; on a CPU one call, for one latent with guidance.
        device: by default the CPU, and a GPU if there is one.
        task: one of `TASKS`, by default all.

    Returns:
        rows of `Sides.row`, each as soon as it is measured. One whose compiler fails is left out, with a warning.

    Raises:
        UserError: no diffusers here, no such task, or none that is timed.
    """
    diffusers()
    size = dict(size=64, tokens=77, training_batch=4) if large else dict(config=shapes_text.MODEL)
    jobs = [UNetJob(False, where, "forward", **size) for where in devices(device)]
    wanted = {job.device: [plan for plan in _plans(job) if task in (None, plan.job.task)] for job in jobs}
    if not any(wanted.values()):
        raise UserError(f"No {task!r} is timed on {' or '.join(wanted)} at this size; there are {', '.join(TASKS)}.")
    for where, plans in wanted.items():
        with Sides() as sides:
            fastest = cache(sides.fastest)
            for plan in progress(plans, desc=f"bench on {where}"):
                ours, theirs = plan.job, replace(plan.job, peer=True)
                if plan.best:
                    ours, theirs = (fastest(job, compiler) for job, compiler in zip((ours, theirs), plan.compilers))
                try:
                    row = sides.row(plan.name, ours, runs, theirs)
                except RuntimeError as error:
                    if not ours.compiler and not theirs.compiler:
                        raise
                    warnings.warn(f"No row for {plan.name}, {ours.setting}: a compiler failed. {error}", stacklevel=2)
                else:
                    yield row


class Insisting(Denoiser):
    """Does not go on without the compiler: the row would have a wrong name."""

    def __call__(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Sampling without the compiler")
            return super().__call__(z, t, context)


@dataclass(frozen=True)
class Plan:
    """A row to be measured.

    Args:
        best: each side in its own fastest way, not both as the job says.
        compilers: those that the search for the best may try: ours, theirs.
    """

    name: str
    job: UNetJob
    best: bool = False
    compilers: tuple[str, str] = ("", "")


def _plans(job: UNetJob) -> Iterator[Plan]:
    cpu, size = job.device == "cpu", ", SD 1" * job.large
    if job.large and cpu:  # the rest would take hours
        yield from (Plan("forward" + size, replace(job, batch=1, precision=p)) for p in job.precisions)
        return
    for task in TASKS:
        name, job = task + size, replace(job, task=task)
        for precision in job.precisions:
            yield Plan(name, replace(job, precision=precision))
        if task == "training step":  # never compiled
            yield Plan(f"{name}, best", job, best=True)
            continue
        if cpu:
            yield Plan(f"{name}, best, not compiled", job, best=True)
        else:
            yield Plan(f"{name}, best, peer not compiled", job, best=True, compilers=("ours", ""))
        yield Plan(name, replace(job, precision=job.precisions[-1], channels_last=not cpu, compiler="ours"))
        yield Plan(f"{name}, best", job, best=True, compilers=("ours", "default"))
