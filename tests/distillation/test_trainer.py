"""`DistillationTrainer` in real runs of tiny models: what it logs, evaluates, saves, and refuses."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaForCausalLM

from hf_capgap import DistillationConfig, DistillationTrainer, cut, score
from hf_capgap.errors import ConfigError, DataError, NonFiniteError, OutputFolderError, TeacherError

LENGTH, VOCAB = 16, 96


@pytest.fixture
def blocks() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"input_ids": torch.randint(2, VOCAB, (12, LENGTH), generator=generator).tolist()})


@pytest.fixture
def student(make_model) -> LlamaForCausalLM:
    return make_model(
        "llama", seed=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )


@pytest.fixture
def teacher(make_model) -> LlamaForCausalLM:
    return make_model("llama", seed=2)


def make_config(folder: Path, **options: Any) -> DistillationConfig:
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return DistillationConfig(output_dir=str(folder / "run"), **{**defaults, **options})


def by_definition(student: torch.nn.Module, teacher: torch.nn.Module, rows: Dataset) -> dict[str, float]:
    """CE, KL, entropy and agreement over a dataset, from all logits in float64."""
    ids = torch.tensor(rows["input_ids"][:])
    labels = torch.tensor(rows["labels"][:]) if "labels" in rows.column_names else ids
    with torch.no_grad():
        log_q = student.double()(ids).logits[:, :-1].log_softmax(-1)
        log_p = teacher.double()(ids).logits[:, :-1].log_softmax(-1)
    student.float(), teacher.float()
    valid, targets = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    per_token = {
        "ce": -log_q.gather(-1, targets[..., None])[..., 0],
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
    }
    return {name: values[valid].mean().item() for name, values in per_token.items()}


# ---- learning, logging, evaluating ----


def test_distillation_brings_the_student_closer_to_the_teacher(tmp_path, student, teacher, blocks):
    trainer = DistillationTrainer(
        student, teacher, make_config(tmp_path, max_steps=30), train_dataset=blocks, eval_dataset=blocks
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < 0.9 * before["eval_kl"]


@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["fused", "dense"])
@pytest.mark.parametrize("num_ignored", [0, 9])
def test_evaluation_is_the_mean_over_tokens_by_definition(tmp_path, student, teacher, blocks, options, num_ignored):
    """Unequal rows and a last, smaller batch: a mean of batch means would be wrong."""
    labels = torch.tensor(blocks["input_ids"][:])
    labels[1, :num_ignored] = -100
    labels[10, num_ignored:] = -100
    rows = blocks.add_column("labels", labels.tolist()).select(range(11))
    config = make_config(tmp_path, alpha=0.3, **options)
    metrics = DistillationTrainer(student, teacher, config, eval_dataset=rows).evaluate()
    expected = by_definition(student, teacher, rows)
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected["ce"]), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(0.7 * expected["ce"] + 0.3 * expected["kl"], rel=1e-4)
    assert metrics["eval_num_tokens"] == (labels[:11, 1:] != -100).sum()


def test_training_logs_every_term_and_the_tokens(tmp_path, student, teacher, blocks):
    config = make_config(tmp_path, gradient_accumulation_steps=3, max_steps=2, learning_rate=0.0, logging_steps=2)
    trainer = DistillationTrainer(student, teacher, config, train_dataset=blocks)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(0.5 * entry["ce"] + 0.5 * entry["kl"], rel=1e-5)
    assert 0 <= entry["teacher_entropy"] <= math.log(VOCAB)
    assert 0 <= entry["agreement"] <= 1
    assert entry["num_tokens_seen"] == trainer.num_tokens_seen == 2 * 12 * (LENGTH - 1)


def test_teacher_stays_frozen_and_outside_the_student(tmp_path, student, teacher, blocks):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=blocks)
    trainer.train()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert saved.num_parameters() == student.num_parameters()


def test_alpha_zero_never_runs_the_teacher_in_training_but_still_evaluates_against_it(
    tmp_path, student, teacher, blocks
):
    calls = []
    trainer = DistillationTrainer(
        student, teacher, make_config(tmp_path, alpha=0.0), train_dataset=blocks, eval_dataset=blocks
    )
    handle = teacher.base_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert calls == []
    assert trainer.evaluate()["eval_kl"] > 0
    assert calls
    handle.remove()


def test_alpha_zero_needs_no_teacher(tmp_path, student, blocks):
    trainer = DistillationTrainer(
        student, args=make_config(tmp_path, alpha=0.0), train_dataset=blocks, eval_dataset=blocks
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"])
    assert "eval_kl" not in metrics


# ---- what it works with ----


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_accumulation_steps": 3},
        {"chunk_tokens": 5},
        {"fused": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_same_losses_under_every_mode_of_running(tmp_path, make_model, teacher, blocks, options):
    def losses(name: str, **extra: Any) -> list[float]:
        student = make_model("llama", seed=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
        batch = {"per_device_train_batch_size": 12 // extra.get("gradient_accumulation_steps", 1)}
        config = make_config(tmp_path / name, **batch, **extra)
        trainer = DistillationTrainer(student, teacher, config, train_dataset=blocks)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    torch.compiler.reset()
    assert losses("special", **options) == pytest.approx(losses("plain"), rel=1e-4)


def test_bf16_autocast_stays_close_to_float32(tmp_path, student, teacher, blocks):
    config = make_config(tmp_path, bf16=True, learning_rate=0.0, max_steps=1)
    trainer = DistillationTrainer(student, teacher, config, train_dataset=blocks, eval_dataset=blocks)
    trainer.train()
    expected = by_definition(student, teacher, blocks)
    assert student.dtype == torch.float32
    assert trainer.evaluate()["eval_ce"] == pytest.approx(expected["ce"], rel=0.02)


def test_second_bf16_trainer_of_a_model_is_fused_too(tmp_path, student, teacher, blocks):
    """accelerate leaves its autocasting forward on the model, which must not look like an unknown output head."""
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*fused objective")
            config = make_config(tmp_path, bf16=True)
            trainer = DistillationTrainer(student, teacher, config, train_dataset=blocks, eval_dataset=blocks)
        trainer.evaluate()
    assert "forward" in vars(student)


def test_bf16_autocast_is_really_on(tmp_path, student, teacher, blocks):
    dtypes = set()
    trainer = DistillationTrainer(student, teacher, make_config(tmp_path, bf16=True), train_dataset=blocks)
    student.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}


def test_peft_student_trains_its_adapter_alone(tmp_path, student, teacher, blocks):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        student, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    config = make_config(tmp_path, max_steps=20)
    trainer = DistillationTrainer(model, teacher, config, train_dataset=blocks, eval_dataset=blocks)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < before
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("families", [("qwen2", "qwen2"), ("qwen3", "llama"), ("mistral", "mistral")])
def test_any_pair_of_causal_models(tmp_path, make_model, blocks, families):
    student = make_model(families[0], seed=1, num_hidden_layers=2, tie_word_embeddings=True)
    teacher = make_model(families[1], seed=2)
    metrics = DistillationTrainer(student, teacher, make_config(tmp_path), eval_dataset=blocks).evaluate()
    assert metrics["eval_kl"] == pytest.approx(by_definition(student, teacher, blocks)["kl"], rel=1e-4)


def test_streaming_dataset(tmp_path, student, teacher, blocks):
    stream = IterableDataset.from_generator(lambda: iter(blocks))
    trainer = DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=stream)
    trainer.train()
    assert trainer.state.global_step == 3


def test_student_and_teacher_by_path(tmp_path, student, teacher, blocks):
    student.save_pretrained(tmp_path / "student")
    teacher.to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    config = make_config(tmp_path, teacher_init_kwargs='{"dtype": "float32"}')
    with pytest.warns(UserWarning, match="no tokenizer beside it"):
        trainer = DistillationTrainer(
            str(tmp_path / "student"), str(tmp_path / "teacher"), config, train_dataset=blocks
        )
    assert trainer.teacher.model.dtype == torch.float32
    trainer.train()


def test_vocabulary_padding_of_either_model_is_ignored(tmp_path, make_model, make_tokenizer):
    tokenizer = make_tokenizer(260)
    rows = Dataset.from_dict({"input_ids": torch.randint(260, (4, LENGTH)).tolist()})
    student, teacher = make_model(seed=1, vocab_size=264), make_model(seed=2, vocab_size=320)
    config = make_config(tmp_path)
    before = DistillationTrainer(student, teacher, config, eval_dataset=rows, processing_class=tokenizer).evaluate()
    with torch.no_grad():
        student.lm_head.weight[260:] += 5.0
        teacher.lm_head.weight[260:] -= 5.0
    after = DistillationTrainer(student, teacher, config, eval_dataset=rows, processing_class=tokenizer).evaluate()
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert after["eval_ce"] == pytest.approx(before["eval_ce"], rel=1e-6)


def test_a_head_that_does_more_than_we_know_falls_back_to_dense(tmp_path, student, teacher, blocks):
    original = student.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    student.forward = forward
    with pytest.warns(UserWarning, match="not known to the fused objective"):
        trainer = DistillationTrainer(
            student, teacher, make_config(tmp_path, remove_unused_columns=False), eval_dataset=blocks
        )
    metrics = trainer.evaluate()
    del student.forward
    student.lm_head.weight.data.mul_(0.5)
    assert metrics["eval_kl"] == pytest.approx(by_definition(student, teacher, blocks)["kl"], rel=1e-4)


def test_gemma_like_softcap_is_honoured(tmp_path, teacher, blocks):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = Gemma2Config(**sizes, intermediate_size=48, vocab_size=VOCAB, final_logit_softcapping=2.0, pad_token_id=1)
    student = Gemma2ForCausalLM(config)
    student.get_output_embeddings().weight.data.normal_(std=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no fall-back to dense
        trainer = DistillationTrainer(student, teacher, make_config(tmp_path), eval_dataset=blocks)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(by_definition(student, teacher, blocks)["kl"], rel=1e-4)


# ---- saving and lineage ----


def test_saved_student_carries_the_lineage_of_cut_and_distillation(tmp_path, teacher, blocks, make_tokenizer):
    batches = [{"input_ids": torch.tensor(blocks["input_ids"][:4])}]
    student = cut(teacher, score(teacher, batches), "40%")
    trainer = DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=blocks, eval_dataset=blocks)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    stages = json.loads((tmp_path / "run" / "capgap.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["cut", "distil"]
    assert stages[0]["scores"]["calibration_hash"]
    distil = stages[1]
    assert distil["num_tokens"] == 12 * (LENGTH - 1)
    assert distil["num_steps"] == 3
    assert distil["student_training_flops"] > 0
    assert distil["teacher_forward_flops"] > 0
    assert distil["objective"] == {"alpha": 0.5, "temperature": 1.0, "divergence": "forward_kl"}
    assert distil["evaluation"]["eval_ce"] > 0
    assert distil["versions"]["torch"]
    assert (tmp_path / "run" / "kept_indices.json").is_file()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(reloaded(**batches[0]).logits, student.eval()(**batches[0]).logits)


def test_resumed_run_counts_on(tmp_path, make_model, teacher, blocks):
    def make_trainer(**options: Any) -> DistillationTrainer:
        student = make_model("llama", seed=1, hidden_size=32)
        config = make_config(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, **options)
        return DistillationTrainer(student, teacher, config, train_dataset=blocks)

    whole = make_trainer()
    whole.train()
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.num_tokens_seen == whole.num_tokens_seen
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value)


def test_checkpoint_remembers_tokens_that_were_not_logged(tmp_path, make_model, teacher, blocks):
    def make_trainer() -> DistillationTrainer:
        student = make_model("llama", seed=1, hidden_size=32)
        config = make_config(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, logging_steps=100)
        return DistillationTrainer(student, teacher, config, train_dataset=blocks)

    make_trainer().train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert json.loads((checkpoint / "capgap.json").read_text())["stages"][-1]["num_tokens"] == 2 * 4 * (LENGTH - 1)
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.num_tokens_seen == 4 * 4 * (LENGTH - 1)


def test_saving_twice_into_the_students_own_folder_adds_one_stage(tmp_path, student, teacher, blocks):
    student.save_pretrained(tmp_path / "run")
    config = make_config(tmp_path, overwrite_output_dir=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = DistillationTrainer(str(tmp_path / "run"), teacher, config, train_dataset=blocks)
    trainer.train()
    trainer.save_model()
    trainer.save_model()
    assert len(json.loads((tmp_path / "run" / "capgap.json").read_text())["stages"]) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["use_cache"] is True


def test_loss_is_counted_right_for_a_class_that_the_trainer_does_not_know(tmp_path, student, teacher, blocks):
    """The Trainer infers from the class name whether labels are shifted, and counts otherwise for any other class."""

    class Student(LlamaForCausalLM):
        pass

    unknown = Student(student.config)
    unknown.load_state_dict(student.state_dict())
    trainer = DistillationTrainer(unknown, teacher, make_config(tmp_path, max_steps=1), train_dataset=blocks)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(0.5 * entry["ce"] + 0.5 * entry["kl"], rel=1e-5)


def test_lora_on_the_output_head_is_trained(tmp_path, student, teacher, blocks):
    """The adapter is not in the head's weight, so that the fused path would silently leave it out."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.warns(UserWarning, match="not known to the fused objective"):
        trainer = DistillationTrainer(model, teacher, make_config(tmp_path), train_dataset=blocks)
    trainer.train()
    [lora_b] = [p for name, p in model.named_parameters() if "lm_head" in name and "lora_B" in name]
    assert lora_b.abs().max() > 0


