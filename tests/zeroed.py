"""A proof of the cut that shares nothing with `hf_capgap`: a teacher that computes what its student must, by zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from students import ALL_FAMILIES, MIXTURES, others
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_capgap.pruning import Kept


@dataclass(frozen=True)
class Paths:
    """Where a family has what; its `projections` write to the residual stream."""

    layers: str = "model.layers"
    projections: tuple[str, str] = ("self_attn.o_proj", "mlp.down_proj")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "model.norm"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)


GEMMA = Paths(
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
)
PATHS = {
    **dict.fromkeys(ALL_FAMILIES, Paths()),
    "olmo2": Paths(norms=("post_attention_layernorm", "post_feedforward_layernorm")),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": Paths(
        "transformer.h",
        ("attn.c_proj", "mlp.c_proj"),
        ("ln_1", "ln_2"),
        "transformer.ln_f",
        ("transformer.wte", "transformer.wpe"),
    ),
    "gpt_neox": Paths(
        "gpt_neox.layers",
        ("attention.dense", "mlp.dense_4h_to_h"),
        final_norm="gpt_neox.final_layer_norm",
        embeddings=("gpt_neox.embed_in",),
    ),
    "opt": Paths(
        "model.decoder.layers",
        ("self_attn.out_proj", "fc2"),
        ("self_attn_layer_norm", "final_layer_norm"),
        "model.decoder.final_layer_norm",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    ),
}


def zeroed_teacher(teacher: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A copy of the teacher that computes what its student must, by zeros and factors in its weights.

    What writes to removed units is zeroed. An RMSNorm then still divides by all H dimensions instead of the H' kept
    ones, which a factor √(H'/H) on its weight and H'/H on its epsilon undo. No factor can do that to the mean of a
    LayerNorm, nor zeros to a router: they are replaced by their definitions.
    """
    model = copy.deepcopy(teacher).eval()
    paths = PATHS[model.config.model_type]
    removed = others(kept.hidden, model.config.hidden_size)
    for path in paths.embeddings:
        model.get_submodule(path).weight.data[:, removed] = 0.0
    narrow_norm(model, paths.final_norm, kept.hidden)
    for index, layer in enumerate(model.get_submodule(paths.layers)):
        for norm in paths.norms:
            narrow_norm(layer, norm, kept.hidden)
        attention, mlp = paths.projections
        zero_projection(layer.get_submodule(attention), removed if index in kept.layers else slice(None))
        if model.config.model_type not in MIXTURES:
            zero_projection(layer.get_submodule(mlp), removed if index in kept.layers else slice(None))
        else:
            layer.mlp.experts.down_proj.data[:, removed if index in kept.layers else slice(None)] = 0.0
        if index not in kept.layers:  # it adds nothing
            continue
        num_heads = model.config.num_attention_heads
        head_dim = inputs_of(layer.get_submodule(attention)).shape[0] // num_heads
        heads = kept.query_heads[index]
        rows = [head * head_dim + row for head in heads for row in range(head_dim)]
        zero_inputs(layer.get_submodule(attention), rows)
        if model.config.model_type == "olmo2":  # a norm over all query heads, and one over all keys
            keys = [group * head_dim + row for group in kept.heads[index] for row in range(head_dim)]
            for name, entries in (("q", rows), ("k", keys)):
                projection = layer.self_attn.get_submodule(f"{name}_proj")
                projection.weight.data[others(entries, projection.out_features)] = 0.0
                narrow_norm(layer.self_attn, f"{name}_norm", entries)
        if model.config.model_type in MIXTURES:
            for expert, neurons in zip(kept.experts[index], kept.neurons[index], strict=True):
                down = layer.mlp.experts.down_proj.data[expert]  # [hidden, neurons]
                down[:, others(neurons, down.shape[1])] = 0.0
            layer.mlp.gate.forward = router_over(layer.mlp.gate, kept.experts[index])
        else:
            zero_inputs(layer.get_submodule(mlp), kept.neurons[index])
    return model


def inputs_of(projection: nn.Module) -> Tensor:
    """A view of the weight, [in, out]."""
    return projection.weight.data.T if isinstance(projection, nn.Linear) else projection.weight.data


def zero_inputs(projection: nn.Module, kept: list[int]) -> None:
    inputs_of(projection)[others(kept, inputs_of(projection).shape[0])] = 0.0


def zero_projection(projection: nn.Module, outputs: list[int] | slice) -> None:
    inputs_of(projection)[:, outputs] = 0.0
    if projection.bias is not None:
        projection.bias.data[outputs] = 0.0


class KeptLayerNorm(nn.Module):
    """Over the kept entries of the input, zero elsewhere."""

    def __init__(self, norm: nn.LayerNorm, kept: list[int]):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        inside = x[..., self.kept]
        centred = inside - inside.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
        output = torch.zeros_like(x)
        output[..., self.kept] = scaled * self.norm.weight[self.kept] + self.norm.bias[self.kept]
        return output


def narrow_norm(parent: nn.Module, path: str, kept: list[int]) -> None:
    norm = parent.get_submodule(path)
    if isinstance(norm, nn.LayerNorm):
        parent.set_submodule(path, KeptLayerNorm(norm, kept))
        return
    ratio = len(kept) / len(norm.weight)
    offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0  # Gemma multiplies by 1 + weight
    norm.weight.data = (norm.weight.data + offset) * ratio**0.5 - offset
    epsilon = "eps" if hasattr(norm, "eps") else "variance_epsilon"
    setattr(norm, epsilon, getattr(norm, epsilon) * ratio)


def router_over(router: nn.Module, experts: list[int]) -> Callable:
    """The two best of `experts`, by its definition."""

    def forward(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = states.flatten(0, -2) @ router.weight.T
        logits[:, others(experts, logits.shape[1])] = -torch.inf
        chosen = logits.softmax(-1).topk(2)
        return logits, chosen.values / chosen.values.sum(-1, keepdim=True), chosen.indices

    return forward
