"""`plan`: its numbers are the laws', its words follow from them, and bad candidates are named one by one."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_capgap import CapacityGapLaw, DistillationLaw, SupervisedLaw, plan
from hf_capgap.cli.main import main as program
from hf_capgap.cli.plan import main
from hf_capgap.errors import CapGapError, LawError, PlanError
from hf_capgap.laws import Laws, PlanSettings, balanced_cut, measure, training_memory
from hf_capgap.laws.advice import TIE
from hf_capgap.laws.plots import band_outside_embeddings

REPOSITORY = Path(__file__).parent.parent.parent
# The configs of Qwen3-4B, -8B, -14B and of Llama 3.1 8B, as far as they matter here.
QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen-4b": {**QWEN3, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"intermediate_size": 9728, "tie_word_embeddings": True},
    "qwen-8b": {**QWEN3, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"intermediate_size": 12288, "tie_word_embeddings": False},
    "qwen-14b": {**QWEN3, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"intermediate_size": 17408, "tie_word_embeddings": False},
    "llama-8b": {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False},
    "mixtral": {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8}
    | {"num_experts_per_tok": 2, "tie_word_embeddings": False},
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of folders with nothing but a config; the working directory."""
    for name, config in CONFIGS.items():
        write_config(tmp_path / name, config)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(folder: Path, config: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_known_sizes_of_these_configs(models: Path) -> None:
    """What their model cards say: Qwen3 8.2B (6.95B without embeddings) and 14.8B, Mixtral 46.7B (12.9B active)."""
    sizes = {name: measure(config) for name, config in CONFIGS.items()}
    assert round(sizes["qwen-8b"].total / 1e9, 2) == 8.19
    assert round(sizes["qwen-8b"].non_embedding / 1e9, 2) == 6.95
    assert round(sizes["qwen-14b"].total / 1e9, 2) == 14.77
    assert sizes["llama-8b"].total == 8_030_261_248
    assert round(sizes["mixtral"].total / 1e9, 1) == 46.7
    assert round(sizes["mixtral"].active / 1e9, 1) == 12.9


def test_every_number_is_the_laws_and_the_configs(models: Path) -> None:
    settings = PlanSettings(device="A100", num_devices=4, utilisation=0.5, block_size=2048, price_per_hour=2.0)
    answer = plan("3B", ["qwen-8b", "llama-8b"], "100B", teacher_tokens="15T", settings=settings)
    law = DistillationLaw()
    assert answer.best_teacher_params == 7.5e9
    for row in answer.rows:
        teacher, student = measure(CONFIGS[row.name]), balanced_cut(CONFIGS[row.name], 3e9)
        assert (row.size, row.student) == (teacher, student)
        assert row.ratio == pytest.approx(teacher.total / 3e9)
        loss = float(law.supervised.loss(teacher.non_embedding, 15e12))
        assert row.teacher_loss.value == loss
        assert row.student_loss.value == pytest.approx(float(law.loss(student.non_embedding, 100e9, loss)))
        assert row.supervised_loss == pytest.approx(float(law.supervised.loss(student.non_embedding, 100e9)))
        counted = student.training_flops(100e9, 2048) + teacher.inference_flops(100e9, 2048)
        assert row.counted_flops == counted
        assert row.device_hours == pytest.approx(counted / (312e12 * 0.5 * 3600))
        assert row.price == pytest.approx(2.0 * row.device_hours)
        assert student.training_flops(row.supervised_tokens, 2048) == pytest.approx(counted)
        assert row.memory == training_memory(student, teacher, num_devices=4, tokens_per_device=2048)
        assert row.cache_bytes == teacher.cache_bytes(100e9)
    losses = [row.student_loss.value for row in answer.rows]
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("scenario", "parts"),
    [
        ("best_case", {"student_training"}),
        ("teacher_inference", {"student_training", "teacher_inference"}),
        ("teacher_pretraining", {"student_training", "teacher_pretraining"}),
        ("both", {"student_training", "teacher_inference", "teacher_pretraining"}),
    ],
)
def test_a_scenario_counts_what_it_says(models: Path, scenario: str, parts: set[str]) -> None:
    [row] = plan("3B", ["qwen-8b"], "100B", settings=PlanSettings(scenario=scenario)).rows
    assert row.counted_flops == sum(row.flops[part] for part in parts)
    assert (row.memory.teacher > 0) == ("teacher_inference" in parts)


