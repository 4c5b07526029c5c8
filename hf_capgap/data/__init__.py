"""Corpora, packing and collating: from text to the fixed blocks that a `Trainer` eats."""

from .collator import BlockCollator
from .corpus import load_corpus
from .packing import pack

__all__ = ["BlockCollator", "load_corpus", "pack"]
