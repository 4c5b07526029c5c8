"""Options that name a text corpus, shared by commands and example scripts."""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..data import load_corpus, load_train_and_held_out, pack


@dataclass
class CorpusOptions:
    """Where text comes from."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Corpus: file, folder, glob or Hub id. The standard library's source if not given."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset to train on."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    document: str = field(
        default="file", metadata={"help": "What one document of a text file is: file, paragraph or line."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read and pack the corpus while it is used (training needs max_steps)."}
    )

    def load_blocks(self, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset | IterableDataset:
        """The corpus, packed into blocks of `block_size` tokens."""
        corpus = load_corpus(
            self.dataset,
            split=self.dataset_split,
            text_column=self.text_column,
            document=self.document,
            streaming=self.streaming,
        )
        return pack(corpus, tokenizer, block_size)


@dataclass
class HeldOutOptions(CorpusOptions):
    """Where text comes from, and which of it is held out."""

    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out corpus. If not given, the first num_eval_blocks blocks are held out."},
    )
    eval_split: str = field(default="train", metadata={"help": "Split of the held-out corpus."})
    block_size: int = field(default=256, metadata={"help": "Tokens per training sequence."})
    num_eval_blocks: int = field(default=128, metadata={"help": "Blocks to evaluate on, at most."})

    def load_train_and_held_out(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset | IterableDataset, Dataset]:
        """(training blocks, held-out blocks); the two never share a block."""
        return load_train_and_held_out(
            self.dataset,
            tokenizer,
            self.block_size,
            num_held_out=self.num_eval_blocks,
            split=self.dataset_split,
            held_out_source=self.eval_dataset,
            held_out_split=self.eval_split,
            text_column=self.text_column,
            document=self.document,
            streaming=self.streaming,
        )
