"""Text corpora from the Hub, from local files, or from the Python standard library on this machine."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError

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
_SUPPORTED = f"Supported: {', '.join(sorted(_LOADERS))}, all but .parquet also with .xz or .gz."
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
        source: A local file, folder or glob (`.txt`, `.jsonl`, `.json`, each also as `.xz` or `.gz`, or `.parquet`,
            which is compressed inside), a Hub dataset id (`"org/name"`, or `"org/name:config"`), or None for the
            built-in corpus: the source of the Python standard library of the running interpreter, without its tests.
            Text files are UTF-8; all line ends are read as newlines.
        split: Split of a Hub dataset. The built-in corpus has `"train"` and `"held_out"` (one file in 20, chosen by a
            hash of its path, so that a file is on the same side on every machine). Local files have `"train"` only.
        text_column: Where the text is, in jsonl, parquet and Hub datasets.
        document: What one document is in a text file: the `"file"`, a `"paragraph"` (between blank lines), or a
            `"line"`.
        streaming: Read on demand and return an `IterableDataset`.

    Raises:
        DataError: Nothing matches, mixed or unknown file kinds, a file that cannot be read, a missing column or
            split, a column that is not text, or no document with any text.
    """
    if source is None or source == BUILTIN:
        corpus = _load_stdlib(split)
        return corpus.to_iterable_dataset() if streaming else corpus
    files = _match_files(source)
    if files and split != "train":
        raise DataError("Local files have one split, 'train'", found=split, fix="Name other files for held-out text.")
    try:
        if files:
            corpus = _load_files(files, document=document, streaming=streaming)
        else:
            corpus = _load_from_hub(source, split=split, streaming=streaming)
        return _text_only(corpus, text_column, source)
    except DataError:
        raise
    except StopIteration as error:  # the JSON loader on empty files
        raise DataError("The corpus has no documents", found=source) from error
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if files:
            cause, fix = "The files are empty or damaged", "Check the files."
        else:
            cause = "The corpus is neither a local file nor a Hub dataset that loads"
            fix = "Check the path, the id, the split and the network."
        raise DataError(f"{cause}: {type(reason).__name__}: {reason}", found=source, fix=fix) from error


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
        files = sorted(str(file) for file in path.rglob("*") if file.is_file() and _kind(file.name) is not None)
        if not files:
            raise DataError("The folder holds no file of a known kind", found=source, fix=_SUPPORTED)
        return files
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
            fix=_SUPPORTED,
        )
    kind = kinds.pop()
    compressed = [file for file in files if Path(file).suffix in _COMPRESSION]
    if kind == "parquet" and compressed:
        raise DataError("Compressed parquet files cannot be read", found=compressed[0], fix="Decompress them.")
    options = {}
    if kind == "text":
        units = {"file": "document", "paragraph": "paragraph", "line": "line"}
        if document not in units:
            raise DataError("A document of a text file is one of: file, paragraph, line", found=document)
        options["sample_by"] = units[document]
    exact = [glob.escape(file) for file in files]  # load_dataset takes names for patterns
    return load_dataset(kind, data_files=exact, split="train", streaming=streaming, **options)


def _load_from_hub(source: str, *, split: str, streaming: bool) -> Dataset | IterableDataset:
    if any(mark in source for mark in "*?[") or source.startswith(("/", "./", "../", "~")):
        raise DataError("No file matches the corpus", found=source, fix="Check the path or the glob.")
    name, _, config = source.partition(":")
    return load_dataset(name, config or None, split=split, streaming=streaming)


def _text_only(corpus: Dataset | IterableDataset, text_column: str, source: str) -> Dataset | IterableDataset:
    columns = corpus.column_names or list(next(iter(corpus), {}))  # a stream may not know them before its first row
    if columns and text_column not in columns:
        raise DataError(
            f"The corpus has no column '{text_column}'", found=columns, fix="Name the column that holds the text."
        )
    if columns:
        corpus = corpus.select_columns([text_column])
    if not columns or not _has_text(corpus, text_column):
        raise DataError("The corpus has no documents", found=source)
    return corpus if text_column == TEXT_COLUMN else corpus.rename_column(text_column, TEXT_COLUMN)


def _has_text(corpus: Iterable[dict], text_column: str) -> bool:
    """Whether any document is more than blank; stops at the first that is."""
    for row in corpus:
        text = row[text_column]
        if text is not None and not isinstance(text, str):
            raise DataError(f"The column '{text_column}' does not hold text", found=type(text).__name__)
        if text and not text.isspace():
            return True
    return False
