"""Gemma 2 and 3 (text): norms before and after each branch, scaled embeddings, soft-capped logits."""

from __future__ import annotations

from dataclasses import replace

from .family import Branch
from .llama import (
    ATTENTION_BIASES,
    HEAD_NORMS,
    LAYER_PREFIX,
    LLAMA,
    MLP_BIASES,
    PRE_NORMS,
    UNTIED_HEAD,
    in_layers,
)

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    parameters={
        **{name: dimensions for name, dimensions in LLAMA.parameters.items() if name not in {*MLP_BIASES, *PRE_NORMS}},
        **in_layers({f"{norm}.weight": ("hidden",) for norm in _NORMS}),
    },
    optional={**UNTIED_HEAD, **ATTENTION_BIASES},
    norms={**{LAYER_PREFIX + norm: "hidden" for norm in _NORMS}, "model.norm": "hidden"},
    branches=(
        Branch(reads="input_layernorm", writes="post_attention_layernorm"),
        Branch(reads="pre_feedforward_layernorm", writes="post_feedforward_layernorm"),
    ),
    scales_embeddings=True,
    norm_offset=1.0,
    defaults={
        "tie_word_embeddings": True,
        "attention_bias": False,
        "vocab_size": 256_000,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    tiny_config={
        **LLAMA.tiny_config,
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
)

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    parameters={**GEMMA2.parameters, **HEAD_NORMS},
    defaults={**GEMMA2.defaults, "vocab_size": 262_208},
    tiny_config={**GEMMA2.tiny_config, "layer_types": ["sliding_attention", "full_attention"] * 2},
)
