"""The parts of a latent diffusion model and what explains each: a drawing after Figure 3 of the paper."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ldm_edu.runtime import UserError

# name: (left, bottom, width, height, title, colours of edge and filling); the drawing is 100 wide and 54 high
ROOMS = {
    "pixel": (1, 11, 20, 42, "Pixel space", "#c0504d", "#fbeeee"),
    "latent": (24, 11, 47, 42, "Latent space", "#5b8c3e", "#f0f6ec"),
    "condition": (74, 11, 25, 42, "Conditioning", "#5f6b7a", "#f2f4f6"),
}
# name: (left, bottom, width, height, text)
BOXES = {
    "encoder": (9, 39, 10, 8, "encoder\n$\\mathcal{E}$"),
    "decoder": (9, 24, 10, 8, "decoder\n$\\mathcal{D}$"),
    "diffusion": (35, 39, 24, 8, "diffusion process\n$z_0 \\rightarrow z_T$"),
    "unet": (35, 21, 24, 14, "denoising UNet\n$\\epsilon_\\theta(z_t, t, \\tau_\\theta(y))$\n\n\n"),
    "attention": (38, 22.5, 18, 4.4, "cross-attention"),
    "sampler": (35, 13, 24, 4.6, "sampler  $z_t \\rightarrow z_{t-1}$"),
    "text": (77, 42.6, 19, 4.4, "text"),
    "labels": (77, 36.4, 19, 4.4, "class, layout, map"),
    "conditioner": (77, 22.2, 19, 5, "conditioner  $\\tau_\\theta$"),
    "images": (77, 13, 19, 4.6, "pictures, masks"),
    "system": (1, 2.6, 98, 5.6, ""),
}
SIGNS = {
    "$x$": (4.5, 43), "$\\tilde{x}$": (4.5, 28), "$z_0$": (28, 43), "$\\tilde{z}_0$": (28, 28),
    "$z_T$": (66, 43), "$z_t$": (66, 28), "$y$": (86.5, 32),
}  # fmt: skip
ARROWS = [
    ((6, 43), (9, 43)), ((19, 43), (26.2, 43)), ((29.8, 43), (35, 43)), ((59, 43), (63.8, 43)),
    ((66, 41), (66, 30)), ((64.2, 28), (59, 28)), ((35, 28), (29.8, 28)), ((26.2, 28), (19, 28)),
    ((9, 28), (6, 28)), ((47, 21), (47, 17.6)), ((86.5, 36.4), (86.5, 33.6)), ((86.5, 30.6), (86.5, 27.2)),
    ((77, 24.7), (56, 24.7)),
]  # fmt: skip
CORNERS = [((59, 15.3), (66, 26.2)), ((77, 15.3), (68, 26.8))]  # first across, then up


def system_map(chapters: Mapping[str, str], system: str) -> Figure:
    """The system in boxes, pixels on the left, conditions on the right; badges say what is explained where.

    Args:
        chapters: for a box of `BOXES` the numbers that stand on it, such as `{"unet": "04"}`.
        system: the line below the drawing, on what concerns the whole.

    Raises:
        UserError: there is no such box.
    """
    if unknown := chapters.keys() - BOXES.keys():
        raise UserError(f"The map has no box {sorted(unknown)}; it has {', '.join(BOXES)}.")
    figure = Figure(figsize=(10, 5.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 54))
    axes.axis("off")
    for left, bottom, width, height, title, edge, fill in ROOMS.values():
        _box(axes, left, bottom, width, height, edge, fill)
        axes.text(left + 1.2, bottom + height - 1, title, va="top", weight="bold", color=edge, size=11)
    for start, end in ARROWS:
        _arrow(axes, start, end)
    for start, end in CORNERS:
        _arrow(axes, start, end, connectionstyle="angle,angleA=0,angleB=90,rad=4")
    for sign, (x, y) in SIGNS.items():
        axes.text(x, y, sign, ha="center", va="center", size=13)
    for name, (left, bottom, width, height, text) in BOXES.items():
        _box(axes, left, bottom, width, height, "#666666", "white")
        words = system if name == "system" else text
        axes.text(left + width / 2, bottom + height / 2, words, ha="center", va="center")
        if name in chapters:
            _badge(axes, left + width, bottom + height, chapters[name])
    for words, x, y in (("each step", 60, 13.2), ("concatenated", 68.6, 13.2)):
        axes.text(x, y, words, va="center", size=8, color="#444444")
    return figure


def _box(axes: Axes, left: float, bottom: float, width: float, height: float, edge: str, fill: str) -> None:
    shape = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1", edgecolor=edge, facecolor=fill
    )
    axes.add_patch(shape)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], connectionstyle: str = "arc3"
) -> None:
    style = dict(arrowstyle="-|>", mutation_scale=11, color="#444444", zorder=3)
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=connectionstyle, **style))


def _badge(axes: Axes, x: float, y: float, text: str) -> None:
    box = dict(boxstyle="round,pad=0.3", facecolor="#1f5fa8", edgecolor="white")
    style = dict(ha="right", va="center", color="white", size=9, weight="bold", zorder=4)
    axes.text(x - 0.6, y, text, bbox=box, **style)
