"""`hf-capgap score`: the same scores as the API, from text; and what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from command_line import Result, cells, run, save_teacher, write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_capgap import ExpressiveScores, load_corpus, pack, score
from hf_capgap.data import calibration_batches

SMALL = ("--num_batches", 2, "--batch_size", 3, "--block_size", 16, "--seed", 5)


@pytest.fixture(scope="module")
def teacher(make_model, make_tokenizer, tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("score") / "teacher", make_model, make_tokenizer)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.txt")


@pytest.fixture
def score_command(capsys, teacher: Path, corpus: Path, tmp_path: Path):
    def command(*argv: object, output: str = "scores.safetensors") -> Result:
        given = {str(argument).partition("=")[0] for argument in argv}
        dataset = () if "--dataset" in given else ("--dataset", corpus)
        return run(capsys, "score", teacher, "--output", tmp_path / output, *dataset, *SMALL, *argv)

    return command


def expected_scores(teacher: Path, corpus: Path, unit: str = "batch", metric: str = "expressive") -> ExpressiveScores:
    """By the API, in the dtype of the file."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    blocks = pack(load_corpus(str(corpus)), AutoTokenizer.from_pretrained(teacher), 16)
    rows = blocks.shuffle(seed=5)[:6]["input_ids"]
    batches = [{"input_ids": torch.tensor(rows[start : start + 3])} for start in (0, 3)]
    return score(model, batches, unit, metric)


def assert_same_scores(found: ExpressiveScores, expected: ExpressiveScores) -> None:
    assert (found.metric, found.unit, found.num_units) == (expected.metric, expected.unit, expected.num_units)
    assert found.calibration_hash == expected.calibration_hash
    assert found.tensors().keys() == expected.tensors().keys()
    for name, values in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name], values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("unit", "metric"),
    [("batch", "expressive"), ("example", "expressive"), ("batch", "taylor"), ("batch", "activation")],
)
def test_scores_are_those_of_the_api(score_command, teacher, corpus, tmp_path, unit: str, metric: str) -> None:
    result = score_command("--unit", unit, "--metric", metric)
    assert result.code == 0, result.err
    expected = expected_scores(teacher, corpus, unit, metric)
    assert_same_scores(ExpressiveScores.load(tmp_path / "scores.safetensors"), expected)
    assert cells(result.out, "heads")[0] == "4 x 4"
    assert cells(result.out, "hidden") == [
        "64",
        *(f"{value:.3g}" for value in (expected.hidden.min(), expected.hidden.median(), expected.hidden.max())),
    ]
    assert f"metric: {metric}, " in result.out
    assert f"mean over {expected.num_units} {'batches' if unit == 'batch' else 'examples'}, data " in result.out


