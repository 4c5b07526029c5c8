"""What a cut does to each tensor of a teacher, in memory or in a checkpoint: new name, kept entries, new scale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..errors import ShapeError
from ..families import Family, Parameter
from .selection import Kept
from .shapes import StudentShape

Rescale = Callable[[torch.Tensor], torch.Tensor]


class TensorCut:
    """The cut of one student, tensor by tensor.

    Nothing is rescaled, with one exception. A model that multiplies embeddings by √hidden would multiply the
    student's by less: they are stored larger by √(H/H'). Where the output head is the same tensor, the final norm
    takes that factor back, so that the logits are those of the masked teacher.

    Args:
        family: The teacher's family.
        config: The teacher's config.
        shape: The student's shape.
        kept: What the student keeps.
    """

    def __init__(self, family: Family, config: PreTrainedConfig, shape: StudentShape, kept: Kept):
        self.family, self.config, self.shape, self.kept = family, config, shape, kept
        self._sizes = family.sizes(config)

    def student_name(self, parameter: Parameter) -> str | None:
        """The name that a teacher's tensor has in the student; None if its layer or expert is removed."""
        name = parameter.name
        if parameter.layer is not None:
            if parameter.layer not in self.kept.layers:
                return None
            position = self.kept.layers.index(parameter.layer)
            prefix = f"{self.family.layers}."
            name = f"{prefix}{position}{name.removeprefix(f'{prefix}{parameter.layer}')}"
        if parameter.expert is not None:
            experts = self.kept.experts[parameter.layer]
            if parameter.expert not in experts:
                return None
            name = name.replace(f".experts.{parameter.expert}.", f".experts.{experts.index(parameter.expert)}.")
        return name

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """Shape of the student's tensor."""
        return parameter.shape({**self._sizes, **self.shape.sizes()})

    def indices(self, parameter: Parameter, expert: int | None = None) -> list[np.ndarray | None]:
        """Entries to keep along each dimension, None where all stay; of one expert's part for `expert`."""
        units = self.kept.units(self._sizes, parameter.layer, parameter.expert if expert is None else expert)
        dimensions = parameter.dimensions if expert is None else parameter.dimensions[1:]
        return [dimension.indices(self._sizes, units) for dimension in dimensions]

    def experts_of(self, parameter: Parameter) -> list[int] | None:
        """The kept experts of a tensor that stacks experts with neurons of their own; None for any other."""
        stacked = len(parameter.dimensions) > 2 and "experts" in parameter.dimensions[0].axes
        return self.kept.experts[parameter.layer] if stacked else None

    def apply(self, parameter: Parameter, tensor: torch.Tensor) -> torch.Tensor:
        """The student's tensor, from all of the teacher's."""
        experts = self.experts_of(parameter)
        if experts is not None:
            return torch.stack([take(tensor[expert], self.indices(parameter, expert)) for expert in experts])
        cut = take(tensor, self.indices(parameter))
        rescale = self.rescale(parameter)
        return cut if rescale is None else rescale(cut)

    def rescale(self, parameter: Parameter) -> Rescale | None:
        """What is done to the values of a student's tensor; None for nothing."""
        return self._rescales.get(parameter.name)

    @cached_property
    def _rescales(self) -> dict[str, Rescale]:
        family = self.family
        ratio = self._sizes["hidden"] / self.shape.hidden_size
        if not family.scales_embeddings or ratio == 1:
            return {}
        factor, offset = ratio**0.5, family.norm_offset
        rescales = {family.lookups[0]: lambda values: (values.float() * factor).to(values.dtype)}
        if family.tied(self.config):
            final_norm = next(name for name in family.norms if "{layer}" not in name)
            rescales[f"{final_norm}.weight"] = lambda values: ((values.float() + offset) / factor - offset).to(
                values.dtype
            )
        return rescales

    def student_config(self) -> PreTrainedConfig:
        """The teacher's config with the student's sizes, its per-layer lists sliced to the kept layers."""
        values = copy.deepcopy(self.config).to_dict()
        sizes = self.shape.sizes()
        values.update({name: sizes[axis] for axis, name in self.family.config_fields.items() if axis in sizes})
        values.update(dict.fromkeys(self.family.follows_hidden, sizes["hidden"]))
        for name in self.family.per_layer_fields:
            if isinstance(values.get(name), list):
                values[name] = [values[name][layer] for layer in self.kept.layers]
        try:
            return type(self.config).from_dict(values)
        except StrictDataclassError as error:
            raise ShapeError("The config class refuses this shape", found=f"{self.shape}: {error}") from error


def take(tensor: torch.Tensor, indices: list[np.ndarray | None]) -> torch.Tensor:
    """`tensor` with only the given entries of each dimension."""
    for axis, kept in enumerate(indices):
        if kept is not None:
            tensor = tensor.index_select(axis, torch.from_numpy(kept).to(tensor.device))
    return tensor