def test_unknown_training_of_a_teacher_gives_a_range_that_holds_every_truth(models: Path) -> None:
    guessed = plan("3B", ["qwen-8b"], "100B")
    assert "20 tokens per parameter assumed" in guessed.rows[0].teacher_loss_source
    assert any("not known" in warning for warning in guessed.warnings)
    teacher, student = guessed.rows[0].teacher_loss, guessed.rows[0].student_loss
    for tokens in ("140B", "2T", "36T", "1000T"):
        [known] = plan("3B", ["qwen-8b"], "100B", teacher_tokens={"qwen-8b": tokens}).rows
        assert teacher.low <= known.teacher_loss.value <= teacher.high
        assert student.low - 1e-4 <= known.student_loss.value <= student.high + 1e-4
    measured = plan("3B", ["qwen-8b"], "100B", teacher_losses={"qwen-8b": 2.05}).rows[0]
    assert measured.teacher_loss.value == measured.teacher_loss.low == measured.teacher_loss.high == 2.05
    assert measured.teacher_loss_source == "given"


def test_the_laws_disagree_and_the_plan_says_why(models: Path) -> None:
    answer = plan("1B", ["qwen-4b", "qwen-14b"], "10B")
    assert answer.best_by_capacity_gap == "qwen-4b"
    assert answer.best_by_distillation == "qwen-14b"
    assert "qwen-4b" in answer.disagreement
    assert "stronger teacher qwen-14b" in answer.disagreement
    assert plan("1B", ["qwen-4b"], "10B").disagreement is None


def test_a_tie_goes_to_the_teacher_that_the_capacity_gap_law_prefers(models: Path) -> None:
    losses = {"qwen-8b": 2.0, "qwen-14b": 1.999}
    answer = plan("3B", list(losses), "100B", teacher_losses=losses)
    rows = {row.name: row.student_loss.value for row in answer.rows}
    assert abs(rows["qwen-8b"] / rows["qwen-14b"] - 1) < TIE
    assert answer.recommended == answer.best_by_capacity_gap == "qwen-8b"
    assert ">" in next(line for line in answer.render(100).split("\n") if "qwen-8b" in line)


def test_when_text_alone_is_better_the_verdict_says_so(models: Path) -> None:
    few = plan("3B", ["qwen-8b"], "20B", settings=PlanSettings(scenario="best_case"))
    many = plan("3B", ["qwen-8b"], "1000T")
    assert few.verdict.startswith("Distil.")
    assert many.rows[0].student_loss.value > many.rows[0].supervised_loss
    assert few.rows[0].student_loss.value < few.rows[0].supervised_loss
    weak = plan("3B", ["qwen-8b"], "500B", teacher_losses={"qwen-8b": 2.5})
    assert weak.verdict.startswith("Train on text alone")
    scarce = plan("3B", ["qwen-14b"], "100B")
    assert scarce.rows[0].supervised_loss_same_compute < scarce.rows[0].student_loss.value
    assert scarce.verdict.startswith("Distil if text is scarce")


def test_a_student_better_than_its_teacher_is_never_called_impossible(models: Path) -> None:
    text = plan("3B", ["qwen-8b"], "1000T", teacher_losses={"qwen-8b": 3.0}).render()
    assert "impossible" not in text.lower()
    assert "cannot" not in text.lower()


def test_fitted_laws_replace_the_published_ones(models: Path) -> None:
    laws = Laws(CapacityGapLaw(4.0), DistillationLaw(c0=2.0, supervised=SupervisedLaw(E=1.0, source="mine")))
    answer = plan("3B", ["qwen-8b"], "100B", laws=laws)
    assert answer.best_teacher_params == 12e9
    student = balanced_cut(CONFIGS["qwen-8b"], 3e9).non_embedding
    row = answer.rows[0]
    assert row.student_loss.value == pytest.approx(
        float(laws.distillation.loss(student, 1e11, row.teacher_loss.value))
    )
    assert answer.sources["supervised"] == "mine"
    assert not any("C4" in warning for warning in answer.warnings)


