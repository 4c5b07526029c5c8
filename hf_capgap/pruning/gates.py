"""Gradients of virtual gates: Σ activation · ∂L/∂activation per unit, recorded while a model runs backward.

A gate g = 1 multiplied onto an activation a would have the gradient ∂L/∂g = Σ a · ∂L/∂a. So no gate is inserted: an
identity in the autograd graph keeps the activation and sees the gradient pass. The identity saves through
`save_for_backward`, hence works under gradient checkpointing (what the checkpoint drops is recomputed), and asks for
no weight gradient.

The residual stream x' = x + branch(x) passes its gradient unchanged to the branch's output b, so that
∂L/∂x' = ∂L/∂b, and one gate on b covers both sites of a branch: b·∂L/∂b + x'·∂L/∂x' = (2b + x)·∂L/∂b.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..families import Family


class _Gate(torch.autograd.Function):
    """Identity of `x`. On the way back, `record(gradient, *saved)` is called."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, record: Callable, *saved: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        ctx.num_saved = len(saved)
        ctx.save_for_backward(*saved)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        ctx.record(gradient, *ctx.saved_tensors)
        return gradient, None, *[None] * ctx.num_saved


class GateRecorder:
    """Hooks on every site of a model; sums the gates' gradients of all backward passes since the last `take`.

    Sites (the reference implementation's, see `families.Family`): the input of the attention output projection for
    heads, the input of the down projection for neurons; for hidden the embedding, each branch's output and the
    residual sum after it: 4·layers + 1 sites with pre-norm layers of two branches.

    Args:
        model: An audited model.
        family: Its family.
        per_example: Keep one row per sequence of the batch; otherwise one row for the whole batch.
    """

    def __init__(self, model: torch.nn.Module, family: Family, *, per_example: bool):
        self._model, self._family, self._per_example = model, family, per_example
        self._sizes = family.sizes(model.config)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._stream: dict[tuple[int, str], torch.Tensor] = {}  # (layer, branch) -> residual stream before the branch
        num_layers = self._sizes["layers"]
        # Gradients as they arrive, [rows, width] each; a backward pass visits every site once.
        self._heads: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._neurons: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._hidden: list[torch.Tensor] = []

    def __enter__(self) -> GateRecorder:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks on the model."""
        family, model = self._family, self._model
        self._after(model.get_submodule(family.embedding), self._gate_embedding)
        for index, layer in enumerate(model.get_submodule(family.layers)):
            self._before(layer.get_submodule(family.heads_site), partial(self._gate_input, self._heads[index]))
            self._before(layer.get_submodule(family.neurons_site), partial(self._gate_input, self._neurons[index]))
            for branch in family.branches:
                key = (index, branch.reads)
                self._before(layer.get_submodule(branch.reads), partial(self._remember_stream, key))
                self._after(layer.get_submodule(branch.writes), partial(self._gate_branch, key))

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stream.clear()

    def take(self) -> dict[str, torch.Tensor]:
        """The gates' gradients since the last call, float32 on the CPU, and start anew.

        Returns:
            `heads` [rows, layers, kv_heads], `neurons` [rows, layers, neurons], `hidden` [rows, hidden].
        """
        groups = self._sizes["kv_heads"]
        heads = torch.stack([_total(parts) for parts in self._heads], dim=1)  # [rows, layers, q_heads * head_dim]
        gradients = {
            "heads": heads.unflatten(-1, (groups, -1)).sum(-1),
            "neurons": torch.stack([_total(parts) for parts in self._neurons], dim=1),
            "hidden": _total(self._hidden),
        }
        self.discard()
        return gradients

    def discard(self) -> None:
        """Forget what was recorded since the last `take`."""
        self._stream.clear()
        for parts in (*self._heads, *self._neurons, self._hidden):
            parts.clear()

    def _before(self, module: torch.nn.Module, hook: Callable) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: torch.nn.Module, hook: Callable) -> None:
        self._handles.append(module.register_forward_hook(hook))

    def _gate_embedding(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:  # frozen weights: the graph starts here
            output = output.detach().requires_grad_()
        return _Gate.apply(output, partial(self._record_product, self._hidden), output)

    def _gate_input(self, into: list, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if not torch.is_grad_enabled():
            return None
        x, *rest = args
        return (_Gate.apply(x, partial(self._record_product, into), x), *rest), kwargs

    def _remember_stream(self, key: tuple[int, str], module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            self._stream[key] = (args[0] if args else kwargs["hidden_states"]).detach()

    def _gate_branch(self, key: tuple[int, str], module: torch.nn.Module, args: tuple, output: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return None
        return _Gate.apply(output, self._record_branch, output, self._stream.pop(key))

    def _record_product(self, into: list, gradient: torch.Tensor, activation: torch.Tensor) -> None:
        into.append(self._sum_tokens(gradient.float() * activation.float()))

    def _record_branch(self, gradient: torch.Tensor, output: torch.Tensor, stream: torch.Tensor) -> None:
        self._hidden.append(self._sum_tokens(gradient.float() * (2 * output.float() + stream.float())))

    def _sum_tokens(self, product: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] -> [batch or 1, width]"""
        by_example = product.sum(1)
        return by_example if self._per_example else by_example.sum(0, keepdim=True)


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.cpu() for part in parts]).sum(0)
