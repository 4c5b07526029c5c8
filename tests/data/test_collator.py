"""Rows to batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_capgap.data import BlockCollator
from hf_capgap.errors import DataError

ROW_TYPES = {
    "list": list,
    "numpy_int32": lambda ids: np.asarray(ids, dtype=np.int32),
    "numpy_int64": lambda ids: np.asarray(ids, dtype=np.int64),
    "tensor": torch.tensor,
}
as_each_type = pytest.mark.parametrize("convert", ROW_TYPES.values(), ids=ROW_TYPES.keys())


@as_each_type
def test_equal_rows_are_stacked_without_a_mask(convert: Callable) -> None:
    batch = BlockCollator()([{"input_ids": convert([1, 2, 3])}, {"input_ids": convert([4, 5, 6])}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


@as_each_type
def test_shorter_rows_are_padded_masked_and_ignored(convert: Callable) -> None:
    rows = [{"input_ids": convert([1])}, {"input_ids": convert([2, 3, 4])}, {"input_ids": convert([5, 6])}]
    batch = BlockCollator(pad_token_id=9)(rows)
    assert batch["input_ids"].tolist() == [[1, 9, 9], [2, 3, 4], [5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, -100, -100], [2, 3, 4], [5, 6, -100]]


def test_a_pad_token_inside_a_row_is_no_padding() -> None:
    batch = BlockCollator(pad_token_id=9)([{"input_ids": [9, 1, 9]}, {"input_ids": [2]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[9, 1, 9], [2, -100, -100]]


@as_each_type
def test_given_labels_are_kept(convert: Callable) -> None:
    rows = [
        {"input_ids": convert([1, 2, 3]), "labels": convert([-100, 2, 3])},
        {"input_ids": convert([4, 5]), "labels": convert([-100, 5])},
    ]
    batch = BlockCollator()(rows)
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_the_rows_stay_as_they_were() -> None:
    row = np.array([1, 2, 3], dtype=np.int64)  # same type as the batch: a view would be shared
    batch = BlockCollator()([{"input_ids": row}])
    batch["labels"][0, 0] = -100
    assert row.tolist() == [1, 2, 3]
    assert batch["input_ids"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("format_type", [None, "numpy", "torch"])
def test_rows_of_a_dataset_collate_in_every_format(format_type: str | None) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]}).with_format(format_type)
    assert BlockCollator()(list(rows))["input_ids"].tolist() == [[1, 2], [3, 4]]


def test_padding_changes_no_loss(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama").eval()
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]
    padded = model(**BlockCollator(pad_token_id=3)(rows)).loss
    alone = [model(**BlockCollator()([row])).loss for row in rows]
    torch.testing.assert_close(padded, (3 * alone[0] + alone[1]) / 4)  # 3 and 1 predicted tokens


def test_mask_and_positions_of_the_rows_are_kept():
    rows = [
        {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 0, 0], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 1], "position_ids": [0, 1, 2, 3]},
    ]
    batch = BlockCollator()(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 6, -100, -100], [5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("row", [{"input_ids": []}, {"input_ids": [1, 2], "labels": [1]}])
def test_rows_that_cannot_be_trained_on_are_refused(row):
    with pytest.raises(DataError):
        BlockCollator()([row])