def test_predictions_outside_the_measured_range_are_warned_of(models: Path) -> None:
    answer = plan("14B", ["qwen-14b"], "100B")
    assert any("143M to 7.75B" in warning for warning in answer.warnings)


def test_the_command_trains_on_the_tokens_planned_with_options_that_the_script_has(models: Path) -> None:
    settings = PlanSettings(num_devices=4, block_size=2048, batch_size=2, tokens_per_step=2**19)
    answer = plan("1.5B", ["qwen-8b"], "10B", settings=settings)
    words = shlex.split(answer.command)
    script = words.index("examples/distill.py")
    options = dict(zip(words[script + 1 :: 2], words[script + 2 :: 2], strict=True))
    assert (options["--teacher"], options["--target"]) == ("qwen-8b", "1.5B")
    per_step = 4 * 2048 * 2 * int(options["--gradient_accumulation_steps"])
    assert per_step == 2**19
    assert int(options["--max_steps"]) * per_step == pytest.approx(10e9, rel=1e-4)
    assert {option.removeprefix("--") for option in options} <= script_options()


def script_options() -> set[str]:
    """The options of `examples/distill.py`."""
    spec = importlib.util.spec_from_file_location("distill", REPOSITORY / "examples/distill.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["distill"]
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and is_dataclass(kind)]
    return {field.name for kind in kinds for field in fields(kind)}


def test_a_student_of_its_own(models: Path) -> None:
    answer = plan("qwen-4b", ["qwen-8b", "llama-8b"], "100B")
    assert answer.student_params == measure(CONFIGS["qwen-4b"]).total
    assert all(row.student == measure(CONFIGS["qwen-4b"]) for row in answer.rows)
    assert "one tokenizer" in " ".join(answer.row("llama-8b").notes)
    assert answer.row("qwen-8b").notes == ()
    assert answer.command is None  # nothing is cut


def test_experts_are_priced_by_what_is_active_and_noted(models: Path) -> None:
    row = plan("3B", ["mixtral"], "100B").rows[0]
    assert row.flops["teacher_inference"] < 0.4 * 2 * row.size.total * 100e9
    assert row.teacher_loss.low < row.teacher_loss.value < row.teacher_loss.high
    assert "mixture of experts, 12.9B active" in row.notes[-1]
    assert "the student is a mixture too" in row.notes[-1]


def test_the_loss_of_a_mixture_student_spans_both_counts_of_its_parameters(models: Path) -> None:
    row = plan("3B", ["mixtral"], "100B", teacher_losses={"mixtral": 2.0}).rows[0]
    assert row.student.active_non_embedding < row.student.non_embedding
    law = DistillationLaw()
    by_all, by_active = (
        float(law.loss(count, 1e11, 2.0)) for count in (row.student.non_embedding, row.student.active_non_embedding)
    )
    assert row.student_loss.value == row.student_loss.low == pytest.approx(by_all)
    assert row.student_loss.high == pytest.approx(by_active)
    assert by_active > by_all
    note = " ".join(plan("mixtral", ["qwen-8b"], "100B").rows[0].notes)
    assert "the student is a mixture of experts, 12.9B active" in note


def test_one_teacher_needs_no_list(models: Path) -> None:
    for teacher in ("qwen-8b", Path("qwen-8b")):
        assert plan("3B", teacher, "100B") == plan("3B", ["qwen-8b"], "100B")


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": None}, "hidden_size=None"),
        ({"hidden_size": "4096"}, "hidden_size='4096'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_key_value_heads": -8}, "num_key_value_heads=-8"),
        ({"num_hidden_layers": 1.5, "vocab_size": [1]}, r"num_hidden_layers=1.5, vocab_size=\[1\]|vocab_size=\[1\], "),
        ({"head_dim": None, "hidden_size": 8}, "head_dim=0"),
        ({"layer_types": 3, "sliding_window": 8}, "makes no model.*TypeError"),
        ({"model_type": ["qwen3"]}, "not that of a transformers model"),
        ({"model_type": "seen", "text_config": {"model_type": {}}}, "seen"),
    ],
)
def test_one_odd_config_is_left_out_and_the_others_are_planned(models: Path, change: dict, reason: str) -> None:
    write_config(models / "odd", {**CONFIGS["qwen-8b"], **change})
    answer = plan("3B", ["odd", "qwen-8b"], "100B")
    assert [row.name for row in answer.rows] == ["qwen-8b"]
    with pytest.raises(PlanError, match=f"No candidate can be used.*{reason}"):
        plan("3B", ["odd"], "100B")
    with pytest.raises(CapGapError, match=reason):
        plan("odd/", ["qwen-8b"], "100B")  # as the student


