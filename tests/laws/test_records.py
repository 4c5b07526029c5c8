"""Run records: what they refuse, and that files give back what was written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from hf_capgap import RunRecord
from hf_capgap.errors import RecordError
from hf_capgap.laws import append_record, read_records, write_records

SUPERVISED = RunRecord(num_params=1e9, num_tokens=2e10, loss=2.5, dataset="C4")
DISTILLED = RunRecord(
    num_params=123_456,
    num_tokens=7,
    loss=None,
    dataset="C4",
    teacher="org/teacher",
    num_teacher_params=2.5e9,
    num_teacher_tokens=5e10,
    teacher_loss=2.25,
    seed=3,
    run="first",
)
DIVERGED = RunRecord(num_params=1e9, num_tokens=2e10, loss=math.nan, dataset="C4")


def same(first: RunRecord, second: RunRecord) -> bool:
    return repr(first) == repr(second)  # NaN is not equal to itself


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_give_records_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"records{suffix}"
    records = [SUPERVISED, DISTILLED, DIVERGED]
    write_records(path, records)
    back = read_records(path)
    assert len(back) == 3
    for record, other in zip(records, back, strict=True):
        for field in fields(RunRecord):
            value, read = getattr(record, field.name), getattr(other, field.name)
            assert value == read or (math.isnan(value) and math.isnan(read)), field.name
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_appended_lines_are_read_in_order_from_every_folder_below(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
        append_record(tmp_path / name / "runs.jsonl", SUPERVISED)
        append_record(tmp_path / name / "runs.jsonl", DISTILLED)
    assert read_records(tmp_path) == [SUPERVISED, DISTILLED] * 2
    assert read_records([tmp_path / "a", tmp_path / "b/c/runs.jsonl"]) == [SUPERVISED, DISTILLED] * 2


def test_runs_that_end_together_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    code = (
        "import sys; from hf_capgap.laws.records import RunRecord, append_record\n"
        "record = RunRecord(num_params=1e9, num_tokens=1e9, loss=2.0, dataset=sys.argv[2] * 3000)\n"
        "for _ in range(50): append_record(sys.argv[1], record)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "xy"]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert sorted(record.dataset[0] for record in read_records(path)) == ["x"] * 50 + ["y"] * 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_params": -1e9}, "num_params must be positive"),
        ({"num_params": 3}, r"num_params.*Did you mean 3e9 \(3B\)"),
        ({"num_params": None}, "num_params"),
        ({"num_params": "1B"}, "num_params is not a number"),
        ({"num_tokens": 0}, "num_tokens must be positive"),
        ({"num_tokens": math.inf}, "num_tokens is not finite"),
        ({"loss": -2.5}, "loss must be positive"),
        ({"loss": 24.8}, "perplexity"),
        ({"loss": 1e-4}, "loss is smaller than any cross-entropy"),
        ({"loss": True}, "loss is not a number"),
        ({"loss": "low"}, "loss is not a number"),
        ({"num_params": [1e9]}, "num_params is not a number"),
        ({"num_params": 10**400}, "num_params is not a number"),
        ({"seed": "first"}, "seed is not a number"),
        ({"seed": 0.5}, "seed is not a whole number"),
        ({"dataset": " "}, "which data"),
        ({"dataset": None}, "which data"),
        ({"teacher_loss": 2.0}, r"a teacher without naming it.*teacher_loss"),
        ({"teacher": "t", "num_teacher_params": 7}, "num_teacher_params.*Did you mean 7e9"),
        ({"teacher": "t", "teacher_loss": -1.0}, "teacher_loss must be positive"),
    ],
)
def test_records_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        RunRecord(**{"num_params": 1e9, "num_tokens": 2e10, "loss": 2.5, "dataset": "C4", **change})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2 of runs.jsonl is not JSON"),
        ("3", "Record 2 of runs.jsonl.*Not a JSON object"),
        ('{"num_params": 1e9, "loss": 2.0}', r"Record 2 of runs.jsonl.*lacks.*num_tokens.*dataset"),
        (
            '{"num_params": 3, "num_tokens": 1e9, "loss": 2.0, "dataset": "C4"}',
            "Record 2 of runs.jsonl.*Did you mean 3e9",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(SUPERVISED.to_dict()) + f"\n{line}\n")
    with pytest.raises(RecordError, match=message):
        read_records(path)


def test_numbers_given_as_text_or_numpy_become_numbers() -> None:
    record = RunRecord(num_params="1e9", num_tokens=np.float32(2e10), loss="2.5", dataset="C4", seed="3")
    assert (record.num_params, record.loss, record.seed) == (1e9, 2.5, 3)
    assert isinstance(record.num_params, float)
    assert json.loads(json.dumps(record.to_dict()))["num_tokens"] == pytest.approx(2e10)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_diverged_loss_is_valid_json_and_comes_back(tmp_path: Path, loss: float) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    record = RunRecord(num_params=1e9, num_tokens=2e10, loss=loss, dataset="C4", teacher="t", teacher_loss=loss)
    write_records(tmp_path / "written.jsonl", [record])
    append_record(tmp_path / "appended.jsonl", record)
    for name in ("written", "appended"):
        line = (tmp_path / f"{name}.jsonl").read_text()
        assert json.loads(line, parse_constant=refuse)["loss"] == str(loss)
        assert same(*read_records(tmp_path / f"{name}.jsonl"), record)


def test_a_torn_last_line_is_named_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_record(path, SUPERVISED)
    whole = path.read_text()
    path.write_text(whole + "\n" + whole[:20])
    append_record(path, DISTILLED)
    with pytest.raises(RecordError, match="Line 3 of runs.jsonl is not JSON.*stopped while it wrote"):
        read_records(path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join(line for line in lines if line != whole[:20]))
    assert read_records(path) == [SUPERVISED, DISTILLED]


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_bytes(b'{"dataset": "caf\xe9"}\n')
    with pytest.raises(RecordError, match="runs.jsonl is not UTF-8"):
        read_records(tmp_path)


def test_files_that_are_not_records(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read.*No such file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="Not a file of records.*runs.csv"):
        read_records(tmp_path / "runs.csv")
    with pytest.raises(RecordError, match="Not a file of records"):
        write_records(tmp_path / "runs.csv", [SUPERVISED])
    with pytest.raises(RecordError, match=r"No runs\.jsonl in or below"):
        read_records(tmp_path)
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(RecordError, match=r"Parquet file is damaged.*damaged\.parquet"):
        read_records(tmp_path / "damaged.parquet")


def test_facts_that_later_versions_add_are_left_out() -> None:
    assert RunRecord.from_dict({**SUPERVISED.to_dict(), "weather": "fine"}) == SUPERVISED
