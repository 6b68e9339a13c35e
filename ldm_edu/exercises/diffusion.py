"""The exercises of notebooks 03 and 07: noising, the posterior's variance, v, and the steps of the samplers.

A level, ᾱ, comes to the learner's function as a tensor without dimensions. Gradients are not compared here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_edu.diffusion import convert, ddim, reverse_variances
from ldm_edu.exercises.grading import Answer, Mistake, grade_values


def check_noising(answer: Answer) -> None:
    """Check `answer(z0, noise, alphas_cumprod, t)`: z_t at once, for a batch with a timestep `(B,)` each."""

    def mix(shares: Answer, shift: int = 0) -> Answer:
        def rule(z0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
            signal, sigma = shares(alphas_cumprod[t + shift].view(-1, 1, 1, 1))
            return signal * z0 + sigma * noise

        return rule

    right = mix(lambda level: (level.sqrt(), (1 - level).sqrt()))
    mistakes: list[Mistake] = [
        ("take the roots: √ᾱ z_0 + √(1-ᾱ) ε. ᾱ and 1-ᾱ are shares of the variance.", mix(lambda a: (a, 1 - a))),
        ("√ᾱ belongs to z_0, √(1-ᾱ) to the noise; you exchanged them.", mix(lambda a: ((1 - a).sqrt(), a.sqrt()))),
        ("the noise gets √(1-ᾱ), not 1-√ᾱ: variances add up to 1, not their roots.",
         mix(lambda a: (a.sqrt(), 1 - a.sqrt()))),
        ("the root of 1-ᾱ is missing.", mix(lambda a: (a.sqrt(), 1 - a))),
        ("the root of ᾱ is missing.", mix(lambda a: (a, (1 - a).sqrt()))),
        ("the signal must fade: √ᾱ times z_0.", mix(lambda a: (torch.ones_like(a), (1 - a).sqrt()))),
        ("the noise has the wrong sign: it is added.", mix(lambda a: (a.sqrt(), -((1 - a).sqrt())))),
        ("ᾱ is taken one timestep too early: alphas_cumprod[t] belongs to t, whose first is 0.",
         mix(lambda a: (a.sqrt(), (1 - a).sqrt()), shift=-1)),
        ("you used one ᾱ for the whole batch; each picture has its own timestep.",
         lambda z0, noise, levels, t: right(z0, noise, levels, t[:1].expand(len(t)))),
        ("alphas_cumprod is ᾱ already; you took the product once more.",
         lambda z0, noise, levels, t: right(z0, noise, levels.cumprod(0), t)),
    ]  # fmt: skip
    z0, noise = _normal(3, 2, 4, 4)
    cases = [
        (z0, noise, torch.tensor([0.95, 0.8, 0.6, 0.3, 0.1]), t) for t in torch.tensor([[3, 1, 4], [2, 2, 4]])
    ]
    grade_values("noising", answer, right, cases, mistakes)


def check_posterior_variance(answer: Answer) -> None:
    """Check `answer(betas)`: β̃_t of q(z_{t-1} | z_t, z_0) at all timesteps, `(T,)`; at t = 0 it is 0."""

    def rule(
        before: Answer = lambda a: torch.cat([a.new_ones(1), a[:-1]]),
        level: Answer = lambda betas: (1 - betas).cumprod(0),
    ) -> Answer:
        def variance(betas: Tensor) -> Tensor:
            now = level(betas)
            return (1 - before(now)) / (1 - now) * betas

        return variance

    right = rule()
    mistakes: list[Mistake] = [
        ("your posterior variance is β_t; at t = 0 it should be 0, for z_0 is known there.", lambda b: b),
        ("the ᾱ before the first is 1, nothing but signal; you took 0.",
         rule(before=lambda a: torch.cat([a.new_zeros(1), a[:-1]]))),
        ("the ᾱ before the first is 1, not ᾱ_0.", rule(before=lambda a: torch.cat([a[:1], a[:-1]]))),
        ("the ᾱ before the first is 1, not the last: roll goes round.", rule(before=lambda a: a.roll(1))),
        ("ᾱ of the step before belongs above the line; you took the step after.",
         rule(before=lambda a: torch.cat([a[1:], a[-1:]]))),
        ("it is upside down: 1-ᾱ of the step before belongs above the line.",
         lambda b: b**2 / right(b)),
        ("take 1-ᾱ, with ᾱ the product of all α up to t; you took α_t alone.", rule(level=lambda b: 1 - b)),
        ("take 1-ᾱ, the noise; with ᾱ in its place this is β_t / α_t, what z_t alone says of z_{t-1}.",
         lambda b: b * torch.cat([b.new_ones(1), (1 - b).cumprod(0)[:-1]]) / (1 - b).cumprod(0)),
        ("that is its root, the standard deviation.", lambda b: right(b).sqrt()),
        ("at t = 0 it is 0. Ho et al.'s code puts the second value there, since it takes the logarithm.",
         lambda b: reverse_variances((1 - b).cumprod(0), "posterior")),
    ]  # fmt: skip
    cases = [(torch.linspace(0.1, 0.6, 6),), (torch.tensor([0.3, 0.2, 0.5, 0.05]),)]
    grade_values("posterior variance", answer, right, cases, mistakes)


def check_v(answer: Answer) -> None:
    """Check `answer(epsilon, z, level)`: the velocity v that a predicted noise at z_t means."""

    def right(epsilon: Tensor, z: Tensor, level: Tensor) -> Tensor:
        return convert(epsilon, z, level, "eps", "v")

    def of_z0(rule: Answer) -> Answer:
        return lambda e, z, a: rule(e, (z - (1 - a).sqrt() * e) / a.sqrt(), a)

    mistakes: list[Mistake] = [
        ("v has z_0 in it, not z_t: first z_0 = (z_t - √(1-ᾱ) ε) / √ᾱ.", lambda e, z, a:
            a.sqrt() * e - (1 - a).sqrt() * z),
        ("the sign: v = √ᾱ ε - √(1-ᾱ) z_0, with a minus.", of_z0(lambda e, z0, a:
            a.sqrt() * e + (1 - a).sqrt() * z0)),
        ("√ᾱ belongs to ε, √(1-ᾱ) to z_0; you exchanged them.", of_z0(lambda e, z0, a:
            (1 - a).sqrt() * e - a.sqrt() * z0)),
        ("it is -v: at ᾱ = 1 v is the noise.", lambda e, z, a: -right(e, z, a)),
        ("take the roots of ᾱ and 1-ᾱ.", of_z0(lambda e, z0, a: a * e - (1 - a) * z0)),
        ("that is z_0.", of_z0(lambda e, z0, a: z0)),
        ("that is ε - z_0, the velocity along a straight line (flow matching).", of_z0(lambda e, z0, a: e - z0)),
        ("z_0 is (z_t - √(1-ᾱ) ε) / √ᾱ; the division is missing.", lambda e, z, a:
            a.sqrt() * e - (1 - a).sqrt() * (z - (1 - a).sqrt() * e)),
    ]  # fmt: skip
    epsilon, z = _normal(2, 2, 3, 3)
    grade_values("v from ε", answer, right, [(epsilon, z, 0.7), (epsilon, z, 0.05)], mistakes)


def check_ddim_step(answer: Answer) -> None:
    """Check `answer(z, epsilon, now, following)`: DDIM's step, η = 0, from the level `now` to `following`."""

    def right(z: Tensor, epsilon: Tensor, now: Tensor, following: Tensor) -> Tensor:
        *_, last = ddim(lambda z, t: epsilon, z, torch.stack([following, now]), [1], stop=0)
        return last.z

    def step(rule: Answer) -> Answer:
        return lambda z, e, now, to: rule((z - (1 - now).sqrt() * e) / now.sqrt(), e, now, to)

    mistakes: list[Mistake] = [
        ("the noise that you put back belongs to the next level: √(1-ᾱ) of `following`, not of `now`.",
         step(lambda z0, e, now, to: to.sqrt() * z0 + (1 - now).sqrt() * e)),
        ("the signal belongs to the next level: √ᾱ of `following`, not of `now`.",
         step(lambda z0, e, now, to: now.sqrt() * z0 + (1 - to).sqrt() * e)),
        ("the noise is missing: after the step there is still √(1-ᾱ) ε in it.",
         step(lambda z0, e, now, to: to.sqrt() * z0)),
        ("that is z_0, all the way; go to the next level: √ᾱ z_0 + √(1-ᾱ) ε.", step(lambda z0, e, now, to: z0)),
        ("to find z_0, divide by √ᾱ of `now`.", lambda z, e, now, to:
            to.sqrt() * (z - (1 - now).sqrt() * e) + (1 - to).sqrt() * e),
        ("take the roots of ᾱ and 1-ᾱ.", lambda z, e, now, to: to * (z - (1 - now) * e) / now + (1 - to) * e),
        ("`now` and `following` are exchanged.", lambda z, e, now, to:
            now.sqrt() * (z - (1 - to).sqrt() * e) / to.sqrt() + (1 - now).sqrt() * e),
        ("the noise has the wrong sign on its way back: it is added.",
         step(lambda z0, e, now, to: to.sqrt() * z0 - (1 - to).sqrt() * e)),
    ]  # fmt: skip
    z, epsilon = _normal(2, 2, 3, 3)
    grade_values("DDIM step", answer, right, [(z, epsilon, 0.2, 0.5), (z, epsilon, 0.6, 0.9)], mistakes)


