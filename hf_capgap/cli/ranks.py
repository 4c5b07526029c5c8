"""The processes that `accelerate launch` or torchrun started."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_rank() -> PartialState:
    """This process among the others, which are joined on the first call; without a launcher it is alone.

    `PartialState()` alone joins no processes on CPUs: each would then do all of the work and write the same files.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    return PartialState(cpu=on_cpu)
