"""How well a first stage gives a picture back: PSNR and SSIM beside a bicubic copy of the same size.

Both are taken on RGB rounded to 8 bits, picture by picture, and averaged over the pictures. Table 8 of the
paper reports both for its first stages; here a picture keeps its size, and a bicubic copy is the yardstick.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ldm_edu.autoencoder import FirstStage
from ldm_edu.datasets.images import read_image, resize, to_uint8, write_png
from ldm_edu.runtime import UserError, progress

EQUAL_PSNR = 100.0  # dB; the PSNR of equal pictures is infinite, and so would be the mean with one of them
MAX_MEGAPIXELS = 4  # of a file to reconstruct: a first stage needs about 2 GB and a minute a megapixel
SSIM_LEAST = 6  # pixels; the 11-pixel window reflects 5 of them at an edge


@dataclass(frozen=True)
class Score:
    """PSNR (dB) and SSIM of one reconstruction, and the PSNR of the bicubic copy."""

    psnr: float
    ssim: float
    bicubic_psnr: float


def pad_to_multiple(images: Tensor, f: int) -> tuple[Tensor, tuple[slice, slice]]:
    """`(..., H, W)` continued by reflection, right and below, to multiples of `f`; and the crop undoing it.

    >>> padded, crop = pad_to_multiple(images, 4)
    >>> torch.equal(padded[..., *crop], images)
    True

    Reflects as often as needed, so a picture may be smaller than `f` (where `F.pad` gives up).
    """
    height, width = images.shape[-2:]
    rows, columns = _reflected(height, f).to(images.device), _reflected(width, f).to(images.device)
    return images[..., rows, :][..., columns], (slice(0, height), slice(0, width))


def _reflected(length: int, f: int) -> Tensor:
    """0, 1, .., n-1, n-2, .., 1, 0, 1, ..: which pixel stands at each place of the padded side."""
    period = max(2 * (length - 1), 1)
    place = torch.arange(-(-length // f) * f) % period
    return torch.minimum(place, period - place)


@torch.no_grad()
def reconstruct(first_stage: FirstStage, images: Tensor) -> Tensor:
    """Encode and decode images `(B, 3, H, W)`, or one `(3, H, W)`, of any size; same shape, in [-1, 1]."""
    batch = images if images.ndim == 4 else images[None]
    padded, crop = pad_to_multiple(batch, first_stage.f)
    restored = first_stage.decode(first_stage.encode(padded))[..., *crop].clamp(-1, 1)
    return restored if images.ndim == 4 else restored[0]


def bicubic_copy(images: Tensor, f: int) -> Tensor:
    """Images shrunk by `f` and enlarged again, bicubic and antialiased: what a first stage has to beat."""
    padded, crop = pad_to_multiple(images, f)
    height, width = padded.shape[-2:]
    return resize(resize(padded, height // f, width // f), height, width)[..., *crop]


def psnr(restored: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio of two images `(3, H, W)`, in dB, at 8 bits; at most `EQUAL_PSNR`.

    Raises:
        UserError: images of two shapes.
    """
    if restored.shape != original.shape:
        raise UserError(f"The images differ in shape: {tuple(restored.shape)} and {tuple(original.shape)}.")
    error = (_levels(restored) - _levels(original)).square().mean().item()
    return min(10 * math.log10(255**2 / error), EQUAL_PSNR) if error > 0 else EQUAL_PSNR


