"""From scores to kept indices: what is ranked where, how layers are chosen, and how selections compose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig

from hf_capgap import ExpressiveScores, StudentShape, cut, score, verify
from hf_capgap.errors import CheckpointError, ScoresError, ShapeError
from hf_capgap.families import FAMILIES, family_for
from hf_capgap.pruning import Kept, select
from hf_capgap.pruning.units import score_shapes


def config_of(model_type: str = "llama", **overrides: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**FAMILIES[model_type].tiny_config, **overrides})


def random_scores(config: PreTrainedConfig, seed: int = 0) -> ExpressiveScores:
    generator = torch.Generator().manual_seed(seed)
    shapes = score_shapes(family_for(config), config)
    return ExpressiveScores(
        **{name: torch.rand(shape, generator=generator) for name, shape in shapes.items()},
        metric="expressive",
        unit="batch",
        num_units=1,
        model_type=config.model_type,
        model_name="",
        calibration_hash="0" * 64,
    )


def top(values: torch.Tensor, count: int) -> list[int]:
    """The slow way: the `count` best, of equals the first."""
    ranked = sorted(range(len(values)), key=lambda i: (-float(values[i]), i))
    return sorted(ranked[:count])


def shape_of(config: PreTrainedConfig, **sizes: int) -> StudentShape:
    return replace(StudentShape.of(config), **sizes)


# --- heads, neurons, hidden, experts -------------------------------------------------------------------------------


def test_each_layer_ranks_its_own_heads_and_neurons():
    config = config_of()
    scores = random_scores(config)
    shape = shape_of(config, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=40)
    kept = select(scores, shape, config)
    assert kept.hidden == top(scores.hidden, 48)
    assert kept.layers == [0, 1, 2, 3]
    for layer in range(4):
        assert kept.heads[layer] == top(scores.heads[layer], 3)
        assert kept.neurons[layer] == top(scores.neurons[layer], 40)
        assert kept.query_heads[layer] == [2 * group + i for group in kept.heads[layer] for i in (0, 1)]
    assert len({tuple(units) for units in kept.heads.values()}) > 1  # not the same in every layer
    assert kept.experts is None


def test_the_scale_of_a_layers_scores_does_not_matter():
    config = config_of()
    scores = random_scores(config)
    shape = shape_of(config, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40)
    kept = select(scores, shape, config)
    factors = torch.tensor([1e-6, 1.0, 1e6, 3.0])[:, None]
    scaled = replace(scores, heads=scores.heads * factors, neurons=scores.neurons * factors)
    assert select(scaled, shape, config) == kept == select(scores.normalized(), shape, config)


def test_query_heads_are_ranked_inside_their_groups():
    """Every kept group keeps as many, even if another group's are all better."""
    config = config_of(num_attention_heads=8, num_key_value_heads=2)
    scores = random_scores(config)
    scores.query_heads[0] = torch.tensor([0.1, 0.4, 0.3, 0.2, 5.0, 8.0, 6.0, 7.0])
    kept = select(scores, shape_of(config, num_attention_heads=4, num_key_value_heads=2), config)
    assert kept.heads[0] == [0, 1]
    assert kept.query_heads[0] == [1, 2, 5, 7]
    scores.heads[0] = torch.tensor([1.0, 2.0])
    kept = select(scores, shape_of(config, hidden_size=63, num_attention_heads=3, num_key_value_heads=1), config)
    assert kept.heads[0] == [1]
    assert kept.query_heads[0] == [5, 6, 7]


def test_each_expert_ranks_its_own_neurons():
    config = config_of("mixtral")
    scores = random_scores(config)
    kept = select(scores, shape_of(config, num_experts=3, intermediate_size=8), config)
    for layer in range(4):
        assert kept.experts[layer] == top(scores.experts[layer], 3)
        assert kept.neurons[layer] == [top(scores.neurons[layer, expert], 8) for expert in kept.experts[layer]]
    assert len({tuple(units) for units in kept.neurons[0]}) == 3
    sizes = family_for(config).sizes(config)
    second = kept.experts[1][2]
    assert kept.units(sizes, 1, second)["neurons"] == kept.neurons[1][2]
    assert kept.units(sizes, 1)["experts"] == kept.experts[1]
    assert "neurons" not in kept.units(sizes, 1)
    every_expert = select(scores, shape_of(config, num_experts=None, intermediate_size=8), config)
    assert every_expert.experts == {layer: [0, 1, 2, 3] for layer in range(4)}


