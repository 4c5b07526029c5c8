"""`hf-capgap plan`: which teacher, how many tokens, at what price, and whether to distil at all."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

from ..errors import PlanError
from ..laws import Laws, PlanSettings, parse_size, plan
from ..laws.render import print_plan
from .main import COMMANDS, OK, PROG

SUMMARY = COMMANDS["plan"]
_DESCRIPTION = f"""{SUMMARY}.

Only configs are read, no weights. What the predictions rest on and where they end is in docs/laws.md.

examples:
  hf-capgap plan --student 3B --teachers Qwen/Qwen3-8B Qwen/Qwen3-14B meta-llama/Llama-3.1-8B --tokens 100B
  hf-capgap plan --student 3B --teachers folder/a folder/b --tokens 100B --teacher_tokens folder/a=15T folder/b=2T \\
      --device A100 --price_per_hour 1.5 --plot plan.png
"""
INCOMPLETE = 1


def main(argv: Sequence[str]) -> int:
    """Parse, plan, print.

    Returns:
        0 if every candidate could be used, 1 if some could not (the reasons are on stderr).

    Raises:
        CapGapError: What `plan` raises.
    """
    args = _parser().parse_args(argv)
    answer = plan(
        args.student,
        args.teachers,
        args.tokens,
        laws=Laws.load(args.laws) if args.laws else None,
        teacher_tokens=_by_name(args.teacher_tokens, parse_size),
        teacher_losses=_by_name(args.teacher_losses, _number),
        settings=PlanSettings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(PlanSettings)}),
    )
    picture = answer.plot(args.plot) if args.plot else None
    if args.json:
        print(json.dumps(answer.to_dict(), indent=2, allow_nan=False))
    else:
        print_plan(answer)
    if picture is not None:
        print(f"plot: {picture}", file=sys.stderr)
    for name, reason in answer.rejected.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    return INCOMPLETE if answer.rejected else OK


def _parser() -> argparse.ArgumentParser:
    """Not `arguments.parse_arguments`: that one imports transformers, which takes longer than the whole plan."""
    parser = argparse.ArgumentParser(
        prog=f"{PROG} plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--student", required=True, help='Size of the student with its embeddings ("3B"), or its Hub id or folder.')
    add("--teachers", required=True, nargs="+", metavar="MODEL", help="Candidates: Hub ids or folders.")
    add("--tokens", required=True, help='Tokens to distil on ("100B").')
    add(
        *_spellings("teacher_tokens"),
        nargs="+",
        metavar="TOKENS",
        help='What the teachers were trained on: "15T" for all of them, or MODEL=15T.',
    )
    add(*_spellings("teacher_losses"), nargs="+", metavar="MODEL=LOSS", help="Measured losses, in nats per token.")
    add("--laws", metavar="FILE.json", help="Fitted laws (Laws.save); the published ones if not given.")
    add("--json", action="store_true", help="Print JSON instead of a table.")
    add("--plot", metavar="FILE.png", help="Draw student loss against teacher size.")
    hints = get_type_hints(PlanSettings)
    for field in dataclasses.fields(PlanSettings):
        hint = hints[field.name]
        kind = next(kind for kind in (bool, int, float, str) if kind in (hint, *get_args(hint)))
        default = "" if field.default is None else f" Default: {field.default}."
        add(
            *_spellings(field.name),
            default=field.default,
            choices=field.metadata.get("choices"),
            help=(field.metadata["help"] + default).replace("%", "%%"),
            **({"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}),
        )
    return parser


def _spellings(name: str) -> list[str]:
    """With underscores, as the scripts' options are, and with dashes."""
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _by_name(items: Sequence[str] | None, read: Callable[[str], float]) -> Any:
    """`["15T"]` -> 15e12; `["a/b=15T", "c=2T"]` -> a mapping; None stays None.

    Raises:
        PlanError: Several values without a name, or both kinds.
    """
    if items is None:
        return None
    pairs = [item.rpartition("=") for item in items]
    if len(pairs) == 1 and not pairs[0][1] and read is parse_size:
        return read(items[0])
    nameless = [item for item, (name, equals, _) in zip(items, pairs) if not (name and equals)]
    if nameless:
        raise PlanError("Something is said of no teacher", found=", ".join(nameless), fix="Write MODEL=VALUE.")
    return {name: read(value) for name, _, value in pairs}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PlanError("Not a number", found=text, fix="A loss is in nats per token: 2.05.") from None
