"""Streaming surgery: bit for bit the cut in memory, from every kind of checkpoint; damaged ones are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import ALL_FAMILIES, logits_of, random_scores, smaller, smaller_everywhere
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_capgap import ExpressiveScores, StudentShape, cut, verify
from hf_capgap.errors import CapGapError, CheckpointError, ScoresError, UnsupportedModelError
from hf_capgap.families import family_for
from hf_capgap.pruning import StudentFolder, streaming
from hf_capgap.pruning.fingerprint import fingerprint_of_model

pytestmark = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny

INDEX = "model.safetensors.index.json"


def scores_of(model: PreTrainedModel) -> ExpressiveScores:
    """Random ones that know their model."""
    return replace(random_scores(model.config), fingerprint=fingerprint_of_model(family_for(model.config), model))


def stream(folder: Path, output_dir: Path, scores: ExpressiveScores | None = None, **options: Any) -> StudentFolder:
    config = AutoConfig.from_pretrained(folder)
    scores = random_scores(config) if scores is None else scores
    student = cut(folder, scores, smaller_everywhere(config), output_dir=output_dir, **options)
    assert isinstance(student, StudentFolder)
    return student


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.shape == b[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


# --- the same as in memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_streamed_cut_is_the_cut_in_memory(make_model, tmp_path, model_type, tied, dtype, shard_size):
    teacher = make_model(model_type, tie_word_embeddings=tied).to(dtype)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size=shard_size)
    assert (tmp_path / "teacher" / INDEX).exists() is (shard_size == "100KB")
    scores, shape = scores_of(teacher), smaller_everywhere(teacher.config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype="auto")
    in_memory = cut(loaded, scores, shape, output_dir=tmp_path / "in memory")
    streamed = stream(tmp_path / "teacher", tmp_path / "streamed", scores)
    assert streamed.kept == in_memory.kept
    assert_same_bits(tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "in memory"))
    files = [{file.name for file in (tmp_path / name).iterdir()} for name in ("streamed", "in memory")]
    assert files[0] == files[1] >= {"config.json", "generation_config.json", "capgap.json", "kept_indices.json"}
    for name in files[0] - {"model.safetensors"}:
        assert read_json(tmp_path / "streamed" / name) == read_json(tmp_path / "in memory" / name), name
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype="auto")
    assert student.dtype == dtype
    assert torch.equal(logits_of(student), logits_of(in_memory))


@pytest.mark.parametrize("block_bytes", [1, 1000])
@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_blocks_smaller_than_a_tensor_give_the_same_bits(make_model, tmp_path, monkeypatch, model_type, block_bytes):
    """Row by row, and a few rows at a time."""
    teacher = make_model(model_type)
    teacher.save_pretrained(tmp_path / "teacher")
    stream(tmp_path / "teacher", tmp_path / "whole")
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", block_bytes)
    stream(tmp_path / "teacher", tmp_path / "blocks")
    assert_same_bits(tensors_of(tmp_path / "blocks"), tensors_of(tmp_path / "whole"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_sharded_student_loads_anywhere(make_model, tmp_path, model_type):
    make_model(model_type).save_pretrained(tmp_path / "teacher")
    stream(tmp_path / "teacher", tmp_path / "one file")
    stream(tmp_path / "teacher", tmp_path / "shards", max_shard_size="30KB")
    index = read_json(tmp_path / "shards" / INDEX)
    files = sorted((tmp_path / "shards").glob("model-0*-of-0*.safetensors"))
    assert len(files) >= 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        stored = load_file(file)
        assert set(stored) == {name for name, shard in index["weight_map"].items() if shard == file.name}
        assert sum(tensor.nbytes for tensor in stored.values()) <= 30_000 or len(stored) == 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "shards").values())
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert_same_bits(tensors_of(tmp_path / "shards"), tensors_of(tmp_path / "one file"))
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one file", "shards"))
    assert torch.equal(logits_of(one), logits_of(many))
    verify(tmp_path / "teacher", tmp_path / "shards")


def test_file_is_laid_out_as_the_library_does_it(make_model, tmp_path):
    """Mixed dtypes, too: wide entries first, every tensor aligned to its own width."""
    model = make_model("qwen3")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in state:
        if "norm" not in name:
            state[name] = state[name].bfloat16()
    model.save_pretrained(tmp_path / "teacher")
    save_file(state, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    stream(tmp_path / "teacher", tmp_path / "student")
    file = tmp_path / "student" / "model.safetensors"
    save_file(load_file(file), tmp_path / "by the library.safetensors", metadata={"format": "pt"})
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"F32", "BF16"}
    for entry in header.values():
        assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - 8 - length
    assert len(content) - length == (tmp_path / "by the library.safetensors").stat().st_size - _header_length(
        tmp_path / "by the library.safetensors"
    )


def _header_length(file: Path) -> int:
    return struct.unpack("<Q", file.read_bytes()[:8])[0]


@pytest.mark.parametrize("layers", ["scores", [3, 0]])
def test_options_are_those_of_the_cut_in_memory(make_model, tmp_path, layers):
    teacher = make_model("qwen2")
    teacher.save_pretrained(tmp_path / "teacher")
    scores = random_scores(teacher.config)
    shape = smaller(teacher.config, num_hidden_layers=2, num_attention_heads=4)
    streamed = cut(tmp_path / "teacher", scores, shape, layers, protect_ends=True, output_dir=tmp_path / "student")
    in_memory = cut(teacher, scores, shape, layers, protect_ends=True)
    assert streamed.kept == in_memory.kept
    assert streamed.kept.layers == [0, 3]
    assert_same_bits(tensors_of(tmp_path / "student"), dict(in_memory.state_dict()))
    target = cut(tmp_path / "teacher", scores, "60%", output_dir=tmp_path / "by target")
    assert target.num_parameters() == pytest.approx(0.6 * teacher.num_parameters(), rel=0.1)


def test_teacher_that_sits_in_a_folder_of_links_is_streamed(make_model, tmp_path):
    """As in the Hub's cache, where a snapshot links to blobs."""
    make_model().save_pretrained(tmp_path / "blobs")
    (tmp_path / "teacher").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "teacher" / file.name).symlink_to(file)
    stream(tmp_path / "teacher", tmp_path / "student")
    verify(tmp_path / "blobs", tmp_path / "student")


