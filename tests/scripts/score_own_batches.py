"""`score` on several ranks, each with batches of its own.

    torchrun --nproc_per_node 2 tests/scripts/score_own_batches.py MODEL_FOLDER BATCHES.pt SCORES

BATCHES.pt holds cases by name, each with a list of batches for every rank. A rank writes the scores that it got to
SCORES.<case>.<metric>.<rank>, for the model in a DDP wrapper, and those of its own batches alone, if it has any, to
SCORES.<case>.<metric>.<rank>.alone.
"""

from __future__ import annotations

import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from hf_capgap import score

METRICS = ("expressive", "taylor", "activation")


def main() -> None:
    model_folder, batches_path, scores_path = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    wrapped = DistributedDataParallel(model)
    for case, shares in torch.load(batches_path).items():
        for metric in METRICS:
            path = f"{scores_path}.{case}.{metric}.{rank}"
            score(wrapped, shares[rank], metric=metric).save(path)
            if shares[rank]:
                score(model, shares[rank], metric=metric, distributed=False).save(f"{path}.alone")


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
