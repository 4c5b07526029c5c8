"""Optional dependencies that are there, and that are not."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType

import pytest

import hf_capgap
from hf_capgap.errors import CapGapError, MissingExtraError
from hf_capgap.extras import require


class Blocker(MetaPathFinder):
    """Makes a top-level module impossible to import, as if it were not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {self.name!r}", name=self.name)
        return None


@pytest.fixture
def _without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker("trl"), *sys.meta_path])


@pytest.mark.usefixtures("_without_trl")
@pytest.mark.parametrize("module", ["trl", "trl.trainer"])
def test_a_missing_module_names_the_command_that_installs_it(module: str) -> None:
    with pytest.raises(MissingExtraError) as caught:
        require(module, extra="chat")
    assert str(caught.value) == (
        f"{module} cannot be imported (found: No module named 'trl'). Install it with: pip install \"hf-capgap[chat]\""
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.usefixtures("_without_trl")
def test_a_missing_module_is_an_import_error_too() -> None:
    for parent in (ImportError, CapGapError):
        with pytest.raises(parent):
            require("trl", extra="chat")


def test_a_module_disabled_in_sys_modules_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"hf-capgap\[plots\]"):
        require("matplotlib", extra="plots")


def test_a_present_module_is_returned() -> None:
    assert require("json.decoder", extra="chat") is importlib.import_module("json.decoder")


def test_an_error_inside_a_present_module_is_not_taken_for_a_missing_one(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "capgap_broken_module.py").write_text("raise ZeroDivisionError")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ZeroDivisionError):
        require("capgap_broken_module", extra="chat")


def test_every_extra_named_in_the_package_exists() -> None:
    """`require(..., extra="x")` must name an extra that the package metadata declares."""
    root = Path(hf_capgap.__file__).parent
    sources = [*root.rglob("*.py"), *(root.parent / "examples").glob("*.py")]
    named = {extra for path in sources for extra in re.findall(r'require\([^)]*extra="([a-z]+)"', path.read_text())}
    assert named <= set(metadata("hf-capgap").get_all("Provides-Extra"))
    assert named
