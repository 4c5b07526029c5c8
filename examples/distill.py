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

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_capgap import (
    CapGapError,
    DistillationConfig,
    DistillationTrainer,
    ExpressiveScores,
    cut,
    load_corpus,
    pack,
    solve_shape,
    verify,
)
from hf_capgap import score as score_model
from hf_capgap.cli.arguments import parse_arguments
from hf_capgap.data import BlockCollator
from hf_capgap.extras import require
from hf_capgap.output import require_empty
from hf_capgap.pruning import merge_ranks

DEMO_TEACHER = Path(__file__).parent / "demo_teacher"


@dataclass
class ScriptArguments:
    """What to distil, into what, on what text."""

    teacher: str = field(
        default=str(DEMO_TEACHER), metadata={"help": "Teacher: folder or Hub id. The demo's teacher if not given."}
    )
    teacher_dtype: str = field(
        default="float32", metadata={"help": "Dtype of the teacher: float32, bfloat16, float16 or auto."}
    )
    target: str = field(default="40%", metadata={"help": 'Size of the student: "40%", "2.5x" (smaller), "1.2B", ...'})
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Layers of the student; the teacher's if not given."}
    )
    scores: str | None = field(default=None, metadata={"help": "Scores file of an earlier run, instead of scoring."})
    num_score_batches: int = field(default=32, metadata={"help": "Calibration batches, of the training batch size."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Corpus: file, folder, glob or Hub id. The standard library's source if not given."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset to train on."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    streaming: bool = field(
        default=False, metadata={"help": "Read and pack the corpus while training (needs max_steps)."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out corpus. If not given, the first num_eval_blocks blocks are held out."},
    )
    eval_split: str = field(default="train", metadata={"help": "Split of the held-out corpus."})
    block_size: int = field(default=256, metadata={"help": "Tokens per training sequence."})
    num_eval_blocks: int = field(default=128, metadata={"help": "Blocks to evaluate on, at most."})
    baseline: bool = field(
        default=False, metadata={"help": "Also train the same cut on the same tokens with cross-entropy alone."}
    )
    prompt: str = field(default="def read_file(path):\n", metadata={"help": "What the student continues in the end."})


@dataclass
class TrainingArguments(DistillationConfig):
    """`DistillationConfig`, with defaults that suit the demo."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Where everything goes; a new folder below outputs/ if not given."}
    )
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps."})
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
    args, training_args = parse_arguments([ScriptArguments, TrainingArguments], description=__doc__)
    state = PartialState()
    output_dir = choose_output_dir(training_args.output_dir)
    if not training_args.overwrite_output_dir:
        require_empty(output_dir, fix="Name another --output_dir, or pass --overwrite_output_dir true.")
    state.wait_for_everyone()
    transformers.set_seed(training_args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=args.teacher_dtype).to(training_args.device)
    with training_args.main_process_first():
        train_blocks, eval_blocks = load_blocks(args, tokenizer)

    # Score, shape, cut.
    if args.scores is None:
        scores = score(teacher, train_blocks, args.num_score_batches, training_args, state)
    else:
        scores = ExpressiveScores.load(args.scores)
    shape = solve_shape(teacher.config, args.target, num_hidden_layers=args.num_hidden_layers)
    student = cut(teacher, scores, shape)
    if state.is_main_process:
        prepare(output_dir)
        scores.save(output_dir / "scores.safetensors")
        print(f"\ncut {teacher.num_parameters():,} -> {student.num_parameters():,} parameters: {shape}")
        print(f"proof: {verify(teacher, student)}\n")
    cut_student = student.to(torch.float32)
    start = {name: value.clone() for name, value in cut_student.state_dict().items()}

    # Evaluate, distil, evaluate.
    def run(name: str, alpha: float) -> tuple[DistillationTrainer, dict[str, float]]:
        cut_student.load_state_dict(start)
        run_args = replace(training_args, output_dir=str(output_dir / name), alpha=alpha)
        trainer = make_trainer(cut_student, run_args)
        return trainer, trainer.train().metrics

    def make_trainer(model: PreTrainedModel, run_args: DistillationConfig) -> DistillationTrainer:
        return DistillationTrainer(
            model=model,
            teacher_model=teacher,
            args=run_args,
            train_dataset=train_blocks,
            eval_dataset=eval_blocks,
            processing_class=tokenizer,
        )

    evaluation_args = replace(training_args, output_dir=str(output_dir), disable_tqdm=True)
    rows = {
        "teacher": make_trainer(teacher, evaluation_args).evaluate(),
        "student, cut": make_trainer(cut_student, evaluation_args).evaluate(),
    }
    if args.baseline:
        trainer, _ = run("baseline", alpha=0.0)
        rows["student, cross-entropy alone"] = trainer.evaluate()
        trainer.save_model()
    trainer, metrics = run("student", alpha=training_args.alpha)
    rows["student, distilled"] = trainer.evaluate()
    trainer.save_model()

    if state.is_main_process:
        num_parameters = {name: (teacher if name == "teacher" else student).num_parameters() for name in rows}
        table = format_table(rows, num_parameters)
        seconds = metrics["train_runtime"]
        print(f"\n{table}\n")
        num_tokens = trainer.num_tokens_seen
        print(f"{num_tokens:,} tokens in {seconds:.0f} s: {num_tokens / seconds:,.0f} tokens per second")
        print(f"loss curve: {draw_loss_curve(trainer.state.log_history, output_dir / 'loss.png')}")
        print(f"sample of the saved student:\n{sample(output_dir / 'student', args.prompt)}\n")
        print(f"student: {output_dir / 'student'} (plain AutoModelForCausalLM loads it)")
        report = {"arguments": asdict(args), "rows": rows, "num_parameters": num_parameters, "train": metrics}
        (output_dir / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")


def choose_output_dir(given: str | None) -> Path:
    """The given folder, or the first free outputs/distill-N; the same on all ranks."""
    if given is not None:
        return Path(given)
    number = next(n for n in range(1, 10**6) if not Path(f"outputs/distill-{n}").exists())
    [number] = broadcast_object_list([number])
    return Path(f"outputs/distill-{number}")


def prepare(output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("student", "baseline"):
        shutil.rmtree(output_dir / name, ignore_errors=True)  # left by an overwritten run


def load_blocks(args: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """(training blocks, held-out blocks); the two never share a block."""
    options = {"text_column": args.text_column, "streaming": args.streaming}
    blocks = pack(load_corpus(args.dataset, split=args.dataset_split, **options), tokenizer, args.block_size)
    if args.dataset is None:
        held_out = pack(load_corpus(split="held_out"), tokenizer, args.block_size)
    elif args.eval_dataset is not None:
        corpus = load_corpus(args.eval_dataset, split=args.eval_split, **options)
        held_out = pack(corpus, tokenizer, args.block_size)
    else:
        held_out, blocks = blocks.take(args.num_eval_blocks), blocks.skip(args.num_eval_blocks)
    rows = list(islice(held_out, args.num_eval_blocks))
    return blocks, Dataset.from_list(rows) if rows else Dataset.from_dict({"input_ids": []})


def score(
    teacher: PreTrainedModel, blocks: Dataset, num_batches: int, training_args: DistillationConfig, state: PartialState
) -> ExpressiveScores:
    """Expressive scores from the first blocks, shared out over the ranks."""
    collate, size = BlockCollator(), training_args.per_device_train_batch_size
    rows = list(islice(blocks.shuffle(seed=training_args.seed), num_batches * size))
    batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    own = batches[state.process_index :: state.num_processes]
    return merge_ranks(score_model(teacher, own, progress=state.is_main_process))


def format_table(rows: dict[str, dict[str, float]], num_parameters: dict[str, int]) -> str:
    """A Markdown table of held-out results."""
    lines = [
        "| held out | parameters | cross-entropy | perplexity | agreement with teacher |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, metrics in rows.items():
        lines.append(
            f"| {name} | {num_parameters[name]:,} | {metrics['eval_ce']:.3f} | {metrics['eval_perplexity']:.2f} "
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
    main()
    PartialState().destroy_process_group()  # after main: gloo hangs when a DDP model outlives its process group