def test_ranks_share_the_batches_out(launch_ranks, monkeypatch, teacher, corpus, tmp_path) -> None:
    """Two processes give the scores of one on the same text, in one file, and speak once."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    program = Path(sys.executable).with_name("hf-capgap")
    argv = ("score", teacher, "--output", tmp_path / "scores.safetensors", "--dataset", corpus, *SMALL)
    output = launch_ranks(program, *argv)
    assert_same_scores(ExpressiveScores.load(tmp_path / "scores.safetensors"), expected_scores(teacher, corpus))
    assert output.count("metric: expressive") == 1


def test_metrics_of_the_weights_read_no_text(score_command, teacher, tmp_path) -> None:
    result = score_command("--metric", "magnitude", "--dataset", tmp_path / "no such corpus.txt")
    assert result.code == 0, result.err
    expected = score(AutoModelForCausalLM.from_pretrained(teacher, dtype="auto"), metric="magnitude")
    assert_same_scores(ExpressiveScores.load(tmp_path / "scores.safetensors"), expected)
    assert ", no data" in result.out


def test_the_seed_is_that_of_random_scores(score_command, teacher, tmp_path) -> None:
    assert score_command("--metric", "random").code == 0
    expected = score(AutoModelForCausalLM.from_pretrained(teacher), metric="random", seed=5)
    found = ExpressiveScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(found.hidden, expected.hidden)


def test_without_a_block_size_blocks_are_as_long_as_the_model_reads(capsys, teacher, corpus, tmp_path) -> None:
    output = tmp_path / "scores.safetensors"
    result = run(capsys, "score", teacher, "--output", output, "--dataset", corpus, "--num_batches", 1)
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    assert model.config.max_position_embeddings == 64
    blocks = pack(load_corpus(str(corpus)), AutoTokenizer.from_pretrained(teacher), 64)
    batches = calibration_batches(blocks, num_batches=1, batch_size=8, seed=0)
    assert_same_scores(ExpressiveScores.load(output), score(model, batches))


def test_the_dtype_is_that_asked_for(score_command, teacher, tmp_path) -> None:
    assert score_command(output="full").code == 0
    assert score_command("--dtype", "bfloat16", output="half").code == 0
    full, half = (ExpressiveScores.load(tmp_path / name).hidden for name in ("full", "half"))
    error = (half - full).abs().max() / full.abs().max()
    assert 1e-5 < error < 0.2  # computed in another dtype, and of the same thing


def test_options_come_from_a_file_and_the_command_line_wins(capsys, teacher, corpus, tmp_path) -> None:
    yaml = tmp_path / "score.yaml"
    output = tmp_path / "scores.safetensors"
    yaml.write_text(
        f"model: nowhere\noutput: {output}\ndataset: {corpus}\nnum_batches: 2\nbatch_size: 3\n"
        "block_size: 16\nseed: 5\nunit: example\n"
    )
    result = run(capsys, "score", "--config", yaml, "--unit", "batch", teacher)
    assert result.code == 0, result.err
    assert_same_scores(ExpressiveScores.load(output), expected_scores(teacher, corpus))


@pytest.mark.parametrize("place", ["first", "last", "named"])
def test_the_model_is_a_word_anywhere_or_an_option(capsys, teacher, tmp_path, place: str) -> None:
    options = ["--metric", "random", "--output", tmp_path / "scores.safetensors"]
    argv = {"first": [teacher, *options], "last": [*options, teacher], "named": [*options, "--model", teacher]}[place]
    result = run(capsys, "score", *argv)
    assert result.code == 0, result.err
    assert f"hf-capgap cut {teacher} --scores" in result.out


@pytest.mark.parametrize("load_in", ["8bit", "4bit"] if importlib.util.find_spec("bitsandbytes") is not None else [])
def test_a_quantised_model_is_scored(make_model, make_tokenizer, capsys, tmp_path, corpus, load_in: str) -> None:
    teacher = save_teacher(tmp_path / "teacher", make_model, make_tokenizer)
    argv = ["score", teacher, "--dataset", corpus, *SMALL, "--dtype", "float32"]
    assert run(capsys, *argv, "--output", tmp_path / "full").code == 0
    result = run(capsys, *argv, "--load_in", load_in, "--output", tmp_path / "packed")
    assert result.code == 0, result.err
    full, packed = (ExpressiveScores.load(tmp_path / name) for name in ("full", "packed"))
    similar = torch.cosine_similarity(full.hidden, packed.hidden, dim=0)
    assert 0.8 < similar < 1 - 1e-6
    assert run(capsys, *argv, "--load_in", load_in, "--metric", "magnitude", "--output", tmp_path / "m").code == 2


# --- what it refuses -----------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept_unless_asked(score_command, tmp_path) -> None:
    path = tmp_path / "scores.safetensors"
    path.write_text("precious")
    result = score_command("--metric", "random")
    assert result.code == 2
    assert result.err.startswith("OutputFolderError: The output file exists already")
    assert path.read_text() == "precious"
    assert score_command("--metric", "random", "--overwrite").code == 0
    assert ExpressiveScores.load(path).metric == "random"


def test_an_output_that_is_a_folder_is_refused(score_command, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    result = score_command("--metric", "random", output="folder")
    assert (result.code, result.err.partition(" (")[0]) == (2, "OutputFolderError: The output is a folder")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--metric", "best"], "argument --metric: invalid choice: 'best'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--num_batches", "0"], "DataError: Calibration needs at least one batch of one block"),
        (["--block_size", "65"], "ConfigError: The model has 64 positions (found: --block_size 65)"),
        (["--dataset", "missing.txt"], "DataError: The corpus is neither a local file nor a Hub dataset"),
    ],
)
def test_a_bad_option_is_named(score_command, tmp_path, argv: list[str], message: str) -> None:
    result = score_command(*argv)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "scores.safetensors").exists()


def test_a_model_that_does_not_load_is_named(capsys, tmp_path) -> None:
    result = run(capsys, "score", tmp_path / "nothing", "--output", tmp_path / "scores")
    assert result.code == 2
    assert result.err.startswith("CheckpointError: The model does not load")
    assert str(tmp_path / "nothing") in result.err


def test_a_model_without_a_tokenizer_needs_one(capsys, make_model, teacher, corpus, tmp_path) -> None:
    make_model(vocab_size=260).save_pretrained(tmp_path / "bare")
    argv = ["score", tmp_path / "bare", "--output", tmp_path / "scores", "--dataset", corpus, *SMALL]
    result = run(capsys, *argv)
    assert result.code == 2
    assert "CheckpointError: The tokenizer does not load" in result.err
    assert run(capsys, *argv, "--tokenizer", teacher).code == 0


def test_a_tokenizer_of_another_model_is_refused(capsys, make_model, teacher, corpus, tmp_path) -> None:
    make_model(vocab_size=100).save_pretrained(tmp_path / "small")
    result = run(capsys, "score", tmp_path / "small", "--tokenizer", teacher, "--output", tmp_path / "s", *SMALL)
    assert result.code == 2
    assert "ConfigError: The tokenizer has more tokens than the model, 100 (found: 260)" in result.err


def test_without_bitsandbytes_the_extra_is_named(score_command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = score_command("--load_in", "4bit")
    assert result.code == 2
    assert 'pip install "hf-capgap[quantization]"' in result.err
