"""Score a teacher, cut a student out of it in one or more stages, prove the cut, and say what it cost on held-out
text.

    python examples/prune.py                                          # offline demo on a CPU: a minute
    python examples/prune.py --stages 3 --target 30%                  # score and cut three times
    python examples/prune.py --stages 2 --distil_steps 100            # … with some training in between
    python examples/prune.py --metric magnitude                       # is the gradient score worth it?
    accelerate launch examples/prune.py --config recipe.yaml --teacher org/model --dataset org/corpus \\
        --streaming true --block_size 2048 --teacher_dtype bfloat16 --target 3B --output_dir student-3b

With no argument it uses the small teacher beside this script and, as corpus, the Python standard library's own source.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from hf_capgap import CapGapError, DistillationConfig, DistillationTrainer, prune, verify
from hf_capgap.cli.arguments import parse_arguments
from hf_capgap.cli.corpus_options import HeldOutOptions
from hf_capgap.cli.output import AUTO, prepare_output_dir
from hf_capgap.cli.ranks import this_rank
from hf_capgap.cross_entropy import mean_cross_entropy
from hf_capgap.data import batched, calibration_batches
from hf_capgap.distillation import load_teacher
from hf_capgap.distillation.record import describe_run
from hf_capgap.errors import ConfigError
from hf_capgap.pruning import METRICS, StudentShape
from hf_capgap.pruning.scores import UNITS
from hf_capgap.pruning.solver import SPLITS
from hf_capgap.pruning.staging import Distil
from hf_capgap.pruning.surgery import save_student

DEMO_TEACHER = Path(__file__).parent / "demo_teacher"


@dataclass
class ScriptArguments:
    """What to cut, by which metric, in how many stages."""

    teacher: str = field(
        default=str(DEMO_TEACHER), metadata={"help": "Teacher: folder or Hub id. The demo's teacher if not given."}
    )
    teacher_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the teacher.", "choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    target: str = field(default="40%", metadata={"help": 'Size of the student: "40%%", "2.5x" (smaller), "1.2B", ...'})
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Layers of the student; the teacher's if not given."}
    )
    num_experts: int | None = field(
        default=None, metadata={"help": "Experts of each layer of the student; the teacher's if not given."}
    )
    stages: int = field(default=1, metadata={"help": "Cuts, with new scores before each."})
    metric: str = field(default="expressive", metadata={"help": "What to score by.", "choices": list(METRICS)})
    unit: str = field(default="batch", metadata={"help": "What one measurement is over.", "choices": list(UNITS)})
    split: str = field(
        default="balanced",
        metadata={"help": "How the cut is split between hidden size, heads and neurons.", "choices": list(SPLITS)},
    )
    layers: str = field(
        default="symmetric",
        metadata={"help": "Layers that stay: those in the middle, or the best.", "choices": ["symmetric", "scores"]},
    )
    protect_ends: bool = field(default=False, metadata={"help": "Never remove the first and the last layer."})
    num_score_batches: int = field(default=32, metadata={"help": "Calibration batches, of all devices together."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per batch, of every kind."})
    distil_steps: int = field(
        default=0,
        metadata={"help": "Let the teacher teach the student for so many steps after each cut but the last."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of that."})
    seed: int = field(default=0, metadata={"help": "Of the order of the text."})
    output_dir: str = field(default=AUTO, metadata={"help": "Where everything goes; auto: a new folder in outputs/."})


def main() -> None:
    args, corpus = parse_arguments([ScriptArguments, HeldOutOptions], description=__doc__)
    if args.distil_steps < 0:
        raise ConfigError("Training has at least no steps", found=args.distil_steps, fix="0 trains nothing.")
    output_dir = prepare_output_dir(args.output_dir, name="prune")
    transformers.set_seed(args.seed)
    state = this_rank()
    teacher = load_teacher(args.teacher, {"dtype": args.teacher_dtype}).to(state.device)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    with state.main_process_first():
        train_blocks, held_out = corpus.load_train_and_held_out(tokenizer)
    calibration = calibration_batches(
        train_blocks,
        num_batches=args.num_score_batches,
        batch_size=args.batch_size,
        seed=args.seed,
        rank=state.process_index,
        num_ranks=state.num_processes,
    )
    student = prune(
        teacher,
        calibration,
        args.target,
        stages=args.stages,
        metric=args.metric,
        unit=args.unit,
        split=args.split,
        layers=args.layers,
        protect_ends=args.protect_ends,
        num_hidden_layers=args.num_hidden_layers,
        num_experts=args.num_experts,
        distil=make_distil(args, train_blocks, tokenizer, output_dir) if args.distil_steps else None,
        progress=state.is_main_process,
    )
    if state.is_main_process:
        save_student(student, args.teacher, output_dir / "student")
        report(teacher, student, batched(list(held_out), args.batch_size), args, corpus, output_dir)


def make_distil(
    args: ScriptArguments, blocks: Dataset, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> Distil:
    """What `prune` calls between two cuts."""

    def distil(student: PreTrainedModel, teacher: PreTrainedModel, stage: int) -> PreTrainedModel:
        trainer = DistillationTrainer(
            model=student.to(torch.float32),
            teacher_model=teacher,
            args=DistillationConfig(
                output_dir=str(output_dir / f"stage-{stage}"),
                max_steps=args.distil_steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                save_strategy="no",
                report_to="none",
                seed=args.seed,
                use_cpu=next(teacher.parameters()).device.type == "cpu",  # or several CPU ranks would not be joined
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=blocks,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        student.lineage = [*student.lineage, describe_run(trainer, teacher)]
        return student

    return distil


def report(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    held_out: list[dict[str, torch.Tensor]],
    args: ScriptArguments,
    corpus: HeldOutOptions,
    output_dir: Path,
) -> None:
    """Print the shape, the proof and the table; write report.json."""
    print(f"\n{StudentShape.of(student.config)}")
    trained = args.distil_steps > 0 and args.stages > 1
    print("proof: none, as it was trained between its cuts" if trained else f"proof: {verify(teacher, student)}")
    results = {
        name: {"num_parameters": model.num_parameters(), "cross_entropy": mean_cross_entropy(model, held_out)}
        for name, model in {"teacher": teacher, "student, cut": student}.items()
    }
    print("\n| held out | parameters | cross-entropy | perplexity |\n|---|---:|---:|---:|")
    for name, result in results.items():
        loss = result["cross_entropy"]
        print(f"| {name} | {result['num_parameters']:,} | {loss:.3f} | {math.exp(loss):.2f} |")
    print(f"\nstudent: {output_dir / 'student'} (plain AutoModelForCausalLM loads it)")
    content = {"arguments": {**asdict(args), **asdict(corpus)}, "results": results}
    (output_dir / "report.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (CapGapError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    PartialState().destroy_process_group()  # after main: gloo hangs when a DDP model outlives its process group
