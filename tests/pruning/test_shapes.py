"""Target shapes on the configs of published models. No weights: counts come from the configs alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from hf_capgap import StudentShape, solve_shape
from hf_capgap.errors import ShapeError, UnsupportedModelError
from hf_capgap.families import FAMILIES, family_for
from hf_capgap.pruning.shapes import nearest_legal


def published(config_class, vocab, hidden, neurons, layers, heads, kv_heads, tied=False, **extra) -> PreTrainedConfig:
    return config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        **extra,
    )


# name: (config, parameters as published)
PUBLISHED = {
    "Llama-2-7B": (published(LlamaConfig, 32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "Llama-3-8B": (published(LlamaConfig, 128256, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "Llama-3.2-1B": (published(LlamaConfig, 128256, 2048, 8192, 16, 32, 8, tied=True), 1_235_814_400),
    "Mistral-7B": (published(MistralConfig, 32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Qwen2.5-0.5B": (published(Qwen2Config, 151936, 896, 4864, 24, 14, 2, tied=True), 494_032_768),
    "Qwen2.5-7B": (published(Qwen2Config, 152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    "Qwen3-0.6B": (published(Qwen3Config, 151936, 1024, 3072, 28, 16, 8, tied=True, head_dim=128), 596_049_920),
    "Qwen3-8B": (published(Qwen3Config, 151936, 4096, 12288, 36, 32, 8, head_dim=128), 8_190_735_360),
}
CONFIGS = {name: config for name, (config, _) in PUBLISHED.items()}
LLAMA_2_7B, LLAMA_3_8B, QWEN3_8B = (CONFIGS[name] for name in ("Llama-2-7B", "Llama-3-8B", "Qwen3-8B"))

MINIMA = StudentShape(
    num_hidden_layers=24,
    hidden_size=3072,
    num_attention_heads=24,
    num_key_value_heads=24,
    head_dim=128,
    intermediate_size=8192,
)


def num_teacher_parameters(config: PreTrainedConfig) -> int:
    return StudentShape.of(config).num_parameters(config)


def shape_in(message: str) -> StudentShape:
    """The shape that a message names."""
    fields = re.search(r"StudentShape\((.*?)\)", message).group(1)
    return StudentShape(**{name: int(value) for name, value in (field.split("=") for field in fields.split(", "))})


def assert_balanced(shape: StudentShape, config: PreTrainedConfig, spread: float) -> None:
    """Hidden size, heads and neurons keep about the same fraction of their units."""
    names = ("hidden_size", "num_attention_heads", "intermediate_size")
    kept = [getattr(shape, name) / getattr(config, name) for name in names]
    assert max(kept) / min(kept) < spread


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts_follow_from_the_config(name):
    config, num_parameters = PUBLISHED[name]
    assert num_teacher_parameters(config) == num_parameters


# --- solving for a target ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.4, 0.15])
@pytest.mark.parametrize("name", CONFIGS)
def test_solved_shape_is_legal_and_near_the_target(name, kept):
    config, wanted = CONFIGS[name], kept * num_teacher_parameters(CONFIGS[name])
    shape = solve_shape(config, f"{wanted / 1e9:.4f}B")
    shape.check_within(config)
    assert shape.num_parameters(config) == pytest.approx(wanted, rel=0.04)
    assert shape.num_hidden_layers == config.num_hidden_layers


@pytest.mark.parametrize("name", CONFIGS)
def test_solved_shape_splits_the_cut_evenly_over_the_dimensions(name):
    """The reference's square-root split; the smallest models have only two KV groups to choose from."""
    assert_balanced(solve_shape(CONFIGS[name], "40%"), CONFIGS[name], spread=1.25)


