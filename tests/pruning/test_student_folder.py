"""What lies in a student's folder, and that the folder is complete or not there; a cut of a model that was trained."""

from __future__ import annotations

import json
import lzma
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED_DATA
from students import logits_of, random_scores, smaller, smaller_everywhere
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_capgap import StudentShape, cut, score, verify
from hf_capgap.errors import CapGapError, OutputFolderError
from hf_capgap.pruning import Kept, StudentFolder

pytestmark = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny


@pytest.fixture
def teacher_folder(make_model, make_tokenizer, tmp_path) -> Path:
    """A saved teacher with its tokenizer."""
    folder = tmp_path / "private" / "big-teacher"
    make_model("qwen3", vocab_size=260, tie_word_embeddings=True).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def cut_folder(teacher: Path | PreTrainedModel, output_dir: Path, **options: Any) -> StudentFolder | PreTrainedModel:
    config = teacher.config if isinstance(teacher, PreTrainedModel) else AutoConfig.from_pretrained(teacher)
    return cut(teacher, random_scores(config), smaller_everywhere(config), output_dir=output_dir, **options)


def test_students_folder_is_complete(teacher_folder, tmp_path):
    output_dir = tmp_path / "new" / "student"
    student = cut_folder(teacher_folder, output_dir)
    files = {file.name for file in output_dir.iterdir()}
    assert files >= {"config.json", "model.safetensors", "generation_config.json", "capgap.json", "kept_indices.json"}
    assert [file.name for file in output_dir.parent.iterdir()] == ["student"]
    verify(teacher_folder, output_dir)
    reloaded = AutoModelForCausalLM.from_pretrained(output_dir)
    assert torch.equal(logits_of(reloaded), logits_of(student.load()))
    assert Kept.load(output_dir) == student.kept == student.load().kept
    assert (os.fspath(student), str(student)) == (str(output_dir), str(output_dir))
    assert student.num_parameters() == reloaded.num_parameters()


def test_lineage_tells_what_was_done(teacher_folder, tmp_path):
    student = cut_folder(teacher_folder, tmp_path / "student", layers=[0, 2])
    (stage,) = json.loads((tmp_path / "student" / "capgap.json").read_text())["stages"]
    assert [stage] == student.lineage
    assert stage["stage"] == "cut"
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    assert stage["teacher"] == {
        "name": "big-teacher",
        "revision": None,
        "model_type": "qwen3",
        "num_parameters": teacher.num_parameters(),
    }
    assert stage["scores"] == {"metric": "expressive", "unit": "batch", "num_units": 7, "calibration_hash": "0" * 64}
    assert stage["shape"] == StudentShape.of(AutoConfig.from_pretrained(student.path)).as_dict()
    assert stage["layers"] == [0, 2]
    assert stage["protect_ends"] is False
    assert stage["num_parameters"] == student.num_parameters()
    assert {"python", "torch", "transformers", "hf-capgap"} <= set(stage["versions"])


def test_lineage_of_the_teachers_folder_is_continued(teacher_folder, tmp_path):
    cut_folder(teacher_folder, tmp_path / "first")
    config = AutoConfig.from_pretrained(tmp_path / "first")
    cut(tmp_path / "first", random_scores(config), smaller(config, hidden_size=30), output_dir=tmp_path / "second")
    stages = json.loads((tmp_path / "second" / "capgap.json").read_text())["stages"]
    assert [stage["teacher"]["name"] for stage in stages] == ["big-teacher", "first"]


def test_teachers_tokenizer_comes_along(teacher_folder, tmp_path):
    from_path = tmp_path / "from path"
    cut_folder(teacher_folder, from_path)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    in_memory = tmp_path / "in memory"
    cut(model, random_scores(model.config), smaller_everywhere(model.config), output_dir=in_memory)
    text = "Once upon a time, naïve."
    for folder in (from_path, in_memory):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(teacher_folder)(text)["input_ids"]
        assert tokenizer.eos_token == "</s>"


def test_without_a_tokenizer_beside_the_teacher_there_is_none(make_model, make_tokenizer, tmp_path, monkeypatch):
    """A model made in memory must not pick up whatever tokenizer lies in the working directory."""
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    teacher = make_model()
    teacher.save_pretrained(tmp_path / "teacher")
    scores, shape = random_scores(teacher.config), smaller_everywhere(teacher.config)
    for number, model in enumerate((teacher, tmp_path / "teacher")):
        cut(model, scores, shape, output_dir=tmp_path / f"student-{number}")
        assert not list((tmp_path / f"student-{number}").glob("*token*"))
        verify(teacher, tmp_path / f"student-{number}")


