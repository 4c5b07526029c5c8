"""`hf-capgap score`: from a model and some text to a file of scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel

from ..data import calibration_batches
from ..errors import ConfigError, OutputFolderError
from ..pruning import METRICS, ExpressiveScores, score
from ..pruning.metrics import Source
from ..pruning.scores import UNITS
from .arguments import parse_arguments
from .corpus_options import CorpusOptions
from .main import COMMANDS, OK, PROG
from .models import QUANTIZATIONS, load_model, load_tokenizer, quantization
from .printing import print_next, print_scores
from .ranks import this_rank

SUMMARY = COMMANDS["score"]
_DESCRIPTION = f"""{SUMMARY}.

MODEL is a folder or a Hub id. Its weights are frozen; text runs through it, and each unit is scored by how much the
loss would feel its loss. The scores go into a file that `hf-capgap cut` reads and `hf-capgap scores show` draws.

examples:
  hf-capgap score examples/demo_teacher --output scores.safetensors
  hf-capgap score org/model --dataset org/corpus --streaming true --dtype bfloat16 --device_map auto \\
      --output scores.safetensors
  hf-capgap score org/model --load_in 4bit --metric activation --output activation.safetensors
  accelerate launch -m hf_capgap.cli.main score org/model --output scores.safetensors    # each GPU takes its share
"""
_LONGEST_BLOCK = 1024


@dataclass
class ScoreOptions:
    """What to score, how, and where to write it."""

    model: str = field(default=None, metadata={"help": "Folder or Hub id. The option's name may be left out."})
    output: str = field(default="scores.safetensors", metadata={"help": "File to write the scores to."})
    overwrite: bool = field(default=False, metadata={"help": "Write over a file that is there already."})
    metric: str = field(
        default="expressive",
        metadata={
            "help": "What to score by: "
            + "; ".join(f"{name}, {metric.text}" for name, metric in METRICS.items()).replace("%", "%%")
            + ".",
            "choices": list(METRICS),
        },
    )
    unit: str = field(
        default="batch",
        metadata={
            "help": "What one measurement is taken over: each batch, or each example, which does not depend on the "
            "batch size.",
            "choices": list(UNITS),
        },
    )
    num_batches: int = field(default=32, metadata={"help": "Calibration batches, of all devices together."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per batch."})
    block_size: int | None = field(
        default=None,
        metadata={"help": f"Tokens per sequence; the model's positions, at most {_LONGEST_BLOCK}, if not given."},
    )
    seed: int = field(default=0, metadata={"help": "Of the order of the text, and of the metric random."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype to load the model in; auto is the one it was saved in.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={"help": "Where the model goes: auto spreads it over all devices. One device if not given."},
    )
    load_in: str | None = field(
        default=None,
        metadata={
            "help": "Load the model with weights packed by bitsandbytes: 8bit or 4bit. Not for metrics of weights.",
            "choices": list(QUANTIZATIONS),
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the tokenizer; the model's if not given."}
    )


def main(argv: Sequence[str]) -> int:
    """Parse, score, save, print."""
    options, corpus = parse_arguments(
        [ScoreOptions, CorpusOptions],
        argv,
        description=_DESCRIPTION,
        prog=f"{PROG} score",
        usage=f"{PROG} score MODEL [--output FILE] [options]",
        positionals=["model"],
    )
    _check_free(options.output, options.overwrite)
    state = this_rank()
    model = _load(options, state)
    scores = _score(model, options, corpus, state)
    if state.is_main_process:
        scores.save(options.output)
        print_scores(scores)
        print(f"\nscores: {options.output}")
        print_next(
            "next, cut a student",
            [PROG, "cut", options.model, "--scores", options.output, "--target", "40%", "--output_dir", "student"],
        )
    state.destroy_process_group()
    return OK


def _check_free(output: str, overwrite: bool) -> None:
    """Before the model is loaded: scoring can take hours."""
    path = Path(output)
    if path.is_dir():
        raise OutputFolderError("The output is a folder", found=output, fix="Name a file.")
    if path.exists() and not overwrite:
        raise OutputFolderError(
            "The output file exists already", found=output, fix="Name another --output, or pass --overwrite."
        )
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(nearest, os.W_OK):
        raise OutputFolderError("The output folder cannot be written to", found=nearest)


def _load(options: ScoreOptions, state: PartialState) -> PreTrainedModel:
    packed = quantization(options.load_in)
    device_map = options.device_map or (None if packed is None else {"": state.device})
    model = load_model(
        options.model,
        dtype=options.dtype,
        device_map=device_map,
        quantization_config=packed,
        revision=options.revision,
    )
    return model if device_map is not None else model.to(state.device)


def _score(
    model: PreTrainedModel, options: ScoreOptions, corpus: CorpusOptions, state: PartialState
) -> ExpressiveScores:
    source = METRICS[options.metric].source
    if not source.needs_data:
        seed = options.seed if source is Source.NOTHING else None
        return score(model, unit=options.unit, metric=options.metric, seed=seed)
    tokenizer = load_tokenizer(options.tokenizer or options.model, options.revision if not options.tokenizer else None)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"The tokenizer has more tokens than the model, {model.config.vocab_size:,}",
            found=f"{len(tokenizer):,}",
            fix="Name the model's own with --tokenizer.",
        )
    with state.main_process_first():
        blocks = corpus.load_blocks(tokenizer, _block_size(model, options.block_size))
    batches = calibration_batches(
        blocks,
        num_batches=options.num_batches,
        batch_size=options.batch_size,
        seed=options.seed,
        rank=state.process_index,
        num_ranks=state.num_processes,
    )
    return score(model, batches, options.unit, options.metric, progress=state.is_main_process)


def _block_size(model: PreTrainedModel, wanted: int | None) -> int:
    longest = getattr(model.config, "max_position_embeddings", None)
    if wanted is None:
        return min(longest or _LONGEST_BLOCK, _LONGEST_BLOCK)
    if longest is not None and wanted > longest:
        raise ConfigError(
            f"The model has {longest} positions", found=f"--block_size {wanted}", fix="Use shorter ones."
        )
    return wanted
