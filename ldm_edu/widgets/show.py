"""`show`: the one function through which pictures reach a notebook's page."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ldm_edu.runtime import UserError
from ldm_edu.widgets.pictures import img_tag, sheet


def show(
    pictures: Tensor | Sequence[Tensor],
    alt: str,
    columns: int | None = None,
    scale: float | None = None,
    captions: Sequence[str] | None = None,
) -> Pictures:
    """Pictures for a notebook's page: native pixels, enlarged by the browser, with alt text.

    Args:
        pictures: `(B, 3, H, W)` in [-1, 1], or a sequence of `(3, H, W)` that may differ in size.
        alt: what a person who cannot see the pictures should know of them.
        columns: how many stand in a row; all of them by default, up to eight.
        scale: how many times the largest picture is enlarged; by default up to about 256 pixels for a single
            one. Smaller ones are enlarged to its width.
        captions: a line of text under each picture.

    Raises:
        UserError: there is no picture, no alt text, or not one caption for each picture.
    """
    batch = [image.detach().cpu() for image in pictures]
    if not batch or any(image.ndim != 3 or image.shape[0] != 3 for image in batch):
        shapes = ", ".join(str(tuple(image.shape)) for image in batch) or "nothing"
        raise UserError(f"show wants pictures of shape (B, 3, H, W); it was given {shapes}.")
    _need(alt)
    if captions is not None and len(captions) != len(batch):
        raise UserError(f"{len(batch)} pictures were given with {len(captions)} captions: give one for each.")
    columns = columns or min(len(batch), 8)
    width = max(image.shape[2] for image in batch)
    room = columns * (width + (8 if captions else 2))
    scale = scale or max(1, min(256 // width, 1080 // room))
    same_size = len({image.shape for image in batch}) == 1
    if captions is None and same_size:
        return Pictures(img_tag(sheet(torch.stack(batch), columns), alt, scale), alt, len(batch))
    cells = []
    for index, image in enumerate(batch):
        caption = captions[index] if captions else ""
        description = f"{alt}: {caption}" if caption else f"{alt} ({index + 1} of {len(batch)})"
        tag = img_tag(sheet(image[None]), description, scale * width / image.shape[2])
        cells.append(f"{tag}<br>{html.escape(str(caption))}" if caption else tag)
    return Pictures(_table(cells, columns, round(scale * width)), alt, len(batch))


def show_figure(figure: Figure, alt: str) -> Pictures:
    """A matplotlib figure for a notebook's page, with alt text: 100 pixels an inch, drawn at twice that.

    Raises:
        UserError: there is no alt text.
    """
    _need(alt)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(200)
    canvas.draw()
    return Pictures(img_tag(np.asarray(canvas.buffer_rgba())[..., :3], alt, scale=0.5, colours=256), alt, 1)


class Pictures:
    """What `show` returns: a notebook shows it as HTML; its repr is the count and the alt text."""

    def __init__(self, markup: str, alt: str, count: int):
        self.markup, self.alt, self.count = markup, alt, count

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return f"<{self.count} picture{'s' if self.count > 1 else ''}: {self.alt}>"


def _need(alt: str) -> None:
    if not alt.strip():
        raise UserError("Alt text is missing: say in a sentence what there is to see.")


def _table(cells: list[str], columns: int, width: int) -> str:
    # A table, because it keeps its columns where a viewer drops the styles.
    plain = "background: none; border: none"
    cell_style = f"{plain}; text-align: center; padding: 4px 8px 4px 0; vertical-align: top"
    cells = [f'<td align="center" width="{width}" style="{cell_style}">{cell}</td>' for cell in cells]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    body = "".join(f'<tr style="{plain}">{"".join(row)}</tr>' for row in rows)
    size = f"table-layout: fixed; width: {columns * (width + 8)}px; max-width: 100%"
    return f'<table role="presentation" style="{plain}; {size}; margin: 0">{body}</table>'
