"""Output folders that appear under their name only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputFolderError


def require_empty(folder: str | os.PathLike, *, fix: str = "Name another folder, or empty this one.") -> None:
    """Raises `OutputFolderError` if `folder` exists and holds anything."""
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputFolderError("The output folder is not empty", found=str(folder), fix=fix)


@contextmanager
def complete_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; it becomes `folder` if the block succeeds, else it is removed.

    Raises:
        OutputFolderError: `folder` already holds something; nothing is written.
    """
    path = Path(folder)
    require_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
