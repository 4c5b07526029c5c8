"""Text corpora from the Hub, from local files, or from the Python standard library on this machine."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

from ..errors import DataError

BUILTIN = "stdlib"
TEXT_COLUMN = "text"

_LOADERS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_COMPRESSION = {".xz", ".gz"}
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT_ONE_IN = 20


def load_corpus(
    source: str | None = None,
    *,
    split: str = "train",
    text_column: str = TEXT_COLUMN,
    document: str = "file",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load a corpus of documents as a dataset with the one column `text`.

    Args:
        source: A local file, folder or glob (`.txt`, `.jsonl`, `.json`, `.parquet`, each also as `.xz` or `.gz`), a
            Hub dataset id (`"org/name"`, or `"org/name:config"`), or None for the built-in corpus: the source of the
            Python standard library of the running interpreter, without its tests.
        split: Split of a Hub dataset. The built-in corpus has `"train"` and `"held_out"` (one file in 20, chosen by a
            hash of its path, so that a file is on the same side on every machine). Local files have `"train"` only.
        text_column: Where the text is, in jsonl, parquet and Hub datasets.
        document: What one document is in a text file: the `"file"`, a `"paragraph"` (between blank lines), or a
            `"line"`.
        streaming: Read on demand and return an `IterableDataset`.

    Raises:
        DataError: Nothing matches, mixed or unknown file kinds, a missing column or split, or no document at all.
    """
    if source is None or source == BUILTIN:
        corpus = _load_stdlib(split)
        return corpus.to_iterable_dataset() if streaming else corpus
    files = _match_files(source)
    if files:
        if split != "train":
            raise DataError(
                "Local files have one split, 'train'", found=split, fix="Name other files for held-out text."
            )
        corpus = _load_files(files, document=document, streaming=streaming)
    else:
        corpus = _load_from_hub(source, split=split, streaming=streaming)
    return _text_only(corpus, text_column, source)


def _load_stdlib(split: str) -> Dataset:
    if split not in ("train", "held_out"):
        raise DataError("The built-in corpus has the splits 'train' and 'held_out'", found=split)
    texts = [text for path, text in _stdlib_files() if _is_held_out(path) == (split == "held_out")]
    if not texts:
        raise DataError(
            "This Python has no standard-library source to read",
            found=sysconfig.get_path("stdlib"),
            fix="Name a corpus: a file, a glob or a Hub dataset id.",
        )
    return Dataset.from_dict({TEXT_COLUMN: texts})


def _stdlib_files() -> Iterator[tuple[str, str]]:
    """(relative path, text) of every source file of the standard library, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_SKIPPED & set(relative.parts):
            continue
        try:
            with tokenize.open(path) as file:  # honours the file's coding cookie
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield relative.as_posix(), text


def _is_held_out(path: str) -> bool:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") % _HELD_OUT_ONE_IN == 0


def _match_files(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        return sorted(str(file) for file in path.rglob("*") if file.is_file() and _kind(file.name) is not None)
    if path.is_file():
        return [source]
    return sorted(name for name in glob.glob(source, recursive=True) if Path(name).is_file())


def _kind(name: str) -> str | None:
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in _COMPRESSION]
    return _LOADERS.get(suffixes[-1]) if suffixes else None


def _load_files(files: list[str], *, document: str, streaming: bool) -> Dataset | IterableDataset:
    kinds = {_kind(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise DataError(
            "The files of a corpus must be of one known kind",
            found=sorted({"".join(Path(file).suffixes) for file in files}),
            fix=f"Supported: {', '.join(sorted(_LOADERS))}, each also with .xz or .gz.",
        )
    kind = kinds.pop()
    options = {}
    if kind == "text":
        units = {"file": "document", "paragraph": "paragraph", "line": "line"}
        if document not in units:
            raise DataError("A document of a text file is one of: file, paragraph, line", found=document)
        options["sample_by"] = units[document]
    return load_dataset(kind, data_files=files, split="train", streaming=streaming, **options)


def _load_from_hub(source: str, *, split: str, streaming: bool) -> Dataset | IterableDataset:
    if any(mark in source for mark in "*?[") or source.startswith(("/", "./", "../", "~")):
        raise DataError("No file matches the corpus", found=source, fix="Check the path or the glob.")
    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise DataError(
            f"The corpus is neither a local file nor a Hub dataset that loads: {type(error).__name__}: {error}",
            found=source,
            fix="Check the path, the id, the split and the network.",
        ) from error


def _text_only(corpus: Dataset | IterableDataset, text_column: str, source: str) -> Dataset | IterableDataset:
    columns = corpus.column_names
    if columns is None:  # a stream does not know its columns before its first row
        first = next(iter(corpus), None)
        columns = list(first) if first else []
    if not columns or (isinstance(corpus, Dataset) and len(corpus) == 0):
        raise DataError("The corpus has no documents", found=source)
    if text_column not in columns:
        raise DataError(
            f"The corpus has no column '{text_column}'", found=columns, fix="Name the column that holds the text."
        )
    corpus = corpus.select_columns([text_column])
    return corpus if text_column == TEXT_COLUMN else corpus.rename_column(text_column, TEXT_COLUMN)
