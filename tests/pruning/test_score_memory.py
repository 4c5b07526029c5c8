"""What `score` holds at its peak, against one forward with gradient checkpointing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

SIZES = ["--hidden", "512", "--layers", "8", "--vocab", "16000", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_scoring_needs_little_more_than_a_checkpointed_forward(tmp_path: Path) -> None:
    """Even without the logits, which `score` never holds all at once; with them it needs less."""
    result = tmp_path / "score.json"
    command = [sys.executable, "benchmarks/score.py", *SIZES, "--json", str(result)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=280)
    found = json.loads(result.read_text())
    peak = {name: found[name]["weights"] + found[name]["rise"] for name in ("score", "forward", "backbone")}
    assert peak["score"] <= 1.25 * peak["backbone"]
    assert peak["score"] <= peak["forward"]
