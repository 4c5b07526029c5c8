"""The tables of the families: what they claim, what they refuse, and the language that they are written in."""

from __future__ import annotations

import json
import subprocess
import sys
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from students import ALL_FAMILIES, MIXTURES, SMALLER
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, PreTrainedConfig

from hf_capgap import score
from hf_capgap.errors import UnsupportedModelError
from hf_capgap.families import FAMILIES, audit, family_for, supported_model_types
from hf_capgap.families.axes import Dimension

# Units of each axis in the hand-written examples below.
SIZES = {"hidden": 3, "q_heads": 4, "kv_heads": 2, "head_dim": 2, "neurons": 3, "vocab": 5, "positions": 6}

# The switches of parameters that a family's config class has, besides the tie, and their other setting.
SWITCHES = {
    **dict.fromkeys(ALL_FAMILIES, {}),
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
    "smollm3": {"attention_bias": True, "mlp_bias": True},
    "olmo2": {"attention_bias": True},
    "gemma2": {"attention_bias": True},
    "gemma3_text": {"attention_bias": True},
    "gpt_neox": {"attention_bias": False},
    "opt": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "qwen3_moe": {"attention_bias": True},
}
SETTINGS = [
    (model_type, tied, options)
    for model_type, switches in SWITCHES.items()
    for options in [
        {},
        *({name: value} for name, value in switches.items()),
        *([switches] if len(switches) > 1 else []),
    ]
    for tied in (False, True)
]


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**FAMILIES[model_type].tiny_config, **overrides})


def without(model_type: str, *names: str) -> dict[str, Any]:
    """The tiny config's arguments but `names`."""
    return {name: value for name, value in FAMILIES[model_type].tiny_config.items() if name not in names}


def numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- what the tables claim -----------------------------------------------------------------------------------------


def test_families_are_those_of_the_plan():
    planned = "llama mistral qwen2 qwen3 smollm3 olmo2 phi3 gemma2 gemma3_text gpt2 gpt_neox opt mixtral qwen3_moe"
    assert set(FAMILIES) == set(planned.split())
    assert supported_model_types() == sorted(FAMILIES)
    assert all(FAMILIES[name].model_type == name for name in FAMILIES)


@pytest.mark.parametrize(("model_type", "tied", "options"), SETTINGS, ids=str)
def test_table_names_every_parameter_with_its_shape(make_model, model_type, tied, options):
    model = make_model(model_type, tie_word_embeddings=tied, **options)
    family = audit(model)
    assert family is FAMILIES[model_type] is family_for(model.config)
    sizes = family.sizes(model.config)
    claimed = {parameter.name: parameter.shape(sizes) for parameter in family.parameters_of(model.config)}
    assert claimed == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert ("lm_head.weight" in claimed) is not tied
    assert family.num_parameters(model.config) == numel(model)


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_every_switch_of_the_table_is_among_those_tested_and_changes_the_model(make_model, model_type):
    """Keeps the test above from passing because nothing was switched."""
    family = FAMILIES[model_type]
    assert {when.field for when in family.optional.values()} == {"tie_word_embeddings", *SWITCHES[model_type]}
    for glob in family.optional:
        assert any(fnmatchcase(name, glob) for name in family.parameters), glob
    plain = {name for name, _ in make_model(model_type).named_parameters()}
    for name, value in SWITCHES[model_type].items():
        assert {name for name, _ in make_model(model_type, **{name: value}).named_parameters()} != plain


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_table_names_every_tensor_of_a_checkpoint(make_model, tmp_path, model_type, tied):
    model = make_model(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    family = FAMILIES[model_type]
    sizes = family.sizes(model.config)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    claimed = {parameter.name: parameter.shape(sizes) for parameter in family.stored_parameters_of(model.config)}
    for theirs, ours in family.written_names:
        stored = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: stored[name] for name in stored
        }
    assert claimed == stored
    for name in stored:
        assert family.explain(name).shape(sizes) == stored[name]
    experts = {parameter.expert for parameter in family.stored_parameters_of(model.config)}
    assert experts == ({None, 0, 1, 2, 3} if model_type in MIXTURES else {None})


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_names_that_are_no_parameters_are_not_explained(model_type):
    family = FAMILIES[model_type]
    name = next(parameter.name for parameter in family.parameters_of(tiny_config(model_type)) if parameter.layer == 0)
    assert family.explain(name).layer == 0
    for wrong in (f"{name}.more", f"more.{name}", name.replace(".0.", ".x."), name.replace(".0.", "."), ""):
        assert family.explain(wrong) is None
    assert family.explain(name.replace(".0.", ".27.")).layer == 27


SIZE_FIELDS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "q_heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "neurons",
    "num_experts": "experts",
}


