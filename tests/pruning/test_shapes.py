"""Target shapes on the configs of published models. No weights: counts come from the configs alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from students import ALL_FAMILIES, HEADS_MAKE_HIDDEN, MIXTURES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

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


def of_family(model_type, vocab, hidden, neurons, layers, heads, kv_heads=None, **extra) -> PreTrainedConfig:
    """Everything else, ties among it, is the config class's default."""
    groups = {} if kv_heads is None else {"num_key_value_heads": kv_heads}
    return AutoConfig.for_model(
        model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **groups,
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
    "SmolLM3-3B": (of_family("smollm3", 128256, 2048, 11008, 36, 16, 4), 3_075_098_624),
    "OLMo-2-7B": (of_family("olmo2", 100352, 4096, 11008, 32, 32, 32), 7_298_617_344),
    "Phi-3-mini": (of_family("phi3", 32064, 3072, 8192, 32, 32, 32), 3_821_079_552),
    "Gemma-2-2B": (of_family("gemma2", 256000, 2304, 9216, 26, 8, 4, head_dim=256), 2_614_341_888),
    "Gemma-3-1B": (of_family("gemma3_text", 262144, 1152, 6912, 26, 4, 1, head_dim=256), 999_885_952),
    "GPT-2": (AutoConfig.for_model("gpt2"), 124_439_808),
    "GPT-2-XL": (AutoConfig.for_model("gpt2", n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),
    "Pythia-160M": (of_family("gpt_neox", 50304, 768, 3072, 12, 12), 162_322_944),
    "Pythia-1B": (of_family("gpt_neox", 50304, 2048, 8192, 16, 8), 1_011_781_632),
    "OPT-125M": (AutoConfig.for_model("opt"), 125_239_296),
    "OPT-1.3B": (
        AutoConfig.for_model(
            "opt",
            hidden_size=2048,
            word_embed_proj_dim=2048,
            ffn_dim=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
        ),
        1_315_758_080,
    ),
    "Mixtral-8x7B": (of_family("mixtral", 32000, 4096, 14336, 32, 32, 8), 46_702_792_704),
    "Qwen3-30B-A3B": (
        of_family(
            "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, head_dim=128, moe_intermediate_size=768, num_experts=128
        ),
        30_532_122_624,
    ),
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
    fields = re.search(r"StudentShape\((.*?)\)", message).group(1)  # an absent num_experts is not written
    return StudentShape(**{name: int(value) for name, value in (field.split("=") for field in fields.split(", "))})


def assert_balanced(shape: StudentShape, config: PreTrainedConfig, spread: float) -> None:
    """Hidden size, heads and neurons keep about the same fraction of their units."""
    teacher = StudentShape.of(config)
    names = ["hidden_size", "intermediate_size", *["num_attention_heads"] * (teacher.num_key_value_heads > 1)]
    kept = [getattr(shape, name) / getattr(teacher, name) for name in names]
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
    """The reference's square-root split, as far as a handful of KV groups, or of heads that make the width, allow."""
    spread = {"SmolLM3-3B": 1.26, "Pythia-160M": 1.36}.get(name, 1.25)
    assert_balanced(solve_shape(CONFIGS[name], "40%"), CONFIGS[name], spread=spread)


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
        if StudentShape.of(config).num_key_value_heads < tensor_parallel:
            message = str(error)
            assert f"tensor_parallel={tensor_parallel}" in message
            return
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
    with pytest.raises(UnsupportedModelError, match="bloom"):
        solve_shape(BloomConfig(), "40%")


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
    message = refusal(shape, LLAMA_3_8B)
    assert "22 query heads in 8 KV groups" in message
    assert "at most the teacher's 4" in message
    nearest = nearest_legal(shape, LLAMA_3_8B)
    assert (nearest.num_attention_heads, nearest.num_key_value_heads) in [(21, 7), (22, 11), (24, 8), (24, 6)]
    with_more = replace(shape, num_attention_heads=30, num_key_value_heads=6)  # five in a group of four
    assert "30 query heads in 6 KV groups" in refusal(with_more, LLAMA_3_8B)


@pytest.mark.parametrize("queries", [1, 2, 3, 4])
def test_every_group_may_keep_fewer_query_heads(queries):
    shape = replace(StudentShape.of(QWEN3_8B), num_attention_heads=7 * queries, num_key_value_heads=7)
    shape.check_within(QWEN3_8B)
    assert shape.queries_per_group == queries
    per_head = 36 * 2 * 4096 * 128  # a query head's rows of q_proj and columns of o_proj
    whole = replace(shape, num_attention_heads=28)
    assert whole.num_parameters(QWEN3_8B) - shape.num_parameters(QWEN3_8B) == 7 * (4 - queries) * per_head


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


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_every_shape_that_passes_the_check_is_accepted_by_the_config_class(model_type):
    """The rules in the table are those of the config classes: a shape that passes can be saved and loaded."""
    family = FAMILIES[model_type]
    config = AutoConfig.for_model(model_type, **family.tiny_config)
    teacher = StudentShape.of(config)
    num_legal = 0
    for groups in range(1, teacher.num_key_value_heads + 1):
        for queries in range(1, teacher.queries_per_group + 1):
            for hidden in range(1, teacher.hidden_size + 1):
                shape = replace(
                    teacher, hidden_size=hidden, num_key_value_heads=groups, num_attention_heads=groups * queries
                )
                if family.broken_rules({**family.sizes(config), **shape.sizes()}):
                    continue
                num_legal += 1
                shape.check_within(config)
                values = config.to_dict()
                sizes = shape.sizes()
                values.update({name: sizes[axis] for axis, name in family.config_fields.items() if axis in sizes})
                assert StudentShape.of(type(config).from_dict(values)) == shape
    assert num_legal >= 8


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "smollm3", "phi3", "mistral", "olmo2"])
def test_hidden_size_that_the_heads_do_not_divide_is_refused_where_the_family_refuses_it(model_type):
    """Neither too strict nor too lax: what a table refuses, the config class or the model refuses, too."""
    family = FAMILIES[model_type]
    config = AutoConfig.for_model(model_type, **{**family.tiny_config, "num_hidden_layers": 1, "layer_types": None})
    shape = replace(StudentShape.of(config), hidden_size=60)  # eight heads
    builds = True
    try:
        values = {**family.tiny_config, "num_hidden_layers": 1, "layer_types": None, "hidden_size": 60}
        student = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        student(input_ids=torch.arange(8)[None])
    except StrictDataclassClassValidationError:  # of the config classes
        builds = False
    assert bool(family.broken_rules({**family.sizes(config), **shape.sizes()})) is not builds


