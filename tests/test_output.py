"""Output folders: complete, or not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hf_capgap.errors import OutputFolderError
from hf_capgap.output import complete_folder, require_empty


def test_an_absent_or_empty_folder_may_be_written(tmp_path: Path) -> None:
    require_empty(tmp_path)
    require_empty(tmp_path / "missing")
    require_empty(str(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["file.txt", ".hidden", "folder/"])
def test_a_folder_that_holds_anything_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(OutputFolderError, match=r"not empty \(found: .*\)\. Name another folder, or empty this one\."):
        require_empty(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputFolderError, match="out.* Choose better."):
        require_empty(tmp_path / "out", fix="Choose better.")


def test_the_folder_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with complete_folder(out) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").write_text("all")
        assert not out.exists()
        assert partial.parent == out.parent  # the same file system: renaming is atomic
    assert (out / "sub" / "weights").read_text() == "all"
    assert os.listdir(out.parent) == ["out"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with complete_folder(str(tmp_path / "out")) as partial:
        (partial / "file").touch()
    assert os.listdir(tmp_path / "out") == ["file"]


def test_the_folder_can_be_read_by_others(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "out"):
        pass
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half() -> None:
        with complete_folder(tmp_path / "out") as partial:
            (partial / "half").touch()
            raise error

    with pytest.raises(error):
        write_half()
    assert os.listdir(tmp_path) == []


def test_a_full_folder_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    ran = []
    with pytest.raises(OutputFolderError), complete_folder(tmp_path / "out"):
        ran.append(True)
    assert not ran
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["precious"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def write_while_another_does() -> None:
        with complete_folder(tmp_path / "out") as partial:
            (partial / "ours").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(OSError, match="not empty"):
        write_while_another_does()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]
