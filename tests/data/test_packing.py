"""`doc EOS doc EOS …` in blocks: nothing lost, nothing added, whatever the documents are."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hf_capgap.data import pack
from hf_capgap.data.packing import cut_blocks, tokenize_documents
from hf_capgap.errors import DataError

EOS = 0
token_ids = st.lists(st.integers(1, 2**31 - 1), max_size=50)
token_documents = st.lists(token_ids, max_size=20)
text_documents = st.lists(st.text(max_size=40), min_size=1, max_size=8)


def join(documents: list[list[int]], eos: int) -> list[int]:
    return [token for document in documents for token in [*document, eos]]


def full_blocks(stream: list[int], block_size: int) -> list[list[int]]:
    return [stream[start : start + block_size] for start in range(0, len(stream) - block_size + 1, block_size)]


def rows(dataset: Dataset | IterableDataset) -> list[list[int]]:
    return [list(row["input_ids"]) for row in dataset]


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@given(documents=token_documents, block_size=st.integers(2, 64))
@example(documents=[list(range(1, 1001))], block_size=7)  # one document of many blocks
@example(documents=[[], [], [], []], block_size=2)  # empty documents alone
@example(documents=[[1, 2, 3]], block_size=4)  # the last block is just full
@settings(deadline=None)
def test_blocks_are_the_documents_with_eos_cut_at_multiples(documents: list[list[int]], block_size: int) -> None:
    blocks = [block.tolist() for block in cut_blocks(iter(documents), block_size, EOS)]
    assert blocks == full_blocks(join(documents, EOS), block_size)


@given(documents=token_documents, block_size=st.integers(2, 16))
@settings(deadline=None)
def test_blocks_stay_as_they_were_when_later_ones_are_cut(documents: list[list[int]], block_size: int) -> None:
    blocks, copies = [], []
    for block in cut_blocks(documents, block_size, EOS):
        blocks.append(block)
        copies.append(block.copy())
    np.testing.assert_equal(blocks, copies)


def test_blocks_are_cut_as_soon_as_they_are_full() -> None:
    read = []

    def documents() -> Iterator[list[int]]:
        for number in itertools.count(1):
            read.append(number)
            yield [number] * 3

    blocks = list(itertools.islice(cut_blocks(documents(), 4, EOS), 5))
    assert [block.tolist() for block in blocks] == [[number] * 3 + [EOS] for number in range(1, 6)]
    assert read == [1, 2, 3, 4, 5]


@given(texts=text_documents, block_size=st.integers(2, 12))
@example(texts=["a" * 500, "", "b"], block_size=2)
@example(texts=[""] * 200, block_size=3)  # more documents than the tokenizer gets at once
@settings(deadline=None, max_examples=12)
def test_pack_loses_nothing_and_streaming_gives_the_same(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], block_size: int
) -> None:
    stream = join([tokenizer.encode(text, add_special_tokens=False) for text in texts], tokenizer.eos_token_id)
    expected = full_blocks(stream, block_size)
    corpus = Dataset.from_dict({"text": texts})
    if not expected:
        for documents in (corpus, corpus.to_iterable_dataset()):
            with pytest.raises(DataError, match="does not fill one block"):
                list(pack(documents, tokenizer, block_size))
        return
    assert rows(pack(corpus, tokenizer, block_size)) == expected
    assert rows(pack(corpus.to_iterable_dataset(), tokenizer, block_size)) == expected


def test_decoded_blocks_are_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["Grüße, 世界\r\n", "second\u2028document"]
    blocks = pack(Dataset.from_dict({"text": texts}), tokenizer, 3)
    decoded = tokenizer.decode(list(itertools.chain(*rows(blocks))))
    assert "</s>".join([*texts, ""]).startswith(decoded)
    assert len(decoded) >= len("</s>".join([*texts, ""])) - len("</s>") - 2


@pytest.mark.parametrize("streaming", [False, True], ids=["in_memory", "streaming"])
def test_blocks_are_int32_rows_of_one_length(tokenizer: PreTrainedTokenizerFast, streaming: bool) -> None:
    corpus = Dataset.from_dict({"text": ["some text, some more"] * 3, "other": [1, 2, 3]})
    blocks = pack(corpus.to_iterable_dataset() if streaming else corpus, tokenizer, 8)
    assert isinstance(blocks, IterableDataset if streaming else Dataset)
    assert list(blocks.features) == ["input_ids"]
    assert blocks.features["input_ids"].feature == Value("int32")
    assert blocks.features["input_ids"].length == 8
    for table in blocks.with_format("arrow").iter(batch_size=4):
        assert table.schema.field("input_ids").type.value_type == pa.int32()
    assert {len(row) for row in rows(blocks)} == {8}


def test_a_packed_dataset_lies_on_disk_and_not_in_memory(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack(Dataset.from_dict({"text": ["on disk"]}), tokenizer, 4)
    assert blocks.cache_files


def test_no_special_token_is_added_by_a_tokenizer_that_does_so(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    plain, adding = make_tokenizer(), make_tokenizer()
    eos = ("</s>", adding.eos_token_id)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[eos]
    )
    assert adding("ab")["input_ids"] == [eos[1], *plain("ab")["input_ids"], eos[1]]  # it does
    assert list(tokenize_documents(["ab", "c"], adding)) == plain(["ab", "c"])["input_ids"]
    corpus = Dataset.from_dict({"text": ["ab", "cd"]})
    assert rows(pack(corpus, adding, 3)) == rows(pack(corpus, plain, 3))


def test_a_document_longer_than_the_model_is_not_cut_short_nor_warned_about(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16
    [ids] = tokenize_documents(["x" * 1000], tokenizer)
    assert len(ids) == 1000
    assert not caplog.messages
    tokenizer("x" * 1000)
    assert "longer than the specified maximum" in caplog.text  # it would have been heard


def test_another_text_column_can_be_packed(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack(Dataset.from_dict({"text": ["no"], "body": ["yes"]}), tokenizer, 4, text_column="body")
    assert rows(blocks) == [[*tokenizer.encode("yes"), tokenizer.eos_token_id]]


def test_another_tokenizer_or_block_size_gives_other_blocks(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    """The packed dataset is cached on disk; the cache must tell them apart."""
    corpus = Dataset.from_dict({"text": ["the same text", "twice"]})
    tokenizer = make_tokenizer()
    first = rows(pack(corpus, tokenizer, 7))
    assert rows(pack(corpus, tokenizer, 5)) != first
    assert rows(pack(corpus, make_tokenizer(), 7)) == first
    tokenizer.eos_token = "<pad>"
    assert rows(pack(corpus, tokenizer, 7)) == [
        [tokenizer.eos_token_id if token == EOS else token for token in row] for row in first
    ]
    assert EOS in itertools.chain(*first)


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token.*Set eos_token"):
        pack(Dataset.from_dict({"text": ["text"]}), tokenizer, 4)


@pytest.mark.parametrize("block_size", [1, 0, -4])
def test_a_block_that_predicts_nothing_is_refused(tokenizer: PreTrainedTokenizerFast, block_size: int) -> None:
    with pytest.raises(DataError, match=rf"at least 2 tokens.*\(found: {block_size}\)"):
        pack(Dataset.from_dict({"text": ["text"]}), tokenizer, block_size)


@pytest.mark.parametrize("streaming", [False, True], ids=["in_memory", "streaming"])
@pytest.mark.parametrize("texts", [[""], ["too short"]], ids=["empty", "short"])
def test_a_corpus_too_small_for_one_block_is_refused(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], streaming: bool
) -> None:
    corpus = Dataset.from_dict({"text": texts})
    with pytest.raises(DataError, match="does not fill one block of 11 tokens.*Use more text"):
        list(pack(corpus.to_iterable_dataset() if streaming else corpus, tokenizer, 11))


def test_a_corpus_without_documents_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for empty in (Dataset.from_dict({"text": []}), IterableDataset.from_generator(lambda: iter(()))):
        with pytest.raises(DataError, match="does not fill one block"):
            list(pack(empty, tokenizer, 2))


@pytest.mark.parametrize("streaming", [False, True], ids=["in_memory", "streaming"])
def test_a_document_that_is_not_text_is_named(tokenizer: PreTrainedTokenizerFast, streaming: bool) -> None:
    corpus = Dataset.from_dict({"text": ["fine", None]})
    with pytest.raises(DataError, match=r"Document 1 of the corpus is not text \(found: NoneType\)"):
        list(pack(corpus.to_iterable_dataset() if streaming else corpus, tokenizer, 4))


def test_packing_a_stream_reads_no_more_than_it_needs(tokenizer: PreTrainedTokenizerFast) -> None:
    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield {"text": "and so on"}

    blocks = pack(IterableDataset.from_generator(endless), tokenizer, 10)
    assert len(list(itertools.islice(blocks, 3))) == 3


@pytest.mark.parametrize(
    "documents", [[range(3_000_000)], [range(30)] * 100_000], ids=["one_long_document", "many_short_documents"]
)
def test_packing_time_grows_with_the_tokens_and_not_faster(documents: list[range]) -> None:
    start = time.perf_counter()
    num_blocks = sum(1 for _ in cut_blocks(documents, 256, EOS))
    assert num_blocks == (sum(map(len, documents)) + len(documents)) // 256
    assert time.perf_counter() - start < 10  # under a second alone; quadratic would be minutes
