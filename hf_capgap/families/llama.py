"""Llama and its relatives: decoders with RoPE, grouped-query attention and a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .family import Branch, Config, Family, Rule, When

LAYER_PREFIX = "model.layers.{layer}."
QUERIES, KEYS = "q_heads*head_dim", "kv_heads*head_dim"

WHOLE_GROUPS = Rule(
    "num_attention_heads must be a multiple of num_key_value_heads", lambda s: s["q_heads"] % s["kv_heads"] == 0
)
EVEN_HEAD_DIM = Rule("head_dim must be even (rotary positions)", lambda s: s["head_dim"] % 2 == 0)
HIDDEN_BY_HEADS = Rule(
    "hidden_size must be a multiple of num_attention_heads (the config class insists, even with an explicit head_dim)",
    lambda s: s["hidden"] % s["q_heads"] == 0,
)

UNTIED_HEAD = {"lm_head.weight": When("tie_word_embeddings", False)}


def in_layers(parameters: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The same parameters in every decoder layer."""
    return {LAYER_PREFIX + name: dimensions for name, dimensions in parameters.items()}


ENDS = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}
ATTENTION = in_layers(
    {
        "self_attn.q_proj.weight": (QUERIES, "hidden"),
        "self_attn.k_proj.weight": (KEYS, "hidden"),
        "self_attn.v_proj.weight": (KEYS, "hidden"),
        "self_attn.o_proj.weight": ("hidden", QUERIES),
    }
)
QKV_BIASES = in_layers(
    {
        "self_attn.q_proj.bias": (QUERIES,),
        "self_attn.k_proj.bias": (KEYS,),
        "self_attn.v_proj.bias": (KEYS,),
    }
)
OUTPUT_BIAS = in_layers({"self_attn.o_proj.bias": ("hidden",)})
HEAD_NORMS = in_layers({"self_attn.q_norm.weight": ("head_dim",), "self_attn.k_norm.weight": ("head_dim",)})
GATED_MLP = in_layers(
    {
        "mlp.gate_proj.weight": ("neurons", "hidden"),
        "mlp.up_proj.weight": ("neurons", "hidden"),
        "mlp.down_proj.weight": ("hidden", "neurons"),
    }
)
MLP_BIASES = in_layers(
    {
        "mlp.gate_proj.bias": ("neurons",),
        "mlp.up_proj.bias": ("neurons",),
        "mlp.down_proj.bias": ("hidden",),
    }
)
PRE_NORMS = in_layers({"input_layernorm.weight": ("hidden",), "post_attention_layernorm.weight": ("hidden",)})

ATTENTION_BIASES = {"*.self_attn.?_proj.bias": When("attention_bias", True)}

_TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

LLAMA = Family(
    model_type="llama",
    config_fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "q_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "neurons": "intermediate_size",
        "vocab": "vocab_size",
    },
    parameters={**ENDS, **ATTENTION, **QKV_BIASES, **OUTPUT_BIAS, **GATED_MLP, **MLP_BIASES, **PRE_NORMS},
    optional={**UNTIED_HEAD, **ATTENTION_BIASES, "*.mlp.*.bias": When("mlp_bias", True)},
    norms={
        LAYER_PREFIX + "input_layernorm": "hidden",
        LAYER_PREFIX + "post_attention_layernorm": "hidden",
        "model.norm": "hidden",
    },
    branches=(
        Branch(reads="input_layernorm", writes="self_attn.o_proj"),
        Branch(reads="post_attention_layernorm", writes="mlp.down_proj"),
    ),
    rules=(WHOLE_GROUPS, EVEN_HEAD_DIM, HIDDEN_BY_HEADS),
    defaults={"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    tiny_config=_TINY,
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    parameters={**ENDS, **ATTENTION, **GATED_MLP, **PRE_NORMS},
    optional=UNTIED_HEAD,
    rules=(WHOLE_GROUPS, EVEN_HEAD_DIM),
    defaults={"tie_word_embeddings": False, "num_key_value_heads": 8},
    tiny_config={**_TINY, "sliding_window": 16},
)

