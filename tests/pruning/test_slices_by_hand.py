"""The student's tensors against slices that are written out by hand, layout by layout. Nothing here reads a table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from students import random_scores, smaller_everywhere
from torch import Tensor

from hf_capgap import cut
from hf_capgap.pruning import Kept

pytestmark = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny

State = dict[str, Tensor]
HEAD_DIM, HIDDEN, NUM_NEURONS, NUM_QUERY_ROWS, NUM_KEY_ROWS = 8, 64, 112, 64, 32  # of the tiny configs used here


def rows_of(heads: list[int]) -> list[int]:
    return [head * HEAD_DIM + row for head in heads for row in range(HEAD_DIM)]


def gpt2(old: State, kept: Kept) -> State:
    """Conv1D stores [in, out]; c_attn holds all queries, then all keys, then all values."""
    h, new = kept.hidden, {}
    for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"):
        new[f"transformer.{name}"] = old[f"transformer.{name}"][..., h]
    new["lm_head.weight"] = old["lm_head.weight"][:, h]
    for to, layer in enumerate(kept.layers):
        a, b = f"transformer.h.{layer}.", f"transformer.h.{to}."
        q = rows_of(kept.heads[layer])
        qkv = [*q, *(64 + row for row in q), *(128 + row for row in q)]
        n = kept.neurons[layer]
        for norm in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            new[b + norm] = old[a + norm][h]
        new[b + "attn.c_attn.weight"] = old[a + "attn.c_attn.weight"][h][:, qkv]
        new[b + "attn.c_attn.bias"] = old[a + "attn.c_attn.bias"][qkv]
        new[b + "attn.c_proj.weight"] = old[a + "attn.c_proj.weight"][q][:, h]
        new[b + "attn.c_proj.bias"] = old[a + "attn.c_proj.bias"][h]
        new[b + "mlp.c_fc.weight"] = old[a + "mlp.c_fc.weight"][h][:, n]
        new[b + "mlp.c_fc.bias"] = old[a + "mlp.c_fc.bias"][n]
        new[b + "mlp.c_proj.weight"] = old[a + "mlp.c_proj.weight"][n][:, h]
        new[b + "mlp.c_proj.bias"] = old[a + "mlp.c_proj.bias"][h]
    return new


def gpt_neox(old: State, kept: Kept) -> State:
    """query_key_value is [heads, 3, head_dim] by rows: a head's queries, keys and values lie together."""
    h, new = kept.hidden, {}
    for name in ("gpt_neox.embed_in.weight", "lm_head.weight"):
        new[name] = old[name][:, h]
    for name in ("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"):
        new[name] = old[name][h]
    for to, layer in enumerate(kept.layers):
        a, b = f"gpt_neox.layers.{layer}.", f"gpt_neox.layers.{to}."
        heads, n = kept.heads[layer], kept.neurons[layer]
        for name in ("input_layernorm", "post_attention_layernorm"):
            for part in ("weight", "bias"):
                new[f"{b}{name}.{part}"] = old[f"{a}{name}.{part}"][h]
        fused = old[a + "attention.query_key_value.weight"].view(8, 3, HEAD_DIM, HIDDEN)
        new[b + "attention.query_key_value.weight"] = fused[heads].reshape(-1, HIDDEN)[:, h]
        new[b + "attention.query_key_value.bias"] = (
            old[a + "attention.query_key_value.bias"].view(8, 3, HEAD_DIM)[heads].flatten()
        )
        new[b + "attention.dense.weight"] = old[a + "attention.dense.weight"][h][:, rows_of(heads)]
        new[b + "attention.dense.bias"] = old[a + "attention.dense.bias"][h]
        new[b + "mlp.dense_h_to_4h.weight"] = old[a + "mlp.dense_h_to_4h.weight"][n][:, h]
        new[b + "mlp.dense_h_to_4h.bias"] = old[a + "mlp.dense_h_to_4h.bias"][n]
        new[b + "mlp.dense_4h_to_h.weight"] = old[a + "mlp.dense_4h_to_h.weight"][h][:, n]
        new[b + "mlp.dense_4h_to_h.bias"] = old[a + "mlp.dense_4h_to_h.bias"][h]
    return new


