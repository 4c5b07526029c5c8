"""Figures of fits and plans. Needs matplotlib, which is asked for only here and only when something is drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PlanError
from ..extras import require
from .sizes import format_size

if TYPE_CHECKING:
    from .fits import Fit
    from .planning import Plan


def plot_residuals(fit: Fit[Any], path: str | os.PathLike) -> Path:
    """Residuals of a fit, in percent, against every input of its law and against the predicted loss."""
    figure_module = require("matplotlib.figure", extra="plots")
    columns = {
        name: np.array([getattr(record, name) for record in fit.records], dtype=float) for name in fit.law.ranges
    }
    columns["predicted loss"] = fit.predicted
    figure = figure_module.Figure(figsize=(4 * len(columns), 3.5), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, columns.items()):
        axes.axhline(0.0, color="0.5", linewidth=1)
        axes.plot(values, 100 * fit.residuals, "o", markersize=4, alpha=0.7, label="fitted")
        axes.plot(values, 100 * fit.held_out_residuals, "x", markersize=4, alpha=0.7, label="held out")
        axes.set_xlabel(name)
        if name.startswith("num_"):
            axes.set_xscale("log")
    panels[0].set_ylabel("log measured - log predicted, %")
    panels[0].legend()
    figure.suptitle(f"{type(fit.law).__name__}, {len(fit.records)} runs: median error {fit.median_error:.2%}")
    return _save(figure, path)


def plot_plan(plan: Plan, path: str | os.PathLike) -> Path:
    """Predicted student loss against teacher size, with the optimum, the capacity-gap band and the candidates."""
    figure = require("matplotlib.figure", extra="plots").Figure(figsize=(8, 5), layout="constrained")
    axes, curve = figure.subplots(), plan.curve
    axes.plot(
        curve.teacher_params,
        curve.student_loss,
        label=f"distillation law (teachers with {curve.tokens_per_param:.0f} tokens per parameter)",
    )
    axes.axhline(curve.supervised_loss, color="0.5", linestyle="--", label="text alone, the same tokens")
    axes.plot(
        curve.best_teacher_params,
        min(curve.student_loss),
        "*",
        markersize=14,
        label=f"optimum, {format_size(curve.best_teacher_params)}",
    )
    axes.axvspan(
        *band_outside_embeddings(plan), alpha=0.12, color="tab:green", label="near-optimal by the capacity-gap law"
    )
    for row in plan.rows:
        loss, size = row.student_loss, row.size.non_embedding
        chosen = row.name == plan.recommended
        axes.errorbar(
            size,
            loss.value,
            yerr=[[loss.value - loss.low], [loss.high - loss.value]],
            fmt="o",
            color="tab:green" if chosen else "tab:red",
            capsize=3,
        )
        axes.annotate(row.name, (size, loss.value), textcoords="offset points", xytext=(5, 6), fontsize=8)
    axes.set_xscale("log")
    axes.set(
        xlabel="teacher parameters outside the embeddings",
        ylabel="predicted student loss, nats per token",
        title=f"student {plan.student}, {format_size(plan.num_tokens)} tokens",
    )
    axes.legend(fontsize=8)
    return _save(figure, path)


def band_outside_embeddings(plan: Plan) -> tuple[float, float]:
    """The capacity-gap law's band, which is of all parameters, on an axis without embeddings: by the share that the
    recommended teacher has outside them."""
    size = plan.row(plan.recommended).size
    return tuple(end * size.non_embedding / size.total for end in plan.band)


def _save(figure: Any, path: str | os.PathLike) -> Path:
    path = Path(path)
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise PlanError("Not an image file", found=path.name, fix=f"Known endings: {', '.join(sorted(kinds))}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        figure.savefig(partial, dpi=120)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
