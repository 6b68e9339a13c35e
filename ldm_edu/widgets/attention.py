"""The attention explorer: which places read a word, by word, layer and timestep, beside the picture so far."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from ipywidgets import HTML, HBox, IntSlider, Layout
from torch import Tensor

from ldm_edu.runtime import UserError
from ldm_edu.widgets.pictures import film_strip, img_tag, sheet
from ldm_edu.widgets.still import StillBox


def spotlight(picture: Tensor, weights: Tensor) -> Tensor:
    """A picture `(3, H, W)` in [-1, 1], light where `weights` (h, w) are large, dark where they are small.

    The largest weight leaves the picture as it is, whatever its size. H and W are multiples of h and w.

    Raises:
        UserError: weights that are no map, such as all places in a row.
    """
    if weights.ndim != 2:
        raise UserError(f"The weights are a map (h, w): reshape them first; these are {tuple(weights.shape)}.")
    light = F.interpolate(weights[None, None].float(), size=picture.shape[1:], mode="nearest")[0]
    return (picture + 1) * (0.12 + 0.88 * light / light.max().clamp(min=1e-12)) - 1


class AttentionExplorer(StillBox):
    """Sliders for word, layer and timestep, over attention maps that were recorded while a picture was drawn.

    Nothing is computed anew: a slider only picks another of the recorded maps.

    Args:
        words: the tokens of the prompt, M of them.
        timesteps: what to call the steps, such as "t = 999".
        pictures: the picture at each step, `(steps, 3, H, W)` in [-1, 1].
        maps: for each layer `(steps, M, h, w)`, how much each place reads of each word.
        start: word, layer and step at first, as indices; the still shows this layer.
        still_words: indices of the words in the still, a row each.
        scale: how many times the pictures are enlarged.

    Raises:
        UserError: there are no maps `(h, w)`, or not one for each word and step.
    """

    text = "The attention explorer: run the cell to move its sliders."

    def __init__(
        self, words: Sequence[str], timesteps: Sequence[str], pictures: Tensor, maps: Mapping[str, Tensor],
        start: tuple[int, int, int] = (0, 0, 0), still_words: Sequence[int] = (0,), scale: float = 4,
    ) -> None:  # fmt: skip
        size = len(timesteps), len(words)
        wrong = {k: tuple(m.shape) for k, m in maps.items() if m.ndim != 4 or m.shape[:2] != size}
        if wrong or not maps or len(pictures) != len(timesteps):
            told = f"{len(timesteps)} steps, {len(words)} words"
            raise UserError(f"Give a picture a step, and maps (steps, words, h, w): {told}; maps {wrong}.")
        self.words, self.timesteps, self.pictures, self.maps = list(words), list(timesteps), pictures, dict(maps)
        self.still_words, self.scale, self.picture, rows = list(still_words), scale, HTML(), []
        self.options = {"word": self.words, "layer": list(self.maps), "timestep": self.timesteps}
        self.sliders, self.readouts = {}, {}
        for (name, options), value in zip(self.options.items(), start, strict=True):
            slider = IntSlider(value, 0, len(options) - 1, readout=False, layout=Layout(width="22em"))
            slider.observe(self._show, "value")
            self.sliders[name], self.readouts[name] = slider, HTML(layout=Layout(margin="2px 2px 2px 14px"))
            rows.append(HBox([slider, self.readouts[name]]))
        super().__init__([self.picture, *rows])
        self.add_class("ldm-attention")
        self._show()

    def panels(self, word: int, layer: str, step: int) -> list[np.ndarray]:
        """The picture at a step, and the same with a light on who reads the word."""
        lit = spotlight(self.pictures[step].float().cpu(), self.maps[layer][step, word].cpu())
        return [sheet(image[None]) for image in (self.pictures[step].cpu(), lit)]

    def still(self) -> bytes:
        layer = self.options["layer"][self.sliders["layer"].value]
        steps = range(len(self.timesteps))
        rows = {"picture": [self.panels(0, layer, step)[0] for step in steps]}
        rows |= {f"{self.words[w]} ({w + 1})": [self.panels(w, layer, s)[1] for s in steps] for w in self.still_words}
        return film_strip(rows, self.timesteps, f"who reads which word, in {layer}")

    def still_alt(self) -> str:
        words = ", ".join(self.words[w] for w in self.still_words)
        ends = f"from {self.timesteps[0]} to {self.timesteps[-1]}"
        return f"Film strip {ends}: the picture, and below it lit up the places that read the words {words}"

    def _show(self, _change: object = None) -> None:
        place = {name: slider.value for name, slider in self.sliders.items()}
        chosen = {name: self.options[name][i] for name, i in place.items()}
        for name, i in place.items():
            count = f"{i + 1} of {len(self.options[name])}"
            self.readouts[name].value = f"<b>{name}</b>: {html.escape(chosen[name])} &nbsp;({count})"
        weights = self.maps[chosen["layer"]][place["timestep"], place["word"]]
        where = f"{chosen['layer']}, {chosen['timestep']}"
        captions = (f"picture at {chosen['timestep']}", f"places that read “{chosen['word']}” in {where}")
        images = self.panels(place["word"], chosen["layer"], place["timestep"])
        tags = "".join(img_tag(i, c, self.scale) + "&nbsp; " for i, c in zip(images, captions, strict=True))
        said = f"{weights.min():.1%} to {weights.max():.1%} of a place's attention, {weights.mean():.1%} on average"
        self.picture.value = f"<div>{tags}</div><div>“{html.escape(chosen['word'])}” gets {said}.</div>"
