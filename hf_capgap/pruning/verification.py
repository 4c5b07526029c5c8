"""The proof of a cut: the teacher with its removed units masked computes what the student computes.

The masked teacher shares no code with the surgery. It runs the whole teacher, with zeros on removed units, removed
layers skipped, and norms taken over the kept dimensions.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..compat import attention_implementation
from ..errors import VerificationError
from ..families import Family, audit
from ..families.family import LAYER
from .selection import Kept
from .shapes import StudentShape

_NUM_SEQUENCES, _MAX_LENGTH, _SEED = 2, 32, 0


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What `verify` found; logit differences are maxima over a random batch, in float32.

    Attributes:
        masked_difference: Masked teacher against student; of token embeddings, too.
        reloaded_difference: Student against itself saved and loaded with `AutoModelForCausalLM`.
        num_parameters: Parameters of the student, tied ones once: what its shape says.
    """

    masked_difference: float
    reloaded_difference: float
    num_parameters: int


def verify(
    model: PreTrainedModel | str | os.PathLike,
    student: PreTrainedModel | str | os.PathLike,
    *,
    kept: Kept | None = None,
    tolerance: float = 1e-4,
) -> VerificationReport:
    """Prove that `student` is what was cut out of the teacher `model`.

    Models that are not in float32 are checked on float32 copies.

    Args:
        model: The teacher, or its folder or Hub id.
        student: What `cut` returned, or the folder it wrote.
        kept: The kept indices, if the student does not carry them.
        tolerance: Largest difference of logits, absolute.

    Raises:
        VerificationError: A difference beyond the tolerance, or a parameter count that is not the shape's.
    """
    if not isinstance(student, PreTrainedModel):
        kept = kept or Kept.load(student)
        student = AutoModelForCausalLM.from_pretrained(student, dtype="auto")
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    kept = kept or getattr(student, "kept", None)
    if kept is None:
        raise VerificationError(
            "The student does not carry its kept indices", fix="Pass kept=, or the student's folder."
        )
    expected = StudentShape.of(student.config).num_parameters(model.config)
    if student.num_parameters() != expected:
        raise VerificationError(f"The shape says {expected:,} parameters", found=f"{student.num_parameters():,}")
    teacher, student = _in_float32(model), _in_float32(student)
    input_ids = _probe(teacher)
    with torch.no_grad(), _evaluating(teacher), _evaluating(student):
        logits = student(input_ids=input_ids, use_cache=False).logits
        with _masked(teacher, kept):
            masked = teacher(input_ids=input_ids, use_cache=False).logits
        embeddings = teacher.get_input_embeddings().weight[:, kept.hidden]  # the probe does not read every row
        reloaded = _reload(student)(input_ids=input_ids, use_cache=False).logits
    report = VerificationReport(
        masked_difference=max(
            _largest_difference(masked, logits),
            _largest_difference(embeddings, student.get_input_embeddings().weight),
        ),
        reloaded_difference=_largest_difference(reloaded, logits),
        num_parameters=expected,
    )
    for name in ("masked_difference", "reloaded_difference"):
        if not getattr(report, name) <= tolerance:  # catches NaN, too
            raise VerificationError(
                f"{name} exceeds {tolerance}", found=report, fix="Was the student trained since the cut?"
            )
    return report


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, or a float32 copy built anew: casting a model to another dtype rounds its rotary table, too."""
    if model.dtype == torch.float32:
        return model
    duplicate = AutoModelForCausalLM.from_config(
        model.config, dtype=torch.float32, attn_implementation=attention_implementation(model.config)
    )
    duplicate.load_state_dict(model.state_dict())
    return duplicate.to(model.device)


def _probe(teacher: PreTrainedModel) -> torch.Tensor:
    """Random token ids, [2, ≤ 32]."""
    length = min(_MAX_LENGTH, getattr(teacher.config, "max_position_embeddings", _MAX_LENGTH))
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(teacher.config.vocab_size, (_NUM_SEQUENCES, length), generator=generator).to(teacher.device)


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _reload(student: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).to(student.device).eval()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _masked(teacher: PreTrainedModel, kept: Kept) -> Iterator[None]:
    """The teacher computes as if only the kept units existed, while the context is open."""
    family = audit(teacher).family
    sizes = family.sizes(teacher.config)
    queries_per_group = sizes["q_heads"] // sizes["kv_heads"]
    hidden = torch.tensor(kept.hidden, device=teacher.device)
    hidden_mask = _mask(hidden, sizes["hidden"])
    with ExitStack() as stack:

        def multiply_output(module: torch.nn.Module, mask: torch.Tensor) -> None:
            stack.callback(module.register_forward_hook(lambda _, args, output: output * mask).remove)

        def multiply_input(module: torch.nn.Module, mask: torch.Tensor) -> None:
            stack.callback(module.register_forward_pre_hook(lambda _, args: (args[0] * mask, *args[1:])).remove)

        multiply_output(teacher.get_submodule(family.embedding), hidden_mask)
        for index, layer in enumerate(teacher.get_submodule(family.layers)):
            if index not in kept.layers:
                stack.callback(layer.register_forward_hook(_skip, with_kwargs=True).remove)
                continue
            units = kept.by_axis(index, queries_per_group)
            heads = _mask(torch.tensor(units["q_heads"], device=hidden.device), sizes["q_heads"])
            neurons = _mask(torch.tensor(units["neurons"], device=hidden.device), sizes["neurons"])
            multiply_input(layer.get_submodule(family.heads_site), heads.repeat_interleave(sizes["head_dim"]))
            multiply_input(layer.get_submodule(family.neurons_site), neurons)
            for branch in family.branches:
                multiply_output(layer.get_submodule(branch.writes), hidden_mask)
        for norm in _norms(teacher, family, sizes["layers"]):
            stack.callback(norm.register_forward_hook(_norm_over(norm, hidden)).remove)
        yield


def _mask(units: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size, device=units.device).index_fill(0, units, 1.0)


def _skip(layer: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _norms(teacher: PreTrainedModel, family: Family, num_layers: int) -> Iterator[torch.nn.Module]:
    for path in family.norms:
        for index in range(num_layers if LAYER in path else 1):
            yield teacher.get_submodule(path.format(layer=index))


def _norm_over(norm: torch.nn.Module, hidden: torch.Tensor) -> Callable:
    """A forward hook that recomputes the norm over the dimensions `hidden` alone, zeros elsewhere."""
    narrow = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters():
        narrow.get_parameter(name).data = parameter.data[hidden]

    def hook(_: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output).index_copy(-1, hidden, narrow(args[0][..., hidden]))

    return hook
