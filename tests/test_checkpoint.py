"""Checkpoints: read back exactly, and refused in words when anything is wrong."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interruption import contents
from safetensors.torch import save
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_edu import checkpoint
from ldm_edu.autoencoder import AutoencoderKL
from ldm_edu.checkpoint import CheckpointError
from ldm_edu.conditioning import TextConditioner
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError

PROMPT = "a red circle above a blue star"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind, made once; tests that damage one copy it."""
    folder = tmp_path_factory.mktemp("originals")
    tiny.first_stage().save(folder / "first", "a card", "step,loss\n1,0.5\n")
    tiny.latent_diffusion().save(folder / "text", "a card")
    return {"first": folder / "first", "text": folder / "text"}


@pytest.fixture(params=["first", "text"])
def copy(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint to damage, of each kind in turn."""
    return Path(shutil.copytree(originals[request.param], tmp_path / request.param))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the committed checkpoints."""
    folder = tmp_path / "committed"
    folder.mkdir()
    monkeypatch.setattr(checkpoint, "HOME", folder)
    return folder


def load(folder: Path) -> AutoencoderKL | LatentDiffusion:
    kind = AutoencoderKL if folder.name.startswith("first") else LatentDiffusion
    return kind.load(folder)


def refused(folder: Path, *words: str) -> None:
    """Loading fails with a message for a person, which names the folder and says these words."""
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for word in (folder.name, *words):
        assert word in str(error.value)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


# there and back


def test_a_first_stage_comes_back(originals: dict[str, Path], tmp_path: Path):
    model, back = tiny.first_stage(), AutoencoderKL.load(originals["first"])
    assert back.config == model.config and not back.training
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.half().float()), name
    assert sorted(contents(originals["first"])) == ["README.md", "config.json", "history.csv", "model.safetensors"]
    assert (originals["first"] / "history.csv").read_text() == "step,loss\n1,0.5\n"
    back.save(tmp_path / "again", "a card", "step,loss\n1,0.5\n")
    assert contents(tmp_path / "again") == contents(originals["first"])


@pytest.mark.parametrize("embedded", [True, False])
def test_a_latent_diffusion_model_comes_back(embedded: bool, home: Path, tmp_path: Path):
    tiny.first_stage().save(home / "tiny-first", "a card")
    tiny.first_stage(seed=1).save(home / "another", "a card")
    model = tiny.latent_diffusion(prediction="v")
    model.first_stage = AutoencoderKL.load("tiny-first")
    model.save(tmp_path / "text", "a card", embed_first_stage=embedded)
    back = LatentDiffusion.load(tmp_path / "text", device="cpu")
    assert (back.latent_scale, back.latent_size, back.prediction) == (0.7, 4, "v") and not back.training
    assert back.schedule.config() == model.schedule.config()
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.half().float()), name
    model.load_state_dict(back.state_dict())
    arguments = dict(num_steps=2, seeds=3)
    torch.testing.assert_close(back.sample(PROMPT, **arguments), model.sample(PROMPT, **arguments), atol=1e-4, rtol=0)
    small = (tmp_path / "text/model.safetensors").stat().st_size
    assert (small > (home / "tiny-first/model.safetensors").stat().st_size + 50_000) or not embedded
    if not embedded:
        shutil.rmtree(home / "tiny-first")
        with pytest.raises(CheckpointError, match="first stage"):
            LatentDiffusion.load(tmp_path / "text")


def test_a_frozen_clip_encoder_comes_back(tmp_path: Path):
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tiny.latent_diffusion()
    model.conditioner = TextConditioner(model.conditioner.tokenizer, CLIPTextModel(config).eval(), 8, frozen=True)
    model.save(tmp_path / "text", "a card")
    back = LatentDiffusion.load(tmp_path / "text", device="cpu")
    assert back.conditioner.frozen and not any(w.requires_grad for w in back.conditioner.parameters())
    model.load_state_dict(back.state_dict())
    torch.testing.assert_close(back.context([PROMPT]), model.context([PROMPT]))


def test_loading_a_checkpoint_does_not_unpickle(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, forbidden)
    for folder in originals.values():
        load(folder)


class Evil:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, ("pwned",)


def test_a_pickle_in_place_of_the_weights_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(copy)
    weights = pickle.dumps(Evil())
    (copy / "model.safetensors").write_bytes(weights)
    change(copy, lambda c: c.update(sha256=hashlib.sha256(weights).hexdigest()))
    refused(copy, "model.safetensors", "no safetensors file")
    torch.save({"weight": Evil()}, copy / "model.safetensors")
    refused(copy, "altered")
    assert not (copy / "pwned").exists()


def test_saved_weights_are_what_the_fingerprint_says(originals: dict[str, Path]):
    config = json.loads((originals["first"] / "config.json").read_text())
    assert config["sha256"] == checkpoint.fingerprint(tiny.first_stage().state_dict())
    assert config["sha256"] == checkpoint.fingerprint(AutoencoderKL.load(originals["first"]).state_dict())
    stored = {n: t.half() for n, t in sorted(tiny.first_stage().state_dict().items())}
    assert config["sha256"] == hashlib.sha256(save(stored)).hexdigest()


# not there


def test_an_unknown_name_lists_those_there_are(home: Path):
    with pytest.raises(CheckpointError, match=r"'shapes-txt'.*none"):
        checkpoint.find("shapes-txt")
    for name in ("b-second", "a-first", "killed.tmp"):
        tiny.first_stage().save(home / name, "a card")
    with pytest.raises(CheckpointError, match=r"'shapes-txt'.*a-first, b-second\."):
        AutoencoderKL.load("shapes-txt")
    assert checkpoint.find("a-first") == home / "a-first"


