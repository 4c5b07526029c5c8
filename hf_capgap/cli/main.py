"""`hf-capgap`: a table of commands, each in a module of its own that is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..errors import CapGapError

PROG = "hf-capgap"

# Command -> what it does. The module of the same name has `main(argv) -> int`.
COMMANDS = {
    "plan": "rank candidate teachers by the scaling laws and price them, from their configs alone",
    "score": "score the heads, neurons, hidden dimensions, experts and layers of a model",
    "scores": "look into a file of scores",
    "cut": "cut a student out of a teacher by its scores",
    "verify": "prove that a student computes what its teacher computes with the removed units masked",
}

OK, BAD_USAGE, INTERRUPTED = 0, 2, 130  # a command returns 1 if what it checks does not hold


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit code: 0, or 1 if a check failed, 2 for bad usage or an error (its message is on stderr), 130 after
        Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return BAD_USAGE
    try:
        command = parser.parse_args(argv[:1]).command
        with _short_warnings():
            return importlib.import_module(f"{__package__}.{command}").main(argv[1:])
    except SystemExit as ended:  # argparse has said what is wrong, or has printed help
        return ended.code
    except (CapGapError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return BAD_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} COMMAND [options]",
        description="Small language models, cut out of big ones and distilled from them.\n\ncommands:\n" + listing,
        epilog=f"'{PROG} COMMAND --help' explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings in one line, without the place in the code that gave them."""
    original = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = original


if __name__ == "__main__":
    sys.exit(main())
