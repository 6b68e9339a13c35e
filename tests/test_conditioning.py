"""τθ for text: CLIP's own kind of tokenizer, vocabularies of one's own, and what frozen means."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_edu.conditioning import TextConditioner
from ldm_edu.runtime import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights in half precision, with CLIP's tokenizer (without merges: a token for each byte)."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    CLIPTextModel(config).half().save_pretrained(folder)
    return folder


def test_clip_knows_every_word_though_its_padding_is_called_unknown(clip: Path):
    conditioner = TextConditioner.from_pretrained(clip, length=16)
    tokenizer = conditioner.tokenizer
    assert tokenizer.unk_token_id == tokenizer.eos_token_id  # or this proves nothing
    tokens = conditioner.tokenize(["a cat", "", "żółw"])
    assert tokens.shape == (3, 16) and (tokens[1, 1:] == tokenizer.eos_token_id).all()
    context = conditioner(tokens)
    assert context.shape == (3, 16, 16) and context.dtype == torch.float32  # whatever the weights are stored in
    with pytest.raises(UserError, match="reads 16"):
        conditioner.tokenize(["a very long sentence"])


def test_one_caption_is_not_its_letters(clip: Path):
    conditioner = TextConditioner.from_pretrained(clip, length=16)
    assert torch.equal(conditioner.tokenize("a cat"), conditioner.tokenize(["a cat"]))


def test_a_vocabulary_of_ones_own():
    words = ["A", "Red", "star", "red", ","]  # capitals, and a word twice
    conditioner = TextConditioner.from_words(words, length=8, channels=16, layers=1, heads=2)
    tokens = conditioner.tokenize(["A RED star, a red star"])
    assert conditioner.encoder.config.vocab_size == 2 + 4 and tokens.max() < 6
    assert conditioner(tokens).shape == (1, 8, 16)
    for word in ("t-shirt", "ice cream", ""):
        with pytest.raises(UserError, match=f"{word!r} would be read as"):
            TextConditioner.from_words(["a", word])


def test_a_frozen_encoder_has_no_dropout_even_in_training():
    tokenizer = TextConditioner.from_words(["a", "star"], length=8, channels=16, layers=1, heads=2).tokenizer
    config = BertConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, hidden_dropout_prob=0.5,
    )  # fmt: skip
    for frozen in (True, False):
        conditioner = TextConditioner(tokenizer, BertModel(config, add_pooling_layer=False), 8, frozen).train()
        one, other = (conditioner(conditioner.tokenize("a star")) for _ in range(2))
        assert torch.equal(one, other) == frozen and conditioner.training
