"""The transformer that reads a caption: τθ of equation 3 for text (section 4.3.1 and table 17)."""

from __future__ import annotations

from torch import Tensor, nn

from ldm_edu.layers import Attention
from ldm_edu.runtime import UserError


class TransformerLayer(nn.Module):
    """Self-attention, then two linear layers around GELU; each added to its input, and the sum normalised."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(channels, heads, bias=True)
        self.norm1 = nn.LayerNorm(channels, eps=1e-12)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.norm2 = nn.LayerNorm(channels, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, channels)` to the same shape."""
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.feed_forward(x))


class TextTransformer(nn.Module):
    """Token numbers `(B, length)` to a sequence of vectors `(B, length, channels)`, every token seeing all others.

    The layers are BERT's (Devlin et al. 2019): the sum is normalised, where the paper's transformer normalises what
    goes into attention and MLP. As in the paper, padding is read like any word, so nothing is masked.

    Args:
        vocab_size: number of different tokens.
        length: of a caption, in tokens.
        channels, layers, heads: width of the sequence, number of layers, attention heads of each.

    Raises:
        UserError: captions of another length.
    """

    def __init__(self, vocab_size: int, length: int, channels: int, layers: int, heads: int) -> None:
        super().__init__()
        self.settings = dict(vocab_size=vocab_size, length=length, channels=channels, layers=layers, heads=heads)
        self.token_embedding = nn.Embedding(vocab_size, channels)
        self.position_embedding = nn.Embedding(length, channels)
        self.norm = nn.LayerNorm(channels, eps=1e-12)
        self.layers = nn.ModuleList(TransformerLayer(channels, heads) for _ in range(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, length)` to `(B, length, channels)`."""
        if tokens.shape[-1] != (length := self.position_embedding.num_embeddings):
            raise UserError(f"This transformer reads captions of {length} tokens, not {tokens.shape[-1]}.")
        x = self.norm(self.token_embedding(tokens) + self.position_embedding.weight)
        for layer in self.layers:
            x = layer(x)
        return x