# ---- what it refuses ----


def test_teacher_that_is_the_student_is_evaluated_but_not_trained(tmp_path, teacher, blocks):
    trainer = DistillationTrainer(teacher, teacher, make_config(tmp_path), train_dataset=blocks, eval_dataset=blocks)
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval_agreement"] == 1
    with pytest.raises(TeacherError, match=r"part of\) the student"):
        trainer.train()


def test_adapter_does_not_count_as_size(tmp_path, make_model, blocks):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(seed=1), peft.LoraConfig(r=8, target_modules=["q_proj"]))
    DistillationTrainer(model, make_model(seed=2), make_config(tmp_path), train_dataset=blocks)


def test_prompt_learning_is_refused(tmp_path, student, teacher):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(student, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="Prompt learning"):
        DistillationTrainer(model, teacher, make_config(tmp_path))


def test_evaluation_of_nothing_or_against_nan_is_refused(tmp_path, student, teacher, blocks):
    rows = blocks.add_column("labels", [[-100] * LENGTH] * len(blocks))
    with pytest.raises(DataError, match="evaluation had no target"):
        DistillationTrainer(student, teacher, make_config(tmp_path), eval_dataset=rows).evaluate()
    trainer = DistillationTrainer(student, teacher, make_config(tmp_path), eval_dataset=blocks)
    teacher.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(NonFiniteError, match="evaluation"):
        trainer.evaluate()


