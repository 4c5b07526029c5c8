"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .devices import device_named
from .planning import Interval, Plan, TeacherRow
from .sizes import format_size


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan to a terminal, in colour where it has any."""
    console = console or Console()
    console.print(layout(plan))
    if plan.command:
        console.print(plan.command, soft_wrap=True, highlight=False, markup=False)  # one line, to be copied


def render_plan(plan: Plan, width: int | None = None) -> str:
    """See `Plan.render`."""
    console = Console(width=width or 140, no_color=True, color_system=None, force_terminal=False)
    with console.capture() as captured:
        print_plan(plan, console)
    return captured.get()


def layout(plan: Plan) -> RenderableType:
    """The table of candidates, then what the plan says in words."""
    return Group(_head(plan), *_tables(plan), *_paragraphs(plan))


def _head(plan: Plan) -> Text:
    low, high = map(format_size, plan.band)
    best = format_size(plan.best_teacher_params)
    return Text.assemble(
        ("student ", "dim"),
        (plan.student, "bold"),
        (f", {format_size(plan.num_tokens)} tokens. ", ""),
        f"Capacity-gap law: best teacher {best}, near-optimal from {low} to {high}.",
    )


def _tables(plan: Plan) -> Iterator[Table]:
    """What the laws say of each candidate, and what it costs; each narrow enough for 80 columns."""
    device = device_named(plan.settings.device).name
    has_price = plan.settings.price_per_hour is not None
    yield _table(
        plan,
        ["size", "x", "gap law", "loss", "student", "may lie in", "alone"],
        lambda row: [
            format_size(row.size.total),
            f"{row.ratio:.2f}",
            "nearest" if row.name == plan.best_by_capacity_gap else "near" if row.near_optimal else "far",
            f"{row.teacher_loss.value:.3f}",
            f"{row.student_loss.value:.3f}",
            _show_range(row.student_loss),
            f"{row.supervised_loss:.3f}",
        ],
    )
    yield _table(
        plan,
        ["FLOPs", f"{device} hours", *(["price"] if has_price else []), "GB/device", "cache GB"],
        lambda row: [
            f"{row.counted_flops:.2e}",
            f"{row.device_hours:,.0f}" if row.device_hours >= 10 else f"{row.device_hours:.2g}",
            *([f"{row.price:,.0f}"] if has_price else []),
            f"{row.memory.total / 1e9:,.0f}",
            f"{row.cache_bytes / 1e9:,.0f}",
        ],
    )


def _table(plan: Plan, headers: list[str], cells: Callable[[TeacherRow], list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("teacher", overflow="fold", min_width=12)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in plan.rows:
        chosen = row.name == plan.recommended
        table.add_row(f"{'>' if chosen else ' '} {row.name}", *cells(row), style="bold green" if chosen else None)
    return table


def _show_range(loss: Interval) -> str:
    return "" if loss.high - loss.low < 5e-4 else f"{loss.low:.3f}-{loss.high:.3f}"


def _paragraphs(plan: Plan) -> Iterator[RenderableType]:
    yield Text(plan.verdict, style="bold")
    if plan.disagreement:
        yield Text(f"\n{plan.disagreement}")
    notes = [f"{row.name}: {note}" for row in plan.rows for note in row.notes]
    rejected = [f"{name}: {reason}" for name, reason in plan.rejected.items()]
    for title, lines in (("not usable", rejected), ("notes", notes), ("beware", plan.warnings)):
        if lines:
            yield Text(f"\n{title}", style="yellow")
            yield Padding(Text("\n".join(f"- {line}" for line in lines)), (0, 0, 0, 2))
    s = plan.settings
    yield Text(
        f"\n{s.num_devices} x {s.device}, utilisation {s.utilisation:.0%}, {s.strategy}, blocks of {s.block_size:,}; "
        f"counted: {s.scenario}; cache: {s.cache_codec}. x: teacher over student. Losses in nats per token: the "
        "teacher's, the student's and between what it may lie, and the student's alone on the same tokens.",
        style="dim",
    )
    for name, source in plan.sources.items():
        yield Text(f"{name} law: {source}", style="dim")
    if plan.command:
        yield Text("\nnext", style="bold")
