"""The tables of the families: what they claim, what they refuse, and the language that they are written in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from hf_capgap import score
from hf_capgap.errors import UnsupportedModelError
from hf_capgap.families import FAMILIES, audit, family_for, inventory_of, supported_model_types
from hf_capgap.families.axes import Dimension

# Units of each axis in the hand-written examples below.
SIZES = {"hidden": 3, "q_heads": 4, "kv_heads": 2, "head_dim": 2, "neurons": 3, "vocab": 5}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**FAMILIES[model_type].tiny_config, **overrides})


def bias_options(model_type: str) -> list[dict[str, bool]]:
    """The settings of the bias switches that the family's config class really has."""
    fields = [name for name in ("attention_bias", "mlp_bias") if hasattr(tiny_config(model_type), name)]
    return [{}, *({name: True} for name in fields), dict.fromkeys(fields, True)]


def numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_audit_claims_every_parameter(make_model, model_type, tied):
    for biases in bias_options(model_type):
        model = make_model(model_type, tie_word_embeddings=tied, **biases)
        inventory = audit(model)
        assert [entry.name for entry in inventory.entries] == [name for name, _ in model.named_parameters()]
        assert any(entry.name == "lm_head.weight" for entry in inventory.entries) is not tied
        assert inventory.num_parameters(family_for(model.config).sizes(model.config)) == numel(model)


def test_bias_switches_of_llama_and_qwen3_are_among_the_tested_options():
    """Keeps the test above from passing because `bias_options` found nothing to switch on."""
    assert {"attention_bias": True, "mlp_bias": True} in bias_options("llama")
    assert {"attention_bias": True} in bias_options("qwen3")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_inventory_predicts_the_count_of_a_smaller_model_that_is_really_built(model_type, tied):
    smaller = {
        "num_hidden_layers": 3,
        "hidden_size": 42,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 37,
    }
    for biases in bias_options(model_type):
        teacher = tiny_config(model_type, tie_word_embeddings=tied, **biases)
        student = tiny_config(model_type, tie_word_embeddings=tied, **biases, **smaller)
        predicted = inventory_of(teacher).num_parameters(family_for(student).sizes(student))
        assert predicted == numel(AutoModelForCausalLM.from_config(student))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_audit_accepts_a_config_that_does_not_say_head_dim(model_type):
    """Older Llama and all Qwen2 configs leave it out; the model classes then take hidden / heads (Qwen3: 128)."""
    overrides = {name: value for name, value in FAMILIES[model_type].tiny_config.items() if name != "head_dim"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **overrides))
    audit(model)
    rows_of_a_head = model.model.layers[0].self_attn.q_proj.weight.shape[0] // model.config.num_attention_heads
    assert FAMILIES[model_type].sizes(model.config)["head_dim"] == rows_of_a_head


def test_kv_groups_fall_back_to_the_query_heads():
    sizes = FAMILIES["llama"].sizes(tiny_config("llama", num_key_value_heads=None))
    assert sizes["kv_heads"] == sizes["q_heads"]


def assert_refused(model: nn.Module, *named: str) -> None:
    """Audit refuses, the message holds `named` and every supported family, and nothing of the model is touched."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError) as caught:
        audit(model)
    for text in (*named, *supported_model_types()):
        assert text in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_unknown_model_type_is_refused_by_name():
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    assert_refused(AutoModelForCausalLM.from_config(config), "gpt2")
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        family_for(config)
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        inventory_of(config)


def test_extra_parameter_is_refused_by_name(make_model):
    model = make_model()
    model.model.layers[1].mlp.scale = nn.Parameter(torch.ones(3))
    assert_refused(model, "model.layers.1.mlp.scale", "(3,)")


def test_extra_stored_buffer_is_refused_by_name(make_model):
    """A persistent buffer would be in the student's file, uncut."""
    model = make_model()
    model.model.layers[2].register_buffer("importance", torch.ones(64))
    assert_refused(model, "model.layers.2.importance")


def test_parameter_of_another_shape_is_refused_with_both_shapes(make_model):
    model = make_model()
    model.model.layers[3].mlp.down_proj = nn.Linear(104, 64, bias=False)
    assert_refused(model, "model.layers.3.mlp.down_proj.weight", "(64, 112)", "(64, 104)")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # raised by peft
def test_peft_wrapped_model_is_refused_until_merged(make_model):
    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert_refused(adapted, "base_model.model", "merged")
    audit(adapted.merge_and_unload())


def test_scoring_refuses_before_it_reads_any_batch():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    batches = iter([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])
    with pytest.raises(UnsupportedModelError):
        score(model, batches)
    assert next(batches)


@pytest.mark.parametrize(
    ("text", "size", "kept", "expected"),
    [
        ("hidden", 3, {"hidden": [0, 2]}, [0, 2]),
        ("hidden", 3, {"neurons": [0]}, None),
        ("head_dim", 2, {"q_heads": [0]}, None),
        # each head owns head_dim consecutive rows
        ("q_heads*head_dim", 8, {"q_heads": [1, 3]}, [2, 3, 6, 7]),
        # GPT-2 and Phi-3: all of q, then all of k, then all of v
        (
            "q_heads*head_dim + kv_heads*head_dim + kv_heads*head_dim",
            16,
            {"q_heads": [0, 1], "kv_heads": [1]},
            [0, 1, 2, 3, 10, 11, 14, 15],
        ),
        # Phi-3: gate, then up; the same neurons of both
        ("neurons + neurons", 6, {"neurons": [0, 2]}, [0, 2, 3, 5]),
        # GPT-NeoX: q, k and v of head 0, then of head 1, ...
        ("q_heads*3*head_dim", 24, {"q_heads": [1, 2]}, list(range(6, 18))),
        # a segment whose axis stays whole beside one that is cut
        ("kv_heads*head_dim + neurons", 7, {"neurons": [1]}, [0, 1, 2, 3, 5]),
        ("hidden", 3, {"hidden": []}, []),
    ],
)
def test_dimension_language(text, size, kept, expected):
    dimension = Dimension.parse(text)
    assert dimension.size(SIZES) == size
    indices = dimension.indices(SIZES, kept)
    assert expected == (None if indices is None else indices.tolist())


@pytest.mark.parametrize("text", ["q_heads*head_dim", "q_heads*3*head_dim", "q_heads*head_dim + q_heads*head_dim"])
def test_keeping_every_unit_keeps_every_entry(text):
    indices = Dimension.parse(text).indices(SIZES, {"q_heads": list(range(SIZES["q_heads"]))})
    assert indices.tolist() == list(range(Dimension.parse(text).size(SIZES)))
