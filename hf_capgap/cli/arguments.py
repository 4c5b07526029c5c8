"""Dataclasses from a command line and a YAML file: the command line wins over the file, the file over the defaults."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..errors import ConfigError

CONFIG_OPTION = "--config"


def parse_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, *, description: str | None = None
) -> tuple[Any, ...]:
    """Parse `argv` into one instance of each dataclass, after the defaults of `--config FILE.yaml`.

    Args:
        dataclass_types: The dataclasses whose fields are the options, each documented by its field's `help`.
        argv: Arguments without the program's name; `sys.argv[1:]` if None.
        description: What `--help` says first.

    Raises:
        ConfigError: A YAML file that is missing, malformed, or names an unknown option.
    """
    parser = HfArgumentParser(list(dataclass_types), description=description, allow_abbrev=False)
    parser.add_argument(
        CONFIG_OPTION, metavar="FILE.yaml", help="Options from a YAML file; the command line overrides them."
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    given, _ = _config_parser().parse_known_args(argv)
    if given.config is not None:
        argv = [*_as_arguments(_read_options(given.config), parser, given.config), *argv]
    *instances, _ = parser.parse_args_into_dataclasses(args=argv)
    return tuple(instances)


def _config_parser() -> HfArgumentParser:
    parser = HfArgumentParser([], add_help=False, allow_abbrev=False)
    parser.add_argument(CONFIG_OPTION)
    return parser


def _read_options(path: str) -> dict[str, Any]:
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("The configuration file cannot be read", found=f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError("The configuration file is not valid YAML", found=f"{path}: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(
            "The configuration file must map options to values", found=f"{path}: {type(options).__name__}"
        )
    return options


def _as_arguments(options: dict[str, Any], parser: HfArgumentParser, path: str) -> list[str]:
    """The options as command-line arguments, so that both sources are typed and checked by the same parser."""
    known = {action.dest for action in parser._actions} - {"help", "config"}
    arguments = []
    for name, value in options.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            raise ConfigError(
                f"Unknown option in {path}", found=name, fix=f"Did you mean '{near[0]}'?" if near else "See --help."
            )
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(yaml.safe_dump(v).strip() if isinstance(v, dict) else str(v) for v in values)]
    return arguments