def test_gemma_3_4b_says_little_and_is_known(models: Path) -> None:
    """Its text config leaves out vocabulary and heads; 3.88B parameters without the vision tower."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    write_config(models / "gemma", {"model_type": "gemma3", "text_config": {**text, "sliding_window": 1024}})
    assert plan("1B", ["gemma"], "100B").rows[0].size.total == 3_880_263_168


def test_bad_candidates_are_left_out_each_with_its_reason(models: Path) -> None:
    (models / "empty").mkdir()
    write_config(models / "unknown", {"model_type": "abacus"})
    write_config(models / "nameless", {"hidden_size": 3})
    (models / "damaged").mkdir()
    (models / "damaged" / "config.json").write_text("{")
    reasons = {
        "empty": "has no config.json",
        "unknown": "No family table describes this model.*abacus",
        "nameless": "not that of a transformers model",
        "damaged": "cannot be read",
        "./none": "no such folder",
        "a b": "Neither a folder nor the id of a model",
        "org/none": "not in the local cache, and the Hub cannot be reached",
        "qwen-4b": "fewer parameters",
    }
    answer = plan("6B", ["qwen-8b", *reasons], "100B")
    assert [row.name for row in answer.rows] == ["qwen-8b"]
    assert set(answer.rejected) == set(reasons)
    for name, reason in reasons.items():
        with pytest.raises(PlanError, match=f"No candidate can be used.*{reason}"):
            plan("6B", [name], "100B")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("3", ["qwen-8b"], "100B"), r"Did you mean 3e9 \(3B\)"),
        ((3, ["qwen-8b"], "100B"), r"Did you mean 3e9 \(3B\)"),
        ((-3e9, ["qwen-8b"], "100B"), "must be positive"),
        ((math.nan, ["qwen-8b"], "100B"), "not finite"),
        (("3B", ["qwen-8b"], "100"), r"Did you mean 100e9 \(100B\)"),
        (("3B", ["qwen-8b"], "lots"), "Not a size"),
        (("3B", ["qwen-8b"], "1e300"), r"larger than 1e\+18"),
        (("3B", [], "100B"), "no candidate teacher"),
    ],
)
def test_bad_arguments(models: Path, arguments: tuple, message: str) -> None:
    with pytest.raises((LawError, PlanError), match=message):
        plan(*arguments)


def test_facts_about_strangers_and_impossible_facts(models: Path) -> None:
    with pytest.raises(PlanError, match=r"not a candidate.*qwen-8.*Did you mean qwen-8b"):
        plan("3B", ["qwen-8b"], "100B", teacher_tokens={"qwen-8": "36T"})
    with pytest.raises(LawError, match="loss of qwen-8b.*perplexity"):
        plan("3B", ["qwen-8b"], "100B", teacher_losses={"qwen-8b": 20.0})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("device", "H1000", "Unknown device"),
        ("scenario", "none", "Unknown scenario.*best_case"),
        ("strategy", "fsdp1", "Unknown strategy"),
        ("cache_codec", "zip", "Unknown cache_codec"),
        ("utilisation", 40, "fraction of the peak speed"),
        ("num_devices", 0, "at least 1"),
        ("price_per_hour", -1.0, "not be negative"),
        ("price_per_hour", math.inf, "finite"),
        ("price_per_hour", math.nan, "finite"),
    ],
)
def test_bad_settings(option: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PlanSettings(**{option: value})


# ---- output ----


def test_fifty_local_configs_take_less_than_two_seconds(tmp_path: Path) -> None:
    names = []
    for i in range(50):
        config = {**CONFIGS["qwen-8b"], "num_hidden_layers": 20 + i}
        names.append(write_config(tmp_path / f"model-{i}", config))
    start = time.perf_counter()
    answer = plan("3B", names, "100B")
    assert time.perf_counter() - start < 2
    assert len(answer.rows) == 50


def test_the_terminal_table_fits_its_width_and_names_everything(models: Path) -> None:
    text = plan("3B", ["qwen-8b", "llama-8b", "mixtral"], "100B").render(80)
    lines = text.rstrip().split("\n")
    assert all(len(line) <= 80 for line in lines[:-1])  # the last is the command, to be copied whole
    for piece in ("qwen-8b", "llama-8b", "mixtral", "H100 hours", "nearest", "quoted without the paper at hand"):
        assert piece in text, piece
    assert lines[-1].startswith("accelerate launch")


def test_the_picture(models: Path) -> None:
    pytest.importorskip("matplotlib")
    answer = plan("3B", ["qwen-8b"], "100B")
    answer.plot("plan.png")
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    lowest = int(np.argmin(answer.curve.student_loss))
    assert answer.curve.teacher_params[lowest] == answer.curve.best_teacher_params
    size = answer.rows[0].size
    assert band_outside_embeddings(answer) == pytest.approx(
        [end * size.non_embedding / size.total for end in (3.75e9, 15e9)]
    )
    with pytest.raises(PlanError, match="Not an image file.*png"):
        answer.plot("plan.doc")


# ---- the command ----


def test_the_command_prints_a_table_or_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--student", "3B", "--teachers", "qwen-8b", "llama-8b", "--tokens", "100B"]
    assert main(arguments) == 0
    assert "student 3B, 100B tokens" in capsys.readouterr().out
    options = ["--teacher_tokens", "qwen-8b=36T", "--teacher-losses", "llama-8b=2.1", "--device", "A100", "--json"]
    assert main([*arguments, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = plan(
        "3B",
        ["qwen-8b", "llama-8b"],
        "100B",
        teacher_tokens={"qwen-8b": 36e12},
        teacher_losses={"llama-8b": 2.1},
        settings=PlanSettings(device="A100"),
    )
    assert printed == expected.to_dict()


def test_numbers_that_overflow_are_refused_and_not_printed_as_infinity(models: Path) -> None:
    settings = PlanSettings(price_per_hour=1e308)
    with pytest.raises(PlanError, match="not finite"):
        plan("3B", ["qwen-8b"], "100B", settings=settings).to_dict()
    with pytest.raises(LawError, match="smaller than any cross-entropy"):
        plan("3B", ["qwen-8b"], "100B", teacher_losses={"qwen-8b": 1e-300})


def test_the_command_says_which_candidates_it_left_out(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student", "3B", "--teachers", "qwen-8b", "./none", "--tokens", "100B", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rejected"].keys() == {"./none"}
    assert "./none is left out: There is no such folder" in captured.err


def test_the_command_reads_fitted_laws_and_draws(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    Laws(CapacityGapLaw(4.0)).save("laws.json")
    arguments = ["--student", "3B", "--teachers", "qwen-8b", "--tokens", "100B", "--laws", "laws.json"]
    assert main([*arguments, "--plot", "plan.png", "--json", "--teacher_tokens", "36T"]) == 0
    assert json.loads(capsys.readouterr().out)["best_teacher_params"] == 12e9
    assert Path("plan.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher_tokens", "36T", "15T"], "said of no teacher.*36T, 15T"),
        (["--teacher_losses", "2.1"], "said of no teacher"),
        (["--teacher_losses", "qwen-8b=low"], "Not a number"),
        (["--laws", "none.json"], "cannot be read"),
    ],
)
def test_bad_options_of_the_command(models: Path, options: list[str], message: str) -> None:
    with pytest.raises(CapGapError, match=message):
        main(["--student", "3B", "--teachers", "qwen-8b", "--tokens", "100B", *options])


def test_the_command_is_one_of_the_program(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["plan", "--student", "3B", "--teachers", "qwen-8b", "--tokens", "100B", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recommended"] == "qwen-8b"
    assert program(["plan", "--student", "3", "--teachers", "qwen-8b", "--tokens", "100B"]) == 2
    assert "Did you mean 3e9 (3B)?" in capsys.readouterr().err
    assert program(["plan", "--help"]) == 0
    assert "--teacher_tokens" in capsys.readouterr().out
