"""What importing the laws costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
CODE = """
import json, sys
import hf_capgap.laws
from hf_capgap import CapacityGapLaw, DistillationLaw, RunRecord, SupervisedLaw, plan
hf_capgap.laws.compute_optimal(1e9, compute=1e21)
import hf_capgap.laws.protocols, hf_capgap.laws.plots, hf_capgap.laws.fits, hf_capgap.laws.render, hf_capgap.cli.plan
print(json.dumps(sorted(sys.modules)))
"""


def test_the_laws_and_the_planner_need_no_torch_and_no_matplotlib() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert result.returncode == 0, result.stderr
    modules = {name.partition(".")[0] for name in json.loads(result.stdout)}
    assert {"numpy", "scipy", "hf_capgap"} <= modules
    assert not modules & {"torch", "transformers", "accelerate", "datasets", "matplotlib", "pyarrow", "pandas"}
