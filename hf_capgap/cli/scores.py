"""`hf-capgap scores`: look into a file of scores."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..families import Config
from ..output import require_empty
from ..pruning import ExpressiveScores, Kept, select
from ..pruning.pictures import Boundary, boundaries, draw_scores
from .arguments import parse_arguments
from .main import COMMANDS, OK, PROG
from .models import load_config
from .printing import print_scores, print_table
from .shape_options import ShapeOptions

SUMMARY = COMMANDS["scores"]
_DESCRIPTION = """print what scores are of and how large they are, and draw them.

FILE is what `hf-capgap score` wrote. With --output_dir there is a PNG for each kind of unit: layers x KV groups,
layers x deciles of neurons, the sorted hidden dimensions, the layers, and query heads and experts where there are any.

With --model and a target (or sizes) it also shows where a cut would end, as `hf-capgap cut` would make it: removed
units are crossed out, and the margin says how far the worst unit that stays is ahead of the best one that goes. A
margin near 0 means that the choice between these two hangs on noise.

examples:
  hf-capgap scores show scores.safetensors
  hf-capgap scores show scores.safetensors --output_dir pictures
  hf-capgap scores show scores.safetensors --output_dir pictures --model examples/demo_teacher --target 40%
"""


@dataclass
class ShowOptions:
    """Which scores to show, and where to draw them."""

    scores: str = field(default=None, metadata={"help": "File of scores. The option's name may be left out."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the pictures; there are none if not given."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Draw into a folder that already holds something."})
    model: str | None = field(
        default=None,
        metadata={"help": "The teacher, whose config a cut needs: folder or Hub id. Its weights are not read."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})


def main(argv: Sequence[str]) -> int:
    """Run a sub-command."""
    parser = argparse.ArgumentParser(
        prog=f"{PROG} scores",
        usage=f"{PROG} scores show FILE [options]",
        description=f"{SUMMARY}.\n\ncommands:\n  show  print a summary and draw pictures",
        epilog=f"'{PROG} scores show --help' explains it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["show"], help=argparse.SUPPRESS)
    parser.parse_args(argv[:1])
    return show(argv[1:])


def show(argv: Sequence[str]) -> int:
    """Parse, print, draw."""
    options, shape_options = parse_arguments(
        [ShowOptions, ShapeOptions],
        argv,
        description=_DESCRIPTION,
        prog=f"{PROG} scores show",
        usage=f"{PROG} scores show FILE [--output_dir FOLDER] [--model MODEL (--target SIZE | sizes)] [options]",
        positionals=["scores"],
    )
    if shape_options.is_given != (options.model is not None):
        raise ConfigError("A cut needs both --model and a --target or sizes", fix="Give both, or neither.")
    if options.output_dir is not None and not options.overwrite:
        require_empty(options.output_dir, fix="Name another --output_dir, or pass --overwrite.")
    scores = ExpressiveScores.load(options.scores)
    config, kept = None, None
    if options.model is not None:
        config = load_config(options.model, options.revision)
        kept = _select(scores, shape_options, config)
    print_scores(scores)
    if kept is not None:
        report_boundaries(boundaries(scores, kept, config))
    if options.output_dir is not None:
        paths = draw_scores(scores, options.output_dir, kept=kept, config=config)
        print("\npictures:\n" + "\n".join(f"  {path}" for path in paths))
    return OK


def _select(scores: ExpressiveScores, options: ShapeOptions, config: Config) -> Kept:
    shape = options.shape(config, scores)
    print(f"{shape}\n")
    return select(scores, shape, config, layers=options.kept_layers(), protect_ends=options.protect_ends)


def report_boundaries(found: Sequence[Boundary]) -> None:
    """Print the boundary of each ranking; of several in one layer that with the smallest margin."""
    by_ranking = defaultdict(list)
    for boundary in found:
        by_ranking[boundary.kind, boundary.row[:1]].append(boundary)
    rows = []
    for (kind, row), group in sorted(by_ranking.items()):
        closest = min(group, key=lambda boundary: boundary.margin)
        rows.append(
            (
                kind,
                row[0] if row else "all",
                f"{closest.num_kept} of {closest.num_units}",
                f"{closest.last_kept:.3g}",
                f"{closest.first_removed:.3g}",
                f"{closest.margin:.2%}",
            )
        )
    title = "boundary (of the experts or KV groups of a layer the one with the smallest margin)"
    print_table(title, ("of", "layer", "kept", "last kept", "first removed", "margin"), rows)
