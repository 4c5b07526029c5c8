"""Teachers and students that are not what they seem: refused, or read as transformers reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import random_scores
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_capgap import StudentShape, cut, solve_shape, verify
from hf_capgap.cross_entropy import mean_cross_entropy
from hf_capgap.errors import CheckpointError, ConfigError, ShapeError, UnsupportedModelError, VerificationError

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def save(model: PreTrainedModel, folder: Path, **extra: torch.Tensor) -> Path:
    """The model's folder, with `extra` tensors ("." written as "__") in its file."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in extra.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_head_of_its_own_under_a_config_that_says_tied_is_refused(make_model, tmp_path):
    """transformers does not tie such a model; we would cut the wrong head."""
    model = make_model(tie_word_embeddings=True)
    folder = save(model, tmp_path / "teacher", lm_head__weight=torch.randn(96, 64))
    scores, shape = random_scores(model.config), StudentShape.of(model.config)
    for output_dir in (None, tmp_path / "student"):
        with pytest.raises(UnsupportedModelError, match="tie_word_embeddings"):
            cut(folder, scores, shape, output_dir=output_dir)
    assert not (tmp_path / "student").exists()


def test_stored_copy_of_a_tied_head_is_no_obstacle(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    copy = model.get_input_embeddings().weight.detach().clone()
    folder = save(model, tmp_path / "teacher", lm_head__weight=copy)
    student = cut(folder, random_scores(model.config), "80%", output_dir=tmp_path / "student")
    verify(model, student)


def test_checkpoint_without_the_head_is_streamed_like_the_one_with_it(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    scores = random_scores(model.config)
    whole, base = (
        cut(tmp_path / name, scores, "80%", output_dir=tmp_path / f"{name}-student") for name in ("whole", "base")
    )
    found, expected = (load_file(Path(student) / "model.safetensors") for student in (base, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tensor_that_the_config_does_not_ask_for_is_left_out_with_a_warning(make_model, tmp_path):
    model = make_model()
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = save(model, tmp_path / "teacher", **{name.replace(".", "__"): torch.zeros(64)})
    with pytest.warns(UserWarning, match="q_proj.bias"):
        student = cut(folder, random_scores(model.config), "80%", output_dir=tmp_path / "student")
    assert name not in load_file(Path(student) / "model.safetensors")


def test_single_file_goes_before_an_index(make_model, tmp_path):
    """As in `from_pretrained`: what was scored is what is cut."""
    make_model(seed=1).save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
    make_model(seed=2).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "teacher" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    verify(loaded, cut(tmp_path / "teacher", random_scores(loaded.config), "80%", output_dir=tmp_path / "student"))


def test_longrope_keeps_its_number_of_factors(make_model):
    model = make_model("phi3", rope_scaling=LONGROPE, original_max_position_embeddings=32)
    scores = random_scores(model.config)
    for changes in ({"hidden_size": 48}, {"num_attention_heads": 4, "num_key_value_heads": 2}):
        with pytest.raises(ShapeError, match="longrope"):
            cut(model, scores, replace(StudentShape.of(model.config), **changes))
    for target in ("80%", "50%", "30%"):
        verify(model, cut(model, scores, solve_shape(model.config, target)))


@pytest.mark.parametrize("size", ["abc", "0", 0, -1, "5 GiBs"])
def test_impossible_shard_size_is_refused_before_anything_is_written(make_model, tmp_path, size):
    model = make_model()
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="shard"):
        cut(tmp_path / "teacher", random_scores(model.config), "80%", output_dir=tmp_path / "s", max_shard_size=size)
    assert not (tmp_path / "s").exists()


def test_verify_refuses_another_teacher_by_name(make_model):
    model = make_model()
    student = cut(model, random_scores(model.config), "60%")
    for other in (make_model(hidden_size=32), make_model(num_hidden_layers=2), make_model("mistral")):
        with pytest.raises(VerificationError):
            verify(other, student)


@pytest.mark.parametrize(
    "damage",
    [{"hidden": [999]}, {"heads": {}}, {"layers": [0]}, {"neurons": {layer: [0] for layer in range(4)}}],
    ids=str,
)
def test_verify_refuses_kept_indices_that_cannot_be(make_model, damage):
    model = make_model()
    student = cut(model, random_scores(model.config), "60%")
    with pytest.raises(VerificationError, match="kept indices"):
        verify(model, student, kept=replace(student.kept, **damage))


def test_config_that_its_class_refuses_is_a_damaged_checkpoint(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "teacher")
    config = tmp_path / "teacher" / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 8', '"num_attention_heads": "eight"'))
    with pytest.raises(CheckpointError, match="config"):
        cut(tmp_path / "teacher", random_scores(model.config), "80%", output_dir=tmp_path / "student")


def test_damaged_tokenizer_is_left_out_with_a_warning(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="tokenizer does not load"):
        cut(tmp_path / "teacher", random_scores(model.config), "80%", output_dir=tmp_path / "student")


def test_cross_entropy_leaves_every_module_in_its_mode(make_model):
    model = make_model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    mean_cross_entropy(model, [{"input_ids": torch.arange(8)[None]}])
    assert [module.training for module in model.modules()] == before
