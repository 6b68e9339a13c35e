"""The command line: ldm-edu sample | reconstruct | train | evaluate | bench | lab.

A user's mistake is a message on stderr and exit status 1, without a traceback. torch is imported inside the
commands, so that --help is quick.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ldm_edu import __version__
from ldm_edu.bench.command import bench
from ldm_edu.errors import UserError

TOUR = Path(__file__).resolve().parent.parent / "notebooks" / "00_tour.ipynb"


class Commands(TyperGroup):
    """Turns a UserError, or what the system refuses, into a message, and warnings into lines without file names."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"Warning: {message}")
            try:
                return super().invoke(ctx)
            except UserError as error:
                _say(f"Error: {error}")
                raise typer.Exit(1) from error
            except BrokenPipeError:  # of `| head`
                raise
            except OSError as error:
                _say(f"Error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
                raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Latent diffusion models: draw pictures, reconstruct them, train, evaluate, open the notebooks.",
    epilog="LDM_EDU_DEVICE=cpu|cuda|mps chooses the device, LDM_EDU_DATA the folder of data sets.",
)

main = app  # the entry point of the `ldm-edu` command


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _tell(result: dict[str, Any], words: str, as_json: bool) -> None:
    """A result: as JSON, or in words."""
    typer.echo(json.dumps(result, allow_nan=False) if as_json else words)


def _at_least(least: int, option: str, value: int) -> None:
    if value < least:
        raise UserError(f"{option} is {value}; it must be at least {least}.")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ldm-edu {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw, in quotes.")],
    checkpoint: Annotated[str, typer.Option(help="A committed name, or a folder.")] = "shapes-text",
    num: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 4,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, plms (not below 25 steps) or dpm-solver.")] = "ddim",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of each prompt's first picture; the next have +1.")] = 0,
    out: Annotated[
        Path, typer.Option(help="FILE.png for one sheet; a folder for a file a picture.")
    ] = Path("sample.png"),
) -> None:
    """Draw pictures from text.

    Every prompt gets the same seeds. On a sheet of several prompts, each has a row. A file that is there is
    replaced.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise UserError(f"Prompt {number} is empty. Say what to draw, for example: a red circle")
    _at_least(1, "--num", num)
    _at_least(1, "--steps", steps)
    _at_least(0, "--seed", seed)
    if not math.isfinite(guidance):
        raise UserError(f"--guidance is {guidance}; it must be a number, for example 3.")
    as_sheet = _names_a_file(out)

    from ldm_edu.datasets.images import contact_sheet, write_png
    from ldm_edu.pipeline import LatentDiffusion
    from ldm_edu.tasks.text_to_image import draw, file_name

    texts = [prompt for prompt in prompts for _ in range(num)]
    seeds = [seed + i for _ in prompts for i in range(num)]
    model = LatentDiffusion.load(checkpoint)
    model.steps(texts, steps, guidance, seeds, sampler)  # which refuses at once what cannot be drawn
    if not as_sheet:
        out.mkdir(exist_ok=True)
    images = draw(model, texts, seeds, steps, guidance, sampler)
    if as_sheet:
        files = {out: contact_sheet(images, columns=num if len(prompts) > 1 else None)}
    else:
        names = [file_name(i // num, *one) for i, one in enumerate(zip(texts, seeds))]
        files = {out / name: image for name, image in zip(names, images)}
    for path, image in files.items():
        write_png(path, image)
    typer.echo("\n".join(map(str, files)))


def _names_a_file(out: Path) -> bool:
    """Whether --out names a picture, not a folder. Refuses at once what could not be written in the end."""
    if out.is_dir():
        return False
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist. Create it first.")
    if out.suffix.lower() == ".png":
        return True
    if out.exists() or out.suffix:
        raise UserError(f"--out {out}: pictures are written as PNG. Name a FILE.png, or a folder.")
    return False


@app.command()
def reconstruct(
    source: Annotated[Path, typer.Argument(metavar="IMAGE|FOLDER", help="A picture, or a folder of them.")],
    checkpoint: Annotated[str, typer.Option(help="A first stage: its name, or a folder.")] = "photos-kl-f4",
    out: Annotated[Path | None, typer.Option(help="FILE.png or a folder for the results.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Encode and decode pictures; print PSNR and SSIM beside a bicubic copy's.

    RGB at 8 bits, mean of the pictures' values. A picture is padded by reflection to a multiple of the first
    stage's f, and cropped back. The bicubic copy is the picture shrunk by f and enlarged again. A file that is
    there is replaced; beside the originals only the one that --out names.
    """
    if out is not None and _names_a_file(out) and source.is_dir():
        raise UserError(f"{source} is a folder, so --out must name a folder too, not {out}.")

    from ldm_edu.autoencoder import FirstStage
    from ldm_edu.datasets.metadata import list_pictures
    from ldm_edu.evaluation.reconstruction import mean_scores, output_paths, score_files, table
    from ldm_edu.runtime import pick_device

    paths = [entry.path for entry in list_pictures(source)] if source.is_dir() else [source]
    targets = {} if out is None else output_paths(source, paths, out)
    scores = score_files(FirstStage.load(checkpoint).to(pick_device()), paths, targets)
    _tell(mean_scores(list(scores.values())), table(scores), as_json)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Named as the checkpoint it makes.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last saved step.")] = False,
    size: Annotated[str | None, typer.Option(metavar="cpu|gpu", help="By default, what the device can carry.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")
    ] = None,
) -> None:
    """Train a recipe. An unknown RECIPE or KEY is answered with those there are."""
    pairs = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise UserError(f"--set {setting}: write KEY=VALUE, for example --set batch_size=32")
        pairs[key] = value

    from ldm_edu import training

    training.recipes.get(recipe)
    if out is None:
        out = Path("runs") / recipe
        out.parent.mkdir(exist_ok=True)
    training.train(recipe, out, resume=resume, settings=pairs, size=size)
    typer.echo(out / "checkpoint")


