"""From rows to batches: labels that follow the inputs, and no attention mask unless rows differ in length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DataError
from ..labels import IGNORE_INDEX


@dataclass
class BlockCollator:
    """Stack rows of `input_ids` (and optional `labels`, `attention_mask`, `position_ids`) into a batch.

    Labels default to the inputs that the row's attention mask does not hide; the model shifts them. Rows of equal
    length (packed blocks) get no attention mask, which keeps the fast causal attention paths; shorter rows are padded
    on the right, masked, and ignored in the labels.

    Args:
        pad_token_id: Fills shorter rows. Any id does, since padding is masked and ignored.
    """

    pad_token_id: int = 0

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `labels`, [batch, length] int64; `position_ids` if the rows have them, and
        `attention_mask` if anything is hidden.

        Raises:
            DataError: An empty row, or a column whose length is not that of the row's `input_ids`.
        """
        inputs = [_as_ids(row["input_ids"]) for row in rows]
        masks = [
            _as_ids(row.get("attention_mask", torch.ones_like(ids))) for row, ids in zip(rows, inputs, strict=True)
        ]
        labels = [
            _as_ids(row["labels"]) if row.get("labels") is not None else ids.masked_fill(mask == 0, IGNORE_INDEX)
            for row, ids, mask in zip(rows, inputs, masks, strict=True)
        ]
        columns = {
            "input_ids": (inputs, self.pad_token_id),
            "labels": (labels, IGNORE_INDEX),
            "attention_mask": (masks, 0),
        }
        if all("position_ids" in row for row in rows):
            columns["position_ids"] = ([_as_ids(row["position_ids"]) for row in rows], 0)
        for name, (values, _) in columns.items():
            for ids, value in zip(inputs, values, strict=True):
                if len(ids) == 0 or len(ids) != len(value):
                    raise DataError(
                        f"A row has {len(ids)} input_ids and {len(value)} {name}", fix="Check the dataset."
                    )
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
            for name, (values, padding) in columns.items()
        }
        if batch["attention_mask"].all():
            del batch["attention_mask"]
        return batch


def _as_ids(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.long)
