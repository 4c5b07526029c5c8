"""Where the knowledge comes from. A trainer only calls `signal(inputs)`; what it gets back says how to compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import TeacherError
from ..forwarding import run_inside
from ..lineage import hub_commit
from ..output_head import OutputHead, head_matches

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a model's forward takes of a batch."""
    return {name: batch[name] for name in _MODEL_INPUTS if batch.get(name) is not None}


@dataclass(frozen=True)
class HiddenSignal:
    """Final hidden states, to be turned into logits chunk by chunk.

    Attributes:
        hidden: [batch, length, H_t].
        with_head: `with_head(function)` calls `function(OutputHead)` where the head's weight is whole.
    """

    hidden: torch.Tensor
    with_head: Callable[[Callable[[OutputHead], Any]], Any]


@dataclass(frozen=True)
class LogitsSignal:
    """Logits of all positions, [batch, length, V_t]."""

    logits: torch.Tensor


class Teacher(Protocol):
    """What a `DistillationTrainer` learns from."""

    def signal(self, inputs: Mapping[str, torch.Tensor]) -> HiddenSignal | LogitsSignal:
        """The knowledge about a batch of model inputs."""


class LiveTeacher:
    """A frozen model that runs beside the student: evaluation mode, no gradients, no cache.

    It is never registered under the student, so that no checkpoint contains it and `train()` does not reach it.

    Args:
        model: The teacher. Its weights are frozen in place.
        dense: Give logits even where hidden states and the head would do.
    """

    def __init__(self, model: PreTrainedModel, *, dense: bool = False):
        self.model = model.eval().requires_grad_(False)
        self.dense = dense or not head_matches(model)

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, torch.Tensor]) -> HiddenSignal | LogitsSignal:
        inputs = {**inputs, "use_cache": False}  # with a cache, packed positions would attend across documents
        if self.dense:
            return LogitsSignal(self.model(**inputs).logits)
        return HiddenSignal(self.model.base_model(**inputs).last_hidden_state, self._with_head)

    def _with_head(self, function: Callable[[OutputHead], Any]) -> Any:
        head = self.model.get_output_embeddings()
        return run_inside(head, head, lambda _: function(OutputHead.of(self.model)), None)


def load_teacher(name_or_path: str | os.PathLike, init_kwargs: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a teacher from a folder or the Hub, in the dtype it was saved in unless `init_kwargs` say otherwise.

    Raises:
        TeacherError: It does not load.
    """
    try:
        options = {"dtype": "auto", **(init_kwargs or {})}
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
        model.hub_commit = hub_commit(os.fspath(name_or_path), options.get("revision"), options.get("cache_dir"))
        return model
    except (OSError, ValueError) as error:  # an unknown path or id, no network, an unknown option or model type
        raise TeacherError(
            f"The teacher does not load: {error}", found=name_or_path, fix="Check the path or Hub id, and the network."
        ) from error
