"""`RunRecord`: what one training run teaches the laws, and the files that such records are kept in."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FitError, LawError, RecordError
from ..extras import require
from .sizes import SMALLEST_COUNT, check_counts, check_losses

FILE_NAME = "runs.jsonl"
_COUNTS = ("num_params", "num_tokens", "num_teacher_params", "num_teacher_tokens")
_LOSSES = ("loss", "teacher_loss")
_TORN = "A run that was stopped while it wrote leaves half a line: take it out."


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished run: a model of some size, trained on some tokens, and the loss that came out.

    Args:
        num_params: Parameters of the trained model outside its embeddings.
        num_tokens: Tokens that it was trained on.
        loss: Its cross-entropy on held-out text, nats per token. None if nobody measured it; NaN if the run diverged.
        dataset: The data. Losses on different data cannot be compared, and are never fitted together.
        teacher: Name of the teacher; None for training on text alone.
        num_teacher_params: The teacher's parameters outside its embeddings.
        num_teacher_tokens: Tokens that the teacher was trained on, if known.
        teacher_loss: The teacher's cross-entropy on the same held-out text, nats per token.
        seed: Seed of the run.
        run: Label that several records of one training run share (checkpoints); they are resampled and held out
            together.

    Raises:
        RecordError: What should be a number and is none (text that spells one is read), sizes that are negative, not
            finite or lack their unit, losses that cannot be, no dataset, or facts about a teacher without its name.
    """

    num_params: float
    num_tokens: float
    loss: float | None
    dataset: str
    teacher: str | None = None
    num_teacher_params: float | None = None
    num_teacher_tokens: float | None = None
    teacher_loss: float | None = None
    seed: int | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *_LOSSES, "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.seed is not None and not float(self.seed).is_integer():
            raise RecordError("seed is not a whole number", found=self.seed)
        try:
            for name in _COUNTS:
                value = getattr(self, name)
                if value is not None or name in ("num_params", "num_tokens"):
                    # A test run may see a handful of tokens; a fit refuses it.
                    check_counts(name, value, smallest=0.0 if name.endswith("tokens") else SMALLEST_COUNT)
            for name in _LOSSES:
                value = getattr(self, name)
                if value is not None and np.isfinite(value):
                    check_losses(name, value)
        except LawError as error:
            raise RecordError(str(error)) from error
        if not isinstance(self.dataset, str) or not self.dataset.strip():
            raise RecordError("A record does not say which data it is of", found=self.dataset, fix="Name its dataset.")
        if self.teacher is None:
            known = [name for name in ("num_teacher_params", "num_teacher_tokens", "teacher_loss") if self.has(name)]
            if known:
                raise RecordError("A record describes a teacher without naming it", found=known, fix="Set teacher.")

    def has(self, name: str) -> bool:
        """Whether a fact is there and a number."""
        value = getattr(self, name)
        return value is not None and bool(np.isfinite(value))

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON, without what is not known; a loss that is not finite as text, "nan"."""
        known = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        texts = {name: str(known[name]) for name in _LOSSES if name in known and not np.isfinite(known[name])}
        return {"loss": None, **known, **texts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunRecord:
        """A record from `to_dict`'s form; facts with other names are left out.

        Raises:
            RecordError: A fact that every record has is missing, or has a value that cannot be.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        missing = [
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
        ]
        if missing:
            raise RecordError("A record lacks what every record says", found=missing, fix=f"It has {sorted(values)}.")
        return cls(**{name: value for name, value in values.items() if name in fields})


Records = str | os.PathLike | Iterable[RunRecord]  # a file or folder of records, or the records


