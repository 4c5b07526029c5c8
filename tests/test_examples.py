"""The example scripts, run in this process on a tiny teacher; offline."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import run, save_teacher, write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_capgap import StudentShape, load_corpus, pack, solve_shape, verify
from hf_capgap.cli.main import main as command
from hf_capgap.errors import OutputFolderError
from hf_capgap.lineage import read_stages

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", REPOSITORY / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def teacher(make_model, make_tokenizer, tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("examples") / "teacher", make_model, make_tokenizer)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.txt")


@pytest.fixture
def run_script(teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def run_it(name: str, *argv: object) -> str:
        given = ["--teacher", teacher, "--dataset", corpus, "--block_size", 16, "--num_eval_blocks", 7]
        given += ["--num_score_batches", 2, "--output_dir", tmp_path / "out", *argv]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, given)])
        load_script(name).main()
        return capsys.readouterr().out

    return run_it


@torch.no_grad()
def held_out_loss(folder: Path, corpus: Path) -> float:
    """Of the first seven blocks, by transformers' own loss."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    blocks = torch.tensor(pack(load_corpus(str(corpus)), tokenizer, 16)[:7]["input_ids"])
    return float(model(input_ids=blocks, labels=blocks).loss)


# --- prune.py ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--stages", "1"], ["--stages", "2", "--metric", "taylor", "--unit", "example"]])
def test_prune_cuts_proves_and_measures(run_script, teacher, corpus, tmp_path, argv: list[str]) -> None:
    output = run_script("prune", "--target", "60%", "--batch_size", 3, *argv)
    student = tmp_path / "out" / "student"
    config = AutoModelForCausalLM.from_pretrained(teacher).config
    model = AutoModelForCausalLM.from_pretrained(student)
    assert StudentShape.of(model.config) == solve_shape(config, "60%")
    assert verify(teacher, student).masked_difference < 1e-4
    assert "proof: VerificationReport(masked_difference=" in output
    stages = read_stages(student)
    assert len(stages) == int(argv[1])
    assert {stage["scores"]["metric"] for stage in stages} == {"taylor" if "taylor" in argv else "expressive"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for name, folder in {"teacher": teacher, "student, cut": student}.items():
        expected = held_out_loss(folder, corpus)
        result = report["results"][name]
        assert result["cross_entropy"] == pytest.approx(expected, rel=1e-5)
        row = f"| {name} | {result['num_parameters']:,} | {expected:.3f} | {math.exp(expected):.2f} |"
        assert row in output
    assert report["arguments"]["stages"] == int(argv[1])
    assert report["arguments"]["block_size"] == 16


def test_prune_distils_between_its_stages(run_script, corpus, tmp_path) -> None:
    options = ("--target", "60%", "--batch_size", 3, "--stages", 2)
    run_script("prune", *options)
    output = run_script("prune", *options, "--distil_steps", 2, "--output_dir", tmp_path / "distilled")
    assert "proof: none, as it was trained between its cuts" in output
    stages = read_stages(tmp_path / "distilled" / "student")
    assert [stage["stage"] for stage in stages] == ["cut", "distil", "cut"]
    assert stages[1]["num_steps"] == 2
    losses = [held_out_loss(tmp_path / folder / "student", corpus) for folder in ("out", "distilled")]
    assert abs(losses[0] - losses[1]) > 1e-3  # it was trained


def test_prune_reads_yaml(run_script, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("target: 60%\nmetric: random\nlayers: scores\nnum_hidden_layers: 3\n")
    run_script("prune", "--config", tmp_path / "recipe.yaml", "--metric", "magnitude")
    [stage] = read_stages(tmp_path / "out" / "student")
    assert (stage["scores"]["metric"], stage["layers"]) == ("magnitude", "scores")
    assert stage["shape"]["num_hidden_layers"] == 3


def test_a_folder_that_holds_something_is_left_alone(run_script, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(OutputFolderError, match="The output folder is not empty"):
        run_script("prune")


# --- distill.py ----------------------------------------------------------------------------------------------------

SHORT = ("--max_steps", 2, "--per_device_train_batch_size", 3, "--use_cpu", "true", "--disable_tqdm", "true")


@pytest.mark.parametrize("source", ["cut by the script", "cut by the command"])
def test_distill_trains_a_student(run_script, capsys, teacher, corpus, tmp_path, source: str) -> None:
    argv = ("--target", "60%")
    if source == "cut by the command":
        scores, student = tmp_path / "scores.safetensors", tmp_path / "cut"
        assert command(["score", str(teacher), "--metric", "magnitude", "--output", str(scores)]) == 0
        cut = run(capsys, "cut", teacher, "--scores", scores, "--target", "60%", "--output_dir", student)
        assert f"--teacher {teacher} --student {student}" in cut.out  # what it says comes next
        argv = ("--student", student)
    output = run_script("distill", *argv, *SHORT)
    folder = tmp_path / "out" / "student"
    stages = read_stages(folder)
    assert [stage["stage"] for stage in stages] == ["cut", "distil"]
    assert stages[0]["scores"]["metric"] == ("magnitude" if source == "cut by the command" else "expressive")
    assert (tmp_path / "out" / "scores.safetensors").exists() is (source == "cut by the script")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["results"]["teacher"]["evaluation"]["eval_ce"] == pytest.approx(held_out_loss(teacher, corpus), 1e-4)
    trained = report["results"]["student, distilled"]["evaluation"]["eval_ce"]
    assert trained == pytest.approx(held_out_loss(folder, corpus), rel=1e-4)
    assert report["arguments"]["num_eval_blocks"] == 7
    assert re.search(r"\| student, distilled \| [\d,]+ \| ", output)
