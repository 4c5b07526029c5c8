"""Held-out blocks are held out, and calibration batches are shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import IterableDataset

from hf_capgap.data import batched, calibration_batches, load_corpus, load_train_and_held_out, pack
from hf_capgap.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)), encoding="utf-8")
    return str(path)


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def blocks(corpus: str, tokenizer):
    return pack(load_corpus(corpus), tokenizer, 16)


def rows_of(blocks) -> list[list[int]]:
    return [list(row["input_ids"]) for row in blocks]


# --- held out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_blocks_are_held_out(corpus: str, tokenizer, blocks, streaming: bool) -> None:
    train, held_out = load_train_and_held_out(corpus, tokenizer, 16, num_held_out=5, streaming=streaming)
    assert isinstance(train, IterableDataset) is streaming
    everything = rows_of(blocks)
    assert rows_of(held_out) == everything[:5]
    assert rows_of(train) == everything[5:]


def test_another_corpus_is_held_out_whole(corpus: str, tokenizer, blocks, tmp_path) -> None:
    (tmp_path / "other.txt").write_text("What nobody has seen. " * 20)
    train, held_out = load_train_and_held_out(
        corpus, tokenizer, 16, num_held_out=3, held_out_source=str(tmp_path / "other.txt")
    )
    assert rows_of(train) == rows_of(blocks)
    assert len(held_out) == 3
    assert tokenizer.decode(held_out[0]["input_ids"]).startswith("What nobody")


def test_the_builtin_corpus_holds_out_whole_files(make_tokenizer, monkeypatch, tmp_path) -> None:
    """Blocks of held-out files from all over, and not of the files trained on; on a library of a few files."""
    library = tmp_path / "lib"
    library.mkdir()
    for n in range(80):
        (library / f"module{n}.py").write_text(f"# {n:>3} " + "x" * 57)  # 64 tokens with EOS
    monkeypatch.setattr("hf_capgap.data.corpus.sysconfig.get_path", lambda name: str(library))
    train, held_out = load_train_and_held_out(None, make_tokenizer(), 64, num_held_out=100)
    tokenizer = make_tokenizer()
    numbers = [
        {int(tokenizer.decode(row)[2:5]) for row in rows_of(part) if tokenizer.decode(row)[0] == "#"}
        for part in (train, held_out)
    ]
    assert numbers[0] | numbers[1] == set(range(80))
    assert not numbers[0] & numbers[1]
    assert 0 < len(numbers[1]) < 20


def test_a_corpus_that_would_be_held_out_whole_is_refused(corpus: str, tokenizer, blocks) -> None:
    with pytest.raises(DataError, match=rf"nothing to train on \(found: {len(blocks)} of {len(blocks)} blocks\)"):
        load_train_and_held_out(corpus, tokenizer, 16, num_held_out=len(blocks))


# --- calibration ---------------------------------------------------------------------------------------------------


def test_batches_are_the_first_of_a_shuffled_order(blocks) -> None:
    batches = calibration_batches(blocks, num_batches=3, batch_size=4, seed=7)
    expected = torch.tensor(rows_of(blocks.shuffle(seed=7)))[:12].split(4)
    assert len(batches) == 3
    for batch, rows in zip(batches, expected, strict=True):
        assert torch.equal(batch["input_ids"], rows)
        assert torch.equal(batch["labels"], rows)
        assert batch.keys() == {"input_ids", "labels"}
    again, other = (calibration_batches(blocks, num_batches=3, batch_size=4, seed=seed) for seed in (7, 8))
    assert torch.equal(again[0]["input_ids"], batches[0]["input_ids"])
    assert not torch.equal(other[0]["input_ids"], batches[0]["input_ids"])


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_share_the_batches_out(blocks, num_ranks: int) -> None:
    options = {"num_batches": 5, "batch_size": 2, "seed": 0}
    everything = [batch["input_ids"].tolist() for batch in calibration_batches(blocks, **options)]
    shares = [calibration_batches(blocks, **options, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    shared = [batch["input_ids"].tolist() for share in shares for batch in share]
    assert sorted(shared) == sorted(everything)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_small_corpus_gives_what_it_has(blocks) -> None:
    batches = calibration_batches(blocks, num_batches=1000, batch_size=10, seed=0)
    sizes = [len(batch["input_ids"]) for batch in batches]
    assert sum(sizes) == len(blocks)
    assert set(sizes[:-1]) == {10}
    assert sizes[-1] == (len(blocks) % 10 or 10)


@pytest.mark.parametrize(("num_batches", "batch_size"), [(0, 1), (1, 0), (-1, 4)])
def test_no_batches_are_refused(blocks, num_batches: int, batch_size: int) -> None:
    with pytest.raises(DataError, match="at least one batch of one block"):
        calibration_batches(blocks, num_batches=num_batches, batch_size=batch_size, seed=0)


def test_batched_keeps_the_order() -> None:
    rows = [{"input_ids": [n, n + 1]} for n in range(5)]
    assert [batch["input_ids"].tolist() for batch in batched(rows, 2)] == [
        [[0, 1], [1, 2]],
        [[2, 3], [3, 4]],
        [[4, 5]],
    ]
