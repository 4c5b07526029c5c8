"""Score a teacher, cut a student out of it, distil, and compare: one script, from a demo on a laptop to the real
thing.

    accelerate launch examples/distill.py                       # offline demo on a CPU: minutes
    accelerate launch examples/distill.py --baseline true       # … and the same student trained on the text alone
    accelerate launch --config_file fsdp.yaml examples/distill.py --config recipe.yaml
    accelerate launch examples/distill.py --teacher meta-llama/Llama-2-7b-hf --target 3B --num_hidden_layers 24 \\
        --dataset org/corpus --streaming true --block_size 4096 --bf16 true --max_steps 20000 --output_dir minima

With no argument it uses the small teacher beside this script and, as corpus, the Python standard library's own source.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback

from hf_capgap import (
    CapGapError,
    DistillationConfig,
    DistillationTrainer,
    ExpressiveScores,
    cut,
    score,
    solve_shape,
    verify,
)
from hf_capgap.cli.arguments import parse_arguments
from hf_capgap.cli.corpus_options import HeldOutOptions
from hf_capgap.cli.output import AUTO, prepare_output_dir
from hf_capgap.data import calibration_batches
from hf_capgap.distillation import load_teacher
from hf_capgap.errors import ConfigError
from hf_capgap.extras import require

DEMO_TEACHER = Path(__file__).parent / "demo_teacher"


@dataclass
class ScriptArguments:
    """What to distil, into what, on what text."""

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
    scores: str | None = field(default=None, metadata={"help": "Scores file of an earlier run, instead of scoring."})
    student: str | None = field(
        default=None, metadata={"help": "Folder of a student that is cut already, instead of scoring and cutting."}
    )
    num_score_batches: int = field(default=32, metadata={"help": "Calibration batches, of the training batch size."})
    baseline: bool = field(
        default=False, metadata={"help": "Also train the same cut on the same tokens with cross-entropy alone."}
    )
    prompt: str = field(default="def read_file(path):\n", metadata={"help": "What the student continues in the end."})


@dataclass
class TrainingArguments(DistillationConfig):
    """`DistillationConfig`, with defaults that suit the demo."""

    output_dir: str = field(default=AUTO, metadata={"help": "Where everything goes; auto: a new folder in outputs/."})
    max_steps: int = field(default=250, metadata={"help": "Optimizer steps; -1 goes by num_train_epochs."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences per step and device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Sequences per evaluation step and device."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Warm-up steps, or the fraction of all steps if below 1."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints: no, steps or epoch."})
    report_to: str = field(default="none", metadata={"help": "Where to log: none, tensorboard, wandb, ..."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin batches in host memory."}
    )


def main() -> None:
    args, corpus, training_args = parse_arguments(
        [ScriptArguments, HeldOutOptions, TrainingArguments], description=__doc__
    )
    if training_args.resume_from_checkpoint:
        raise ConfigError("This script starts anew and cannot resume", fix="Resume with DistillationTrainer.train.")
    output_dir = prepare_output_dir(
        training_args.output_dir, name="distill", overwrite=training_args.overwrite_output_dir
    )
    transformers.set_seed(training_args.seed)
    teacher = load_teacher(args.teacher, {"dtype": args.teacher_dtype}).to(training_args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    with training_args.main_process_first():
        train_blocks, eval_blocks = corpus.load_train_and_held_out(tokenizer)
    student = make_student(teacher, train_blocks, args, training_args, output_dir)

    def make_trainer(model: PreTrainedModel, name: str, **options: Any) -> DistillationTrainer:
        trainer = DistillationTrainer(
            model=model,
            teacher_model=teacher,
            args=replace(training_args, output_dir=str(output_dir / name), **options),
            train_dataset=train_blocks,
            eval_dataset=eval_blocks,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)  # the table in the end says it
        return trainer

    def train(name: str, model: PreTrainedModel, **options: Any) -> tuple[DistillationTrainer, Result]:
        trainer = make_trainer(model, name, **options)
        seconds = trainer.train().metrics["train_runtime"]
        result = Result(model.num_parameters(), trainer.evaluate(), trainer.num_tokens_seen, seconds)
        trainer.save_model()
        return trainer, result

    results = {
        name: Result(model.num_parameters(), make_trainer(model, "student", disable_tqdm=True).evaluate())
        for name, model in {"teacher": teacher, "student, cut": student}.items()
    }
    if args.baseline:
        _, results["student, cross-entropy alone"] = train("baseline", copy.deepcopy(student), alpha=0.0)
    trainer, results["student, distilled"] = train("student", student)
    if trainer.is_world_process_zero():
        report(results, trainer, args, corpus, output_dir)


@dataclass
class Result:
    """One row of the table: a model, evaluated, and what training it took."""

    num_parameters: int
    evaluation: dict[str, float]
    num_tokens: int = 0
    train_seconds: float = 0.0


def make_student(
    teacher: PreTrainedModel,
    blocks: Dataset,
    args: ScriptArguments,
    training_args: TrainingArguments,
    output_dir: Path,
) -> PreTrainedModel:
    """Score the teacher, solve for the shape, cut; prove the cut and keep the scores. The student is in float32."""
    if args.student is not None:
        return load_teacher(args.student, {"dtype": "float32"})
    if args.scores is not None:
        scores = ExpressiveScores.load(args.scores)
    else:
        scores = score_on_blocks(teacher, blocks, args.num_score_batches, training_args)
    shape = solve_shape(teacher.config, args.target, num_hidden_layers=args.num_hidden_layers)
    student = cut(teacher, scores, shape)
    if PartialState().is_main_process:
        scores.save(output_dir / "scores.safetensors")
        print(f"\ncut {teacher.num_parameters():,} -> {student.num_parameters():,} parameters: {shape}")
        print(f"proof: {verify(teacher, student)}\n")
    return student.to(torch.float32)


def score_on_blocks(
    teacher: PreTrainedModel, blocks: Dataset, num_batches: int, training_args: TrainingArguments
) -> ExpressiveScores:
    """Expressive scores from blocks in random order, shared out over the ranks."""
    state = PartialState()
    own = calibration_batches(
        blocks,
        num_batches=num_batches,
        batch_size=training_args.per_device_train_batch_size,
        seed=training_args.seed,
        rank=state.process_index,
        num_ranks=state.num_processes,
    )
    return score(teacher, own, progress=state.is_main_process)


def report(
    results: dict[str, Result],
    trainer: DistillationTrainer,
    args: ScriptArguments,
    corpus: HeldOutOptions,
    output_dir: Path,
) -> None:
    """Print the table, the speed and a sample; write report.json and the loss curve."""
    final = results["student, distilled"]
    print(f"\n{format_table(results)}\n")
    print(
        f"{final.num_tokens:,} tokens in {final.train_seconds:.0f} s: "
        f"{final.num_tokens / final.train_seconds:,.0f} tokens per second"
    )
    print(f"loss curve: {draw_loss_curve(trainer.state.log_history, output_dir / 'loss.png')}")
    print(f"sample of the saved student:\n{sample(output_dir / 'student', args.prompt)}\n")
    print(f"student: {output_dir / 'student'} (plain AutoModelForCausalLM loads it)")
    content = {
        "arguments": {**asdict(args), **asdict(corpus)},
        "results": {name: asdict(result) for name, result in results.items()},
    }
    (output_dir / "report.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def format_table(results: dict[str, Result]) -> str:
    """A Markdown table of held-out results."""
    header = ["held out", "parameters", "cross-entropy", "perplexity", "agreement with teacher"]
    lines = [f"| {' | '.join(header)} |", "|---|---:|---:|---:|---:|"]
    for name, result in results.items():
        metrics = result.evaluation
        lines.append(
            f"| {name} | {result.num_parameters:,} | {metrics['eval_ce']:.3f} | {metrics['eval_perplexity']:.2f} "
            f"| {metrics['eval_agreement']:.1%} |"
        )
    return "\n".join(lines)


def draw_loss_curve(history: list[dict[str, float]], path: Path) -> str:
    """Draw cross-entropy and divergence against tokens into a PNG; returns its path, or how to get one."""
    try:
        pyplot = require("matplotlib.pyplot", extra="plots")
    except CapGapError as error:
        return f"not drawn. {error}"
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("ce", "cross-entropy"), ("kl", "KL(teacher ‖ student)")):
        points = [(entry["num_tokens_seen"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="tokens", ylabel="nats per token", title="Distillation, training batches", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return str(path)


def sample(folder: Path, prompt: str, num_tokens: int = 64) -> str:
    """What the saved student, loaded by plain transformers, makes of a prompt (greedy)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    try:
        main()
    except (CapGapError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    PartialState().destroy_process_group()  # after main: gloo hangs when a DDP model outlives its process group
