"""Pictures in and out of files: read any common format, write PNG, crop, resize, lay out a sheet."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ldm_edu.runtime import UserError, refuse_bytes

MAX_MEGAPIXELS = 64  # 8192 x 8192; as floats such a picture takes 0.8 GB
SUFFIXES = frozenset(".avif .bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
FORMATS = tuple("AVIF BMP GIF JPEG PNG PPM TIFF WEBP".split())  # as Pillow calls them; not EPS, which is code

_warning_filters = threading.Lock()  # warnings.catch_warnings is not safe in threads


def read_image(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """A picture file as a float tensor `(3, H, W)` in [-1, 1].

    The EXIF orientation is applied; of an animation the first frame is read. Grey becomes three equal
    channels, a palette its colours; CMYK is converted without a colour profile. Transparent parts are laid
    on white. 16-bit grey keeps its precision, 65535 being white; 16-bit colour is read at 8 bits, as Pillow
    does.

    Raises:
        UserError: no such file, not a picture, broken, or larger than the limit (found before decoding).
    """
    return from_pillow(decode(path, max_megapixels), path)


def read_mask(path: str | Path) -> Tensor:
    """A semantic map as class numbers, int64 `(H, W)`: a palette's indices or a grey picture's values.

    Raises:
        UserError: as `read_image`; also if the file holds colours, not class numbers.
    """
    image = decode(path)
    if image.mode not in ("P", "L", "1", "I", "I;16"):
        raise UserError(f"{path} is {image.mode}; a mask is a palette or grey picture of class numbers.")
    return torch.from_numpy(np.array(image).astype(np.int64))


def decode(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """The file as a loaded Pillow picture, upright, in its own mode. Errors as `read_image`."""
    path = Path(path)
    with _open(path) as image:
        width, height = image.size
        if width * height > max_megapixels * 1_000_000:
            raise UserError(
                f"{path} has {width} x {height} pixels, {width * height / 1e6:.4g} megapixels; "
                f"the limit here is {max_megapixels}. Make a smaller copy, or cut it into tiles."
            )
        try:
            image.load()
            return ImageOps.exif_transpose(image)
        except Exception as error:  # Pillow's decoders raise whatever their code meets in a damaged file
            raise UserError(f"{path} is broken or incomplete: {error}. Replace or remove it.") from error


def _open(path: Path) -> Image.Image:
    """Pillow's picture with its header read and nothing decoded."""
    try:
        with _warning_filters, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            return Image.open(path, formats=FORMATS)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a picture.") from error
    except Image.DecompressionBombError as error:
        wish = f"more than {MAX_MEGAPIXELS} megapixels. Make a smaller copy, or cut it into tiles"
        raise UserError(f"{path} has far {wish}.") from error
    except Image.UnidentifiedImageError as error:
        empty = path.stat().st_size == 0
        reason = "it is empty (0 bytes)" if empty else f"it is not one of {', '.join(FORMATS)}, or damaged"
        raise UserError(f"{path} cannot be read as a picture: {reason}.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be opened: {error}.") from error


def from_pillow(image: Image.Image, name: str | Path = "the picture") -> Tensor:
    """A Pillow picture of any mode as an image `(3, H, W)` in [-1, 1]. `name` is what errors call it."""
    if image.mode.startswith("I"):  # 16 bits; convert("RGB") would clip them at 255
        values = np.array(image).astype(np.float32)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise UserError(f"{name} holds integers from {low:.0f} to {high:.0f}; save it with 8 or 16 bits.")
        return torch.from_numpy(values / 32767.5 - 1).expand(3, -1, -1).clone()
    if image.mode == "F":
        raise UserError(f"{name} holds floating-point values of unknown range; save it with 8 or 16 bits.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return from_levels(np.array(image.convert("RGB")))


def from_levels(array: np.ndarray) -> Tensor:
    """An 8-bit picture `(H, W, 3)`, or grey `(H, W)`, as an image `(3, H, W)` in [-1, 1]."""
    values = torch.from_numpy(array).float() / 127.5 - 1
    return values.permute(2, 0, 1).contiguous() if values.ndim == 3 else values.expand(3, -1, -1).clone()


def to_uint8(images: Tensor) -> np.ndarray:
    """Images `(B, 3, H, W)` in [-1, 1] as uint8 `(B, H, W, 3)`; values outside the range are clipped.

    Raises:
        UserError: a value is not finite, as after a training that diverged; another shape; or they are integers.
    """
    refuse_bytes(images)
    if images.ndim != 4:
        raise UserError(f"This takes one image (3, H, W) or a batch (B, 3, H, W), not {tuple(images.shape)}.")
    if not torch.isfinite(images).all():
        raise UserError("The picture holds NaN or infinite values; the model that made it is not usable.")
    levels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


def write_png(path: str | Path, image: Tensor) -> None:
    """Write an image `(3, H, W)` in [-1, 1] as an 8-bit PNG: whole, or not at all.

    Raises:
        UserError: the folder of `path` does not exist or cannot be written to.
    """
    path = Path(path)
    picture = Image.fromarray(to_uint8(image[None])[0])
    if not path.parent.is_dir():
        raise UserError(f"Cannot write {path}: the folder {path.parent} does not exist. Create it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def contact_sheet(images: Tensor | Sequence[Tensor], columns: int | None = None, gap: int = 2) -> Tensor:
    """Images of one size `(B, 3, H, W)` laid out on one white picture `(3, H', W')`, row by row.

    `columns` defaults to a sheet about as wide as it is high. `gap` is in pixels.
    (torchvision's make_grid does the same, but importing it takes longer than drawing the samples.)
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    framed = F.pad(torch.stack(list(images)), (0, gap, 0, gap), value=1.0)
    blank = framed.new_ones(-len(framed) % columns, *framed.shape[1:])
    sheet = rearrange(torch.cat([framed, blank]), "(row column) c h w -> c (row h) (column w)", column=columns)
    return sheet[:, : sheet.shape[1] - gap, : sheet.shape[2] - gap]


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images `(B, 3, H, W)` or one `(3, H, W)` in [-1, 1], resized: bicubic, antialiased, clipped to [-1, 1].

    Uses the same cubic (a = -0.5) as Pillow, which torch does only with antialiasing on.
    """
    if images.shape[-2:] == (height, width):
        return images
    batch = images if images.ndim == 4 else images[None]
    resized = F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    return resized if images.ndim == 4 else resized[0]


def crop_to_square(images: Tensor) -> Tensor:
    """The largest square in the middle of `(..., H, W)`."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]
