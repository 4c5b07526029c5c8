"""`hf-capgap verify`: the proof of a cut."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, VerificationError
from ..pruning import Kept, verify
from ..pruning.selection import KEPT_FILE_NAME
from .arguments import parse_arguments
from .main import COMMANDS, OK, PROG
from .models import load_model
from .printing import print_table

SUMMARY = COMMANDS["verify"]
_FAILED = 1
_DESCRIPTION = f"""{SUMMARY}.

TEACHER and STUDENT are folders (the teacher's may be a Hub id); the student's is one that `hf-capgap cut` wrote, and
that has not been trained since. Both run on random tokens in float32: the teacher with zeros on what the student
lacks, the student as it is, and the student saved and loaded again. All three must agree.

exit codes: 0 they agree, 1 they do not, 2 something cannot be loaded.

example:
  hf-capgap verify examples/demo_teacher student
"""


@dataclass
class VerifyOptions:
    """Which student, of which teacher."""

    teacher: str = field(default=None, metadata={"help": "Folder or Hub id. The option's name may be left out."})
    student: str = field(default=None, metadata={"help": "The student's folder. The option's name may be left out."})
    tolerance: float = field(default=1e-4, metadata={"help": "Largest difference of logits, absolute."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub teacher."})


def main(argv: Sequence[str]) -> int:
    """Parse, verify, report."""
    [options] = parse_arguments(
        [VerifyOptions],
        argv,
        description=_DESCRIPTION,
        prog=f"{PROG} verify",
        usage=f"{PROG} verify TEACHER STUDENT [options]",
        positionals=["teacher", "student"],
    )
    if not (Path(options.student) / KEPT_FILE_NAME).is_file():
        raise CheckpointError(
            f"The student's folder has no {KEPT_FILE_NAME}, which says what it keeps of its teacher",
            found=options.student,
            fix="Name a folder that `hf-capgap cut` wrote.",
        )
    kept = Kept.load(options.student)
    teacher, student = load_model(options.teacher, revision=options.revision), load_model(options.student)
    try:
        report = verify(teacher, student, kept=kept, tolerance=options.tolerance)
    except VerificationError as error:
        print(f"not verified: {error}", file=sys.stderr)
        return _FAILED
    print_table(
        "largest difference of logits",
        ("", "difference"),
        [
            ("masked teacher and student", f"{report.masked_difference:.1e}"),
            ("student and itself, saved and loaded", f"{report.reloaded_difference:.1e}"),
        ],
    )
    print(
        f"verified: {options.student} is what was cut out of {options.teacher}, {report.num_parameters:,} parameters"
    )
    return OK
