"""Blocks for a purpose: to train on, to hold out, to calibrate scores on."""

from __future__ import annotations

from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .collator import BlockCollator
from .corpus import BUILTIN, TEXT_COLUMN, load_corpus
from .packing import pack


def load_train_and_held_out(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    num_held_out: int,
    split: str = "train",
    held_out_source: str | None = None,
    held_out_split: str = "train",
    text_column: str = TEXT_COLUMN,
    document: str = "file",
    streaming: bool = False,
) -> tuple[Dataset | IterableDataset, Dataset]:
    """Load a corpus, pack it, and hold blocks out of it; the two never share a block.

    Args:
        source, split, text_column, document, streaming: See `load_corpus`.
        tokenizer, block_size: See `pack`.
        num_held_out: Blocks to hold out, at most.
        held_out_source: Another corpus to take them from. If None they come from the built-in corpus's own held-out
            files, or are the first blocks of any other corpus.
        held_out_split: Split of that other corpus.

    Returns:
        The blocks to train on, and the held-out ones.

    Raises:
        DataError: See `load_corpus` and `pack`; or nothing would be left to train on.
    """
    options = {"text_column": text_column, "document": document, "streaming": streaming}
    blocks = pack(load_corpus(source, split=split, **options), tokenizer, block_size)
    if held_out_source is not None:
        held_out = pack(load_corpus(held_out_source, split=held_out_split, **options), tokenizer, block_size)
    elif source in (None, BUILTIN):
        # Blocks from every held-out file, not from the first few.
        held_out = pack(load_corpus(split="held_out"), tokenizer, block_size).shuffle(seed=0)
    else:
        if not streaming and len(blocks) <= num_held_out:
            raise DataError(
                "Holding out blocks would leave nothing to train on",
                found=f"{num_held_out} of {len(blocks)} blocks",
                fix="Hold out fewer, use smaller blocks, or name another corpus for held-out text.",
            )
        held_out, blocks = blocks.take(num_held_out), blocks.skip(num_held_out)
    rows = list(islice(held_out, num_held_out))
    return blocks, Dataset.from_list(rows) if rows else Dataset.from_dict({"input_ids": []})


def calibration_batches(
    blocks: Dataset | IterableDataset,
    *,
    num_batches: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """Batches of blocks in random order, shared out over the ranks.

    Args:
        blocks: What `pack` returns.
        num_batches: Batches of all ranks together; fewer if there are not enough blocks.
        batch_size: Blocks per batch.
        seed: Of the order. A stream is shuffled within a buffer only.
        rank: Which share to return: every `num_ranks`-th batch from this one on.
        num_ranks: Number of shares.

    Returns:
        Dicts as `BlockCollator` gives them; the last of all may be smaller.

    Raises:
        DataError: Not a positive number of batches, or of blocks in each.
    """
    if num_batches < 1 or batch_size < 1:
        raise DataError("Calibration needs at least one batch of one block", found=(num_batches, batch_size))
    rows = list(islice(blocks.shuffle(seed=seed), num_batches * batch_size))
    batches = batched(rows, batch_size)
    return batches[rank::num_ranks]


def batched(rows: list[dict], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """`rows` in batches of `batch_size`, in their order; the last may be smaller."""
    collate = BlockCollator()
    return [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
