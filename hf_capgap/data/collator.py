"""From rows to batches: labels that follow the inputs, and no attention mask unless rows differ in length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE_INDEX = -100


@dataclass
class BlockCollator:
    """Stack rows of `input_ids` (and optional `labels`) into a batch.

    Labels default to the inputs; the model shifts them. Rows of equal length (packed blocks) get no attention mask,
    which keeps the fast causal attention paths; shorter rows are padded on the right, masked, and ignored in the
    labels.

    Args:
        pad_token_id: Fills shorter rows. Any id does, since padding is masked and ignored.
    """

    pad_token_id: int = 0

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `labels`, [batch, length] int64, and `attention_mask` if any row was padded."""
        inputs = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.long) for row in rows]
        batch = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=self.pad_token_id),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        lengths = torch.tensor([len(row) for row in inputs])
        longest = int(lengths.max())
        if int(lengths.min()) < longest:
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch
