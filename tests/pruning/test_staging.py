"""Cutting in stages: nested shapes, composed kept indices, what is called between the stages, and what is refused."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from students import ALL_FAMILIES, assert_same_logits, logits_of, make_inputs, smaller, smaller_everywhere
from transformers import AutoConfig, AutoModelForCausalLM

from hf_capgap import ExpressiveScores, StudentShape, cut, prune, score, solve_shape, verify
from hf_capgap.errors import ConfigError, OutputFolderError, ShapeError
from hf_capgap.families import FAMILIES
from hf_capgap.lineage import read_stages
from hf_capgap.pruning import Kept
from hf_capgap.pruning.staging import stage_shapes

quietly = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny


def make_batches(config, num_batches: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(2, config.vocab_size, (2, 12), generator=generator)} for _ in range(num_batches)
    ]


def config_of(model_type: str, **overrides: int):
    return AutoConfig.for_model(model_type, **{**FAMILIES[model_type].tiny_config, **overrides})


def fits(inner: StudentShape, outer: StudentShape) -> bool:
    sizes = outer.as_dict()
    return inner.queries_per_group <= outer.queries_per_group and all(
        size <= sizes[name] for name, size in inner.as_dict().items()
    )


# --- the shapes on the way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_shapes_are_nested_and_legal(model_type: str) -> None:
    """Any legal final shape, drawn at random, in any number of stages."""
    config, draw = config_of(model_type), random.Random(0)
    teacher = StudentShape.of(config)
    num_tried = 0
    while num_tried < 30:
        groups = draw.randint(1, teacher.num_key_value_heads)
        final = replace(
            teacher,
            num_hidden_layers=draw.randint(1, teacher.num_hidden_layers),
            hidden_size=draw.randint(1, teacher.hidden_size),
            num_key_value_heads=groups,
            num_attention_heads=groups * draw.randint(1, teacher.queries_per_group),
            intermediate_size=draw.randint(1, teacher.intermediate_size),
            num_experts=teacher.num_experts and draw.choice([None, *range(1, teacher.num_experts + 1)]),
        )
        try:
            final.check_within(config)
        except ShapeError:
            continue
        num_tried += 1
        for stages in (1, 2, 3, 4):
            shapes = stage_shapes(config, final, stages)
            assert len(shapes) == stages
            assert shapes[-1] == final
            for outer, inner in itertools.pairwise([teacher, *shapes]):
                inner.check_within(config)
                assert fits(inner, outer), (outer, inner, final)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "qwen3"])
@pytest.mark.parametrize("stages", [2, 3])
def test_every_stage_removes_about_the_same_share(model_type: str, stages: int) -> None:
    """Of a model so wide that rounding does not matter."""
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 8192, "num_hidden_layers": 24}
    config = config_of(model_type, **sizes, num_key_value_heads=32, head_dim=64, n_inner=8192, vocab_size=1000)
    final = solve_shape(config, "20%")
    sizes = [shape.num_parameters(config) for shape in [StudentShape.of(config), *stage_shapes(config, final, stages)]]
    ratios = [after / before for before, after in itertools.pairwise(sizes)]
    wanted = (sizes[-1] / sizes[0]) ** (1 / stages)
    assert ratios == pytest.approx([wanted] * stages, rel=0.1)


# --- the cuts ------------------------------------------------------------------------------------------------------


@quietly
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"])
def test_the_final_shape_is_reached_and_proved(make_model, model_type: str, stages: int) -> None:
    teacher = make_model(model_type)
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    final = smaller_everywhere(teacher.config)
    student = prune(teacher, make_batches(teacher.config), final, stages=stages, layers="scores")
    assert StudentShape.of(student.config) == final
    assert student.num_parameters() == final.num_parameters(teacher.config)
    report = verify(teacher, student)  # by the composed kept indices, in the teacher's numbering
    assert report.masked_difference < 1e-4
    assert [stage["stage"] for stage in student.lineage] == ["cut"] * stages
    expected = [shape.as_dict() for shape in stage_shapes(teacher.config, final, stages)]
    assert [stage["shape"] for stage in student.lineage] == expected
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())


@quietly
def test_one_stage_is_one_cut(make_model) -> None:
    teacher = make_model()
    batches, final = make_batches(teacher.config), smaller_everywhere(teacher.config)
    student = prune(teacher, batches, final)
    expected = cut(teacher, score(teacher, batches), final)
    assert student.kept == expected.kept
    assert torch.equal(logits_of(student), logits_of(expected))


@quietly
def test_each_stage_is_scored_anew(make_model) -> None:
    """Two stages are the two cuts by hand, each with the scores of what is left; and not one cut."""
    teacher = make_model()
    batches, final = make_batches(teacher.config), smaller_everywhere(teacher.config)
    student = prune(teacher, batches, final, stages=2, metric="taylor", unit="example")
    by_hand = teacher
    for shape in stage_shapes(teacher.config, final, 2):
        by_hand = cut(by_hand, score(by_hand, batches, "example", "taylor"), shape)
    assert torch.equal(logits_of(student), logits_of(by_hand))
    assert student.kept != prune(teacher, batches, final, metric="taylor", unit="example").kept


@quietly
def test_a_target_is_solved_for_once_for_the_teacher(make_model) -> None:
    teacher = make_model()
    options = {"num_hidden_layers": 3, "multiple_of": 4, "tensor_parallel": 2}
    student = prune(teacher, make_batches(teacher.config), "40%", stages=2, **options)
    assert StudentShape.of(student.config) == solve_shape(teacher.config, "40%", **options)


@quietly
def test_the_split_by_scores_is_by_those_of_the_teacher(make_model) -> None:
    teacher = make_model()
    batches = make_batches(teacher.config)
    student = prune(teacher, batches, "50%", stages=2, split="scores")
    expected = solve_shape(teacher.config, "50%", split="scores", scores=score(teacher, batches))
    assert StudentShape.of(student.config) == expected


@quietly
@pytest.mark.parametrize("num_batches", [None, 2])
def test_an_iterator_of_batches_serves_every_stage(make_model, num_batches: int | None) -> None:
    teacher = make_model()
    batches, final = make_batches(teacher.config, 3), smaller_everywhere(teacher.config)
    student = prune(teacher, iter(batches), final, stages=3, num_batches=num_batches)
    expected = prune(teacher, batches[:num_batches], final, stages=3)
    assert student.kept == expected.kept
    hashes = {stage["scores"]["calibration_hash"] for stage in student.lineage}
    assert hashes == {score(teacher, batches[:num_batches]).calibration_hash}


@quietly
def test_protected_ends_stay_through_all_stages(make_model) -> None:
    teacher = make_model(num_hidden_layers=6)
    final = smaller(teacher.config, num_hidden_layers=2)
    student = prune(teacher, make_batches(teacher.config), final, stages=3, protect_ends=True)
    assert student.kept.layers == [0, 5]


@quietly
def test_the_saved_student_is_the_student(make_model, make_tokenizer, tmp_path) -> None:
    make_model(vocab_size=260).save_pretrained(tmp_path / "teacher")
    make_tokenizer(260).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    final = smaller_everywhere(teacher.config)
    student = prune(teacher, make_batches(teacher.config), final, stages=2, output_dir=tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits_of(loaded), logits_of(student))
    assert Kept.load(tmp_path / "student") == student.kept
    assert read_stages(tmp_path / "student") == student.lineage
    assert (tmp_path / "student" / "tokenizer.json").is_file()
    assert verify(tmp_path / "teacher", tmp_path / "student").masked_difference < 1e-4


# --- training in between -------------------------------------------------------------------------------------------


@quietly
@pytest.mark.parametrize("returned", ["in place", "another model"])
def test_distil_is_called_between_the_stages_and_its_result_goes_on(make_model, returned: str) -> None:
    teacher = make_model()
    batches, final = make_batches(teacher.config), smaller_everywhere(teacher.config)
    shapes, calls = stage_shapes(teacher.config, final, 3), []

    def distil(student, of, stage):
        """One real step of gradient descent."""
        calls.append((stage, StudentShape.of(student.config)))
        assert of is teacher
        trained = student
        if returned == "another model":
            trained = AutoModelForCausalLM.from_config(student.config)
            trained.load_state_dict(student.state_dict())
        inputs = make_inputs(student.config)
        trained(input_ids=inputs, labels=inputs).loss.backward()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter -= 0.05 * parameter.grad
        trained.zero_grad()
        return None if trained is student else trained

    student = prune(teacher, batches, final, stages=3, distil=distil)
    assert calls == [(1, shapes[0]), (2, shapes[1])]  # not after the last cut
    by_hand = teacher
    for number, shape in enumerate(shapes, start=1):
        by_hand = cut(by_hand, score(by_hand, batches), shape)
        if number < 3:
            by_hand = distil(by_hand, teacher, number) or by_hand
    assert_same_logits(logits_of(student), logits_of(by_hand))
    untrained = prune(teacher, batches, final, stages=3)
    assert not torch.allclose(logits_of(student), logits_of(untrained), atol=1e-3)
    assert [stage["stage"] for stage in student.lineage] == ["cut"] * 3
    assert len(student.kept.hidden) == final.hidden_size
    assert max(student.kept.hidden) >= final.hidden_size  # the teacher's numbering


@quietly
def test_one_stage_never_distils(make_model) -> None:
    teacher = make_model()
    final = smaller_everywhere(teacher.config)
    prune(teacher, make_batches(teacher.config), final, distil=lambda *_: pytest.fail("there is no in-between"))


# --- warnings and errors -------------------------------------------------------------------------------------------


def test_a_single_large_cut_is_warned_about_and_stages_below_half_are_not(make_model, recwarn) -> None:
    teacher = make_model()
    batches = make_batches(teacher.config)
    target = "30%"
    with pytest.warns(UserWarning, match=r"This cut removes 7\d% of the teacher at once.*stages"):
        prune(teacher, batches, target)
    recwarn.clear()
    final = solve_shape(teacher.config, target)
    sizes = [shape.num_parameters(teacher.config) for shape in stage_shapes(teacher.config, final, 3)]
    sizes.insert(0, teacher.num_parameters())
    assert all(after >= 0.5 * before for before, after in itertools.pairwise(sizes))
    prune(teacher, batches, target, stages=3)
    assert [str(warning.message) for warning in recwarn] == []


class Unread:
    """Batches that must not be read: what is wrong shows before hours of scoring."""

    def __iter__(self):
        pytest.fail("the batches were read")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [0, 1]}, ConfigError, "Layers by index have a meaning for one cut only"),
        ({"stages": 0}, ConfigError, "There must be at least one stage"),
        ({"target": "150%"}, ShapeError, "larger than the teacher"),
        ({"target": "lots"}, ShapeError, "Not a target size"),
        ({"split": "even"}, ConfigError, "Unknown split"),
        ({"target": StudentShape.of(config_of("llama", hidden_size=128))}, ShapeError, "wider than the teacher's"),
        (
            {"target": StudentShape.of(config_of("llama")), "multiple_of": 8, "num_hidden_layers": 3},
            ConfigError,
            r"a shape is given \(found: multiple_of, num_hidden_layers\)",
        ),
    ],
    ids=["layers", "stages", "too large", "no size", "split", "wider", "shape and options"],
)
def test_what_is_wrong_is_refused_before_scoring(make_model, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        prune(make_model(), Unread(), **{"target": "40%", "stages": 2, **options})


def test_a_folder_that_holds_something_is_refused_before_scoring(make_model, tmp_path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(OutputFolderError):
        prune(make_model(), Unread(), "40%", output_dir=tmp_path)


@quietly
def test_a_merged_score_of_a_stage_is_finite(make_model) -> None:
    """What a stage leaves can still be scored by every metric that needs data."""
    teacher = make_model("qwen3")
    batches = make_batches(teacher.config)
    student = prune(teacher, batches, smaller_everywhere(teacher.config), stages=2, metric="activation")
    scores = score(student, batches)
    assert isinstance(scores, ExpressiveScores)
    scores.check_finite()
    assert scores.heads.shape == (2, 3)