def test_a_folder_without_a_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match="config.json"):
        LatentDiffusion.load(tmp_path)


def test_the_network_is_for_names_that_ask_for_it(monkeypatch: pytest.MonkeyPatch, home: Path):
    def fetch(*_: object, **__: object) -> None:
        raise OSError("the network was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(CheckpointError, match="There is no checkpoint 'someone/something'"):
        checkpoint.find("someone/something")
    with pytest.raises(CheckpointError, match="someone/something.*the network was asked"):
        checkpoint.find("hub:someone/something")


# damaged


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "No such file"]),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["truncated", "0 bytes"]),
        (lambda f: os.truncate(f / "model.safetensors", 5000), ["truncated", "5,000 bytes"]),
        (lambda f: (f / "model.safetensors").open("ab").write(b"\0"), ["altered"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ["config.json", "not valid JSON"]),
        (lambda f: (f / "config.json").write_text("[1, 2]"), ["format None"]),
        (lambda f: change(f, lambda c: c.update(format=2)), ["format 2", "up to 1", "Update the package"]),
        (lambda f: change(f, lambda c: c.update(format="1")), ["format '1'"]),
        (lambda f: change(f, lambda c: c.pop("format")), ["format None"]),
        (lambda f: change(f, lambda c: c.pop("sha256")), ["altered"]),
        (lambda f: change(f, lambda c: c.update(kind="gan")), ["'gan'"]),
        (lambda f: change(f, lambda c: c.pop("kind")), ["kind", "None"]),
    ],
)  # fmt: skip
def test_damage_is_named(copy: Path, damage: Callable[[Path], object], words: list[str]):
    if "kind" in words:
        words = ["None", load(copy).kind]
    damage(copy)
    refused(copy, *words)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_altered_byte_of_the_weights_is_refused(originals: dict[str, Path], tmp_path: Path, data: st.DataObject):
    copied = Path(shutil.copytree(originals["first"], tmp_path / "first", dirs_exist_ok=True))
    weights = bytearray((originals["first"] / "model.safetensors").read_bytes())
    weights[data.draw(st.integers(0, len(weights) - 1))] ^= data.draw(st.integers(1, 255))
    (copied / "model.safetensors").write_bytes(weights)
    refused(copied, "altered")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_config_cut_anywhere_is_refused(originals: dict[str, Path], tmp_path: Path, data: st.DataObject):
    copied = Path(shutil.copytree(originals["text"], tmp_path / "text", dirs_exist_ok=True))
    text = (originals["text"] / "config.json").read_text().rstrip()
    (copied / "config.json").write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    refused(copied, "not valid JSON")


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("autoencoder", None, ["incomplete or wrong"]),
        ("autoencoder.colour", "red", ["unknown settings: colour"]),
        ("autoencoder.channels", 12, ["does not fit its weights", "the first is", "conv"]),
        ("autoencoder.channels", "eight", ["incomplete or wrong"]),
        ("autoencoder.channels", -8, ["incomplete or wrong"]),
        ("autoencoder.groups", 3, ["incomplete or wrong"]),
        ("autoencoder.channel_multipliers", [], ["incomplete or wrong"]),
        ("unet", None, ["incomplete or wrong", "unet"]),
        ("unet.heads", 3, ["Level 1, 16 channels wide", "3 heads"]),
        ("unet.heads", 0, ["heads must be at least 1"]),
        ("unet.magic", 1, ["unknown settings: magic"]),
        ("unet.attention_levels", [], ["does not fit its weights"]),
        ("unet.context_channels", 8, ["context_channels 16 (not 8)"]),
        ("conditioner.tokenizer", "{}", ["incomplete or wrong"]),
        ("conditioner.encoder", "GPT2Model", ["GPT2Model"]),
        ("conditioner.length", None, ["incomplete or wrong", "length"]),
        ("conditioner.encoder_config.vocab_size", 5, ["does not fit its weights"]),
        ("conditioner.encoder_config.depth", 5, ["incomplete or wrong", "depth"]),
        ("schedule.kind", "sine", ["sine"]),
        ("schedule.T", 0, ["T=0"]),
        ("schedule.speed", 1, ["incomplete or wrong", "speed"]),
        ("prediction", "score", ["score"]),
        ("latent_scale", 0, ["0"]),
        ("latent_scale", float("nan"), ["nan"]),
        ("latent_scale", "large", ["incomplete or wrong", "large"]),
        ("latent_scale", None, ["incomplete or wrong", "latent_scale"]),
        ("first_stage", None, ["incomplete or wrong", "first_stage"]),
        ("first_stage.embedded", False, ["first stage"]),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit(
    originals: dict[str, Path], tmp_path: Path, home: Path, path: str, value: object, words: list[str]
):
    """`value` in place of a setting; None takes it away."""
    *outer, last = path.split(".")
    name = "first" if path.startswith("autoencoder") else "text"
    copied = Path(shutil.copytree(originals[name], tmp_path / name))

    def edit(config: dict[str, Any]) -> None:
        for key in outer:
            config = config[key]
        config.pop(last, None)
        if value is not None:
            config[last] = value

    change(copied, edit)
    with pytest.raises(UserError) as error:
        load(copied)
    for word in words:
        assert word in str(error.value)