# --- families where the width is made of heads ---------------------------------------------------------------------

HEADS_CONFIGS = {name: CONFIGS[name] for name in ("GPT-2", "GPT-2-XL", "Pythia-160M", "Pythia-1B", "OPT-1.3B")}


@pytest.mark.parametrize("target", ["75%", "50%", "30%"])
@pytest.mark.parametrize("name", HEADS_CONFIGS)
def test_solver_finds_widths_that_are_made_of_heads(name, target):
    config = HEADS_CONFIGS[name]
    shape = solve_shape(config, target)
    teacher = StudentShape.of(config)
    assert shape.hidden_size == shape.num_attention_heads * shape.head_dim < teacher.hidden_size
    assert shape.num_key_value_heads == shape.num_attention_heads
    assert shape.head_dim == teacher.head_dim
    wanted = int(target[:-1]) / 100 * num_teacher_parameters(config)
    assert shape.num_parameters(config) == pytest.approx(wanted, rel=0.06)


@pytest.mark.parametrize("model_type", HEADS_MAKE_HIDDEN)
def test_width_without_its_heads_is_refused_with_the_rule(model_type):
    config = AutoConfig.for_model(model_type, **FAMILIES[model_type].tiny_config)
    teacher = StudentShape.of(config)
    rule = "hidden_size must be num_attention_heads × head_dim"
    for changes in (
        {"hidden_size": 56},
        {"hidden_size": 63},
        {"num_attention_heads": 7, "num_key_value_heads": 7},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 40},
    ):
        assert rule in refusal(replace(teacher, **changes), config)
    replace(teacher, num_attention_heads=7, num_key_value_heads=7, hidden_size=56).check_within(config)


# --- mixtures of experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mixtral-8x7B", "Qwen3-30B-A3B"])
def test_experts_are_those_asked_for(name):
    config = CONFIGS[name]
    num_experts = StudentShape.of(config).num_experts // 2
    shape = solve_shape(config, "30%", num_experts=num_experts)
    assert shape.num_experts == num_experts
    assert shape.num_parameters(config) == pytest.approx(0.3 * num_teacher_parameters(config), rel=0.04)
    assert solve_shape(config, "30%").num_experts == StudentShape.of(config).num_experts
    assert (shape.hidden_size % 8, shape.intermediate_size % 8) == (0, 0)


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts": 1}, "num_experts must be at least num_experts_per_tok"),
        ({"num_experts": 5}, "num_experts 5 is wider than the teacher's 4"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"hidden_size": 44}, "hidden_size must be a multiple of 8"),
        ({"intermediate_size": 20}, "intermediate_size must be a multiple of 8"),
    ],
    ids=str,
)
def test_impossible_mixtures_are_refused(model_type, changes, reason):
    config = AutoConfig.for_model(model_type, **FAMILIES[model_type].tiny_config)
    assert reason in refusal(replace(StudentShape.of(config), **changes), config)


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("width", ["hidden", "neurons"])
def test_grouped_matrix_products_really_want_multiples_of_8(model_type, width):
    """When this fails, torch has learnt it, and the rule can go."""
    family = FAMILIES[model_type]
    tokens = torch.arange(8)[None]
    for size, legal in ((24, True), (20, False)):
        values = {**family.tiny_config, family.config_fields[width]: size}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=torch.bfloat16)
        assert bool(family.broken_rules(family.sizes(model.config))) is not legal
        if legal:
            assert model(input_ids=tokens).logits.isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="16 bytes"):
                model(input_ids=tokens)


def test_experts_of_a_model_without_are_refused():
    shape = replace(StudentShape.of(LLAMA_3_8B), num_experts=4)
    assert "the teacher is no mixture of experts" in refusal(shape, LLAMA_3_8B)
    assert replace(shape, num_experts=None).as_dict().get("num_experts") is None


def test_percent_smaller_is_not_read_as_percent():
    """ "40% smaller" would keep 60 %, "40%" keeps 40 %: the words that could mean both are refused."""
    with pytest.raises(ShapeError, match="Not a target size"):
        solve_shape(LLAMA_2_7B, "40% smaller")
    assert solve_shape(LLAMA_2_7B, "2.5x smaller") == solve_shape(LLAMA_2_7B, "2.5x")