def test_of_equal_scores_the_lower_index_stays():
    config = config_of("mixtral")
    scores = random_scores(config)
    for values in scores.tensors().values():
        values.fill_(0.25)
    shape = shape_of(config, hidden_size=40, num_attention_heads=3, num_key_value_heads=3, intermediate_size=8)
    kept = select(scores, replace(shape, num_experts=2, num_hidden_layers=3), config, layers="scores")
    assert kept.hidden == list(range(40))
    assert kept.layers == [0, 1, 2]
    for layer in kept.layers:
        assert kept.heads[layer] == [0, 1, 2]
        assert kept.query_heads[layer] == [0, 2, 4]
        assert kept.experts[layer] == [0, 1]
        assert kept.neurons[layer] == [list(range(8))] * 2
    scores.hidden[63] = 1.0  # only what is better comes first
    assert select(scores, shape, config).hidden == [*range(39), 63]


def test_negative_scores_rank_below_zero():
    """Movement has a sign."""
    config = config_of()
    scores = random_scores(config)
    scores.heads[0] = torch.tensor([-3.0, 0.0, -1.0, -2.0])
    kept = select(scores, shape_of(config, num_attention_heads=4, num_key_value_heads=2), config)
    assert kept.heads[0] == [1, 2]


# --- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "count", "protect_ends", "expected"),
    [
        (4, 4, False, [0, 1, 2, 3]),
        (4, 3, False, [0, 1, 2]),  # an odd number: the last end loses one more
        (4, 2, False, [1, 2]),
        (4, 1, False, [1]),
        (7, 4, False, [1, 2, 3, 4]),
        (7, 3, False, [2, 3, 4]),
        (7, 1, False, [3]),
        (1, 1, False, [0]),
        (1, 1, True, [0]),
        (2, 2, True, [0, 1]),
        (3, 2, True, [0, 2]),
        (4, 4, True, [0, 1, 2, 3]),
        (4, 3, True, [0, 1, 3]),
        (4, 2, True, [0, 3]),
        (7, 4, True, [0, 2, 3, 6]),
        (7, 5, True, [0, 2, 3, 4, 6]),
        (7, 3, True, [0, 3, 6]),
    ],
)
def test_symmetric_layers(available, count, protect_ends, expected):
    config = config_of(num_hidden_layers=available)
    shape = shape_of(config, num_hidden_layers=count)
    kept = select(random_scores(config), shape, config, protect_ends=protect_ends)
    assert kept.layers == expected
    assert kept.heads.keys() == kept.neurons.keys() == set(expected)


@pytest.mark.parametrize(
    ("values", "count", "protect_ends", "expected"),
    [
        ([0.1, 0.9, 0.5, 0.7, 0.3], 3, False, [1, 2, 3]),
        ([0.9, 0.1, 0.5, 0.2, 0.8], 3, False, [0, 2, 4]),
        ([0.1, 0.9, 0.5, 0.7, 0.3], 3, True, [0, 1, 4]),
        ([0.1, 0.9, 0.5, 0.7, 0.3], 2, True, [0, 4]),
        ([0.1, 0.9, 0.5, 0.7, 0.3], 5, True, [0, 1, 2, 3, 4]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 3, False, [0, 1, 2]),
        ([0.1, 0.9, 0.5, 0.7, 0.3], 1, False, [1]),
        ([0.1, 0.9], 2, True, [0, 1]),
        ([0.1], 1, True, [0]),
    ],
)
def test_layers_by_their_scores(values, count, protect_ends, expected):
    config = config_of(num_hidden_layers=len(values))
    scores = replace(random_scores(config), layers=torch.tensor(values))
    shape = shape_of(config, num_hidden_layers=count)
    assert select(scores, shape, config, layers="scores", protect_ends=protect_ends).layers == expected


@pytest.mark.parametrize("layers", [[3, 0], (0, 3), np.array([0, 3]), torch.tensor([3, 0]), range(0, 4, 3)])
def test_layers_that_are_named(layers):
    config = config_of()
    kept = select(random_scores(config), shape_of(config, num_hidden_layers=2), config, layers=layers)
    assert kept.layers == [0, 3]
    assert all(type(layer) is int for layer in kept.layers)


