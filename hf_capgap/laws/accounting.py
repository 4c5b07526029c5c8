"""What a model costs, from its config alone: parameters, FLOPs and cache bytes, by the axes of its family's table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from scipy.optimize import brentq

from ..errors import LawError
from ..families import Parameter, family_for
from ..families.family import Config

# A backward pass computes the gradient of every product's two factors: twice the forward's products.
TRAINING_OVER_FORWARD = 3
_CUT_AXES = ("hidden", "q_heads", "kv_heads", "neurons")
_SLIDING = "sliding_attention"

# Bytes per kept vocabulary entry (index, log-probability) and per float of the codecs of a teacher cache.
_INDEX_BYTES, _VALUE_BYTES = 4, 2
CACHE_CODECS = {
    "topk": "the k largest log-probabilities with their indices, and the rest's mass",
    "sample": "k sampled indices with their weights",
    "hidden": "the last hidden state; the teacher's head is needed when reading",
    "logits": "all logits, for comparison",
}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of one model that the laws and prices go by.

    Attributes:
        model_type: Its family.
        total: All parameters, tied ones once.
        embedding: Those of token and position embeddings and of the output head, tied ones once.
        active: All parameters without the experts that a token does not visit; `total` without experts.
        num_layers: Decoder layers.
        hidden: Hidden size.
        vocab: Rows of the token embedding.
        attention: Entries of all query heads together (heads x head size).
        largest_block: Parameters of the largest part that FSDP and ZeRO-3 gather at once: a layer or an embedding.
        matmul: Entries of all matrices that a token is multiplied with, of active experts only.
        activation_bytes: Bytes that one layer keeps per token for the backward pass, an estimate (see
            `_activation_bytes`).
        windows: How many tokens each layer's attention looks back at, None for all.
    """

    model_type: str
    total: int
    embedding: int
    active: int
    num_layers: int
    hidden: int
    vocab: int
    attention: int
    largest_block: int
    matmul: int
    activation_bytes: int
    windows: tuple[int | None, ...]

    @property
    def non_embedding(self) -> int:
        """What the scaling laws call N: parameters outside the embeddings and the output head."""
        return self.total - self.embedding

    @property
    def active_non_embedding(self) -> int:
        """`non_embedding` without the experts that a token does not visit."""
        return self.active - self.embedding

    @property
    def has_experts(self) -> bool:
        """Whether a token visits only some of the parameters."""
        return self.active < self.total

    def forward_flops_per_token(self, num_context: int) -> float:
        """FLOPs of a forward pass per token of a sequence of `num_context` tokens: 2 per matrix entry, the output head
        included, and 4·heads·head size per attended token for the products with keys and values.

        Attention is counted as over the whole sequence, as `torch.utils.flop_counter` counts it; kernels that skip the
        masked half need half of that part. Norms, activations and rotations are not counted.
        """
        if num_context < 1:
            raise LawError("A sequence has at least one token", found=num_context)
        attended = sum(min(num_context, window or num_context) for window in self.windows)
        return 2.0 * self.matmul + 4.0 * self.attention * attended

    def training_flops(self, num_tokens: float, num_context: int) -> float:
        """FLOPs of training on `num_tokens`: three times the forward's, without recomputation."""
        return TRAINING_OVER_FORWARD * self.forward_flops_per_token(num_context) * num_tokens

    def inference_flops(self, num_tokens: float, num_context: int) -> float:
        """FLOPs of a teacher's forward passes over `num_tokens`."""
        return self.forward_flops_per_token(num_context) * num_tokens

    def cache_bytes(self, num_tokens: float, codec: str = "topk", num_entries: int = 64) -> float:
        """Bytes of this teacher's outputs for `num_tokens`, before compression.

        Args:
            num_tokens: Tokens cached.
            codec: One of `CACHE_CODECS`.
            num_entries: Entries kept per token by `topk` and `sample`.

        Raises:
            LawError: An unknown codec, or no entries.
        """
        if codec not in CACHE_CODECS:
            raise LawError("Unknown cache codec", found=codec, fix=f"It is one of {', '.join(CACHE_CODECS)}.")
        if num_entries < 1:
            raise LawError("A cache keeps at least one entry per token", found=num_entries)
        entries = min(num_entries, self.vocab) * (_INDEX_BYTES + _VALUE_BYTES)
        per_token = {
            "topk": entries + _VALUE_BYTES,
            "sample": entries,
            "hidden": self.hidden * _VALUE_BYTES,
            "logits": self.vocab * _VALUE_BYTES,
        }
        return float(num_tokens) * per_token[codec]


