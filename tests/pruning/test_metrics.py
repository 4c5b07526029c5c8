"""Each metric against its definition, written out here; and what all metrics share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import Batch, num_neurons, split_qkv
from test_scores import DATA_METRICS, assert_same_scores, make_batches
from torch import Tensor
from transformers import PreTrainedModel

from hf_capgap import ExpressiveScores, cut, score, solve_shape
from hf_capgap.errors import ConfigError, ScoresError
from hf_capgap.families import FAMILIES, family_for
from hf_capgap.pruning import METRICS, select
from hf_capgap.pruning.units import score_shapes

# Llama with two query heads to a group, Conv1D, interleaved qkv, fused projections, experts.
MODEL_TYPES = ("llama", "gpt2", "gpt_neox", "phi3", "mixtral")

# The attention, what reads its heads, and what reads the MLP's neurons.
MODULES = {
    "llama": ("self_attn", "o_proj", "mlp.down_proj"),
    "phi3": ("self_attn", "o_proj", "mlp.down_proj"),
    "mixtral": ("self_attn", "o_proj", None),
    "gpt2": ("attn", "c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention", "dense", "mlp.dense_4h_to_h"),
}


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    body = model.base_model
    return body.h if model.config.model_type == "gpt2" else body.layers


def by_unit(model: PreTrainedModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the weights of each unit, float64, from `values` [shape of the weight] by parameter name.

    A weight counts for every unit that it is a row or a column of. Queries and outputs count for their head and for
    its group, keys and values for the group; in families where each query head has its own, for the head, too.
    """
    config, model_type = model.config, model.config.model_type
    queries = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", queries)
    size, num_layers = config.hidden_size, config.num_hidden_layers
    experts = config.num_local_experts if model_type == "mixtral" else 0
    sums = {
        "heads": torch.zeros(num_layers, groups, dtype=torch.float64),
        "query_heads": torch.zeros(num_layers, queries, dtype=torch.float64),
        "neurons": torch.zeros(num_layers, *([experts] if experts else []), num_neurons(config), dtype=torch.float64),
        "hidden": torch.zeros(size, dtype=torch.float64),
        "layers": torch.zeros(num_layers, dtype=torch.float64),
    }
    if experts:
        sums["experts"] = torch.zeros(num_layers, experts, dtype=torch.float64)

    def add_heads(layer: int, rows: Tensor, per_group: bool) -> None:
        """`rows` [heads or groups × head_dim, ..]"""
        by_head = rows.reshape(groups if per_group else queries, -1).sum(1)
        if not per_group:
            sums["query_heads"][layer] += by_head
            by_head = by_head.reshape(groups, -1).sum(1)
        sums["heads"][layer] += by_head

    for full_name, value in values.items():
        value = value.double()
        _, _, below = full_name.partition(".h." if model_type == "gpt2" else ".layers.")
        if not below:
            on_hidden = value if value.dim() == 1 else value.sum(0)  # norms; embeddings and head [vocab, hidden]
            sums["hidden"] += on_hidden
            continue
        number, _, name = below.partition(".")
        layer = int(number)
        sums["layers"][layer] += value.sum()
        if model_type == "gpt2" and value.dim() == 2:
            value = value.T  # [out, in], as everywhere else
        module = name.rpartition(".")[0]
        if "norm" in module or "ln_" in module:
            sums["hidden"] += value
        elif name.endswith("gate_up_proj") and experts:  # [experts, gate and up, hidden]
            sums["neurons"][layer] += value.sum(2).unflatten(1, (2, -1)).sum(1)
            sums["experts"][layer] += value.sum((1, 2))
            sums["hidden"] += value.sum((0, 1))
        elif name.endswith("experts.down_proj"):  # [experts, hidden, neurons]
            sums["neurons"][layer] += value.sum(1)
            sums["experts"][layer] += value.sum((1, 2))
            sums["hidden"] += value.sum((0, 2))
        elif name == "mlp.gate.weight":  # the router, [experts, hidden]
            sums["experts"][layer] += value.sum(1)
            sums["hidden"] += value.sum(0)
        elif module.endswith(("o_proj", "attn.c_proj", "dense")):  # back into the stream
            sums["hidden"] += value if value.dim() == 1 else value.sum(1)
            if value.dim() == 2:
                add_heads(layer, value.T, per_group=False)
        elif module.endswith(("down_proj", "mlp.c_proj", "dense_4h_to_h")):
            sums["hidden"] += value if value.dim() == 1 else value.sum(1)
            if value.dim() == 2:
                sums["neurons"][layer] += value.sum(0)
        else:  # out of the stream: [out, hidden] or [out]
            if value.dim() == 2:
                sums["hidden"] += value.sum(0)
            if module.endswith(("qkv_proj", "c_attn", "query_key_value")):
                for part, rows in zip("qkv", split_qkv(value, config)):
                    add_heads(layer, rows, per_group=part != "q" and groups != queries)
            elif "attn" in module:
                add_heads(layer, value, per_group=not module.endswith("q_proj"))
            else:
                by_neuron = value.reshape(len(value), -1).sum(1)
                parts = 2 if module.endswith("gate_up_proj") else 1
                sums["neurons"][layer] += by_neuron.reshape(parts, -1).sum(0)
    return sums


