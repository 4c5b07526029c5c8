"""`capgap.json`: what it holds, where it comes from, and what it must never give away."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_capgap import lineage
from hf_capgap.errors import CapGapError

STAGES = [{"stage": "cut", "shape": {"hidden_size": 32}, "name": "größer"}, {"stage": "distil", "loss": 1.5}]


def test_written_stages_are_read_back(tmp_path: Path) -> None:
    lineage.write_stages(tmp_path, STAGES)
    assert lineage.read_stages(tmp_path) == STAGES
    assert lineage.read_stages(str(tmp_path)) == STAGES


def test_the_file_is_versioned_json(tmp_path: Path) -> None:
    lineage.write_stages(tmp_path, STAGES)
    assert json.loads((tmp_path / "capgap.json").read_text(encoding="utf-8")) == {"version": 1, "stages": STAGES}


def test_writing_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    lineage.write_stages(tmp_path, STAGES)
    lineage.write_stages(tmp_path, STAGES[:1])
    assert lineage.read_stages(tmp_path) == STAGES[:1]
    assert os.listdir(tmp_path) == ["capgap.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    lineage.write_stages(tmp_path, STAGES)
    with pytest.raises(TypeError):
        lineage.write_stages(tmp_path, [{"stage": "cut", "shape": object()}])
    assert lineage.read_stages(tmp_path) == STAGES
    assert os.listdir(tmp_path) == ["capgap.json"]


def test_a_folder_without_lineage_has_no_stages(tmp_path: Path) -> None:
    assert lineage.read_stages(tmp_path) == []
    assert lineage.read_stages(tmp_path / "missing") == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"stages": null}', "null"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "capgap.json").write_text(content)
    with pytest.raises(
        CapGapError, match=r"The lineage file is damaged \(found: capgap\.json: .*Restore or remove it"
    ):
        lineage.read_stages(tmp_path)


def test_a_stage_holds_its_name_its_facts_and_the_versions() -> None:
    stage = lineage.new_stage("cut", {"shape": [1, 2]})
    assert stage == {"stage": "cut", "shape": [1, 2], "versions": lineage.package_versions()}
    assert stage["versions"]["python"] == platform.python_version()
    assert stage["versions"]["torch"] == version("torch")
    assert stage["versions"]["hf-capgap"] == version("hf-capgap")


@pytest.mark.parametrize("name", ["org/model", "model", "org/model-1.5B"])
def test_a_hub_id_is_its_own_public_name(name: str) -> None:
    assert lineage.public_name(name) == name


@pytest.mark.parametrize("path", ["/home/someone/model", "./model", "../x/model", "~/model", "/home/someone/model/"])
def test_only_the_last_part_of_a_local_path_is_public(path: str) -> None:
    assert lineage.public_name(path) == "model"


def test_a_relative_path_that_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert lineage.public_name("private/model") == "model"
    assert lineage.public_name("public/model") == "public/model"


def test_a_model_in_memory_has_its_own_lineage(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    assert lineage.stages_of(model) == []
    model.lineage = STAGES
    assert lineage.stages_of(model) == STAGES
    lineage.stages_of(model).append({})
    assert len(model.lineage) == 2


def test_a_loaded_model_has_the_lineage_of_its_folder(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path)
    lineage.write_stages(tmp_path, STAGES)
    assert lineage.stages_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == STAGES


def test_a_model_is_described_by_public_facts_alone(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    folder = tmp_path / "secret" / "small-model"
    make_model("llama").save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    description = lineage.describe_model(model)
    assert description == {
        "name": "small-model",
        "revision": None,
        "model_type": "llama",
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    assert "secret" not in json.dumps(description)


def test_the_commit_of_a_cached_hub_model_is_found(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some-org--some-model"  # as huggingface_hub lays out its cache
    make_model("llama").config.save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert lineage.hub_commit("some-org/some-model", cache_dir=tmp_path) == commit
    assert lineage.hub_commit("some-org/some-model", revision="other", cache_dir=tmp_path) is None
    assert lineage.hub_commit(str(cached)) is None


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"stages": "x"}', b'{"stages": [1]}', b"[]"])
def test_lineage_that_cannot_be_understood_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "capgap.json").write_bytes(content)
    with pytest.raises(CapGapError, match="damaged"):
        lineage.read_stages(tmp_path)
