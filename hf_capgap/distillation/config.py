"""`DistillationConfig`: `TrainingArguments` plus the options of the objective, each documented once, in its `help`."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..errors import ConfigError
from .objective import DIVERGENCES, check_objective


@dataclass
class DistillationConfig(TrainingArguments):
    """Everything about a distillation run but its models and data."""

    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the divergence from the teacher; cross-entropy weighs 1 - alpha. 0 needs no teacher."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of both distributions in the divergence, whose weight is multiplied by its square."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence between teacher and student: forward_kl is KL(teacher ‖ student).",
            "choices": list(DIVERGENCES),
        },
    )
    fused: bool = field(
        default=True,
        metadata={"help": "Compute the objective from hidden states in token chunks, without holding all logits."},
    )
    chunk_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens per chunk of the fused objective; chosen from a memory budget if not given."},
    )
    teacher_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "JSON keyword arguments of from_pretrained for a teacher given by path or id: dtype, ..."},
    )
    write_run_record: bool = field(
        default=True,
        metadata={
            "help": "Add a line to runs.jsonl in output_dir when training ends: sizes, tokens and losses, for fitting "
            "scaling laws. Takes one pass of student and teacher over eval_dataset."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "What runs.jsonl calls the data; by default a hash of the evaluation set's first rows."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into an output folder that already holds something."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.teacher_init_kwargs, str):
            self.teacher_init_kwargs = _parse_json_object("teacher_init_kwargs", self.teacher_init_kwargs)
        check_objective(self.alpha, self.temperature, self.divergence)
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigError("chunk_tokens must be at least 1", found=self.chunk_tokens)
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor is not part of the objective",
                found=self.label_smoothing_factor,
                fix="Set it to 0.",
            )
        if not self.average_tokens_across_devices:
            raise ConfigError(
                "average_tokens_across_devices=False would weigh each rank's tokens differently",
                fix="Leave it True: the loss is the mean over the tokens of all ranks.",
            )
        for has_no_effect, message in (
            (self.alpha == 0 and self.temperature != 1, "temperature has no effect with alpha=0"),
            (
                not self.write_run_record and self.dataset_name is not None,
                "dataset_name has no effect with write_run_record=False",
            ),
            (not self.fused and self.chunk_tokens is not None, "chunk_tokens has no effect with fused=False"),
        ):
            if has_no_effect:
                warnings.warn(message, stacklevel=2)


def _parse_json_object(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}", found=text) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object", found=text)
    return value
