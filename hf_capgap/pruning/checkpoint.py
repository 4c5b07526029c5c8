"""Checkpoints on disk: a teacher's safetensors shards, read tensor by tensor, and the student's folder."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .. import lineage
from ..errors import CheckpointError, UnsupportedModelError
from ..families import Family, Parameter, family_for
from ..families.family import HEAD
from .fingerprint import NUM_ENTRIES, fingerprint
from .selection import Kept
from .shapes import StudentShape

SINGLE_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"
_WANTED = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_TIE_ROWS = 4096
# Buffers that older versions of transformers stored and today's compute.
_IGNORED = ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attention.bias", "*.masked_bias")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        key: Its name in the file.
        file: The file.
        parameter: What the family's table says of it; `parameter.name` is the name that a model knows it by.
        dtype: Its dtype in safetensors' notation.
        itemsize: Bytes per entry.
    """

    key: str
    file: Path
    parameter: Parameter
    dtype: str
    itemsize: int

    def rows(self, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """Entries `start` to `stop` of the first dimension.

        The file is mapped anew each time: pages that were read count as resident memory until it is closed.
        """
        with safe_open(self.file, framework="pt") as file:
            return file.get_slice(self.key)[start:stop].clone()


@dataclass(frozen=True)
class StudentFolder:
    """A student that was written to disk without building the model; a path, wherever one is expected.

    Attributes:
        path: The folder.
        kept: What it keeps of its teacher.
        lineage: The stages of its `capgap.json`.
    """

    path: Path
    kept: Kept
    lineage: list[dict[str, Any]]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def load(self, **kwargs: Any) -> PreTrainedModel:
        """The model, by `AutoModelForCausalLM.from_pretrained` (dtype as stored unless given), with `kept` and
        `lineage`.
        """
        model = AutoModelForCausalLM.from_pretrained(self.path, **{"dtype": "auto", **kwargs})
        model.kept, model.lineage = self.kept, self.lineage
        return model

    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        config = AutoConfig.from_pretrained(self.path)
        return StudentShape.of(config).num_parameters(config)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors shards of a supported family.

    Attributes:
        folder: The folder.
        name: Its public name: the Hub id, or the folder's name.
        commit: Commit of a Hub snapshot, None for a local folder.
    """

    folder: Path
    name: str
    commit: str | None = None

    @classmethod
    def find(cls, source: str, revision: str | None = None) -> Checkpoint | None:
        """The checkpoint in a local folder, or that of a Hub id after a download; None if it has no safetensors.

        Raises:
            CheckpointError: No such folder, and nothing to be had from the Hub under this name.
        """
        folder, commit = Path(source), None
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED))
            except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
                raise CheckpointError(
                    "No such folder, and the Hub does not give a model of this name",
                    found=f"{source}: {type(error).__name__}",
                    fix="Check the path or id, your access rights and the connection.",
                ) from error
            commit = folder.name
        if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
            return None
        return cls(folder, lineage.public_name(source), commit)

    @cached_property
    def config(self) -> PreTrainedConfig:
        file = self.folder / CONFIG_FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError("The config is missing or damaged", found=f"{file.name}: {error!r}") from error
        family_for(content)  # before transformers says it in other words
        try:
            return AutoConfig.from_pretrained(self.folder)
        except StrictDataclassError as error:
            raise CheckpointError("The config class refuses the config", found=f"{file.name}: {error}") from error

    @cached_property
    def family(self) -> Family:
        return family_for(self.config)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor that the student may need, by the name that a model knows it by; tied ones once."""
        wanted = self._in_memory | self._stored
        unused = [name for name in self._everything if name not in wanted and name != HEAD]
        if unused:
            warnings.warn(
                f"{len(unused)} tensors of the checkpoint belong to no part of this model and are left out: "
                + ", ".join(sorted(unused)[:3]),
                stacklevel=2,
            )
        return {name: tensor for name, tensor in self._everything.items() if name in wanted}

    @cached_property
    def _everything(self) -> dict[str, StoredTensor]:
        """All tensors but old buffers."""
        found = {}
        for file in self._files():
            for key, shape, dtype, itemsize in _read_header(file):
                name = self._canonical(key)
                if any(fnmatchcase(key, glob) for glob in _IGNORED) and self.family.explain(name) is None:
                    continue
                found[name] = StoredTensor(key, file, self._explain(name, shape), dtype, itemsize)
        return found

    @cached_property
    def _in_memory(self) -> set[str]:
        return {parameter.name for parameter in self.family.parameters_of(self.config)}

    @cached_property
    def _stored(self) -> set[str]:
        return {parameter.name for parameter in self.family.stored_parameters_of(self.config)}

    def check_complete(self) -> None:
        """Check that every tensor of the family's table is there, in its shape.

        Raises:
            CheckpointError: A missing or damaged shard, or a missing tensor.
            UnsupportedModelError: A tensor that the family's table does not explain.
        """
        missing = min((names - self.tensors.keys() for names in (self._stored, self._in_memory)), key=len)
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors are missing in the checkpoint",
                found=", ".join(sorted(missing)[:3]),
                fix="Download it again.",
            )
        self._check_tie()

    def _check_tie(self) -> None:
        head, embedding = self._everything.get(HEAD), self.tensors[self.family.lookups[0]]
        if head is None or not self.family.tied(self.config):
            return
        num_rows = self.family.sizes(self.config)["vocab"]
        for start in range(0, num_rows, _TIE_ROWS):
            if not torch.equal(head.rows(start, start + _TIE_ROWS), embedding.rows(start, start + _TIE_ROWS)):
                raise UnsupportedModelError(
                    "The config says that the output head is the token embedding, but the weights of the two differ",
                    found=head.key,
                    fix="Set tie_word_embeddings to false in config.json.",
                )

    def fingerprint(self) -> torch.Tensor:
        """See `fingerprint`; experts, which a checkpoint stores one by one, are left out."""

        def row_of(name: str) -> torch.Tensor | None:
            tensor = self.tensors.get(name)
            if tensor is None:
                return None
            size = tensor.parameter.shape(self.family.sizes(self.config))
            return tensor.rows(0, NUM_ENTRIES) if len(size) == 1 else tensor.rows(size[0] // 2, size[0] // 2 + 1)

        return fingerprint(self.family, self.config, row_of)

    def describe(self) -> dict[str, Any]:
        """The facts that identify the teacher, as `lineage.describe_model` gives them of a model in memory."""
        return {
            "name": self.name,
            "revision": self.commit,
            "model_type": self.family.model_type,
            "num_parameters": self.family.num_parameters(self.config),
        }

    def _files(self) -> list[Path]:
        index = self.folder / INDEX_FILE
        if (self.folder / SINGLE_FILE).is_file():  # before the index, as `from_pretrained` does
            return [self.folder / SINGLE_FILE]
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [self.folder / name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("The index of the shards is damaged", found=f"{index.name}: {error!r}") from error
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(
                f"{len(absent)} of {len(files)} shards are missing", found=", ".join(absent[:3]), fix="Download them."
            )
        return files

    def _canonical(self, key: str) -> str:
        for theirs, ours in self.family.stored_names:
            if key.startswith(theirs):
                return ours + key.removeprefix(theirs)
        of_base_model = f"{self.family.layers.partition('.')[0]}.{key}"  # saved without its head
        is_short = self.family.explain(key) is None and self.family.explain(of_base_model) is not None
        return of_base_model if is_short else key

    def _explain(self, name: str, shape: tuple[int, ...]) -> Parameter:
        parameter = self.family.explain(name)
        expected = None if parameter is None else parameter.shape(self.family.sizes(self.config))
        if shape != expected:
            raise UnsupportedModelError(
                f"The {self.family.model_type} table does not explain the stored tensor {name}"
                + ("" if expected is None else f", which should have the shape {expected}"),
                found=f"shape {shape}",
                fix="Is this checkpoint of the model that its config.json describes?",
            )
        return parameter


def _read_header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """(name, shape, dtype, bytes per entry) of each tensor of a shard."""
    try:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                tensor = shard.get_slice(key)
                shape = tuple(tensor.get_shape())
                sample = tensor[:0] if shape else shard.get_tensor(key)  # of no dimensions no slice can be taken
                yield key, shape, tensor.get_dtype(), sample.element_size()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            "A shard is damaged or truncated",
            found=f"{file.name}, {os.path.getsize(file):,} bytes: {error}",
            fix="Download it again.",
        ) from error
