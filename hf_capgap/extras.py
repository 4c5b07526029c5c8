"""Optional dependencies, asked for where they are used and named by the extra that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional `module`, or say which extra of `hf-capgap` installs it.

    Raises:
        MissingExtraError: The module (or a package that it needs) is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} cannot be imported", found=error, fix=f'Install it with: pip install "hf-capgap[{extra}]"'
        ) from error