@app.command()
def evaluate(
    names: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT...", help="Names or folders; or what is named below."),
    ],
    data: Annotated[
        Path | None, typer.Option(help="A folder of pictures, for first stages; several have a default.")
    ] = None,
    captions: Annotated[int, typer.Option(help="Captions a group, for a text model.")] = 512,
    seed: Annotated[int, typer.Option(help="Of scenes and noise, for a text model or ShapeScenes.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a checkpoint: a text model's faithfulness to captions, or a first stage's reconstructions.

    Faithfulness is the share of pictures with every object, colour, shape, size and relation as asked.
    Several first stages (`sweep`: the committed ones) are compared in one table; without --data on the held-out
    photographs of Caltech-101. `shapes` measures ShapeScenes, `attention` where the words of a text
    model look (of shapes-text, if none is named), `samplers` every sampler of shapes-text over numbers of steps.
    """
    _at_least(1, "--captions", captions)
    _at_least(0, "--seed", seed)

    from ldm_edu import checkpoint as checkpoints

    ours = names in (["shapes"], ["samplers"]) or (names[0] == "attention" and len(names) <= 2)
    if ours and data is not None:
        raise UserError(f"{names[0]} is measured on scenes of its own: leave out --data.")
    if names == ["samplers"]:
        from ldm_edu.evaluation import steps

        measured = steps.evaluate("shapes-text", captions, seed)
        return _tell(measured, steps.table(measured), as_json)
    if ours:
        from ldm_edu.evaluation import attention, scenes

        if names == ["shapes"]:
            found = scenes.measure_scenes(seed=seed)
        else:
            found = attention.measure_attention(*names[1:], captions=captions, seed=seed)
        return _tell(found, "\n".join(f"{name:>33} {value}" for name, value in found.items()), as_json)
    names = [n for name in names for n in (checkpoints.names("sweep-") if name == "sweep" else [name])]
    kinds = {name: checkpoints.read(checkpoints.find(name))[0].get("kind") for name in names}
    text = [name for name, kind in kinds.items() if kind == "latent-diffusion"]
    if len(names) > 1 and text:
        raise UserError(f"{text[0]} is a text model; only first stages can be compared. Name it alone.")
    if len(names) > 1:
        from ldm_edu.evaluation.comparison import compare_checkpoints, table

        result = compare_checkpoints(names, data)
        return _tell(result, table(result["rows"]), as_json)
    if not text:
        if data is None:
            raise UserError(f"{names[0]} is a first stage: name a folder of pictures with --data FOLDER.")
        return reconstruct(data, checkpoint=names[0], as_json=as_json)
    if data is not None:
        raise UserError(f"{names[0]} is a text model, measured on captions of its own: leave out --data.")

    from ldm_edu.evaluation.faithfulness import faithfulness
    from ldm_edu.pipeline import LatentDiffusion

    result = faithfulness(LatentDiffusion.load(names[0]), captions=captions, seed=seed)
    shares = {k: "none asked" if v is None else f"{v:6.1%}" for k, v in result["faithfulness"].items()}
    words = [f"{group:>10} {share}" for group, share in shares.items()]
    words.append(f"{result['captions']} captions a group (no_colours: those of two shapes), seed {result['seed']}")
    _tell(result, "\n".join(words), as_json)


app.command()(bench)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context) -> None:
    """Open JupyterLab on the tour. Further options go to JupyterLab: ldm-edu lab --no-browser --port 9000."""
    if not TOUR.is_file():
        raise UserError(f"There is no {TOUR}. The notebooks come with a clone of the project; run it from there.")
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={TOUR.parent.parent}", str(TOUR)]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container, say
        command.append("--allow-root")
    raise typer.Exit(subprocess.call([*command, *context.args]))