def ssim(restored: Tensor, original: Tensor) -> float:
    """Structural similarity of two images `(3, H, W)` at 8 bits, mean over channels and places; at most 1.

    Wang et al. (2004), Gaussian window of 11 pixels, sigma 1.5; at its edges the picture is reflected.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes a second to import

    pair = [_levels(image) for image in (restored, original)]
    if min(original.shape[-2:]) < SSIM_LEAST:
        pair = [pad_to_multiple(levels, SSIM_LEAST)[0] for levels in pair]
    return float(structural_similarity_index_measure(*pair, data_range=255.0))


def _levels(image: Tensor) -> Tensor:
    """`(1, 3, H, W)`, the values 0, 1, .., 255 that an 8-bit file would hold."""
    return torch.from_numpy(to_uint8(image[None])).permute(0, 3, 1, 2).float()


def score(restored: Tensor, image: Tensor, f: int) -> Score:
    """Compare an image `(3, H, W)` with its reconstruction by a first stage of factor `f`."""
    return Score(psnr(restored, image), ssim(restored, image), psnr(bicubic_copy(image, f), image))


def readable(paths: Sequence[Path]) -> Iterator[tuple[Path, Tensor]]:
    """Picture files, each with its image `(3, H, W)`, under a progress bar.

    Of several, what cannot be read or is larger than `MAX_MEGAPIXELS` is skipped and named in a warning.

    Raises:
        UserError: the only one cannot be read.
    """
    for path in progress(paths, desc="pictures"):
        try:
            yield path, read_image(path, MAX_MEGAPIXELS)
        except UserError as error:
            if len(paths) == 1:
                raise
            warnings.warn(f"Skipped: {error}", stacklevel=2)


def score_files(
    first_stage: FirstStage, paths: Sequence[Path], targets: Mapping[Path, Path]
) -> dict[Path, Score]:
    """Reconstruct picture files and score them; write those that have a target there, as PNG.

    A target's folder is made if its own parent is there.

    Raises:
        UserError: as `readable`, or a result cannot be written.
    """
    scores = {}
    for path, image in readable(paths):
        restored = reconstruct(first_stage, image.to(first_stage.device)).cpu()
        scores[path] = score(restored, image, first_stage.f)
        if path in targets:
            if targets[path].parent.parent.is_dir():
                targets[path].parent.mkdir(exist_ok=True)
            write_png(targets[path], restored)
    return scores


def output_paths(source: Path, paths: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Where the reconstructions go: to `out` if that is a FILE.png, else into that folder. `paths` are from `source`.

    Raises:
        UserError: a result would overwrite an original, another result, or what lies beside the originals.
    """
    if out.suffix.lower() == ".png" and not out.is_dir():
        places = dict.fromkeys(paths, out)
    else:
        home = source if source.is_dir() else source.parent
        names = ["-".join(path.relative_to(home).with_suffix("").parts) for path in paths]
        if len(set(names)) < len(names):  # a.jpg beside a.png
            names = ["-".join(path.relative_to(home).parts) for path in paths]
        if twice := [name for name, count in Counter(names).items() if count > 1]:  # a/b-c.png beside a-b/c.png
            raise UserError(f"Two results would be called {out / twice[0]}.png: rename one of the pictures or folders.")
        places = {path: out / f"{name}.png" for path, name in zip(paths, names)}
    originals = {path.resolve() for path in paths}
    for place in places.values():
        if place.resolve() in originals:
            raise UserError(f"{out} would overwrite the original {place}. Name another place.")
        if place != out and place.exists() and place.parent.resolve() == paths[0].parent.resolve():
            raise UserError(f"{out} would overwrite {place}, which lies beside the originals. Name another place.")
    if source.is_dir() and out.resolve() in {source.resolve(), *(path.parent for path in originals)}:
        raise UserError(f"{out} holds the originals, and the results would lie among them. Name another place.")
    return places


def table(scores: Mapping[Path, Score]) -> str:
    """A line for each picture, and one for their mean."""
    line = "{:6.2f} dB {:7.4f} {:6.2f} dB  {}".format
    means = mean_scores(list(scores.values()))
    return "\n".join(
        ["     PSNR    SSIM   bicubic  picture"]
        + [line(one.psnr, one.ssim, one.bicubic_psnr, path) for path, one in scores.items()]
        + [line(means["psnr"], means["ssim"], means["bicubic_psnr"], f"mean of {means['images']}")]
    )


def mean_scores(scores: Sequence[Score]) -> dict[str, float | int]:
    """`{"psnr", "ssim", "bicubic_psnr", "images"}`: means over pictures, and how many there were.

    Raises:
        UserError: there were none.
    """
    if not scores:
        raise UserError("There is no picture to score.")
    means = {name: fmean(getattr(one, name) for one in scores) for name in ("psnr", "ssim", "bicubic_psnr")}
    return {**means, "images": len(scores)}