def test_used_output_folder_is_refused_and_untouched(tmp_path, student, teacher, blocks):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    trainer = DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=blocks)
    with pytest.raises(OutputFolderError, match="not empty"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]
    config = make_config(tmp_path, overwrite_output_dir=True)
    DistillationTrainer(student, teacher, config, train_dataset=blocks).train()


def test_teacher_smaller_than_student(tmp_path, student, teacher):
    with pytest.raises(TeacherError, match="smaller than the student"):
        DistillationTrainer(teacher, student, make_config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_different_tokenizers(tmp_path, make_model, make_tokenizer):
    student, teacher = make_model(vocab_size=260, num_hidden_layers=2), make_model(vocab_size=260)
    tokenizers = make_tokenizer(260), make_tokenizer(260, eos_token="<|end|>")
    with pytest.raises(TeacherError, match="different tokenizers"):
        DistillationTrainer(
            student,
            teacher,
            make_config(tmp_path),
            processing_class=tokenizers[0],
            teacher_processing_class=tokenizers[1],
        )


def test_different_tokenizer_beside_a_teacher_given_by_path(tmp_path, make_model, make_tokenizer):
    make_model(vocab_size=260).save_pretrained(tmp_path / "teacher")
    make_tokenizer(260, eos_token="<|end|>").save_pretrained(tmp_path / "teacher")
    student = make_model(vocab_size=260, num_hidden_layers=2)
    with pytest.raises(TeacherError, match="different tokenizers"):
        DistillationTrainer(
            student, str(tmp_path / "teacher"), make_config(tmp_path), processing_class=make_tokenizer(260)
        )


def test_different_vocabularies_without_a_tokenizer(tmp_path, make_model):
    with pytest.raises(TeacherError, match="different vocabulary sizes"):
        DistillationTrainer(
            make_model(vocab_size=96, num_hidden_layers=2), make_model(vocab_size=128), make_config(tmp_path)
        )


def test_tokenizer_larger_than_the_teacher(tmp_path, make_model, make_tokenizer):
    student, teacher = make_model(vocab_size=300, num_hidden_layers=1), make_model(vocab_size=260)
    with pytest.raises(TeacherError, match="no row for"):
        DistillationTrainer(student, teacher, make_config(tmp_path), processing_class=make_tokenizer(300))


def test_missing_teacher(tmp_path, student):
    with pytest.raises(TeacherError, match="no teacher"):
        DistillationTrainer(student, args=make_config(tmp_path))
    with pytest.raises(TeacherError, match="does not load"):
        DistillationTrainer(student, str(tmp_path / "nowhere"), make_config(tmp_path))


def test_empty_dataset(tmp_path, student, teacher):
    with pytest.raises(DataError, match="training dataset is empty"):
        DistillationTrainer(
            student, teacher, make_config(tmp_path), train_dataset=Dataset.from_dict({"input_ids": []})
        )


def test_empty_stream(tmp_path, student, teacher):
    stream = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(DataError, match="training dataset is empty"):
        DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=stream)