# --- checkpoints of other versions ---------------------------------------------------------------------------------


def rename(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in state.items()}


def gpt2_of_2019(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released files: no prefix, no output head, the causal mask stored with each layer."""
    state = rename({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, "transformer.", "")
    for layer in range(4):
        state[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def opt_without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, "model.", "")


def opt_with_its_tied_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "lm_head.weight": state["model.decoder.embed_tokens.weight"].clone()}


def pythia(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = rename(state, "lm_head.", "embed_out.")
    for layer in range(4):
        state[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        state[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        state[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.rand(1)
    return state


def llama_2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(4) for layer in range(4)}}


def stacked_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a model holds them, not as checkpoints do."""
    return state


LEGACY = [
    ("gpt2", True, gpt2_of_2019),
    ("opt", True, opt_without_prefix),
    ("opt", True, opt_with_its_tied_head),
    ("gpt_neox", False, pythia),
    ("llama", False, llama_2),
    ("mixtral", False, stacked_experts),
    ("qwen3_moe", False, stacked_experts),
]


@pytest.mark.parametrize(
    ("model_type", "tied", "make_legacy"), LEGACY, ids=[f"{name}-{change.__name__}" for name, _, change in LEGACY]
)
def test_names_of_other_versions_are_read(make_model, tmp_path, model_type, tied, make_legacy):
    teacher = make_model(model_type, tie_word_embeddings=tied)
    teacher.save_pretrained(tmp_path / "teacher")
    state = dict(teacher.state_dict())
    if tied:
        state.pop("lm_head.weight")
    state = {name: tensor.clone().contiguous() for name, tensor in make_legacy(state).items()}
    save_file(state, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    scores = scores_of(teacher)
    stream(tmp_path / "teacher", tmp_path / "student", scores)
    in_memory = cut(teacher, scores, smaller_everywhere(teacher.config), output_dir=tmp_path / "in memory")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert_same_bits(dict(student.state_dict()), dict(in_memory.state_dict()))
    if make_legacy is not stacked_experts:  # written in today's names, without buffers or a second head
        assert_same_bits(tensors_of(tmp_path / "student"), tensors_of(tmp_path / "in memory"))


def test_teacher_without_safetensors_is_loaded_with_a_warning(make_model, tmp_path):
    teacher = make_model()
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    torch.save(teacher.state_dict(), tmp_path / "teacher" / "pytorch_model.bin")
    scores, shape = scores_of(teacher), smaller_everywhere(teacher.config)
    with pytest.warns(UserWarning, match="no safetensors files: the teacher is loaded into memory"):
        student = cut(tmp_path / "teacher", scores, shape, output_dir=tmp_path / "student")
    assert isinstance(student, PreTrainedModel)
    assert_same_bits(tensors_of(tmp_path / "student"), dict(cut(teacher, scores, shape).state_dict()))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(make_model, tmp_path) -> Path:
    """A teacher in six shards or so."""
    folder = tmp_path / "teacher"
    make_model().save_pretrained(folder, max_shard_size="100KB")
    assert len(shards_of(folder)) > 3
    return folder


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def shard_with(folder: Path, name: str) -> Path:
    return folder / read_json(folder / INDEX)["weight_map"][name]


def edit_json(file: Path, change: Callable[[dict], Any]) -> None:
    content = read_json(file)
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_shard(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = shard_with(folder, name)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_refused(
    folder: Path, error: type[CapGapError], *named: str, scores: ExpressiveScores | None = None
) -> None:
    """With a message that names the thing; nothing is left beside the teacher."""
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(error) as caught:
        stream(folder, folder.parent / "student", scores)
    assert type(caught.value) is error
    for text in named:
        assert text in str(caught.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def test_missing_shard_is_refused_by_name(sharded):
    missing = shards_of(sharded)[1]
    missing.unlink()
    assert_refused(sharded, CheckpointError, missing.name, "1 of", "missing")


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.0])
def test_truncated_shard_is_refused_by_name(sharded, keep):
    """A download that broke off: in the data, somewhere, or before the first byte."""
    broken = shards_of(sharded)[2]
    content = broken.read_bytes()
    length = int(keep * len(content))
    broken.write_bytes(content[:length])
    assert_refused(sharded, CheckpointError, broken.name, "damaged or truncated", f"{length:,} bytes")


def test_truncated_single_file_is_refused_by_name(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(tmp_path / "teacher", CheckpointError, "model.safetensors", "truncated")


def test_file_that_is_no_safetensors_is_refused_by_name(sharded):
    shards_of(sharded)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    assert_refused(sharded, CheckpointError, shards_of(sharded)[0].name)


def test_tensor_that_only_the_index_names_is_refused(sharded):
    name = "model.layers.2.mlp.up_proj.weight"
    edit_shard(sharded, name, lambda tensors: tensors.pop(name))
    assert_refused(sharded, CheckpointError, name, "missing in the checkpoint")


def test_missing_layer_is_refused(sharded):
    """Even one that this cut would have removed."""
    name = "model.layers.0.input_layernorm.weight"
    edit_shard(sharded, name, lambda tensors: tensors.pop(name))
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(name))
    assert_refused(sharded, CheckpointError, name)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    assert_refused(sharded, CheckpointError, INDEX)


def test_missing_or_damaged_config_is_refused(sharded, tmp_path):
    config = random_scores(AutoConfig.from_pretrained(sharded)), StudentShape.of(AutoConfig.from_pretrained(sharded))
    for damage in (lambda file: file.write_text("{"), lambda file: file.unlink()):
        damage(sharded / "config.json")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            cut(sharded, *config, output_dir=tmp_path / "student")
        assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_tensor_of_another_shape_is_refused_with_both_shapes(sharded):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_shard(sharded, name, lambda tensors: tensors.update({name: tensors[name][:24].clone()}))
    assert_refused(sharded, UnsupportedModelError, name, "(32, 64)", "(24, 64)")


def test_tensor_that_no_table_names_is_refused(sharded):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_shard(sharded, name, lambda tensors: tensors.update({"model.layers.1.adapter.weight": torch.ones(3)}))
    assert_refused(sharded, UnsupportedModelError, "model.layers.1.adapter.weight", "(3,)")


def test_config_of_another_model_is_refused(sharded):
    edit_json(sharded / "config.json", lambda config: config.update(intermediate_size=128))
    assert_refused(sharded, UnsupportedModelError, "mlp", "(64, 128)")


def test_unknown_family_is_refused(sharded, tmp_path):
    config = AutoConfig.from_pretrained(sharded)
    for model_type in ("bloom", "nobody_knows_it"):
        edit_json(sharded / "config.json", lambda content, name=model_type: content.update(model_type=name))
        with pytest.raises(UnsupportedModelError, match=model_type):
            cut(sharded, random_scores(config), smaller_everywhere(config), output_dir=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_quantised_checkpoint_is_refused(sharded):
    edit_json(
        sharded / "config.json",
        lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}),
    )
    assert_refused(sharded, UnsupportedModelError, "gptq", "Quantised")


def test_scores_of_other_weights_of_the_same_size_are_refused(sharded, make_model):
    stranger = replace(scores_of(make_model(seed=1)), model_name="org/stranger", revision="abc123")
    assert_refused(sharded, ScoresError, "org/stranger@abc123", "teacher", "other weights", scores=stranger)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_the_same_weights_in_another_dtype_are_taken(sharded, tmp_path, dtype):
    """Scoring in 16 bits is what most will do."""
    scored = AutoModelForCausalLM.from_pretrained(sharded, dtype=dtype)
    stream(sharded, tmp_path / "student", scores_of(scored))
    verify(sharded, tmp_path / "student")


def test_scores_from_before_the_teacher_was_trained_on_are_refused(sharded, make_model):
    """Of the same name and size, but every weight moved by a percent."""
    earlier = make_model()
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.mul_(1.01)
    assert_refused(sharded, ScoresError, "other weights", scores=scores_of(earlier))


def test_scores_of_another_shape_are_refused(sharded, make_model):
    stranger = scores_of(make_model(intermediate_size=120))
    assert_refused(sharded, ScoresError, "another model", "(4, 120)", "(4, 112)", scores=stranger)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["heads", "neurons", "hidden", "query_heads", "layers"])
def test_non_finite_scores_are_refused(sharded, name, value):
    scores = random_scores(AutoConfig.from_pretrained(sharded))
    getattr(scores, name).view(-1)[3] = value
    assert_refused(sharded, ScoresError, "Non-finite", name, scores=scores)


def test_folder_that_is_not_there_is_refused(make_model, tmp_path):
    config = make_model().config
    for source in (tmp_path / "nowhere", "nobody/nothing"):
        with pytest.raises(CheckpointError, match=Path(source).name):
            cut(source, random_scores(config), smaller_everywhere(config), output_dir=tmp_path / "student")
    assert not list(tmp_path.iterdir())
