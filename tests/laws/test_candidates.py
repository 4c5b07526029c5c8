"""Configs from the Hub, over real HTTP from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
CONFIG = json.dumps(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
).encode()
COMMIT = "0" * 40
SECONDS_PER_ANSWER = 0.2

CODE = """
import json, sys, time
import huggingface_hub
from hf_capgap.laws.candidates import find_candidates
start = time.perf_counter()
found, problems = find_candidates(json.loads(sys.argv[1]))
seconds = time.perf_counter() - start
totals = {candidate.name: candidate.size.total for candidate in found}
print(json.dumps({"found": totals, "problems": problems, "seconds": seconds, "torch": "torch" in sys.modules}))
"""


class Hub(BaseHTTPRequestHandler):
    """Models whose names say what is wrong with them."""

    asked: list[str] = []

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.asked.append(self.path)
        time.sleep(SECONDS_PER_ANSWER)
        kind = self.path.split("/")[2].partition("-")[0]
        status, code = {
            "gated": (403, "GatedRepo"),
            "missing": (404, "RepoNotFound"),
            "weightless": (404, "EntryNotFound"),
            "broken": (500, None),
        }.get(kind, (200, None))
        body = CONFIG if status == 200 else b""
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def find(names: list[str], endpoint: str, cache: Path, *, offline: bool = False) -> dict:
    """`find_candidates` in a process of its own: the endpoint is read when `huggingface_hub` is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(names)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_gated_missing_and_empty_repositories_have_each_their_own_message(endpoint: str, tmp_path: Path) -> None:
    names = ["org/good", "org/gated", "org/missing", "org/weightless"]
    answer = find(names, endpoint, tmp_path)
    assert answer["found"] == {"org/good": 8_030_261_248}
    problems = answer["problems"]
    assert "The model is gated (found: org/gated)" in problems["org/gated"]
    assert "Ask for access" in problems["org/gated"]
    assert "There is no such model on the Hub, or it is private (found: org/missing)" in problems["org/missing"]
    assert "The repository has no config.json (found: org/weightless)" in problems["org/weightless"]
    assert not answer["torch"]


def test_only_configs_are_read_and_many_at_the_same_time(endpoint: str, tmp_path: Path) -> None:
    names = [f"org/good-{i}" for i in range(12)]
    answer = find(names, endpoint, tmp_path)
    assert list(answer["found"]) == names
    assert Hub.asked
    assert {path.split("/", 3)[3] for path in Hub.asked} == {"resolve/main/config.json"}
    one_after_the_other = len(Hub.asked) * SECONDS_PER_ANSWER
    assert answer["seconds"] < 0.5 * one_after_the_other


def test_what_was_read_once_is_there_offline(endpoint: str, tmp_path: Path) -> None:
    find(["org/good"], endpoint, tmp_path)
    num_asked = len(Hub.asked)
    answer = find(["org/good", "org/other"], endpoint, tmp_path, offline=True)
    assert answer["found"] == {"org/good": 8_030_261_248}
    assert "not in the local cache, and the Hub cannot be reached" in answer["problems"]["org/other"]
    assert len(Hub.asked) == num_asked


@pytest.mark.slow
def test_a_hub_that_fails_is_said_to_fail(endpoint: str, tmp_path: Path) -> None:
    """`huggingface_hub` tries again for many seconds."""
    answer = find(["org/broken"], endpoint, tmp_path)
    assert "Hub" in answer["problems"]["org/broken"]
