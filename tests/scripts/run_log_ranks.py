"""One training run with an evaluation set whose rows the ranks cannot share evenly.

torchrun --nproc_per_node 2 tests/scripts/run_log_ranks.py STUDENT_FOLDER TEACHER_FOLDER ROWS.pt OUTPUT_FOLDER
"""

from __future__ import annotations

import sys

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from hf_capgap import DistillationConfig, DistillationTrainer


def main() -> None:
    student, teacher, rows_path, output_dir = sys.argv[1:]
    rows = [{"input_ids": row} for row in torch.load(rows_path)]
    config = DistillationConfig(
        output_dir=output_dir,
        use_cpu=True,
        max_steps=2,
        learning_rate=0.0,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (student, teacher))
    DistillationTrainer(student, teacher, config, train_dataset=rows, eval_dataset=rows).train()


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
