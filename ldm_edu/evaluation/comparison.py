"""First stages side by side, in the manner of the paper's table 8: pixels, structure, perception, distribution."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderVQ, FirstStage, PerceptualLoss, PerceptualNetwork
from ldm_edu.datasets.metadata import list_pictures
from ldm_edu.evaluation.reconstruction import bicubic_copy, pad_to_multiple, psnr, readable, reconstruct, ssim
from ldm_edu.runtime import REPOSITORY, UserError, autocast, fast_precision, pick_device, progress
from ldm_edu.training.photographs import photographs

PATCH = 64  # pixels; the Fréchet distance is between sets of patches of this side


class PatchFeatures(nn.Module):
    """Pictures, uint8 `(B, 3, PATCH, PATCH)`, to the judge's last features, averaged over places: `(B, width)`."""

    def __init__(self, network: PerceptualNetwork) -> None:
        super().__init__()
        self.network, self.num_features = network, network.config.widths[-1]

    def forward(self, patches: Tensor) -> Tensor:
        """`(B, 3, PATCH, PATCH)` to `(B, num_features)`."""
        weight = next(self.network.parameters())
        return self.network(patches.to(weight.dtype) / 127.5 - 1)[-1].mean(dim=(2, 3))


def frechet_distance(originals: Sequence[Tensor], restored: Sequence[Tensor], judge: nn.Module) -> float:
    """Fréchet distance of two sets of images `(3, H, W)`, between the features of their patches (Heusel et al. 2017).

    Patches do not overlap; what is left at the right and lower edge is left out. Small sets give large values: compare
    only what was measured on the same pictures.

    Raises:
        UserError: fewer than two patches in one of the sets.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    sets = [[patches for image in images if len(patches := _patches(image.cpu()))] for images in (originals, restored)]
    if min(sum(map(len, patches)) for patches in sets) < 2:
        raise UserError(f"A Fréchet distance needs at least two patches of {PATCH} × {PATCH} pixels in each set.")
    features = PatchFeatures(copy.deepcopy(judge).cpu())  # in float64, which not every device has
    metric = FrechetInceptionDistance(feature=features, input_img_size=(3, PATCH, PATCH))
    metric.set_dtype(torch.float64)  # of the copy, too
    for patches, real in zip(sets, (True, False), strict=True):
        for some in patches:
            metric.update(some, real=real)
    return float(metric.compute())


def _patches(image: Tensor) -> Tensor:
    height, width = (side // PATCH * PATCH for side in image.shape[1:])
    levels = ((image[:, :height, :width].clamp(-1, 1) + 1) * 127.5).round().byte()
    return rearrange(levels, "c (rows h) (columns w) -> (rows columns) c h w", h=PATCH, w=PATCH)


@torch.no_grad()
def measure(
    name: str, first_stage: FirstStage, images: Sequence[Tensor], judge: PerceptualNetwork
) -> dict[str, Any]:
    """Reconstruct images `(3, H, W)`, each of its own size, and compare: a row of `compare`."""
    restored, used, device = [], set(), first_stage.device
    with autocast(device, fast_precision(device)):
        for image in progress(images, desc=name):
            restored.append(reconstruct(first_stage, image.to(device)).float().cpu())
            if isinstance(first_stage, AutoencoderVQ):
                padded = pad_to_multiple(image[None], first_stage.f)[0].to(device)
                used |= set(first_stage.quantizer.codes(first_stage.encode(padded)).unique().tolist())
    codebook = getattr(first_stage.config, "codebook_size", None)
    return {
        "name": name,
        "kind": first_stage.kind.removeprefix("autoencoder-"),
        "f": first_stage.f,
        "channels": first_stage.config.latent_channels,
        "codebook": codebook,
        **distances(images, restored, judge),
        "usage": len(used) / codebook if codebook else None,
    }


def distances(images: Sequence[Tensor], restored: Sequence[Tensor], judge: PerceptualNetwork) -> dict[str, float]:
    """Four measures of how far reconstructions are from their pictures `(3, H, W)`; see `compare`."""
    device, distance = next(judge.parameters()).device, PerceptualLoss(judge)
    pairs = list(zip(restored, images, strict=True))
    return {
        "psnr": fmean(psnr(a, b) for a, b in pairs),
        "ssim": fmean(ssim(a, b) for a, b in pairs),
        "perceptual": fmean(float(distance(a[None].to(device), b[None].to(device))) for a, b in pairs),
        "frechet": frechet_distance(images, restored, judge),
    }


@torch.no_grad()
def compare(first_stages: dict[str, FirstStage], images: Sequence[Tensor]) -> dict[str, Any]:
    """All of them on the same pictures, and a bicubic copy for every factor that occurs.

    Returns:
        {"rows": [{"name", "kind", "f", "channels", "codebook", "psnr", "ssim", "perceptual", "frechet", "usage"}],
        "images": how many}

        psnr, ssim: means over the pictures, at 8 bits; see `reconstruction`.
        perceptual: mean distance of picture and reconstruction in the features of `perceptual-judge`; 0 is equal.
        frechet: Fréchet distance between patches of pictures and of reconstructions, in the same features. It is no
            FID: that name belongs to the features of Inception.
        codebook, usage: its size, and the share of it that these pictures use; None for KL.

    Raises:
        UserError: no first stage, or too few pictures.
    """
    if not first_stages or not images:
        raise UserError(f"Give first stages and pictures: these are {len(first_stages)} and {len(images)}.")
    judge = PerceptualNetwork.load("perceptual-judge").to(next(iter(first_stages.values())).device)
    rows = [measure(name, stage, images, judge) for name, stage in first_stages.items()]
    for f in sorted({stage.f for stage in first_stages.values()} - {1}):
        bicubic = {"name": f"bicubic-f{f}", "kind": "bicubic", "f": f, "channels": 3, "codebook": None}
        copies = [bicubic_copy(image, f) for image in images]
        rows.append({**bicubic, **distances(images, copies, judge), "usage": None})
    return {"rows": rows, "images": len(images)}


def compare_checkpoints(names: Sequence[str], data: Path | None = None) -> dict[str, Any]:
    """`compare` for checkpoints by name or folder, on a folder of pictures or the held-out photographs.

    Raises:
        UserError: a name is no first stage, or there are no pictures.
    """
    device = pick_device()
    stages = {name: FirstStage.load(name).to(device) for name in names}
    if data is None:
        images = [image.float() / 127.5 - 1 for image in photographs("held-out")[0]]
    else:
        images = [image for _, image in readable([entry.path for entry in list_pictures(data)])]
    return compare(stages, images)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = ("name", "f", "c", "codes", "PSNR dB", "SSIM", "perceptual", "Fréchet", "usage")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        usage = "" if r["usage"] is None else f"{r['usage']:.0%}"
        cells = (
            r["name"], r["f"], r["channels"], r["codebook"] or "", f"{r['psnr']:.2f}", f"{r['ssim']:.3f}",
            f"{r['perceptual']:.4f}", f"{r['frechet']:.4f}", usage,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def committed_rows(pictures: str = "set14") -> list[dict[str, Any]]:
    """What `compare` gave for the committed sweep and its further seeds; each row has a "seed" besides.

    Args:
        pictures: "set14" (13 pictures of Set14) or "held-out" (516 photographs of Caltech-101).
    """
    text = (REPOSITORY / "data" / "sweep" / "metrics.json").read_text(encoding="utf-8")
    return json.loads(text)["sets"][pictures]["rows"]


def values(rows: Sequence[dict[str, Any]], name: str, metric: str) -> list[float]:
    """One measure of one model, a number for each seed, in the seeds' order."""
    return [row[metric] for row in sorted(rows, key=lambda row: row["seed"] or 0) if row["name"] == name]


def seeds_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Means over the seeds ± one standard deviation, as Markdown."""
    columns = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 3), "perceptual": ("perceptual", 4), "frechet": ("Fréchet", 3)}
    lines = ["| name | seeds | " + " | ".join(head for head, _ in columns.values()) + " |", "|---" * 6 + "|"]
    for name in names:
        cells = [name, str(len(values(rows, name, "psnr")))]
        for metric, (_, digits) in columns.items():
            seeds = values(rows, name, metric)
            spread = f" ± {stdev(seeds):.{digits}f}" if len(seeds) > 1 else ""
            cells.append(f"{fmean(seeds):.{digits}f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
