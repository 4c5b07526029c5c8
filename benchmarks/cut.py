"""Peak memory and time of the streaming cut on a synthetic teacher. Target: 1.5 × the largest shard + 300 MB.

    python benchmarks/cut.py                                  # 3.3 GB in bfloat16, shards of 1 GB
    python benchmarks/cut.py --max_shard_size 200MB --in_memory true

The teacher (a Llama, random weights) is written to a temporary folder shard by shard. The cut runs in a process of its
own; its peak is all of the process's resident memory, Python and libraries included.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from measure import describe_machine, resident_bytes
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from hf_capgap import cut, solve_shape
from hf_capgap.families import family_for
from hf_capgap.pruning import ExpressiveScores
from hf_capgap.pruning.units import score_shapes

TARGET_BYTES_PER_SHARD, TARGET_EXTRA_BYTES = 1.5, 300_000_000


def write_teacher(folder: Path, args: argparse.Namespace) -> None:
    """Random weights in shards, without ever holding more than one of them."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=args.hidden // 512,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    family = family_for(config)
    sizes = family.sizes(config)
    shapes = {parameter.name: parameter.shape(sizes) for parameter in family.parameters_of(config)}
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: 2 * math.prod(shape),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=args.max_shard_size,
    )
    for file_name, names in split.filename_to_tensors.items():
        tensors = {name: torch.randn(shapes[name]).to(torch.bfloat16) for name in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_scores(folder: Path) -> ExpressiveScores:
    config = AutoConfig.from_pretrained(folder)
    shapes = score_shapes(family_for(config), config)
    return ExpressiveScores(
        **{name: torch.rand(shape) for name, shape in shapes.items()},
        metric="random",
        unit="batch",
        num_units=1,
        model_type=config.model_type,
        model_name="",
        calibration_hash="",
    )


def run_child(args: argparse.Namespace) -> None:
    teacher = args.folder / "teacher"
    shape = solve_shape(AutoConfig.from_pretrained(teacher), args.target)
    scores = random_scores(teacher)
    imported = resident_bytes("VmRSS")
    start = time.perf_counter()
    if args.child == "streaming":
        cut(teacher, scores, shape, output_dir=args.folder / "streamed")
    else:
        cut(teacher, scores, shape).save_pretrained(args.folder / "in_memory")
    seconds = time.perf_counter() - start
    print(json.dumps({"peak": resident_bytes("VmHWM"), "imported": imported, "seconds": seconds}))


def measure(how: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", how, "--folder", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--max_shard_size", default="1GB")
    parser.add_argument("--target", default="60%")
    parser.add_argument("--in_memory", type=json.loads, default=False, help="true: also measure the cut in memory")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--child", choices=["streaming", "in_memory"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        (folder / "teacher").mkdir()
        write_teacher(folder / "teacher", args)
        shards = [path.stat().st_size for path in (folder / "teacher").glob("*.safetensors")]
        found = {how: measure(how, folder) for how in ("streaming", *(["in_memory"] if args.in_memory else []))}
    limit = TARGET_BYTES_PER_SHARD * max(shards) + TARGET_EXTRA_BYTES
    print(
        f"{describe_machine()}; teacher {sum(shards) / 1e9:.2f} GB in {len(shards)} shards, "
        f"largest {max(shards) / 1e6:.0f} MB"
    )
    print("| cut | peak MB | of which before the cut | target MB | seconds |")
    print("|---|---:|---:|---:|---:|")
    for how, values in found.items():
        print(
            f"| {how} | {values['peak'] / 1e6:.0f} | {values['imported'] / 1e6:.0f} | {limit / 1e6:.0f} "
            f"| {values['seconds']:.1f} |"
        )
    if args.json:
        record = {"machine": describe_machine(), "arguments": vars(args), "shards": shards, "limit": limit, **found}
        args.json.write_text(json.dumps(record, default=str))
    return None


if __name__ == "__main__":
    main()
