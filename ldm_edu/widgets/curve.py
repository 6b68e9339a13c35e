"""`LossCurve`: a training run's curve, drawn while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import cycle

import numpy as np
from IPython.display import display
from ipywidgets import HTML
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ldm_edu.runtime import UserError
from ldm_edu.widgets.pictures import img_tag, png
from ldm_edu.widgets.still import StillBox


class LossCurve(StillBox):
    """A live curve, given to a training run as its `on_step`.

    Used in a `with` it shows at once, and at the end leaves its last picture in the notebook's file:

        with LossCurve("loss") as curve:
            train(model, on_step=curve)

    Args:
        names: which of the metrics are drawn, a line each.
        log_scale: whether the vertical axis is logarithmic.
        every: the shortest time between two drawings, in seconds.
    """

    text = "A loss curve: run the cell to see it grow."

    def __init__(self, *names: str, log_scale: bool = False, every: float = 0.5):
        self.names, self.log_scale, self.every = names or ("loss",), log_scale, every
        self.steps: list[int] = []
        self.values: dict[str, list[float]] = {name: [] for name in self.names}
        self.picture = HTML()
        self._drawn_at = -float("inf")
        self._drawn: tuple[int, np.ndarray | None] = (0, None)  # how many steps, and their picture
        super().__init__([self.picture])
        self.add_class("ldm-curve")

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note a step's metrics; draw, unless the last drawing is younger than `every` seconds.

        Raises:
            UserError: one that is to be drawn is not among them.
        """
        if missing := [name for name in self.names if name not in metrics]:
            raise UserError(f"This curve draws {', '.join(missing)}, but the metrics are {', '.join(metrics)}.")
        self.steps.append(step)
        for name in self.names:
            self.values[name].append(float(metrics[name]))
        if time.monotonic() - self._drawn_at >= self.every:
            self.redraw()

    def redraw(self) -> None:
        """Draw all steps noted so far."""
        if self.steps:
            self.picture.value = img_tag(self._drawing(), self.still_alt())
        self._drawn_at = time.monotonic()

    def still(self) -> bytes | None:
        return png(self._drawing(), colours=64) if self.steps else None

    def _drawing(self) -> np.ndarray:
        """The picture of all steps noted so far: drawn once, for the page and for the file."""
        if self._drawn[0] < len(self.steps):
            self._drawn = len(self.steps), self._draw()
        return self._drawn[1]

    def _draw(self) -> np.ndarray:
        figure = Figure(figsize=(6.4, 3.2), dpi=100, layout="constrained")
        axes = figure.subplots()
        for (name, values), style in zip(self.values.items(), cycle(("-", "--", ":", "-."))):
            (line,) = axes.plot(self.steps, values, linewidth=0.8, alpha=0.4)
            axes.plot(self.steps, _smooth(values), style, color=line.get_color(), linewidth=1.8, label=name)
        label = " / ".join(self.names)
        axes.set(title="Training", xlabel="step", ylabel=label if len(label) < 40 else "")  # else the legend's job
        axes.set_yscale("log" if self.log_scale else "linear")
        axes.grid(alpha=0.3)
        if len(self.names) > 1:
            axes.legend()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]

    def still_alt(self) -> str:
        parts = (f"{name} from {v[0]:.3g} to {_smooth(v)[-1]:.3g}" for name, v in self.values.items())
        return f"Curve of {', '.join(parts)} in {self.steps[-1]} steps"

    def __enter__(self) -> LossCurve:
        self._shown = display(self, display_id=True)
        return self

    def __exit__(self, *_error: object) -> None:
        self.redraw()
        if self._shown is not None:  # there is a notebook: its file gets the final picture as the still
            self._shown.update(self)


def _smooth(values: list[float], share: float = 0.05) -> np.ndarray:
    """The mean of the last few values at each place: of `share` of them all, without those that are not finite."""
    window = np.ones(max(1, round(len(values) * share)))
    finite = np.isfinite(values)
    sums, counts = (np.convolve(series, window)[: len(values)] for series in (np.where(finite, values, 0.0), finite))
    with np.errstate(invalid="ignore"):  # 0 / 0, a gap in the line, where none of them is finite
        return sums / counts
