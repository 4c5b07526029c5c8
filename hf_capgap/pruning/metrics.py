"""The metrics by which units are ranked, as data: what each is made from, and how one calibration unit is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from ..errors import ConfigError
from .scores import UNITS


class Source(Enum):
    """What a metric is computed from."""

    GATES = "gradients of virtual gates"
    WEIGHT_GRADIENTS = "weights and their gradients"
    ACTIVATIONS = "activations"
    WEIGHTS = "weights"
    NOTHING = "nothing"

    @property
    def needs_data(self) -> bool:
        return self not in (Source.WEIGHTS, Source.NOTHING)

    @property
    def needs_backward(self) -> bool:
        return self in (Source.GATES, Source.WEIGHT_GRADIENTS)


@dataclass(frozen=True)
class Metric:
    """One way to score units.

    Attributes:
        text: What it is, in a line.
        source: What it is computed from.
        entry: From a weight (and its gradient) to what is summed over the weights of a unit.
        finish: From the sum of one calibration unit to what the mean is taken of.
    """

    text: str
    source: Source
    entry: Callable[..., torch.Tensor] | None = None
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda total: total


METRICS: Mapping[str, Metric] = {
    "expressive": Metric(
        "|∂L/∂gate| of a virtual gate on the unit (arXiv 2311.07052)", Source.GATES, finish=torch.abs
    ),
    "taylor": Metric(
        "|w·∂L/∂w| summed over the unit's weights (arXiv 1906.10771)",
        Source.WEIGHT_GRADIENTS,
        entry=lambda weight, gradient: (weight * gradient).abs(),
    ),
    "movement": Metric(
        "-w·∂L/∂w summed over the unit's weights, accumulated over a training run (arXiv 2005.07683)",
        Source.WEIGHT_GRADIENTS,
        entry=lambda weight, gradient: -weight * gradient,
    ),
    "magnitude": Metric(
        "L2 norm of the unit's weights", Source.WEIGHTS, entry=lambda weight: weight.square(), finish=torch.sqrt
    ),
    "magnitude_l1": Metric("L1 norm of the unit's weights", Source.WEIGHTS, entry=torch.abs),
    "activation": Metric(
        "root mean square over tokens of the unit's activation (arXiv 2407.14679)",
        Source.ACTIVATIONS,
        finish=torch.sqrt,
    ),
    "random": Metric("uniform random numbers from a seed", Source.NOTHING),
}


def metric_named(name: str) -> Metric:
    """Raises `ConfigError` for an unknown metric."""
    _check_choice("metric", name, METRICS)
    return METRICS[name]


def check_unit(unit: str) -> None:
    """Raises `ConfigError` for an unknown unit."""
    _check_choice("unit", unit, UNITS)


def _check_choice(what: str, value: str, choices: object) -> None:
    if value not in choices:
        raise ConfigError(f"Unknown {what} of scores", found=value, fix=f"Choose one of: {', '.join(choices)}.")
