"""Where a script writes: the folder that was named, or a new one."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import broadcast_object_list

from ..output import require_empty
from .ranks import this_rank

AUTO = "auto"


def prepare_output_dir(given: str, *, name: str, overwrite: bool = False) -> Path:
    """The folder `given` if it is free, or for `"auto"` the first free outputs/NAME-N; the same on all ranks.

    Raises:
        OutputFolderError: It holds something, and `overwrite` is not set.
    """
    state = this_rank()
    [chosen] = broadcast_object_list([_first_free(name) if given == AUTO else given])
    output_dir = Path(chosen)
    if not overwrite:
        require_empty(output_dir, fix="Name another --output_dir, or pass --overwrite_output_dir true.")
    state.wait_for_everyone()
    return output_dir


def _first_free(name: str) -> str:
    return next(folder for n in range(1, 10**6) if not Path(folder := f"outputs/{name}-{n}").exists())
