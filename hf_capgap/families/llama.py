"""Llama and its closest relatives: pre-norm decoders with RoPE, grouped-query attention and a gated MLP."""

from __future__ import annotations

from dataclasses import replace

from .family import Branch, Family, Rule

_LAYER = "model.layers.{layer}."
_Q, _KV = "q_heads*head_dim", "kv_heads*head_dim"

_PARAMETERS = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    _LAYER + "input_layernorm.weight": ("hidden",),
    _LAYER + "self_attn.q_proj.weight": (_Q, "hidden"),
    _LAYER + "self_attn.q_proj.bias": (_Q,),
    _LAYER + "self_attn.k_proj.weight": (_KV, "hidden"),
    _LAYER + "self_attn.k_proj.bias": (_KV,),
    _LAYER + "self_attn.v_proj.weight": (_KV, "hidden"),
    _LAYER + "self_attn.v_proj.bias": (_KV,),
    _LAYER + "self_attn.o_proj.weight": ("hidden", _Q),
    _LAYER + "self_attn.o_proj.bias": ("hidden",),
    _LAYER + "post_attention_layernorm.weight": ("hidden",),
    _LAYER + "mlp.gate_proj.weight": ("neurons", "hidden"),
    _LAYER + "mlp.gate_proj.bias": ("neurons",),
    _LAYER + "mlp.up_proj.weight": ("neurons", "hidden"),
    _LAYER + "mlp.up_proj.bias": ("neurons",),
    _LAYER + "mlp.down_proj.weight": ("hidden", "neurons"),
    _LAYER + "mlp.down_proj.bias": ("hidden",),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

_WHOLE_GROUPS = Rule(
    "num_attention_heads must be a multiple of num_key_value_heads", lambda s: s["q_heads"] % s["kv_heads"] == 0
)
_EVEN_HEAD_DIM = Rule("head_dim must be even (rotary positions)", lambda s: s["head_dim"] % 2 == 0)
_HIDDEN_BY_HEADS = Rule(
    "hidden_size must be a multiple of num_attention_heads (LlamaConfig insists, even with an explicit head_dim)",
    lambda s: s["hidden"] % s["q_heads"] == 0,
)

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
    parameters=_PARAMETERS,
    layers="model.layers",
    embedding="model.embed_tokens",
    norms=(_LAYER + "input_layernorm", _LAYER + "post_attention_layernorm", "model.norm"),
    branches=(
        Branch(reads="input_layernorm", writes="self_attn.o_proj"),
        Branch(reads="post_attention_layernorm", writes="mlp.down_proj"),
    ),
    heads_site="self_attn.o_proj",
    neurons_site="mlp.down_proj",
    rules=(_WHOLE_GROUPS, _EVEN_HEAD_DIM, _HIDDEN_BY_HEADS),
    tiny_config=_TINY,
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    rules=(_WHOLE_GROUPS, _EVEN_HEAD_DIM),
    tiny_config={**_TINY, "sliding_window": 16},
)

QWEN2 = replace(
    MISTRAL,
    model_type="qwen2",
    tiny_config={**_TINY, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
)

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    parameters={
        **_PARAMETERS,
        _LAYER + "self_attn.q_norm.weight": ("head_dim",),
        _LAYER + "self_attn.k_norm.weight": ("head_dim",),
    },
    tiny_config={**_TINY, "head_dim": 16},
)
