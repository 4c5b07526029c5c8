"""Cuts in a process of its own, and the memory that each takes.

    python tests/scripts/stream_cut.py SCORES.safetensors SHAPE JOBS

SHAPE is the student's shape and JOBS a list of `{"model": folder or id, "output_dir": folder, "in_memory": bool}`,
both as JSON. Prints a JSON list: of each job `{"growth": bytes}`, how far the peak of the resident memory lay above
the memory before the cut, or `{"error": name, "message": text}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_capgap import CapGapError, ExpressiveScores, StudentShape, cut


def main(scores_file: str, shape: str, jobs: str) -> None:
    torch.set_num_threads(1)
    scores, target = ExpressiveScores.load(scores_file), StudentShape(**json.loads(shape))
    results = []
    for job in json.loads(jobs):
        before = reset_peak()
        try:
            model = job["model"]
            if job.get("in_memory"):
                model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
            cut(model, scores, target, output_dir=job["output_dir"])
        except CapGapError as error:
            results.append({"error": type(error).__name__, "message": str(error)})
        else:
            results.append({"growth": memory("VmHWM") - before})
    print(json.dumps(results))


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Forget the peak so far; the resident memory of now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


if __name__ == "__main__":
    main(*sys.argv[1:])
