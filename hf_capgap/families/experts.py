"""Mixtures of experts: Mixtral and Qwen3-MoE. A model holds all experts of a layer in one tensor, a checkpoint each
expert in tensors of its own.
"""

from __future__ import annotations

from dataclasses import replace

from .family import Branch, Rule, When
from .llama import ATTENTION, ENDS, LAYER_PREFIX, MISTRAL, PRE_NORMS, QWEN3, in_layers

_EXPERTS = in_layers(
    {
        "mlp.gate.weight": ("experts", "hidden"),
        "mlp.experts.gate_up_proj": ("experts", "neurons + neurons", "hidden"),
        "mlp.experts.down_proj": ("experts", "hidden", "neurons"),
    }
)
_BRANCHES = (
    Branch(reads="input_layernorm", writes="self_attn.o_proj"),
    Branch(reads="post_attention_layernorm", writes="mlp"),
)
_ENOUGH_EXPERTS = Rule(
    "num_experts must be at least num_experts_per_tok", lambda s: s["experts"] >= s["experts_per_token"]
)

_ALIGNED = {"hidden": 8, "neurons": 8}  # grouped matrix products want rows of 16 bytes


def _stored(prefix: str, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    expert = f"{LAYER_PREFIX}{prefix}.experts.{{expert}}."
    return {
        f"{expert}{gate}.weight": ("neurons", "hidden"),
        f"{expert}{up}.weight": ("neurons", "hidden"),
        f"{expert}{down}.weight": ("hidden", "neurons"),
    }


MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    config_fields={
        **MISTRAL.config_fields,
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    parameters={**ENDS, **ATTENTION, **_EXPERTS, **PRE_NORMS},
    stored={
        LAYER_PREFIX + "block_sparse_moe.gate.weight": ("experts", "hidden"),
        **_stored("block_sparse_moe", gate="w1", up="w3", down="w2"),
    },
    stored_instead_of=tuple(_EXPERTS),
    branches=_BRANCHES,
    neurons_site=None,
    experts_site="mlp.experts",
    router="mlp.gate",
    per_layer_fields=(),
    rules=(*MISTRAL.rules, _ENOUGH_EXPERTS),
    multiples=_ALIGNED,
    defaults={**MISTRAL.defaults, "num_local_experts": 8, "num_experts_per_tok": 2},
    tiny_config={**MISTRAL.tiny_config, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
)

# Its neurons are those of an expert; `intermediate_size` is the width of dense layers, which are not covered.
QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    config_fields={
        **QWEN3.config_fields,
        "neurons": "moe_intermediate_size",
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    parameters={
        **{name: dimensions for name, dimensions in QWEN3.parameters.items() if ".mlp." not in name},
        **_EXPERTS,
    },
    stored=_stored("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    stored_instead_of=tuple(name for name in _EXPERTS if ".experts." in name),
    branches=_BRANCHES,
    neurons_site=None,
    experts_site="mlp.experts",
    router="mlp.gate",
    per_layer_fields=(),
    aliases={"num_local_experts": "num_experts"},
    requires=(When("decoder_sparse_step", 1), When("mlp_only_layers", [])),
    rules=(*QWEN3.rules, _ENOUGH_EXPERTS),
    multiples=_ALIGNED,
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
    },
    tiny_config={
        **QWEN3.tiny_config,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
)
