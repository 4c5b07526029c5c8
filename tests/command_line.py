"""What the tests of commands share: a tiny teacher's folder, a corpus, and a run of `hf-capgap` in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from hf_capgap.cli.main import main

VOCAB_SIZE = 260  # of the byte tokenizer


@dataclass(frozen=True)
class Result:
    """Exit code and output of one command."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> Result:
    """`hf-capgap *argv`."""
    capsys.readouterr()
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return Result(code, captured.out, captured.err)


def save_teacher(folder: Path, make_model: Callable, make_tokenizer: Callable, model_type: str = "llama") -> Path:
    """A tiny model of the family with its tokenizer."""
    model: PreTrainedModel = make_model(model_type, vocab_size=VOCAB_SIZE)
    model.save_pretrained(folder)
    make_tokenizer(VOCAB_SIZE).save_pretrained(folder)
    return folder


def write_corpus(path: Path, num_lines: int = 60) -> Path:
    """A text file of so many different lines."""
    path.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(num_lines)), encoding="utf-8")
    return path


def cells(output: str, first: str) -> list[str]:
    """The other cells of the one table row whose first cell is `first`."""
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in output.splitlines() if "│" in line]
    [row] = [row for row in rows if row[0] == first]
    return row[1:]