def gradients_of(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Of the mean cross-entropy of `batch`, float64 plain autograd on the model's own loss, by parameter name."""
    names, parameters = zip(*model.named_parameters())
    logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), batch["labels"][:, 1:].flatten())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("metric", ["taylor", "movement"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_products_of_weights_and_gradients(make_model, model_type, metric):
    """|w·∂L/∂w|, or -w·∂L/∂w, summed over the weights of each unit; the mean over batches."""
    model, batches = make_model(model_type), make_batches()
    expected: dict[str, Tensor] = {}
    for batch in batches:
        products = {name: model.get_parameter(name).detach() * g for name, g in gradients_of(model, batch).items()}
        values = {name: p.abs() if metric == "taylor" else -p for name, p in products.items()}
        for name, total in by_unit(model, values).items():
            expected[name] = expected.get(name, 0.0) + total / len(batches)
    assert_same_scores(score(model, batches, metric=metric), expected, tolerance=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_magnitudes(make_model, model_type):
    """The L2 and the L1 norm of all weights of a unit."""
    model = make_model(model_type)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    squares = by_unit(model, {name: weight.square() for name, weight in weights.items()})
    assert_same_scores(score(model, metric="magnitude"), {name: total.sqrt() for name, total in squares.items()})
    sums = by_unit(model, {name: weight.abs() for name, weight in weights.items()})
    assert_same_scores(score(model, metric="magnitude_l1"), sums)


def test_magnitudes_by_hand(make_model):
    """Of a model whose weights are all one: the number of weights that each unit owns, and its square root."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    counts = {"heads": 2 * 8 * 64 * 2 + 2 * 8 * 64, "query_heads": 2 * 8 * 64, "neurons": 3 * 64}
    l1, l2 = score(model, metric="magnitude_l1"), score(model, metric="magnitude")
    for name, count in counts.items():
        assert getattr(l1, name).unique().tolist() == [count]
        torch.testing.assert_close(getattr(l2, name).unique(), torch.tensor([count**0.5]))
    per_layer = 64 + 64 + 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 112
    on_hidden = 2 * 96 + 1 + 4 * (2 + 64 * 2 + 32 * 2 + 3 * 112)
    assert l1.layers.unique().tolist() == [per_layer]
    assert l1.hidden.unique().tolist() == [on_hidden]


def mean_squares(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Of every unit's activations over the tokens of `batch`: a head's are the entries of its output, a layer's those
    of both branches' outputs, a hidden dimension's those of the stream at every point and of each branch's output.
    """
    config, layers = model.config, layers_of(model)
    attention, heads, neurons = MODULES[config.model_type]
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []

    def watch(index: int, name: str, module: torch.nn.Module, *, inputs: bool) -> None:
        def keep(_: torch.nn.Module, args: tuple, kwargs: dict, output) -> None:
            values = (args[0] if args else kwargs["hidden_states"]) if inputs else output
            seen[index, name] = values[0] if isinstance(values, tuple) and name != "router" else values

        handles.append(module.register_forward_hook(keep, with_kwargs=True))

    for index, layer in enumerate(layers):
        watch(index, "stream", layer, inputs=True)
        watch(index, "attention", layer.get_submodule(attention), inputs=False)
        watch(index, "heads", layer.get_submodule(f"{attention}.{heads}"), inputs=True)
        watch(index, "mlp", layer.mlp, inputs=False)
        if neurons is not None:
            watch(index, "neurons", layer.get_submodule(neurons), inputs=True)
        else:
            watch(index, "mlp input", layer.mlp, inputs=True)
            watch(index, "router", layer.mlp.gate, inputs=False)
    with torch.no_grad():
        model.eval()(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()

    def mean(values: Tensor) -> Tensor:  # [batch, length, ..] -> [..]
        return values.double().square().mean((0, 1))

    found: dict[str, list[Tensor]] = {name: [] for name in ("query_heads", "heads", "neurons", "layers", "experts")}
    hidden = mean(seen[0, "stream"])
    for index, layer in enumerate(layers):
        stream, attended, added = (seen[index, name] for name in ("stream", "attention", "mlp"))
        if not getattr(config, "use_parallel_residual", False):
            hidden = hidden + mean(stream + attended)
        hidden = hidden + mean(attended) + mean(added) + mean(stream + attended + added)
        found["layers"].append((mean(attended) + mean(added)).sum())
        queries = mean(seen[index, "heads"]).reshape(config.num_attention_heads, -1).sum(1)
        groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
        found["query_heads"].append(queries)
        found["heads"].append(queries.reshape(groups, -1).sum(1))
        if neurons is not None:
            found["neurons"].append(mean(seen[index, "neurons"]))
            continue
        _, shares, chosen = seen[index, "router"]
        states, experts = seen[index, "mlp input"].flatten(0, 1), layer.mlp.experts
        of_neurons, of_experts = [], []
        for expert in range(config.num_local_experts):
            share = (shares * (chosen == expert)).sum(1)[:, None]  # 0 where another expert was chosen
            gate, up = (states @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            activation = torch.nn.functional.silu(gate) * up * (share != 0)
            output = share * (activation @ experts.down_proj[expert].T)
            of_neurons.append(activation.double().square().mean(0).detach())
            of_experts.append(output.double().square().mean(0).sum().detach())
        found["neurons"].append(torch.stack(of_neurons))
        found["experts"].append(torch.stack(of_experts))
    return {"hidden": hidden, **{name: torch.stack(parts) for name, parts in found.items() if parts}}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_activations(make_model, model_type):
    """The root mean square over the tokens of a batch; the mean over batches."""
    model, batches = make_model(model_type), make_batches()
    expected: dict[str, Tensor] = {}
    for batch in batches:
        for name, square in mean_squares(model, batch).items():
            expected[name] = expected.get(name, 0.0) + square.sqrt() / len(batches)
    assert_same_scores(score(model, batches, metric="activation"), expected)


def test_random_scores_are_of_their_seed_alone(make_model):
    scores = score(make_model("mixtral"), metric="random", seed=3)
    assert_same_scores(score(make_model("mixtral", seed=1), metric="random", seed=3), scores, tolerance=1e-12)
    assert_same_scores(
        score(make_model("mixtral"), metric="random"), score(make_model("mixtral"), metric="random", seed=0)
    )
    for name, values in scores.tensors().items():
        other = getattr(score(make_model("mixtral"), metric="random", seed=4), name)
        assert not torch.equal(values, other)
        assert ((values >= 0) & (values < 1)).all()
    assert abs(scores.neurons.mean() - 0.5) < 0.05
    assert scores.neurons.flatten().unique().numel() > 0.99 * scores.neurons.numel()


# --- what all metrics share ----------------------------------------------------------------------------------------


def declared_shapes(config) -> dict[str, tuple[int, ...]]:
    layers, queries = config.num_hidden_layers, config.num_attention_heads
    experts = {"mixtral": 4, "qwen3_moe": 4}.get(config.model_type)
    shapes = {
        "heads": (layers, getattr(config, "num_key_value_heads", queries)),
        "neurons": (layers, *([experts] if experts else []), num_neurons(config)),
        "hidden": (config.hidden_size,),
        "query_heads": (layers, queries),
        "layers": (layers,),
    }
    return {**shapes, "experts": (layers, experts)} if experts else shapes


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_metric_scores_every_family_in_the_declared_shapes(make_model, model_type, metric):
    model = make_model(model_type)
    scores = score(model, make_batches(1, batch_size=1), metric=metric)
    shapes = {name: tuple(tensor.shape) for name, tensor in scores.tensors().items()}
    assert shapes == declared_shapes(model.config) == score_shapes(family_for(model.config), model.config)
    assert {tensor.dtype for tensor in scores.tensors().values()} == {torch.float32}
    scores.check_finite()
    assert (scores.metric, scores.model_type) == (metric, model_type)
    if metric != "movement":  # which has a sign
        assert all((tensor >= 0).all() and tensor.max() > 0 for tensor in scores.tensors().values())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_every_metric_has_the_same_file_selection_and_merge(make_model, tmp_path, model_type, metric):
    model, batches = make_model(model_type), make_batches(3)
    scores = score(model, batches, metric=metric)
    scores.save(tmp_path / "scores.safetensors")
    loaded = ExpressiveScores.load(tmp_path / "scores.safetensors")
    assert_same_scores(loaded, scores, tolerance=1e-12)
    assert loaded.metric == metric
    merged = ExpressiveScores.merge([score(model, [batch], metric=metric) for batch in batches])
    assert_same_scores(merged, scores)
    assert merged.num_units == 3
    shape = solve_shape(model.config, "60%")
    kept = select(loaded, shape, model.config)
    assert kept.hidden == sorted(scores.hidden.argsort(descending=True)[: shape.hidden_size].tolist())
    assert cut(model, loaded, shape).kept == kept


def test_metrics_do_not_agree(make_model):
    """Otherwise some of them would be another under a second name."""
    model, batches = make_model(), make_batches()
    rankings = {metric: tuple(score(model, batches, metric=metric).hidden.argsort().tolist()) for metric in METRICS}
    assert len(set(rankings.values())) == len(METRICS)


def test_metrics_without_data_leave_the_batches_alone(make_model):
    model, batches = make_model(), iter(make_batches(2))
    for metric in ("magnitude", "magnitude_l1", "random"):
        scores = score(model, batches, metric=metric)
        assert scores.num_units == 1
        assert_same_scores(score(model, metric=metric), scores, tolerance=1e-12)
    assert len(list(batches)) == 2


@pytest.mark.parametrize("metric", DATA_METRICS)
def test_metrics_of_data_are_refused_without(make_model, metric):
    with pytest.raises(ConfigError, match=rf"'{metric}' needs calibration batches.*batches="):
        score(make_model(), metric=metric)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "random"])
def test_a_seed_without_effect_is_refused(make_model, metric):
    with pytest.raises(ConfigError, match=rf"'{metric}' takes no seed"):
        score(make_model(), make_batches(1), metric=metric, seed=1)


def test_refusals_name_the_choices(make_model):
    with pytest.raises(ConfigError, match=r"Unknown metric.*beauty.*" + ".*".join(METRICS)):
        score(make_model(), make_batches(1), metric="beauty")
    with pytest.raises(ConfigError, match=r"Unknown unit.*token.*batch.*example"):
        score(make_model(), make_batches(1), unit="token")


def test_a_metric_is_not_merged_with_another(make_model):
    scores = score(make_model(), metric="magnitude")
    with pytest.raises(ScoresError, match="different metrics"):
        ExpressiveScores.merge([scores, replace(scores, metric="magnitude_l1")])
