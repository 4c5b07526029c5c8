"""`hf-capgap cut` and `hf-capgap verify`: the same student as the API, its report, its proof; and what they refuse."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import cells, run, save_teacher
from safetensors.torch import load_file
from students import random_scores
from transformers import AutoConfig, AutoModelForCausalLM

from hf_capgap import ExpressiveScores, StudentShape, cut, solve_shape
from hf_capgap.cli.shape_options import ShapeOptions
from hf_capgap.errors import ConfigError, ShapeError
from hf_capgap.families import FAMILIES
from hf_capgap.pruning import Kept, global_profile

LESS_THAN_HALF = ("--target", "60%")


@pytest.fixture(scope="module")
def teacher(make_model, make_tokenizer, tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("cut") / "teacher", make_model, make_tokenizer)


@pytest.fixture(scope="module")
def scores(teacher: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    random_scores(AutoConfig.from_pretrained(teacher)).save(path)
    return path


@pytest.fixture
def cut_command(capsys, teacher: Path, scores: Path, tmp_path: Path):
    return lambda *argv: run(capsys, "cut", teacher, "--scores", scores, "--output_dir", tmp_path / "student", *argv)


# --- cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--target", "60%"], {}),
        (["--target", "60%", "--num_hidden_layers", "3", "--layers", "scores"], {"layers": "scores"}),
        (["--num_hidden_layers", "3", "--protect_ends"], {"protect_ends": True}),
        (["--layers", "0,2,3"], {"layers": [0, 2, 3]}),
        (["--hidden_size", "56", "--intermediate_size", "80"], {}),
        (["--num_key_value_heads", "2"], {}),
        (["--num_attention_heads", "4"], {}),
    ],
    ids=" ".join,
)
def test_the_student_is_that_of_the_api(cut_command, teacher, scores, tmp_path, argv, options) -> None:
    result = cut_command(*argv)
    assert result.code == 0, result.err
    config = AutoConfig.from_pretrained(teacher)
    shape = StudentShape.of(AutoConfig.from_pretrained(tmp_path / "student"))
    expected = cut(AutoModelForCausalLM.from_pretrained(teacher), ExpressiveScores.load(scores), shape, **options)
    assert Kept.load(tmp_path / "student") == expected.kept
    weights = load_file(tmp_path / "student" / "model.safetensors")
    for name, parameter in expected.named_parameters():
        assert torch.equal(weights[name], parameter), name
    before, after = (one.num_parameters(config) for one in (StudentShape.of(config), shape))
    assert cells(result.out, "parameters") == [f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
    assert cells(result.out, "hidden_size")[:2] == ["64", str(shape.hidden_size)]


def test_the_report_is_the_global_profile_of_the_kept_layers(cut_command, teacher, scores, tmp_path) -> None:
    result = cut_command(*LESS_THAN_HALF, "--num_hidden_layers", "3")
    config = AutoConfig.from_pretrained(teacher)
    shape = StudentShape.of(AutoConfig.from_pretrained(tmp_path / "student"))
    kept = Kept.load(tmp_path / "student")
    profile = global_profile(ExpressiveScores.load(scores), shape, config, layers=kept.layers)
    report, shares = result.out.split("share of the scores kept:")
    for layer in kept.layers:
        expected = [str(profile.kept[kind][layer]) for kind in ("heads", "neurons")]
        assert cells(report, str(layer)) == expected
    assert cells(report, "this cut") == [str(shape.num_key_value_heads), str(shape.intermediate_size)]
    assert cells(shares, "all layers competing") == [f"{profile.share[kind]:.1%}" for kind in ("heads", "neurons")]
    assert cells(shares, "this cut") == [f"{profile.uniform_share[kind]:.1%}" for kind in ("heads", "neurons")]


def test_the_next_command_proves_the_cut(cut_command, capsys) -> None:
    [line] = [line for line in cut_command(*LESS_THAN_HALF).out.splitlines() if "hf-capgap verify" in line]
    program, *argv = shlex.split(line)
    assert program == "hf-capgap"
    result = run(capsys, *argv)
    assert result.code == 0, result.err
    assert "verified: " in result.out


def test_a_large_cut_is_warned_about_in_one_line(cut_command) -> None:
    with pytest.warns(UserWarning, match="This cut removes 7.% of the teacher at once"):
        assert cut_command("--target", "25%", "--multiple_of", "1").code == 0


def test_the_shards_are_of_the_size_asked_for(cut_command, tmp_path) -> None:
    assert cut_command(*LESS_THAN_HALF, "--max_shard_size", "100KB").code == 0
    shards = list((tmp_path / "student").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").num_parameters() > 0


def test_options_come_from_a_file(capsys, teacher, scores, tmp_path) -> None:
    yaml = tmp_path / "cut.yaml"
    yaml.write_text(
        f"model: {teacher}\nscores: {scores}\noutput_dir: {tmp_path / 'student'}\nlayers: 0,3\nmultiple_of: null\n"
    )
    result = run(capsys, "cut", "--config", yaml, "--layers", "1,2,3")
    assert result.code == 0, result.err
    assert Kept.load(tmp_path / "student").layers == [1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "ConfigError: Nothing says how large the student is"),
        (
            ["--target", "60%", "--hidden_size", "32"],
            "ConfigError: A target and sizes contradict each other (found: --h",
        ),
        (["--hidden_size", "32", "--multiple_of", "8"], "there is none (found: --multiple_of)"),
        (["--target", "60%", "--layers", "ends"], "ConfigError: Unknown way to choose layers (found: ends)"),
        (["--target", "60%", "--split", "even"], "argument --split: invalid choice: 'even'"),
        (["--target", "lots"], "ShapeError: Not a target size (found: lots)"),
        (["--hidden_size", "65"], "hidden_size 65 is wider than the teacher's 64"),
        (["--layers", "0,9"], "ShapeError: The layers to keep must be 2 different indices below 4"),
        (["--layers", "0,1", "--num_hidden_layers", "3"], "ShapeError: The layers to keep must be 3 different"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_shape_is_refused_and_leaves_no_folder(cut_command, tmp_path, argv, message) -> None:
    result = cut_command(*argv)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "student").exists()


def test_a_folder_that_holds_something_is_left_alone(cut_command, tmp_path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "precious").touch()
    result = cut_command(*LESS_THAN_HALF)
    assert (result.code, result.err.partition(" (")[0]) == (2, "OutputFolderError: The output folder is not empty")
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["precious"]


def test_scores_of_another_model_are_refused(capsys, make_model, teacher, tmp_path) -> None:
    random_scores(make_model("qwen3").config).save(tmp_path / "other")
    result = run(capsys, "cut", teacher, tmp_path / "other", "--target", "60%", "--output_dir", tmp_path / "student")
    assert result.code == 2
    assert "ScoresError: These scores are of another model" in result.err


@pytest.mark.parametrize(("what", "error"), [("missing", "FileNotFoundError"), ("damaged", "ScoresError")])
def test_bad_scores_are_refused(capsys, teacher, tmp_path, what: str, error: str) -> None:
    if what == "damaged":
        (tmp_path / "scores").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    result = run(capsys, "cut", teacher, tmp_path / "scores", *LESS_THAN_HALF, "--output_dir", tmp_path / "student")
    assert result.code == 2
    assert result.err.startswith(error)


def test_a_teacher_that_is_not_there_is_named(capsys, scores, tmp_path) -> None:
    result = run(capsys, "cut", tmp_path / "gone", scores, *LESS_THAN_HALF, "--output_dir", tmp_path / "student")
    assert result.code == 2
    assert result.err.startswith("CheckpointError: The config does not load")


# --- which shape the options mean ----------------------------------------------------------------------------------


def shape_of(model_type: str, **options: object) -> StudentShape:
    config = AutoConfig.for_model(model_type, **FAMILIES[model_type].tiny_config)
    return ShapeOptions(**options).shape(config, random_scores(config))


@pytest.mark.parametrize(
    ("model_type", "options", "heads"),
    [
        ("llama", {"num_key_value_heads": 2}, (4, 2)),  # 8 query heads in 4 groups: groups go whole
        ("llama", {"num_attention_heads": 4}, (4, 4)),  # groups keep one of two
        ("llama", {"num_attention_heads": 8, "hidden_size": 48}, (8, 4)),  # all of them: groups stay
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, (2, 2)),
        ("gpt2", {"num_attention_heads": 4, "hidden_size": 32}, (4, 4)),  # a group for each query head
        ("gpt2", {"num_key_value_heads": 4, "hidden_size": 32}, (4, 4)),
    ],
)
def test_heads_follow_each_other(model_type: str, options: dict, heads: tuple[int, int]) -> None:
    shape = shape_of(model_type, **options)
    assert (shape.num_attention_heads, shape.num_key_value_heads) == heads


def test_what_is_not_named_is_the_teachers() -> None:
    config = AutoConfig.for_model("qwen3_moe", **FAMILIES["qwen3_moe"].tiny_config)
    assert shape_of("qwen3_moe", num_experts=2) == replace(StudentShape.of(config), num_experts=2)


@pytest.mark.parametrize("options", [{"multiple_of": 4}, {"tensor_parallel": 2}, {"num_hidden_layers": 3}, {}])
@pytest.mark.parametrize("split", ["balanced", "scores"])
def test_a_target_is_solved_for_with_the_options(options: dict, split: str) -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"].tiny_config)
    scores = random_scores(config) if split == "scores" else None
    expected = solve_shape(config, "50%", split=split, scores=scores, **options)
    assert shape_of("llama", target="50%", split=split, **options) == expected


def test_a_shape_that_the_family_cannot_have_is_refused() -> None:
    with pytest.raises(ShapeError, match="nearest legal shape"):
        shape_of("gpt2", hidden_size=40)
    with pytest.raises(ConfigError, match="Nothing says"):
        shape_of("gpt2")


# --- verify --------------------------------------------------------------------------------------------------------


@pytest.fixture
def student(cut_command, tmp_path: Path) -> Path:
    assert cut_command(*LESS_THAN_HALF).code == 0
    return tmp_path / "student"


def test_a_student_is_verified(capsys, teacher, student) -> None:
    result = run(capsys, "verify", teacher, student)
    assert result.code == 0, result.err
    assert 0 <= float(cells(result.out, "masked teacher and student")[0]) < 1e-4
    assert f"{AutoModelForCausalLM.from_pretrained(student).num_parameters():,} parameters" in result.out


def test_a_student_that_was_trained_is_not_verified(capsys, teacher, student) -> None:
    model = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    model.save_pretrained(student)
    result = run(capsys, "verify", teacher, student)
    assert result.code == 1
    assert result.err.startswith("not verified: masked_difference exceeds 0.0001")
    assert run(capsys, "verify", teacher, student, "--tolerance", 1e6).code == 0


def test_a_student_of_other_kept_units_is_not_verified(capsys, teacher, student) -> None:
    kept = Kept.load(student)
    others = sorted(set(range(64)) - set(kept.hidden))
    replace(kept, hidden=sorted([*kept.hidden[1:], others[0]])).save(student)
    assert run(capsys, "verify", teacher, student).code == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "kept_indices.json").unlink(), "CheckpointError: The student's folder has no kept_"),
        (
            lambda folder: (folder / "kept_indices.json").write_text("{"),
            "CheckpointError: The file of kept indices is",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "CheckpointError: A weight file is"),
        (lambda folder: (folder / "config.json").write_text("{}"), "CheckpointError: The model does not load"),
    ],
    ids=["no kept indices", "damaged kept indices", "damaged weights", "no config"],
)
def test_a_student_that_cannot_be_read_is_bad_usage(capsys, teacher, student, damage, message: str) -> None:
    damage(student)
    result = run(capsys, "verify", teacher, student)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(message) or message in result.err
