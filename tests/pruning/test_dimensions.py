"""Each dimension alone and all jointly; which units and layers are kept; the reference implementation's bugs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from students import (
    ALL_FAMILIES,
    HEADS_MAKE_HIDDEN,
    MIXTURES,
    assert_same_logits,
    logits_of,
    make_inputs,
    make_student,
    others,
    random_scores,
    smaller,
    smaller_everywhere,
)
from transformers import AutoConfig, AutoModelForCausalLM
from zeroed import zeroed_teacher

from hf_capgap import StudentShape, cut, verify
from hf_capgap.errors import ScoresError, ShapeError
from hf_capgap.families import FAMILIES
from hf_capgap.pruning import select

pytestmark = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny

# --- each dimension alone ------------------------------------------------------------------------------------------

HEADS, QUERIES = {"num_key_value_heads": 2, "num_attention_heads": 4}, {"num_attention_heads": 4}
EVERYTHING = {
    "num_hidden_layers": 3,
    "hidden_size": 40,
    "num_key_value_heads": 2,
    "num_attention_heads": 2,  # one of two query heads in each of two of the four groups
    "intermediate_size": 24,
}
ALONE = [
    *((name, "layers", {"num_hidden_layers": 3}) for name in ALL_FAMILIES),
    *((name, "neurons", {"intermediate_size": 24}) for name in ALL_FAMILIES),
    *((name, "experts", {"num_experts": 2}) for name in MIXTURES),
    *((name, "hidden", {"hidden_size": 40}) for name in ALL_FAMILIES if name not in HEADS_MAKE_HIDDEN),
    *((name, "heads", HEADS) for name in ALL_FAMILIES if name not in HEADS_MAKE_HIDDEN),
    *((name, "query heads", QUERIES) for name in ALL_FAMILIES if name not in HEADS_MAKE_HIDDEN),
    *((name, "everything", EVERYTHING) for name in ALL_FAMILIES if name not in HEADS_MAKE_HIDDEN),
    *(
        (name, "heads and hidden", {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5})
        for name in HEADS_MAKE_HIDDEN
    ),
]


@pytest.mark.parametrize(("model_type", "changes"), [pytest.param(f, c, id=f"{f}-{name}") for f, name, c in ALONE])
def test_dimension_is_cut_and_the_others_stay(make_model, model_type, changes):
    teacher = make_model(model_type)
    student = make_student(teacher, **changes)
    shape = StudentShape.of(student.config)
    assert shape.as_dict() == {**StudentShape.of(teacher.config).as_dict(), **changes}
    assert student.num_parameters() == shape.num_parameters(teacher.config) < teacher.num_parameters()
    verify(teacher, student)
    assert_same_logits(logits_of(zeroed_teacher(teacher, student.kept)), logits_of(student))


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_nothing_removed_is_the_teacher(make_model, model_type):
    teacher = make_model(model_type)
    whole = make_student(teacher)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, teacher.get_parameter(name)), name
    assert torch.equal(logits_of(whole), logits_of(teacher))


def test_query_heads_are_the_best_of_each_kept_group(make_model):
    """Groups stay equal: one of the two query heads of each, wherever the scores of all heads are higher."""
    teacher = make_model("mistral")
    scores = random_scores(teacher.config)
    scores.query_heads[:, :4] += 10.0  # all heads of the first two groups beat those of the last two
    shape = smaller(teacher.config, num_key_value_heads=3, num_attention_heads=3)
    kept = select(scores, shape, teacher.config)
    for layer in kept.layers:
        pairs = scores.query_heads[layer].view(4, 2)
        assert kept.query_heads[layer] == [2 * group + int(pairs[group].argmax()) for group in kept.heads[layer]]
    student = cut(teacher, scores, shape)
    rows = [head * 8 + row for head in kept.query_heads[0] for row in range(8)]
    assert torch.equal(
        student.model.layers[0].self_attn.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight[rows]
    )


@pytest.mark.parametrize("model_type", MIXTURES)
def test_each_layer_keeps_its_best_experts_with_their_best_neurons(make_model, model_type):
    config = make_model(model_type).config
    scores = random_scores(config)
    kept = select(scores, smaller_everywhere(config), config)
    assert kept.experts[1] != kept.experts[2]
    for layer in kept.layers:
        assert scores.experts[layer, kept.experts[layer]].min() > scores.experts[layer].min()  # one of four goes
        for expert, neurons in zip(kept.experts[layer], kept.neurons[layer], strict=True):
            assert neurons == sorted(scores.neurons[layer, expert].topk(24).indices.tolist())
    assert kept.neurons[1][0] != kept.neurons[1][1]


@pytest.mark.parametrize("missing", ["query_heads", "experts", "layers"])
def test_scores_without_what_the_cut_needs_are_refused(make_model, missing):
    """As scores of an earlier version, or of a metric that has none."""
    teacher = make_model("mixtral")
    scores = replace(random_scores(teacher.config), **{missing: None})
    changes, layers = {
        "query_heads": ({"num_attention_heads": 4}, "symmetric"),
        "experts": ({"num_experts": 3}, "symmetric"),
        "layers": ({"num_hidden_layers": 3}, "scores"),
    }[missing]
    with pytest.raises(ScoresError, match=f"none of {missing}"):
        cut(teacher, scores, smaller(teacher.config, **changes), layers=layers)
    cut(teacher, scores, smaller(teacher.config, hidden_size=48), layers="symmetric")


@pytest.mark.parametrize("model_type", HEADS_MAKE_HIDDEN)
@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 56}, {"num_attention_heads": 6, "num_key_value_heads": 6}, {"hidden_size": 50}],
    ids=str,
)
def test_width_without_its_heads_is_refused_with_the_rule(make_model, model_type, changes):
    with pytest.raises(ShapeError, match=r"hidden_size must be num_attention_heads × head_dim.*nearest legal"):
        make_student(make_model(model_type), **changes)


# --- which layers are kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "protect_ends", "count", "expected"),
    [
        ("symmetric", False, 4, [1, 2, 3, 4]),
        ("symmetric", False, 3, [1, 2, 3]),
        ("symmetric", True, 4, [0, 2, 3, 5]),
        ("symmetric", True, 3, [0, 2, 5]),
        ("symmetric", True, 2, [0, 5]),
        ("scores", False, 3, [0, 2, 4]),
        ("scores", True, 3, [0, 2, 5]),
        ("scores", True, 6, [0, 1, 2, 3, 4, 5]),
        ([5, 1, 0], False, 3, [0, 1, 5]),
        ([5, 1, 0], True, 3, [0, 1, 5]),
    ],
)
def test_layers_are_those_of_the_policy(make_model, layers, protect_ends, count, expected):
    teacher = make_model(num_hidden_layers=6)
    scores = replace(random_scores(teacher.config), layers=torch.tensor([0.5, 0.1, 0.9, 0.2, 0.8, 0.3]))
    student = cut(
        teacher, scores, smaller(teacher.config, num_hidden_layers=count), layers=layers, protect_ends=protect_ends
    )
    assert student.kept.layers == expected
    assert student.lineage[-1]["layers"] == layers
    assert student.lineage[-1]["protect_ends"] is protect_ends
    verify(teacher, student)


@pytest.mark.parametrize(
    ("layers", "count", "reason"),
    [("symmetric", 1, "Protected ends are two layers"), ([1, 2], 2, "protected end"), ([0, 1], 2, "protected end")],
)
def test_protected_ends_that_do_not_fit_are_refused(make_model, layers, count, reason):
    teacher = make_model()
    with pytest.raises(ShapeError, match=reason):
        cut(
            teacher,
            random_scores(teacher.config),
            smaller(teacher.config, num_hidden_layers=count),
            layers=layers,
            protect_ends=True,
        )


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
@pytest.mark.parametrize("layers", ["scores", [0, 3]])
def test_layers_are_removed_from_anywhere(make_model, model_type, layers):
    teacher = make_model(model_type)
    scores = replace(random_scores(teacher.config), layers=torch.tensor([3.0, 1.0, 0.0, 2.0]))
    student = cut(teacher, scores, smaller(teacher.config, num_hidden_layers=2), layers=layers)
    assert student.kept.layers == [0, 3]
    verify(teacher, student)


@pytest.mark.parametrize("layers", [[0, 1, 3], [0, 2], [1]])
def test_layers_without_rotary_positions_stay_so(make_model, tmp_path, layers):
    teacher = make_model("smollm3")
    assert teacher.config.no_rope_layers == [1, 0, 1, 0]
    student = make_student(teacher, num_hidden_layers=len(layers), layers=layers)
    student.save_pretrained(tmp_path)
    expected = [[1, 0, 1, 0][layer] for layer in layers]
    for config in (student.config, AutoConfig.from_pretrained(tmp_path)):
        assert config.no_rope_layers == expected
        assert len(config.layer_types) == len(layers)
    verify(teacher, student)


def test_best_units_of_each_layer_are_kept_in_ascending_order(make_model):
    config = make_model().config
    scores, shape = random_scores(config), smaller_everywhere(config)
    kept = select(scores, shape, config, layers=[0, 3])
    assert kept.layers == [0, 3] == list(kept.heads) == list(kept.neurons)
    rows = [(scores.hidden, kept.hidden, 42)]
    for layer in kept.layers:
        rows += [(scores.heads[layer], kept.heads[layer], 3), (scores.neurons[layer], kept.neurons[layer], 37)]
    for values, units, count in rows:
        assert units == sorted(units)
        assert len(units) == count
        assert values[units].min() > values[others(units, len(values))].max()
    assert kept.neurons[0] != kept.neurons[3]  # each layer its own


def test_equal_scores_keep_the_lower_index(make_model):
    config = make_model().config
    scores = replace(random_scores(config), hidden=torch.ones(64))
    assert select(scores, smaller_everywhere(config), config).hidden == list(range(42))


def test_normalising_the_scores_does_not_change_the_cut(make_model):
    config = make_model().config
    scores, shape = random_scores(config), smaller_everywhere(config)
    assert select(scores, shape, config) == select(scores.normalized(), shape, config)


@pytest.mark.parametrize("layers", [[0, 1], [1, 3], [3, 0]])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_per_layer_lists_follow_the_layers_kept(make_model, tmp_path, model_type, layers):
    """Otherwise full-attention weights run with a sliding window, and the saved config does not load."""
    teacher = make_model(model_type)
    assert len(teacher.config.layer_types) == 4
    assert set(teacher.config.layer_types) == {"full_attention", "sliding_attention"}
    shape = smaller(teacher.config, num_hidden_layers=2, hidden_size=40)
    student = cut(teacher, random_scores(teacher.config), shape, layers=layers)
    student.save_pretrained(tmp_path)
    expected = [teacher.config.layer_types[layer] for layer in sorted(layers)]
    for config in (student.config, AutoConfig.from_pretrained(tmp_path)):
        assert config.layer_types == expected
    assert student.kept.layers == sorted(layers)
    assert torch.equal(
        student.model.layers[1].post_attention_layernorm.weight,
        teacher.model.layers[max(layers)].post_attention_layernorm.weight[student.kept.hidden],
    )
    verify(teacher, student)


@pytest.mark.parametrize("layers", [[0], [0, 1, 2], [1, 1], [0, 1, 1], [0, 4], [-1, 0], [], "middle", ""])
def test_layers_that_do_not_fit_are_refused(make_model, layers):
    teacher = make_model()
    shape = smaller(teacher.config, num_hidden_layers=2)
    with pytest.raises(ShapeError, match="layers") as caught:
        cut(teacher, random_scores(teacher.config), shape, layers=layers)
    assert f"(found: {layers})" in str(caught.value)


def test_scores_of_another_model_are_refused(make_model):
    """By their sizes, or by their family where the sizes agree."""
    teacher = make_model()
    shape = smaller_everywhere(teacher.config)
    strangers = [
        random_scores(make_model(**change).config)
        for change in (
            {"hidden_size": 56},
            {"num_key_value_heads": 2},
            {"intermediate_size": 113},
            {"num_hidden_layers": 5},
        )
    ]
    for scores in (*strangers, random_scores(make_model("mistral").config)):
        with pytest.raises(ScoresError, match="another model"):
            cut(teacher, scores, shape)


def test_shape_that_does_not_fit_is_refused(make_model):
    teacher = make_model()
    with pytest.raises(ShapeError, match="nearest legal"):
        make_student(teacher, hidden_size=65)


# --- the reference implementation's bugs, one by one ----------------------------------------------------------------


def test_kv_counts_follow_the_heads(make_model, tmp_path):
    """It left `num_key_value_heads` as it was: no such checkpoint loads."""
    teacher = make_model(num_key_value_heads=8)
    make_student(teacher, num_key_value_heads=4).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 8)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_heads_are_counted_in_groups(make_model):
    """It removed as many KV groups as query heads were asked to go. Query heads must stay with their own keys."""
    teacher = make_model("mistral")
    student = make_student(teacher, num_key_value_heads=3)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (6, 3)
    rows = [group * 16 + row for group in student.kept.heads[0] for row in range(16)]  # two query heads of eight rows
    assert torch.equal(
        student.model.layers[0].self_attn.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight[rows]
    )
    verify(teacher, student)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (6, [0, 1, 2, 3, 4, 5]),  # it kept no layer at all
        (5, [0, 1, 2, 3, 4]),  # none here, either
        (4, [1, 2, 3, 4]),
        (3, [1, 2, 3]),  # it kept four and said three
        (1, [2]),
    ],
)
def test_depth_is_what_was_asked_for(make_model, num_layers, expected):
    teacher = make_model(num_hidden_layers=6)
    student = make_student(teacher, num_hidden_layers=num_layers)
    assert student.kept.layers == expected
    assert len(student.model.layers) == student.config.num_hidden_layers == num_layers
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == list(range(num_layers))
    verify(teacher, student)


def test_tied_embeddings_are_cut_once(make_model):
    """It permuted them in place, and with them the output head: wrong before anything was removed."""
    teacher = make_model(tie_word_embeddings=True)
    whole = make_student(teacher)
    assert torch.equal(logits_of(whole), logits_of(teacher))
    verify(teacher, make_student(teacher, hidden_size=40))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hidden_size", {"hidden_size": 50, "num_key_value_heads": 1}),
        ("intermediate_size", {"intermediate_size": 101}),
    ],
)
def test_sizes_are_not_rounded(make_model, name, changes):
    """It rounded what it removed to multiples of eight, in the weights but not in the config."""
    teacher = make_model()
    student = make_student(teacher, **changes)
    assert getattr(student.config, name) == changes[name]
    assert student.model.layers[0].mlp.up_proj.weight.shape == (
        student.config.intermediate_size,
        student.config.hidden_size,
    )
    verify(teacher, student)


def test_head_dim_that_is_no_multiple_of_eight_stays_whole(make_model):
    teacher = make_model(head_dim=6)
    student = make_student(teacher, num_key_value_heads=3, hidden_size=36)
    assert student.config.head_dim == 6
    verify(teacher, student)


def test_in_memory_student_is_right_at_once(make_model):
    """Its own in-memory model was silently wrong until saved and reloaded as a plain Llama."""
    teacher = make_model()
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    assert_same_logits(logits_of(student), logits_of(zeroed_teacher(teacher, student.kept)))
    labels = make_inputs(student.config)
    assert student(input_ids=labels, labels=labels).loss.isfinite()
    student(input_ids=labels, labels=labels).loss.backward()  # and trains
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_head_dim_is_written_down_where_the_teacher_derives_it(make_model, tmp_path):
    """Qwen2 configs leave it out; a student with fewer heads per width would derive another."""
    tiny = {name: value for name, value in FAMILIES["qwen2"].tiny_config.items() if name != "head_dim"}
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **tiny))
    student = make_student(teacher, hidden_size=42, num_key_value_heads=3)
    student.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).head_dim == 8
    verify(teacher, student)
