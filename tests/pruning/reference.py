"""Scores by their definition: decoders of every family written out in float64 with explicit gates, and autograd.

Nothing here is shared with the package but the models' weights and configs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

Batch = dict[str, Tensor]

# Norms of a layer: before and after the attention, before and after the MLP.
NORMS = {
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "llama": ("input_layernorm", None, "post_attention_layernorm", None),
}
NORMS["gemma3_text"] = NORMS["gemma2"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * x.sigmoid(),
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}

# Llama's names for what the others call differently.
RENAMED = {
    "gpt2": [
        (r"transformer\.wte", "model.embed_tokens"),
        (r"transformer\.wpe", "model.positions"),
        (r"transformer\.h\.", "model.layers."),
        (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."),
        (r"\.attn\.c_attn", ".self_attn.qkv_proj"),
        (r"\.attn\.c_proj", ".self_attn.o_proj"),
        (r"\.mlp\.c_fc", ".mlp.up_proj"),
        (r"\.mlp\.c_proj", ".mlp.down_proj"),
        (r"transformer\.ln_f", "model.norm"),
    ],
    "gpt_neox": [
        (r"gpt_neox\.embed_in", "model.embed_tokens"),
        (r"gpt_neox\.layers", "model.layers"),
        (r"\.attention\.query_key_value", ".self_attn.qkv_proj"),
        (r"\.attention\.dense", ".self_attn.o_proj"),
        (r"\.mlp\.dense_h_to_4h", ".mlp.up_proj"),
        (r"\.mlp\.dense_4h_to_h", ".mlp.down_proj"),
        (r"gpt_neox\.final_layer_norm", "model.norm"),
    ],
    "opt": [
        (r"model\.decoder\.final_layer_norm", "model.norm"),
        (r"model\.decoder\.embed_positions", "model.positions"),
        (r"model\.decoder\.", "model."),
        (r"\.self_attn_layer_norm", ".input_layernorm"),
        (r"\.final_layer_norm", ".post_attention_layernorm"),
        (r"\.out_proj", ".o_proj"),
        (r"\.fc1", ".mlp.up_proj"),
        (r"\.fc2", ".mlp.down_proj"),
    ],
}


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Float64 weights under Llama's names, each [out, in], fused projections taken apart."""
    config, model_type = model.config, model.config.model_type
    weights = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.double()
        for theirs, ours in RENAMED.get(model_type, ()):
            name = re.sub(theirs, ours, name)
        if model_type == "gpt2" and tensor.dim() == 2 and ".layers." in name:
            tensor = tensor.T  # Conv1D
        if ".qkv_proj." in name:
            for part, rows in zip("qkv", split_qkv(tensor, config)):
                weights[name.replace("qkv", part)] = rows
        elif ".mlp.gate_up_proj." in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2)):
                weights[name.replace("gate_up", part)] = rows
        else:
            weights[name] = tensor
    return weights


def split_qkv(fused: Tensor, config) -> tuple[Tensor, ...]:
    """Rows of the queries, keys and values."""
    if config.model_type == "gpt_neox":  # head by head, each with its queries, keys and values
        by_head = fused.unflatten(0, (config.num_attention_heads, 3, -1))
        return tuple(by_head[:, i].flatten(0, 1) for i in range(3))
    if config.model_type == "gpt2":
        return fused.chunk(3)
    head_dim = config.head_dim
    return fused.split(
        [head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    )


def head_counts(config) -> tuple[int, int]:
    """Query heads, KV groups."""
    queries = config.num_attention_heads
    return queries, getattr(config, "num_key_value_heads", None) or queries


def num_experts(config) -> int | None:
    names = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}
    return getattr(config, names.get(config.model_type, ""), None)


def num_neurons(config) -> int:
    names = {"gpt2": "n_inner", "opt": "ffn_dim", "qwen3_moe": "moe_intermediate_size"}
    return getattr(config, names.get(config.model_type, "intermediate_size"))


