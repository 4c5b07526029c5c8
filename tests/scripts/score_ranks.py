"""One training run at learning rate 0 with an `ExpressiveScoreCallback`, alone or on several ranks.

    torchrun --nproc_per_node 2 tests/scripts/score_ranks.py MODEL_FOLDER ROWS.pt SCORES.safetensors

The callback writes SCORES; every rank also writes the scores that it ended with to SCORES.<rank>.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hf_capgap import ExpressiveScoreCallback

BATCH_SIZE = 2


def make_trainer(
    model: PreTrainedModel,
    rows: list[dict[str, torch.Tensor]],
    callback: ExpressiveScoreCallback,
    *,
    trainer_class: type[Trainer] = Trainer,
    eval_dataset: list[dict[str, torch.Tensor]] | None = None,
    **options: Any,
) -> Trainer:
    """A trainer that goes through `rows` once, in order, and leaves the weights as they are."""
    defaults = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    args = TrainingArguments(**{**defaults, **options})
    return trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=eval_dataset, callbacks=[callback])


def main() -> None:
    model_folder, rows_path, scores_path = sys.argv[1:]
    callback = ExpressiveScoreCallback(scores_path)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    make_trainer(model, torch.load(rows_path), callback, gradient_accumulation_steps=2).train()
    callback.scores.save(f"{scores_path}.{os.environ['RANK']}")


if __name__ == "__main__":
    main()
    # Only now that the trainer is gone: gloo hangs in the destructor of a DDP model that outlives its process group.
    PartialState().destroy_process_group()