def append_record(path: str | os.PathLike, record: RunRecord) -> None:
    """Add one line to a JSON Lines file, in one write, so that runs that end together do not mix their lines.

    A last line that was not written to its end (a full disk, a kill) is closed first, so that it spoils no other.
    """
    line = json.dumps(record.to_dict(), allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_records(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[RunRecord]:
    """The records of JSON Lines (`.jsonl`) and Parquet (`.parquet`) files, and of the `runs.jsonl` below folders.

    Raises:
        RecordError: A file that is missing or damaged, or a record that cannot be; the message names file and line.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    return [record for path in paths for file in _files(Path(path)) for record in _read_file(file)]


def as_records(records: Records) -> list[RunRecord]:
    """Records as they are, or those of the files that are named.

    Raises:
        RecordError: As `read_records`, or something else than a record.
    """
    if isinstance(records, (str, os.PathLike)):
        return read_records(records)
    records = list(records)
    strangers = [record for record in records if not isinstance(record, RunRecord)]
    if strangers:
        raise RecordError("Not a RunRecord", found=strangers[0], fix="RunRecord.from_dict makes one of a dict.")
    return records


def write_records(path: str | os.PathLike, records: Sequence[RunRecord]) -> None:
    """Write records to a `.jsonl` or `.parquet` file, which appears only when it is complete.

    Raises:
        RecordError: Another kind of file.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".parquet":
        pyarrow, parquet = _pyarrow()
        names = [field.name for field in dataclasses.fields(RunRecord)]
        rows = [{name: getattr(record, name) for name in names} for record in records]
        write = lambda: parquet.write_table(pyarrow.Table.from_pylist(rows), partial)  # noqa: E731
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(record.to_dict(), allow_nan=False) + "\n" for record in records)
        write = lambda: partial.write_text(text, encoding="utf-8")  # noqa: E731
    else:
        raise _unknown_kind(path)
    try:
        write()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_fittable(records: Iterable[RunRecord], needs: Sequence[str], num_needed: int, purpose: str) -> None:
    """Raises `FitError` unless `records` can be fitted together.

    Args:
        records: Those that the fit would use.
        needs: Facts that each of them must have, `loss` among them.
        num_needed: How many there must be.
        purpose: What is fitted, for the message.
    """
    records = list(records)
    datasets = sorted({record.dataset for record in records})
    if len(datasets) > 1:
        raise FitError(
            "Records of different datasets cannot be pooled: their losses are not comparable",
            found=", ".join(datasets),
            fix="Fit each dataset alone.",
        )
    for name in needs:
        for what, is_wrong in (
            ("is not finite (a run that diverged)", lambda value: value is not None and not np.isfinite(value)),
            ("is not known", lambda value: value is None),
        ):
            wrong = [i for i, record in enumerate(records) if is_wrong(getattr(record, name))]
            if wrong:
                raise FitError(
                    f"The {name} of {len(wrong)} of {len(records)} records {what}",
                    found=f"first: {records[wrong[0]]}",
                    fix="Leave them out, or measure it.",
                )
    if len(records) < num_needed:
        raise FitError(
            f"Too few records to fit {purpose}: {num_needed} are needed at least", found=len(records), fix="Run more."
        )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob(FILE_NAME))
    if not found:
        raise RecordError(f"No {FILE_NAME} in or below the folder", found=str(path))
    return found


def _read_file(path: Path) -> list[RunRecord]:
    try:
        rows = _rows(path)
    except OSError as error:
        raise RecordError("The records cannot be read", found=f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path.name} is not UTF-8 text", found=f"{path}: {error.reason}") from error
    records = []
    for number, row in rows:
        try:
            values = json.loads(row) if isinstance(row, str) else row
            if not isinstance(values, dict):
                raise RecordError("Not a JSON object", found=values)
            records.append(RunRecord.from_dict(values))
        except json.JSONDecodeError as error:
            raise RecordError(
                f"Line {number} of {path.name} is not JSON: {error}", found=row[:80], fix=_TORN
            ) from error
        except RecordError as error:
            raise RecordError(f"Record {number} of {path.name}: {error}") from error
    return records


def _rows(path: Path) -> list[tuple[int, Any]]:
    """(number in the file, from 1; line or dict) of each record."""
    if path.suffix == ".parquet":
        pyarrow, parquet = _pyarrow()
        try:
            return list(enumerate(parquet.read_table(path).to_pylist(), 1))
        except pyarrow.ArrowInvalid as error:
            raise RecordError("The Parquet file is damaged", found=f"{path.name}: {error}") from error
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").split("\n")
        return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    raise _unknown_kind(path)


def _pyarrow() -> tuple[Any, Any]:
    return require("pyarrow", extra="all"), require("pyarrow.parquet", extra="all")


def _unknown_kind(path: Path) -> RecordError:
    return RecordError("Not a file of records", found=path.name, fix="Records are in .jsonl or .parquet files.")


def _number(name: str, value: Any) -> int | float:
    """A number as Python's own, also out of NumPy or text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
            return number if isinstance(value, str) else value
        except (ValueError, OverflowError):
            pass
    raise RecordError(f"{name} is not a number", found=value, fix='parse_size reads "3B".')