def test_no_local_path_is_published(teacher_folder, tmp_path):
    cut_folder(teacher_folder, tmp_path / "student")
    files = list((tmp_path / "student").rglob("*.json"))
    assert len(files) >= 5
    for file in files:
        for private in (tmp_path, Path.home(), Path.cwd()):
            assert str(private) not in file.read_text(encoding="utf-8"), file.name


def test_output_folder_that_holds_something_is_refused_and_untouched(teacher_folder, tmp_path):
    output_dir = tmp_path / "student"
    output_dir.mkdir()
    (output_dir / "notes.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match="not empty"):
        cut_folder(teacher_folder, output_dir)
    assert [(file.name, file.read_text()) for file in output_dir.iterdir()] == [("notes.txt", "mine")]
    with pytest.raises(FileExistsError):
        cut_folder(teacher_folder, output_dir / "notes.txt")
    config = AutoConfig.from_pretrained(teacher_folder)
    with pytest.raises(OutputFolderError):  # before a big teacher is loaded for nothing
        cut(tmp_path / "no such teacher", random_scores(config), smaller_everywhere(config), output_dir=output_dir)


def test_empty_output_folder_is_used(teacher_folder, tmp_path):
    (tmp_path / "student").mkdir()
    cut_folder(teacher_folder, tmp_path / "student")
    verify(teacher_folder, tmp_path / "student")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_failure_in_the_middle_leaves_nothing_behind(teacher_folder, tmp_path, monkeypatch, error, exists):
    """Half a folder would load, or stop the next attempt."""
    output_dir = tmp_path / "models" / "student"
    (output_dir if exists else output_dir.parent).mkdir(parents=True)

    def disk_full(kept: Kept, folder: Path) -> None:
        assert (Path(folder) / "model.safetensors").exists()  # the weights have been written already
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Kept, "save", disk_full)
        with pytest.raises(error):
            cut_folder(teacher_folder, output_dir)
    assert [file.name for file in output_dir.parent.rglob("*")] == (["student"] if exists else [])
    cut_folder(teacher_folder, output_dir)


def test_damaged_lineage_of_the_teacher_is_refused_before_anything_is_written(teacher_folder, tmp_path):
    (teacher_folder / "capgap.json").write_text("{")
    with pytest.raises(CapGapError, match=re.escape("capgap.json")):
        cut_folder(teacher_folder, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_tokenizer_that_cannot_be_written_fails_the_cut_and_leaves_nothing(teacher_folder, tmp_path, monkeypatch):
    """A full disk must not pass for a teacher without a tokenizer."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    for number, teacher in enumerate((teacher_folder, AutoModelForCausalLM.from_pretrained(teacher_folder))):
        with pytest.raises(OSError, match="No space left"):
            cut_folder(teacher, tmp_path / f"student-{number}")
    assert not list(tmp_path.glob("*student*"))


# --- a model that was really trained -------------------------------------------------------------------------------

STORIES = SHARED_DATA / "models" / "stories260K"


@pytest.mark.skipif(not STORIES.exists(), reason=f"the trained model {STORIES.name} is not on this machine")
def test_expressive_scores_keep_what_a_trained_model_needs():
    """Cut to 60 %: by the scores, at random, and keeping the lowest scores. Held-out text tells them apart."""
    teacher = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    with lzma.open(SHARED_DATA / "text" / "tinystories_sample.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(40_000)
    ids = torch.tensor(AutoTokenizer.from_pretrained(STORIES)(text, verbose=False)["input_ids"])
    blocks = ids[: 96 * 128].view(96, 128)
    scores = score(teacher, [{"input_ids": batch} for batch in blocks[:48].split(8)])
    negated = replace(scores, heads=-scores.heads, neurons=-scores.neurons, hidden=-scores.hidden)

    @torch.no_grad()
    def loss_of(model: PreTrainedModel) -> float:
        return model(input_ids=blocks[48:], labels=blocks[48:]).loss.item()

    students = [cut(teacher, each, "60%") for each in (scores, random_scores(teacher.config), negated)]
    assert len({student.num_parameters() for student in students}) == 1
    by_scores, at_random, by_negated_scores = map(loss_of, students)
    assert loss_of(teacher) < 1.8 < by_scores
    assert by_scores + 0.3 < at_random < by_negated_scores
