"""Section 3.3: τθ, which turns a condition into a sequence for cross-attention."""

from ldm_edu.conditioning.text import TextConditioner, UnknownWords
from ldm_edu.conditioning.transformer import TextTransformer

__all__ = ["TextConditioner", "TextTransformer", "UnknownWords"]