@pytest.mark.parametrize(
    ("layers", "protect_ends", "message"),
    [
        ([0], False, "must be 2 different"),
        ([0, 1, 2], False, "must be 2 different"),
        ([1, 1], False, "must be 2 different"),
        ([1, 1, 2], False, "must be 2 different"),
        ([2, 4], False, "must be 2 different indices below 4"),
        ([-1, 2], False, "must be 2 different"),
        ([], False, "must be 2 different"),
        ([0, 2], True, "leave out a protected end"),
        ("first", False, "Unknown way to choose layers"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, protect_ends, message):
    config = config_of()
    shape = shape_of(config, num_hidden_layers=2)
    with pytest.raises(ShapeError, match=message):
        select(random_scores(config), shape, config, layers=layers, protect_ends=protect_ends)


@pytest.mark.parametrize("layers", ["symmetric", "scores", [0]])
def test_one_layer_cannot_be_both_ends(layers):
    config = config_of()
    shape = shape_of(config, num_hidden_layers=1)
    with pytest.raises(ShapeError, match="[Pp]rotected end"):
        select(random_scores(config), shape, config, layers=layers, protect_ends=True)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_scores_that_a_cut_needs_must_be_there():
    """And only those: scores of an older file do for what they hold."""
    config = config_of("mixtral")
    old = replace(random_scores(config), query_heads=None, experts=None, layers=None)
    assert len(select(old, shape_of(config, hidden_size=40, intermediate_size=8), config).hidden) == 40
    for name, sizes, options in [
        ("query_heads", {"num_attention_heads": 4, "num_key_value_heads": 4}, {}),
        ("experts", {"num_experts": 3}, {}),
        ("layers", {"num_hidden_layers": 3}, {"layers": "scores"}),
    ]:
        with pytest.raises(ScoresError, match=f"none of {name}, which this cut needs.*Score again"):
            select(old, shape_of(config, **sizes), config, **options)


@pytest.mark.parametrize("name", ["heads", "neurons", "hidden", "query_heads", "experts", "layers"])
def test_scores_of_other_sizes_or_types_are_refused(name):
    config = config_of("mixtral")
    shape, scores = StudentShape.of(config), random_scores(config)
    values = getattr(scores, name)
    for wrong in (values[..., :-1], values[None], torch.cat([values, values])):
        with pytest.raises(ScoresError, match="another model.*Score this teacher"):
            select(replace(scores, **{name: wrong}), shape, config)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = values.clone()
        broken.view(-1)[-1] = bad
        with pytest.raises(ScoresError, match=f"Non-finite scores of {name}"):
            select(replace(scores, **{name: broken}), shape, config)


def test_scores_of_another_family_are_refused():
    """Even of the same sizes."""
    config = config_of()
    with pytest.raises(ScoresError, match=r"this llama.*\(mistral\)"):
        select(replace(random_scores(config), model_type="mistral"), StudentShape.of(config), config)
    experts = random_scores(config_of("mixtral")).experts
    with pytest.raises(ScoresError, match="another model"):
        select(replace(random_scores(config), experts=experts), StudentShape.of(config), config)


@pytest.mark.parametrize("sizes", [{"hidden_size": 128}, {"num_attention_heads": 5}, {"num_hidden_layers": 0}])
def test_shapes_that_do_not_fit_are_refused(sizes):
    config = config_of()
    with pytest.raises(ShapeError, match="nearest legal shape"):
        select(random_scores(config), shape_of(config, **sizes), config)


# --- kept indices --------------------------------------------------------------------------------------------------


def subsets(size: int, count: int) -> st.SearchStrategy[list[int]]:
    return st.permutations(range(size)).map(lambda order: sorted(order[:count]))


@st.composite
def selections(draw: st.DrawFn, sizes: dict[str, int], kept: dict[str, int], experts: bool) -> Kept:
    """Any `Kept` of `kept` units out of `sizes`; every group keeps as many query heads."""

    def some(name: str) -> list[int]:
        return draw(subsets(sizes[name], kept[name]))

    layers = some("layers")
    heads = {layer: some("groups") for layer in layers}
    query_heads = {
        layer: [group * sizes["queries"] + i for group in groups for i in some("queries")]
        for layer, groups in heads.items()
    }
    chosen = {layer: some("experts") for layer in layers} if experts else None
    return Kept(
        hidden=some("hidden"),
        heads=heads,
        neurons={
            layer: [some("neurons") for _ in range(kept["experts"])] if experts else some("neurons")
            for layer in layers
        },
        layers=layers,
        query_heads=query_heads,
        experts=chosen,
    )


AXES = ("layers", "hidden", "groups", "queries", "neurons", "experts")


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[dict[str, int], Kept, Kept]:
    experts = draw(st.booleans())
    teacher = {axis: draw(st.integers(1, 5)) for axis in AXES}
    middle = {axis: draw(st.integers(1, size)) for axis, size in teacher.items()}
    last = {axis: draw(st.integers(1, size)) for axis, size in middle.items()}
    first, second = draw(selections(teacher, middle, experts)), draw(selections(middle, last, experts))
    return teacher, first, second


@settings(max_examples=150, deadline=None)
@given(two_cuts())
def test_two_selections_compose_to_one(cuts):
    """Every unit of a teacher carries a number of its own; cutting twice and cutting once leave the same numbers."""
    sizes, first, second = cuts
    once = first.then(second)

    def numbered(*axes: str, times: int = 1) -> np.ndarray:
        shape = [sizes[axis] for axis in axes]
        return np.arange(np.prod(shape) * times).reshape(*shape[:-1], -1)

    def take(kept: Kept, name: str, values: np.ndarray) -> np.ndarray:
        return np.stack([values[layer][getattr(kept, name)[layer]] for layer in kept.layers])

    def take_expert_neurons(kept: Kept, values: np.ndarray) -> np.ndarray:
        pairs = {layer: zip(kept.experts[layer], kept.neurons[layer]) for layer in kept.layers}
        return np.stack([np.stack([values[layer][e][units] for e, units in pairs[layer]]) for layer in kept.layers])

    def same(function: Callable[[Kept, np.ndarray], np.ndarray], values: np.ndarray) -> None:
        np.testing.assert_array_equal(function(second, function(first, values)), function(once, values))

    same(lambda kept, values: values[kept.hidden], numbered("hidden"))
    same(lambda kept, values: values[kept.layers], numbered("layers"))
    same(lambda kept, values: take(kept, "heads", values), numbered("layers", "groups"))
    queries = numbered("layers", "groups", times=sizes["queries"])
    same(lambda kept, values: take(kept, "query_heads", values), queries)
    if first.experts is None:
        same(lambda kept, values: take(kept, "neurons", values), numbered("layers", "neurons"))
        assert once.experts is None
    else:
        same(lambda kept, values: take(kept, "experts", values), numbered("layers", "experts"))
        same(take_expert_neurons, numbered("layers", "experts", "neurons"))
    for by_layer in (once.heads, once.query_heads, once.neurons):
        assert sorted(by_layer) == once.layers


TWO_CUTS = {
    "llama": (
        {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 104},  # one of two query heads
        {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 96, "hidden_size": 60},
    ),
    "gpt_neox": ({"intermediate_size": 104}, {"intermediate_size": 96}),
    "mixtral": (
        {"num_experts": 3, "intermediate_size": 24},
        {"num_experts": 2, "intermediate_size": 16, "hidden_size": 56},
    ),
}


@pytest.mark.filterwarnings("ignore:This cut removes")
@pytest.mark.parametrize("model_type", TWO_CUTS)
def test_two_real_cuts_are_one(make_model, model_type):
    """The student of a student computes what the teacher computes with the composed selection."""
    model, batch = make_model(model_type), {"input_ids": torch.randint(2, 96, (2, 16))}
    first, second = TWO_CUTS[model_type]
    shape = shape_of(model.config, num_hidden_layers=3, **first)
    middle = cut(model, score(model, [batch]), shape, layers=[0, 2, 3])
    student = cut(middle, score(middle, [batch]), replace(shape, num_hidden_layers=2, **second), layers="scores")
    report = verify(model, student, kept=middle.kept.then(student.kept))
    assert report.num_parameters == student.num_parameters() < middle.num_parameters()


@settings(max_examples=30, deadline=None)
@given(cuts=two_cuts())
def test_kept_indices_survive_their_file(cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    for kept in cuts[1:]:
        kept.save(folder)
        assert Kept.load(folder) == kept


def test_a_file_of_an_older_version_is_read(tmp_path):
    """Without query heads: all of the kept groups'."""
    content = '{"hidden": [0, 2], "heads": {"1": [0, 3]}, "neurons": {"1": [4]}, "layers": [1]}'
    (tmp_path / "kept_indices.json").write_text(content)
    kept = Kept.load(tmp_path)
    assert kept == Kept(hidden=[0, 2], heads={1: [0, 3]}, neurons={1: [4]}, layers=[1])
    assert kept.units({"q_heads": 8, "kv_heads": 4}, 1) == {
        "hidden": [0, 2],
        "kv_heads": [0, 3],
        "q_heads": [0, 1, 6, 7],
        "neurons": [4],
    }
    assert kept.units({"q_heads": 8, "kv_heads": 4}, None) == {"hidden": [0, 2]}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"hidden": [1]}', '{"hidden": [], "layers": [], "heads": 3}']
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "kept_indices.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged.*kept_indices\.json"):
        Kept.load(tmp_path)


def test_layers_that_are_no_integers_are_refused():
    config = config_of()
    with pytest.raises(ShapeError, match="indices"):
        select(random_scores(config), replace(StudentShape.of(config), num_hidden_layers=2), config, layers=[0, 1.7])
