"""Samples of a model's weights, by which scores know the model that they are of.

Eight entries of the middle row of every parameter, rounded to bfloat16: the same whether the checkpoint was loaded in
32 or in 16 bits, different after any training worth the name. Packed (quantised) parameters are NaN and not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..errors import ScoresError
from ..families import Config, Family

if TYPE_CHECKING:
    from .scores import ExpressiveScores

NUM_ENTRIES = 8
_LEAST_EQUAL = 0.85  # float32 through float16 to bfloat16 rounds one entry in sixteen another way

Row = Callable[[str], "torch.Tensor | None"]


def fingerprint(family: Family, config: Config, row_of: Row) -> torch.Tensor:
    """The samples, [num_parameters, 8] bfloat16, NaN where there is nothing to read.

    Args:
        row_of: From a parameter's name to its middle row (the entry `size // 2` of the first dimension; all of a
            vector), or None if it cannot be read.
    """
    samples = []
    for parameter in family.parameters_of(config):
        row = row_of(parameter.name)
        sample = torch.full((NUM_ENTRIES,), torch.nan, dtype=torch.bfloat16)
        if row is not None:
            values = row.detach().flatten()[:NUM_ENTRIES].to("cpu", torch.bfloat16)
            sample[: len(values)] = values
        samples.append(sample)
    return torch.stack(samples)


def fingerprint_of_model(family: Family, model: torch.nn.Module) -> torch.Tensor:
    """The fingerprint of a model in memory; parameters that are packed or offloaded are left out."""
    parameters = dict(model.named_parameters())

    def row_of(name: str) -> torch.Tensor | None:
        parameter = parameters[name]
        if parameter.is_meta or not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            return None
        return middle_row(parameter.data)

    return fingerprint(family, model.config, row_of)


def middle_row(tensor: torch.Tensor) -> torch.Tensor:
    """A vector as it is; of anything else the middle entry of the first dimension."""
    return tensor if tensor.dim() == 1 else tensor[tensor.shape[0] // 2]


def share_equal(expected: torch.Tensor | None, found: torch.Tensor | None) -> float:
    """Which share of the entries of two fingerprints are equal; 1 if they can be of the same weights, or cannot be
    compared: without a fingerprint, or of models of another size, which is reported elsewhere in better words.
    """
    if expected is None or found is None or expected.shape != found.shape:
        return 1.0
    comparable = ~(torch.isnan(expected) | torch.isnan(found))
    share = (expected == found)[comparable].float().mean().item() if comparable.any() else 1.0
    return 1.0 if share >= _LEAST_EQUAL else share


def check_same_model(scores: ExpressiveScores, found: torch.Tensor, model_name: str) -> None:
    """Raises `ScoresError` if `scores` carry the fingerprint of other weights than `found`."""
    share = share_equal(scores.fingerprint, found)
    if share < 1.0:
        raise ScoresError(
            "These scores were taken on other weights than this teacher's: another model or revision of the same size",
            found=f"scores of {scores.model_name or 'a model'}{_at(scores.revision)}, teacher {model_name}; "
            f"{share:.0%} of the sampled weights agree",
            fix="Score this teacher. If you know better: dataclasses.replace(scores, fingerprint=None).",
        )


def _at(revision: str | None) -> str:
    return f"@{revision}" if revision else ""
