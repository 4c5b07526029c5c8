"""Parameters, FLOPs, activations, memory and cache bytes from configs, against the models themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_capgap.distillation.run_log import num_non_embedding
from hf_capgap.errors import LawError, PlanError, UnsupportedModelError
from hf_capgap.families import FAMILIES
from hf_capgap.laws import DEVICES, Device, Precision, balanced_cut, measure, training_memory
from hf_capgap.laws.devices import device_named
from hf_capgap.laws.memory import STRATEGIES

LENGTH = 16  # no longer than the sliding windows of the tiny configs: the counter counts masked products too
each_family = pytest.mark.parametrize("model_type", FAMILIES)


def make_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**FAMILIES[model_type].tiny_config, **overrides})


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# ---- parameters ----


@each_family
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model_on_the_meta_device(model_type: str, tied: bool) -> None:
    config = make_config(model_type, tie_word_embeddings=tied)
    size, model = measure(config), on_meta(config)
    assert size.total == sum(parameter.numel() for parameter in model.parameters())
    assert size.non_embedding == num_non_embedding(model)
    assert 0 < size.embedding < size.total
    assert measure(config.to_dict()) == size


@each_family
def test_active_parameters_are_those_of_a_model_with_only_the_visited_experts(model_type: str) -> None:
    config = make_config(model_type)
    size, sizes = measure(config), FAMILIES[model_type].sizes(config)
    if "experts" not in sizes:
        assert size.active == size.total
        assert not size.has_experts
        return
    field = FAMILIES[model_type].config_fields["experts"]
    visited = on_meta(make_config(model_type, **{field: sizes["experts_per_token"]}))
    idle_rows = (sizes["experts"] - sizes["experts_per_token"]) * sizes["hidden"] * sizes["layers"]  # of the routers
    assert size.active == sum(parameter.numel() for parameter in visited.parameters()) + idle_rows
    assert size.has_experts
    assert size.active_non_embedding == size.active - size.embedding


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="No family table"):
        measure({"model_type": "abacus"})


# ---- FLOPs ----


@each_family
def test_flops_are_those_that_torch_counts(model_type: str) -> None:
    """Eager attention and experts: the counter has no formula for the fused CPU kernels."""
    config = make_config(model_type)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    inputs = torch.randint(2, config.vocab_size, (3, LENGTH))
    with FlopCounterMode(display=False) as forward:
        loss = model(inputs, use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    size, num_tokens = measure(config), inputs.numel()
    assert forward.get_total_flops() == size.inference_flops(num_tokens, LENGTH)
    assert forward.get_total_flops() + backward.get_total_flops() == size.training_flops(num_tokens, LENGTH)


def test_attention_grows_with_the_sequence_and_stops_at_the_window() -> None:
    full, sliding = measure(make_config("llama")), measure(make_config("gemma2"))
    assert full.forward_flops_per_token(64) - full.forward_flops_per_token(32) == (
        4 * full.attention * 32 * full.num_layers
    )
    window = next(window for window in sliding.windows if window is not None)
    num_full = sliding.windows.count(None)
    assert 0 < num_full < sliding.num_layers
    beyond = sliding.forward_flops_per_token(4 * window) - sliding.forward_flops_per_token(2 * window)
    assert beyond == 4 * sliding.attention * 2 * window * num_full
    with pytest.raises(LawError, match="at least one token"):
        full.forward_flops_per_token(0)


# ---- activations ----


def kept_bytes_per_token(model: PreTrainedModel, num_tokens: int) -> float:
    """What autograd keeps of the decoder under bfloat16 autocast, each storage once, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    inputs = torch.randint(2, model.config.vocab_size, (1, num_tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        states = model.base_model(inputs, use_cache=False).last_hidden_state
    assert states.requires_grad
    return sum(storage.nbytes() for storage in kept.values()) / num_tokens


@pytest.mark.parametrize(
    "model_type", sorted(set(FAMILIES) - {"gemma2"})
)  # whose attention is eager, and keeps scores
def test_activations_are_about_what_autograd_keeps(model_type: str) -> None:
    """The difference between a model of two layers and one of one."""
    family, num_tokens, kept = FAMILIES[model_type], 2048, []
    for num_layers in (1, 2):
        options = dict(family.tiny_config)
        options.pop("layer_types", None)
        options[family.config_fields["layers"]] = num_layers
        options |= {
            name: 4096 for name in ("max_position_embeddings", "n_positions", "sliding_window") if name in options
        }
        options |= dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "attention_dropout"), 0.0)
        config = AutoConfig.for_model(model_type, **options)
        kept.append(
            kept_bytes_per_token(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), num_tokens)
        )
    assert measure(config).activation_bytes == pytest.approx(kept[1] - kept[0], rel=0.25)