def measure(config: Config, sizes: Mapping[str, float] | None = None) -> ModelSize:
    """The sizes of the model that `config` describes; no weights and no torch.

    Args:
        config: A `PreTrainedConfig`, or the content of a `config.json`.
        sizes: Other sizes of some axes than the config's.

    Raises:
        UnsupportedModelError: No family table describes this model.
    """
    family = family_for(config)
    sizes = {**family.sizes(config), **(sizes or {})}
    parameters = [(parameter, prod(parameter.shape(sizes))) for parameter in family.parameters_of(config)]
    visited = sizes.get("experts_per_token", 1) / sizes.get("experts", 1)

    def share(parameter: Parameter) -> float:
        """Of a tensor's entries, how many a token visits."""
        return visited if _is_of_experts(parameter) else 1.0

    lookups = set(family.lookups)
    outside = [(parameter, count) for parameter, count in parameters if parameter.layer is None]
    vocabulary = [(parameter, count) for parameter, count in outside if _runs_over_vocabulary(parameter)]
    embeddings = {parameter.name: count for parameter, count in vocabulary}
    embeddings |= {parameter.name: count for parameter, count in outside if parameter.name in lookups}
    matrices = [
        (parameter, count)
        for parameter, count in parameters
        if len(parameter.dimensions) >= 2 and parameter.name not in lookups
    ]
    matmul = sum(count * share(parameter) for parameter, count in matrices)
    if family.tied(config):
        matmul += sizes["vocab"] * sizes["hidden"]
    layer = sum(count for parameter, count in parameters if parameter.layer == 0)
    return ModelSize(
        model_type=family.model_type,
        total=round(family.num_parameters(config, sizes)),
        embedding=round(sum(embeddings.values())),
        active=round(sum(count * share(parameter) for parameter, count in parameters)),
        num_layers=sizes["layers"],
        hidden=round(sizes["hidden"]),
        vocab=sizes["vocab"],
        attention=round(sizes["q_heads"] * sizes["head_dim"]),
        largest_block=round(max(layer, *embeddings.values())),
        matmul=round(matmul),
        activation_bytes=round(_activation_bytes([p for p, _ in parameters if p.layer == 0], sizes)),
        windows=_windows(family.value(config, "layer_types"), family.value(config, "sliding_window"), sizes["layers"]),
    )


def balanced_cut(config: Config, num_parameters: float) -> ModelSize:
    """The student of `num_parameters` that keeps the same fraction of hidden units, heads and neurons of a teacher.

    Its widths are not rounded to legal multiples: sizes for laws and prices, not a shape to cut.

    Args:
        config: The teacher's.
        num_parameters: All of the student's parameters, embeddings included.

    Raises:
        LawError: The student would be larger than the teacher.
    """
    family = family_for(config)
    whole = family.sizes(config)

    def scaled(fraction: float) -> dict[str, float]:
        return {axis: fraction * whole[axis] for axis in _CUT_AXES if axis in whole}

    def excess(fraction: float) -> float:
        return family.num_parameters(config, scaled(fraction)) - num_parameters

    if excess(1.0) < 0:
        raise LawError(
            "A student cannot be cut out of a teacher with fewer parameters",
            found=f"{num_parameters:,.0f} of {family.num_parameters(config):,}",
        )
    return measure(config, scaled(brentq(excess, 0.0, 1.0)))


def _is_of_experts(parameter: Parameter) -> bool:
    """A stack of experts, [experts, .., ..]; the router, [experts, hidden], runs whole."""
    return len(parameter.dimensions) == 3 and "experts" in parameter.dimensions[0].axes


def _runs_over_vocabulary(parameter: Parameter) -> bool:
    return any("vocab" in dimension.axes for dimension in parameter.dimensions)


def _activation_bytes(layer: Sequence[Parameter], sizes: Mapping[str, float]) -> float:
    """Bytes per token that autograd keeps of one layer, with bfloat16 autocast and an attention kernel that keeps no
    scores (an eager one, as Gemma 2's soft-caps need, keeps far more).

    Per unit that a norm runs over 10 bytes (RMSNorm: input and normalised value in float32, output in bfloat16) or 6
    (LayerNorm, known by its bias); 4 per unit of queries, keys, values and attention output; 8 per neuron of a gated
    MLP and 4 of a plain one; with experts 8 per hidden unit of each expert that a token visits, for its copies of
    input and output. What autograd really kept for small models of all families was 0.8 to 1.15 times this.
    """
    heads, groups = (sizes[axis] * sizes["head_dim"] for axis in ("q_heads", "kv_heads"))
    per_head = {"q_norm": heads, "k_norm": groups}  # their weight is shared by all heads
    names = {parameter.name for parameter in layer}
    norm_bytes = 0
    for parameter in layer:
        if len(parameter.dimensions) == 1 and (norm := re.search(r"(\w*norm|ln_\d)\.weight$", parameter.name)):
            width = per_head.get(norm[1], prod(parameter.shape(sizes)))
            norm_bytes += width * (6 if parameter.name.replace("weight", "bias") in names else 10)
    num_uses = sum(  # gate, up and down: 3, and twice two tensors are kept; up and down: 2, and two are kept
        segment.axis == "neurons"
        for parameter in layer
        if len(parameter.dimensions) > 1
        for dimension in parameter.dimensions
        for segment in dimension.segments
    )
    num_visited = sizes.get("experts_per_token", 1)
    neuron_bytes = 4 * (num_uses - 1) * sizes["neurons"] * num_visited
    copy_bytes = 8 * sizes["hidden"] * num_visited if "experts" in sizes else 0
    return norm_bytes + 8 * (heads + groups) + neuron_bytes + copy_bytes


def _windows(layer_types: Any, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    """A config that does not say which layers slide is taken to attend to everything: never too cheap."""
    if not layer_types or window is None:
        return (None,) * num_layers
    return tuple(window if kind == _SLIDING else None for kind in layer_types)
