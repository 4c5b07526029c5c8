"""Corpora, packing and collating: from text to the fixed blocks that a `Trainer` eats."""

from .blocks import batched, calibration_batches, load_train_and_held_out
from .collator import BlockCollator
from .corpus import load_corpus
from .packing import pack

__all__ = ["BlockCollator", "batched", "calibration_batches", "load_corpus", "load_train_and_held_out", "pack"]
