"""`ldm-edu bench`. Light to import: torch comes with the bench itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ldm_edu.errors import UserError


def bench(
    what: Annotated[str, typer.Argument(metavar="first-stage|unet", help="What to time.")],
    size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="first-stage: side of the picture; by default 128, on a GPU 512."),
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs of each side, for the median.")] = 10,
    channels: Annotated[
        int | None, typer.Option(help="first-stage: width of the network; by default 128, Stable Diffusion's.")
    ] = None,
    large: Annotated[
        bool,
        typer.Option("--large", help="first-stage: decode 1024x1024, too. unet: Stable Diffusion's instead. Slow."),
    ] = False,
    task: Annotated[str | None, typer.Option(help="unet: only forward, 'training step' or sampling.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda|mps", help="By default the CPU, then a GPU if there is one.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the ratios, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Our speed and memory beside diffusers', with the same weights, turn by turn. Let nothing else run.

    unet: one call, a training step and 25 sampling steps, at the size of shapes-text. A compiler is tried, too.
    Each row is told on stderr as soon as it is measured; the table comes in the end.
    """
    if what not in ("first-stage", "unet"):
        raise UserError(f"There is no bench {what!r}; there are first-stage and unet.")
    if runs < 1:
        raise UserError(f"--runs is {runs}; it must be at least 1.")
    if what == "unet" and (size, channels) != (None, None):
        raise UserError("The UNet is timed at its own size: leave out --size and --channels, or add --large.")
    if what != "unet" and task is not None:
        raise UserError("--task is for the unet.")
    if plot and (plot.is_dir() or not (plot.suffix.lower() == ".png" and plot.parent.is_dir())):
        raise UserError(f"--plot {plot}: name a FILE.png in a folder that exists.")

    from tqdm import tqdm

    from ldm_edu.bench import first_stage, sides, unet

    if what == "unet":
        made = unet.unet(runs, large, device, task)
    else:
        made = first_stage.first_stage(size, runs, 128 if channels is None else channels, large, device)
    rows = []
    for row in made:
        rows.append(row)
        tqdm.write(sides.line(row), file=sys.stderr)
    typer.echo(json.dumps({"rows": rows}, allow_nan=False) if as_json else sides.table(rows))
    if plot:
        sides.plot(rows, plot)
