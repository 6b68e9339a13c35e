"""What the tests of the command line share: how to run it, and two tiny checkpoints to run it on.

PYTEST_DONT_REWRITE (imported by name too, before pytest could rewrite its asserts)
"""

import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from ldm_edu import cli

PROMPT = "a red circle"


def run(*arguments: object) -> Result:
    """`ldm-edu ARGUMENTS` in this process, which nbval's plugin has made look like a notebook."""
    with patch("ldm_edu.runtime.in_notebook", return_value=False):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    """The command failed, said why on stderr, and neither printed a result nor a traceback."""
    assert result.exit_code != 0 and result.stdout == "", (result.exit_code, result.stdout)
    assert "Traceback" not in result.stderr and result.exc_info[0] is SystemExit, result.exc_info
    for word in words:
        assert word in result.stderr, (word, result.stderr)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two untrained checkpoints, as small as they go: a first stage of f = 4, and a text model on it."""
    from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
    from ldm_edu.conditioning import TextConditioner
    from ldm_edu.diffusion import Schedule
    from ldm_edu.pipeline import LatentDiffusion
    from ldm_edu.unet import UNet, UNetConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    first_stage = AutoencoderKL(
        AutoencoderConfig(latent_channels=2, channels=8, channel_multipliers=(1, 1, 1), blocks=1, groups=4)
    )
    first_stage.save(folder / "first", card="untrained")
    words = ["a", "red", "blue", "circle", "above"]
    unet = UNet(
        UNetConfig(
            in_channels=2, out_channels=2, channels=8, channel_multipliers=(1, 1), blocks=1,
            attention_levels=(1,), heads=2, context_channels=8, groups=4,
        )
    )  # fmt: skip
    for weights in unet.parameters():  # some are zero at first, and would hide what the prompt does
        torch.nn.init.normal_(weights, std=0.2)
    conditioner = TextConditioner.from_words(words, length=8, channels=8, layers=1, heads=2)
    text = LatentDiffusion(first_stage, unet, conditioner, Schedule())
    text.latent_size = 4
    text.save(folder / "text", card="untrained")
    return SimpleNamespace(first=folder / "first", text=folder / "text")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photo(path: Path, height: int = 21, width: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def png_header(side: int) -> bytes:
    """A PNG that says how large it is, and holds no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT", b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