# ---- memory, cache, devices ----


def test_memory_by_hand() -> None:
    """A student of n parameters and a teacher of m on four devices: 4 + 4 + 8 bytes and 2 bytes per parameter."""
    student, teacher = measure(make_config("llama")), measure(make_config("qwen3"))
    n, m = student.total, teacher.total
    whole = {"weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n, "teacher": 2 * m}
    split_by = {
        "ddp": set(),
        "zero1": {"optimizer"},
        "zero2": {"optimizer", "gradients"},
        "zero3": {"optimizer", "gradients", "weights", "teacher"},
        "fsdp2": {"optimizer", "gradients", "weights", "teacher"},
    }
    assert set(split_by) == set(STRATEGIES)
    for strategy, split in split_by.items():
        memory = training_memory(student, teacher, strategy=strategy, num_devices=4, tokens_per_device=100)
        for part, size in whole.items():
            assert getattr(memory, part) == (size / 4 if part in split else size), (strategy, part)
        assert memory.activations == 100 * student.num_layers * student.activation_bytes
        assert (memory.gathered > 0) == (strategy in ("zero3", "fsdp2"))
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.gathered,
            memory.teacher,
        )
        assert memory.total == sum(parts)


def test_on_one_device_every_strategy_is_the_same() -> None:
    student = measure(make_config("llama"))
    assert len({training_memory(student, strategy=strategy, num_devices=1).total for strategy in STRATEGIES}) == 1


def test_checkpointing_precision_and_a_cached_teacher_change_what_they_should() -> None:
    student = measure(make_config("llama", num_hidden_layers=24))
    plain, checkpointed = (training_memory(student, gradient_checkpointing=on) for on in (False, True))
    assert checkpointed.activations < 0.2 * plain.activations
    assert checkpointed.weights == plain.weights
    assert plain.teacher == 0
    assert training_memory(student, precision=Precision(2, 2, 2)).optimizer == 2 * student.total


def test_what_memory_cannot_be_told_of() -> None:
    student = measure(make_config("llama"))
    with pytest.raises(PlanError, match="Unknown strategy.*fsdp2"):
        training_memory(student, strategy="fsdp3")
    with pytest.raises(PlanError, match="at least 1"):
        training_memory(student, num_devices=0)


def test_cache_bytes_by_hand() -> None:
    size = measure(make_config("llama"))
    assert size.cache_bytes(1000, "topk", 10) == 1000 * (10 * 6 + 2)
    assert size.cache_bytes(1000, "sample", 10) == 1000 * 10 * 6
    assert size.cache_bytes(1000, "hidden") == 1000 * size.hidden * 2
    assert size.cache_bytes(1000, "logits") == 1000 * size.vocab * 2
    assert size.cache_bytes(1, "topk", 10**9) == size.vocab * 6 + 2
    with pytest.raises(LawError, match="Unknown cache codec.*topk"):
        size.cache_bytes(1000, "zip")
    with pytest.raises(LawError, match="at least one entry"):
        size.cache_bytes(1000, "topk", 0)


def test_hours_of_a_device() -> None:
    device = Device("toy", peak_flops=1e12, memory_bytes=1e9)
    assert device.hours(3600e12, 0.5) == 2.0
    for utilisation in (0, -0.1, 1.1, math.nan):
        with pytest.raises(PlanError, match="fraction of the peak speed"):
            device.hours(1e12, utilisation)
    assert device_named("h100") is DEVICES["h100"] is device_named("H100")
    assert device_named(device) is device
    with pytest.raises(PlanError, match="Unknown device.*H100"):
        device_named("H1000")


# ---- students that are only a number ----


@each_family
def test_a_balanced_cut_has_the_size_asked_for_and_the_teachers_vocabulary(model_type: str) -> None:
    config = make_config(model_type)
    teacher = measure(config)
    student = balanced_cut(config, 0.5 * teacher.total)
    assert student.total == pytest.approx(0.5 * teacher.total, abs=1)
    assert student.vocab == teacher.vocab
    assert student.num_layers == teacher.num_layers
    assert student.non_embedding < teacher.non_embedding
    # Hidden size, heads and neurons keep one fraction: embeddings shrink by it, matrices about by its square.
    fraction = student.embedding / teacher.embedding
    assert student.non_embedding / teacher.non_embedding == pytest.approx(fraction**2, rel=0.05)


def test_a_student_larger_than_its_teacher_is_refused() -> None:
    config = make_config("llama")
    assert balanced_cut(config, measure(config).total) == measure(config)
    with pytest.raises(LawError, match="cannot be cut out of a teacher with fewer parameters"):
        balanced_cut(config, 2 * measure(config).total)
