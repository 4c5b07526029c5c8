"""One optimizer step of a `DistillationTrainer` on the same 8 sequences, in whatever split is asked for.

    python tests/scripts/gradient_contract.py OUT.safetensors BATCH_SIZE ACCUMULATION [OPTION=VALUE ...]

Rank 0 writes the loss that the Trainer logs and the gradients that reach the optimizer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

from hf_capgap import DistillationConfig, DistillationTrainer

NUM_SEQUENCES, LENGTH, VOCAB = 8, 24, 61


def build_model(hidden_size: int, seed: int, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        **overrides,
    )
    return LlamaForCausalLM(config)


def build_rows() -> Dataset:
    """Eight sequences; row i ignores a different number of its labels, row 3 all of them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(VOCAB, (NUM_SEQUENCES, LENGTH), generator=generator)
    labels = inputs.clone()
    for row, num_ignored in enumerate([0, 5, 11, LENGTH, 1, 17, 2, 22]):
        labels[row, torch.randperm(LENGTH, generator=generator)[:num_ignored]] = -100
    return Dataset.from_dict({"input_ids": inputs.tolist(), "labels": labels.tolist()})


class GradientRecorder(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.detach()
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient  # sharded by FSDP2
                self.gradients[name] = whole.clone().contiguous()


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """The model, sharded over all ranks by FSDP2 as transformers does it."""
    from transformers.distributed import DistributedConfig

    [folder] = broadcast_object_list([tempfile.mkdtemp()])
    if PartialState().is_main_process:
        model.save_pretrained(folder)
    PartialState().wait_for_everyone()
    sharding = DistributedConfig(fsdp_size=PartialState().num_processes)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=sharding)


def run_step(
    batch_size: int, accumulation: int, sharded: tuple[str, ...] = (), **options: Any
) -> tuple[float, dict[str, torch.Tensor], bool]:
    """(logged loss, gradients, whether this is rank 0); `sharded` names the models to shard with FSDP2."""
    recorder = GradientRecorder()
    args = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    assert args.device.type == "cpu"  # reading it starts the process group
    models = {"student": build_model(32, seed=1), "teacher": build_model(48, seed=2)}
    models |= {name: shard(models[name]) for name in sharded}
    trainer = DistillationTrainer(
        model=models["student"],
        teacher_model=models["teacher"],
        args=args,
        train_dataset=build_rows(),
        callbacks=[recorder],
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return loss, recorder.gradients, trainer.is_world_process_zero()


def main() -> None:
    path, batch_size, accumulation, *options = sys.argv[1:]
    parsed = {name: json.loads(value) for name, value in (option.split("=", 1) for option in options)}
    loss, gradients, is_main = run_step(int(batch_size), int(accumulation), **parsed)
    if is_main:
        save_file(gradients, path, metadata={"loss": repr(loss)})


if __name__ == "__main__":
    main()
    # Only now that the trainer is gone: gloo hangs in the destructor of a DDP model that outlives its process group.
    PartialState().destroy_process_group()
