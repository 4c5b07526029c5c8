"""Cutting: one behaviour suite over every family, tied and untied, and the reference implementation's bugs."""

from __future__ import annotations

import copy
import json
import lzma
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import SHARED_DATA
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_capgap import ExpressiveScores, StudentShape, cut, score, verify
from hf_capgap.errors import CapGapError, OutputFolderError, ScoresError, ShapeError, VerificationError
from hf_capgap.families import FAMILIES
from hf_capgap.pruning import Kept, select

TOLERANCE = 1e-4


def random_scores(config: PreTrainedConfig, seed: int = 0) -> ExpressiveScores:
    """Scores that keep other units in every layer, without the time that scoring takes."""
    generator = torch.Generator().manual_seed(seed)
    return ExpressiveScores(
        heads=torch.rand(config.num_hidden_layers, config.num_key_value_heads, generator=generator),
        neurons=torch.rand(config.num_hidden_layers, config.intermediate_size, generator=generator),
        hidden=torch.rand(config.hidden_size, generator=generator),
        metric="expressive",
        unit="batch",
        num_units=7,
        model_type=config.model_type,
        model_name="",
        calibration_hash=f"{seed:064x}",
    )


def smaller(config: PreTrainedConfig, **changes: int) -> StudentShape:
    """The teacher's shape with `changes`; query heads follow the KV groups."""
    teacher = StudentShape.of(config)
    if "num_key_value_heads" in changes:
        group = teacher.num_attention_heads // teacher.num_key_value_heads
        changes["num_attention_heads"] = group * changes["num_key_value_heads"]
    return replace(teacher, **changes)


def smaller_everywhere(config: PreTrainedConfig) -> StudentShape:
    return smaller(config, num_hidden_layers=2, hidden_size=42, num_key_value_heads=3, intermediate_size=37)


def make_student(model: PreTrainedModel, **changes: int) -> PreTrainedModel:
    return cut(model, random_scores(model.config), smaller(model.config, **changes))


def make_inputs(config: PreTrainedConfig, length: int = 24) -> Tensor:
    """[2, length]: longer than the tiny configs' sliding windows."""
    return torch.randint(2, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=make_inputs(model.config)).logits.float()


def assert_same_logits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=TOLERANCE)