def opt(old: State, kept: Kept) -> State:
    """Two rows of positions more than the config says; they all stay."""
    h, new = kept.hidden, {}
    top = "model.decoder."
    for name in (f"{top}embed_tokens.weight", f"{top}embed_positions.weight", "lm_head.weight"):
        new[name] = old[name][:, h]
    assert len(new[f"{top}embed_positions.weight"]) == 66
    for part in ("weight", "bias"):
        new[f"{top}final_layer_norm.{part}"] = old[f"{top}final_layer_norm.{part}"][h]
    for to, layer in enumerate(kept.layers):
        a, b = f"{top}layers.{layer}.", f"{top}layers.{to}."
        q, n = rows_of(kept.heads[layer]), kept.neurons[layer]
        for name, outputs, inputs in (
            ("self_attn.q_proj", q, h),
            ("self_attn.k_proj", q, h),
            ("self_attn.v_proj", q, h),
            ("self_attn.out_proj", h, q),
            ("fc1", n, h),
            ("fc2", h, n),
        ):
            new[f"{b}{name}.weight"] = old[f"{a}{name}.weight"][outputs][:, inputs]
            new[f"{b}{name}.bias"] = old[f"{a}{name}.bias"][outputs]
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            for part in ("weight", "bias"):
                new[f"{b}{name}.{part}"] = old[f"{a}{name}.{part}"][h]
    return new


def phi3(old: State, kept: Kept) -> State:
    """qkv_proj is queries, keys, values by rows; gate_up_proj is all gates, then all ups."""
    new = ends(old, kept)
    h = kept.hidden
    for to, layer in enumerate(kept.layers):
        a, b = f"model.layers.{layer}.", f"model.layers.{to}."
        q, k, n = rows_of(kept.query_heads[layer]), rows_of(kept.heads[layer]), kept.neurons[layer]
        qkv = [*q, *(NUM_QUERY_ROWS + row for row in k), *(NUM_QUERY_ROWS + NUM_KEY_ROWS + row for row in k)]
        new[b + "self_attn.qkv_proj.weight"] = old[a + "self_attn.qkv_proj.weight"][qkv][:, h]
        new[b + "self_attn.o_proj.weight"] = old[a + "self_attn.o_proj.weight"][h][:, q]
        gates_and_ups = [*n, *(NUM_NEURONS + neuron for neuron in n)]
        new[b + "mlp.gate_up_proj.weight"] = old[a + "mlp.gate_up_proj.weight"][gates_and_ups][:, h]
        new[b + "mlp.down_proj.weight"] = old[a + "mlp.down_proj.weight"][h][:, n]
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            new[b + norm] = old[a + norm][h]
    return new


def gemma(old: State, kept: Kept) -> State:
    """The model multiplies embeddings by √hidden: by √42 where the teacher's was √64."""
    new = {**ends(old, kept), **attention(old, kept), **gated_mlp(old, kept)}
    for to, layer in enumerate(kept.layers):
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            name = f"{norm}_layernorm.weight"
            new[f"model.layers.{to}.{name}"] = old[f"model.layers.{layer}.{name}"][kept.hidden]
    factor = (64 / 42) ** 0.5
    embeddings = new["model.embed_tokens.weight"]
    new["model.embed_tokens.weight"] = (embeddings.float() * factor).to(embeddings.dtype)
    if torch.equal(old["lm_head.weight"], old["model.embed_tokens.weight"]):  # tied: the norm before it takes it back
        new["lm_head.weight"] = new["model.embed_tokens.weight"]
        norm = new["model.norm.weight"]
        new["model.norm.weight"] = ((1.0 + norm.float()) / factor - 1.0).to(norm.dtype)
    return new