def test_target_is_read_in_every_notation():
    forty_percent = solve_shape(LLAMA_3_8B, "40%")
    count = round(0.4 * num_teacher_parameters(LLAMA_3_8B))
    for target in ("2.5x", " 2.5X Smaller ", "40.0 %", count, str(count), f"{count / 1e9}B", f"{count / 1e6} m"):
        assert solve_shape(LLAMA_3_8B, target) == forty_percent, target


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_teacher_is_its_own_shape(name):
    assert solve_shape(CONFIGS[name], "100%") == StudentShape.of(CONFIGS[name])


@pytest.mark.parametrize(("name", "step"), [("Llama-2-7B", 256), ("Llama-3.2-1B", 128), ("Qwen2.5-0.5B", 32)])
def test_default_multiples_follow_the_teachers_width(name, step):
    shape = solve_shape(CONFIGS[name], "40%")
    assert (shape.hidden_size % step, shape.intermediate_size % step) == (0, 0)


@pytest.mark.parametrize("multiple_of", [64, 128, 512])
def test_asked_multiples_are_kept(multiple_of):
    shape = solve_shape(LLAMA_3_8B, "30%", multiple_of=multiple_of)
    assert (shape.hidden_size % multiple_of, shape.intermediate_size % multiple_of) == (0, 0)


def test_teachers_own_width_needs_no_multiple():
    """896 is no multiple of 256, but keeping all of it changes nothing."""
    shape = solve_shape(CONFIGS["Qwen2.5-0.5B"], "95%", multiple_of=256)
    assert shape.hidden_size == 896
    assert shape.intermediate_size % 256 == 0


def test_finer_multiples_come_nearer_to_the_target():
    shape = solve_shape(CONFIGS["Qwen2.5-0.5B"], "40%", multiple_of=8)
    assert shape.num_parameters(CONFIGS["Qwen2.5-0.5B"]) == pytest.approx(0.4 * 494_032_768, rel=0.0005)


@pytest.mark.parametrize("target", ["95%", "60%", "25%"])
@pytest.mark.parametrize("tensor_parallel", [2, 3, 4, 8])
def test_tensor_parallel_devices_divide_groups_and_neurons(tensor_parallel, target):
    """3 divides neither 32 heads nor 11008 neurons, so that the teacher's own widths are no answer either."""
    shape = solve_shape(LLAMA_2_7B, target, tensor_parallel=tensor_parallel)
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        assert getattr(shape, name) % tensor_parallel == 0, name


def test_layers_are_those_asked_for():
    shape = solve_shape(LLAMA_2_7B, "3B", num_hidden_layers=24)
    assert shape.num_hidden_layers == 24
    assert shape.num_parameters(LLAMA_2_7B) == pytest.approx(3e9, rel=0.02)
    assert_balanced(shape, LLAMA_2_7B, spread=1.1)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(list(CONFIGS)),
    percent=st.floats(4.0, 100.0),
    tensor_parallel=st.sampled_from([1, 2]),
    depth=st.floats(0.5, 1.0),
)
def test_any_solved_shape_is_legal_balanced_and_near(name, percent, tensor_parallel, depth):
    config = CONFIGS[name]
    layers = round(depth * config.num_hidden_layers)
    wanted = num_teacher_parameters(config) * percent / 100
    try:
        shape = solve_shape(config, f"{percent}%", num_hidden_layers=layers, tensor_parallel=tensor_parallel)
    except ShapeError as error:  # fewer layers cannot reach the largest targets
        nearest = shape_in(str(error))
        nearest.check_within(config)
        assert abs(nearest.num_parameters(config) / wanted - 1) > 0.08
        return
    shape.check_within(config)
    assert shape.num_parameters(config) == pytest.approx(wanted, rel=0.105)
    assert shape.num_hidden_layers == layers
    assert shape.num_key_value_heads % tensor_parallel == 0
    assert shape.intermediate_size % tensor_parallel == 0
    sizes = family_for(config).sizes(config)
    assert shape.num_attention_heads / shape.num_key_value_heads == sizes["q_heads"] / sizes["kv_heads"]
    assert shape.head_dim == sizes["head_dim"]


