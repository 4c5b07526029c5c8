"""Pretrain the small teacher of the demo from nothing: a byte-level BPE tokenizer and a Llama of 3.4M parameters.

    python examples/pretrain_teacher.py --output_dir examples/demo_teacher

The corpus is the source of the Python standard library of the running interpreter (without tests, one file in 20 held
out), or whatever `--dataset` names. The folder gets the model in bfloat16, the tokenizer, and `training_log.jsonl`
with the command, the machine, and every logged loss. About an hour on 2 CPU cores.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_capgap.cli.arguments import parse_arguments
from hf_capgap.data import BlockCollator, load_corpus, pack

END_OF_TEXT = "<|endoftext|>"


@dataclass
class TeacherArguments:
    """The corpus and the size of the teacher."""

    dataset: str | None = field(
        default=None, metadata={"help": "Corpus: file, glob or Hub id; the standard library if not given."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the byte-level BPE tokenizer."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Decoder layers."})
    num_attention_heads: int = field(
        default=6, metadata={"help": "Query heads, of hidden_size / num_attention_heads each."}
    )
    num_key_value_heads: int = field(default=3, metadata={"help": "Key-value heads."})
    intermediate_size: int = field(default=576, metadata={"help": "Neurons of each MLP."})
    block_size: int = field(default=512, metadata={"help": "Tokens per training sequence, and the longest position."})


@dataclass
class PretrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults that the demo's teacher was trained with."""

    per_device_train_batch_size: int = 8
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.02
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    dataloader_pin_memory: bool = False
    num_train_epochs: float = 3
    logging_steps: float = 50
    eval_strategy: str = "steps"
    eval_steps: float = 500
    save_strategy: str = "no"
    report_to: str = "none"


def train_tokenizer(corpus: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the corpus; every byte string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus["text"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def build_teacher(args: TeacherArguments, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.num_attention_heads,
            num_key_value_heads=args.num_key_value_heads,
            intermediate_size=args.intermediate_size,
            max_position_embeddings=args.block_size,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def main() -> None:
    args, training_args = parse_arguments([TeacherArguments, PretrainingArguments], description=__doc__)
    transformers.set_seed(training_args.seed)
    train_corpus = load_corpus(args.dataset)
    tokenizer = train_tokenizer(train_corpus, args.vocab_size)
    train_blocks = pack(train_corpus, tokenizer, args.block_size)
    eval_blocks = pack(load_corpus(split="held_out"), tokenizer, args.block_size) if args.dataset is None else None
    model = build_teacher(args, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(train_blocks) * args.block_size:,} tokens an epoch")

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=BlockCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()

    output_dir = Path(training_args.output_dir)
    model.config.use_cache = True  # the Trainer turned it off
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {training_args.device}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "num_parameters": model.num_parameters(),
        "tokens_per_epoch": len(train_blocks) * args.block_size,
    }
    lines = [record, *trainer.state.log_history]
    (output_dir / "training_log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
