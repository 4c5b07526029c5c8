"""Packing documents into fixed blocks: `doc EOS doc EOS …`, cut every `block_size` tokens, nothing lost in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .corpus import TEXT_COLUMN

_DOCUMENTS_PER_CALL = 64


def pack(
    corpus: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    text_column: str = TEXT_COLUMN,
) -> Dataset | IterableDataset:
    """Tokenise `corpus` and pack it into blocks of exactly `block_size` tokens, with EOS after each document.

    A document that does not fit goes on in the next block; only the last, incomplete block of the whole corpus is left
    out. No other special token is added.

    Args:
        corpus: Documents, as `load_corpus` returns them.
        tokenizer: Any tokenizer with an EOS token.
        block_size: Tokens per block.
        text_column: Column of `corpus` that holds the text.

    Returns:
        A dataset with the column `input_ids` ([block_size] int32 per row): memory-mapped on disk for a `Dataset`,
        lazy for an `IterableDataset`.

    Raises:
        DataError: A tokenizer without EOS, a block size below 2, or, once the corpus has been read (which is now for
            a `Dataset`), a document that is not text, or a corpus too small for one block.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("Packing puts EOS between documents, but the tokenizer has no EOS token", fix="Set eos_token.")
    if block_size < 2:
        raise DataError("A block needs at least 2 tokens: one to read and one to predict", found=block_size)
    features = Features({"input_ids": List(Value("int32"), length=block_size)})
    arguments = {"corpus": corpus, "tokenizer": tokenizer, "block_size": block_size, "text_column": text_column}
    if isinstance(corpus, IterableDataset):
        return IterableDataset.from_generator(_generate_blocks, features=features, gen_kwargs=arguments)
    try:
        return Dataset.from_generator(_generate_blocks, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _generate_blocks(
    corpus: Iterable[dict], tokenizer: PreTrainedTokenizerBase, block_size: int, text_column: str
) -> Iterator[dict]:
    documents = tokenize_documents(_read_texts(corpus, text_column), tokenizer)
    block = None
    for block in cut_blocks(documents, block_size, tokenizer.eos_token_id):
        yield {"input_ids": block}
    if block is None:
        raise DataError(
            f"The corpus does not fill one block of {block_size} tokens", fix="Use more text or smaller blocks."
        )


def _read_texts(corpus: Iterable[dict], text_column: str) -> Iterator[str]:
    for number, row in enumerate(corpus):
        text = row[text_column]
        if not isinstance(text, str):
            raise DataError(
                f"Document {number} of the corpus is not text", found=type(text).__name__, fix="Filter such rows out."
            )
        yield text


def tokenize_documents(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of each text, without special tokens; texts are handed to the tokenizer in batches."""
    texts = iter(texts)
    while batch := list(islice(texts, _DOCUMENTS_PER_CALL)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from encoded["input_ids"]


def cut_blocks(documents: Iterable[list[int]], block_size: int, eos_token_id: int) -> Iterator[np.ndarray]:
    """Concatenate `documents` with EOS after each and cut the stream into arrays of [block_size] int32."""
    buffer = np.empty(0, dtype=np.int32)
    for document in documents:
        buffer = np.concatenate([buffer, np.asarray([*document, eos_token_id], dtype=np.int32)])
        num_full = len(buffer) // block_size
        yield from buffer[: num_full * block_size].reshape(num_full, block_size)
        buffer = buffer[num_full * block_size :]