QWEN2 = replace(
    MISTRAL,
    model_type="qwen2",
    parameters={**MISTRAL.parameters, **QKV_BIASES},
    defaults={"tie_word_embeddings": False, "num_key_value_heads": 32},
    tiny_config={**_TINY, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
)

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    parameters={**QWEN2.parameters, **OUTPUT_BIAS, **HEAD_NORMS},
    optional={**UNTIED_HEAD, **ATTENTION_BIASES},
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
    tiny_config={**QWEN2.tiny_config, "head_dim": 16},
)

# Every so many layers one without rotary positions.
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    per_layer_fields=("layer_types", "no_rope_layers"),
    rules=(WHOLE_GROUPS, EVEN_HEAD_DIM),
    defaults={"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": False, "mlp_bias": False},
    tiny_config={**_TINY, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
)

# Norms after the branches instead of before, and over all query or key heads at once.
OLMO2 = replace(
    QWEN3,
    model_type="olmo2",
    parameters={
        **ENDS,
        **ATTENTION,
        **QKV_BIASES,
        **OUTPUT_BIAS,
        **GATED_MLP,
        **in_layers(
            {
                "self_attn.q_norm.weight": (QUERIES,),
                "self_attn.k_norm.weight": (KEYS,),
                "post_attention_layernorm.weight": ("hidden",),
                "post_feedforward_layernorm.weight": ("hidden",),
            }
        ),
    },
    norms={
        LAYER_PREFIX + "self_attn.q_norm": QUERIES,
        LAYER_PREFIX + "self_attn.k_norm": KEYS,
        LAYER_PREFIX + "post_attention_layernorm": "hidden",
        LAYER_PREFIX + "post_feedforward_layernorm": "hidden",
        "model.norm": "hidden",
    },
    branches=(
        Branch(reads="self_attn", writes="post_attention_layernorm"),
        Branch(reads="mlp", writes="post_feedforward_layernorm"),
    ),
    per_layer_fields=(),
    defaults={"tie_word_embeddings": False, "attention_bias": False},
    tiny_config=_TINY,
)


def _longrope_head_dim(family: Family, config: Config) -> int | None:
    """hidden_size // heads where a list of rotary factors fixes it (the 128k models)."""
    rope = family.value(config, "rope_parameters") or family.value(config, "rope_scaling")
    if not isinstance(rope, Mapping) or "short_factor" not in rope:
        return None
    return family.value(config, "hidden_size") // family.value(config, "num_attention_heads")


# Queries, keys and values in one projection, gate and up in another.
PHI3 = replace(
    LLAMA,
    model_type="phi3",
    parameters={
        **ENDS,
        **in_layers(
            {
                "self_attn.qkv_proj.weight": (f"{QUERIES} + {KEYS} + {KEYS}", "hidden"),
                "self_attn.o_proj.weight": ("hidden", QUERIES),
                "mlp.gate_up_proj.weight": ("neurons + neurons", "hidden"),
                "mlp.down_proj.weight": ("hidden", "neurons"),
            }
        ),
        **PRE_NORMS,
    },
    optional=UNTIED_HEAD,
    branches=(
        Branch(reads="input_layernorm", writes="resid_attn_dropout"),
        Branch(reads="post_attention_layernorm", writes="resid_mlp_dropout"),
    ),
    per_layer_fields=(),
    pinned={"longrope_head_dim": _longrope_head_dim},
    rules=(
        WHOLE_GROUPS,
        EVEN_HEAD_DIM,
        Rule(
            "hidden_size // num_attention_heads must stay what it is (the config class counts the factors of longrope "
            "by it)",
            lambda s: s.get("longrope_head_dim") in (None, s["hidden"] // s["q_heads"]),
        ),
    ),
    defaults={"tie_word_embeddings": False},
    tiny_config={**_TINY, "sliding_window": 16},
)
