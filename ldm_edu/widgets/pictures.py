"""Pictures as bytes: PNG, `<img>` tags with alt text, film strips, latents made visible."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm_edu.datasets.images import contact_sheet, to_uint8
from ldm_edu.runtime import UserError

INK, PAPER = (30, 30, 30), (255, 255, 255)
TINY = 32  # pixels; a picture no wider is a latent rather than an image
MOST_BYTES = 50_000  # of a still; a larger one has to do with fewer colours: a notebook stays under 600 kB


def png(picture: np.ndarray, colours: int | None = None) -> bytes:
    """A uint8 picture `(H, W, 3)` as the bytes of a PNG file; in at most `colours` colours if given."""
    image = Image.fromarray(picture)
    if colours:
        image = _in_few_colours(image, colours)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=colours is not None)
    return buffer.getvalue()


def sheet(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Images `(B, 3, H, W)` in [-1, 1] laid out on one uint8 picture `(H', W', 3)`.

    Raises:
        UserError: another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"Pictures are (B, 3, H, W); this is {tuple(images.shape)}. Decode latents first (model.to_image), "
            "or show their channels (latent_channels)."
        )
    return to_uint8(contact_sheet(images, columns)[None])[0]


def img_tag(picture: np.ndarray, alt: str, scale: float = 1, colours: int | None = None) -> str:
    """An HTML `<img>`: the picture's own pixels, enlarged `scale` times by the browser, without smoothing.

    Below 1 it shrinks the picture, and smooths: leaving out every other pixel would break letters. The size
    stands in `width` too, because some viewers of notebooks drop styles.
    """
    width = round(picture.shape[1] * scale)
    if picture.shape[1] <= TINY and scale >= 2:
        # Viewers that drop styles smooth what they enlarge, and of 8 x 8 pixels they leave nothing to see.
        picture = picture.repeat(int(scale), axis=0).repeat(int(scale), axis=1)
    payload = base64.b64encode(png(picture, colours)).decode("ascii")
    rendering = "image-rendering: pixelated; " if scale >= 1 else ""
    return (
        f'<img alt="{html.escape(alt)}" width="{width}"'
        f' style="{rendering}width: {width}px; max-width: 100%; height: auto; margin: 0"'
        f' src="data:image/png;base64,{payload}">'
    )


def film_strip(
    rows: Mapping[str, Sequence[np.ndarray]], labels: Sequence[str], title: str = "", frames: int = 7
) -> bytes:
    """A still for readers without a kernel: one row of pictures for each caption, time from left to right.

    Args:
        rows: for each caption its uint8 pictures `(H, W, 3)`, all of one size, as many as there are labels.
        labels: what stands under each picture.
        title: what stands above them all.
        frames: how many of the pictures are taken, evenly spread, the first and the last among them.

    Returns:
        The bytes of a PNG file.
    """
    chosen = spread(len(labels), frames)
    height, width = next(iter(rows.values()))[0].shape[:2]
    zoom = max(1, 128 // width) if width <= 128 else 128 / width
    resampling = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
    width, height = round(width * zoom), round(height * zoom)
    gap, line, top = 6, 26, 30 if title else 0
    canvas = Image.new(
        "RGB",
        (len(chosen) * (width + gap) + gap, top + len(rows) * (line + height) + line + gap),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, 6), title, fill=INK, font=_font(16))
    for row, (caption, pictures) in enumerate(rows.items()):
        y = top + row * (line + height)
        draw.text((gap, y + 3), caption, fill=INK, font=_font(15))
        for column, index in enumerate(chosen):
            picture = Image.fromarray(pictures[index]).resize((width, height), resampling)
            canvas.paste(picture, (gap + column * (width + gap), y + line))
    for column, index in enumerate(chosen):
        x = gap + column * (width + gap) + width // 2
        draw.text((x, canvas.height - line + 3), labels[index], fill=INK, font=_font(13), anchor="ma")
    picture = np.asarray(canvas)
    for colours in (None, 256, 64):  # noise hardly compresses
        encoded = png(picture, colours)
        if len(encoded) <= MOST_BYTES:
            break
    return encoded


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices of `range(count)`, evenly spread, first and last among them.

    >>> spread(26, 6)
    [0, 5, 10, 15, 20, 25]
    """
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]


def latent_channels(latents: Tensor, limit: float = 3.0) -> Tensor:
    """Each channel of latents `(B, c, h, w)` as a grey image: `(B * c, 3, h, w)` in [-1, 1].

    Grey is the channel's mean; black and white are `limit` standard deviations below and above it.
    """
    latents = latents.float()
    deviation, mean = torch.std_mean(latents, dim=(2, 3), keepdim=True)
    grey = ((latents - mean) / (limit * deviation.clamp_min(1e-8))).clamp(-1, 1)
    return grey.flatten(0, 1).unsqueeze(1).repeat(1, 3, 1, 1)


def _in_few_colours(image: Image.Image, colours: int) -> Image.Image:
    """The picture with a palette: the octree's colours, and greys, so that lettering stays as it is.

    Each pixel gets the nearest colour; Pillow's own choice is only near, and shows.
    """
    from scipy.spatial import cKDTree  # half a second to import, and only a large picture needs it

    greys = np.linspace(INK, PAPER, 16).round()
    chosen = image.quantize(colours - len(greys), method=Image.Quantize.FASTOCTREE).getpalette()
    palette = np.concatenate([np.reshape(chosen, (-1, 3)), greys]).astype(np.uint8)
    red, green, blue = np.asarray(image, dtype=np.int32).reshape(-1, 3).T
    there, place = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
    nearest = cKDTree(palette).query(np.stack([there >> 16, there >> 8 & 255, there & 255], axis=1))[1]
    nearest = nearest.astype(np.uint8)
    indexed = Image.frombytes("P", image.size, nearest[place].tobytes())
    indexed.putpalette(palette.tobytes())
    return indexed


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's own font: it has the subscripts of zₜ and z₀, and is there wherever matplotlib is.
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
