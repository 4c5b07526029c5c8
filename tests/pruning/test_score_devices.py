"""`score` on several ranks, with weights put away by accelerate, and on quantised weights: the same numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from test_scores import assert_same_scores, make_batches
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hf_capgap import ExpressiveScores, cut, score, solve_shape
from hf_capgap.errors import ConfigError, ScoresError, UnsupportedModelError
from hf_capgap.families import FAMILIES

SCRIPT = Path(__file__).parent.parent / "scripts" / "score_own_batches.py"


# --- several ranks -------------------------------------------------------------------------------------------------


def test_ranks_with_batches_of_their_own_give_the_scores_of_one_process(make_model, launch_ranks, tmp_path):
    """Two batches and one, and three and none, in a model that DDP has wrapped."""
    model, batches = make_model(), make_batches(3)
    model.save_pretrained(tmp_path / "teacher")
    cases = {"unequal": [batches[:2], batches[2:]], "none": [batches, []]}
    torch.save(cases, tmp_path / "batches.pt")
    launch_ranks(SCRIPT, tmp_path / "teacher", tmp_path / "batches.pt", tmp_path / "scores", num_ranks=2)
    for metric in ("expressive", "taylor", "activation"):
        expected = score(model, batches, metric=metric)
        for case, shares in cases.items():
            for rank, share in enumerate(shares):
                found = ExpressiveScores.load(tmp_path / f"scores.{case}.{metric}.{rank}")
                assert_same_scores(found, expected)
                assert (found.num_units, found.calibration_hash) == (3, expected.calibration_hash)
                if share:
                    alone = ExpressiveScores.load(tmp_path / f"scores.{case}.{metric}.{rank}.alone")
                    assert_same_scores(alone, score(model, share, metric=metric))


# --- weights that are put away -------------------------------------------------------------------------------------


def partly_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Two of the layers and the final norm on the disk, the rest in place."""
    layers = FAMILIES[model.config.model_type].layers
    body, _, name = layers.rpartition(".")
    device_map = {f"{body}.{child}": "cpu" for child, _ in model.get_submodule(body).named_children() if child != name}
    device_map |= {f"{layers}.{index}": "disk" if index in (1, 2) else "cpu" for index in range(4)}
    return dispatch_model(model, {**device_map, "lm_head": "cpu"}, main_device="cpu", offload_dir=folder)


OFFLOADS = {
    "all in memory": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "all on disk": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "two layers on disk": partly_on_disk,
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_offloaded_weights_give_the_same_scores(make_model, tmp_path, model_type, offload):
    """Head, embeddings and experts among them; with weights that are tied, too."""
    model, batches = make_model(model_type), make_batches()
    metrics = ("expressive", "activation", "magnitude", "magnitude_l1")
    expected = {metric: score(model, batches, metric=metric) for metric in metrics}
    model = OFFLOADS[offload](model, tmp_path / "weights")
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert len(away) > 10
    for metric in metrics:
        assert_same_scores(score(model, batches, metric=metric), expected[metric], tolerance=1e-6)
        assert [name for name, parameter in model.named_parameters() if parameter.is_meta] == away
    for metric in ("taylor", "movement"):
        with pytest.raises(ConfigError, match="Offloaded weights have no gradient.*'expressive'"):
            score(model, batches, metric=metric)


# --- quantised weights ---------------------------------------------------------------------------------------------


@pytest.fixture
def bitsandbytes() -> Iterator[ModuleType]:
    module = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    loggers = [logging.getLogger(name) for name in ("bitsandbytes.autograd._functions", "bitsandbytes")]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # says at every product that it casts to float16
    yield module
    for logger in loggers:
        logger.setLevel(logging.NOTSET)


QUANTIZED = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "4 bit, double": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    ),
}