@settings(max_examples=15, deadline=None)
@given(percent=st.floats(5.0, 90.0))
def test_a_clearly_larger_target_never_gives_a_smaller_student(percent):
    config = CONFIGS["Qwen2.5-0.5B"]
    small, large = (solve_shape(config, f"{target}%").num_parameters(config) for target in (percent, 1.1 * percent))
    assert small < large


# --- refusals of targets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["0%", "0", 0, "0B", "0.4", "0.0000001%", "0.05%", "5M", "99999x"])
def test_target_below_every_legal_shape_is_refused_with_the_nearest_one(target):
    with pytest.raises(ShapeError) as caught:
        solve_shape(LLAMA_2_7B, target)
    assert str(target) in str(caught.value)
    smallest = shape_in(str(caught.value))
    smallest.check_within(LLAMA_2_7B)
    assert f"{smallest.num_parameters(LLAMA_2_7B):,}" in str(caught.value)
    assert (smallest.hidden_size, smallest.num_key_value_heads, smallest.intermediate_size) == (256, 1, 256)


@pytest.mark.parametrize("target", ["101%", "0.9x", "0x", "7B", "1T", 10**12])
def test_target_above_the_teacher_is_refused_with_the_nearest_one(target):
    with pytest.raises(ShapeError, match="6,738,415,616.*100%") as caught:
        solve_shape(LLAMA_2_7B, target)
    assert str(target) in str(caught.value)


@pytest.mark.parametrize(
    "target", ["", "small", "-40%", "40%%", "4 0%", "1.2.3B", "1e9", "nan", "3 bananas", None, [40]]
)
def test_nonsense_is_refused_with_the_notation(target):
    with pytest.raises(ShapeError, match=r'"40%", "2\.5x", "1\.2B"'):
        solve_shape(LLAMA_2_7B, target)


def test_target_that_so_few_layers_cannot_reach_is_refused_with_the_nearest_one():
    with pytest.raises(ShapeError, match="nearest legal") as caught:
        solve_shape(LLAMA_2_7B, "90%", num_hidden_layers=8)
    nearest = shape_in(str(caught.value))
    assert nearest == replace(StudentShape.of(LLAMA_2_7B), num_hidden_layers=8)


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 33},
        {"num_hidden_layers": 0},
        {"multiple_of": 0},
        {"tensor_parallel": 0},
        {"tensor_parallel": 64},
        {"tensor_parallel": -2},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ShapeError):
        solve_shape(LLAMA_2_7B, "40%", **options)


def test_unknown_family_is_refused():
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        solve_shape(GPT2Config(), "40%")


# --- explicit shapes -----------------------------------------------------------------------------------------------


def test_published_minima_shape_is_legal_with_its_count():
    """MiniMA-3B out of Llama-2-7B (arXiv 2311.07052), before its vocabulary was extended."""
    MINIMA.check_within(LLAMA_2_7B)
    per_layer = 4 * 3072**2 + 3 * 3072 * 8192 + 2 * 3072
    assert MINIMA.num_parameters(LLAMA_2_7B) == 2 * 32000 * 3072 + 24 * per_layer + 3072


@pytest.mark.parametrize("name", CONFIGS)
def test_teachers_own_shape_is_legal(name):
    StudentShape.of(CONFIGS[name]).check_within(CONFIGS[name])


