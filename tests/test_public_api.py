"""What `import hf_capgap` gives, and what it costs."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_capgap

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(hf_capgap.__file__).parent

IMPORT = """
import json, sys, time
start = time.perf_counter()
import hf_capgap
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""

each_name = pytest.mark.parametrize("name", hf_capgap.__all__)


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_importing_the_package_is_quick_and_pulls_in_nothing_heavy() -> None:
    runs = [json.loads(run_python(IMPORT)) for _ in range(3)]
    assert min(run["seconds"] for run in runs) < 0.1
    modules = {name.partition(".")[0] for name in runs[0]["modules"]}
    assert "hf_capgap" in modules
    heavy = {"accelerate", "datasets", "numpy", "pandas", "pyarrow", "safetensors", "torch", "transformers", "yaml"}
    assert not modules & heavy


def test_importing_the_errors_pulls_in_nothing_heavy() -> None:
    run_python("import sys; from hf_capgap import CapGapError; assert 'torch' not in sys.modules")


@each_name
def test_a_public_name_resolves_to_something_with_a_docstring(name: str) -> None:
    value = getattr(hf_capgap, name)
    assert value.__name__ == name
    assert value.__module__.startswith("hf_capgap.")
    assert inspect.getdoc(value)


@each_name
def test_the_docstring_of_a_public_name_explains_every_argument(name: str) -> None:
    value = getattr(hf_capgap, name)
    explained = set(re.findall(r"^ +(\w+): ", value.__doc__, re.MULTILINE))
    if dataclasses.is_dataclass(value):  # options are explained by their help
        explained |= {field.name for field in dataclasses.fields(value) if field.metadata.get("help")}
    parameters = list(inspect.signature(value).parameters)
    assert parameters
    assert [parameter for parameter in parameters if parameter not in explained] == []


def test_star_import_and_dir_give_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from hf_capgap import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(hf_capgap.__all__)
    assert set(hf_capgap.__all__) < set(dir(hf_capgap))
    assert "__version__" in dir(hf_capgap)
    assert hf_capgap.__all__ == sorted(hf_capgap.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hf_capgap' has no attribute 'distil_everything'"):
        hf_capgap.distil_everything  # noqa: B018
    assert not hasattr(hf_capgap, "torch")
    with pytest.raises(ImportError, match="cannot import name 'distil_everything'"):
        from hf_capgap import distil_everything  # noqa: F401


def test_type_checkers_see_the_names_that_exist_at_run_time() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(homes) == hf_capgap.__all__
    for name, home in homes.items():
        module = importlib.import_module(f"hf_capgap.{home}")
        assert getattr(module, name) is getattr(hf_capgap, name)


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_that_of_the_installed_package() -> None:
    assert hf_capgap.__version__ == importlib.metadata.version("hf-capgap")


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed")
def test_the_import_layers_hold() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout
