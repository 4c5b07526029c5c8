"""The map of the tree in docs/map.md is complete and true, and the README's own code runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def list_sources(*options: str) -> list[Path]:
    git = subprocess.run(["git", "ls-files", *options, "*.py"], cwd=REPOSITORY, capture_output=True, text=True)
    if git.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(line) for line in git.stdout.splitlines() if (REPOSITORY / line).exists()]


@pytest.fixture(scope="module")
def named() -> set[str]:
    text = (REPOSITORY / "docs" / "map.md").read_text(encoding="utf-8")
    return set(re.findall(r"`([\w/]+\.py)`", text))


def test_every_source_file_is_on_the_map(named: set[str]) -> None:
    sources = [path for path in list_sources() if path.parts[0] in ("hf_capgap", "examples")]
    assert sources
    missing = sorted(str(path) for path in sources if path.name != "__init__.py" and path.as_posix() not in named)
    assert not missing, f"docs/map.md does not name {', '.join(missing)}"


def test_every_file_on_the_map_exists(named: set[str]) -> None:
    assert named
    existing = {path.as_posix() for path in list_sources("--cached", "--others", "--exclude-standard")}
    gone = sorted(named - existing)
    assert not gone, f"docs/map.md names what does not exist: {', '.join(gone)}"


@pytest.mark.timeout(120)
def test_the_ten_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's own code, with fewer batches and steps."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    for given, shorter in {"max_steps=250": "max_steps=1", "num_batches=32": "num_batches=1"}.items():
        assert given in code
        code = code.replace(given, shorter)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert (tmp_path / "student" / "capgap.json").is_file()
