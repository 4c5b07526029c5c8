"""What the benchmarks share: peaks of memory, and the machine in words."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from pathlib import Path

import torch


def peak_rise_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """How far the process's memory rises above where it is now while `function` runs.

    Resident memory on a CPU (Linux), allocated memory on a GPU. Measure each thing in a process of its own: what an
    allocator keeps from an earlier run hides the rise of the next.
    """
    gc.collect()
    if device == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident_bytes("VmRSS")
        function()
        return resident_bytes("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def resident_bytes(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def describe_machine(device: str = "cpu") -> str:
    if device == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
        name = names[0].split(": ")[1] if names else platform.processor()
        return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