def check_eta(answer: Answer) -> None:
    """Check `answer(eta, now, following)`: σ, the standard deviation of DDIM's fresh noise; η = 1 must give DDPM's."""

    def right(eta: Tensor, now: Tensor, following: Tensor) -> Tensor:
        return eta * ((1 - following) / (1 - now) * (1 - now / following)).sqrt()

    mistakes: list[Mistake] = [
        ("that is the variance; take the root, and then times η.", lambda n, a, b: n * right(n * 0 + 1, a, b) ** 2),
        ("that is σ²; asked for is σ.", lambda n, a, b: right(n, a, b) ** 2),
        ("η multiplies σ; under the root it would be η².", lambda n, a, b: n.sqrt() * right(n * 0 + 1, a, b)),
        ("at η = 1 that is √β; DDPM's posterior has √β̃.", lambda n, a, b: n * (1 - a / b).sqrt()),
        ("the fraction is upside down: 1-ᾱ of `following` belongs above the line.", lambda n, a, b:
            n * ((1 - a) / (1 - b) * (1 - a / b)).sqrt()),
        ("β of the step is 1 - ᾱ_now / ᾱ_following; you took 1 - ᾱ_now.", lambda n, a, b:
            n * ((1 - b) / (1 - a) * (1 - a)).sqrt()),
        ("η is missing.", lambda n, a, b: right(n * 0 + 1, a, b)),
        ("that is the root of a negative number. ᾱ rises on the way to clean, so β is 1 - ᾱ_now / ᾱ_following: are "
         "they exchanged, or is a sign turned?", lambda n, a, b: right(n, b, a)),
    ]  # fmt: skip
    cases = [(1.0, 0.2, 0.5), (0.3, 0.2, 0.5), (0.5, 0.6, 0.9), (0.0, 0.6, 0.9)]
    grade_values("η", answer, right, cases, mistakes)


