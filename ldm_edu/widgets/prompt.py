"""`PromptBox`: type a sentence, watch its picture come out of the noise."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Protocol

from ipywidgets import HTML, BoundedIntText, Button, FloatSlider, HBox, IntProgress, IntSlider, Layout, Text
from torch import Tensor

from ldm_edu.diffusion import Step
from ldm_edu.runtime import UserError
from ldm_edu.widgets.frames import CLEAN, TimestepSlider
from ldm_edu.widgets.still import StillBox

EXAMPLE = "a small red star above a large blue circle"


class TextToImage(Protocol):
    """What `PromptBox` needs of a model; `LatentDiffusion` has it."""

    def steps(self, prompts: list[str], **settings: object) -> Iterator[Step]: ...

    def to_image(self, latents: Tensor) -> Tensor: ...


class PromptBox(StillBox):
    """A prompt, guidance, seed and number of steps; a button (or Enter) draws the picture.

    What the model refuses, such as a word it has never seen, is answered in words below the button.
    The pictures drawn last are in `images`: `(num, 3, H, W)` in [-1, 1].

    Args:
        model: a text-to-image model.
        prompt: what the box holds at first; if given, its picture is drawn at once.
        guidance_scale: how strongly the prompt is followed; 1 is no guidance.
        seed: of the first picture; the others take the seeds after it.
        num_steps: how many steps the sampler takes.
        num: how many pictures are drawn.
    """

    text = "A prompt box: run the cell to write in it."

    def __init__(
        self,
        model: TextToImage,
        prompt: str = "",
        guidance_scale: float = 3.0,
        seed: int = 0,
        num_steps: int = 25,
        num: int = 1,
    ):
        self.model, self.num = model, num
        self.images: Tensor | None = None
        self.prompt = Text(prompt, placeholder=EXAMPLE, description="Prompt")
        self.prompt.layout = Layout(width="40em", max_width="100%")
        self.guidance = FloatSlider(guidance_scale, min=0, max=max(10, guidance_scale), step=0.5)
        self.guidance.description = "Guidance"
        self.guidance.readout_format = ".1f"
        self.seed = BoundedIntText(seed, min=0, max=2**53 - 1, description="Seed")
        self.seed.layout = Layout(width="12em")
        self.num_steps = IntSlider(num_steps, min=1, max=max(100, num_steps), description="Steps")
        self.button = Button(description="Draw", button_style="primary", icon="paint-brush")
        self.progress = IntProgress(0, 0, 1, layout=Layout(width="22em", visibility="hidden"))
        self.message = HTML()
        self.frames = TimestepSlider(decode=model.to_image)
        self.button.on_click(lambda _button: self.draw())
        self.prompt.on_msg(self._on_message)
        settings = HBox([self.guidance, self.num_steps, self.seed], layout=Layout(flex_flow="row wrap"))
        action = HBox([self.button, self.progress])
        super().__init__([self.prompt, settings, action, self.message, self.frames])
        self.add_class("ldm-prompt")
        if prompt:
            self.draw()

    def draw(self) -> None:
        """Draw the pictures, each step shown as it is made; a user's error is written in the box instead."""
        self.message.value = ""
        self.button.disabled = True
        try:
            self._draw(self.prompt.value.strip())
        except UserError as error:
            self.message.value = _notice(str(error))
        finally:
            self.button.disabled = False
            self.progress.layout.visibility = "hidden"

    def _draw(self, prompt: str) -> None:
        if not prompt:
            raise UserError(f"The prompt is empty. Write a sentence, such as: {EXAMPLE}.")
        steps = self.model.steps(
            [prompt] * self.num,
            num_steps=self.num_steps.value,
            guidance_scale=self.guidance.value,
            seeds=[self.seed.value + i for i in range(self.num)],
        )
        first = next(steps)  # what the model refuses, it refuses here: the picture drawn before stays
        self.frames.clear()
        self.frames.alt = prompt
        self.frames.append(self.frames.frame(first))
        self.progress.max, self.progress.value = self.num_steps.value, 0
        self.progress.layout.visibility = "visible"
        for step in steps:
            frame = self.frames.frame(step)
            self.frames.append(frame)
            self.progress.value += 1
        self.images = frame.pictures[CLEAN]

    def still(self) -> bytes | None:
        return self.frames.still()

    def still_alt(self) -> str:
        return self.frames.still_alt()

    def _on_message(self, _widget: object, content: dict, _buffers: object) -> None:
        # The text field reports Enter by this message; ipywidgets' own on_submit is deprecated.
        if content.get("event") == "submit":
            self.draw()


def _notice(words: str) -> str:
    return (
        '<div role="alert" style="border-left: 4px solid #d9822b; padding: 2px 10px; line-height: 1.5;'
        f' white-space: pre-wrap">{html.escape(words)}</div>'
    )
