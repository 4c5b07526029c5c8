"""The objective, the obvious way: dense logits, float32 softmax, one mask and one denominator for every term.

For the valid target positions V (labels ≠ -100 after the shift) of a whole optimizer step on all ranks:

    loss = (1/|V|) Σ_{t ∈ V} [ (1-α)·CE_t + α·τ²·D_t ],      D_t = KL(p_T ‖ p_S) at temperature τ

D is a true divergence (the teacher's entropy is subtracted), hence 0 for teacher = student. τ² keeps the scale of its
gradient when τ changes (Hinton et al., arXiv 1503.02531, §2). `fused` computes the same without holding all logits.
"""

from __future__ import annotations

import math

import torch

from ..errors import ConfigError, DataError
from ..labels import IGNORE_INDEX

DIVERGENCES = ("forward_kl",)
# What is measured at every valid position; metrics carry the sums over positions, under these names.
STATISTICS = ("ce", "kl", "teacher_entropy", "agreement")


def check_objective(alpha: float, temperature: float, divergence: str) -> None:
    """Raises `ConfigError` if an option of the objective has no meaning."""
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(
            "alpha weighs the divergence against the cross-entropy", found=alpha, fix="Choose 0 ≤ alpha ≤ 1."
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError("The temperature must be positive and finite", found=temperature)
    if divergence not in DIVERGENCES:
        raise ConfigError("Unknown divergence", found=divergence, fix=f"Choose one of: {', '.join(DIVERGENCES)}.")


def check_inputs(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    alpha: float,
    num_rows: list[int],
    vocab_size: int | None,
) -> int:
    """The real vocabulary, once the shapes fit: one row of `student` and `teacher` per label.

    Raises:
        ConfigError: No teacher though `alpha` weighs it, or a vocabulary that a model does not have.
        DataError: Different numbers of rows.
    """
    if teacher is None and alpha > 0:
        raise ConfigError("The divergence needs a teacher", found=f"alpha={alpha}", fix="Pass one, or alpha=0.")
    counts = {"student": len(student), "labels": len(labels)} | ({} if teacher is None else {"teacher": len(teacher)})
    if len(set(counts.values())) != 1 or labels.dim() != 1:
        raise DataError(
            "Student, teacher and labels must have one row per token", found=counts, fix="Flatten them alike."
        )
    available = min(num_rows)
    if vocab_size is not None and not 1 <= vocab_size <= available:
        raise ConfigError(f"vocab_size must be between 1 and the {available} rows of the heads", found=vocab_size)
    return available if vocab_size is None else vocab_size


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    num_items: torch.Tensor | int | None = None,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective from dense logits: the reference for `fused_distillation_loss`.

    Args:
        student_logits: [tokens, V_s].
        teacher_logits: [tokens, V_t], or None with `alpha=0` for cross-entropy alone.
        labels: [tokens] int64, already shifted, -100 ignored.
        alpha: Weight of the divergence; the cross-entropy weighs 1 - alpha.
        temperature: τ, of both distributions in the divergence. The cross-entropy has no temperature.
        divergence: `"forward_kl"`.
        num_items: Valid tokens of the whole optimizer step, |V|; those of this call if None.
        vocab_size: Real vocabulary; logits beyond it are ignored in both terms. The smaller of V_s and V_t if None.

    Returns:
        The loss (nats, scalar, float32 or better), and sums over this call's valid tokens, without gradients: `ce`,
        `kl` (the divergence at τ, without τ²), `teacher_entropy` (at τ), `agreement` (equal top-1), and `num_tokens`.

    Raises:
        ConfigError: An option without meaning.
        DataError: Shapes that do not fit each other.
    """
    loss, statistics = token_losses(
        student_logits,
        teacher_logits,
        labels,
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
        num_items=num_items,
        vocab_size=vocab_size,
    )
    return loss, sum_statistics(statistics, labels, with_teacher=teacher_logits is not None)


def token_losses(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
    divergence: str,
    num_items: torch.Tensor | int | None = None,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`distillation_loss`, but with the statistics of each token instead of their sums.

    Returns:
        The loss, and [len(STATISTICS), tokens] without gradient, zero at ignored positions.
    """
    check_objective(alpha, temperature, divergence)
    num_rows = [logits.shape[-1] for logits in (student_logits, teacher_logits) if logits is not None]
    vocab_size = check_inputs(
        student_logits, teacher_logits, labels, alpha=alpha, num_rows=num_rows, vocab_size=vocab_size
    )
    valid = labels != IGNORE_INDEX
    student = _upcast(student_logits[valid][:, :vocab_size])  # [valid, V]
    cross_entropy = -student.log_softmax(-1).gather(-1, labels[valid, None]).squeeze(-1)  # [valid]
    token_loss = (1 - alpha) * cross_entropy
    terms = [cross_entropy]
    if teacher_logits is not None:
        teacher = _upcast(teacher_logits.detach()[valid][:, :vocab_size])
        log_teacher = (teacher / temperature).log_softmax(-1)
        probabilities = log_teacher.exp()
        kl = (probabilities * (log_teacher - (student / temperature).log_softmax(-1))).sum(-1)
        teacher_entropy = -(probabilities * log_teacher).sum(-1)
        agreement = (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype)
        token_loss = token_loss + alpha * temperature**2 * kl
        terms += [kl, teacher_entropy, agreement]
    statistics = student.new_zeros(len(STATISTICS), len(labels))
    statistics[: len(terms), valid] = torch.stack(terms).detach()
    # With no valid token the sum is an empty one: zero, and still attached to the graph.
    return token_loss.sum() / denominator(num_items, labels), statistics


def sum_statistics(statistics: torch.Tensor, labels: torch.Tensor, *, with_teacher: bool) -> dict[str, torch.Tensor]:
    """The metrics of a loss function, from per-token statistics [len(STATISTICS), tokens]."""
    names = STATISTICS if with_teacher else STATISTICS[:1]
    metrics = dict(zip(names, statistics.sum(-1).unbind(), strict=False))
    metrics["num_tokens"] = (labels != IGNORE_INDEX).sum()
    return metrics


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def denominator(num_items: torch.Tensor | int | None, labels: torch.Tensor) -> torch.Tensor:
    """|V| as a tensor on the labels' device; those of `labels` if `num_items` is None, and 1 where there is none."""
    count = (
        (labels != IGNORE_INDEX).sum()
        if num_items is None
        else torch.as_tensor(num_items, device=labels.device).reshape(())
    )
    return count.clamp(min=1)