def refusal(shape: StudentShape, config: PreTrainedConfig) -> str:
    """The message of the refusal, whose nearest legal shape must be legal and what `nearest_legal` says."""
    with pytest.raises(ShapeError) as caught:
        shape.check_within(config)
    nearest = shape_in(str(caught.value).split("nearest legal shape is")[1])
    nearest.check_within(config)
    assert nearest == nearest_legal(shape, config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason", "nearest"),
    [
        ({"hidden_size": 3070}, "multiple of num_attention_heads", {"hidden_size": 3072}),
        ({"hidden_size": 4608}, "hidden_size 4608 is wider than the teacher's 4096", {"hidden_size": 4080}),
        ({"intermediate_size": 11009}, "intermediate_size 11009 is wider", {"intermediate_size": 11008}),
        ({"num_hidden_layers": 33}, "num_hidden_layers 33 is wider", {"num_hidden_layers": 32}),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer", {"num_hidden_layers": 1}),
        ({"intermediate_size": -5}, "intermediate_size must be a positive integer", {"intermediate_size": 1}),
        ({"hidden_size": 0}, "hidden_size must be a positive integer", {"hidden_size": 24}),
        ({"hidden_size": 3072.5}, "hidden_size must be a positive integer", {"hidden_size": 3072}),
        ({"head_dim": 64}, "head_dim 64 is not the teacher's 128", {"head_dim": 128}),
        ({"num_key_value_heads": 12}, "24 query heads in 12 KV groups", {"num_key_value_heads": 24}),
    ],
)
def test_illegal_shape_is_refused_with_the_reason_and_the_nearest_legal_one(changes, reason, nearest):
    message = refusal(replace(MINIMA, **changes), LLAMA_2_7B)
    assert reason in message
    assert shape_in(message.split("nearest legal shape is")[1]) == replace(MINIMA, **nearest)


def test_query_heads_that_break_a_group_are_refused():
    """Llama-3 has four query heads in a KV group: the reference implementation counted 22 of them and broke one."""
    shape = replace(StudentShape.of(LLAMA_3_8B), num_attention_heads=22, num_key_value_heads=8)
    assert "a group has 4 query heads" in refusal(shape, LLAMA_3_8B)
    nearest = nearest_legal(shape, LLAMA_3_8B)
    assert nearest.num_attention_heads == 4 * nearest.num_key_value_heads


def test_hidden_size_is_bound_to_the_heads_in_llama_only():
    """LlamaConfig insists on it, even with an explicit head_dim; Mistral's and Qwen's configs do not."""
    for config in (LLAMA_3_8B, CONFIGS["Mistral-7B"]):
        shape = replace(StudentShape.of(config), hidden_size=3000)
        if config is LLAMA_3_8B:
            assert "multiple of num_attention_heads" in refusal(shape, config)
        else:
            shape.check_within(config)


sizes_around = st.integers(-10, 20_000)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(CONFIGS)),
    num_hidden_layers=st.integers(-2, 50),
    hidden_size=sizes_around,
    num_attention_heads=st.integers(-2, 70),
    num_key_value_heads=st.integers(-2, 70),
    head_dim=st.integers(-2, 300),
    intermediate_size=sizes_around,
)
def test_nearest_legal_shape_is_always_legal_and_a_legal_shape_is_its_own(name, **fields):
    config, shape = CONFIGS[name], StudentShape(**fields)
    nearest = nearest_legal(shape, config)
    nearest.check_within(config)
    assert nearest_legal(nearest, config) == nearest


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_shape_that_passes_the_check_is_accepted_by_the_config_class(model_type):
    """The rules in the table are those of the config classes: a shape that passes can be saved and loaded."""
    config_class = type(next(config for config in CONFIGS.values() if config.model_type == model_type))
    config = config_class(**FAMILIES[model_type].tiny_config)
    teacher = StudentShape.of(config)
    for num_groups in range(1, teacher.num_key_value_heads + 1):
        for hidden in range(1, teacher.hidden_size + 1):
            shape = replace(
                teacher, hidden_size=hidden, num_key_value_heads=num_groups, num_attention_heads=2 * num_groups
            )
            if not family_for(config).broken_rules(shape.sizes()):
                shape.check_within(config)
                config_class(**{**config.to_dict(), **shape.as_dict()})


def test_percent_smaller_is_not_read_as_percent():
    """ "40% smaller" would keep 60 %, "40%" keeps 40 %: the words that could mean both are refused."""
    with pytest.raises(ShapeError, match="Not a target size"):
        solve_shape(LLAMA_2_7B, "40% smaller")
    assert solve_shape(LLAMA_2_7B, "2.5x smaller") == solve_shape(LLAMA_2_7B, "2.5x")
