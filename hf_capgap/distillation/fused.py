"""The objective from hidden states and output heads, in token chunks: no logits of all tokens are ever held.

Gradients are formed in the forward pass, while a chunk's logits are there: four matrix products (student logits,
teacher logits, ∂hidden, ∂weight) and no recomputation. With q = softmax(student), p = softmax(teacher), both at
temperature τ where marked, the gradient of one token's loss by the student's logits z is

    ∂loss/∂z = (1-α)·(q - onehot(y)) + α·τ·(q_τ - p_τ)            [times 1 - (z/c)² under a soft-cap c]

Softmax, reductions and weight-gradient accumulation are in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..labels import IGNORE_INDEX
from ..output_head import OutputHead
from .objective import STATISTICS, check_inputs, check_objective, denominator, sum_statistics

_CE, _KL, _ENTROPY, _AGREEMENT = range(len(STATISTICS))

# What the logit buffers of a chunk may take together, and the fewest tokens that still make a fast matrix product.
_BUFFER_BYTES = {"cpu": 48 * 2**20, "other": 2**30}
_NUM_BUFFERS = 3
_MIN_CHUNK_TOKENS = 64


def fused_distillation_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor | OutputHead,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | OutputHead | None,
    labels: torch.Tensor,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    num_items: torch.Tensor | int | None = None,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective of `objective.distillation_loss`, computed from final hidden states in chunks of tokens.

    Only the student's hidden states and head receive gradients. Extra memory is that of a chunk's logits and of the
    gradients, whatever the number of tokens.

    Args:
        student_hidden: [tokens, H_s], the input of the student's output head.
        student_head: Weight [V_s, H_s], or an `OutputHead` (bias, scale, soft-cap).
        teacher_hidden: [tokens, H_t], or None with `alpha=0` for cross-entropy alone.
        teacher_head: Weight [V_t, H_t], or an `OutputHead`.
        labels: [tokens] int64, already shifted, -100 ignored.
        alpha: Weight of the divergence; the cross-entropy weighs 1 - alpha.
        temperature: τ, of both distributions in the divergence.
        divergence: `"forward_kl"`.
        num_items: Valid tokens of the whole optimizer step; those of this call if None.
        vocab_size: Real vocabulary; head rows beyond it are ignored. The smaller of V_s and V_t if None.
        chunk_tokens: Tokens per chunk; chosen from a memory budget if None.

    Returns:
        The loss and the metrics of `distillation_loss`.

    Raises:
        ConfigError: An option without meaning.
        DataError: Shapes that do not fit each other.
    """
    loss, statistics = fused_token_losses(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        labels,
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
        num_items=num_items,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )
    return loss, sum_statistics(statistics, labels, with_teacher=teacher_hidden is not None)


