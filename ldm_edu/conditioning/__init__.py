"""Section 3.3: τθ, which turns a condition into a sequence for cross-attention."""

from ldm_edu.conditioning.text import TextConditioner, UnknownWords

__all__ = ["TextConditioner", "UnknownWords"]
