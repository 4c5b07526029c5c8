"""Pictures of scores: where the good units are, and how clear the line between kept and removed ones is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..extras import require
from ..families import Config, family_for
from .scores import ExpressiveScores
from .selection import Kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_DECILES = 10
_DPI = 120
_TITLES = {
    "heads": "KV groups",
    "query_heads": "query heads",
    "neurons": "neurons",
    "hidden": "hidden dimensions",
    "experts": "experts",
    "layers": "layers",
}
_MARK = {"color": "red", "linewidth": 1.5, "linestyle": "--"}


@dataclass(frozen=True)
class Boundary:
    """The line between the units that a cut keeps and those that it removes, in one ranking.

    Attributes:
        kind: `"heads"`, `"query_heads"`, `"neurons"`, `"hidden"`, `"experts"` or `"layers"`.
        row: Which ranking: () for the whole model, (layer,), or (layer, expert) or (layer, KV group), as the teacher
            counts.
        num_kept: Units that stay.
        num_units: Units that were ranked.
        last_kept: Lowest score of a unit that stays.
        first_removed: Highest score of a unit that goes.
    """

    kind: str
    row: tuple[int, ...]
    num_kept: int
    num_units: int
    last_kept: float
    first_removed: float

    @property
    def margin(self) -> float:
        """Gap between the last kept and the first removed score, as a share of the larger of their magnitudes.

        Near 0 the choice hangs on noise. Below 0 something better was removed, as symmetric ends do with layers.
        """
        largest = max(abs(self.last_kept), abs(self.first_removed))
        return (self.last_kept - self.first_removed) / largest if largest else 0.0


def boundaries(scores: ExpressiveScores, kept: Kept, config: Config) -> list[Boundary]:
    """The boundary of every ranking in which something is removed.

    Args:
        scores: The teacher's scores.
        kept: What `select` keeps by them. Removed layers have no rankings of their own.
        config: The teacher's config.
    """
    sizes = family_for(config).sizes(config)
    return [
        Boundary(kind, row, len(units), len(values), values[units].min().item(), values[removed].max().item())
        for kind, row, values, units in _rankings(scores, kept, sizes["q_heads"] // sizes["kv_heads"])
        if (removed := sorted(set(range(len(values))) - set(units)))
    ]


def _rankings(
    scores: ExpressiveScores, kept: Kept, queries_per_group: int
) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor, list[int]]]:
    """(kind, row, scores of the ranked units, kept ones) of every ranking."""
    yield "hidden", (), scores.hidden, kept.hidden
    if scores.layers is not None:
        yield "layers", (), scores.layers, kept.layers
    for layer in kept.layers:
        yield "heads", (layer,), scores.heads[layer], kept.heads[layer]
        if kept.query_heads is not None and scores.query_heads is not None:
            for group in kept.heads[layer]:
                first = group * queries_per_group
                own = range(first, first + queries_per_group)
                units = [query - first for query in kept.query_heads[layer] if query in own]
                yield "query_heads", (layer, group), scores.query_heads[layer, list(own)], units
        if kept.experts is None:
            yield "neurons", (layer,), scores.neurons[layer], kept.neurons[layer]
            continue
        if scores.experts is not None:
            yield "experts", (layer,), scores.experts[layer], kept.experts[layer]
        for expert, units in zip(kept.experts[layer], kept.neurons[layer], strict=True):
            yield "neurons", (layer, expert), scores.neurons[layer, expert], units


def deciles(values: torch.Tensor) -> torch.Tensor:
    """Means of the sorted tenths of each row, the best first: [.., units] to [.., 10] (or [.., units], if fewer)."""
    best_first = values.double().sort(dim=-1, descending=True).values
    parts = best_first.tensor_split(min(NUM_DECILES, values.shape[-1]), dim=-1)
    return torch.stack([part.mean(-1) for part in parts], dim=-1)


def draw_scores(
    scores: ExpressiveScores,
    folder: str | os.PathLike,
    *,
    kept: Kept | None = None,
    config: Config | None = None,
) -> list[Path]:
    """Draw scores into PNG files, one for each kind of unit.

    Heat maps of normalised scores: layers × KV groups, × query heads, × deciles of neurons (of each expert's, averaged
    over experts), × experts; the sorted hidden dimensions; the layers.

    Args:
        scores: What to draw.
        folder: Where to; it is made if need be, and files of the same names are replaced.
        kept: What a cut keeps by these scores: what it removes is crossed out, and lines say where it ends.
        config: The teacher's config, with `kept`.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_type = require("matplotlib.figure", extra="plots").Figure  # no pyplot: no window, no global state
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    normalized = scores.normalized()
    found = [] if kept is None else boundaries(scores, kept, config)
    drawings = {
        "heads": lambda axes: _draw_map(axes, normalized.heads, "KV group", kept, kept and kept.heads),
        "query_heads": lambda axes: _draw_map(
            axes, normalized.query_heads, "query head", kept, kept and kept.query_heads
        ),
        "neurons": lambda axes: _draw_neurons(axes, normalized.neurons, found),
        "hidden": lambda axes: _draw_spectrum(axes, normalized.hidden, found),
        "experts": lambda axes: _draw_map(axes, normalized.experts, "expert", kept, kept and kept.experts),
        "layers": lambda axes: _draw_layers(axes, normalized.layers, kept),
    }
    paths = []
    for name in scores.tensors():
        if name == "query_heads" and scores.query_heads.shape == scores.heads.shape:
            continue  # a head of its own in each group: the same picture
        figure = figure_type(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        drawings[name](axes)
        axes.set_title(_title(name, scores, [boundary for boundary in found if boundary.kind == name]))
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
        paths.append(folder / f"{name}.png")
    return paths


def _title(name: str, scores: ExpressiveScores, found: Sequence[Boundary]) -> str:
    title = f"{_TITLES[name]} of {scores.model_name or scores.model_type}, {scores.metric}"
    if not found:
        return title
    margins = sorted(boundary.margin for boundary in found)
    if len(margins) == 1:
        return f"{title}: margin {margins[0]:.2%}"
    return f"{title}: margins {margins[0]:.2%} to {margins[-1]:.2%}"


def _draw_map(
    axes: Axes, values: torch.Tensor, unit: str, kept: Kept | None, by_layer: dict[int, list[int]] | None
) -> None:
    """Layers × units, with crosses on what is removed."""
    _show(axes, values, unit)
    if kept is None:
        return
    removed = torch.ones_like(values, dtype=torch.bool)
    for layer in kept.layers:
        removed[layer, range(values.shape[1]) if by_layer is None else by_layer[layer]] = False
    rows, columns = removed.nonzero(as_tuple=True)
    axes.scatter(
        columns.tolist(), rows.tolist(), marker="x", color="red", s=max(2.0, 900 / max(values.shape)), linewidths=0.8
    )


def _draw_neurons(axes: Axes, values: torch.Tensor, found: Sequence[Boundary]) -> None:
    """Layers × deciles; every ranking keeps the same share, so that the boundary is one line."""
    by_decile = deciles(values)
    _show(axes, by_decile if by_decile.dim() == 2 else by_decile.mean(1), "decile of neurons, best first")
    axes.set_xticks(range(by_decile.shape[-1]), range(1, by_decile.shape[-1] + 1))
    for boundary in [boundary for boundary in found if boundary.kind == "neurons"][:1]:
        share = boundary.num_kept / boundary.num_units
        axes.axvline(share * by_decile.shape[-1] - 0.5, label=f"kept: {share:.1%}", **_MARK)
        axes.legend()


def _draw_spectrum(axes: Axes, values: torch.Tensor, found: Sequence[Boundary]) -> None:
    """Sorted scores of the hidden dimensions."""
    axes.plot(range(1, len(values) + 1), sorted(values.tolist(), reverse=True))
    axes.set(xlabel="hidden dimension, best first", ylabel="normalised score")
    if values.min() > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    for boundary in (boundary for boundary in found if boundary.kind == "hidden"):
        label = f"kept: {boundary.num_kept} of {boundary.num_units}, margin {boundary.margin:.2%}"
        axes.axvline(boundary.num_kept + 0.5, label=label, **_MARK)
        axes.legend()


def _draw_layers(axes: Axes, values: torch.Tensor, kept: Kept | None) -> None:
    colors = ["tab:blue" if kept is None or layer in kept.layers else "tab:red" for layer in range(len(values))]
    axes.bar(range(len(values)), values.tolist(), color=colors)
    axes.set(xlabel="layer" if kept is None else "layer (red: removed)", ylabel="normalised score")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _show(axes: Axes, values: torch.Tensor, unit: str) -> None:
    figure: Figure = axes.figure
    image: Any = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axes, label="normalised score")
    axes.set(xlabel=unit, ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):  # no layer 1.5
        axis.get_major_locator().set_params(integer=True)
