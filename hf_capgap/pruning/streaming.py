"""Streaming surgery: from a teacher's shards to a student's, a few megabytes at a time.

The safetensors format begins with the names, shapes and places of all tensors; what follows are their bytes. All that
is known before a single weight is read. So the header is written first, and the tensors follow in blocks of rows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import OutputFolderError
from .checkpoint import INDEX_FILE, Checkpoint, StoredTensor
from .slicing import TensorCut, take

_BLOCK_BYTES = 8 * 2**20  # of a teacher's tensor that are in memory at a time
_ALIGNMENT = 8


@dataclass(frozen=True)
class _Planned:
    """A tensor of the student before it exists."""

    name: str
    source: StoredTensor
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.source.itemsize


def write_student(checkpoint: Checkpoint, plan: TensorCut, folder: Path, max_shard_size: str | int) -> None:
    """Write the student's shards, and their index if there are several, into `folder`.

    Raises:
        OutputFolderError: Not enough room on the disk; nothing has been written.
    """
    planned = {
        tensor.name: tensor
        for source in checkpoint.tensors.values()
        for tensor in [_plan_tensor(source, plan)]
        if tensor is not None
    }
    total_bytes = sum(tensor.num_bytes for tensor in planned.values())
    free_bytes = shutil.disk_usage(folder).free
    if total_bytes > free_bytes:
        raise OutputFolderError(
            f"The student needs {total_bytes:,} bytes", found=f"{free_bytes:,} bytes free", fix="Make room."
        )
    split = split_state_dict_into_shards_factory(
        planned,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file_name, names in split.filename_to_tensors.items():
        _write_shard(folder / file_name, [planned[name] for name in names], plan)
    if split.is_sharded:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_tensor(source: StoredTensor, plan: TensorCut) -> _Planned | None:
    name = plan.student_name(source.parameter)
    if name is None:
        return None
    for theirs, ours in plan.family.written_names:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    return _Planned(name, source, plan.shape_of(source.parameter))


def _write_shard(path: Path, tensors: Sequence[_Planned], plan: TensorCut) -> None:
    # Wide entries first keep every tensor aligned to its dtype, as the safetensors library does.
    tensors = sorted(tensors, key=lambda tensor: (-tensor.source.itemsize, tensor.name))
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            for block in _blocks(tensor.source, plan):
                file.write(memoryview(block.contiguous().flatten().view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[_Planned]) -> bytes:
    entries: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.source.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return struct.pack("<Q", len(content)) + content


def _blocks(source: StoredTensor, plan: TensorCut) -> Iterator[torch.Tensor]:
    """The student's tensor in blocks of its first dimension."""
    experts = plan.experts_of(source.parameter)
    if experts is not None:
        for expert in experts:
            yield take(source.rows(expert, expert + 1)[0], plan.indices(source.parameter, expert))
        return
    rows, *columns = plan.indices(source.parameter)
    shape = source.parameter.shape(plan.family.sizes(plan.config))
    if rows is None:
        rows = np.arange(shape[0])
    rescale = plan.rescale(source.parameter)
    row_bytes = math.prod(shape[1:]) * source.itemsize
    rows_per_block = max(1, _BLOCK_BYTES // row_bytes)
    # Kept rows ascend, in fused projections, too: their segments lie one after the other.
    for part in np.split(rows, np.flatnonzero(np.diff((rows - rows[0]) // rows_per_block)) + 1):
        block = take(source.rows(int(part[0]), int(part[-1]) + 1), [part - part[0], *columns])
        yield block if rescale is None else rescale(block)
