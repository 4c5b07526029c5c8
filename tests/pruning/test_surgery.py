"""Cutting: one behaviour suite over every family, tied and untied, and two proofs of the cut that share nothing with
`verify`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from students import (
    ALL_FAMILIES,
    SMALLER,
    TOLERANCE,
    assert_same_logits,
    logits_of,
    make_inputs,
    make_student,
    others,
    random_scores,
    smaller,
    smaller_everywhere,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from zeroed import zeroed_teacher

from hf_capgap import StudentShape, cut, score, verify
from hf_capgap.errors import CapGapError, UnsupportedModelError, VerificationError
from hf_capgap.families import audit

pytestmark = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny

# --- the behaviour suite -------------------------------------------------------------------------------------------


@dataclass
class Case:
    teacher: PreTrainedModel
    shape: StudentShape
    student: PreTrainedModel
    folder: Path
    tied: bool


@pytest.fixture(scope="module", params=[(name, tied) for name in ALL_FAMILIES for tied in (False, True)], ids=str)
def case(request, make_model, tmp_path_factory) -> Case:
    """A student cut smaller in every dimension, saved by plain `save_pretrained`. Tests do not change it."""
    model_type, tied = request.param
    teacher_folder = tmp_path_factory.mktemp("teacher")
    make_model(model_type, tie_word_embeddings=tied).save_pretrained(teacher_folder)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    shape = smaller_everywhere(teacher.config)
    student = cut(teacher, random_scores(teacher.config), shape)
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    return Case(teacher, shape, student, folder, tied)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_teacher_and_student_pass_the_audit(case):
    family = audit(case.teacher)
    assert audit(case.student) is family
    assert family.model_type == case.teacher.config.model_type


def test_every_dimension_is_smaller(case):
    """Keeps the suite from proving nothing about a dimension that was not cut."""
    before, after = StudentShape.of(case.teacher.config).as_dict(), StudentShape.of(case.student.config).as_dict()
    assert after == {**before, **SMALLER[case.student.config.model_type]}
    assert [name for name in before if after[name] >= before[name]] == ["head_dim"]


def test_masked_teacher_computes_what_the_student_computes(case):
    report = verify(case.teacher, case.student, tolerance=TOLERANCE)
    assert max(report.masked_difference, report.reloaded_difference) < TOLERANCE
    assert logits_of(case.student).abs().max() > 0.1  # not equal because everything is zero


def test_student_computes_what_a_teacher_with_zeroed_weights_computes(case):
    """The same proof by another road, which shares nothing with `verify`."""
    assert_same_logits(logits_of(zeroed_teacher(case.teacher, case.student.kept)), logits_of(case.student))


def test_reloaded_student_computes_the_same(case):
    reloaded = AutoModelForCausalLM.from_pretrained(case.folder)
    assert type(reloaded) is type(case.teacher)
    assert torch.equal(logits_of(reloaded), logits_of(case.student))


def test_generation_with_a_cache_is_generation_without(case):
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20}
    prompt = make_inputs(case.student.config, length=8)
    cached = case.student.generate(prompt, use_cache=True, **options)
    assert cached.shape == (2, 28)
    assert torch.equal(cached, case.student.generate(prompt, use_cache=False, **options))


def test_ties_stay_what_they_were(case):
    for model in (case.student, AutoModelForCausalLM.from_pretrained(case.folder)):
        shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert shared is case.tied
        assert model.config.tie_word_embeddings is case.tied


def test_saved_file_has_exactly_the_tensors_of_a_model_built_anew(case, tmp_path):
    """No recovery indices, no rotary buffers, no second copy of tied embeddings; experts one by one."""
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(case.folder)).save_pretrained(tmp_path)
    stored = stored_shapes(case.folder)
    assert stored == stored_shapes(tmp_path)
    experts = {name.split(".experts.")[1].split(".")[0] for name in stored if ".experts." in name}
    assert experts == ({"0", "1", "2"} if case.shape.num_experts else set())


def test_config_alone_rebuilds_the_student(case):
    config = AutoConfig.from_pretrained(case.folder)
    assert StudentShape.of(config) == case.shape
    assert config.architectures == [type(case.teacher).__name__]
    rebuilt = AutoModelForCausalLM.from_config(config)
    rebuilt.load_state_dict(case.student.state_dict(), strict=True)
    assert torch.equal(logits_of(rebuilt), logits_of(case.student))


def test_parameter_count_is_what_the_shape_says(case):
    counted = sum(parameter.numel() for parameter in case.student.parameters())
    assert case.shape.num_parameters(case.teacher.config) == counted == case.student.num_parameters()
    assert sum(tensor.numel() for tensor in load_file(case.folder / "model.safetensors").values()) == counted


LLAMA_FIELDS = {
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
}
CHANGED_FIELDS = {
    **dict.fromkeys(ALL_FAMILIES, LLAMA_FIELDS),
    "gpt2": {"n_layer", "n_embd", "n_head", "n_inner"},
    "gpt_neox": LLAMA_FIELDS - {"num_key_value_heads"},
    "opt": {"num_hidden_layers", "hidden_size", "num_attention_heads", "ffn_dim", "word_embed_proj_dim"},
    "mixtral": LLAMA_FIELDS | {"num_local_experts"},
    "qwen3_moe": LLAMA_FIELDS - {"intermediate_size"} | {"moe_intermediate_size", "num_local_experts"},
}


def test_everything_but_the_sizes_is_the_teachers(case):
    teacher, student = case.teacher.config.to_dict(), case.student.config.to_dict()
    changed = {name for name in {*teacher, *student} if teacher.get(name) != student.get(name)}
    assert changed - {"layer_types", "no_rope_layers"} == CHANGED_FIELDS[case.teacher.config.model_type]


# --- dtypes, biases, and what else a teacher may bring -------------------------------------------------------------


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_teacher_is_not_changed(make_model, model_type):
    teacher = make_model(model_type)
    weights, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()  # the student shares no memory with it, either
    assert teacher.config.to_dict() == config
    assert teacher.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_bfloat16_teacher_gives_a_bfloat16_student(make_model, model_type, tied, tmp_path):
    teacher = make_model(model_type, tie_word_embeddings=tied).bfloat16()
    student = cut(
        teacher, random_scores(teacher.config), smaller_everywhere(teacher.config), output_dir=tmp_path / "s"
    )
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(tmp_path / "s" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "s").dtype == torch.bfloat16
    verify(teacher, student)
    assert student.dtype == teacher.dtype == torch.bfloat16  # verified on copies


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3_moe", {"attention_bias": True}),
        ("olmo2", {"attention_bias": True}),
        ("gemma2", {"attention_bias": True}),
        ("gemma3_text", {"attention_bias": True}),
        ("gpt_neox", {"attention_bias": False}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
    ],
    ids=str,
)
def test_optional_parameters_are_cut_too(make_model, model_type, options):
    teacher = make_model(model_type, **options)
    assert {name for name, _ in teacher.named_parameters()} != {
        name for name, _ in make_model(model_type).named_parameters()
    }
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    verify(teacher, student)


def test_sequential_residuals_of_gpt_neox_are_cut_too(make_model):
    teacher = make_model("gpt_neox", use_parallel_residual=False)
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    assert student.config.use_parallel_residual is False
    verify(teacher, student)
    assert_same_logits(logits_of(zeroed_teacher(teacher, student.kept)), logits_of(student))


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_every_position_comes_along(make_model, model_type):
    """`verify` compares rows that its probe does not read; here the longest input reads them all."""
    teacher = make_model(model_type)
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    ids = make_inputs(teacher.config, length=64)
    with torch.no_grad():
        masked = zeroed_teacher(teacher, student.kept)(input_ids=ids).logits
        assert_same_logits(masked, student.eval()(input_ids=ids).logits)


def test_student_is_where_and_as_the_teacher_is(make_model):
    teacher = make_model().eval()
    teacher.set_attn_implementation("eager")
    teacher.generation_config.max_new_tokens = 11
    student = make_student(teacher, hidden_size=32)
    assert not student.training
    assert student.config._attn_implementation == "eager"
    assert student.generation_config.max_new_tokens == 11


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_shape_may_be_a_target(make_model, model_type):
    teacher = make_model(model_type)
    student = cut(teacher, random_scores(teacher.config), "60%")
    assert student.num_parameters() == pytest.approx(0.6 * teacher.num_parameters(), rel=0.1)
    verify(teacher, student)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "mixtral"])
def test_student_of_a_student_is_cut_from_the_original(make_model, model_type):
    """Cutting twice is cutting once to the units kept by both, and the lineage tells both cuts."""
    teacher = make_model(model_type)
    middle = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    scores = score(middle, [{"input_ids": make_inputs(teacher.config)}])
    small = cut(middle, scores, smaller(middle.config, **AGAIN[model_type]))
    verify(middle, small)
    verify(teacher, small, kept=middle.kept.then(small.kept))
    assert [stage["stage"] for stage in small.lineage] == ["cut", "cut"]


AGAIN = {
    "qwen3": {"hidden_size": 30, "intermediate_size": 29, "num_attention_heads": 3},
    "gpt2": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 29},
    "mixtral": {"hidden_size": 32, "intermediate_size": 16, "num_experts": 2, "num_hidden_layers": 1},
}


def test_cutting_away_more_than_half_warns(make_model):
    teacher = make_model()
    with pytest.warns(UserWarning, match=r"removes \d\d% of the teacher at once.*stages"):
        make_student(teacher, num_hidden_layers=1, intermediate_size=8)


def test_quantised_weights_are_refused_at_the_cut(make_model):
    teacher = make_model()
    scores, shape = random_scores(teacher.config), smaller_everywhere(teacher.config)
    teacher.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UnsupportedModelError, match=r"Quantised.*bitsandbytes.*unquantised checkpoint"):
        cut(teacher, scores, shape)


def test_every_refusal_is_a_capgap_error(make_model):
    teacher = make_model()
    with pytest.raises(CapGapError):
        cut(teacher, random_scores(teacher.config), "200%")


# --- verify really fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "olmo2", "gemma3_text", "gpt2", "gpt_neox", "mixtral"])
def test_verify_notices_a_change_of_any_parameter(make_model, model_type):
    teacher = make_model(model_type)
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    for parameter in student.parameters():
        original = parameter.data.clone()
        parameter.data *= 1.0 + 0.02 * torch.randn_like(original)  # a common factor would vanish in Qwen3's q/k norms
        with pytest.raises(VerificationError, match="masked_difference"):
            verify(teacher, student)
        parameter.data = original
    verify(teacher, student)


def swap_one(kept: list[int], size: int) -> list[int]:
    """`kept` with its first unit exchanged for a removed one."""
    return sorted([others(kept, size)[0], *kept[1:]])


@pytest.mark.parametrize("axis", ["hidden", "query_heads", "neurons", "layers"])
def test_verify_notices_wrong_kept_indices(make_model, axis):
    teacher = make_model()
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    kept, first = student.kept, student.kept.layers[0]
    wrong = {
        "hidden": {"hidden": swap_one(kept.hidden, 64)},
        "query_heads": {"query_heads": {**kept.query_heads, first: swap_one(kept.query_heads[first], 8)}},
        "neurons": {"neurons": {**kept.neurons, first: swap_one(kept.neurons[first], 112)}},
        "layers": {
            "layers": [0, *kept.layers[1:]],
            "heads": {**kept.heads, 0: kept.heads[first]},
            "query_heads": {**kept.query_heads, 0: kept.query_heads[first]},
            "neurons": {**kept.neurons, 0: kept.neurons[first]},
        },
    }[axis]
    with pytest.raises(VerificationError, match="masked_difference"):
        verify(teacher, student, kept=replace(kept, **wrong))


def test_verify_notices_wrong_experts(make_model):
    teacher = make_model("mixtral")
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    kept, first = student.kept, student.kept.layers[0]
    wrong = {**kept.experts, first: swap_one(kept.experts[first], 4)}
    with pytest.raises(VerificationError, match="masked_difference"):
        verify(teacher, student, kept=replace(kept, experts=wrong))


def test_verify_notices_nan_and_a_wrong_parameter_count(make_model):
    teacher = make_model()
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    student.model.norm.weight.data[0] = float("nan")
    with pytest.raises(VerificationError, match="masked_difference"):
        verify(teacher, student)
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    student.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(VerificationError, match="parameters"):
        verify(teacher, student)
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    student.config.intermediate_size += 1
    with pytest.raises(VerificationError, match="neurons"):
        verify(teacher, student)


def test_verify_needs_the_kept_indices(make_model):
    teacher = make_model()
    with pytest.raises(VerificationError, match="kept"):
        verify(teacher, make_model())


def test_verify_leaves_both_models_as_they_were(make_model):
    teacher = make_model().train()
    student = make_student(teacher, hidden_size=32)
    verify(teacher, student)
    for model in (teacher, student):
        assert model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
