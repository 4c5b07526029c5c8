"""Time and memory of the fused objective against the dense one and against the four matrix products alone.

    python benchmarks/loss.py                              # T = 1024, H = 256/512, V = 32000, float32, CPU
    python benchmarks/loss.py --num_tokens 512 1024 4096   # memory that does not grow with the tokens
    python benchmarks/loss.py --device cuda --dtype bfloat16 --student_hidden 2048 --teacher_hidden 4096 --vocab 128256

Times are forward + backward, from interleaved rounds in a rotating order; the ratio is the median over rounds of the
time to that of the floor in the same round. The floor is the four products that any implementation needs (student
logits, teacher logits, ∂hidden, ∂weight) with their outputs already allocated. Memory is the rise of the peak in a
process of its own: resident memory on a CPU (Linux), allocated memory on a GPU; it includes the gradients, which are
given beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import describe_machine, peak_rise_bytes

from hf_capgap import fused_distillation_loss
from hf_capgap.distillation import distillation_loss

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def fused(student_hidden, student_weight, teacher_hidden, teacher_weight, labels) -> torch.Tensor:
    return fused_distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)[0]


def dense(student_hidden, student_weight, teacher_hidden, teacher_weight, labels) -> torch.Tensor:
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_weight.t()
    return distillation_loss(student_hidden @ student_weight.t(), teacher_logits, labels)[0]


IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {"fused": fused, "dense": dense}


def make_inputs(num_tokens: int, args: argparse.Namespace) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(args.device, dtype)

    labels = torch.randint(args.vocab, (num_tokens,), generator=generator).to(args.device)
    return (
        random(num_tokens, args.student_hidden).requires_grad_(),
        random(args.vocab, args.student_hidden, scale=0.1).requires_grad_(),
        random(num_tokens, args.teacher_hidden),
        random(args.vocab, args.teacher_hidden, scale=0.1),
        labels,
    )


def make_floor(inputs: Inputs) -> Callable[[], None]:
    """The four products, all tokens at once, into buffers that are already there."""
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels = (tensor.detach() for tensor in inputs)
    logits = student_hidden.new_empty(len(labels), len(student_weight))
    gradient = torch.randn(logits.shape, device=logits.device, dtype=logits.dtype) * 1e-3
    hidden_gradient, weight_gradient = torch.empty_like(student_hidden), torch.empty_like(student_weight)

    def floor() -> None:
        torch.mm(student_hidden, student_weight.t(), out=logits)
        torch.mm(teacher_hidden, teacher_weight.t(), out=logits)
        torch.mm(gradient, student_weight, out=hidden_gradient)
        torch.mm(gradient.t(), student_hidden, out=weight_gradient)

    return floor


def run(name: str, inputs: Inputs) -> None:
    inputs[0].grad = inputs[1].grad = None
    IMPLEMENTATIONS[name](*inputs).backward()


def measure_time(num_tokens: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round, per implementation and for the floor."""
    inputs = make_inputs(num_tokens, args)
    calls: dict[str, Callable[[], None]] = {name: (lambda name=name: run(name, inputs)) for name in args.only}
    calls["floor"] = make_floor(inputs)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for round_number in range(args.rounds + 1):
        shift = round_number % len(order)
        for name in order[shift:] + order[:shift]:
            gc.collect()
            _synchronize(args.device)
            start = time.perf_counter()
            calls[name]()
            _synchronize(args.device)
            if round_number > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_memory(name: str, num_tokens: int, args: argparse.Namespace) -> float:
    """Extra peak MiB of one forward and backward, in a fresh process."""
    options = ["--device", args.device, "--dtype", args.dtype, "--vocab", args.vocab, "--threads", args.threads]
    options += ["--student_hidden", args.student_hidden, "--teacher_hidden", args.teacher_hidden]
    command = [sys.executable, __file__, "--child", name, "--num_tokens", num_tokens, *options]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def run_memory_child(name: str, num_tokens: int, args: argparse.Namespace) -> None:
    warm_up = argparse.Namespace(**{**vars(args), "vocab": 512})
    run(name, make_inputs(8, warm_up))
    inputs = make_inputs(num_tokens, args)
    print(peak_rise_bytes(lambda: run(name, inputs), args.device) / 2**20)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--student_hidden", type=int, default=256)
    parser.add_argument("--teacher_hidden", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--child", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return run_memory_child(args.child, args.num_tokens[0], args)
    machine = describe_machine(args.device)
    print(
        f"{machine}; H {args.student_hidden}/{args.teacher_hidden}, V {args.vocab}, {args.dtype}, {args.rounds} rounds"
    )
    print("|     T | implementation | seconds | x floor | extra MiB | of which gradients |")
    print("|------:|----------------|--------:|--------:|----------:|-------------------:|")
    records = []
    for num_tokens in args.num_tokens:
        seconds = measure_time(num_tokens, args)
        itemsize = getattr(torch, args.dtype).itemsize
        gradient_mib = (num_tokens + args.vocab) * args.student_hidden * itemsize / 2**20
        for name, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, seconds["floor"], strict=True))
            extra = measure_memory(name, num_tokens, args) if name != "floor" else None
            shown = f"{extra:9.0f} | {gradient_mib:18.0f}" if extra is not None else " " * 9 + " | " + " " * 18
            print(
                f"| {num_tokens:5} | {name:14} | {statistics.median(times):7.3f} | {ratio:7.2f} | {shown} |",
                flush=True,
            )
            records.append(
                {"num_tokens": num_tokens, "name": name, "seconds": times, "ratio": ratio, "extra_mib": extra}
            )
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, "arguments": vars(args), "records": records}, default=str)
        )
    return None


if __name__ == "__main__":
    main()
