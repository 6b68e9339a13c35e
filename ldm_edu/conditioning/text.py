"""τθ for text: a tokenizer and a transformer, trained together with the UNet (equation 3) or frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from ldm_edu.runtime import UserError

ENCODERS = ("BertModel", "CLIPTextModel", "T5EncoderModel")


class UnknownWords(UserError):
    """A prompt with words that the model never saw."""


class TextConditioner(nn.Module):
    """Captions to a sequence of vectors `(B, length, channels)` for cross-attention.

    As in the paper, the transformer reads the padding too: no mask. (Table 17: 77 tokens of a BERT tokenizer, a
    32-layer transformer. Ours are shorter, and BERT's own post-norm layers.)

    Args:
        tokenizer: a fast tokenizer with a padding token.
        encoder: any transformer of `transformers` whose output has `last_hidden_state`.
        length: every caption is padded to this many tokens.
        frozen: keep the encoder as it is (CLIP or BERT with their own weights) instead of training it, and without
            dropout.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, encoder: PreTrainedModel, length: int, frozen: bool = False
    ) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.length, self.frozen = tokenizer, encoder, length, frozen
        encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> TextConditioner:
        """As for any module, but a frozen encoder stays in evaluation."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    @classmethod
    def from_words(
        cls, words: Sequence[str], length: int = 32, channels: int = 128, layers: int = 3, heads: int = 4
    ) -> TextConditioner:
        """A small BERT over a vocabulary of whole words in lower case, untrained.

        Raises:
            UserError: a word that is none, because it is empty, or reading a caption would divide it.
        """
        split = pre_tokenizers.Whitespace()
        words = dict.fromkeys(word.lower() for word in words)
        for word in words:
            pieces = [piece for piece, _ in split.pre_tokenize_str(word)]
            if pieces != [word]:
                raise UserError(f"The vocabulary is of whole words; {word!r} would be read as {pieces}. Give those.")
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = split
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=channels,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=2 * channels,
            max_position_embeddings=length,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",  # on a CPU the fused kernel's backward pass is the slower one
        )
        return cls(_wrap(tokenizer), BertModel(config, add_pooling_layer=False), length)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, encoder: str = "CLIPTextModel", length: int = 77
    ) -> TextConditioner:
        """A frozen encoder with its own weights, from a folder or, where there is a network, the Hugging Face hub.

        Raises:
            UserError: the weights cannot be had.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            kind = _encoder_class(encoder)
            model = kind.from_pretrained(name, **_without_pooling(kind)).float()
        except (OSError, HFValidationError) as error:  # the second where a missing folder is taken for a hub's name
            raise UserError(
                f"Cannot load {encoder} from {str(name)!r}: {str(error).splitlines()[0]}"
            ) from error
        return cls(tokenizer, model, length, frozen=True)

    @property
    def channels(self) -> int:
        """The width of the sequence."""
        return self.encoder.config.hidden_size

    def tokenize(self, captions: str | Sequence[str]) -> Tensor:
        """Token numbers `(B, length)`, of captions or a single one.

        Raises:
            UnknownWords: words outside the vocabulary, named, with the words in it.
            UserError: a caption longer than the model reads.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        encoded = self.tokenizer(captions, padding="max_length", max_length=self.length)["input_ids"]
        unknown_token = self.tokenizer.unk_token_id
        if unknown_token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            unknown_token = None  # CLIP's one token for all of these; it reads any bytes, so no word is unknown to it
        for caption, tokens in zip(captions, encoded, strict=True):
            if len(tokens) > self.length:
                raise UserError(
                    f"The prompt is too long: {len(tokens)} tokens, and this model reads {self.length}: {caption!r}."
                )
            if unknown_token is not None and unknown_token in tokens:
                raise UnknownWords(self._unknown(caption))
        return torch.tensor(encoded)

    def _unknown(self, caption: str) -> str:
        words = [
            w for w, _ in self.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(caption.lower())
        ]
        vocabulary = self.tokenizer.get_vocab()
        strange = ", ".join(repr(w) for w in dict.fromkeys(words) if w not in vocabulary)
        known = ", ".join(sorted(w for w in vocabulary if w[0].isalnum())[:200])  # no [PAD], and no comma
        return f"This model never saw {strange} (in {caption!r}). It knows these words: {known}."

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers `(B, length)` to the context `(B, length, channels)`."""
        seen = torch.ones_like(tokens)  # all of them, paddings too
        return self.encoder(input_ids=tokens, attention_mask=seen).last_hidden_state

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as JSON: the tokenizer with its vocabulary, and the transformer's shape."""
        return {
            "length": self.length,
            "frozen": self.frozen,
            "encoder": type(self.encoder).__name__,
            "encoder_config": self.encoder.config.to_diff_dict(),
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "special_tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TextConditioner:
        """What `config` describes, with untrained weights."""
        kind = _encoder_class(config["encoder"])
        encoder = kind(kind.config_class(**config["encoder_config"]), **_without_pooling(kind))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(config["tokenizer"]), **config["special_tokens"]
        )
        return cls(tokenizer, encoder, config["length"], config["frozen"])


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def _encoder_class(name: str) -> type[PreTrainedModel]:
    if name not in ENCODERS:
        raise UserError(f"The text encoder is one of {', '.join(ENCODERS)}, not {name!r}.")
    return getattr(transformers, name)


def _without_pooling(kind: type[PreTrainedModel]) -> dict[str, bool]:
    """BERT's pooling layer would be weights that nothing uses."""
    return {"add_pooling_layer": False} if kind is BertModel else {}
