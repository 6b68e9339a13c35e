"""Our first stage against diffusers' `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.bench.sides import Job, Row, Sides, as_theirs, devices, diffusers
from ldm_edu.interop import first_stage_to_diffusers
from ldm_edu.runtime import UserError, progress

TASKS = ("encode", "decode")
LARGE = 1024  # pixels


@dataclass(frozen=True)
class FirstStageJob(Job):
    """Encode or decode one picture of `size` pixels a side."""

    peer_class = "AutoencoderKL"

    config: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    size: int = 128

    def call(self) -> Callable[[], Tensor]:
        """The network's answer to one picture, or to one latent."""
        network, generator = self.placed(_network(self.peer, self.config)), torch.Generator().manual_seed(0)
        c, f = self.config.latent_channels, self.config.f
        shape = (1, 3, self.size, self.size) if self.task == "encode" else (1, c, self.size // f, self.size // f)
        given = self.placed(torch.randn(shape, generator=generator).clamp(-1, 1))

        @torch.no_grad()
        def run() -> Tensor:
            if self.task == "encode":
                return network.encode(given).latent_dist.mean if self.peer else network.encode(given)
            return network.decode(given).sample if self.peer else network.decode(given)

        return run


def first_stage(
    size: int | None = None, runs: int = 10, channels: int = 128, large: bool = False, device: str | None = None
) -> Iterator[Row]:
    """Encoding and decoding in float32, in bfloat16 where the device is fast at it, and best against best.

    Best: each side in the precision and memory order that were its fastest in a short trial.

    Args:
        size: of the picture; by default 128 pixels on a CPU and 512 on a GPU.
        runs: of each side, for each row.
        channels: the network's width; 128 is Stable Diffusion's.
        large: also decode 1024×1024 pixels, on a CPU just once.
        device: by default the CPU, and a GPU if there is one.

    Returns:
        rows of `Sides.row`, each as soon as it is measured.

    Raises:
        UserError: no diffusers here, or a size or width that the network cannot have.
    """
    config = AutoencoderConfig(channels=channels)
    if size is not None and (size < config.f or size % config.f):
        raise UserError(f"The picture's side is a multiple of {config.f} pixels, such as 128; it is {size}.")
    diffusers()
    for where in devices(device):
        job = FirstStageJob(False, where, "decode", config=config, size=size or (128 if where == "cpu" else 512))
        total = 2 * len(job.precisions) + 2 + large
        yield from progress(_rows(job, runs, large), total=total, desc=f"bench on {where}")


def _rows(job: Job, runs: int, large: bool) -> Iterator[Row]:
    with Sides() as sides:
        for precision in job.precisions:
            for task in TASKS:
                yield sides.row(task, replace(job, task=task, precision=precision), runs)
        for task in TASKS:
            best = [sides.fastest(replace(job, task=task, peer=peer)) for peer in (False, True)]
            yield sides.row(f"{task}, best", best[0], runs, best[1])
        if large:
            once = 0 if job.device == "cpu" else runs
            yield sides.row(f"decode {LARGE}x{LARGE}", replace(job, size=LARGE), once)


def _network(peer: bool, config: AutoencoderConfig) -> nn.Module:
    torch.manual_seed(0)
    network = AutoencoderKL(config)
    return (as_theirs(*first_stage_to_diffusers(network)) if peer else network).eval()
