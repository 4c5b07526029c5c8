"""The worked example of docs/adding_a_family.md works as it stands there, and the page explains every field."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from conftest import REPOSITORY
from students import logits_of, make_inputs, random_scores, smaller
from transformers import AutoConfig, AutoModelForCausalLM

from hf_capgap import StudentShape, cut, score, solve_shape, verify
from hf_capgap.errors import UnsupportedModelError
from hf_capgap.families import FAMILIES, Family, audit, family_for

pytestmark = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny

PAGE = (REPOSITORY / "docs" / "adding_a_family.md").read_text(encoding="utf-8")
SMALLER = {
    "num_hidden_layers": 2,
    "hidden_size": 40,
    "num_key_value_heads": 3,
    "num_attention_heads": 3,
    "intermediate_size": 37,
}


@pytest.fixture
def starcoder2(monkeypatch) -> Family:
    """The table of the page, registered."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, "adding_a_family.md", "exec"), names)
    monkeypatch.setitem(FAMILIES, "starcoder2", names["STARCODER2"])
    return names["STARCODER2"]


def test_example_is_no_family_yet():
    """Otherwise the page would teach what is there already."""
    with pytest.raises(UnsupportedModelError, match="starcoder2"):
        family_for({"model_type": "starcoder2"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_example_passes_the_behaviour_suite(starcoder2, make_model, tmp_path, tied, use_bias):
    teacher = make_model("starcoder2", tie_word_embeddings=tied, use_bias=use_bias)
    assert audit(teacher) is starcoder2
    assert starcoder2.num_parameters(teacher.config) == teacher.num_parameters()
    teacher.save_pretrained(tmp_path / "teacher")
    scores = score(teacher, [{"input_ids": make_inputs(teacher.config)}])
    shape = smaller(teacher.config, **SMALLER)
    student = cut(teacher, scores, shape, layers="scores")
    verify(teacher, student)
    assert student.num_parameters() == shape.num_parameters(teacher.config)
    assert (student.get_input_embeddings().weight is student.get_output_embeddings().weight) is tied
    folder = cut(tmp_path / "teacher", scores, shape, layers="scores", output_dir=tmp_path / "student")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits_of(reloaded), logits_of(student))
    assert folder.kept == student.kept
    assert StudentShape.of(AutoConfig.from_pretrained(tmp_path / "student")) == shape
    generated = [
        reloaded.generate(make_inputs(teacher.config, 8), do_sample=False, max_new_tokens=12, use_cache=use_cache)
        for use_cache in (False, True)
    ]
    assert torch.equal(*generated)


def test_example_is_scored_as_its_gates_say(starcoder2, make_model):
    """Against gates that are really multiplied in, on one neuron, one head and one hidden dimension of a layer."""
    teacher = make_model("starcoder2").eval()
    ids = make_inputs(teacher.config)
    scores = score(teacher, [{"input_ids": ids}])
    layer = teacher.model.layers[1]
    for tensor, module in ((scores.neurons[1], layer.mlp.c_proj), (scores.query_heads[1], layer.self_attn.o_proj)):
        gate = torch.ones(len(tensor), requires_grad=True)
        width = module.in_features // len(tensor)
        hook = module.register_forward_pre_hook(
            lambda _, args, gate=gate, width=width: (args[0] * gate.repeat_interleave(width),)
        )
        teacher(input_ids=ids, labels=ids).loss.backward()
        hook.remove()
        torch.testing.assert_close(tensor, gate.grad.abs(), rtol=1e-4, atol=1e-6)


def test_example_knows_published_configs_and_their_defaults(starcoder2):
    """StarCoder2-3B is the config class's default; its count is the published one."""
    config = AutoConfig.for_model("starcoder2")
    for name, value in starcoder2.defaults.items():
        assert getattr(config, name) == value
    assert starcoder2.num_parameters(config) == 3_030_371_328
    shape = solve_shape(config, "40%")
    assert shape.num_parameters(config) == pytest.approx(0.4 * 3_030_371_328, rel=0.1)


def test_wrong_table_is_refused_and_nothing_is_cut(starcoder2, make_model, monkeypatch):
    teacher = make_model("starcoder2")
    scores = random_scores(teacher.config)
    transposed = {**starcoder2.parameters, "model.layers.{layer}.mlp.c_fc.weight": ("hidden", "neurons")}
    monkeypatch.setitem(FAMILIES, "starcoder2", replace(starcoder2, parameters=transposed))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.c_fc\.weight"):
        cut(teacher, scores, smaller(teacher.config, **SMALLER))


def test_page_explains_every_field_and_no_other():
    table = PAGE[PAGE.index("## The fields") :]
    explained = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert explained == [field.name for field in fields(Family)]


def test_page_names_files_that_exist():
    named = set(re.findall(r"`((?:tests|hf_capgap)/[\w/]+(?:\.py|/))`", PAGE))
    assert len(named) >= 5
    for path in named:
        assert (REPOSITORY / path).exists(), path
