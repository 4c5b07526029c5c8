"""`hf-capgap cut`: from a teacher's folder and its scores to a student's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..families import Config
from ..output import require_empty
from ..pruning import ExpressiveScores, Kept, Profile, StudentShape, cut, global_profile
from .arguments import parse_arguments
from .main import COMMANDS, OK, PROG
from .models import load_config
from .printing import print_next, print_table
from .shape_options import ShapeOptions

SUMMARY = COMMANDS["cut"]
_DESCRIPTION = f"""{SUMMARY}.

MODEL is the teacher's folder or Hub id, and --scores the file that `hf-capgap score` wrote of it. The student's folder
is a plain Hugging Face model: AutoModelForCausalLM loads it. Tensors go from the teacher's files to the student's one
by one, so that this needs little memory and no GPU, however large the teacher is.

examples:
  hf-capgap cut examples/demo_teacher --scores scores.safetensors --target 40% --output_dir student
  hf-capgap cut org/model --scores scores.safetensors --target 3B --num_hidden_layers 24 --output_dir student
  hf-capgap cut org/model --scores scores.safetensors --hidden_size 3072 --intermediate_size 8192 --output_dir student
  hf-capgap cut org/model --scores scores.safetensors --layers 0,1,2,3,28,29,30,31 --output_dir shallow
"""


@dataclass
class CutOptions:
    """What to cut, by which scores, and where to write it."""

    model: str = field(
        default=None, metadata={"help": "The teacher: folder or Hub id. The option's name may be left out."}
    )
    scores: str = field(default=None, metadata={"help": "The teacher's scores, from `hf-capgap score`."})
    output_dir: str = field(default="student", metadata={"help": "Folder of the student: a new or an empty one."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of the student's weights."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})


def main(argv: Sequence[str]) -> int:
    """Parse, cut, report."""
    options, shape_options = parse_arguments(
        [CutOptions, ShapeOptions],
        argv,
        description=_DESCRIPTION,
        prog=f"{PROG} cut",
        usage=f"{PROG} cut MODEL --scores FILE (--target SIZE | sizes) [--output_dir FOLDER] [options]",
        positionals=["model", "scores"],
    )
    require_empty(options.output_dir, fix="Name another --output_dir, or empty this one.")
    scores = ExpressiveScores.load(options.scores)
    config = load_config(options.model, options.revision)
    shape = shape_options.shape(config, scores)
    cut(
        options.model,
        scores,
        shape,
        shape_options.kept_layers(),
        protect_ends=shape_options.protect_ends,
        output_dir=options.output_dir,
        max_shard_size=options.max_shard_size,
        revision=options.revision,
    )
    kept = Kept.load(options.output_dir)
    report_sizes(shape, config)
    report_profile(global_profile(scores, shape, config, layers=kept.layers), shape)
    print(f"\nstudent: {options.output_dir}")
    print_next("next, prove the cut", [PROG, "verify", options.model, options.output_dir])
    print_next(
        "then, let the teacher teach it",
        ["accelerate", "launch", "examples/distill.py", "--teacher", options.model, "--student", options.output_dir],
    )
    return OK


def report_sizes(shape: StudentShape, config: Config) -> None:
    """Print the sizes of teacher and student, and their parameters."""
    teacher = StudentShape.of(config)
    sizes = {**teacher.as_dict(), **shape.as_dict()}
    rows = [(name, full, sizes[name], f"{sizes[name] / full:.0%}") for name, full in teacher.as_dict().items()]
    before, after = (one.num_parameters(config) for one in (teacher, shape))
    rows.append(("parameters", f"{before:,}", f"{after:,}", f"{after / before:.1%}"))
    print_table("the cut", ("", "teacher", "student", "kept"), rows)


def report_profile(profile: Profile, shape: StudentShape) -> None:
    """Print what a global ranking would keep in each layer, and how much more of the scores it would keep."""
    uniform = profile.symmetric()
    each = {
        "heads": uniform["num_key_value_heads"] * profile.rows_per_layer["heads"],
        "neurons": uniform["intermediate_size"] * profile.rows_per_layer["neurons"],
    }
    layers = list(profile.kept["heads"])
    print_table(
        "units kept in each layer if all layers competed (this cut keeps the same number in each)",
        ("layer", *profile.kept),
        [
            *((layer, *(profile.kept[kind][layer] for kind in profile.kept)) for layer in layers),
            ("this cut", *(each[kind] for kind in profile.kept)),
        ],
    )
    print_table(
        "share of the scores kept",
        ("", *profile.kept),
        [
            (name, *(f"{share[kind]:.1%}" for kind in profile.kept))
            for name, share in (("all layers competing", profile.share), ("this cut", profile.uniform_share))
        ],
    )
