"""Defaults < YAML < command line, and every value arrives as it was meant."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_capgap import DistillationConfig
from hf_capgap.cli.arguments import parse_arguments
from hf_capgap.errors import ConfigError


@dataclass
class Options:
    """Options of every kind."""

    name: str = field(default="default", metadata={"help": "A string."})
    count: int = field(default=1, metadata={"help": "An integer."})
    rate: float = field(default=0.5, metadata={"help": "A number."})
    wanted: bool = field(default=False, metadata={"help": "A switch that is off."})
    kept: bool = field(default=True, metadata={"help": "A switch that is on."})
    maybe: int | None = field(default=7, metadata={"help": "An integer or nothing."})
    words: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Strings."})
    numbers: list[float] = field(default_factory=list, metadata={"help": "Numbers."})
    report: None | str | list[str] = field(default="none", metadata={"help": "One or several."})
    extra: dict | str | None = field(default=None, metadata={"help": "A mapping, or JSON."})


@dataclass
class RequiredOptions:
    """Options without a default."""

    files: list[str] = field(metadata={"help": "Files."})
    size: int = field(metadata={"help": "A size."})


def parse(tmp_path: Path, yaml: str, *argv: str, options: type = Options) -> Options:
    path = tmp_path / "options.yaml"
    path.write_text(yaml, encoding="utf-8")
    [parsed] = parse_arguments([options], ["--config", str(path), *argv])
    return parsed


# Precedence.


def test_defaults_hold_without_arguments() -> None:
    assert parse_arguments([Options], []) == (Options(),)


def test_yaml_wins_over_defaults_and_the_command_line_over_yaml(tmp_path: Path) -> None:
    parsed = parse(tmp_path, "name: yaml\ncount: 2\nrate: 0.25\n", "--count", "3")
    assert parsed == Options(name="yaml", count=3, rate=0.25)


@pytest.mark.parametrize(
    ("yaml", "argv", "expected"),
    [
        ("kept: false", ["--kept"], {"kept": True}),
        ("kept: true", ["--no_kept"], {"kept": False}),
        ("wanted: true", ["--wanted", "false"], {"wanted": False}),
        ("words: [b, c]", ["--words", "d"], {"words": ["d"]}),
        ("words: [--b]", ["--words", "d"], {"words": ["d"]}),
        ("words: []", ["--words", "d"], {"words": ["d"]}),
        ("maybe: null", ["--maybe", "3"], {"maybe": 3}),
        ("report: [x, y]", ["--report", "z"], {"report": "z"}),
        ("extra: {a: 1}", ["--extra", "text"], {"extra": "text"}),
    ],
)
def test_the_command_line_wins_for_every_kind_of_value(
    tmp_path: Path, yaml: str, argv: list[str], expected: dict[str, object]
) -> None:
    assert parse(tmp_path, yaml, *argv) == Options(**expected)


def test_the_place_of_config_on_the_command_line_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("count: 2\nname: yaml\n", encoding="utf-8")
    assert parse_arguments([Options], ["--count", "3", f"--config={path}"]) == (Options(name="yaml", count=3),)


def test_arguments_default_to_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--count", "5"])
    assert parse_arguments([Options]) == (Options(count=5),)


def test_no_other_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.args").write_text("--count 5")  # HfArgumentParser reads it if it is let
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program.py")])
    assert parse_arguments([Options]) == (Options(),)


def test_each_dataclass_gets_its_own_options(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("alpha: 0.25\nfiles: [a.txt, b.txt]\n", encoding="utf-8")
    argv = ["--config", str(path), "--size", "3", "--temperature", "2"]
    required, config = parse_arguments([RequiredOptions, DistillationConfig], argv)
    assert required == RequiredOptions(files=["a.txt", "b.txt"], size=3)
    assert (config.alpha, config.temperature) == (0.25, 2.0)


# Values from YAML.


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("name: two words", {"name": "two words"}),
        ("name: ''", {"name": ""}),
        ("name: --foo", {"name": "--foo"}),
        ("name: '--count=3'", {"name": "--count=3"}),
        ("name: '-'", {"name": "-"}),
        ("name: 'a=b'", {"name": "a=b"}),
        ("name: |\n  two\n  lines\n", {"name": "two\nlines\n"}),
        ("name: äöü 日本", {"name": "äöü 日本"}),
        ("name: 2020-01-31", {"name": "2020-01-31"}),
        ("name: 12", {"name": "12"}),
        ("count: -5", {"count": -5}),
        ("rate: -0.25", {"rate": -0.25}),
        ("rate: -1e-5", {"rate": -1e-5}),
        ("rate: 1e-5", {"rate": 1e-5}),
        ("rate: .inf", {"rate": float("inf")}),
        ("rate: 3", {"rate": 3.0}),
        ("wanted: true", {"wanted": True}),
        ("wanted: yes", {"wanted": True}),
        ("kept: False", {"kept": False}),
        ("kept: no", {"kept": False}),
        ("name: no", {"name": "no"}),
        ("name: off", {"name": "off"}),
        ("maybe: null", {"maybe": None}),
        ("maybe: ~", {"maybe": None}),
        ("maybe:", {"maybe": None}),
        ("report: null", {"report": None}),
        ("report: one", {"report": "one"}),
        ("report: [one, two]", {"report": ["one", "two"]}),
        ("words: []", {"words": []}),
        ("words: [one]", {"words": ["one"]}),
        ("words: [two words, 'no', x=y]", {"words": ["two words", "no", "x=y"]}),
        ("words: [--foo, -x]", {"words": ["--foo", "-x"]}),
        ("words: [1, 2]", {"words": ["1", "2"]}),
        ("numbers: [1, 2.5, 1e-4]", {"numbers": [1.0, 2.5, 1e-4]}),
        ("numbers: [-1, -2.5, -1e-4]", {"numbers": [-1.0, -2.5, -1e-4]}),
        ("extra: {a: 1, b: [true, null]}", {"extra": {"a": 1, "b": [True, None]}}),
        ("extra: {a: {b: -1e-4, c: no}}", {"extra": {"a": {"b": -1e-4, "c": "no"}}}),
        ("extra: {}", {"extra": {}}),
        ("{}", {}),
    ],
)
def test_a_yaml_value_arrives_as_it_was_meant(tmp_path: Path, yaml: str, expected: dict[str, object]) -> None:
    parsed = parse(tmp_path, yaml)
    assert parsed == Options(**expected)
    for name, value in expected.items():
        assert type(getattr(parsed, name)) is type(value)


def test_training_options_arrive_as_they_were_meant(tmp_path: Path) -> None:
    yaml = """
        learning_rate: 2e-4
        save_strategy: no
        eval_strategy: steps
        bf16: false
        report_to: [none]
        label_names: [labels]
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs:
          min_lr: 1e-5
        liger_kernel_config: {rope: true}
        teacher_init_kwargs:
          dtype: bfloat16
          device_map: {"": 0}
    """
    config = parse(tmp_path, yaml, options=DistillationConfig)
    assert config.learning_rate == 2e-4
    assert config.save_strategy == "no"
    assert config.eval_strategy == "steps"
    assert config.bf16 is False
    assert config.label_names == ["labels"]
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert config.liger_kernel_config == {"rope": True}
    assert config.teacher_init_kwargs == {"dtype": "bfloat16", "device_map": {"": 0}}


def test_json_on_the_command_line_is_the_same_as_a_yaml_mapping(tmp_path: Path) -> None:
    [from_json] = parse_arguments([DistillationConfig], ["--lr_scheduler_kwargs", '{"min_lr": 1e-5}'])
    from_yaml = parse(tmp_path, "lr_scheduler_kwargs: {min_lr: 1e-5}", options=DistillationConfig)
    assert from_json.lr_scheduler_kwargs == from_yaml.lr_scheduler_kwargs == {"min_lr": 1e-5}


# What is refused.


@pytest.mark.parametrize(
    ("options", "key", "suggestion"),
    [
        (Options, "cuont", "Did you mean 'count'?"),
        (DistillationConfig, "temprature", "Did you mean 'temperature'?"),
        (DistillationConfig, "per-device-train-batch-size", "Did you mean 'per_device_train_batch_size'?"),
        (Options, "zzz", "See --help."),
        (Options, "help", "See --help."),
        (Options, "config", "See --help."),
        (Options, "3", "See --help."),
    ],
)
def test_an_unknown_yaml_key_is_refused_with_the_nearest(
    tmp_path: Path, options: type, key: str, suggestion: str
) -> None:
    with pytest.raises(ConfigError, match=f"Unknown option in .*options.yaml \\(found: {key}\\)") as caught:
        parse(tmp_path, f"{key}: 1", options=options)
    assert str(caught.value).endswith(suggestion)


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [("--cuont=2", "Did you mean 'count'?"), ("--temprature", "See --help."), ("qqq", "See --help.")],
)
def test_an_unknown_argument_is_refused_with_the_nearest(argument: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"Unknown option on the command line \\(found: {argument}\\)") as caught:
        parse_arguments([Options], [argument])
    assert str(caught.value).endswith(suggestion)


def test_an_abbreviated_argument_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match="--cou"):
        parse_arguments([Options], ["--cou=2"])


@pytest.mark.parametrize("content", ["name: [unclosed", "name: 'unclosed", "a: b: c", b"name: \xff"])
def test_malformed_yaml_is_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "options.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"not valid YAML \(found: .*options\.yaml: "):
        parse_arguments([Options], ["--config", str(path)])


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse(tmp_path, f"name: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'touched'}]")
    assert not (tmp_path / "touched").exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(found: .*missing\.yaml: No such file"):
        parse_arguments([Options], ["--config", str(tmp_path / "missing.yaml")])
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_arguments([Options], ["--config", str(tmp_path)])


@pytest.mark.parametrize(
    ("yaml", "kind"), [("- a\n- b", "list"), ("just text", "str"), ("", "NoneType"), ("3", "int")]
)
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, yaml: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"must map options to values .*: {kind}"):
        parse(tmp_path, yaml)


@pytest.mark.parametrize(
    ("yaml", "kind"),
    [("count: null", "null"), ("wanted:", "null"), ("name: {a: 1}", "mapping"), ("rate: [0.1]", "list")],
)
def test_a_value_that_the_option_cannot_hold_is_refused(tmp_path: Path, yaml: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"The option '{yaml.split(':')[0]}' in .* takes no {kind}"):
        parse(tmp_path, yaml)


@pytest.mark.parametrize(
    ("options", "yaml"),
    [
        (Options, "count: many"),
        (Options, "count: 1.5"),
        (Options, "rate: fast"),
        (Options, "wanted: perhaps"),
        (Options, "numbers: [1, two]"),
        (DistillationConfig, "divergence: manhattan"),
    ],
)
def test_a_value_of_the_wrong_type_ends_the_program_with_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: type, yaml: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, yaml, options=options)
    assert ended.value.code == 2
    assert f"error: argument --{yaml.split(':')[0]}" in capsys.readouterr().err


def test_a_required_option_that_is_nowhere_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([RequiredOptions], ["--size", "3"])
    assert "the following arguments are required: --files" in capsys.readouterr().err


# Words without a name.


@dataclass
class WordOptions:
    """Two that may be given without their names."""

    source: str = field(default=None, metadata={"help": "Where from."})
    target: str = field(default=None, metadata={"help": "Where to."})
    count: int = field(default=1, metadata={"help": "How many."})


def parse_words(*argv: str) -> WordOptions:
    [parsed] = parse_arguments([WordOptions], list(argv), prog="mover", positionals=["source", "target"])
    return parsed


@pytest.mark.parametrize(
    "argv",
    [
        ["a", "b", "--count", "3"],
        ["--count", "3", "a", "b"],
        ["a", "--count=3", "b"],
        ["--source", "a", "--target=b", "--count", "3"],
        ["--source=a", "b", "--count", "3"],
        ["--count", "3", "--target", "b", "a"],
    ],
    ids=" ".join,
)
def test_words_fill_what_has_no_name_in_order(argv: list[str]) -> None:
    assert parse_words(*argv) == WordOptions("a", "b", 3)


def test_words_win_over_yaml(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("source: from-yaml\ntarget: to-yaml\n", encoding="utf-8")
    assert parse_words("--config", str(path)) == WordOptions("from-yaml", "to-yaml")
    assert parse_words("--config", str(path), "a") == WordOptions("a", "to-yaml")
    assert parse_words("a", "b", "--config", str(path)) == WordOptions("a", "b")


@pytest.mark.parametrize(("argv", "found"), [(["a", "b", "c"], "c"), (["a", "b", "--x", "c"], "--x"), (["-x"], "-x")])
def test_a_word_too_many_and_an_unknown_option_are_refused(argv: list[str], found: str) -> None:
    with pytest.raises(ConfigError, match=f"Unknown option on the command line \\(found: {found}\\)"):
        parse_words(*argv)


@pytest.mark.parametrize(("argv", "missing"), [([], "SOURCE, TARGET"), (["a"], "TARGET"), (["--target=b"], "SOURCE")])
def test_a_missing_word_ends_the_program(capsys: pytest.CaptureFixture[str], argv: list[str], missing: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_words(*argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"mover: error: the following arguments are required: {missing}\n")


# Help.


def test_help_keeps_the_lines_of_the_description_and_says_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([WordOptions], ["--help"], description="Moves.\n\n    mover a b\n", usage="mover FROM TO")
    output = capsys.readouterr().out
    assert output.startswith("usage: mover FROM TO\n\nMoves.\n\n    mover a b\n")
    assert re.search(r"--count COUNT +How many\. \(default: 1\)\n", output)
    assert re.search(r"--source SOURCE +Where from\.\n", output)
    with pytest.raises(SystemExit):
        parse_arguments([RequiredOptions], ["--help"])
    assert re.search(r"--size SIZE +A size\. \(required\)\n", capsys.readouterr().out)


def test_help_lists_every_option_once_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments([DistillationConfig], ["--help"], description="What the program does.")
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "What the program does." in output
    entries = re.split(r"\n  (?=-)", output.partition("\noptions:")[2])
    for option in dataclasses.fields(DistillationConfig):
        own = [entry for entry in entries if re.match(rf"--{option.name}\b", entry)]
        assert len(own) == 1, option.name
        expected = "".join(option.metadata["help"].replace("%%", "%").split())  # argparse wraps lines at will
        assert expected in "".join(own[0].split())
    [config] = [entry for entry in entries if entry.startswith("--config ")]
    assert "Options from a YAML file" in config
