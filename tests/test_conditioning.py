"""τθ for text: BERT's layers, CLIP's own kind of tokenizer, vocabularies of one's own, and what frozen means."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_edu.conditioning import TextConditioner, TextTransformer
from ldm_edu.conditioning.text import UnknownWords
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
    end = conditioner.tokenizer.token_to_id(conditioner.tokenizer.model.unk_token)  # or this proves nothing
    tokens = conditioner.tokenize(["a cat", "", "żółw"])
    assert tokens.shape == (3, 16) and (tokens[1, 1:] == end).all()
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
    assert conditioner.encoder.settings["vocab_size"] == 2 + 4 and tokens.max() < 6
    assert conditioner(tokens).shape == (1, 8, 16)
    for word in ("t-shirt", "ice cream", ""):
        with pytest.raises(UserError, match=f"{word!r} would be read as"):
            TextConditioner.from_words(["a", word])


@pytest.mark.parametrize(
    "captions, words",
    [
        ([], "There is no caption"), (None, "is a text, not None"), (3, "not 3"), ([None], "not None"),
        (["a star", 3], "not 3"), ([("a star", "star")], r"not \('a star', 'star'\)"),
        ("a red star.", "never saw '[.]' .*Leave out the punctuation that it does not know. It knows these words: a,"),
        ("a red moon", r"never saw 'moon' \(in 'a red moon'\)[.] It knows these"),
    ],
)  # fmt: skip
def test_what_is_no_caption_is_named(captions: object, words: str):
    with pytest.raises(UserError, match=words):
        tiny.conditioner().tokenize(captions)
    assert tiny.conditioner().tokenize(iter(["a star", ""])).shape == (2, 8)


def test_captions_have_a_length():
    with pytest.raises(UserError, match="at least 1, not 0"):
        TextConditioner.from_words(["a", "star"], length=0)


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


# Each of BERT's names as ours; its one kind of token is a vector that every place gets.
BERT_NAMES = {
    "token_embedding": "embeddings.word_embeddings", "position_embedding": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query", "attention.key": "attention.self.key",
    "attention.value": "attention.self.value", "attention.out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
    "feed_forward.0": "intermediate.dense", "feed_forward.2": "output.dense",
}  # fmt: skip


def berts(ours: str, weights: dict[str, Tensor]) -> Tensor:
    """The weight of a BERT's that is called `ours` here."""
    layer, name, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias)", ours).groups()
    weight = weights[f"{(layer or '').replace('layers', 'encoder.layer')}{BERT_NAMES[name]}.{kind}"]
    return weight + weights["embeddings.token_type_embeddings.weight"] if name == "position_embedding" else weight


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_the_transformer_is_bert(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=12, type_vocab_size=1,
    ), add_pooling_layer=False)  # fmt: skip
    theirs = tiny.stirred(theirs).eval().to(dtype)
    ours = TextTransformer(vocab_size=30, length=12, channels=32, layers=3, heads=4).to(dtype)
    weights = theirs.state_dict()
    ours.load_state_dict({name: berts(name, weights) for name in ours.state_dict()})
    assert sum(w.numel() for w in ours.parameters()) == sum(w.numel() for w in theirs.parameters()) - 32
    tokens = torch.randint(30, (5, 12))
    wanted, grad = theirs(input_ids=tokens).last_hidden_state, torch.randn(5, 12, 32, dtype=dtype)
    assert (ours(tokens) - wanted).abs().max() < tolerance * wanted.abs().max()
    ours(tokens).backward(grad), wanted.backward(grad)
    for mine, its in [
        (ours.token_embedding, theirs.embeddings.word_embeddings),
        (ours.layers[0].feed_forward[0], theirs.encoder.layer[0].intermediate.dense),
    ]:
        known = slice(1, None)  # BERT's padding, token 0, learns nothing: ours does
        difference = (mine.weight.grad - its.weight.grad)[known].abs().max()
        assert difference < tolerance * its.weight.grad.abs().max()


def test_a_new_transformer_is_as_berts_begin():
    """All weights with deviation 0.02, biases 0, norms 1."""
    torch.manual_seed(0)
    for name, weight in TextTransformer(40, 32, 128, 3, 4).named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name
        else:
            assert 0.019 < weight.std() < 0.021 and weight.mean().abs() < 0.001, name


def test_a_tokenizer_that_does_not_pad_is_refused_and_ones_own_stays_as_it_is():
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "star": 1, "[UNK]": 2}, unk_token="[UNK]"))
    encoder = TextTransformer(3, length=4, channels=8, layers=1, heads=1)
    with pytest.raises(UserError, match="enable_padding"):
        TextConditioner(tokenizer, encoder, 4)
    tokenizer.enable_padding(length=6)
    tokenizer.enable_truncation(2)
    conditioner = TextConditioner(tokenizer, encoder, 4)
    assert conditioner.tokenize("star").tolist() == [[1, 0, 0, 0]]
    with pytest.raises(UserError, match="captions of 4 tokens, not 6"):
        TextConditioner(tokenizer, encoder, 6)(torch.ones(2, 6, dtype=torch.long))
    assert tokenizer.padding["length"] == 6 and tokenizer.truncation["max_length"] == 2


def test_the_unknown_of_a_vocabulary_of_scores_is_refused_too():
    """T5's kind of tokenizer: it names its unknown token by number."""
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("<unk>", 0.0), ("star", -1.0)], unk_id=1))
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    conditioner = TextConditioner(tokenizer, TextTransformer(3, 4, 8, 1, 1), 4)
    assert conditioner.tokenize("star").tolist() == [[2, 0, 0, 0]]
    with pytest.raises(UnknownWords, match="never saw 'moon' .*words: star[.]$"):
        conditioner.tokenize("moon")


def test_a_model_of_ones_own_words_loads_without_the_slow_imports():
    """They take several times as long as everything else that a first picture needs."""
    code = """
import sys
from ldm_edu.pipeline import LatentDiffusion
model = LatentDiffusion.load("shapes-text", device="cpu")
model.sample("a red star", num_steps=1)
print(*sorted({"transformers", "torchvision", "sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stdout) == (0, "\n"), told.stderr