def fused_token_losses(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor | OutputHead,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | OutputHead | None,
    labels: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
    divergence: str,
    num_items: torch.Tensor | int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fused_distillation_loss`, but with the statistics of each token instead of their sums.

    Returns:
        The loss, and [len(STATISTICS), tokens] without gradient, zero at ignored positions.
    """
    check_objective(alpha, temperature, divergence)
    student_head, teacher_head = _as_head(student_head), _as_head(teacher_head)
    if (teacher_hidden is None) != (teacher_head is None):
        raise ConfigError("A teacher is its hidden states and its head", fix="Pass both, or neither.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError("chunk_tokens must be at least 1", found=chunk_tokens)
    num_rows = [head.weight.shape[0] for head in (student_head, teacher_head) if head is not None]
    vocab_size = check_inputs(
        student_hidden, teacher_hidden, labels, alpha=alpha, num_rows=num_rows, vocab_size=vocab_size
    )
    problem = _Problem(
        student=student_head,
        teacher=None if teacher_head is None else teacher_head.first(vocab_size),
        teacher_hidden=teacher_hidden,
        labels=labels,
        alpha=alpha,
        temperature=temperature,
        denominator=denominator(num_items, labels),
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens or default_chunk_tokens(vocab_size, student_hidden.device),
    )
    return _FusedLoss.apply(student_hidden, student_head.weight, student_head.bias, problem)


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logit buffers fill the memory budget of the device, but enough of them for fast products."""
    budget = _BUFFER_BYTES["cpu" if device.type == "cpu" else "other"]
    return max(_MIN_CHUNK_TOKENS, budget // (_NUM_BUFFERS * vocab_size * 4) // 16 * 16)


def blockwise_argmax(values: torch.Tensor, block: int = 64) -> torch.Tensor:
    """`values.argmax(-1, keepdim=True)` of [n, V] by way of block maxima: CPUs vectorise `amax`, but not `argmax`."""
    num_blocks = values.shape[-1] // block
    if num_blocks < 2:
        return values.argmax(-1, keepdim=True)
    maxima = values[:, : num_blocks * block].unflatten(-1, (num_blocks, block)).amax(-1)
    if num_blocks * block < values.shape[-1]:
        maxima = torch.cat([maxima, values[:, num_blocks * block :].amax(-1, keepdim=True)], dim=-1)
    start = maxima.argmax(-1, keepdim=True) * block
    inside = (start + torch.arange(block, device=values.device)).clamp_(max=values.shape[-1] - 1)  # [n, block]
    return start + values.gather(-1, inside).argmax(-1, keepdim=True)


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`(a * b).sum(-1)` of [n, V]. CPUs do it without writing the products: two rows against two, read off the
    diagonal.
    """
    if a.device.type != "cpu" or len(a) % 2:
        return (a * b).sum(-1)
    pairs = torch.bmm(a.unflatten(0, (-1, 2)), b.unflatten(0, (-1, 2)).mT)  # [n / 2, 2, 2]
    return pairs.diagonal(dim1=1, dim2=2).flatten()


def _held_dtype(tensor: torch.Tensor) -> torch.dtype:
    """In what the gradient of a tensor waits for `backward`: float16 would lose it before the loss scale comes."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast would multiply in here; None outside autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _log_z(logits: torch.Tensor, softmax: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """log Σexp [n] of logits [n, V] whose softmax is known, read off at the largest entry `best` [n, 1]."""
    return (logits.gather(-1, best) - softmax.gather(-1, best).log()).squeeze(-1)


def _as_head(head: torch.Tensor | OutputHead | None) -> OutputHead | None:
    return OutputHead(head) if isinstance(head, torch.Tensor) else head


@dataclass(frozen=True)
class _Problem:
    """Everything about one call that receives no gradient."""

    student: OutputHead
    teacher: OutputHead | None
    teacher_hidden: torch.Tensor | None
    labels: torch.Tensor
    alpha: float
    temperature: float
    denominator: torch.Tensor
    vocab_size: int
    chunk_tokens: int


class _FusedLoss(torch.autograd.Function):
    """Loss and statistics forward; the gradients, already formed then, are handed out backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: _Problem
    ) -> tuple[torch.Tensor, torch.Tensor]:
        product_dtype = _autocast_dtype(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            run = _ChunkedRun(hidden, weight, bias, problem, ctx.needs_input_grad[:3], product_dtype)
            run.all_chunks()
        ctx.gradients = run.gradients()
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(run.statistics)
        return run.loss(), run.statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, _: torch.Tensor) -> tuple:
        if ctx.gradients is None:
            raise RuntimeError("The fused loss holds its gradients only once: it cannot run backward a second time.")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: nobody else holds these tensors, and a copy of the weight gradient would double the peak.
        scaled = (None if g is None else g.mul_(loss_gradient.to(g.dtype)) for g in gradients)
        return *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)), None


class _ChunkedRun:
    """One forward pass over the valid tokens, chunk by chunk, in buffers that are allocated once."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        problem: _Problem,
        needs_gradient: tuple[bool, bool, bool],
        product_dtype: torch.dtype | None,
    ):
        self.problem, self.hidden, self.weight, self.bias = problem, hidden, weight, bias
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.valid = (problem.labels != IGNORE_INDEX).nonzero().squeeze(-1)  # [valid]
        self.student = _Projection(
            problem.student.first(problem.vocab_size), product_dtype or hidden.dtype, self.dtype
        )
        self.teacher = None
        if problem.teacher is not None:
            self.teacher = _Projection(problem.teacher, product_dtype or problem.teacher_hidden.dtype, self.dtype)
        self.statistics = hidden.new_zeros(len(STATISTICS), hidden.shape[0], dtype=self.dtype)
        num_rows = min(problem.chunk_tokens, max(1, len(self.valid)))
        self.buffers = hidden.new_empty(_NUM_BUFFERS, num_rows, problem.vocab_size, dtype=self.dtype)
        wants_hidden, wants_weight, wants_bias = needs_gradient
        self.wants_any = any(needs_gradient)
        self.hidden_gradient = torch.zeros_like(hidden, dtype=_held_dtype(hidden)) if wants_hidden else None
        self.weight_gradient = torch.zeros_like(weight, dtype=self.dtype) if wants_weight else None
        self.bias_gradient = torch.zeros_like(bias, dtype=self.dtype) if wants_bias else None

    def all_chunks(self) -> None:
        for rows in self.valid.split(self.problem.chunk_tokens):
            if len(rows) > 0:
                self.one_chunk(rows)

    def one_chunk(self, rows: torch.Tensor) -> None:
        """Statistics, and gradients where they are wanted, of the tokens `rows` [n]."""
        hidden = self.hidden.index_select(0, rows)  # [n, H_s]
        logits, spare, probabilities = self.buffers[:, : len(rows)]  # [n, V] each
        self.student(hidden, out=logits)
        if self.teacher is not None:
            self.teacher(self.problem.teacher_hidden.index_select(0, rows), out=spare)
        best = blockwise_argmax(logits)  # [n, 1]
        if self.teacher is not None:
            kl_terms = self._teacher_terms(rows, logits, best, spare, probabilities)
        softmax = torch.softmax(logits, -1, out=spare)
        log_z = _log_z(logits, softmax, best)
        targets = self.problem.labels.index_select(0, rows)[:, None]
        self._store(_CE, rows, log_z - logits.gather(-1, targets).squeeze(-1))
        if self.teacher is not None:
            tau = self.problem.temperature
            self._store(_KL, rows, kl_terms + (log_z if tau == 1 else torch.logsumexp(logits / tau, -1)))
        if self.wants_any:
            self._to_gradient(softmax, logits, targets, None if self.teacher is None else probabilities)
            self._accumulate(rows, hidden, gradient=softmax)

    def _teacher_terms(
        self,
        rows: torch.Tensor,
        logits: torch.Tensor,
        student_best: torch.Tensor,
        teacher: torch.Tensor,
        probabilities: torch.Tensor,
    ) -> torch.Tensor:
        """The divergence [n], but for the student's log Σexp at τ; fills in the teacher's probabilities at τ [n, V].

        `probabilities` is the buffer for them; `teacher`, its logits, is divided by τ in place.
        """
        tau = self.problem.temperature
        best = blockwise_argmax(teacher)
        self._store(_AGREEMENT, rows, (best == student_best).squeeze(-1).to(self.dtype))
        if tau != 1:
            teacher.div_(tau)
        torch.softmax(teacher, -1, out=probabilities)
        log_z = _log_z(teacher, probabilities, best)
        own = row_dot(probabilities, teacher)  # Σ p·t
        cross = row_dot(probabilities, logits) / tau  # Σ p·s
        self._store(_ENTROPY, rows, log_z - own)
        # KL = Σ p·t - Σ p·s - log Z_t + log Z_s; all four are computed alike, so that equal models give exactly 0.
        return own - cross - log_z

    def _to_gradient(
        self,
        softmax: torch.Tensor,
        logits: torch.Tensor,
        targets: torch.Tensor,
        teacher_probabilities: torch.Tensor | None,
    ) -> None:
        """Turn the student's softmax [n, V] into ∂(Σ token losses)/∂(head output), in place."""
        alpha, tau = self.problem.alpha, self.problem.temperature
        if teacher_probabilities is None:
            softmax.mul_(1 - alpha)
        elif tau == 1:  # both softmax terms are the same: q - α·p - (1-α)·onehot
            softmax.sub_(teacher_probabilities, alpha=alpha)
        else:
            softmax.mul_(1 - alpha).sub_(teacher_probabilities, alpha=alpha * tau)
            softmax.add_(torch.softmax(logits / tau, -1, out=teacher_probabilities), alpha=alpha * tau)
        softmax.scatter_add_(-1, targets, softmax.new_full((len(softmax), 1), alpha - 1))
        if self.problem.student.softcap is not None:
            softmax.mul_(1 - (logits / self.problem.student.softcap).square_())

    def _store(self, statistic: int, rows: torch.Tensor, values: torch.Tensor) -> None:
        self.statistics[statistic].index_copy_(0, rows, values)

    def _accumulate(self, rows: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        scale, vocab_size = self.problem.student.scale, self.problem.vocab_size
        if self.bias_gradient is not None:
            self.bias_gradient[:vocab_size].add_(gradient.sum(0), alpha=scale)
        if self.hidden_gradient is not None:
            by_hidden = self.student.backward(gradient).mul_(scale)
            self.hidden_gradient.index_copy_(
                0, rows, (by_hidden / self.problem.denominator).to(self.hidden_gradient.dtype)
            )
        if self.weight_gradient is not None:
            self.student.accumulate(self.weight_gradient[:vocab_size], gradient, hidden, scale)

    def loss(self) -> torch.Tensor:
        """The scalar loss."""
        alpha, tau = self.problem.alpha, self.problem.temperature
        total = (1 - alpha) * self.statistics[_CE].sum()
        if self.teacher is not None:
            total = total + alpha * tau**2 * self.statistics[_KL].sum()
        return total / self.problem.denominator

    def gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """∂loss by hidden states, weight and bias; None where not wanted."""
        weight, bias = (
            None if total is None else total.div_(self.problem.denominator).to(_held_dtype(like))
            for total, like in ((self.weight_gradient, self.weight), (self.bias_gradient, self.bias))
        )
        return self.hidden_gradient, weight, bias


class _Projection:
    """Matrix products with one head's weight: 16-bit operands, but results that were never rounded to 16 bits."""

    def __init__(self, head: OutputHead, product_dtype: torch.dtype, result_dtype: torch.dtype):
        self.head, self.result_dtype = head, result_dtype
        half = product_dtype in (torch.bfloat16, torch.float16)
        # CUDA multiplies 16-bit operands into float32; elsewhere the operands are widened once.
        self.narrow = half and head.weight.is_cuda
        self.operand_dtype = product_dtype if self.narrow else result_dtype
        self.weight = head.weight.detach().to(self.operand_dtype)

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of hidden states [n, H], into `out`."""
        self._multiply(hidden.to(self.operand_dtype), self.weight.t(), out)
        if self.head.bias is not None:
            out.add_(self.head.bias.detach())
        if self.head.scale != 1:
            out.mul_(self.head.scale)
        if self.head.softcap is not None:
            out.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return out

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """∂hidden [n, H] from ∂logits [n, V]."""
        out = gradient.new_empty(gradient.shape[0], self.weight.shape[1])
        return self._multiply(gradient.to(self.operand_dtype), self.weight, out)

    def accumulate(self, total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
        """total [V, H] += scale · ∂logitsᵀ · hidden."""
        hidden = hidden.to(self.operand_dtype)
        if self.narrow:
            product = torch.empty_like(total)
            total.add_(self._multiply(gradient.to(self.operand_dtype).t(), hidden, product), alpha=scale)
        else:
            total.addmm_(gradient.t(), hidden, alpha=scale)

    def _multiply(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.narrow:
            return torch.mm(a, b, out_dtype=self.result_dtype, out=out)
        return torch.mm(a, b, out=out)
