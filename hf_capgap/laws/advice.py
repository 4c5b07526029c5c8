"""What a plan says in words: whether to distil, why the laws disagree, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np

from .book import Laws
from .crossovers import crossover_tokens
from .planning import PlanSettings, TeacherRow
from .sizes import format_size, parse_size

# Predicted losses closer than this fraction are a tie: about the error that the laws leave on runs of their own data.
TIE = 0.005


def nearest_to(rows: Sequence[TeacherRow], best_teacher_params: float) -> TeacherRow:
    """The candidate nearest to the capacity-gap law's best teacher, in log size."""
    return min(rows, key=lambda row: abs(np.log(row.size.total / best_teacher_params)))


def recommend(rows: Sequence[TeacherRow], best_teacher_params: float) -> TeacherRow:
    """Of the candidates that tie for the lowest student loss, the one nearest to the capacity-gap law's teacher."""
    lowest = min(row.student_loss.value for row in rows)
    tied = [row for row in rows if row.student_loss.value <= lowest * (1 + TIE)]
    return nearest_to(tied, best_teacher_params)


def explain_disagreement(by_gap: TeacherRow, by_loss: TeacherRow, num_tokens: float) -> str | None:
    """Why the capacity-gap law and the distillation law choose different teachers; None if they do not."""
    if by_gap.name == by_loss.name:
        return None
    difference = by_gap.student_loss.value / by_loss.student_loss.value - 1
    direction = "stronger" if by_loss.teacher_loss.value < by_gap.teacher_loss.value else "weaker"
    weight = (
        f"by the distillation law that costs {difference:.1%} of loss"
        if difference > TIE
        else f"by the distillation law the two tie ({difference:.2%} apart), and the nearer one is cheaper to trust"
    )
    return (
        f"The laws disagree. The capacity-gap law knows sizes alone and takes {by_gap.name} ({by_gap.ratio:.1f} x the "
        f"student); {weight}. The distillation law looks at the teacher's loss and at the tokens: at "
        f"{format_size(num_tokens)} tokens this student is predicted to learn most from the {direction} teacher "
        f"{by_loss.name} ({by_loss.ratio:.1f} x)."
    )


def give_verdict(row: TeacherRow, num_tokens: float, laws: Laws) -> str:
    """Whether to distil from this teacher at all, against text alone for the same tokens and for the same compute."""
    loss, same_tokens, same_compute = row.student_loss.value, row.supervised_loss, row.supervised_loss_same_compute
    tokens, more = format_size(num_tokens), format_size(row.supervised_tokens)
    facts = (
        f"From {row.name}, {tokens} tokens: predicted loss {loss:.3f}. Text alone: {same_tokens:.3f} after the same "
        f"tokens, {same_compute:.3f} after the {more} tokens that the same compute pays for."
    )
    if abs(loss / same_tokens - 1) <= TIE and abs(loss / same_compute - 1) <= TIE:
        choice = f"Too close to call (within {TIE:.1%}): the cheaper way is as good."
    elif loss < min(same_tokens, same_compute):
        choice = "Distil."
    elif loss < same_tokens:
        choice = f"Distil if text is scarce; with {more} tokens of text, training alone is predicted to do better."
    else:
        choice = "Train on text alone: distillation from this teacher is predicted to do worse at this many tokens."
    crossover = crossover_tokens(row.student.non_embedding, row.teacher_loss.value, laws=laws)
    return f"{choice} {facts} At equal tokens, {crossover.verdict}."


def command_line(row: TeacherRow, student_params: float, num_tokens: float, settings: PlanSettings) -> str:
    """The command that scores, cuts and distils (`examples/distill.py`), for the number of tokens planned."""
    short = format_size(student_params)
    target = short if parse_size(short) == student_params else f"{student_params:.0f}"
    options = {
        "--teacher": row.name,
        "--teacher_dtype": "bfloat16",
        "--target": target,
        "--dataset": "YOUR_CORPUS",
        "--streaming": "true",
        "--block_size": settings.block_size,
        "--per_device_train_batch_size": settings.batch_size,
        "--gradient_accumulation_steps": settings.accumulation_steps,
        "--max_steps": settings.num_steps(num_tokens),
        "--bf16": "true",
        **({"--gradient_checkpointing": "true"} if settings.gradient_checkpointing else {}),
        "--output_dir": f"student-{target}",
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    launch = ["accelerate", "launch", "--num_processes", str(settings.num_devices), "examples/distill.py"]
    return shlex.join([*launch, *words])
