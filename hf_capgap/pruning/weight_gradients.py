"""Products of weights with their gradients, summed by unit while a model runs backward."""

from __future__ import annotations

from functools import partial

import torch

from ..errors import ConfigError
from ..families import Family, is_quantized
from .metrics import Metric
from .units import UnitSums


class WeightGradientRecorder:
    """Hooks on every weight of a model; sums `metric.entry(w, ∂L/∂w)` by unit over the backward passes since `take`.

    A hook sees the gradient of one backward pass before it is added to `.grad`, so that accumulation does not matter.

    Args:
        model: An audited model.
        family: Its family.
        metric: A metric with the source `WEIGHT_GRADIENTS`.
        keep_gradients: Leave `.grad` to a training run. Otherwise each gradient is dropped as soon as it was read, so
            that no two exist at the same time.

    Raises:
        ConfigError: A model with quantised or offloaded weights, which have no gradient.
    """

    def __init__(self, model: torch.nn.Module, family: Family, metric: Metric, *, keep_gradients: bool):
        if is_quantized(model):
            raise ConfigError(
                "Quantised weights have no gradient", fix="Use the metric 'expressive', or load the model unquantised."
            )
        offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if offloaded:
            raise ConfigError(
                "Offloaded weights have no gradient",
                found=offloaded[0],
                fix="Use the metric 'expressive', or load the model without offloading.",
            )
        self._model, self._entry, self._keep = model, metric.entry, keep_gradients
        self._sums = UnitSums(family, model.config)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._set_aside: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # weights, and gradients found on them

    def __enter__(self) -> WeightGradientRecorder:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks on the weights. Raises `ConfigError` if one of them asks for no gradient."""
        frozen = [name for name, parameter in self._model.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ConfigError(
                "A weight asks for no gradient", found=frozen[0], fix="Unfreeze it, or use another metric."
            )
        for name, parameter in self._model.named_parameters():
            self._handles.append(parameter.register_hook(partial(self._see, name, parameter)))
            if not self._keep:
                self._handles.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))
                self._set_aside.append((parameter, parameter.grad))
                parameter.grad = None

    def detach(self) -> None:
        """Take the hooks off again, and put back the gradients that were there."""
        for handle in self._handles:
            handle.remove()
        for parameter, gradient in self._set_aside:
            parameter.grad = gradient
        self._handles.clear()
        self._set_aside.clear()

    def take(self) -> dict[str, torch.Tensor]:
        """The sums since the last call with a row dimension of 1, see `UnitSums.take`; starts anew."""
        return {name: sums[None] for name, sums in self._sums.take().items()}

    def discard(self) -> None:
        """Forget what was recorded since the last `take`."""
        self._sums.take()

    @torch.no_grad()
    def _see(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        self._sums.add(name, self._entry(parameter.float(), gradient.float()))


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
