"""The table of commands, exit codes, and what `--help` says."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from command_line import run, save_teacher, write_corpus

import hf_capgap
from hf_capgap.cli.corpus_options import CorpusOptions
from hf_capgap.cli.cut import CutOptions
from hf_capgap.cli.main import COMMANDS, main
from hf_capgap.cli.score import ScoreOptions
from hf_capgap.cli.scores import ShowOptions
from hf_capgap.cli.shape_options import ShapeOptions
from hf_capgap.cli.verify import VerifyOptions

OPTIONS = {
    ("score",): [ScoreOptions, CorpusOptions],
    ("cut",): [CutOptions, ShapeOptions],
    ("verify",): [VerifyOptions],
    ("scores", "show"): [ShowOptions, ShapeOptions],
}


def run_python(*argv: str, **options: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=120, env=environment, **options
    )


# --- the program ---------------------------------------------------------------------------------------------------


def test_the_entry_point_is_this_main() -> None:
    [entry] = entry_points(group="console_scripts", name="hf-capgap")
    assert entry.load() is main


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from hf_capgap.cli.main import main; code = main(['--help']); "
        "print(sorted({'torch', 'transformers', 'numpy', 'rich', 'yaml'} & sys.modules.keys()), code)"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[] 0"
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", result.stdout, re.MULTILINE)


def test_every_command_has_a_module_with_the_listed_summary() -> None:
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"hf_capgap.cli.{name}")
        assert summary == module.SUMMARY
        assert "\n" not in summary
        assert callable(module.main)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--version")
    assert (result.code, result.out) == (0, f"hf-capgap {hf_capgap.__version__}\n")


def test_nothing_to_do_is_bad_usage_and_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys)
    assert result.code == 2
    assert result.out == ""
    assert "commands:" in result.err


@pytest.mark.parametrize("argv", [["scor"], ["--scores"], ["scores"], ["scores", "draw"]])
def test_an_unknown_command_is_bad_usage(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    result = run(capsys, *argv)
    assert result.code == 2
    assert "usage: hf-capgap" in result.err


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*OPTIONS, ("plan",), ("scores",)], ids=" ".join)
def test_help_of_a_command_says_what_it_does(capsys: pytest.CaptureFixture[str], command: Sequence[str]) -> None:
    result = run(capsys, *command, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: hf-capgap {' '.join(command)} ")
    if command != ("scores", "show"):
        assert COMMANDS[command[0]] in " ".join(result.out.split())


@pytest.mark.parametrize("command", OPTIONS, ids=" ".join)
def test_help_gives_examples_and_every_option_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: Sequence[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    text = run(capsys, *command, "--help").out
    assert re.search(rf"^examples?:\n  hf-capgap {' '.join(command)} ", text, re.MULTILINE)
    for field in [field for options in OPTIONS[command] for field in dataclasses.fields(options)]:
        [entry] = re.findall(rf"^  --{field.name}\b.*(?:\n {{8,}}.*)?", text, re.MULTILINE)
        assert field.metadata["help"].replace("%%", "%") in entry
        expected = field.default is not None
        assert (f"(default: {field.default})" in entry) is expected


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["score"], "MODEL"),
        (["cut", "teacher"], "SCORES"),
        (["cut"], "MODEL, SCORES"),
        (["verify", "teacher"], "STUDENT"),
        (["verify", "--student", "s"], "TEACHER"),
        (["scores", "show"], "SCORES"),
    ],
)
def test_a_missing_argument_is_named(capsys: pytest.CaptureFixture[str], argv: list[str], missing: str) -> None:
    result = run(capsys, *argv)
    assert result.code == 2
    assert result.err.endswith(f"error: the following arguments are required: {missing}\n")


@pytest.mark.parametrize("command", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("extra", [["--nonsense", "3"], ["one", "two", "three", "four"]], ids=["option", "words"])
def test_an_unknown_argument_is_named(
    capsys: pytest.CaptureFixture[str], command: Sequence[str], extra: list[str]
) -> None:
    result = run(capsys, *command, *extra)
    assert result.code == 2
    assert re.match(r"ConfigError: Unknown option on the command line \(found: (--nonsense|two|three)\)", result.err)


def test_an_unreadable_yaml_file_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = run(capsys, "verify", "--config", tmp_path / "missing.yaml")
    assert result.code == 2
    assert result.err.startswith("ConfigError: The configuration file cannot be read")


# --- as a process --------------------------------------------------------------------------------------------------


def test_the_installed_program_prints_an_error_without_a_traceback(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("hf-capgap")
    result = run_python(str(program), "scores", "show", str(tmp_path / "missing.safetensors"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert "missing.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_with_130_and_leaves_no_file(make_model, make_tokenizer, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", make_model, make_tokenizer)
    corpus = write_corpus(tmp_path / "corpus.txt", num_lines=3_000)
    argv = ["-m", "hf_capgap.cli.main", "score", teacher, "--output", tmp_path / "scores.safetensors"]
    argv += ["--dataset", corpus, "--block_size", 8, "--batch_size", 1, "--num_batches", 4_000]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    seen = b""
    while b"scoring" not in seen and (piece := process.stderr.read1()):
        seen += piece
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, (seen + rest).decode()
    assert b"interrupted\n" in rest  # the progress bar may still draw itself behind it
    assert b"Traceback" not in rest
    assert not list(tmp_path.glob("scores*"))
