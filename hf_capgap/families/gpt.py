"""Decoders with LayerNorm, biases and a plain MLP: GPT-2, GPT-NeoX (Pythia) and OPT.

None of them has a config field for the width of a head: it is hidden_size / heads, so that the two shrink together.
"""

from __future__ import annotations

from dataclasses import replace

from .family import Branch, Family, Rule, When
from .llama import EVEN_HEAD_DIM, UNTIED_HEAD

_QUERIES = "q_heads*head_dim"
_HIDDEN_IS_HEADS = Rule(
    "hidden_size must be num_attention_heads × head_dim (this family has no field for head_dim)",
    lambda s: s["hidden"] == s["q_heads"] * s["head_dim"],
)

_TINY = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

# Its projections are Conv1D, [in, out].
GPT2 = Family(
    model_type="gpt2",
    config_fields={
        "layers": "n_layer",
        "hidden": "n_embd",
        "q_heads": "n_head",
        "neurons": "n_inner",
        "vocab": "vocab_size",
        "positions": "n_positions",
    },
    parameters={
        "transformer.wte.weight": ("vocab", "hidden"),
        "transformer.wpe.weight": ("positions", "hidden"),
        "transformer.h.{layer}.ln_1.weight": ("hidden",),
        "transformer.h.{layer}.ln_1.bias": ("hidden",),
        "transformer.h.{layer}.attn.c_attn.weight": ("hidden", " + ".join([_QUERIES] * 3)),
        "transformer.h.{layer}.attn.c_attn.bias": (" + ".join([_QUERIES] * 3),),
        "transformer.h.{layer}.attn.c_proj.weight": (_QUERIES, "hidden"),
        "transformer.h.{layer}.attn.c_proj.bias": ("hidden",),
        "transformer.h.{layer}.ln_2.weight": ("hidden",),
        "transformer.h.{layer}.ln_2.bias": ("hidden",),
        "transformer.h.{layer}.mlp.c_fc.weight": ("hidden", "neurons"),
        "transformer.h.{layer}.mlp.c_fc.bias": ("neurons",),
        "transformer.h.{layer}.mlp.c_proj.weight": ("neurons", "hidden"),
        "transformer.h.{layer}.mlp.c_proj.bias": ("hidden",),
        "transformer.ln_f.weight": ("hidden",),
        "transformer.ln_f.bias": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    },
    optional=UNTIED_HEAD,
    stored_names=(("h.", "transformer.h."), ("w", "transformer.w"), ("ln_f.", "transformer.ln_f.")),
    layers="transformer.h",
    lookups=("transformer.wte.weight", "transformer.wpe.weight"),
    norms={
        "transformer.h.{layer}.ln_1": "hidden",
        "transformer.h.{layer}.ln_2": "hidden",
        "transformer.ln_f": "hidden",
    },
    branches=(Branch(reads="ln_1", writes="attn.resid_dropout"), Branch(reads="ln_2", writes="mlp.dropout")),
    heads_site="attn.c_proj",
    neurons_site="mlp.c_proj",
    per_layer_fields=(),
    requires=(When("add_cross_attention", False), When("scale_attn_by_inverse_layer_idx", False)),
    rules=(_HIDDEN_IS_HEADS,),
    defaults={
        "tie_word_embeddings": True,
        "add_cross_attention": False,
        "scale_attn_by_inverse_layer_idx": False,
    },
    tiny_config={**_TINY, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_inner": 112, "n_positions": 64},
)

# Each head owns its rows of queries, keys and values, one head after the other.
GPT_NEOX = Family(
    model_type="gpt_neox",
    config_fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "q_heads": "num_attention_heads",
        "neurons": "intermediate_size",
        "vocab": "vocab_size",
    },
    parameters={
        "gpt_neox.embed_in.weight": ("vocab", "hidden"),
        "gpt_neox.layers.{layer}.input_layernorm.weight": ("hidden",),
        "gpt_neox.layers.{layer}.input_layernorm.bias": ("hidden",),
        "gpt_neox.layers.{layer}.post_attention_layernorm.weight": ("hidden",),
        "gpt_neox.layers.{layer}.post_attention_layernorm.bias": ("hidden",),
        "gpt_neox.layers.{layer}.attention.query_key_value.weight": ("q_heads*3*head_dim", "hidden"),
        "gpt_neox.layers.{layer}.attention.query_key_value.bias": ("q_heads*3*head_dim",),
        "gpt_neox.layers.{layer}.attention.dense.weight": ("hidden", _QUERIES),
        "gpt_neox.layers.{layer}.attention.dense.bias": ("hidden",),
        "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight": ("neurons", "hidden"),
        "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias": ("neurons",),
        "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight": ("hidden", "neurons"),
        "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias": ("hidden",),
        "gpt_neox.final_layer_norm.weight": ("hidden",),
        "gpt_neox.final_layer_norm.bias": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    },
    optional={**UNTIED_HEAD, "*.attention.*.bias": When("attention_bias", True)},
    stored_names=(("embed_out.", "lm_head."),),
    written_names=(("embed_out.", "lm_head."),),
    layers="gpt_neox.layers",
    lookups=("gpt_neox.embed_in.weight",),
    norms={
        "gpt_neox.layers.{layer}.input_layernorm": "hidden",
        "gpt_neox.layers.{layer}.post_attention_layernorm": "hidden",
        "gpt_neox.final_layer_norm": "hidden",
    },
    branches=(
        Branch(reads="input_layernorm", writes="post_attention_dropout"),
        Branch(reads="post_attention_layernorm", writes="post_mlp_dropout"),
    ),
    parallel=When("use_parallel_residual", True),
    heads_site="attention.dense",
    neurons_site="mlp.dense_4h_to_h",
    per_layer_fields=(),
    rules=(_HIDDEN_IS_HEADS, EVEN_HEAD_DIM),
    defaults={"tie_word_embeddings": False, "attention_bias": True, "use_parallel_residual": True},
    tiny_config={
        **_TINY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 112,
        "max_position_embeddings": 64,
    },
)

