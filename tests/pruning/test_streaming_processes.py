"""Streaming surgery in processes of its own: killed half-way, on a full disk, from the Hub, in little memory."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from students import random_scores, smaller_everywhere
from transformers import AutoConfig, AutoModelForCausalLM

from hf_capgap import StudentShape, cut, verify
from hf_capgap.errors import CheckpointError, OutputFolderError
from hf_capgap.pruning import StudentFolder, streaming

pytestmark = pytest.mark.filterwarnings("ignore:This cut removes:UserWarning")  # the tiny students are tiny

SCRIPT = REPOSITORY / "tests" / "scripts" / "stream_cut.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def start_cut(teacher: Path, output_dir: Path, **options: Any) -> tuple[BaseProcess, Connection]:
    """A streamed cut in a child process, and where it says how it ended."""
    context = multiprocessing.get_context("fork")  # this process has imported everything already
    ours, theirs = context.Pipe()
    process = context.Process(target=_cut_in_child, args=(teacher, output_dir, theirs), kwargs=options)
    process.start()
    return process, ours


def _cut_in_child(
    teacher: Path,
    output_dir: Path,
    report: Connection,
    *,
    block_bytes: int = streaming._BLOCK_BYTES,
    file_limit: int | None = None,
    plenty_free: bool = False,
) -> None:
    """`block_bytes` make the cut slow, `file_limit` breaks it off, `plenty_free` silences the early check."""
    streaming._BLOCK_BYTES = block_bytes
    if plenty_free:
        shutil.disk_usage = lambda _: SimpleNamespace(free=10**15)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    config = AutoConfig.from_pretrained(teacher)
    try:
        cut(teacher, random_scores(config), smaller_everywhere(config), output_dir=output_dir)
    except OSError as error:
        report.send((type(error), error.errno))
    else:
        report.send(None)


def end_of(process: BaseProcess, report: Connection) -> Any:
    """(type, errno) of the error that ended a cut; None if it succeeded."""
    assert report.poll(60)
    process.join()
    return report.recv()


def run_script(model_config: Any, shape: StudentShape, folder: Path, *jobs: dict, **environment: str) -> list[dict]:
    """What `tests/scripts/stream_cut.py` prints."""
    random_scores(model_config).save(folder / "scores.safetensors")
    arguments = [folder / "scores.safetensors", json.dumps(shape.as_dict()), json.dumps(jobs, default=str)]
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(SCRIPT),
            *map(str, arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_teacher(make_model, folder: Path, **options: Any) -> Path:
    model = make_model("qwen3", vocab_size=20_000)
    model.save_pretrained(folder, **options)
    return folder


# --- killed --------------------------------------------------------------------------------------------------------


def test_killed_cut_leaves_nothing_under_its_name_and_can_be_repeated(make_model, tmp_path):
    teacher = save_teacher(make_model, tmp_path / "teacher")
    models = tmp_path / "models"
    models.mkdir()
    process, _ = start_cut(teacher, models / "student", block_bytes=1)  # row by row
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in models.glob(".student.partial-*/*.safetensors")):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (partial,) = models.iterdir()  # hidden, and without a config
    assert partial.name.startswith(".student.partial-")
    assert names_in(partial) == ["model.safetensors"]
    config = AutoConfig.from_pretrained(teacher)
    cut(teacher, random_scores(config), smaller_everywhere(config), output_dir=models / "student")
    verify(teacher, models / "student")


# --- a full disk ---------------------------------------------------------------------------------------------------


def test_file_that_cannot_grow_leaves_nothing_behind(make_model, tmp_path):
    """A limit on the size of files breaks the cut off half-way, as a full disk would."""
    teacher = save_teacher(make_model, tmp_path / "teacher")
    models = tmp_path / "models"
    models.mkdir()
    assert end_of(*start_cut(teacher, models / "student", file_limit=1_000_000)) == (OSError, errno.EFBIG)
    assert names_in(models) == []


def test_disk_that_is_known_to_be_too_small_is_refused_at_once(make_model, tmp_path, monkeypatch):
    save_teacher(make_model, tmp_path / "teacher")
    config = AutoConfig.from_pretrained(tmp_path / "teacher")
    shape = smaller_everywhere(config)
    needed = 4 * shape.num_parameters(config)
    for free in (needed - 1, needed):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        arguments = (tmp_path / "teacher", random_scores(config), shape)
        if free < needed:
            with pytest.raises(OutputFolderError, match=f"needs {needed:,} bytes.*{free:,} bytes free"):
                cut(*arguments, output_dir=tmp_path / "student")
            assert names_in(tmp_path) == ["teacher"]
        else:
            cut(*arguments, output_dir=tmp_path / "student")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("plenty_free", [False, True], ids=["noticed early", "noticed half-way"])
def test_full_disk_leaves_nothing_behind(make_model, tmp_path, small_disk, plenty_free):
    teacher = save_teacher(make_model, tmp_path / "teacher")  # its student has 7 MB
    process = start_cut(teacher, small_disk / "student", plenty_free=plenty_free, block_bytes=10_000)
    assert end_of(*process) == ((OSError, errno.ENOSPC) if plenty_free else (OutputFolderError, None))
    assert names_in(small_disk) == []
    (small_disk / "room").write_bytes(b"x" * 1_900_000)  # given back, indeed


# --- the Hub -------------------------------------------------------------------------------------------------------


def test_id_in_the_local_cache_is_streamed_with_its_commit(make_model, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    repository = cache / "models--org--big-teacher"
    make_model("qwen3").save_pretrained(repository / "snapshots" / COMMIT, max_shard_size="100KB")
    for name in ("main", "v1.0"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    config = AutoConfig.from_pretrained(repository / "snapshots" / COMMIT)
    scores, shape = random_scores(config), smaller_everywhere(config)
    for number, revision in enumerate((None, "v1.0", COMMIT)):
        output_dir = tmp_path / f"student-{number}"
        student = cut("org/big-teacher", scores, shape, output_dir=output_dir, revision=revision)
        assert isinstance(student, StudentFolder)
        (stage,) = json.loads((output_dir / "capgap.json").read_text())["stages"]
        assert (stage["teacher"]["name"], stage["teacher"]["revision"]) == ("org/big-teacher", COMMIT)
        verify(repository / "snapshots" / COMMIT, output_dir)
    with pytest.raises(CheckpointError, match="org/big-teacher"):
        cut("org/big-teacher", scores, shape, output_dir=tmp_path / "student", revision="v2.0")


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download of one model needs, on the loopback interface."""

    folder: Path
    fetched: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        headers, body, status = {"Content-Type": "application/json"}, b"", 200
        if path.startswith("/api/models/org/big-teacher/tree/"):
            files = [self._entry(file) for file in sorted(self.folder.iterdir())]
            body = json.dumps([{"type": "file", **entry} for entry in files]).encode()
        elif path.startswith("/api/models/org/big-teacher"):
            siblings = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            body = json.dumps({"id": "org/big-teacher", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/org/big-teacher/resolve/") and (self.folder / Path(path).name).is_file():
            file = self.folder / Path(path).name
            body = file.read_bytes()
            headers = {"ETag": f'"{self._entry(file)["oid"]}"', "X-Repo-Commit": COMMIT}
            if with_body:
                self.fetched.append(file.name)
        else:
            status = 404
            headers["X-Error-Code"] = "EntryNotFound" if path.startswith("/org/big-teacher/") else "RepoNotFound"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    @staticmethod
    def _entry(file: Path) -> dict[str, Any]:
        return {"path": file.name, "size": file.stat().st_size, "oid": f"{hash(file.name) % 16**40:040x}"}

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path) -> Iterator[tuple[type[_Hub], dict[str, str]]]:
    """A Hub that serves `tmp_path/published` as org/big-teacher, and the environment that finds it."""
    handler = type("Hub", (_Hub,), {"folder": tmp_path / "published", "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield (
        handler,
        {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        },
    )
    server.shutdown()
    thread.join()
    server.server_close()


def test_id_is_downloaded_and_streamed(make_model, tmp_path, hub):
    handler, environment = hub
    config = make_model("qwen3").config
    make_model("qwen3").save_pretrained(tmp_path / "published", max_shard_size="100KB")
    (tmp_path / "published" / "pytorch_model.bin").write_bytes(b"x" * 1000)  # the same weights once more: not wanted
    (tmp_path / "published" / "consolidated.safetensors").write_bytes(b"x" * 1000)
    found, absent = run_script(
        config,
        smaller_everywhere(config),
        tmp_path,
        {"model": "org/big-teacher", "output_dir": tmp_path / "student"},
        {"model": "org/nothing", "output_dir": tmp_path / "another"},
        **environment,
    )
    assert "growth" in found
    shards = [name for name in names_in(tmp_path / "published") if name.startswith("model-")]
    assert sorted(name for name in set(handler.fetched) if "json" not in name) == shards
    (stage,) = json.loads((tmp_path / "student" / "capgap.json").read_text())["stages"]
    assert (stage["teacher"]["name"], stage["teacher"]["revision"]) == ("org/big-teacher", COMMIT)
    verify(tmp_path / "published", tmp_path / "student")
    assert absent["error"] == "CheckpointError"
    assert "org/nothing" in absent["message"]
    assert not (tmp_path / "another").exists()


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_peak_memory_is_less_than_one_and_a_half_shards(tmp_path):
    """A teacher of 320 MB in shards of at most 100; the cut in memory shows that the measurement would tell."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path / "teacher", max_shard_size="100MB"
    )
    shards = [file.stat().st_size for file in (tmp_path / "teacher").glob("*.safetensors")]
    assert sum(shards) > 300e6
    assert len(shards) >= 3
    shape = replace(
        StudentShape.of(config),
        num_hidden_layers=3,
        hidden_size=640,
        num_attention_heads=10,
        num_key_value_heads=10,
        intermediate_size=2000,
    )
    jobs = [
        {"model": tmp_path / "teacher", "output_dir": tmp_path / f"student-{in_memory}", "in_memory": in_memory}
        for in_memory in (False, True)
    ]
    streamed, in_memory = run_script(config, shape, tmp_path, *jobs)
    assert streamed["growth"] < 1.5 * max(shards)
    assert in_memory["growth"] > sum(shards)
