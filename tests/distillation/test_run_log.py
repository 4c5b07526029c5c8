"""The line in `runs.jsonl` that every `DistillationTrainer` run leaves."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from hf_capgap import DistillationConfig, DistillationTrainer, RunRecord
from hf_capgap.distillation.run_log import num_non_embedding
from hf_capgap.errors import OutputFolderError
from hf_capgap.laws import read_records

LENGTH, VOCAB, NUM_ROWS = 16, 96, 12


@pytest.fixture
def blocks() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"input_ids": torch.randint(2, VOCAB, (NUM_ROWS, LENGTH), generator=generator).tolist()})


@pytest.fixture
def student(make_model) -> LlamaForCausalLM:
    return make_model("llama", seed=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def teacher(make_model) -> LlamaForCausalLM:
    return make_model("llama", seed=2)


def run(folder: Path, *models_and_data: Any, **options: Any) -> DistillationTrainer:
    trainer = make_trainer(folder, *models_and_data, **options)
    trainer.train()
    return trainer


def make_trainer(
    folder: Path, student, teacher, blocks, *, eval_dataset: Any = "same", **options: Any
) -> DistillationTrainer:
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,  # the last batch is smaller
        "max_steps": 3,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    config = DistillationConfig(output_dir=str(folder), **{**defaults, **options})
    held_out = blocks if isinstance(eval_dataset, str) else eval_dataset
    return DistillationTrainer(student, teacher, config, train_dataset=blocks, eval_dataset=held_out)


def cross_entropy(model: torch.nn.Module, blocks: Dataset) -> float:
    """By definition, from all logits."""
    ids = torch.tensor(blocks["input_ids"][:])
    with torch.no_grad():
        log_probabilities = model.eval()(ids).logits[:, :-1].double().log_softmax(-1)
    return -log_probabilities.gather(-1, ids[:, 1:, None]).mean().item()


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_leaves_one_line_with_its_sizes_tokens_and_losses(tmp_path, student, teacher, blocks, fused) -> None:
    run(tmp_path / "out", student, teacher, blocks, fused=fused, seed=7)
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 1
    [record] = read_records(tmp_path / "out")
    assert record.num_params == num_non_embedding(student) > 0
    assert record.num_teacher_params == num_non_embedding(teacher)
    assert record.num_tokens == 3 * 4 * (LENGTH - 1)
    assert record.loss == pytest.approx(cross_entropy(student, blocks), rel=1e-5)
    assert record.teacher_loss == pytest.approx(cross_entropy(teacher, blocks), rel=1e-5)
    assert record.seed == 7
    assert record.teacher


def test_the_embeddings_and_the_head_are_not_counted(make_model) -> None:
    for model_type in ("llama", "gpt2", "opt", "gpt_neox"):
        model = make_model(model_type)
        names = ("embed_tokens", "embed_in", "embed_positions", "wte", "wpe", "lm_head", "embed_out")
        counted = [p.numel() for name, p in model.named_parameters() if not any(part in name for part in names)]
        assert num_non_embedding(model) == sum(counted)


def test_a_run_without_a_teacher_is_a_supervised_record(tmp_path, student, teacher, blocks) -> None:
    trainer = make_trainer(tmp_path / "out", student, teacher, blocks, alpha=0.0)
    calls = []
    teacher.base_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    [record] = read_records(tmp_path / "out")
    assert record.teacher is record.teacher_loss is record.num_teacher_params is None
    assert record.loss == pytest.approx(cross_entropy(student, blocks), rel=1e-5)
    assert calls == []


def test_the_evaluation_of_the_last_step_is_not_repeated(tmp_path, student, blocks) -> None:
    trainer = make_trainer(tmp_path / "out", student, None, blocks, alpha=0.0, eval_strategy="steps", eval_steps=3)
    calls = []
    student.base_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert calls.count(False) == math.ceil(NUM_ROWS / 5)
    [record] = read_records(tmp_path / "out")
    assert record.loss == next(entry["eval_ce"] for entry in trainer.state.log_history if "eval_ce" in entry)


def test_the_best_checkpoint_is_measured_and_not_the_last_step(tmp_path, student, blocks) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = run(
        tmp_path / "out",
        student,
        None,
        blocks,
        alpha=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ce",
        greater_is_better=True,  # the worst, so that it is not the last
        learning_rate=1e-2,
        **options,
    )
    evaluated = [entry["eval_ce"] for entry in trainer.state.log_history if "eval_ce" in entry]
    assert max(evaluated) > evaluated[-1]
    [record] = read_records(tmp_path / "out")
    assert record.loss == pytest.approx(max(evaluated), rel=1e-6)


def test_a_diverged_run_is_recorded_as_what_it_is(tmp_path, student, blocks) -> None:
    run(tmp_path / "out", student, None, blocks, alpha=0.0, learning_rate=1e30, max_grad_norm=0.0)
    [record] = read_records(tmp_path / "out")
    assert not math.isfinite(record.loss)


@pytest.mark.parametrize("held_out", [None, "two"])
def test_without_one_evaluation_set_the_losses_are_left_open(tmp_path, student, teacher, blocks, held_out) -> None:
    sets = {"a": blocks, "b": blocks} if held_out == "two" else None
    run(tmp_path / "out", student, teacher, blocks, eval_dataset=sets)
    [record] = read_records(tmp_path / "out")
    assert record.loss is record.teacher_loss is None
    assert record.num_tokens > 0


def test_an_evaluation_that_fails_is_a_warning_and_the_run_a_success(tmp_path, student, teacher, blocks) -> None:
    nothing = blocks.add_column("labels", [[-100] * LENGTH] * NUM_ROWS)
    with pytest.warns(UserWarning, match=r"losses for runs\.jsonl could not be measured.*no target"):
        trainer = run(tmp_path / "out", student, teacher, blocks, eval_dataset=nothing)
    assert trainer.state.global_step == 3
    [record] = read_records(tmp_path / "out")
    assert record.loss is None


@pytest.mark.parametrize("error", [ValueError("odd"), TypeError("odd"), KeyError("odd")])
def test_whatever_fails_in_measuring_is_a_warning(tmp_path, student, blocks, error) -> None:
    trainer = make_trainer(tmp_path / "out", student, None, blocks, alpha=0.0)

    def fail(*_: Any) -> None:
        if not torch.is_grad_enabled():  # in the pass over the evaluation set
            raise error

    student.base_model.register_forward_hook(fail)
    with pytest.warns(UserWarning, match="could not be measured.*odd"):
        trainer.train()
    [record] = read_records(tmp_path / "out")
    assert record.loss is None


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path, student, blocks) -> None:
    (tmp_path / "out" / "runs.jsonl").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"not added to runs\.jsonl"):
        trainer = run(tmp_path / "out", student, None, blocks, alpha=0.0)
    assert trainer.state.global_step == 3


def test_a_model_too_small_for_any_law_leaves_no_line(tmp_path, make_model, blocks) -> None:
    tiny = make_model(
        "llama",
        hidden_size=4,
        intermediate_size=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        num_hidden_layers=1,
    )
    assert num_non_embedding(tiny) < 1000
    with pytest.warns(UserWarning, match=r"not added to runs\.jsonl.*num_params is less than 1,000"):
        trainer = run(tmp_path / "out", tiny, None, blocks, alpha=0.0)
    assert trainer.state.global_step == 3
    assert not (tmp_path / "out" / "runs.jsonl").exists()


def test_a_finite_loss_that_no_model_has_is_that_of_a_diverged_run(tmp_path, student, blocks) -> None:
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1e4)
    run(tmp_path / "out", student, None, blocks, alpha=0.0, learning_rate=0.0)
    assert 15 < cross_entropy(student, blocks) < math.inf
    [record] = read_records(tmp_path / "out")
    assert math.isnan(record.loss)
    assert json.loads((tmp_path / "out" / "runs.jsonl").read_text())["loss"] == "nan"


def test_a_folder_that_holds_only_records_takes_another_run(tmp_path, student, blocks) -> None:
    for _ in range(2):
        run(tmp_path / "out", student, None, blocks, alpha=0.0)
    assert len(read_records(tmp_path / "out")) == 2
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(OutputFolderError, match="not empty"):
        run(tmp_path / "out", student, None, blocks, alpha=0.0)


def test_it_can_be_switched_off(tmp_path, student, teacher, blocks) -> None:
    run(tmp_path / "out", student, teacher, blocks, write_run_record=False)
    assert not (tmp_path / "out" / "runs.jsonl").exists()
    with pytest.warns(UserWarning, match="dataset_name has no effect"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, write_run_record=False, dataset_name="mine")


def test_the_data_have_the_same_name_in_every_run_on_them(tmp_path, make_model, blocks) -> None:
    other = Dataset.from_dict({"input_ids": [row[::-1] for row in blocks["input_ids"][:]]})
    names = []
    for i, held_out in enumerate((blocks, blocks, other)):
        run(tmp_path / str(i), make_model("llama"), None, blocks, alpha=0.0, eval_dataset=held_out)
        names += [record.dataset for record in read_records(tmp_path / str(i))]
    assert names[0] == names[1] != names[2]
    run(tmp_path / "named", make_model("llama"), None, blocks, alpha=0.0, dataset_name="mine")
    assert [record.dataset for record in read_records(tmp_path / "named")] == ["mine"]


def test_a_second_training_adds_a_second_line(tmp_path, student, blocks) -> None:
    trainer = run(tmp_path / "out", student, None, blocks, alpha=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    records = read_records(tmp_path / "out")
    assert len(records) == 2
    assert records[1].loss < records[0].loss


def test_the_line_is_plain_json_without_paths(tmp_path, student, teacher, blocks) -> None:
    teacher.save_pretrained(tmp_path / "my-teacher")
    run(tmp_path / "out", student, str(tmp_path / "my-teacher"), blocks, teacher_init_kwargs={"dtype": "float32"})
    text = (tmp_path / "out" / "runs.jsonl").read_text()
    assert str(tmp_path) not in text
    assert RunRecord.from_dict(json.loads(text)).teacher == "my-teacher"


def test_two_ranks_leave_one_line_with_losses_of_all_rows(tmp_path, student, teacher, blocks, launch_ranks) -> None:
    """Seven rows in batches of two on two ranks: one rank sees rows twice, which must not count."""
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    rows = blocks.select(range(7))
    torch.save(torch.tensor(rows["input_ids"][:]), tmp_path / "rows.pt")
    script = Path(__file__).parent.parent / "scripts" / "run_log_ranks.py"
    launch_ranks(script, tmp_path / "student", tmp_path / "teacher", tmp_path / "rows.pt", tmp_path / "out")
    [record] = read_records(tmp_path / "out")
    assert record.loss == pytest.approx(cross_entropy(student, rows), rel=1e-5)  # the learning rate is 0
    assert record.teacher_loss == pytest.approx(cross_entropy(teacher, rows), rel=1e-5)
    assert record.num_tokens == 2 * 2 * 2 * (LENGTH - 1)
    assert record.num_params == num_non_embedding(student)