@pytest.mark.parametrize(("model_type", "tied", "options"), SETTINGS, ids=str)
def test_count_of_a_smaller_model_is_that_of_the_model_that_is_really_built(model_type, tied, options):
    family, teacher = FAMILIES[model_type], tiny_config(model_type, tie_word_embeddings=tied, **options)
    sizes = {SIZE_FIELDS[name]: value for name, value in SMALLER[model_type].items()}
    smaller = {family.config_fields[axis]: size for axis, size in sizes.items() if axis in family.config_fields}
    if model_type == "opt":
        smaller["word_embed_proj_dim"] = smaller["hidden_size"]
    if model_type == "gemma3_text":
        smaller["layer_types"] = teacher.layer_types[:2]
    student = tiny_config(model_type, tie_word_embeddings=tied, **options, **smaller)
    counted = numel(AutoModelForCausalLM.from_config(student))
    assert family.num_parameters(teacher, sizes) == family.num_parameters(student) == counted
    assert counted < family.num_parameters(teacher)


# --- configs that leave something open -----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_defaults_are_those_of_the_config_class(model_type):
    """A `config.json` that leaves a field out means what the class takes."""
    family, config = FAMILIES[model_type], AutoConfig.for_model(model_type)
    for name, value in family.defaults.items():
        assert getattr(config, name) == value, name
    read = {
        "tie_word_embeddings",
        *(when.field for when in (*family.optional.values(), *family.requires)),
        *([family.parallel.field] if family.parallel else []),
    }
    assert read <= set(family.defaults)
    for name in read:  # and from nothing at all
        assert family.value({}, name) == getattr(config, name), name


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_dict_of_a_config_file_says_what_the_config_says(model_type):
    """With each field that has a default left out in turn."""
    family = FAMILIES[model_type]
    open_fields = [
        name
        for name in (*family.defaults, *(family.config_fields[axis] for axis in family.config_fields if axis in OPEN))
        if name in family.tiny_config
    ]
    for dropped in (None, *open_fields):
        arguments = without(model_type, dropped)
        config = AutoConfig.for_model(model_type, **arguments)
        written = json.loads(config.to_json_string(use_diff=False))
        for content in (written, {"model_type": model_type, **arguments}):
            assert family_for(content) is family
            assert family.sizes(content) == family.sizes(config), dropped
            assert family.tied(content) == family.tied(config)
            assert family.num_parameters(content) == family.num_parameters(config)
            assert list(family.parameters_of(content)) == list(family.parameters_of(config))


OPEN = ("kv_heads", "head_dim")


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_audit_accepts_a_config_that_does_not_say_head_dim(model_type):
    """Older Llama and all Qwen2 configs leave it out; the classes then take hidden / heads, Gemma 256, Qwen3 128."""
    config = AutoConfig.for_model(model_type, **without(model_type, "head_dim"))
    model = AutoModelForCausalLM.from_config(config)
    audit(model)
    expected = {"gemma2": 256, "gemma3_text": 256, "qwen3": 128}.get(model_type, 8)
    assert FAMILIES[model_type].sizes(config)["head_dim"] == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "smollm3", "olmo2", "phi3"])
def test_kv_groups_fall_back_to_the_query_heads(make_model, model_type):
    """In the families whose config classes take null for it."""
    model = make_model(model_type, num_key_value_heads=None)
    audit(model)
    written = {**json.loads(model.config.to_json_string()), "num_key_value_heads": None}
    for config in (model.config, written):
        assert FAMILIES[model_type].sizes(config)["kv_heads"] == 8


def test_neurons_of_gpt2_fall_back_to_four_times_the_width(make_model):
    model = make_model("gpt2", n_inner=None)
    audit(model)
    assert FAMILIES["gpt2"].sizes(model.config)["neurons"] == 256


def test_number_of_experts_goes_by_two_names():
    for name in ("num_experts", "num_local_experts"):
        content = {"model_type": "qwen3_moe", **without("qwen3_moe", "num_experts"), name: 6}
        assert FAMILIES["qwen3_moe"].sizes(content)["experts"] == 6


def test_families_need_no_torch():
    """Plans are made from configs alone."""
    code = """
import sys
from hf_capgap.families import FAMILIES, family_for
for name, family in FAMILIES.items():
    content = {"model_type": name, **family.tiny_config}
    assert family_for(content).num_parameters(content) > 10_000
loaded = {"torch", "transformers", "safetensors"} & set(sys.modules)
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- refusals ------------------------------------------------------------------------------------------------------


def assert_refused(model: nn.Module, *named: str) -> None:
    """Audit refuses, the message holds `named` and every supported family, and nothing of the model is touched."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError) as caught:
        audit(model)
    for text in (*named, *supported_model_types()):
        assert text in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


BLOOM = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)


