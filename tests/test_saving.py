"""What is saved comes back as the same model; what would come back as another one is refused before it is trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL, FirstStage
from ldm_edu.conditioning import TextConditioner
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError
from ldm_edu.training import Settings
from ldm_edu.training.diffusion import DiffusionSettings, train_diffusion
from ldm_edu.training.state import load_state, save_state, saved_steps
from ldm_edu.unet import UNet, UNetConfig

BERT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8)


class OwnUNet(UNet):
    """Answers otherwise with the same weights."""

    def forward(self, *given: Tensor) -> Tensor:
        return -super().forward(*given)


class OwnConditioner(TextConditioner):
    pass


class OwnKL(AutoencoderKL):
    pass


class NamedKL(AutoencoderKL):
    kind = "named-kl"


def bag_of_words() -> nn.Module:
    """A conditioner of one's own, with all that sampling asks of it."""
    own = nn.Embedding(8, 16)
    own.tokenize = lambda captions: torch.zeros(1 if isinstance(captions, str) else len(captions), 8, dtype=torch.int64)
    return own


def with_part(**parts: object) -> LatentDiffusion:
    """The tiny model with parts of one's own, which have its weights."""
    model = tiny.latent_diffusion()
    for name, part in parts.items():
        setattr(model, name, part)
    return model.eval()


def distil() -> TextConditioner:
    config = DistilBertConfig(vocab_size=8, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=8)
    return TextConditioner(tiny.conditioner().tokenizer, DistilBertModel(config), 8)


def other_levels() -> LatentDiffusion:
    model = tiny.latent_diffusion()
    model.schedule.alphas_cumprod = model.schedule.alphas_cumprod**2
    return model


def wider() -> LatentDiffusion:
    model = tiny.latent_diffusion()
    model.unet.time.linear1 = nn.Linear(8, 64)
    return model


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: with_part(unet=OwnUNet(tiny.UNET)), "its unet would not be .*OwnUNet"),
        (lambda: with_part(conditioner=OwnConditioner.from_words(tiny.WORDS, 8, 16)), "conditioner OwnConditioner"),
        (lambda: with_part(conditioner=bag_of_words()), "conditioner Embedding"),
        (lambda: with_part(conditioner=distil()), "DistilBertModel"),
        (lambda: with_part(first_stage=OwnKL(tiny.AUTOENCODER)), "OwnKL"),
        (other_levels, "ᾱ of its own"),
        (wider, "time.linear1.weight would not be .64, 8."),
    ],
    ids=["unet", "conditioner", "any module", "encoder", "first stage", "schedule", "shape"],
)
def test_what_would_come_back_as_another_model(make, words: str, tmp_path: Path):
    model = make()
    if "ᾱ" not in words and "64" not in words:  # it is a model that works, but for
        model.sample(["a red star"], num_steps=1)
    with pytest.raises(UserError, match=words):
        model.save(tmp_path / "it", "a card")
    assert not list(tmp_path.iterdir())
    images, settings = torch.zeros(4, 3, 16, 16), DiffusionSettings(steps=1, pictures=4, batch_size=2, log_every=1)
    with pytest.raises(UserError, match=words):  # said before training, not after it
        train_diffusion("it", model, settings, images.__getitem__, ["a star"] * 4, "", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_first_stage_of_ones_own_needs_a_name_of_its_own(tmp_path: Path):
    with pytest.raises(UserError, match="OwnKL"):
        OwnKL(tiny.AUTOENCODER).save(tmp_path / "own", "a card")
    named = NamedKL(tiny.AUTOENCODER)
    named.save(tmp_path / "named", "a card")
    assert type(FirstStage.load(tmp_path / "named")) is type(NamedKL.load(tmp_path / "named")) is NamedKL
    model = with_part(first_stage=named)
    model.save(tmp_path / "text", "a card")
    assert type(LatentDiffusion.load(tmp_path / "text").first_stage) is NamedKL


def test_a_cell_that_is_run_again_makes_the_class_that_is_loaded(tmp_path: Path):
    made = []
    for _ in range(2):
        room = {"AutoencoderKL": AutoencoderKL, "__name__": "__main__"}
        exec("class Mine(AutoencoderKL):\n    kind = 'mine'", room)
        made.append(room["Mine"])
    for number, kind in enumerate(made):  # an instance of the first one, too
        kind(tiny.AUTOENCODER).save(tmp_path / str(number), "a card")
        assert type(FirstStage.load(tmp_path / str(number))) is made[-1]


def test_a_subclass_of_the_whole_comes_back_as_itself_or_not_at_all(tmp_path: Path):
    class Sub(LatentDiffusion):
        pass

    class Named(LatentDiffusion):
        kind = "named"

    for kind in (Sub, Named):
        model = tiny.latent_diffusion()
        model.__class__ = kind
        if kind is Sub:
            with pytest.raises(UserError, match="its class would not be .*Sub, but .*LatentDiffusion"):
                model.save(tmp_path / "it", "a card")
        else:
            model.save(tmp_path / "it", "a card")
            assert type(Named.load(tmp_path / "it")) is Named


def test_a_compiled_conditioner_and_levels_in_single_precision_are_saved(tmp_path: Path):
    model = tiny.latent_diffusion()
    expected = model.sample(["a star"], num_steps=1)
    model.conditioner = torch.compile(model.conditioner, backend="eager")
    model.schedule.alphas_cumprod = model.schedule.alphas_cumprod.float()
    model.save(tmp_path / "it", "a card")
    again = LatentDiffusion.load(tmp_path / "it").sample(["a star"], num_steps=1)
    torch.testing.assert_close(again, expected, atol=0.02, rtol=0)


def test_looking_whether_it_can_be_saved_draws_no_random_numbers():
    model = tiny.latent_diffusion()
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    model.description()
    assert torch.equal(torch.randn(4), expected)


def test_a_bert_as_transformers_builds_it_is_saved_without_its_pooling_layer(tmp_path: Path):
    bert = BertModel(BertConfig(vocab_size=8, **BERT))
    assert bert.pooler is not None
    model = with_part(conditioner=TextConditioner(tiny.conditioner().tokenizer, bert, 8))
    expected = model.sample(["a red star"], num_steps=2)
    model.save(tmp_path / "it", "a card")
    torch.testing.assert_close(LatentDiffusion.load(tmp_path / "it").sample(["a red star"], num_steps=2), expected,
                               atol=0.02, rtol=0)  # half precision  # fmt: skip


def test_numbers_and_paths_of_any_kind(tmp_path: Path):
    config = replace(tiny.AUTOENCODER, channels=np.int64(8), channel_multipliers=[1, np.int64(1), 2])
    AutoencoderKL(config).save(tmp_path / "first", "a card")
    assert AutoencoderKL.load(tmp_path / "first").config == tiny.AUTOENCODER
    model = tiny.latent_diffusion()
    model.latent_size, model.schedule.T = np.int64(4), np.int64(1000)
    model.save(tmp_path / "text", "a card")
    assert LatentDiffusion.load(tmp_path / "text").latent_shape == (2, 4, 4)


def test_home_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    tiny.first_stage().save("~/first", "a card")
    assert AutoencoderKL.load("~/first").config == tiny.AUTOENCODER and (tmp_path / "first").is_dir()


def test_weights_of_another_encoder_are_refused(tmp_path: Path):
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "star": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "bert")
    BertModel(BertConfig(vocab_size=3, **BERT)).save_pretrained(tmp_path / "bert")
    for other in ("CLIPTextModel", "T5EncoderModel"):
        with pytest.raises(UserError, match=f"bert.* is no {other}.*lacks|Cannot load {other}"):
            TextConditioner.from_pretrained(tmp_path / "bert", other, length=8)
    with pytest.raises(UserError, match="reads 8 tokens at most, not 77"):
        TextConditioner.from_pretrained(tmp_path / "bert", "BertModel")


