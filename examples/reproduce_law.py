"""Measure the laws on your own data: make the runs of the three protocols on tiny models, and fit the laws to them.

    python examples/reproduce_law.py                             # the standard library's source, minutes on a CPU
    python examples/reproduce_law.py --dataset org/corpus --widths 64 128 256 512 --tokens_per_param 20 40

Every run is a real one: teachers and lone students are trained on text with `DistillationTrainer` (alpha=0), students
are distilled from those teachers, and each run leaves a line in its own `runs.jsonl`. A run whose folder is there is
not made again, so that a broken series goes on where it stopped. In the end all lines are read and the laws fitted;
what comes out is printed, also where the runs do not determine a law.

The default models have a few tens of thousands of parameters, where no published range reaches: what is fitted holds
for them and this text alone.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from pretrain_teacher import train_tokenizer  # beside this script
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from hf_capgap import (
    CapacityGapLaw,
    CapGapError,
    DistillationConfig,
    DistillationLaw,
    DistillationTrainer,
    RunRecord,
    SupervisedLaw,
    load_corpus,
    pack,
)
from hf_capgap.cli.arguments import parse_arguments
from hf_capgap.laws import format_size, measure, read_records
from hf_capgap.laws.fits import Fit
from hf_capgap.laws.protocols import (
    DistillationRun,
    ModelRun,
    fixed_m,
    fixed_m_teachers_fixed_m_students,
    fixed_m_teachers_iso_flop_students,
    iso_flop_teachers_fixed_m_students,
    teachers_of,
)
from hf_capgap.output import complete_folder

HEAD_DIM, BLOCK_SIZE, BATCH_SIZE = 8, 128, 16
TINY_WIDTH = 128


@dataclass
class Arguments:
    """The grid of sizes and tokens, the corpus, and how to train."""

    output_dir: str = field(default="outputs/law", metadata={"help": "Where runs, fits and figures go."})
    dataset: str | None = field(
        default=None, metadata={"help": "Corpus: file, glob or Hub id; the standard library's source if not given."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out corpus. If not given, the first num_eval_blocks blocks are held out."},
    )
    widths: list[int] = field(
        default_factory=lambda: [24, 32, 48], metadata={"help": "Hidden sizes of teachers and students."}
    )
    num_hidden_layers: int = field(default=2, metadata={"help": "Decoder layers of every model."})
    vocab_size: int = field(default=1024, metadata={"help": "Tokens of the tokenizer, trained on the corpus."})
    tokens_per_param: list[float] = field(
        default_factory=lambda: [3.0, 6.0, 12.0], metadata={"help": "M of the fixed-M runs; teachers get the largest."}
    )
    num_budgets: int = field(
        default=2, metadata={"help": "Budgets of the isoFLOP runs, from the fixed-M runs' range."}
    )
    learning_rate: float = field(
        default=8e-3, metadata={"help": "Peak learning rate of the narrowest model; it falls as one over the width."}
    )
    num_eval_blocks: int = field(default=128, metadata={"help": "Blocks to measure losses on."})
    seed: int = field(default=0, metadata={"help": "Seed of every run."})


def main() -> None:
    [args] = parse_arguments([Arguments], description=__doc__)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    if max(args.widths) <= TINY_WIDTH:
        torch.set_num_threads(1)  # a second thread would only wait for the first
    laboratory = Laboratory(args)
    alone, distilled = list_runs(args, laboratory.num_params)
    num_tokens = sum(run.num_tokens for run in (*alone, *distilled))
    print(f"{len(alone)} runs on text alone, {len(distilled)} distillations, {format_size(num_tokens)} tokens")
    for done, run in enumerate([*alone, *distilled], 1):
        folder = laboratory.execute(run)
        [record] = read_records(folder)
        print(f"{done:3}/{len(alone) + len(distilled)} {folder.name}: loss {record.loss:.4f}", flush=True)
    report(read_records(Path(args.output_dir) / "runs"), Path(args.output_dir))


def list_runs(args: Arguments, num_params: Callable[[int], int]) -> tuple[list[ModelRun], list[DistillationRun]]:
    """(runs on text alone, distillations) of the three protocols; every teacher is among the first."""
    sizes, ratios = [num_params(width) for width in args.widths], sorted(args.tokens_per_param)
    flops = [6 * size * size * ratio for size in (sizes[0], sizes[-1]) for ratio in (ratios[0], ratios[-1])]
    low, high = math.log(flops[1]), math.log(flops[2])  # budgets that no size sees far too few or many tokens from
    steps = max(1, args.num_budgets - 1)
    budgets = [math.exp(low + (high - low) * i / steps) for i in range(args.num_budgets)]
    distilled = {
        *fixed_m_teachers_iso_flop_students(sizes, sizes, budgets, teacher_tokens_per_param=ratios[-1]),
        *iso_flop_teachers_fixed_m_students(sizes, budgets, sizes, student_tokens_per_param=ratios[:1]),
        *fixed_m_teachers_fixed_m_students(
            sizes, sizes, teacher_tokens_per_param=ratios[-1], student_tokens_per_param=ratios
        ),
    }
    # A teacher smaller than its student is refused by the trainer; weak teachers are those of few tokens.
    distilled = {run for run in distilled if run.teacher.num_params >= run.num_params}
    alone = {*teachers_of(distilled), *fixed_m(sizes, ratios)}
    return sorted(alone), sorted(distilled)


class Laboratory:
    """Corpus, tokenizer and models of all runs; makes a run that has not been made."""

    def __init__(self, args: Arguments):
        self.args = args
        corpus = load_corpus(args.dataset)
        self.tokenizer = self._load_tokenizer(corpus)
        self.blocks = pack(corpus, self.tokenizer, BLOCK_SIZE).shuffle(seed=args.seed)
        if args.eval_dataset is not None or args.dataset is None:
            held_out = load_corpus(args.eval_dataset) if args.eval_dataset else load_corpus(split="held_out")
            self.held_out = pack(held_out, self.tokenizer, BLOCK_SIZE).shuffle(seed=0).take(args.num_eval_blocks)
        else:
            self.held_out = self.blocks.take(args.num_eval_blocks)
            self.blocks = self.blocks.skip(args.num_eval_blocks)
        self._widths = {self.num_params(width): width for width in args.widths}

    def num_params(self, width: int) -> int:
        """Parameters outside the embeddings of a model of this width."""
        return measure(self._config(width)).non_embedding

    def execute(self, run: ModelRun | DistillationRun) -> Path:
        """The folder of a run, made if it is not there."""
        folder = self._folder(run)
        if not folder.exists():
            teacher = self._folder(run.teacher) if isinstance(run, DistillationRun) else None
            with complete_folder(folder) as partial:
                self._train(run, partial, teacher)
        return folder

    def _train(self, run: ModelRun | DistillationRun, folder: Path, teacher: Path | None) -> None:
        transformers.set_seed(self.args.seed)
        width = self._widths[round(run.num_params)]
        trainer = DistillationTrainer(
            LlamaForCausalLM(self._config(width)),
            None if teacher is None else AutoModelForCausalLM.from_pretrained(teacher),
            DistillationConfig(
                output_dir=str(folder),
                alpha=0.0 if teacher is None else 1.0,
                max_steps=max(1, round(run.num_tokens / (BATCH_SIZE * (BLOCK_SIZE - 1)))),
                per_device_train_batch_size=BATCH_SIZE,
                per_device_eval_batch_size=BATCH_SIZE,
                learning_rate=self.args.learning_rate * min(self.args.widths) / width,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                dataset_name=self.args.dataset or "python-stdlib",
                seed=self.args.seed,
            ),
            train_dataset=self.blocks,
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            teacher_processing_class=self.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if teacher is None:  # it will teach
            trainer.save_model()

    def _folder(self, run: ModelRun | DistillationRun) -> Path:
        name = f"n{run.num_params:.0f}-d{run.num_tokens:.0f}"
        if isinstance(run, DistillationRun):
            name = f"{name}-from-{self._folder(run.teacher).name}"
        return Path(self.args.output_dir) / "runs" / name

    def _config(self, width: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=width,
            num_hidden_layers=self.args.num_hidden_layers,
            num_attention_heads=max(1, width // HEAD_DIM),
            num_key_value_heads=max(1, width // HEAD_DIM),
            intermediate_size=3 * width,
            max_position_embeddings=BLOCK_SIZE,
            tie_word_embeddings=True,
            bos_token_id=self.tokenizer.eos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _load_tokenizer(self, corpus: Dataset) -> PreTrainedTokenizerFast:
        folder = Path(self.args.output_dir) / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer = train_tokenizer(corpus, self.args.vocab_size)
        tokenizer.save_pretrained(folder)
        return tokenizer


def report(records: list[RunRecord], output_dir: Path) -> None:
    """Fit each law and say what came out."""
    print(f"\n{len(records)} runs on {records[0].dataset}\n")
    print(f"{attempt(lambda: CapacityGapLaw.fit(records).report())}\n")
    fits = {"supervised": SupervisedLaw.fit, "distillation": DistillationLaw.fit}
    for name, fit in fits.items():
        print(f"{attempt(lambda: describe(fit(records), output_dir / f'{name}.png'))}\n")  # noqa: B023


def describe(fit: Fit, picture: Path) -> str:
    """A fit's report, its worth as a predictor, and where its residuals are drawn."""
    spread = statistics.pstdev(math.log(record.loss) for record in fit.records)
    worth = f"  held-out errors are {fit.held_out_error / spread:.0%} of the losses' own spread ({spread:.3%}): " + (
        "the law predicts" if fit.held_out_error < spread / 3 else "the law says little beyond their mean"
    )
    return "\n".join([fit.report(), worth, f"  residuals: {attempt(lambda: str(fit.plot(picture)))}"])


def attempt(action: Callable[[], str]) -> str:
    """What an action gives, or why it could not."""
    try:
        return action()
    except CapGapError as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    try:
        main()
    except (CapGapError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
