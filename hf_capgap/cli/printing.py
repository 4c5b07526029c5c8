"""What the commands print: tables for people, and the command that comes next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from ..pruning import METRICS, ExpressiveScores


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout, the first column to the left and numbers to the right."""
    table = Table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    print(f"{title}:")  # a table's own title wraps at its width
    Console(highlight=False, markup=False, emoji=False).print(table)


def print_next(what: str, command: Sequence[object]) -> None:
    """Print a command that can be pasted into a shell."""
    print(f"{what}:\n  {shlex.join(map(str, command))}")


def print_scores(scores: ExpressiveScores) -> None:
    """Print what scores are of, and how large they are."""
    metric = METRICS[scores.metric].text if scores.metric in METRICS else "of an unknown kind"
    revision = f" at {scores.revision}" if scores.revision else ""
    print(f"model: {scores.model_name or 'unnamed'} ({scores.model_type}){revision}")
    print(f"metric: {scores.metric}, {metric}")
    print(f"calibration: mean over {scores.num_units:,} {plural(scores.unit, scores.num_units)}, {_data_of(scores)}\n")
    rows = [
        (name, " x ".join(map(str, values.shape)), *(f"{number:.3g}" for number in (low, values.median(), high)))
        for name, values in scores.tensors().items()
        for low, high in [values.aminmax()]
    ]
    print_table("scores", ("of", "units", "min", "median", "max"), rows)


def plural(noun: str, number: int) -> str:
    """ "batch" -> "batches"."""
    return noun if number == 1 else f"{noun}{'es' if noun.endswith('ch') else 's'}"


def _data_of(scores: ExpressiveScores) -> str:
    has_data = int(scores.calibration_hash or "0", 16) != 0
    return f"data {scores.calibration_hash[:12]}" if has_data else "no data"