def test_what_others_keep_in_a_runs_folder_stays(tmp_path: Path):
    model, settings = nn.Linear(2, 2), Settings()
    optimizer = torch.optim.AdamW(model.parameters())
    own = [tmp_path / "step-0000001-samples", tmp_path / "step-by-step"]
    left = [tmp_path / "step-0000001.tmp", tmp_path / "step-0000001.old"]
    for folder in own + left:
        folder.mkdir()
    for step in (1, 2):
        save_state(tmp_path, step, model, [], optimizer, {"settings": settings.__dict__, "seconds": 0})
    load_state(tmp_path, model, [], optimizer, settings)
    assert [p.name for p in saved_steps(tmp_path)] == ["step-0000002"]
    assert all(p.is_dir() for p in own) and not any(p.exists() for p in left)


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        (AutoencoderConfig, {"attention_levels": (9,)}, "attention_levels are counted from 0.*to 3.*9"),
        (AutoencoderConfig, {"attention_levels": (-1,)}, "attention_levels are counted from 0"),
        (AutoencoderConfig, {"latent_channels": 0}, "latent_channels must be at least 1"),
        (AutoencoderConfig, {"blocks": 0}, "blocks must be at least 1"),
        (AutoencoderConfig, {"channels": 16}, "multiple of the 32 groups"),
        (AutoencoderConfig, {"channel_multipliers": ()}, "at least one; it is empty"),
        (UNetConfig, {"channel_multipliers": ()}, "at least one; it is empty"),
        (UNetConfig, {"transformer_depth": 1.5}, "transformer_depth must be at least 1 at every level, an integer"),
        (UNetConfig, {"transformer_depth": (1, 1, 1.5, 1)}, "an integer; it is"),
        (AutoencoderConfig, {"blocks": 1.5}, "blocks must be an integer, not 1.5"),
        (AutoencoderConfig, {"latent_channels": "4"}, "latent_channels must be an integer, not '4'"),
        (UNetConfig, {"transformer_depth": 0}, "transformer_depth must be at least 1"),
        (UNetConfig, {"transformer_depth": (1, 1, -1, 1)}, "transformer_depth must be at least 1"),
        (DiffusionSettings, {"condition_dropout": 1.5}, "condition_dropout is a share"),
    ],
)
def test_settings_that_mean_nothing(kind: type, changes: dict, words: str):
    with pytest.raises(UserError, match=words):
        kind(**changes)


def test_lists_are_as_good_as_tuples():
    lists = AutoencoderConfig(channel_multipliers=[1, 2], attention_levels=[1])
    assert lists == AutoencoderConfig(channel_multipliers=(1, 2), attention_levels=(1,)) and hash(lists)
    lists = UNetConfig(channel_multipliers=[1, 2], attention_levels=[0], transformer_depth=[1, 2])
    assert lists == UNetConfig(channel_multipliers=(1, 2), attention_levels=(0,), transformer_depth=(1, 2))
    assert hash(lists) and UNetConfig(transformer_depth=np.int64(2)).depth_at(1) == 2
