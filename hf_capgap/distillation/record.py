"""What a distillation run adds to the lineage of its student."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, Trainer

from .. import lineage

_OBJECTIVE = ("alpha", "temperature", "divergence")
_OPTIMIZATION = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "seed",
)


def describe_run(trainer: Trainer, teacher: PreTrainedModel | None) -> dict[str, Any]:
    """The facts of a `DistillationTrainer`'s run so far, as a lineage stage.

    FLOPs are estimates in the `Trainer`'s way, 6 per parameter outside the embeddings and token for the student's
    training, and 2 for the teacher's forward.
    """
    args, state = trainer.args, trainer.state
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    last = [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]  # several datasets: several
    trained_with_teacher = teacher is not None and args.alpha > 0
    facts = {
        "teacher": lineage.describe_model(teacher) if teacher is not None else None,
        "objective": {name: getattr(args, name) for name in _OBJECTIVE},
        "optimization": {name: getattr(args, name) for name in _OPTIMIZATION},
        "num_steps": state.global_step,
        "num_tokens": trainer.num_tokens_seen,
        "student_training_flops": state.total_flos,
        "teacher_forward_flops": _teacher_flops(state.total_flos, trainer.student, teacher)
        if trained_with_teacher
        else 0,
        "evaluation": {name: value for entry in last for name, value in entry.items() if name.startswith("eval_")}
        if evaluations
        else None,
    }
    return lineage.new_stage("distil", facts)


def _teacher_flops(student_flops: float, student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    sizes = [model.num_parameters(exclude_embeddings=True) for model in (student, teacher)]
    return student_flops / (6 * sizes[0]) * 2 * sizes[1]