def zeroed_teacher(teacher: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A copy of the teacher that computes what its student must, by zeros and factors in its weights alone.

    What writes to removed units is zeroed. A norm then still divides by all H dimensions instead of the H' kept ones,
    which a factor √(H'/H) on its weight and H'/H on its epsilon undo.
    """
    model = copy.deepcopy(teacher).eval()
    config = model.config
    ratio = len(kept.hidden) / config.hidden_size
    removed_hidden = others(kept.hidden, config.hidden_size)
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
    model.get_input_embeddings().weight.data[:, removed_hidden] = 0.0
    norms = [model.model.norm]
    for index, layer in enumerate(model.model.layers):
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            rows = removed_hidden if index in kept.layers else slice(None)  # a removed layer adds nothing
            for parameter in projection.parameters():
                parameter.data[rows] = 0.0
        if index in kept.layers:
            group_width = layer.self_attn.o_proj.in_features // config.num_key_value_heads
            for group in others(kept.heads[index], config.num_key_value_heads):
                layer.self_attn.o_proj.weight.data[:, group * group_width : (group + 1) * group_width] = 0.0
            layer.mlp.down_proj.weight.data[:, others(kept.neurons[index], config.intermediate_size)] = 0.0
    for norm in norms:
        norm.weight.data *= ratio**0.5
        norm.variance_epsilon *= ratio
    return model


def others(kept: Sequence[int], size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept))


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


# --- the behaviour suite -------------------------------------------------------------------------------------------


@dataclass
class Case:
    teacher: PreTrainedModel
    shape: StudentShape
    student: PreTrainedModel
    folder: Path
    tied: bool


@pytest.fixture(scope="module", params=[(name, tied) for name in FAMILIES for tied in (False, True)], ids=str)
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


def test_saved_file_has_exactly_the_models_tensors(case):
    """No recovery indices, no rotary buffers, no second copy of tied embeddings."""
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(case.folder))
    assert tensor_names(case.folder) == {name for name, _ in fresh.named_parameters()}


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


def test_everything_but_the_sizes_is_the_teachers(case):
    teacher, student = case.teacher.config.to_dict(), case.student.config.to_dict()
    sizes = {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"}
    changed = {name for name in {*teacher, *student} if teacher.get(name) != student.get(name)}
    assert changed - {"layer_types"} == sizes


@pytest.mark.parametrize("model_type", FAMILIES)
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


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bfloat16_teacher_gives_a_bfloat16_student(make_model, model_type, tmp_path):
    teacher = make_model(model_type, tie_word_embeddings=True).bfloat16()
    student = cut(
        teacher, random_scores(teacher.config), smaller_everywhere(teacher.config), output_dir=tmp_path / "s"
    )
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(tmp_path / "s" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "s").dtype == torch.bfloat16
    verify(teacher, student)
    assert student.dtype == teacher.dtype == torch.bfloat16  # verified on copies
    first = student.kept.layers[0]
    expected = teacher.model.layers[first].mlp.up_proj.weight[student.kept.neurons[first]][:, student.kept.hidden]
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, expected)  # sliced, never rounded


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}])
def test_biases_are_cut_too(make_model, biases):
    teacher = make_model("llama", **biases)
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    verify(teacher, student)
    assert_same_logits(logits_of(zeroed_teacher(teacher, student.kept)), logits_of(student))


def test_student_is_where_and_as_the_teacher_is(make_model):
    teacher = make_model().eval()
    teacher.set_attn_implementation("eager")
    teacher.generation_config.max_new_tokens = 11
    student = make_student(teacher, hidden_size=32)
    assert not student.training
    assert student.config._attn_implementation == "eager"
    assert student.generation_config.max_new_tokens == 11


def test_shape_may_be_a_target(make_model):
    teacher = make_model()
    student = cut(teacher, random_scores(teacher.config), "50%")
    assert student.num_parameters() == pytest.approx(0.5 * teacher.num_parameters(), rel=0.1)
    verify(teacher, student)


def in_numbering_of(outer: Kept, inner: Kept) -> Kept:
    """What two cuts, `outer` and then `inner`, keep of the first teacher."""

    def units(name: str) -> dict[int, list[int]]:
        before, after = getattr(outer, name), getattr(inner, name)
        return {outer.layers[i]: [before[outer.layers[i]][unit] for unit in after[i]] for i in inner.layers}

    return Kept(
        hidden=[outer.hidden[unit] for unit in inner.hidden],
        layers=[outer.layers[i] for i in inner.layers],
        heads=units("heads"),
        neurons=units("neurons"),
    )


def test_student_of_a_student_is_cut_from_the_original(make_model):
    """Cutting twice is cutting once to the units kept by both, and the lineage tells both cuts."""
    teacher = make_model("qwen3")
    middle = make_student(teacher, num_hidden_layers=3, hidden_size=48, num_key_value_heads=3, intermediate_size=80)
    batch = {"input_ids": make_inputs(teacher.config)}
    small = cut(middle, score(middle, [batch]), smaller(middle.config, hidden_size=30, intermediate_size=37))
    verify(middle, small)
    verify(teacher, small, kept=in_numbering_of(middle.kept, small.kept))
    assert [stage["stage"] for stage in small.lineage] == ["cut", "cut"]


# --- verify really fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
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


@pytest.mark.parametrize("axis", ["hidden", "heads", "neurons", "layers"])
def test_verify_notices_wrong_kept_indices(make_model, axis):
    teacher = make_model()
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    kept, first = student.kept, student.kept.layers[0]
    wrong = {
        "hidden": {"hidden": swap_one(kept.hidden, 64)},
        "heads": {"heads": {**kept.heads, first: swap_one(kept.heads[first], 4)}},
        "neurons": {"neurons": {**kept.neurons, first: swap_one(kept.neurons[first], 112)}},
        "layers": {
            "layers": [0, *kept.layers[1:]],
            "heads": {**kept.heads, 0: kept.heads[first]},
            "neurons": {**kept.neurons, 0: kept.neurons[first]},
        },
    }[axis]
    with pytest.raises(VerificationError, match="masked_difference"):
        verify(teacher, student, kept=replace(kept, **wrong))


def test_verify_notices_nan_and_a_wrong_parameter_count(make_model):
    teacher = make_model()
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    student.model.norm.weight.data[0] = float("nan")
    with pytest.raises(VerificationError, match="masked_difference"):
        verify(teacher, student)
    student = cut(teacher, random_scores(teacher.config), smaller_everywhere(teacher.config))
    student.config.intermediate_size += 1
    with pytest.raises(VerificationError, match="parameters"):
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


# --- which units and layers are kept -------------------------------------------------------------------------------


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
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_per_layer_lists_follow_the_layers_kept(make_model, tmp_path, model_type, layers):
    """Otherwise full-attention weights run with a sliding window, and the saved config does not load."""
    teacher = make_model(model_type, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
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


# --- the student's folder ------------------------------------------------------------------------------------------


@pytest.fixture
def teacher_folder(make_model, make_tokenizer, tmp_path) -> Path:
    """A saved teacher with its tokenizer."""
    folder = tmp_path / "private" / "big-teacher"
    make_model("qwen3", vocab_size=260, tie_word_embeddings=True).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def cut_folder(teacher_folder: Path, output_dir: Path, **options: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(teacher_folder)
    return cut(teacher_folder, random_scores(config), smaller_everywhere(config), output_dir=output_dir, **options)


def test_students_folder_is_complete(teacher_folder, tmp_path):
    output_dir = tmp_path / "new" / "student"
    student = cut_folder(teacher_folder, output_dir)
    files = {file.name for file in output_dir.iterdir()}
    assert files >= {"config.json", "model.safetensors", "generation_config.json", "capgap.json", "kept_indices.json"}
    assert [file.name for file in output_dir.parent.iterdir()] == ["student"]
    verify(teacher_folder, output_dir)
    reloaded = AutoModelForCausalLM.from_pretrained(output_dir)
    assert torch.equal(logits_of(reloaded), logits_of(student))
    assert Kept.load(output_dir) == student.kept


def test_lineage_tells_what_was_done(teacher_folder, tmp_path):
    student = cut_folder(teacher_folder, tmp_path / "student", layers=[0, 2])
    (stage,) = json.loads((tmp_path / "student" / "capgap.json").read_text())["stages"]
    assert [stage] == student.lineage
    assert stage["stage"] == "cut"
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    assert stage["teacher"] == {
        "name": "big-teacher",
        "revision": None,
        "model_type": "qwen3",
        "num_parameters": teacher.num_parameters(),
    }
    assert stage["scores"] == {"metric": "expressive", "unit": "batch", "num_units": 7, "calibration_hash": "0" * 64}
    assert stage["shape"] == asdict(StudentShape.of(student.config))
    assert stage["layers"] == [0, 2]
    assert stage["num_parameters"] == student.num_parameters()
    assert {"python", "torch", "transformers", "hf-capgap"} <= set(stage["versions"])


def test_lineage_of_the_teachers_folder_is_continued(teacher_folder, tmp_path):
    cut_folder(teacher_folder, tmp_path / "first")
    config = AutoConfig.from_pretrained(tmp_path / "first")
    cut(tmp_path / "first", random_scores(config), smaller(config, hidden_size=30), output_dir=tmp_path / "second")
    stages = json.loads((tmp_path / "second" / "capgap.json").read_text())["stages"]
    assert [stage["teacher"]["name"] for stage in stages] == ["big-teacher", "first"]


def test_teachers_tokenizer_comes_along(teacher_folder, tmp_path):
    from_path = tmp_path / "from path"
    cut_folder(teacher_folder, from_path)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    in_memory = tmp_path / "in memory"
    cut(model, random_scores(model.config), smaller_everywhere(model.config), output_dir=in_memory)
    text = "Once upon a time, naïve."
    for folder in (from_path, in_memory):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(teacher_folder)(text)["input_ids"]
        assert tokenizer.eos_token == "</s>"


def test_without_a_tokenizer_beside_the_teacher_there_is_none(make_model, make_tokenizer, tmp_path, monkeypatch):
    """A model made in memory must not pick up whatever tokenizer lies in the working directory."""
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    teacher = make_model()
    teacher.save_pretrained(tmp_path / "teacher")
    scores, shape = random_scores(teacher.config), smaller_everywhere(teacher.config)
    for number, model in enumerate((teacher, tmp_path / "teacher")):
        cut(model, scores, shape, output_dir=tmp_path / f"student-{number}")
        assert not list((tmp_path / f"student-{number}").glob("*token*"))
        verify(teacher, tmp_path / f"student-{number}")


def test_no_local_path_is_published(teacher_folder, tmp_path):
    cut_folder(teacher_folder, tmp_path / "student")
    files = list((tmp_path / "student").rglob("*.json"))
    assert len(files) >= 5
    for file in files:
        for private in (tmp_path, Path.home(), Path.cwd()):
            assert str(private) not in file.read_text(encoding="utf-8"), file.name


def test_output_folder_that_holds_something_is_refused_and_untouched(teacher_folder, tmp_path):
    output_dir = tmp_path / "student"
    output_dir.mkdir()
    (output_dir / "notes.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match="not empty"):
        cut_folder(teacher_folder, output_dir)
    assert [(file.name, file.read_text()) for file in output_dir.iterdir()] == [("notes.txt", "mine")]
    with pytest.raises(FileExistsError):
        cut_folder(teacher_folder, output_dir / "notes.txt")
    config = AutoConfig.from_pretrained(teacher_folder)
    with pytest.raises(OutputFolderError):  # before a big teacher is loaded for nothing
        cut(tmp_path / "no such teacher", random_scores(config), smaller_everywhere(config), output_dir=output_dir)


def test_empty_output_folder_is_used(teacher_folder, tmp_path):
    (tmp_path / "student").mkdir()
    cut_folder(teacher_folder, tmp_path / "student")
    verify(teacher_folder, tmp_path / "student")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_failure_in_the_middle_leaves_nothing_behind(teacher_folder, tmp_path, monkeypatch, error, exists):
    """Half a folder would load, or stop the next attempt."""
    output_dir = tmp_path / "models" / "student"
    (output_dir if exists else output_dir.parent).mkdir(parents=True)

    def disk_full(kept: Kept, folder: Path) -> None:
        assert (Path(folder) / "model.safetensors").exists()  # the weights have been written already
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Kept, "save", disk_full)
        with pytest.raises(error):
            cut_folder(teacher_folder, output_dir)
    assert [file.name for file in output_dir.parent.rglob("*")] == (["student"] if exists else [])
    cut_folder(teacher_folder, output_dir)


def test_damaged_lineage_of_the_teacher_is_refused_before_anything_is_written(teacher_folder, tmp_path):
    (teacher_folder / "capgap.json").write_text("{")
    with pytest.raises(CapGapError, match=re.escape("capgap.json")):
        cut_folder(teacher_folder, tmp_path / "student")
    assert not (tmp_path / "student").exists()


# --- a model that was really trained -------------------------------------------------------------------------------

STORIES = SHARED_DATA / "models" / "stories260K"


@pytest.mark.skipif(not STORIES.exists(), reason=f"the trained model {STORIES.name} is not on this machine")
def test_expressive_scores_keep_what_a_trained_model_needs():
    """Cut to 60 %: by the scores, at random, and keeping the lowest scores. Held-out text tells them apart."""
    teacher = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    with lzma.open(SHARED_DATA / "text" / "tinystories_sample.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(40_000)
    ids = torch.tensor(AutoTokenizer.from_pretrained(STORIES)(text, verbose=False)["input_ids"])
    blocks = ids[: 96 * 128].view(96, 128)
    scores = score(teacher, [{"input_ids": batch} for batch in blocks[:48].split(8)])
    negated = replace(scores, heads=-scores.heads, neurons=-scores.neurons, hidden=-scores.hidden)

    @torch.no_grad()
    def loss_of(model: PreTrainedModel) -> float:
        return model(input_ids=blocks[48:], labels=blocks[48:]).loss.item()

    students = [cut(teacher, each, "60%") for each in (scores, random_scores(teacher.config), negated)]
    assert len({student.num_parameters() for student in students}) == 1
    by_scores, at_random, by_negated_scores = map(loss_of, students)
    assert loss_of(teacher) < 1.8 < by_scores
    assert by_scores + 0.3 < at_random < by_negated_scores


def test_tokenizer_that_cannot_be_written_fails_the_cut_and_leaves_nothing(make_model, make_tokenizer, tmp_path):
    """A full disk must not pass for a teacher without a tokenizer."""
    teacher = make_model(vocab_size=260)
    teacher.save_pretrained(tmp_path / "teacher")
    make_tokenizer(260).save_pretrained(tmp_path / "teacher")
    scores = score(teacher, [{"input_ids": torch.randint(260, (2, 16))}])
    full = OSError(28, "No space left on device")
    with (
        patch("transformers.PreTrainedTokenizerBase.save_pretrained", side_effect=full),
        pytest.raises(OSError, match="No space left"),
    ):
        cut(tmp_path / "teacher", scores, "40%", output_dir=tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
