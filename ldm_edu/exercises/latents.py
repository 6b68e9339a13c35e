"""The exercises of notebook 06: the scale of latents and the way back, condition dropout, a training step's loss."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.diffusion import Schedule
from ldm_edu.exercises.grading import Answer, ExerciseError, Mistake, answering, grade, grade_values


def check_latent_scale(answer: Answer) -> None:
    """Check `answer(latents)`: the number that brings latents `(B, c, h, w)` to a standard deviation of 1."""

    def plain(rule: Answer) -> Answer:
        """A number is a number, as a tensor or not, and gradients do not count."""

        @functools.wraps(rule)
        def run(latents: Tensor) -> Tensor | None:
            found = rule(latents.detach())
            return found if found is None else torch.as_tensor(found).detach().float().flatten()

        return run

    def each(dims: tuple[int, ...]) -> Answer:
        return lambda z: z.std(dim=dims)

    channels = "one scale for all channels: what is large in one of them and small in another is information."
    pictures = "one deviation over the whole batch: how pictures differ from one another belongs to it."
    mistakes: list[Mistake] = [
        ("that is the deviation; multiplied by the scale it should become 1.", lambda z: z.std()),
        ("that is 1 / variance; the scale is 1 / standard deviation.", lambda z: 1 / z.var()),
        (channels, lambda z: 1 / each((0, 2, 3))(z)),
        (channels, lambda z: 1 / each((0, 2, 3))(z).mean()),
        (channels, lambda z: (1 / each((0, 2, 3))(z)).mean()),
        (pictures, lambda z: 1 / each((1, 2, 3))(z)),
        (pictures, lambda z: 1 / each((1, 2, 3))(z).mean()),
        (pictures, lambda z: (1 / each((1, 2, 3))(z)).mean()),
        (pictures, lambda z: 1 / each((2, 3))(z)),
        (pictures, lambda z: 1 / z[0].std()),
        ("the mean is not subtracted: that is the root mean square.", lambda z: 1 / z.square().mean().sqrt()),
        ("that is 1 / the largest number: a single outlier would set the scale.", lambda z: 1 / z.abs().max()),
        ("0.18215 belongs to Stable Diffusion's first stage; compute it from these latents.", lambda z: 0.18215),
    ]
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, 16, 16, generator=draw) * torch.tensor([0.5, 1.0, 2.0, 4.0]).view(4, 1, 1)
    uneven = latents * torch.linspace(0.5, 2, 8).view(8, 1, 1, 1) + torch.tensor([3.0, 0, -1, 0]).view(4, 1, 1)
    right = plain(lambda latents: 1 / latents.std())
    grade("latent scale", plain(answer), right, [(latents,), (uneven,)], [(w, plain(m)) for w, m in mistakes])


class _Decoder:
    """Any decoder would do, if only it is not linear."""

    def __call__(self, z: Tensor) -> Tensor:
        return (z - 0.3).tanh().repeat_interleave(2, dim=-1)

    def __repr__(self) -> str:
        return "D"


def check_to_image(answer: Answer) -> None:
    """Check `answer(decode, z, scale)`: the pictures of latents that `scale` was multiplied into."""
    mistakes: list[Mistake] = [
        ("the latents were multiplied by the scale; divide by it.", lambda d, z, s: d(z * s)),
        ("the decoder knows unscaled latents only: divide by the scale first.", lambda d, z, s: d(z)),
        ("divide the latent, before the decoder, not the picture.", lambda d, z, s: d(z) / s),
        ("divide the latent, before the decoder, not the picture.", lambda d, z, s: d(z) * s),
        ("that is the latent; the decoder is missing.", lambda d, z, s: z / s),
    ]
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    cases = [(_Decoder(), z, 0.18215), (_Decoder(), z, 2.5)]
    grade_values("to image", answer, lambda decode, z, scale: decode(z / scale), cases, mistakes)


def check_condition_dropout(answer: Answer) -> None:
    """Check `answer(tokens, empty, p, generator)`: tokens `(B, M)`, each whole row with chance p replaced by `empty`.

    How the chance is drawn is the learner's business, so the rows are counted, not compared.
    """
    name, chances, seeds = "condition dropout", (0.1, 0.5), range(8)
    with answering(name):
        runs = {(p, seed): _dropped(answer, p, seed) for p in chances for seed in seeds}
        again = _dropped(answer, 0.5, 0)
    rates = {p: torch.cat([runs[p, seed] for seed in seeds]).float().mean().item() for p in chances}
    off = [p for p in chances if abs(rates[p] - p) > 0.02]
    words = ""
    if not any(which.any() for which in runs.values()):
        words = "nothing is ever dropped."
    elif all(which.all() or not which.any() for which in runs.values()):
        words = "one coin for the whole batch; toss one for each caption."
    elif abs(rates[0.1] - 0.9) < 0.02:
        words = "p is the chance to be dropped; you keep with chance p."
    elif torch.equal(runs[0.5, 0], runs[0.5, 1]):
        words = "the same captions are dropped every time; draw with the generator."
    elif off:
        words = f"with p = {off[0]} you drop {rates[off[0]]:.1%} of the captions. (Is it rand, not randn?)"
    elif not torch.equal(runs[0.5, 0], again):
        words = "draw with the generator that you are given: the same one must drop the same."
    if words:
        raise ExerciseError(f"{name}: {words}")
    print(f"ok: {name}")


def _dropped(answer: Answer, p: float, seed: int) -> Tensor:
    """Which of 2000 captions are dropped, if all the rest is right."""
    tokens, empty = 10 + torch.arange(2000 * 5).view(2000, 5), torch.tensor([[3, 1, 1, 1, 1]])
    given = tokens.clone()
    found = answer(given, empty.clone(), p, torch.Generator().manual_seed(seed))
    if found is None:
        raise ExerciseError("your function returns None. Is its last line a `return`?")
    if not isinstance(found, Tensor) or found.shape != tokens.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ExerciseError(f"the answer is a tensor of {tuple(tokens.shape)}, like tokens; yours is {shape}.")
    if found.is_floating_point():
        raise ExerciseError(f"tokens are integers, which an embedding looks up; yours are {found.dtype}.")
    if not torch.equal(given, tokens):
        raise ExerciseError("you wrote into the batch itself, so its captions are gone. Use torch.where.")
    was_kept, was_emptied = (found == tokens).all(1), (found == empty).all(1)
    if (was_kept | was_emptied).all():
        return was_emptied
    if ((found == tokens) | (found == empty)).all():
        raise ExerciseError("you drop single tokens. Drop whole captions: sampling asks with the empty one.")
    raise ExerciseError("a dropped caption becomes `empty`, token by token; the others stay as they are.")


class _Denoiser(nn.Module):
    """A denoiser of one weight, which sees the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.weight * z * torch.cos(t.float()).view(-1, 1, 1, 1)