def gemma3(old: State, kept: Kept) -> State:
    return {**gemma(old, kept), **head_norms(old, kept)}


def mixtral(old: State, kept: Kept) -> State:
    """Experts in one tensor each for gate|up and down, their neurons each its own."""
    new = {**ends(old, kept), **attention(old, kept)}
    h = kept.hidden
    for to, layer in enumerate(kept.layers):
        a, b = f"model.layers.{layer}.", f"model.layers.{to}."
        new[b + "mlp.gate.weight"] = old[a + "mlp.gate.weight"][kept.experts[layer]][:, h]
        gate_up, down = [], []
        for expert, n in zip(kept.experts[layer], kept.neurons[layer], strict=True):
            gate, up = old[a + "mlp.experts.gate_up_proj"][expert].view(2, 32, HIDDEN)
            gate_up.append(torch.cat([gate[n][:, h], up[n][:, h]]))
            down.append(old[a + "mlp.experts.down_proj"][expert][h][:, n])
        new[b + "mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        new[b + "mlp.experts.down_proj"] = torch.stack(down)
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            new[b + norm] = old[a + norm][h]
    return new


def qwen3_moe(old: State, kept: Kept) -> State:
    return {**mixtral(old, kept), **head_norms(old, kept)}


def llama(old: State, kept: Kept) -> State:
    new = {**ends(old, kept), **attention(old, kept), **gated_mlp(old, kept)}
    for to, layer in enumerate(kept.layers):
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            new[f"model.layers.{to}.{name}"] = old[f"model.layers.{layer}.{name}"][kept.hidden]
    return new


def ends(old: State, kept: Kept) -> State:
    return {
        name: old[name][..., kept.hidden]
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    }


def attention(old: State, kept: Kept) -> State:
    new = {}
    for to, layer in enumerate(kept.layers):
        q, k = rows_of(kept.query_heads[layer]), rows_of(kept.heads[layer])
        for name, rows in (("q_proj", q), ("k_proj", k), ("v_proj", k)):
            weight = old[f"model.layers.{layer}.self_attn.{name}.weight"]
            new[f"model.layers.{to}.self_attn.{name}.weight"] = weight[rows][:, kept.hidden]
        weight = old[f"model.layers.{layer}.self_attn.o_proj.weight"]
        new[f"model.layers.{to}.self_attn.o_proj.weight"] = weight[kept.hidden][:, q]
    return new


def gated_mlp(old: State, kept: Kept) -> State:
    new = {}
    for to, layer in enumerate(kept.layers):
        a, b, n = f"model.layers.{layer}.mlp.", f"model.layers.{to}.mlp.", kept.neurons[layer]
        for name in ("gate_proj.weight", "up_proj.weight"):
            new[b + name] = old[a + name][n][:, kept.hidden]
        new[b + "down_proj.weight"] = old[a + "down_proj.weight"][kept.hidden][:, n]
    return new


def head_norms(old: State, kept: Kept) -> State:
    return {
        f"model.layers.{to}.self_attn.{name}.weight": old[f"model.layers.{layer}.self_attn.{name}.weight"]
        for to, layer in enumerate(kept.layers)
        for name in ("q_norm", "k_norm")
    }


BY_HAND: dict[str, Callable[[State, Kept], State]] = {
    "llama": llama,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "opt": opt,
    "phi3": phi3,
    "gemma2": gemma,
    "gemma3_text": gemma3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", BY_HAND)
def test_every_tensor_is_the_slice_written_by_hand(make_model, model_type, tied, dtype):
    """Sliced, never rounded; only Gemma's scaled embeddings get a factor."""
    overrides = {"head_dim": HEAD_DIM} if model_type == "qwen3_moe" else {}
    teacher = make_model(model_type, tie_word_embeddings=tied, **overrides).to(dtype)
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    kept = student.kept
    assert all(kept.heads[layer] != list(range(len(kept.heads[layer]))) for layer in kept.layers)
    expected, found = BY_HAND[model_type](teacher.state_dict(), kept), student.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