def test_unknown_model_type_is_refused_by_name():
    assert_refused(AutoModelForCausalLM.from_config(BLOOM), "bloom", "docs/adding_a_family.md")
    for config in (BLOOM, BLOOM.to_dict(), {"model_type": "bloom"}):
        with pytest.raises(UnsupportedModelError, match="bloom"):
            family_for(config)
    with pytest.raises(UnsupportedModelError, match="No family table describes this model"):
        family_for({"hidden_size": 64})


REQUIRED = [
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True),
    ("opt", "do_layer_norm_before", False),
    ("opt", "_remove_final_layer_norm", True),
    ("qwen3_moe", "decoder_sparse_step", 2),
    ("qwen3_moe", "mlp_only_layers", [0]),
]


@pytest.mark.parametrize(("model_type", "field", "value"), REQUIRED)
def test_model_that_departs_from_its_table_is_refused_by_the_field(make_model, model_type, field, value):
    """Cut by the table, its student would load and compute something else."""
    config = tiny_config(model_type, **{field: value})
    for found in (config, {"model_type": model_type, **FAMILIES[model_type].tiny_config, field: value}):
        with pytest.raises(UnsupportedModelError) as caught:
            family_for(found)
        for text in (model_type, field, repr(value)):
            assert text in str(caught.value)
    assert_refused(make_model(model_type, **{field: value}), field)


def test_every_requirement_is_tested():
    fields = {(name, when.field) for name, family in FAMILIES.items() for when in family.requires}
    assert fields == {(name, field) for name, field, _ in REQUIRED}


def test_opt_with_projected_embeddings_is_refused(make_model):
    """As opt-350m: its embeddings are narrower than its layers."""
    assert_refused(make_model("opt", word_embed_proj_dim=32), "embed_tokens", "(96, 32)")


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_missing_parameter_is_refused_by_name(make_model, model_type):
    model = make_model(model_type)
    family = FAMILIES[model_type]
    layer = model.get_submodule(family.layers)[2]
    name = next(name for name, parameter in layer.named_parameters() if parameter.dim() == 1)
    parent, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, None)
    assert_refused(model, f"{family.layers}.2.{name}")


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
    model = AutoModelForCausalLM.from_config(BLOOM)
    batches = iter([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])
    with pytest.raises(UnsupportedModelError):
        score(model, batches)
    assert next(batches)


# --- the language of dimensions ------------------------------------------------------------------------------------


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
        # OPT: two rows besides the positions, which no axis owns
        ("positions + 2", 8, {"hidden": [1]}, None),
        ("positions + 2", 8, {"positions": [0, 3]}, [0, 3, 6, 7]),
        ("2 + positions", 8, {"positions": [0, 3]}, [0, 1, 2, 5]),
        ("3*neurons", 9, {"hidden": [1]}, None),
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


@pytest.mark.parametrize(
    ("text", "axis", "expected"),
    [
        ("hidden", "hidden", [0, 1, 2]),
        ("hidden", "neurons", [-1, -1, -1]),
        ("kv_heads*head_dim", "kv_heads", [0, 0, 1, 1]),
        ("kv_heads*head_dim", "head_dim", [-1, -1, -1, -1]),  # a width, not an axis
        ("kv_heads*3*head_dim", "kv_heads", [0] * 6 + [1] * 6),
        ("neurons + neurons", "neurons", [0, 1, 2, 0, 1, 2]),
        ("q_heads*head_dim + kv_heads*head_dim", "kv_heads", [-1] * 8 + [0, 0, 1, 1]),
        ("q_heads*head_dim + kv_heads*head_dim", "q_heads", [0, 0, 1, 1, 2, 2, 3, 3] + [-1] * 4),
        ("positions + 2", "positions", [0, 1, 2, 3, 4, 5, -1, -1]),
    ],
)
def test_owners_of_entries(text, axis, expected):
    assert Dimension.parse(text).owners(axis, SIZES).tolist() == expected


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_owners_and_kept_entries_agree_on_every_dimension(model_type):
    """The entries kept of an axis are those that its kept units own, and all of other axes."""
    family = FAMILIES[model_type]
    sizes = family.sizes(tiny_config(model_type))
    seen = set()
    for dimensions in (*family.parameters.values(), *family.stored.values()):
        for dimension in map(Dimension.parse, dimensions):
            for axis in dimension.axes & sizes.keys():
                owners = dimension.owners(axis, sizes)
                assert len(owners) == dimension.size(sizes)
                kept = [unit for unit in range(sizes[axis]) if unit % 3 != 1]
                expected = [entry for entry, unit in enumerate(owners) if unit < 0 or unit % 3 != 1]
                assert sorted(dimension.indices(sizes, {axis: kept})) == expected
                seen.add(axis)
    assert seen >= {"hidden", "q_heads", "neurons", "vocab"}