def check_training_loss(answer: Answer) -> None:
    """Check `answer(denoiser, z0, noise, t, alphas_cumprod)`: equation 2 for one batch, a mean."""

    def measured(rule: Answer) -> Answer:
        """The loss and the gradient that it sends to the denoiser."""

        def run(z0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor | None:
            denoiser = _Denoiser()
            given = (x.detach() for x in (z0, noise, t, alphas_cumprod))
            loss = rule(denoiser, *given)
            if isinstance(loss, Tensor) and loss.ndim == 0:
                if not loss.requires_grad:
                    raise ExerciseError("no gradient reaches the denoiser: leave out no_grad, detach and .item().")
                (learns,) = torch.autograd.grad(loss, denoiser.weight)
                return torch.stack([loss.detach(), learns])
            if isinstance(loss, Tensor):
                raise ExerciseError(f"the loss is one number, a mean over everything; yours has {tuple(loss.shape)}.")
            return loss

        return run

    def noisy(z0: Tensor, noise: Tensor, t: Tensor, levels: Tensor, root: bool = True) -> Tensor:
        level = levels[t].view(-1, 1, 1, 1)
        return (level.sqrt() if root else level) * z0 + ((1 - level).sqrt() if root else 1 - level) * noise

    def right(denoiser: nn.Module, z0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
        return F.mse_loss(denoiser(noisy(z0, noise, t, alphas_cumprod), t), noise)

    mistakes: list[Mistake] = [
        ("the network predicts the noise; you compare with z_0.", lambda d, z, e, t, a:
            F.mse_loss(d(noisy(z, e, t, a), t), z)),
        ("the network predicts the noise; you compare with z_t.", lambda d, z, e, t, a:
            F.mse_loss(d(noisy(z, e, t, a), t), noisy(z, e, t, a))),
        ("the network must see the noisy z_t; you give it the clean z_0.", lambda d, z, e, t, a:
            F.mse_loss(d(z, t), e)),
        ("the network must see z_t; you give it the noise alone, which is the answer.", lambda d, z, e, t, a:
            F.mse_loss(d(e, t), e)),
        ("take the roots of ᾱ and 1-ᾱ.", lambda d, z, e, t, a: F.mse_loss(d(noisy(z, e, t, a, root=False), t), e)),
        ("you summed; the loss is a mean.", lambda d, z, e, t, a:
            F.mse_loss(d(noisy(z, e, t, a), t), e, reduction="sum")),
        ("you summed over each latent; the loss is a mean over everything.", lambda d, z, e, t, a:
            F.mse_loss(d(noisy(z, e, t, a), t), e, reduction="sum") / len(z)),
        ("that is L1; equation 2 has squares.", lambda d, z, e, t, a: F.l1_loss(d(noisy(z, e, t, a), t), e)),
        ("that is the root of it; leave the mean of squares as it is.", lambda d, z, e, t, a:
            right(d, z, e, t, a).sqrt()),
        ("take ᾱ from alphas_cumprod, which is given; yours is another schedule's.", lambda d, z, e, t, a:
            F.mse_loss(d(noisy(z, e, t, Schedule().alphas_cumprod.float()), t), e)),
        ("one ᾱ for the whole batch; each latent has its own timestep.", lambda d, z, e, t, a:
            F.mse_loss(d(noisy(z, e, t[:1].expand(len(t)), a), t), e)),
        ("the network gets the same t for the whole batch; give it each latent's own.", lambda d, z, e, t, a:
            F.mse_loss(d(noisy(z, e, t, a), t[:1].expand(len(t))), e)),
    ]  # fmt: skip
    z0, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    levels = Schedule("linear").alphas_cumprod.float()  # not the one that the notebook has at hand
    cases = [(z0, noise, torch.tensor(t), levels) for t in ([10, 500, 900], [700, 30, 301])]
    grade("training loss", measured(answer), measured(right), cases, [(w, measured(m)) for w, m in mistakes])
