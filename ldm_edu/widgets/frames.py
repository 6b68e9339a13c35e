"""Sliders over frames that were computed beforehand: the slider only indexes them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from ipywidgets import HTML, HBox, IntSlider, Layout, Play, link
from torch import Tensor

from ldm_edu.diffusion import Step
from ldm_edu.runtime import UserError
from ldm_edu.widgets.pictures import film_strip, img_tag, sheet
from ldm_edu.widgets.still import StillBox


@dataclass(frozen=True)
class Frame:
    """One position of a slider: what is written beside it, and under each caption images `(B, 3, H, W)`."""

    label: str
    pictures: Mapping[str, Tensor]


class FrameSlider(StillBox):
    """A slider and a play button over frames; every frame is a row of captioned pictures.

    Args:
        frames: the positions, all with the same captions; any iterable, a generator too.
        name: what the slider moves through, such as "Denoising".
        alt: what the pictures are of; each picture's alt text is its caption, its label and this.
        scale: how many times the pictures are enlarged; by default to about 256 pixels.
    """

    text = "A slider over frames: run the cell to move it."

    def __init__(
        self, frames: Iterable[Frame] = (), name: str = "Frame", alt: str = "", scale: float | None = None
    ):
        self.name, self.alt, self.scale = name, alt, scale
        self.labels: list[str] = []
        self.rows: dict[str, list[np.ndarray]] = {}
        self._markup: list[str] = []
        self.picture = HTML()
        self.slider = IntSlider(0, 0, 0, readout=False, continuous_update=True, layout=Layout(width="22em"))
        self.play = Play(0, 0, 0, interval=150, show_repeat=False)
        self.readout = HTML(layout=Layout(margin="2px 2px 2px 14px"))
        link((self.play, "value"), (self.slider, "value"))
        self.slider.observe(self._show_frame, "value")
        self.controls = HBox([self.play, self.slider, self.readout], layout=Layout(flex_flow="row wrap"))
        super().__init__([self.picture, self.controls])
        self.add_class("ldm-frames")
        for frame in frames:
            self.append(frame)

    def append(self, frame: Frame) -> None:
        """Add a frame at the end, and move there."""
        if self.rows and self.rows.keys() != frame.pictures.keys():
            raise UserError(
                f"Every frame needs the same captions: {list(self.rows)} so far, now {list(frame.pictures)}."
            )
        pictures = {caption: sheet(images.detach().cpu()) for caption, images in frame.pictures.items()}
        cells = []
        for caption, picture in pictures.items():
            self.rows.setdefault(caption, []).append(picture)
            cells.append(self._cell(picture, caption, frame.label))
        self.labels.append(frame.label)
        self._markup.append(f'<div style="display: flex; flex-wrap: wrap; gap: 12px">{"".join(cells)}</div>')
        last = len(self.labels) - 1
        self.play.max = self.slider.max = last
        self.slider.value = last
        self._show_frame()

    def clear(self) -> None:
        """Take all frames away."""
        self.labels, self.rows, self._markup = [], {}, []
        self.slider.value = 0
        self.play.max = self.slider.max = 0
        self._show_frame()

    def still(self) -> bytes | None:
        return film_strip(self.rows, self.labels, self.alt) if self.labels else None

    def still_alt(self) -> str:
        what = f"Film strip of {self.alt or 'the frames'}: {' and '.join(self.rows)}"
        return f"{what}, from {self.labels[0]} to {self.labels[-1]}"

    def _cell(self, picture: np.ndarray, caption: str, label: str) -> str:
        alt = f"{caption} at {label}: {self.alt}" if self.alt else f"{caption} at {label}"
        tag = img_tag(picture, alt, self.scale or max(1, 256 // picture.shape[1]))
        heading = f'<figcaption style="font-size: 1.2em">{html.escape(caption)}</figcaption>'
        return f'<figure style="margin: 0; line-height: 1.6">{heading}{tag}</figure>'

    def _show_frame(self, _change: object = None) -> None:
        self.controls.layout.display = None if len(self.labels) > 1 else "none"
        if not self.labels:
            self.picture.value = self.readout.value = ""
            return
        index = self.slider.value
        self.picture.value = self._markup[index]
        self.readout.value = (
            f"<b>{html.escape(self.name)}</b>: {html.escape(self.labels[index])}"
            f" &nbsp;(frame {index + 1} of {len(self.labels)})"
        )


CLEAN = "predicted z₀"


class TimestepSlider(FrameSlider):
    """Denoising under a slider: beside each other the noisy latent and the clean one predicted from it.

    Args:
        steps: what a sampler yields; it is run to its end before the slider shows.
        decode: latents to images `(B, 3, H, W)` in [-1, 1], such as `model.to_image`.
        alt: what is being drawn, such as the prompt.
    """

    text = "A slider over timesteps: run the cell to move it."

    def __init__(
        self,
        steps: Iterable[Step] = (),
        decode: Callable[[Tensor], Tensor] = lambda images: images,
        alt: str = "",
    ):
        self.decode = decode
        super().__init__((self.frame(step) for step in steps), "Denoising", alt)
        self.add_class("ldm-timestep")

    def frame(self, step: Step) -> Frame:
        """A sampler's step as a frame: both latents decoded."""
        with torch.no_grad():
            images = self.decode(torch.cat([step.z, step.z0]))
        label = f"t = {step.t}" if step.t >= 0 else "clean"
        return Frame(label, dict(zip(("zₜ", CLEAN), images.chunk(2), strict=True)))
