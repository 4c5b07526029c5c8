"""What `load_corpus` reads, and what it refuses."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sysconfig
import tokenize
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset

from hf_capgap.data import load_corpus
from hf_capgap.errors import DataError

DOCUMENTS = ["first\n\ndocument", "zweites Dokument: äöü, 日本語", "", "last\twithout newline"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}

both_modes = pytest.mark.parametrize("streaming", [False, True], ids=["in_memory", "streaming"])


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_documents(path: Path, documents: list[str], column: str = "text") -> str:
    """Write `documents` in the format, and the compression, that the name of `path` says."""
    name = path.name.removesuffix(".gz").removesuffix(".xz")
    rows = [{"id": i, column: document} for i, document in enumerate(documents)]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    content = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".json": json.dumps(rows),
        ".txt": "".join(documents),
    }[Path(name).suffix]
    compression = path.suffix if path.suffix in COMPRESS else ""
    return write(path, COMPRESS[compression](content.encode()))


def texts(source: str | None, **options: object) -> list[str]:
    corpus = load_corpus(source, **options)
    assert isinstance(corpus, IterableDataset if options.get("streaming") else Dataset)
    rows = list(corpus)
    assert all(list(row) == ["text"] for row in rows)
    return [row["text"] for row in rows]


# The built-in corpus.


@pytest.fixture(scope="module")
def stdlib() -> dict[str, list[str]]:
    return {split: texts(None, split=split) for split in ("train", "held_out")}


def read_stdlib(name: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")


def test_builtin_corpus_is_split_without_overlap(stdlib: dict[str, list[str]]) -> None:
    assert len(stdlib["train"]) > 300
    assert 0.01 < len(stdlib["held_out"]) / len(stdlib["train"]) < 0.12
    assert not set(stdlib["train"]) & set(stdlib["held_out"])


def test_builtin_corpus_holds_every_module_outside_the_tests_once(stdlib: dict[str, list[str]]) -> None:
    both = sorted(stdlib["train"] + stdlib["held_out"])
    root = Path(sysconfig.get_path("stdlib"))
    expected = []
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders.remove("site-packages")
        folders[:] = [name for name in folders if name not in ("test", "tests", "idle_test", "dist-packages")]
        for name in files:
            if name.endswith(".py"):
                with tokenize.open(Path(folder) / name) as file:
                    text = file.read()
                expected += [text] if text.strip() else []
    assert both == sorted(expected)


def test_builtin_corpus_holds_no_tests(stdlib: dict[str, list[str]]) -> None:
    both = stdlib["train"] + stdlib["held_out"]
    assert not [text for text in both if "from test.support import" in text and "unittest.main()" in text]


def test_files_keep_their_side_on_every_machine(stdlib: dict[str, list[str]]) -> None:
    assert read_stdlib("ast.py") in stdlib["train"]
    assert read_stdlib("fnmatch.py") in stdlib["held_out"]


def test_builtin_corpus_is_the_same_each_time(stdlib: dict[str, list[str]]) -> None:
    assert texts("stdlib", split="held_out") == stdlib["held_out"]
    assert texts(None, split="held_out", streaming=True) == stdlib["held_out"]


@both_modes
def test_builtin_corpus_has_no_other_split(streaming: bool) -> None:
    with pytest.raises(DataError, match=r"'train' and 'held_out' \(found: validation\)"):
        load_corpus(None, split="validation", streaming=streaming)


# Local files.


@both_modes
@pytest.mark.parametrize("compression", ["", ".gz", ".xz"], ids=["plain", "gz", "xz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_documents_are_read_as_written(tmp_path: Path, suffix: str, compression: str, streaming: bool) -> None:
    source = write_documents(tmp_path / f"corpus{suffix}{compression}", DOCUMENTS)
    assert texts(source, streaming=streaming) == DOCUMENTS


@both_modes
@pytest.mark.parametrize("compression", ["", ".gz", ".xz"], ids=["plain", "gz", "xz"])
def test_a_text_file_is_one_document(tmp_path: Path, compression: str, streaming: bool) -> None:
    source = write_documents(tmp_path / f"corpus.txt{compression}", DOCUMENTS)
    assert texts(source, streaming=streaming) == ["".join(DOCUMENTS)]


@both_modes
def test_parquet_documents_are_read_as_written(tmp_path: Path, streaming: bool) -> None:
    assert texts(write_documents(tmp_path / "corpus.parquet", DOCUMENTS), streaming=streaming) == DOCUMENTS


@both_modes
def test_compressed_parquet_is_refused(tmp_path: Path, streaming: bool) -> None:
    content = Path(write_documents(tmp_path / "corpus.parquet", DOCUMENTS)).read_bytes()
    source = write(tmp_path / "corpus.parquet.xz", lzma.compress(content))
    with pytest.raises(DataError, match="Compressed parquet files cannot be read"):
        load_corpus(source, streaming=streaming)


@both_modes
def test_a_folder_is_read_whole_in_path_order(tmp_path: Path, streaming: bool) -> None:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "deep" / "x.txt.xz", lzma.compress(b"first"))
    write(tmp_path / "c.txt.gz", gzip.compress(b"third"))
    write(tmp_path / "table.csv", "not,text")
    assert texts(str(tmp_path), streaming=streaming) == ["first", "second", "third"]


@both_modes
def test_a_glob_takes_the_files_that_match(tmp_path: Path, streaming: bool) -> None:
    for name in ("part-1.jsonl", "part-2.jsonl", "other.jsonl"):
        write_documents(tmp_path / name, [name])
    assert texts(str(tmp_path / "part-*.jsonl"), streaming=streaming) == ["part-1.jsonl", "part-2.jsonl"]


@both_modes
def test_a_recursive_glob_goes_into_folders(tmp_path: Path, streaming: bool) -> None:
    write(tmp_path / "a.txt", "outer")
    write(tmp_path / "deep" / "er" / "b.txt", "inner")
    assert texts(str(tmp_path / "**" / "*.txt"), streaming=streaming) == ["outer", "inner"]


@both_modes
@pytest.mark.parametrize("name", ["notes [draft].txt", "what?.txt", "50%.v1.txt", "two words.txt"])
def test_a_file_name_is_no_pattern(tmp_path: Path, name: str, streaming: bool) -> None:
    source = write(tmp_path / name, "found")
    write(tmp_path / "notes d.txt", "what the pattern would match")
    assert texts(source, streaming=streaming) == ["found"]


@both_modes
def test_a_changed_file_is_read_again(tmp_path: Path, streaming: bool) -> None:
    source = write(tmp_path / "corpus.txt.xz", lzma.compress(b"old"))
    assert texts(source, streaming=streaming) == ["old"]
    write(tmp_path / "corpus.txt.xz", lzma.compress(b"new, and longer"))
    assert texts(source, streaming=streaming) == ["new, and longer"]


# What a document is.

PROSE = "one\ntwo\n\nthree \u2028 four \x85 five \x0c six \x1c seven\n\n\neight, no final newline"


@both_modes
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_a_file_loses_nothing_and_line_ends_become_newlines(tmp_path: Path, newline: str, streaming: bool) -> None:
    source = write(tmp_path / "prose.txt", PROSE.replace("\n", newline))
    assert texts(source, streaming=streaming) == [PROSE]
    assert texts(write(tmp_path / "ended.txt", PROSE + newline), streaming=streaming) == [PROSE + "\n"]


@both_modes
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_lines_end_at_newlines_alone(tmp_path: Path, newline: str, streaming: bool) -> None:
    source = write(tmp_path / "prose.txt", PROSE.replace("\n", newline))
    assert texts(source, document="line", streaming=streaming) == PROSE.split("\n")


@both_modes
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_paragraphs_end_at_blank_lines_and_lose_no_word(tmp_path: Path, newline: str, streaming: bool) -> None:
    source = write(tmp_path / "prose.txt", PROSE.replace("\n", newline))
    paragraphs = texts(source, document="paragraph", streaming=streaming)
    assert [paragraph.strip("\n") for paragraph in paragraphs] == [part.strip("\n") for part in PROSE.split("\n\n")]


@both_modes
@pytest.mark.parametrize(("document", "separator"), [("line", "\n"), ("paragraph", "\n\n")])
def test_files_longer_than_a_read_lose_nothing(tmp_path: Path, document: str, separator: str, streaming: bool) -> None:
    documents = [f"{i} " + "x" * 99_990 for i in range(230)]  # read 10 MiB at a time
    source = write(tmp_path / "long.txt", separator.join(documents))
    assert texts(source, document=document, streaming=streaming) == documents


@both_modes
def test_json_text_keeps_its_line_ends_and_separators(tmp_path: Path, streaming: bool) -> None:
    documents = [PROSE, PROSE.replace("\n", "\r\n"), "\ufeffmark\x00null"]
    rows = "\r\n".join(json.dumps({"text": document}, ensure_ascii=False) for document in documents)
    assert texts(write(tmp_path / "corpus.jsonl", rows), streaming=streaming) == documents


@both_modes
def test_an_unknown_kind_of_document_is_refused(tmp_path: Path, streaming: bool) -> None:
    with pytest.raises(DataError, match=r"one of: file, paragraph, line \(found: sentence\)"):
        load_corpus(write(tmp_path / "a.txt", "text"), document="sentence", streaming=streaming)


# Columns.


@both_modes
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_another_text_column_is_renamed(tmp_path: Path, suffix: str, streaming: bool) -> None:
    source = write_documents(tmp_path / f"corpus{suffix}", DOCUMENTS, column="body")
    assert texts(source, text_column="body", streaming=streaming) == DOCUMENTS


@both_modes
def test_the_named_column_wins_over_one_called_text(tmp_path: Path, streaming: bool) -> None:
    source = write(tmp_path / "corpus.jsonl", '{"text": "summary", "body": "all of it"}\n')
    assert texts(source, text_column="body", streaming=streaming) == ["all of it"]


@both_modes
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_missing_column_is_refused_with_those_there_are(tmp_path: Path, suffix: str, streaming: bool) -> None:
    source = write_documents(tmp_path / f"corpus{suffix}", DOCUMENTS, column="body")
    with pytest.raises(DataError, match=r"no column 'text' \(found: \['id', 'body'\]\)"):
        load_corpus(source, streaming=streaming)


@both_modes
def test_a_column_that_is_not_text_is_refused(tmp_path: Path, streaming: bool) -> None:
    source = write_documents(tmp_path / "corpus.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"'id' does not hold text \(found: int\)"):
        load_corpus(source, text_column="id", streaming=streaming)


# What is refused.


@both_modes
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.xz", "a.jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, streaming: bool) -> None:
    compress = COMPRESS.get(Path(name).suffix, bytes)
    with pytest.raises(DataError, match="no documents"):
        load_corpus(write(tmp_path / name, compress(b"")), streaming=streaming)


@both_modes
@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_a_file_of_no_rows_is_refused(tmp_path: Path, name: str, streaming: bool) -> None:
    if name == "a.json":
        source = write(tmp_path / name, "[]")
    else:
        source = str(tmp_path / name)
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), source)
    with pytest.raises(DataError, match="no documents|files are empty"):
        load_corpus(source, streaming=streaming)


@both_modes
@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
def test_a_blank_corpus_is_refused(tmp_path: Path, document: str, streaming: bool) -> None:
    with pytest.raises(DataError, match="no documents"):
        load_corpus(write(tmp_path / "a.txt", "\n\n \n\n"), document=document, streaming=streaming)


@both_modes
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": oops}\n', "JSON"),
        ("a.parquet", b"not parquet", "Parquet"),
        ("a.txt", b"caf\xe9", "utf-8"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes, reason: str, streaming: bool
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        load_corpus(write(tmp_path / name, content), streaming=streaming)
    assert name in str(caught.value)


def test_files_of_mixed_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    write_documents(tmp_path / "b.jsonl.gz", ["json"])
    with pytest.raises(DataError, match=r"one known kind \(found: \['\.jsonl\.gz', '\.txt'\]\)\. Supported: .*"):
        load_corpus(str(tmp_path))


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one known kind \(found: \['\.csv'\]\)"):
        load_corpus(write(tmp_path / "a.csv", "text\nhello"))


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_without_a_corpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    write(tmp_path / "folder" / "a.csv", "text\nhello")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="holds no file of a known kind"):
        load_corpus("folder" if relative else str(tmp_path / "folder"))


@both_modes
@pytest.mark.parametrize("pattern", ["missing-*.txt", "missing.txt"])
def test_a_source_that_matches_nothing_is_refused(tmp_path: Path, pattern: str, streaming: bool) -> None:
    with pytest.raises(DataError, match=r"No file matches the corpus .*missing"):
        load_corpus(str(tmp_path / pattern), streaming=streaming)


def test_local_files_have_no_other_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one split, 'train' \(found: test\)"):
        load_corpus(write(tmp_path / "a.txt", "text"), split="test")


@both_modes
@pytest.mark.parametrize("source", ["some-org/some-corpus", "some-org/some-corpus:config", "missing.txt"])
def test_a_hub_id_without_network_is_one_clear_error(source: str, streaming: bool) -> None:
    with pytest.raises(DataError, match="neither a local file nor a Hub dataset") as caught:
        load_corpus(source, streaming=streaming)
    message = str(caught.value)
    assert f"(found: {source})" in message
    assert "offline" in message.lower()
    assert "\n" not in message