_OPT_LAYER = "model.decoder.layers.{layer}."
_OPT_LINEARS = {
    "self_attn.q_proj": (_QUERIES, "hidden"),
    "self_attn.k_proj": (_QUERIES, "hidden"),
    "self_attn.v_proj": (_QUERIES, "hidden"),
    "self_attn.out_proj": ("hidden", _QUERIES),
    "fc1": ("neurons", "hidden"),
    "fc2": ("hidden", "neurons"),
}
_OPT_NORMS = (_OPT_LAYER + "self_attn_layer_norm", _OPT_LAYER + "final_layer_norm", "model.decoder.final_layer_norm")

OPT = replace(
    GPT_NEOX,
    model_type="opt",
    config_fields={**GPT_NEOX.config_fields, "neurons": "ffn_dim", "positions": "max_position_embeddings"},
    parameters={
        "model.decoder.embed_tokens.weight": ("vocab", "hidden"),
        "model.decoder.embed_positions.weight": ("positions + 2", "hidden"),
        **{f"{_OPT_LAYER}{name}.weight": dimensions for name, dimensions in _OPT_LINEARS.items()},
        **{f"{_OPT_LAYER}{name}.bias": dimensions[:1] for name, dimensions in _OPT_LINEARS.items()},
        **{f"{norm}.{name}": ("hidden",) for norm in _OPT_NORMS for name in ("weight", "bias")},
        "lm_head.weight": ("vocab", "hidden"),
    },
    optional={
        **UNTIED_HEAD,
        "*.self_attn.*.bias": When("enable_bias", True),
        "*.fc?.bias": When("enable_bias", True),
        "*_layer_norm.*": When("layer_norm_elementwise_affine", True),
    },
    stored_names=(("decoder.", "model.decoder."),),
    written_names=(),
    layers="model.decoder.layers",
    lookups=("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"),
    norms=dict.fromkeys(_OPT_NORMS, "hidden"),
    branches=(
        Branch(reads="self_attn_layer_norm", writes="self_attn.out_proj"),
        Branch(reads="final_layer_norm", writes="fc2"),
    ),
    parallel=None,
    heads_site="self_attn.out_proj",
    neurons_site="fc2",
    functional_dropout="dropout",
    follows_hidden=("word_embed_proj_dim",),
    requires=(When("do_layer_norm_before", True), When("_remove_final_layer_norm", False)),
    rules=(_HIDDEN_IS_HEADS,),
    defaults={
        "tie_word_embeddings": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
    },
    tiny_config={
        **{name: value for name, value in GPT_NEOX.tiny_config.items() if name != "intermediate_size"},
        "ffn_dim": 112,
        "word_embed_proj_dim": 64,
        "dropout": 0.0,
    },
)
