"""One `RunRecord` per run, in `runs.jsonl`: what the laws are fitted to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import lineage
from ..errors import DataError
from ..labels import IGNORE_INDEX
from ..laws.records import FILE_NAME, RunRecord, append_record
from ..laws.sizes import LARGEST_LOSS
from .fused import fused_token_losses
from .objective import STATISTICS, token_losses
from .teachers import LogitsSignal, model_inputs

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

_CROSS_ENTROPY_ALONE = {"alpha": 0.0, "temperature": 1.0, "divergence": "forward_kl"}
_NUM_HASHED_ROWS = 64


class RunLogCallback(TrainerCallback):
    """When training ends, adds a line about the run to `runs.jsonl` in the output folder (on the main process).

    The losses are cross-entropies over the evaluation set: the student's from the evaluation at the last step, or from
    one pass more; the teacher's from one pass. A run with `alpha=0` learned from no teacher, and records none. Without
    an evaluation set, or with several, the losses are left open. A loss that is not finite, or larger than any
    cross-entropy can be, is written as that of a run that diverged. What goes wrong here is a warning: the run itself
    has succeeded.

    Args:
        trainer: The trainer that it belongs to.
        teacher: The teacher, None without one.
        vocab_size: Real rows of the vocabulary.
    """

    def __init__(self, trainer: DistillationTrainer, teacher: PreTrainedModel | None, vocab_size: int):
        self._trainer, self._vocab_size = trainer, vocab_size
        self._teacher = teacher if trainer.args.alpha > 0 else None
        # Now, while no wrapper has split the weights.
        self._num_params = num_non_embedding(trainer.student)
        self._num_teacher_params = num_non_embedding(teacher) if self._teacher is not None else None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        num_tokens = self._trainer.count_tokens()
        if num_tokens == 0:
            return
        try:  # on every rank: what it does together with the others comes before any of them returns
            losses = self._measure(state)
        except Exception as error:  # the weights are trained, and not yet saved: nothing here is worth losing them
            warnings.warn(f"The losses for {FILE_NAME} could not be measured: {error}", stacklevel=2)
            losses = {"loss": None}
        if not state.is_world_process_zero:
            return
        try:
            self._write(args, num_tokens, losses)
        except Exception as error:
            warnings.warn(f"The run was not added to {FILE_NAME}: {error}", stacklevel=2)

    def _write(self, args: TrainingArguments, num_tokens: int, losses: dict[str, float | None]) -> None:
        record = RunRecord(
            num_params=self._num_params,
            num_tokens=num_tokens,
            dataset=args.dataset_name or _describe_data(self._trainer),
            teacher=None if self._teacher is None else _name_of(self._teacher),
            num_teacher_params=self._num_teacher_params,
            seed=args.seed,
            **{name: _or_diverged(loss) for name, loss in losses.items()},
        )
        os.makedirs(args.output_dir, exist_ok=True)
        append_record(os.path.join(args.output_dir, FILE_NAME), record)

    def _measure(self, state: TrainerState) -> dict[str, float | None]:
        """Losses of student and teacher. Every rank must call it."""
        if self._trainer.eval_dataset is None or isinstance(self._trainer.eval_dataset, dict):
            return {"loss": None}
        measured = [
            entry["eval_ce"]
            for entry in state.log_history
            if "eval_ce" in entry and entry["step"] == state.global_step
        ]
        # After the best checkpoint has been loaded, the last evaluation is of other weights.
        is_current = measured and not self._trainer.args.load_best_model_at_end
        losses = {"loss": measured[-1] if is_current else self._mean_cross_entropy(self._student_statistics)}
        if self._teacher is not None:
            losses["teacher_loss"] = self._mean_cross_entropy(self._teacher_statistics)
        return losses

    @torch.no_grad()
    def _mean_cross_entropy(
        self, statistics_of: Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]
    ) -> float:
        """Mean over the evaluation set, on all ranks."""
        trainer = self._trainer
        total, num_targets = 0.0, 0
        for batch in trainer.get_eval_dataloader():
            statistics, labels = statistics_of(trainer._prepare_inputs(batch))
            cross_entropy = statistics[STATISTICS.index("ce")]  # [batch, length]
            rows = torch.stack([cross_entropy.sum(-1), (labels != IGNORE_INDEX).sum(-1).to(cross_entropy)], dim=-1)
            rows = trainer.accelerator.gather_for_metrics(rows.contiguous())
            total, num_targets = total + rows[:, 0].sum().item(), num_targets + int(rows[:, 1].sum())
        if num_targets == 0:
            raise DataError("The evaluation set has no target")
        return total / num_targets

    def _student_statistics(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """([len(STATISTICS), batch, length], shifted labels [batch, length]) of the student, without its teacher."""
        model = self._trainer.model_wrapped
        was_training = model.training
        model.eval()
        try:
            return self._trainer._token_losses(model, batch, None, with_teacher=False)[1:]
        finally:
            model.train(was_training)

    def _teacher_statistics(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the teacher, taken as a student without a teacher."""
        labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
        options = {**_CROSS_ENTROPY_ALONE, "vocab_size": self._vocab_size}
        with self._trainer.accelerator.autocast():
            signal = self._trainer.teacher.signal(model_inputs(batch))
            if isinstance(signal, LogitsSignal):
                statistics = token_losses(signal.logits.flatten(0, 1), None, labels.flatten(), **options)[1]
            else:
                hidden = signal.hidden.flatten(0, 1)
                statistics = signal.with_head(
                    lambda head: fused_token_losses(hidden, head, None, None, labels.flatten(), **options)[1]
                )
        return statistics.unflatten(-1, labels.shape), labels


def num_non_embedding(model: torch.nn.Module) -> int:
    """Parameters outside token and position embeddings and the output head: the N of the scaling laws."""
    vocabulary = {
        id(module.weight): module.weight.numel()
        for module in (*_embeddings(model), model.get_output_embeddings())
        if module is not None
    }
    return sum(parameter.numel() for parameter in model.parameters()) - sum(vocabulary.values())


def _embeddings(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (module for module in model.modules() if isinstance(module, torch.nn.Embedding))


def _or_diverged(loss: float | None) -> float | None:
    """NaN for a loss that no model which learned anything has."""
    return loss if loss is None or loss <= LARGEST_LOSS else math.nan


def _name_of(model: PreTrainedModel) -> str:
    return lineage.public_name(model.name_or_path) or f"a {model.config.model_type} without a name"


def _describe_data(trainer: DistillationTrainer) -> str:
    """A name that is the same for the same held-out text: losses on it are what records compare."""
    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    rows = [] if dataset is None or isinstance(dataset, dict) else islice(iter(dataset), _NUM_HASHED_ROWS)
    digest = hashlib.blake2b(digest_size=6)
    for row in rows:
        digest.update(json.dumps([int(token) for token in row["input_ids"]]).encode())
    return f"data-{digest.hexdigest()}"