def test_dataset_that_is_not_tokenised(tmp_path, student, teacher):
    with pytest.raises(DataError, match="input_ids"):
        DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=Dataset.from_dict({"text": ["a"]}))


def test_sequences_beyond_the_positions(tmp_path, student, teacher):
    rows = Dataset.from_dict({"input_ids": torch.randint(VOCAB, (4, 65)).tolist()})
    with pytest.raises(DataError, match="64 positions"):
        DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=rows)
    assert not (tmp_path / "run").exists()


def test_one_long_row_among_short_ones(tmp_path, student, teacher):
    rows = Dataset.from_dict({"input_ids": [[5] * 16] * 7 + [[5] * 65]})
    with pytest.raises(DataError, match="64 positions"):
        DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=rows).train()


def test_labels_ignored_for_a_whole_epoch(tmp_path, student, teacher, blocks):
    rows = blocks.add_column("labels", [[-100] * LENGTH] * len(blocks))
    config = make_config(tmp_path, save_strategy="steps", save_steps=1)
    trainer = DistillationTrainer(student, teacher, config, train_dataset=rows)
    with pytest.raises(DataError, match="labels are all -100"):
        trainer.train()
    assert list((tmp_path / "run").iterdir()) == []


def test_labels_outside_the_vocabulary(tmp_path, student, teacher, blocks):
    rows = blocks.add_column("labels", [[VOCAB] * LENGTH] * len(blocks))
    trainer = DistillationTrainer(student, teacher, make_config(tmp_path), train_dataset=rows)
    with pytest.raises(DataError, match="below 96"):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [True, False])
