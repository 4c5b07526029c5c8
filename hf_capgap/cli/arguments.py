"""Dataclasses from a command line and a YAML file: the command line wins over the file, the file over the defaults."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import ConfigError

CONFIG_OPTION = "--config"
_BOOL = "tag:yaml.org,2002:bool"
_FLOAT = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: `no` is a string (`save_strategy: no`), and `1e-4` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions keep their lines, for the examples in them; None is a default that the help itself explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default is None else super()._get_help_string(action)


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    prog: str | None = None,
    usage: str | None = None,
    positionals: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse `argv` into one instance of each dataclass, after the defaults of `--config FILE.yaml`.

    Args:
        dataclass_types: The dataclasses whose fields are the options, each documented by its field's `help`.
        argv: Arguments without the program's name; `sys.argv[1:]` if None.
        description: What `--help` says first, with its own line breaks.
        prog: The program's name in messages; that of the script if None.
        usage: The usage line, instead of one that names every option.
        positionals: Options with text for a value and None for a default that must be given: by name, in the file, or,
            in this order, as words without a name.

    Raises:
        ConfigError: A YAML file that is missing or malformed, an unknown option in it or on the command line, or a
            null, list or mapping for an option that takes none.
    """
    parser = HfArgumentParser(
        list(dataclass_types),
        description=description,
        prog=prog,
        usage=usage,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        CONFIG_OPTION, metavar="FILE.yaml", help="Options from a YAML file; the command line overrides them."
    )
    kinds = _option_kinds(dataclass_types)
    argv = list(sys.argv[1:] if argv is None else argv)
    named = {argument.partition("=")[0] for argument in argv}
    given, _ = _config_parser().parse_known_args(argv)
    if given.config is not None:
        argv = [*_apply(_read_options(given.config), kinds, parser, given.config), *argv]
    *instances, _, unknown = parser.parse_args_into_dataclasses(
        args=argv, return_remaining_strings=True, look_for_args_file=False
    )
    unknown_options = [argument for argument in unknown if argument.startswith("-")]
    words = _take_words(unknown, [name for name in positionals if f"--{name}" not in named], instances)
    for found in (*unknown_options, *words):
        raise ConfigError("Unknown option on the command line", found=found, fix=_suggest(found.lstrip("-"), kinds))
    missing = [name for name in positionals if _owner(name, instances)[name] is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing).upper()}")
    return tuple(instances)


def _take_words(words: list[str], names: Sequence[str], instances: Sequence[Any]) -> list[str]:
    """Sets the options `names` to `words`, one each; returns the words that are left."""
    for name, word in zip(names, words, strict=False):
        _owner(name, instances)[name] = word
    return words[len(names) :]


def _owner(name: str, instances: Sequence[Any]) -> dict[str, Any]:
    """The fields of the dataclass that has the option."""
    return next(vars(instance) for instance in instances if name in vars(instance))


def _config_parser() -> HfArgumentParser:
    parser = HfArgumentParser([], add_help=False, allow_abbrev=False)
    parser.add_argument(CONFIG_OPTION)
    return parser


def _option_kinds(dataclass_types: Sequence[type]) -> dict[str, set[Any]]:
    """Name of each option -> the types that its annotation allows, without their parameters."""
    kinds = {}
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            hint = hints[field.name]
            members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if field.init:
                kinds[field.name] = {get_origin(member) or member for member in members}
    return kinds


def _read_options(path: str) -> dict[str, Any]:
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError("The configuration file cannot be read", found=f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("The configuration file is not valid YAML", found=f"{path}: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(
            "The configuration file must map options to values", found=f"{path}: {type(options).__name__}"
        )
    return options


def _apply(options: dict[str, Any], kinds: dict[str, set[Any]], parser: HfArgumentParser, path: str) -> list[str]:
    """The options as command-line arguments, so that both sources are typed and checked by the same parser.

    What a command line cannot say (null, a mapping, some lists) becomes the parser's default instead.
    """
    arguments = []
    for name, value in options.items():
        if name not in kinds:
            raise ConfigError(f"Unknown option in {path}", found=name, fix=_suggest(str(name), kinds))
        if value is not None and not isinstance(value, (dict, list)):
            arguments.append(f"--{name}={value}")
            continue
        if type(value) not in kinds[name]:
            kind = {dict: "mapping", list: "list"}.get(type(value), "null")
            raise ConfigError(f"The option '{name}' in {path} takes no {kind}", found=value, fix="See --help.")
        items = [str(item) for item in value] if isinstance(value, list) else []
        if items and str not in kinds[name] and not any(item.startswith("-") for item in items):
            arguments += [f"--{name}", *items]
        else:
            parser.set_defaults(**{name: value})
    return arguments


def _suggest(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name.partition("=")[0].replace("-", "_"), known, n=1)
    return f"Did you mean '{near[0]}'?" if near else "See --help."