def gates_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A gate of 1 on every unit, float64; several of them may act on the same activation."""
    config = model.config
    layers, (queries, groups), experts = config.num_hidden_layers, head_counts(config), num_experts(config)
    shapes = {
        "heads": (layers, groups),
        "query_heads": (layers, queries),
        "neurons": (layers, *([experts] if experts else []), num_neurons(config)),
        "hidden": (config.hidden_size,),
        "layers": (layers,),
        **({"experts": (layers, experts)} if experts else {}),
    }
    return {name: torch.ones(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}


class GatedDecoder:
    """`model` computed anew in float64, with every gate multiplied in.

    The one hidden gate acts on the input of the first layer, each branch's output, and each residual sum.
    """

    def __init__(self, model: PreTrainedModel):
        self.config, self.weights = model.config, weights_of(model)
        self.norms = NORMS.get(model.config.model_type, NORMS["llama"])
        names = ("hidden_act", "activation_function", "hidden_activation")
        self.activation = ACTIVATIONS[
            next(getattr(model.config, name) for name in names if hasattr(model.config, name))
        ]

    def logits(self, batch: Batch, gates: dict[str, Tensor]) -> Tensor:
        """[batch, length, vocab]"""
        x = self.embed(batch) * gates["hidden"]
        for layer in range(self.config.num_hidden_layers):
            path = f"model.layers.{layer}"
            before_attention, after_attention, before_mlp, after_mlp = (
                name and f"{path}.{name}" for name in self.norms
            )
            added = self.attend(layer, self.norm(x, before_attention), batch, gates)
            added = self.norm(added, after_attention) * gates["hidden"] * gates["layers"][layer]
            if getattr(self.config, "use_parallel_residual", False):
                stream = x
                x = x + added
            else:
                stream = x = (x + added) * gates["hidden"]
            added = self.mlp(layer, self.norm(stream, before_mlp), gates)
            added = self.norm(added, after_mlp) * gates["hidden"] * gates["layers"][layer]
            x = (x + added) * gates["hidden"]
        head = "lm_head" if "lm_head.weight" in self.weights else "model.embed_tokens"
        return softcap(
            self.linear(self.norm(x, "model.norm"), head), getattr(self.config, "final_logit_softcapping", None)
        )

    def embed(self, batch: Batch) -> Tensor:
        """The input of the first layer, [batch, length, hidden]."""
        x = self.weights["model.embed_tokens.weight"][batch["input_ids"]]
        if self.config.model_type.startswith("gemma"):
            x = x * float(torch.tensor(self.config.hidden_size**0.5))
        if "model.positions.weight" in self.weights:
            positions = batch.get("position_ids", torch.arange(x.shape[1]))
            if self.config.model_type == "opt":
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                positions = mask.cumsum(1) * mask - 1 + 2
            x = x + self.weights["model.positions.weight"][positions]
        return x

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, x: Tensor, name: str | None) -> Tensor:
        """RMSNorm, or LayerNorm where there is no `rms_norm_eps`; nothing without a name."""
        if name is None:
            return x
        weight, eps = self.weights[f"{name}.weight"], getattr(self.config, "rms_norm_eps", None)
        if eps is None:
            names = ("layer_norm_epsilon", "layer_norm_eps")
            eps = next((getattr(self.config, name) for name in names if hasattr(self.config, name)), 1e-5)
            x = x - x.mean(-1, keepdim=True)
        if self.config.model_type.startswith("gemma"):
            weight = 1.0 + weight
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight + self.weights.get(f"{name}.bias", 0.0)

    def attend(self, layer: int, x: Tensor, batch: Batch, gates: dict[str, Tensor]) -> Tensor:
        """The output of the attention, with gates on the heads' outputs, [batch, length, hidden]."""
        config, path = self.config, f"model.layers.{layer}.self_attn"
        num_queries, num_groups = head_counts(config)
        q, k, v = (self.linear(x, f"{path}.{name}_proj") for name in "qkv")
        if config.model_type == "olmo2":  # a norm over all heads at once
            q, k = self.norm(q, f"{path}.q_norm"), self.norm(k, f"{path}.k_norm")
        q, k, v = (t.unflatten(-1, (n, -1)) for t, n in ((q, num_queries), (k, num_groups), (v, num_groups)))
        if config.model_type in ("qwen3", "qwen3_moe", "gemma3_text"):  # a norm inside each head
            q, k = self.norm(q, f"{path}.q_norm"), self.norm(k, f"{path}.k_norm")
        if "model.positions.weight" not in self.weights and getattr(config, "no_rope_layers", [1] * 99)[layer]:
            q, k = (rotate(t, rope_of(config, layer)) for t in (q, k))
        k, v = (t.repeat_interleave(num_queries // num_groups, dim=2) for t in (k, v))
        scale = (getattr(config, "query_pre_attn_scalar", None) or q.shape[-1]) ** -0.5
        weight = softcap(
            torch.einsum("bqhd,bkhd->bhqk", q, k) * scale, getattr(config, "attn_logit_softcapping", None)
        )
        weight = weight.masked_fill(~self.visible(layer, batch), float("-inf")).softmax(-1)
        heads = torch.einsum("bhqk,bkhd->bqhd", weight, v)
        gate = gates["heads"][layer].repeat_interleave(num_queries // num_groups) * gates["query_heads"][layer]
        return self.linear((heads * gate[:, None]).flatten(2), f"{path}.o_proj")

    def visible(self, layer: int, batch: Batch) -> Tensor:
        """Which keys each query sees, broadcastable to [batch, heads, length, length]."""
        length = batch["input_ids"].shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)  # query position minus key position
        visible = (distance >= 0) & (distance < self.window(layer))
        if "attention_mask" in batch:
            visible = visible & batch["attention_mask"][:, None, None, :].bool() | torch.eye(length).bool()
        return visible

    def window(self, layer: int) -> int:
        config = self.config
        layer_types = getattr(config, "layer_types", None)
        if layer_types is None:  # a window everywhere or nowhere
            slides = getattr(config, "sliding_window", None) is not None
        else:
            slides = layer_types[layer] == "sliding_attention"
        return config.sliding_window if slides else config.max_position_embeddings

    def mlp(self, layer: int, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
        path, neurons = f"model.layers.{layer}.mlp", gates["neurons"][layer]
        if "experts" in gates:
            return self.experts(path, x, neurons, gates["experts"][layer])
        up = self.linear(x, f"{path}.up_proj")
        if f"{path}.gate_proj.weight" in self.weights:
            up = self.activation(self.linear(x, f"{path}.gate_proj")) * up
        else:
            up = self.activation(up)
        return self.linear(up * neurons, f"{path}.down_proj")

    def experts(self, path: str, x: Tensor, neurons: Tensor, experts: Tensor) -> Tensor:
        """Every expert on every token; those that the router does not choose weigh nothing."""
        probabilities = self.linear(x, f"{path}.gate").softmax(-1)
        chosen = probabilities.topk(self.config.num_experts_per_tok).indices
        share = probabilities * torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        if getattr(self.config, "norm_topk_prob", True):
            share = share / share.sum(-1, keepdim=True)
        gate_up, down = (self.weights[f"{path}.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
        output = 0.0
        for expert in range(len(down)):
            gate, up = (x @ gate_up[expert].T).chunk(2, dim=-1)
            activation = self.activation(gate) * up * neurons[expert]
            output = output + share[..., expert, None] * (activation @ down[expert].T) * experts[expert]
        return output


def softcap(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else limit * torch.tanh(x / limit)


def rope_of(config, layer: int) -> dict:
    rope = config.rope_parameters
    return rope if "rope_theta" in rope else rope[config.layer_types[layer]]


def rotate(x: Tensor, rope: dict) -> Tensor:
    """Rotary positions: the pair (i, i + n / 2) of the first n entries turns by position / theta^(2i / n)."""
    width = int(x.shape[-1] * rope.get("partial_rotary_factor", 1.0))
    half = width // 2
    angle = torch.arange(x.shape[1]).double()[:, None] * rope["rope_theta"] ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:width]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., width:]], dim=-1)


def reference_scores(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over `batches` of |∂ mean cross-entropy of the batch / ∂ gate|, by autograd."""
    decoder, batches = GatedDecoder(model), list(batches)
    totals: dict[str, Tensor] = {}
    for batch in batches:
        gates = gates_of(model)
        log_probabilities = decoder.logits(batch, gates)[:, :-1].log_softmax(-1)
        targets = batch["labels"][:, 1:]
        valid = targets != -100
        loss = -log_probabilities[valid].gather(-1, targets[valid][:, None]).mean()
        for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values()))):
            totals[name] = totals.get(name, 0.0) + gradient.abs() / len(batches)
    return totals
