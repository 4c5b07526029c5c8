"""Fixtures: tiny real models of every family, a byte tokenizer, and a launcher of real ranks. No network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_capgap.families import FAMILIES

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models: a second thread only waits for the first


@pytest.fixture(autouse=True)
def _seed_and_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


class _DeprecationLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.messages.append(f"{record.pathname}:{record.lineno}: {message}")


@pytest.fixture(autouse=True)
def logged_deprecations() -> Iterator[list[str]]:
    """Fails a test that makes a library log a deprecation; those that are warnings are errors by pyproject.toml."""
    log = _DeprecationLog()
    loggers = [logging.getLogger(name) for name in ("accelerate", "datasets", "transformers")]
    transformers.utils.logging.warning_once.cache_clear()
    for logger in loggers:
        logger.addHandler(log)
    yield log.messages
    for logger in loggers:
        logger.removeHandler(log)
    assert not log.messages, "deprecations were logged:\n" + "\n".join(log.messages)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Builds a tiny model: `make_model("qwen3", seed=1, hidden_size=32)`. Its weights are random and far from zero."""

    def make(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**FAMILIES[model_type].tiny_config, **overrides})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases: not all ones or zeros, or mistakes would not show
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Builds a byte-level tokenizer of `vocab_size` tokens (at least 258), without merges."""

    def make(vocab_size: int = 260, eos_token: str = "</s>") -> PreTrainedTokenizerFast:
        pieces = [eos_token, "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        pieces += [f"<extra_{i}>" for i in range(vocab_size - len(pieces))]
        tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token, pad_token="<pad>")

    return make


@pytest.fixture(scope="session")
def launch_ranks() -> Callable[..., str]:
    """Runs a script on real gloo ranks: `launch_ranks(script_path, *args, num_ranks=2)`; returns its output."""

    def launch(script: Path, *args: str, num_ranks: int = 2) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [*command, str(script), *map(str, args)],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
        return result.stdout

    return launch
