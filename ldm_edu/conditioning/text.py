"""τθ for text: a tokenizer and a transformer, trained together with the UNet (equation 3) or frozen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from ldm_edu.conditioning.transformer import TextTransformer
from ldm_edu.runtime import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRETRAINED = ("BertModel", "CLIPTextModel", "T5EncoderModel")


class UnknownWords(UserError):
    """A prompt with words that the model never saw."""


class TextConditioner(nn.Module):
    """Captions to a sequence of vectors `(B, length, channels)` for cross-attention.

    As in the paper, the transformer reads the padding too: no mask. (Table 17: 77 tokens of a BERT tokenizer, a
    32-layer transformer. Ours are shorter.)

    Args:
        tokenizer: with padding enabled; it is copied.
        encoder: a `TextTransformer`, or one of `transformers` whose output has `last_hidden_state`; only those named
            in `PRETRAINED` can be saved. BERT loses its pooling layer, weights that nothing would use.
        length: every caption is padded to this many tokens.
        frozen: keep the encoder as it is (CLIP or BERT with their own weights) instead of training it, and without
            dropout.

    Raises:
        UserError: the tokenizer does not pad, a length below 1, or the encoder reads fewer tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, encoder: TextTransformer | PreTrainedModel, length: int, frozen: bool = False
    ) -> None:
        super().__init__()
        if tokenizer.padding is None:
            raise UserError("Captions are padded to one length: call the tokenizer's enable_padding(...) first.")
        if length < 1:
            raise UserError(f"Captions are padded to a length of at least 1, not {length}.")
        if not isinstance(encoder, TextTransformer):
            if 0 < (most := getattr(encoder.config, "max_position_embeddings", None) or 0) < length:
                raise UserError(f"This {type(encoder).__name__} reads {most} tokens at most, not {length}.")
            if getattr(encoder, "pooler", None) is not None:
                encoder.pooler = None
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.enable_padding(**tokenizer.padding | {"length": length})
        self.tokenizer.no_truncation()  # a caption that is too long is an error
        self._unknown_token = _unknown_token(self.tokenizer)
        self.encoder, self.length, self.frozen = encoder, length, frozen
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
        """A small transformer over a vocabulary of whole words in lower case, untrained.

        Raises:
            UserError: a text in place of words, or a word that is none, because it is empty, or reading a caption
                would divide it.
        """
        if isinstance(words, str):
            raise UserError(f"The vocabulary is a list of words, such as {words.split()}, not a text.")
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
        tokenizer.enable_padding(pad_id=vocabulary["[PAD]"], pad_token="[PAD]")
        return cls(tokenizer, TextTransformer(len(vocabulary), length, channels, layers, heads), length)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, encoder: str = "CLIPTextModel", length: int = 77
    ) -> TextConditioner:
        """A frozen encoder with its own weights, from a folder or, where there is a network, the Hugging Face hub.

        Raises:
            UserError: the weights cannot be had, or are another encoder's.
        """
        from transformers import AutoTokenizer

        kind = _pretrained_class(encoder)
        try:
            theirs = AutoTokenizer.from_pretrained(name)
            model, report = kind.from_pretrained(name, **_without_pooling(encoder), output_loading_info=True)
        except Exception as error:  # none there, no network, no name for a hub, another encoder's settings, ...
            words = " ".join(str(error).split()) or repr(error)
            raise UserError(f"Cannot load {encoder} from {str(name)!r}: {words[:300]}") from error
        if absent := sorted(report["missing_keys"]):
            raise UserError(
                f"{str(name)!r} is no {encoder}: it lacks {len(absent)} of its weights, the first is {absent[0]}. "
                f"The encoders are {', '.join(PRETRAINED)}."
            )
        tokenizer = theirs.backend_tokenizer
        tokenizer.enable_padding(pad_id=theirs.pad_token_id, pad_token=theirs.pad_token)
        return cls(tokenizer, model.float(), length, frozen=True)

    @property
    def channels(self) -> int:
        """The width of the sequence."""
        own = isinstance(self.encoder, TextTransformer)
        return self.encoder.settings["channels"] if own else self.encoder.config.hidden_size

    def tokenize(self, captions: str | Sequence[str]) -> Tensor:
        """Token numbers `(B, length)`, of captions or a single one.

        Raises:
            UnknownWords: words outside the vocabulary, named, with the words in it.
            UserError: a caption longer than the model reads, no caption, or one that is no text.
        """
        several = isinstance(captions, Iterable) and not isinstance(captions, str)
        captions = list(captions) if several else [captions]
        if not captions:
            raise UserError("There is no caption: give at least one. The empty one is ''.")
        for caption in captions:
            if not isinstance(caption, str):
                raise UserError(f"A caption is a text, not {caption!r}.")
        encodings = self.tokenizer.encode_batch(captions)
        for caption, encoding in zip(captions, encodings, strict=True):
            if (count := len(encoding.ids)) > self.length:
                raise UserError(
                    f"The prompt is too long: {count} tokens, and this model reads {self.length}: {caption!r}."
                )
            if self._unknown_token in encoding.ids:
                raise UnknownWords(self._unknown(caption, encoding))
        return torch.tensor([encoding.ids for encoding in encodings])

    def _unknown(self, caption: str, encoding: Encoding) -> str:
        spans = [span for token, span in zip(encoding.ids, encoding.offsets) if token == self._unknown_token]
        strange = dict.fromkeys(caption[start:stop] for start, stop in spans)
        named = f"This model never saw {', '.join(map(repr, strange))} (in {caption!r})."
        if not all(any(map(str.isalnum, word)) for word in strange):
            named += " Leave out the punctuation that it does not know."
        known = ", ".join(sorted(w for w in self.tokenizer.get_vocab() if w[0].isalnum())[:200])  # no [PAD], no comma
        return f"{named} It knows these words: {known}."

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers `(B, length)` to the context `(B, length, channels)`."""
        if isinstance(self.encoder, TextTransformer):
            return self.encoder(tokens)
        seen = torch.ones_like(tokens)  # all of them, paddings too
        return self.encoder(input_ids=tokens, attention_mask=seen).last_hidden_state

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as JSON: the tokenizer with its vocabulary, and the transformer's shape."""
        own = isinstance(self.encoder, TextTransformer)
        return {
            "length": self.length,
            "frozen": self.frozen,
            "encoder": type(self.encoder).__name__,
            "encoder_config": self.encoder.settings if own else self.encoder.config.to_diff_dict(),
            "tokenizer": self.tokenizer.to_str(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TextConditioner:
        """What `config` describes, with untrained weights."""
        name, settings = config["encoder"], config["encoder_config"]
        if name == "TextTransformer":
            encoder = TextTransformer(**settings)
        else:
            kind = _pretrained_class(name)
            encoder = kind(kind.config_class(**settings), **_without_pooling(name))
        return cls(Tokenizer.from_str(config["tokenizer"]), encoder, config["length"], config["frozen"])


def _unknown_token(tokenizer: Tokenizer) -> int | None:
    """The number that words outside the vocabulary get, if there is one for them alone."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))
    # CLIP's is the end of every caption, too; it reads any bytes, so no word is unknown to it.
    return None if unknown in tokenizer.encode("").ids else unknown


def _pretrained_class(name: str) -> type[PreTrainedModel]:
    if name not in PRETRAINED:
        raise UserError(f"The text encoder is one of {', '.join(PRETRAINED)}, not {name!r}.")
    import transformers  # takes longer to import than all the rest together

    return getattr(transformers, name)


def _without_pooling(name: str) -> dict[str, bool]:
    """BERT's pooling layer would be weights that nothing uses."""
    return {"add_pooling_layer": False} if name == "BertModel" else {}