def check_second_order_step(answer: Answer) -> None:
    """Check `answer(z, z0, z0_before, before, now, following)`: one step of DPM-Solver++(2M).

    `z` is at the level `now`, where z0 was predicted; z0_before was predicted at the level `before`, a step ago.
    """

    def along(extra: Answer, power: int = -1) -> Answer:
        """The step along z0 + extra · (z0 - z0_before), with e^{power h}."""

        def rule(
            z: Tensor, z0: Tensor, z0_before: Tensor, before: Tensor, now: Tensor, following: Tensor
        ) -> Tensor:
            lambdas = [0.5 * (a / (1 - a)).log() for a in (before, now, following)]
            h_before, h = lambdas[1] - lambdas[0], lambdas[2] - lambdas[1]
            mixed = z0 + extra(h, h_before) * (z0 - z0_before)
            return ((1 - following) / (1 - now)).sqrt() * z - following.sqrt() * torch.expm1(
                power * h
            ) * mixed

        return rule

    right = along(lambda h, h_before: h / (2 * h_before))
    mistakes: list[Mistake] = [
        ("that is the first order, DDIM's step: extend z0 along its last change.", along(lambda h, b: 0)),
        ("r is h_before / h, and z0 - z0_before is divided by 2 r; yours is upside down.",
         along(lambda h, b: b / (2 * h))),
        ("the ½ is missing: over the step, z0 goes on changing by half of it on average.",
         along(lambda h, b: h / b)),
        ("the steps differ in width: r = h_before / h is not 1.", along(lambda h, b: 0.5)),
        ("the sign: z0 goes on as it went, by z0 - z0_before.", along(lambda h, b: -h / (2 * b))),
        ("e^{-h}, not e^{h}: h is positive on the way to clean.", along(lambda h, b: h / (2 * b), power=1)),
        ("λ is half the logarithm of SNR; r does not mind, e^{-h} does.", along(lambda h, b: h / (2 * b), power=-2)),
    ]  # fmt: skip
    (z, z0), (z0_before, _) = _normal(2, 2, 3, 3), _normal(2, 2, 3, 3, seed=1)
    cases = [(z, z0, z0_before, 0.05, 0.2, 0.7), (z, z0, z0_before, 0.3, 0.6, 0.8)]
    grade_values("second-order step", answer, right, cases, mistakes)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    """Two batches of noise."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