def test_teacher_that_is_not_finite_stops_the_run_before_the_weights_change(
    tmp_path, student, teacher, blocks, value, fused
):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = DistillationTrainer(student, teacher, make_config(tmp_path, fused=fused), train_dataset=blocks)
    teacher.lm_head.weight.data[3, 0] = value
    with pytest.raises(NonFiniteError, match="teacher"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{"alpha": 2.0}, {"temperature": 0.0}, {"chunk_tokens": 0}, {"label_smoothing_factor": 0.1}, {"divergence": "kl"}]
    + [{"average_tokens_across_devices": False}, {"teacher_init_kwargs": "{not json"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_cannot_work(tmp_path, options):
    with pytest.raises(ConfigError):
        make_config(tmp_path, **options)


@pytest.mark.parametrize("options", [{"alpha": 0.0, "temperature": 2.0}, {"fused": False, "chunk_tokens": 8}])
def test_options_without_effect_warn(tmp_path, options):
    with pytest.warns(UserWarning, match="no effect"):
        make_config(tmp_path, **options)


def test_every_option_is_documented_once():
    text = HfArgumentParser(DistillationConfig).format_help()
    for option in ("alpha", "temperature", "divergence", "fused", "chunk_tokens", "teacher_init_kwargs"):
        help_text = DistillationConfig.__dataclass_fields__[option].metadata["help"]
        expected = 2 if option == "fused" else 1  # the parser adds --no_fused with the same help
        assert "".join(text.split()).count("".join(help_text.split())) == expected, option
