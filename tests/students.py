"""What the tests of cutting share: random scores, a smaller shape of every family's tiny config, inputs, logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_capgap import ExpressiveScores, StudentShape, cut
from hf_capgap.families import FAMILIES, family_for

TOLERANCE = 1e-4
ALL_FAMILIES = tuple(FAMILIES)
HEADS_MAKE_HIDDEN = ("gpt2", "gpt_neox", "opt")  # hidden = heads × head_dim
MIXTURES = ("mixtral", "qwen3_moe")

_SMALLER = {
    "num_hidden_layers": 2,
    "hidden_size": 42,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 37,
}
_SMALLER_HEADS = {**_SMALLER, "hidden_size": 48, "num_key_value_heads": 6}
_SMALLER_MIXTURE = {**_SMALLER, "hidden_size": 40, "intermediate_size": 24, "num_experts": 3}
SMALLER = {
    **dict.fromkeys(ALL_FAMILIES, _SMALLER),
    **dict.fromkeys(HEADS_MAKE_HIDDEN, _SMALLER_HEADS),
    **dict.fromkeys(MIXTURES, _SMALLER_MIXTURE),
}


def random_scores(config: PreTrainedConfig, seed: int = 0) -> ExpressiveScores:
    """Scores that keep other units in every layer, without the time that scoring takes."""
    sizes = family_for(config).sizes(config)
    num_layers, num_experts = sizes["layers"], sizes.get("experts")
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    return ExpressiveScores(
        heads=rand(num_layers, sizes["kv_heads"]),
        neurons=rand(num_layers, *([num_experts] if num_experts else []), sizes["neurons"]),
        hidden=rand(sizes["hidden"]),
        query_heads=rand(num_layers, sizes["q_heads"]),
        layers=rand(num_layers),
        experts=rand(num_layers, num_experts) if num_experts else None,
        metric="expressive",
        unit="batch",
        num_units=7,
        model_type=config.model_type,
        model_name="",
        calibration_hash=f"{seed:064x}",
    )


def smaller(config: PreTrainedConfig, **changes: int) -> StudentShape:
    """The teacher's shape with `changes`; query heads follow the KV groups unless they are named, too."""
    teacher = StudentShape.of(config)
    if "num_key_value_heads" in changes and "num_attention_heads" not in changes:
        changes["num_attention_heads"] = teacher.queries_per_group * changes["num_key_value_heads"]
    return replace(teacher, **changes)


def smaller_everywhere(config: PreTrainedConfig) -> StudentShape:
    """A legal shape, smaller than the tiny config in every dimension."""
    return smaller(config, **SMALLER[config.model_type])


def make_student(model: PreTrainedModel, *, layers: Any = "symmetric", **changes: int) -> PreTrainedModel:
    return cut(model, random_scores(model.config), smaller(model.config, **changes), layers=layers)


def make_inputs(config: PreTrainedConfig, length: int = 24) -> Tensor:
    """[2, length]: longer than the tiny configs' sliding windows."""
    return torch.randint(2, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=make_inputs(model.config)).logits.float()


def assert_same_logits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=TOLERANCE)


def others(kept: Sequence[int], size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept))
