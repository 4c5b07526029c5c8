"""Is the gradient score worth it? Held-out cross-entropy right after the cut, for every metric, size and seed.

    python benchmarks/metrics.py --model examples/demo_teacher
    python benchmarks/metrics.py --model PATH --dataset stories.txt --document paragraph --block_size 256

The seed chooses the calibration data (and the numbers of `random`); the held-out blocks and the shapes are the same
for all. The metrics of weights alone do not depend on it. `movement` is accumulated over a training run on the
calibration data, and what is cut is the model that was trained, whose own cross-entropy is printed; all others cut the
teacher.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from measure import describe_machine
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_capgap import ExpressiveScoreCallback, ExpressiveScores, cut, prune, score, solve_shape
from hf_capgap.cross_entropy import mean_cross_entropy
from hf_capgap.data import batched, calibration_batches, load_train_and_held_out
from hf_capgap.pruning import METRICS


def score_while_training(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], learning_rate: float
) -> tuple[PreTrainedModel, ExpressiveScores]:
    """A copy of `model` after one epoch on `batches`, and its movement."""
    trained, callback = copy.deepcopy(model), ExpressiveScoreCallback(metric="movement")
    rows = [
        {name: value[row] for name, value in batch.items()} for batch in batches for row in range(len(batch["labels"]))
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=len(batches[0]["labels"]),
            num_train_epochs=1,
            learning_rate=learning_rate,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
        )
        trainer = Trainer(trained, args, train_dataset=rows, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trained, callback.scores


def scores_of(
    model: PreTrainedModel, metric: str, batches: list[dict[str, torch.Tensor]], seed: int, args: argparse.Namespace
) -> tuple[PreTrainedModel, ExpressiveScores]:
    """(what to cut, its scores)"""
    if metric == "movement":
        return score_while_training(model, batches, args.movement_learning_rate)
    return model, score(model, batches, metric=metric, seed=seed if metric == "random" else None)


def show(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/demo_teacher")
    parser.add_argument("--dataset", help="the standard library's source if not given")
    parser.add_argument("--document", default="file")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_batches", type=int, default=16)
    parser.add_argument("--num_held_out", type=int, default=64)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=list(METRICS))
    parser.add_argument(
        "--stages", type=int, default=3, help="of the additional row of staged expressive cuts; 0: none"
    )
    parser.add_argument("--movement_learning_rate", type=float, default=1e-4)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="This cut removes")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    blocks, held_out = load_train_and_held_out(
        args.dataset, tokenizer, args.block_size, num_held_out=args.num_held_out, document=args.document
    )
    held_out = batched(list(held_out), args.batch_size)
    shapes = [solve_shape(model.config, f"{100 * (1 - removed)}%") for removed in args.removed]
    start = time.perf_counter()
    print(
        f"{describe_machine()}; {Path(args.model).name}, {model.num_parameters():,} parameters, "
        f"held-out cross-entropy {mean_cross_entropy(model, held_out):.3f}"
    )
    print(
        f"calibration: {args.num_batches} batches of {args.batch_size} x {args.block_size} tokens, seeds {args.seeds}"
    )
    print("| metric |" + "".join(f" {removed:.0%} removed |" for removed in args.removed) + " model that is cut |")
    print("|---|" + "---:|" * (len(shapes) + 1))
    records = []
    for metric in [*args.metrics, *([f"expressive, {args.stages} stages"] if args.stages else [])]:
        losses: list[list[float]] = [[] for _ in shapes]
        uncut = []
        for seed in args.seeds:
            batches = calibration_batches(blocks, num_batches=args.num_batches, batch_size=args.batch_size, seed=seed)
            if metric in METRICS:
                source, scores = scores_of(model, metric, batches, seed, args)
                students = (cut(source, scores, shape) for shape in shapes)
            else:
                source = model
                students = (prune(model, batches, shape, stages=args.stages) for shape in shapes)
            uncut.append(mean_cross_entropy(source, held_out))
            for values, student in zip(losses, students, strict=True):
                values.append(mean_cross_entropy(student, held_out))
        print(f"| {metric} |" + "".join(f" {show(values)} |" for values in losses) + f" {show(uncut)} |", flush=True)
        records.append({"metric": metric, "losses": losses, "uncut": uncut})
    for removed, shape in zip(args.removed, shapes, strict=True):
        print(f"{removed:.0%} removed: {shape.num_parameters(model.config):,} parameters, {shape}")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "records": records}, default=str))


if __name__ == "__main__":
    main()
