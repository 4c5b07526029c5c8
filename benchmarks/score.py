"""Memory and time of `score` against one forward with gradient checkpointing, which any scorer needs at least.

    python benchmarks/score.py                                  # a Llama of 129M parameters on a CPU
    python benchmarks/score.py --metric taylor --hidden 1024

Memory is weights plus the rise of the process's peak; each measurement has a process of its own, whose allocator gives
freed tensors back at once (otherwise glibc's heap, not what is alive, is measured). The first reference is the forward
that a training step would run (`model(input_ids, labels)`, all logits held, autograd graph alive, layers
checkpointed). The second leaves the logits out: the hidden states of the backbone alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import describe_machine, peak_rise_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from hf_capgap import score
from hf_capgap.pruning import METRICS


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=args.length,
    )
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype))


def make_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(args.vocab, (args.batch, args.length), generator=torch.Generator())}


def checkpointed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.activation_checkpointing_enable()
    return model.train()


def run(name: str, model: LlamaForCausalLM, batch: dict[str, torch.Tensor], args: argparse.Namespace) -> object:
    if name == "score":
        return score(model, [batch], metric=args.metric)
    if name == "forward":
        return checkpointed(model)(**batch, labels=batch["input_ids"], use_cache=False)
    return checkpointed(model).base_model(**batch, use_cache=False)


def run_child(args: argparse.Namespace) -> None:
    model, batch = make_model(args), make_batch(args)
    small = {"input_ids": batch["input_ids"][:1, :8]}
    run(args.child, model, small, args)  # what is allocated once for ever
    seconds = time.perf_counter()
    rise = peak_rise_bytes(lambda: run(args.child, model, batch, args))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(json.dumps({"rise": rise, "weights": weights, "seconds": time.perf_counter() - seconds}))


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, *sys.argv[1:]]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--metric", default="expressive", choices=list(METRICS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--child", choices=["score", "forward", "backbone"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return run_child(args)
    found = {name: measure(name, args) for name in ("score", "forward", "backbone")}
    peak = {name: values["weights"] + values["rise"] for name, values in found.items()}
    print(f"{describe_machine()}; {args.metric}, {args.batch} x {args.length} tokens, {args.dtype}")
    print("| | weights + peak rise, MiB | seconds | score / this |")
    print("|---|---:|---:|---:|")
    for name, values in found.items():
        ratio = peak["score"] / peak[name]
        print(f"| {name} | {peak[name] / 2**20:.0f} | {values['seconds']:.1f} | {ratio:.2f} |")
    if args.json:
        args.json.write_text(
            json.dumps({"machine": describe_machine(), "arguments": vars(args), **found}, default=str)
        )
    return None


if __name__ == "__main__":
    main()