@pytest.fixture
def quantize(make_model, tmp_path):
    """A tiny Llama with packed weights; its widths are multiples of 32, as the 4-bit kernel on the CPU wants."""

    def load(kind: str) -> PreTrainedModel:
        make_model(intermediate_size=128).save_pretrained(tmp_path / "teacher")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", quantization_config=QUANTIZED[kind])

    return load


def unpacked(model: PreTrainedModel, make_model, bitsandbytes: ModuleType) -> PreTrainedModel:
    """A float model with the weights that the packed ones stand for."""
    plain = make_model(intermediate_size=128)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "quant_state"):
                values = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            elif parameter.dtype == torch.int8:
                values = parameter.data * parameter.SCB[:, None] / 127
            else:
                values = parameter
            plain.get_parameter(name).copy_(values)
    return plain


@pytest.mark.parametrize(("kind", "tolerance"), [("8 bit", 0.2), ("4 bit", 1e-4), ("4 bit, double", 1e-4)])
def test_quantised_models_are_scored(make_model, quantize, bitsandbytes, kind, tolerance):
    """As a float model with the weights that theirs stand for. 8-bit products round the activations, too."""
    model, batches = quantize(kind), make_batches()
    expected, float_weights = unpacked(model, make_model, bitsandbytes), make_model(intermediate_size=128)
    assert not torch.equal(
        expected.model.layers[0].mlp.up_proj.weight, float_weights.model.layers[0].mlp.up_proj.weight
    )
    packed = model.model.layers[0].mlp.up_proj.weight.clone()
    assert_same_scores(score(model, batches), score(expected, batches), tolerance)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, packed)
    activation = score(expected, batches, metric="activation")
    assert_same_scores(score(model, batches, metric="activation"), activation, tolerance=0.1)


@pytest.mark.parametrize("kind", ["4 bit", "4 bit, double"])
def test_four_bit_models_that_have_run_before_are_scored(make_model, quantize, bitsandbytes, kind):
    """On some CPUs the first run without gradients packs the weights anew, in a way that lets no gradient through."""
    model, batches = quantize(kind), make_batches()
    with torch.no_grad():
        model.eval()(**batches[0])
    scores = score(model, batches)
    assert_same_scores(scores, score(unpacked(model, make_model, bitsandbytes), batches), tolerance=1e-4)


def test_a_model_that_passes_no_gradient_back_is_refused(make_model):
    """Rather than scored with zeros."""
    model = make_model()

    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    model.model.layers[2].self_attn.o_proj.register_forward_hook(lambda _, args, output: OneWay.apply(output))
    with pytest.raises(ScoresError, match="passes no gradient back"):
        score(model, make_batches())


@pytest.mark.parametrize("kind", ["8 bit", "4 bit"])
def test_what_cannot_be_done_with_quantised_weights_is_refused(quantize, bitsandbytes, kind):
    model, batches = quantize(kind), make_batches(1)
    for metric in ("taylor", "movement", "magnitude", "magnitude_l1"):
        with pytest.raises(ConfigError, match="[Qq]uantised.*[Ll]oad .*unquantised"):
            score(model, batches, metric=metric)
    scores = score(model, batches)
    with pytest.raises(UnsupportedModelError, match="Quantised weights cannot be cut"):
        cut(model, scores, solve_shape(model.config, "60%"))


def test_scores_of_quantised_weights_cut_the_unquantised_model(make_model, quantize, bitsandbytes):
    scores = score(quantize("4 bit"), make_batches(1))
    teacher = make_model(intermediate_size=128)
    student = cut(teacher, scores, solve_shape(teacher.config, "60%"))
    assert student.num_parameters() < 0.7 * teacher.num_parameters()


def test_offloaded_model_is_not_cut_in_memory(make_model, tmp_path):
    scores = score(make_model(), make_batches(1))
    model = OFFLOADS["two layers on disk"](make_model(), tmp_path / "weights")
    with pytest.raises(UnsupportedModelError, match="offloaded.*streams|offloaded.*output_dir"):
        cut(model, scores, solve_shape(model.config, "60%"))
