"""The proof of a cut: the teacher with its removed units masked computes what the student computes.

The masked teacher shares no code with the surgery. It runs the whole teacher, with zeros on removed units, removed
layers skipped, and norms taken over the kept dimensions.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..compat import attention_implementation
from ..errors import VerificationError
from ..families import Dimension, audit, family_for
from ..families.family import LAYER
from .selection import Kept
from .shapes import StudentShape

_NUM_SEQUENCES, _MAX_LENGTH, _SEED = 2, 32, 0


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What `verify` found; logit differences are maxima over a random batch, in float32.

    Attributes:
        masked_difference: Masked teacher against student; of embeddings, too.
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
    _check_kept(kept, model.config, student.config)
    expected = StudentShape.of(student.config).num_parameters(model.config)
    if student.num_parameters() != expected:
        raise VerificationError(f"The shape says {expected:,} parameters", found=f"{student.num_parameters():,}")
    teacher, student = _in_float32(model), _in_float32(student)
    if teacher is not model:
        _round_rescaled(teacher, model.dtype, kept)
    input_ids = _probe(teacher)
    with torch.no_grad(), _evaluating(teacher), _evaluating(student):
        logits = student(input_ids=input_ids, use_cache=False).logits
        with _masked(teacher, kept):
            masked = teacher(input_ids=input_ids, use_cache=False).logits
        reloaded = _reload(student)(input_ids=input_ids, use_cache=False).logits
    report = VerificationReport(
        masked_difference=max(
            _largest_difference(masked, logits),
            *_lookup_differences(teacher, student, kept),
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


def _check_kept(kept: Kept, teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raises `VerificationError` if `kept` is not of this teacher and this student."""
    sizes, shape = family_for(teacher).sizes(teacher), StudentShape.of(student).sizes()
    if teacher.model_type != student.model_type:
        raise VerificationError("Not two models of one family", found=(teacher.model_type, student.model_type))
    units = [("layers", kept.layers), ("hidden", kept.hidden)]
    try:
        for layer in kept.layers:
            experts = kept.experts[layer] if kept.experts is not None else [None]
            for expert in experts:
                units += [(axis, of) for axis, of in kept.units(sizes, layer, expert).items() if axis != "hidden"]
    except (KeyError, IndexError, ValueError) as error:
        raise VerificationError("The kept indices are incomplete", found=f"{type(error).__name__}: {error}") from error
    for axis, indices in units:
        if len(indices) != shape[axis] or not all(0 <= index < sizes[axis] for index in indices):
            raise VerificationError(
                f"The kept indices of {axis} are not those of this teacher and this student",
                found=f"{len(indices)} of {sizes[axis]}, the student has {shape[axis]}",
                fix="Is this the teacher that the student was cut out of?",
            )


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, or a float32 copy built anew: casting a model to another dtype rounds its rotary table, too."""
    if model.dtype == torch.float32:
        return model
    duplicate = AutoModelForCausalLM.from_config(
        model.config, dtype=torch.float32, attn_implementation=attention_implementation(model.config)
    )
    duplicate.load_state_dict(model.state_dict())
    return duplicate.to(model.device)


def _round_rescaled(teacher: PreTrainedModel, dtype: torch.dtype, kept: Kept) -> None:
    """Give a float32 copy of a teacher in `dtype` the rounding that its student has from what the cut rescales.

    That is where embeddings are multiplied by √hidden: a factor √(H/H') on them, its inverse on a tied head's norm.
    """
    family = family_for(teacher.config)
    factor = (family.sizes(teacher.config)["hidden"] / len(kept.hidden)) ** 0.5
    if not family.scales_embeddings or factor == 1:
        return
    embedding = teacher.get_parameter(family.lookups[0])
    embedding.data = (embedding.data * factor).to(dtype).float() / factor
    if family.tied(teacher.config):
        final_norm = next(path for path in family.norms if LAYER not in path)
        weight, offset = teacher.get_parameter(f"{final_norm}.weight"), family.norm_offset
        stored = ((weight.data + offset) / factor - offset).to(dtype).float()
        weight.data = (stored + offset) * factor - offset


def _probe(teacher: PreTrainedModel) -> torch.Tensor:
    """Random token ids, [2, ≤ 32]."""
    length = min(_MAX_LENGTH, getattr(teacher.config, "max_position_embeddings", _MAX_LENGTH))
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(teacher.config.vocab_size, (_NUM_SEQUENCES, length), generator=generator).to(teacher.device)


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _lookup_differences(teacher: PreTrainedModel, student: PreTrainedModel, kept: Kept) -> Iterator[float]:
    """Of every row of the embeddings, which the probe does not all read."""
    every_token = torch.arange(teacher.config.vocab_size, device=teacher.device)
    embedded = [model.get_input_embeddings()(every_token.to(model.device)) for model in (teacher, student)]
    yield _largest_difference(embedded[0][:, kept.hidden], embedded[1])
    for name in family_for(teacher.config).lookups[1:]:
        yield _largest_difference(teacher.get_parameter(name)[:, kept.hidden], student.get_parameter(name))


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
    family = audit(teacher)
    sizes = family.sizes(teacher.config)
    with ExitStack() as stack:
        mask = _Masks(teacher, stack)
        # Norms first: a copy of one must not have its masks, too.
        for path, dimension in family.norms.items():
            for index in kept.layers if LAYER in path else [None]:
                units = kept.units(sizes, index)
                indices = Dimension.parse(dimension).indices(sizes, units)
                mask.norm(teacher.get_submodule(path.format(layer=index)), indices)
        hidden = mask.of(kept.hidden, sizes["hidden"])
        layers = teacher.get_submodule(family.layers)
        mask.input(layers[0], hidden)
        for index, layer in enumerate(layers):
            if index not in kept.layers:
                stack.callback(layer.register_forward_hook(_skip, with_kwargs=True).remove)
                continue
            heads = mask.of(kept.units(sizes, index)["q_heads"], sizes["q_heads"])
            mask.input(layer.get_submodule(family.heads_site), heads.repeat_interleave(sizes["head_dim"]))
            if family.experts_site is None:
                neurons = mask.of(kept.neurons[index], sizes["neurons"])
                mask.input(layer.get_submodule(family.neurons_site), neurons)
            else:
                mask.experts(layer.get_submodule(family.experts_site), kept.experts[index], kept.neurons[index])
                mask.router(layer.get_submodule(family.router), kept.experts[index])
            for branch in family.branches:
                mask.output(layer.get_submodule(branch.writes), hidden)
        yield


class _Masks:
    """Puts masks on modules of `teacher`, and has `stack` take them off again."""

    def __init__(self, teacher: PreTrainedModel, stack: ExitStack):
        self._device, self._stack = teacher.device, stack

    def of(self, units: Sequence[int], size: int) -> torch.Tensor:
        """1 for `units`, 0 for the others, [size]."""
        return torch.zeros(size, device=self._device).index_fill(0, self._index(units), 1.0)

    def input(self, module: torch.nn.Module, mask: torch.Tensor) -> None:
        def hook(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple:
            if args:
                return (args[0] * mask, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * mask}

        self._stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def output(self, module: torch.nn.Module, mask: torch.Tensor) -> None:
        self._hook(module, lambda _, args, output: output * mask)

    def norm(self, norm: torch.nn.Module, indices: Sequence[int]) -> None:
        """The norm is taken over the entries `indices` alone, with zeros elsewhere."""
        kept = self._index(indices)
        narrow = copy.deepcopy(norm)
        for name, parameter in norm.named_parameters():
            narrow.get_parameter(name).data = parameter.data[kept]
        if isinstance(norm, torch.nn.LayerNorm):
            narrow.normalized_shape = (len(kept),)

        def hook(_: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(output).index_copy(-1, kept, narrow(args[0][..., kept]))

        self._hook(norm, hook)

    def experts(self, module: torch.nn.Module, experts: list[int], neurons: list[list[int]]) -> None:
        """Neurons inside experts are no module's input: what reads them is zeroed for the time being."""
        weight = module.down_proj  # [experts, hidden, neurons]
        mask = torch.zeros_like(weight[:, 0])
        for expert, units in zip(experts, neurons, strict=True):
            mask[expert] = self.of(units, weight.shape[-1])
        original, weight.data = weight.data, weight.data * mask[:, None]
        self._stack.callback(setattr, weight, "data", original)

    def router(self, router: torch.nn.Module, experts: list[int]) -> None:
        """The router chooses among `experts` alone."""
        kept = self._index(experts)
        narrow = copy.deepcopy(router)
        narrow.weight.data = router.weight.data[kept]

        def hook(_: torch.nn.Module, args: tuple, output: tuple) -> tuple:
            logits, weights, chosen = narrow(*args)
            return torch.full_like(output[0], -torch.inf).index_copy(-1, kept, logits), weights, kept[chosen]

        self._hook(router, hook)

    def _hook(self, module: torch.nn.Module, hook: Callable) -> None:
        self._stack.callback(module.register_forward_hook(hook).remove)

    def _index(self, units: Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(units, dtype=torch.long, device=self._device)


def _skip(layer: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    unchanged = args[0] if args else kwargs["hidden_states"]
    return (unchanged, *output[1:]) if isinstance(output, tuple) else unchanged
