"""What units do while a model runs: gradients of virtual gates, or squared activations, per unit.

A gate g = 1 multiplied onto an activation a would have the gradient ∂L/∂g = Σ a · ∂L/∂a. So no gate is inserted: an
identity in the autograd graph keeps the activation and sees the gradient pass. The identity saves through
`save_for_backward`, hence works under gradient checkpointing (what the checkpoint drops is recomputed), and asks for
no weight gradient.

The residual stream x' = x + branch(x) passes its gradient unchanged to the branch's output b, so that
∂L/∂x' = ∂L/∂b, and one gate on b covers both sites of a branch: b·∂L/∂b + x'·∂L/∂x' = (b + x')·∂L/∂b.

Experts run in one module, with no boundary at the neurons of one expert. With the gradient of that module's output in
hand, the neurons of each expert are computed again: a·∂L/∂a = a · (routing weight · ∂L/∂output · W_down).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device

from ..errors import ScoresError
from ..families import Family


class SiteRecorder(ABC):
    """Hooks on every site of a model; sums over tokens what is recorded there since the last `take`.

    Sites (the reference implementation's, see `families.Family`): the input of the attention output projection for
    heads, the input of the down projection for neurons; for hidden the first layer's input, each branch's output, and
    each residual sum: 4·layers + 1 sites with layers of two branches, one after the other. For layers: what the
    branches add.

    Args:
        model: An audited model.
        family: Its family.
        per_example: Keep one row per sequence of the batch; otherwise one row for the whole batch.
    """

    def __init__(self, model: torch.nn.Module, family: Family, *, per_example: bool):
        self._model, self._family, self._per_example = model, family, per_example
        self._sizes = family.sizes(model.config)
        self._num_layers = self._sizes["layers"]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._batch_shape: tuple[int, ...] = ()
        self._stream: dict[int, torch.Tensor] = {}  # layer -> residual stream before the sum that is under way
        self._added: dict[int, list[torch.Tensor]] = {}  # layer -> branch outputs of that sum so far
        self.token_mask: torch.Tensor | None = None  # [batch, tokens], 0 at padding; activations there do not count
        self.discard()

    def __enter__(self) -> SiteRecorder:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks on the model."""
        family, model = self._family, self._model
        layers = model.get_submodule(family.layers)
        # A parallel layer adds all branches in one sum; in the others each branch has its own.
        ends_sum = [not family.adds_branches_at_once(model.config)] * (len(family.branches) - 1) + [True]
        self._before(layers[0], self._see_first_input)
        for index, layer in enumerate(layers):
            self._before(layer.get_submodule(family.heads_site), partial(self._see_input, self._heads[index]))
            if family.experts_site is None:
                self._before(layer.get_submodule(family.neurons_site), partial(self._see_input, self._neurons[index]))
            else:
                self._handles.append(
                    layer.get_submodule(family.experts_site).register_forward_hook(partial(self._see_experts, index))
                )
            for branch, ends in zip(family.branches, ends_sum, strict=True):
                self._before(layer.get_submodule(branch.reads), partial(self._remember_stream, index))
                self._after(layer.get_submodule(branch.writes), partial(self._see_branch, index, ends))

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stream.clear()
        self._added.clear()

    def take(self) -> dict[str, torch.Tensor]:
        """The sums since the last call, float32 on the CPU, and start anew.

        Returns:
            `heads` [rows, layers, kv_heads], `query_heads` [rows, layers, q_heads], `neurons` [rows, layers, neurons]
            ([rows, layers, experts, neurons] with experts), `experts` [rows, layers, experts] (with experts), `layers`
            [rows, layers], `hidden` [rows, hidden].
        """
        by_entry = torch.stack([_total(parts) for parts in self._heads], dim=1)  # [rows, layers, q_heads * head_dim]
        query_heads = by_entry.unflatten(-1, (self._sizes["q_heads"], -1)).sum(-1)
        taken = {
            "heads": query_heads.unflatten(-1, (self._sizes["kv_heads"], -1)).sum(-1),
            "query_heads": query_heads,
            "neurons": torch.stack([_total(parts) for parts in self._neurons], dim=1),
            "layers": torch.stack([_total(parts) for parts in self._layers], dim=1),
            "hidden": _total(self._hidden),
        }
        if self._family.experts_site is not None:
            taken["experts"] = torch.stack([_total(parts) for parts in self._experts], dim=1)
        self.discard()
        return taken

    def discard(self) -> None:
        """Forget what was recorded since the last `take`."""
        self._stream.clear()
        self._added.clear()
        for name in ("_heads", "_neurons", "_experts", "_layers"):
            # The lists stay the same objects: hooks hold them.
            for parts in self.__dict__.setdefault(name, [[] for _ in range(self._num_layers)]):
                parts.clear()
        self.__dict__.setdefault("_hidden", []).clear()

    @abstractmethod
    def _is_on(self) -> bool:
        """Whether this forward pass counts."""

    @abstractmethod
    def _observe(self, x: torch.Tensor, record: Callable, *saved: torch.Tensor) -> torch.Tensor:
        """Have `record(gradient of x, *saved)` called once; returns what takes the place of `x`."""

    @abstractmethod
    def _product(self, gradient: torch.Tensor | None, activation: torch.Tensor) -> torch.Tensor:
        """What is summed over tokens."""

    def _before(self, module: torch.nn.Module, hook: Callable) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: torch.nn.Module, hook: Callable) -> None:
        self._handles.append(module.register_forward_hook(hook))

    # --- hooks ---

    def _see_first_input(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if not self._is_on():
            return None
        self._batch_shape = _first(args, kwargs).shape[:2]
        return self._see_input(self._hidden, module, args, kwargs)

    def _see_input(self, into: list, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if not self._is_on():
            return None
        x = _first(args, kwargs)
        seen = self._observe(x, partial(self._record, into), x)
        return ((seen, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": seen})

    def _remember_stream(self, index: int, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if self._is_on() and not self._added.get(index):
            self._stream[index] = _first(args, kwargs).detach()

    def _see_branch(self, index: int, ends_sum: bool, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        if not self._is_on():
            return None
        added = self._added.setdefault(index, [])
        added.append(output.detach())
        if not ends_sum:
            return self._observe(output, partial(self._record_branch, index), output)
        stream = self._stream.pop(index)
        summed = stream + sum(self._added.pop(index))
        return self._observe(output, partial(self._record_branch, index), output, summed)

    def _see_experts(self, index: int, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> Any:
        if not self._is_on():
            return None
        states, chosen, weights = args
        return self._observe(output, partial(self._record_experts, index, module), states, chosen, weights)

    # --- what is recorded ---

    def _record(self, into: list, gradient: torch.Tensor | None, activation: torch.Tensor) -> None:
        into.append(self._sum_tokens(self._product(gradient, activation)))

    def _record_branch(
        self, index: int, gradient: torch.Tensor | None, output: torch.Tensor, summed: torch.Tensor | None = None
    ) -> None:
        product = self._product(gradient, output)
        self._layers[index].append(self._sum_tokens(product).sum(-1))
        if summed is not None:
            product = product + self._product(gradient, summed)
        self._hidden.append(self._sum_tokens(product))

    def _record_experts(
        self,
        index: int,
        module: torch.nn.Module,
        gradient: torch.Tensor | None,  # [tokens, hidden]
        states: torch.Tensor,  # [tokens, hidden]
        chosen: torch.Tensor,  # [tokens, k]
        weights: torch.Tensor,  # [tokens, k]
    ) -> None:
        with align_module_device(module):  # an offloaded module has put its weights away again
            self._sum_experts(index, module, gradient, states, chosen, weights)

    def _sum_experts(
        self,
        index: int,
        module: torch.nn.Module,
        gradient: torch.Tensor | None,
        states: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        num_rows = self._batch_shape[0] if self._per_example else 1
        num_experts = self._sizes["experts"]
        row_of_token = torch.arange(len(states), device=states.device) // self._batch_shape[1]
        neurons = torch.zeros(num_rows, num_experts, self._sizes["neurons"], device=states.device)
        experts = torch.zeros(num_rows, num_experts, device=states.device)
        for expert in range(num_experts):
            tokens, position = torch.where(chosen == expert)
            if len(tokens) == 0:
                continue
            rows = row_of_token[tokens] if self._per_example else torch.zeros_like(tokens)
            share = weights[tokens, position, None].float()  # [routed, 1]
            gate, up = F.linear(states[tokens], module.gate_up_proj[expert].to(states.dtype)).chunk(2, dim=-1)
            activation = module.act_fn(gate) * up  # [routed, neurons]
            down = module.down_proj[expert].float()  # [hidden, neurons]
            # ∂L/∂activation; where there is no gradient the expert's own output takes its place
            at_neurons = None if gradient is None else (share * gradient[tokens].float()) @ down
            by_token = self._masked(self._product(at_neurons, activation), tokens)
            neurons[:, expert].index_add_(0, rows, by_token)
            if gradient is None:
                output = share * (activation.float() @ down.T)
                by_token = self._masked(self._product(None, output), tokens)
            experts[:, expert].index_add_(0, rows, by_token.sum(-1))
        self._neurons[index].append(neurons)
        self._experts[index].append(experts)

    def _masked(self, by_token: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.token_mask is None:
            return by_token
        return by_token * self.token_mask.to(by_token.device).flatten()[tokens, None]

    def _sum_tokens(self, product: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] or [batch·tokens, width] -> [batch or 1, width]"""
        product = product.reshape(*self._batch_shape, -1)
        if self.token_mask is not None:
            product = product * self.token_mask.to(product.device)[..., None]  # layers may be on several devices
        by_example = product.sum(1)
        return by_example if self._per_example else by_example.sum(0, keepdim=True)


class GateRecorder(SiteRecorder):
    """Gradients of virtual gates, recorded in backward passes of training or scoring; evaluation does not count."""

    def attach(self) -> None:
        super().attach()
        self._after(self._model.get_input_embeddings(), self._start_graph)

    def _start_graph(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """With frozen weights the graph starts at the embeddings."""
        return output.detach().requires_grad_() if self._is_on() and not output.requires_grad else None

    def _is_on(self) -> bool:
        return torch.is_grad_enabled()

    def _observe(self, x: torch.Tensor, record: Callable, *saved: torch.Tensor) -> torch.Tensor:
        return _Gate.apply(x, record, *saved)

    def _product(self, gradient: torch.Tensor | None, activation: torch.Tensor) -> torch.Tensor:
        return gradient.float() * activation.float()


class ActivationRecorder(SiteRecorder):
    """Squared activations, recorded in forward passes while `enabled`."""

    enabled = True

    def _is_on(self) -> bool:
        return self.enabled

    def _observe(self, x: torch.Tensor, record: Callable, *saved: torch.Tensor) -> torch.Tensor:
        record(None, *(tensor.detach() for tensor in saved))
        return x

    def _product(self, gradient: torch.Tensor | None, activation: torch.Tensor) -> torch.Tensor:
        return activation.float().square()


class _Gate(torch.autograd.Function):
    """Identity of `x`. On the way back, `record(gradient, *saved)` is called."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, record: Callable, *saved: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        ctx.num_saved = len(saved)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)  # no gradient is not a gradient of zero
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple:
        if gradient is None:
            raise ScoresError(
                "A module of this model passes no gradient back",
                fix="Were its quantised weights packed for inference? Load the model anew, or on another device.",
            )
        with torch.no_grad():
            ctx.record(gradient, *ctx.saved_tensors)
        return gradient, None, *[None] * ctx.num_saved


def _first(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.cpu() for part in parts]).sum(0)
