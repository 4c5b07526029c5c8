"""Expressive scores against explicit gates in a decoder written out by hand, and the container that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_capgap import ExpressiveScores, cut, score, solve_shape
from hf_capgap.errors import ConfigError, ScoresError
from hf_capgap.pruning import merge_ranks

Batch = dict[str, Tensor]

# Each family, and Llama in the variants that change where a gate's gradient comes from.
VARIANTS = {
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
}


def make_batches(num_batches: int = 3, batch_size: int = 3, length: int = 24, seed: int = 0) -> list[Batch]:
    """Random tokens; every row begins with a stretch of -100 of its own length."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        input_ids = torch.randint(2, 96, (batch_size, length), generator=generator)
        prompt = torch.randint(0, length - 2, (batch_size, 1), generator=generator)
        labels = input_ids.masked_fill(torch.arange(length) < prompt, -100)
        batches.append({"input_ids": input_ids, "labels": labels})
    return batches


def rows_of(batches: list[Batch]) -> list[Batch]:
    """The same sequences, one per batch."""
    return [
        {name: value[i : i + 1] for name, value in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]


def assert_same_scores(found: ExpressiveScores, expected: ExpressiveScores | dict[str, Tensor], tolerance=3e-5):
    """Every score within `tolerance` of the largest score of its layer."""
    for name in ("heads", "neurons", "hidden"):
        wanted = expected[name] if isinstance(expected, dict) else getattr(expected, name)
        assert getattr(found, name).shape == wanted.shape
        error = (getattr(found, name).double() - wanted.double()).abs().amax(-1) / wanted.double().abs().amax(-1)
        assert error.max() < tolerance, f"{name}: {error.max():.1e}"


# --- the reference: a decoder with gates, written out in float64 ---------------------------------------------------


def gates_of(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    shapes = {
        "heads": (config.num_hidden_layers, config.num_key_value_heads),
        "neurons": (config.num_hidden_layers, config.intermediate_size),
        "hidden": (config.hidden_size,),
    }
    return {name: torch.ones(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}


def gated_logits(model: PreTrainedModel, batch: Batch, gates: dict[str, Tensor]) -> Tensor:
    """Logits of a Llama-like `model`, [batch, length, vocab] float64, with every gate multiplied in.

    The one hidden gate is applied at 4·layers + 1 sites: the embedding, and in every layer each branch's output and
    the residual sum after it.
    """
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
        return x * scale * weights[f"{name}.weight"]

    x = weights["model.embed_tokens.weight"][batch["input_ids"]] * gates["hidden"]
    for layer in range(model.config.num_hidden_layers):
        path = f"model.layers.{layer}"
        normed = norm(x, f"{path}.input_layernorm")
        heads = attention(model, layer, normed, batch.get("attention_mask"), linear, norm)  # [batch, length, q, d]
        groups = gates["heads"][layer].repeat_interleave(heads.shape[2] // len(gates["heads"][layer]))
        branch = linear((heads * groups[:, None]).flatten(2), f"{path}.self_attn.o_proj") * gates["hidden"]
        x = (x + branch) * gates["hidden"]
        normed = norm(x, f"{path}.post_attention_layernorm")
        gate, up = linear(normed, f"{path}.mlp.gate_proj"), linear(normed, f"{path}.mlp.up_proj")
        neurons = gate * gate.sigmoid() * up * gates["neurons"][layer]
        x = (x + linear(neurons, f"{path}.mlp.down_proj") * gates["hidden"]) * gates["hidden"]
    return linear(norm(x, "model.norm"), "lm_head")


def attention(model, layer: int, x: Tensor, attention_mask: Tensor | None, linear, norm) -> Tensor:
    """Attention output of each query head before the output projection, [batch, length, q_heads, head_dim]."""
    config, path = model.config, f"model.layers.{layer}.self_attn"
    length, head_dim = x.shape[1], config.head_dim
    q, k, v = (linear(x, f"{path}.{name}_proj").unflatten(-1, (-1, head_dim)) for name in "qkv")
    if config.model_type == "qwen3":
        q, k = norm(q, f"{path}.q_norm"), norm(k, f"{path}.k_norm")
    q, k = rotate(q, config), rotate(k, config)
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    distance = torch.arange(length)[:, None] - torch.arange(length)  # query position minus key position
    visible = (distance >= 0) & (distance < window_of(config, layer))
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool() | torch.eye(length).bool()
    weight = torch.einsum("bqhd,bkhd->bhqk", q, k) / head_dim**0.5
    return torch.einsum("bhqk,bkhd->bqhd", weight.masked_fill(~visible, float("-inf")).softmax(-1), v)


def window_of(config, layer: int) -> int:
    layer_types = getattr(config, "layer_types", None)
    slides = config.model_type == "mistral" if layer_types is None else layer_types[layer] == "sliding_attention"
    return config.sliding_window if slides else config.max_position_embeddings


def rotate(x: Tensor, config) -> Tensor:
    """Rotary positions: the pair (i, i + head_dim / 2) turns by position / theta^(2i / head_dim)."""
    half = x.shape[-1] // 2
    theta = config.rope_parameters["rope_theta"]
    angle = torch.arange(x.shape[1]).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def reference_scores(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Mean over `batches` of |∂ mean cross-entropy of the batch / ∂ gate|, by autograd."""
    totals: dict[str, Any] = dict.fromkeys(("heads", "neurons", "hidden"), 0.0)
    for batch in batches:
        gates = gates_of(model)
        log_probabilities = gated_logits(model, batch, gates)[:, :-1].log_softmax(-1)
        targets = batch["labels"][:, 1:]
        valid = targets != -100
        loss = -log_probabilities[valid].gather(-1, targets[valid][:, None]).mean()
        for (name, _), gradient in zip(gates.items(), torch.autograd.grad(loss, list(gates.values()))):
            totals[name] = totals[name] + gradient.abs() / len(batches)
    return totals


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_decoder_computes_the_models_logits(make_model, variant):
    """A reference that computes another function would prove nothing; the sequence is longer than sliding windows."""
    model_type, overrides = VARIANTS[variant]
    model = make_model(model_type, **overrides).double().eval()
    batch = make_batches(1)[0]
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
        # transformers computes norms and rotary angles in float32 whatever the model's dtype
        torch.testing.assert_close(gated_logits(model, batch, gates_of(model)), expected, rtol=0.0, atol=3e-5)


# --- the scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_gradients_of_explicit_gates(make_model, variant):
    """With another number of targets in every row, and a last batch smaller than the others."""
    model_type, overrides = VARIANTS[variant]
    model = make_model(model_type, **overrides).double()
    batches = [*make_batches(2), *make_batches(1, batch_size=1, seed=1)]
    scores = score(model, batches)
    assert_same_scores(scores, reference_scores(model, batches), tolerance=1e-5)
    assert (scores.unit, scores.num_units, scores.model_type) == ("batch", 3, model_type)
    assert {getattr(scores, name).dtype for name in ("heads", "neurons", "hidden")} == {torch.float32}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_example_scores_are_those_of_one_sequence_at_a_time(make_model, model_type):
    model, batches = make_model(model_type), make_batches()
    scores = score(model, batches, unit="example")
    assert_same_scores(scores, reference_scores(model, rows_of(batches)))
    assert (scores.unit, scores.num_units) == ("example", 9)


def test_example_scores_do_not_depend_on_the_batch_size(make_model):
    model, rows = make_model(), rows_of(make_batches())
    one_batch = [{name: torch.cat([row[name] for row in rows]) for name in rows[0]}]
    by_one = score(model, rows, unit="example")
    assert_same_scores(score(model, one_batch, unit="example"), by_one)
    assert score(model, one_batch).num_units == 1
    with pytest.raises(AssertionError):  # the absolute value of a batch's gradient does depend on it
        assert_same_scores(score(model, one_batch), by_one, tolerance=0.05)


def test_labels_default_to_the_inputs(make_model):
    model, batches = make_model(), make_batches()
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in batches]
    labelled = [{"input_ids": batch["input_ids"], "labels": batch["input_ids"]} for batch in batches]
    assert_same_scores(score(model, unlabelled), reference_scores(model, labelled))


def pad(row: Batch, padding: tuple[int, int]) -> Batch:
    """`row` with so many padding tokens before and after it."""
    values = {"input_ids": 1, "labels": -100}
    padded = {name: torch.nn.functional.pad(row[name], padding, value=value) for name, value in values.items()}
    return {**padded, "attention_mask": torch.nn.functional.pad(torch.ones_like(row["input_ids"]), padding)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_padding_does_not_change_the_scores(make_model, model_type, side):
    model = make_model(model_type)
    rows = [row for length in (12, 17, 20) for row in make_batches(1, batch_size=1, length=length, seed=length)]
    missing = [20 - row["input_ids"].shape[1] for row in rows]
    padded = [pad(row, (n, 0) if side == "left" else (0, n)) for row, n in zip(rows, missing)]
    batch = {name: torch.cat([row[name] for row in padded]) for name in padded[0]}
    assert_same_scores(score(model, [batch], unit="example"), reference_scores(model, rows))
    assert_same_scores(score(model, [batch]), reference_scores(model, [batch]))


def test_padding_without_a_mask_would_change_the_scores(make_model):
    """The attention mask of the batch really reaches the model in the test above."""
    model, row = make_model(), make_batches(1, batch_size=1)[0]
    batch = pad(row, (6, 0))
    del batch["attention_mask"]
    with pytest.raises(AssertionError):
        assert_same_scores(score(model, [batch]), score(model, [row]), tolerance=0.05)


def test_batches_without_targets_do_not_count(make_model):
    model, batches = make_model(), make_batches()
    empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    with_empty = score(model, [batches[0], empty, *batches[1:]])
    assert with_empty.num_units == 3
    assert_same_scores(with_empty, score(model, batches))
    half_empty = {name: torch.cat([batches[0][name], empty[name]]) for name in empty}
    assert score(model, [half_empty], unit="example").num_units == 3
    with pytest.raises(ScoresError, match="-100"):
        score(model, [empty])
    with pytest.raises(ScoresError):
        score(model, [])


def test_no_more_batches_than_asked_are_drawn(make_model):
    batches = iter(make_batches(4))
    assert score(make_model(), batches, num_batches=3).num_units == 3
    assert len(list(batches)) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_does_not_change_the_scores(make_model, use_reentrant):
    model, batches = make_model(), make_batches()
    plain = score(model, batches)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    assert_same_scores(score(model, batches), plain)
    assert len(calls) == 2 * len(batches)  # forward, and again on the way back: it really checkpoints


def test_dropout_is_off(make_model):
    model, batches = make_model(attention_dropout=0.5).train(), make_batches()
    assert_same_scores(score(model, batches), reference_scores(model, batches))


def test_bfloat16_model_scores_are_close_and_float32(make_model):
    model, batches = make_model(), make_batches()
    scores = score(model.bfloat16(), batches)
    assert scores.neurons.dtype == torch.float32
    assert_same_scores(scores, reference_scores(model, batches), tolerance=0.15)


def test_bfloat16_products_are_summed_in_float32(make_model):
    """Rounding each product, or their sum over thousands of tokens, to eight bits would drown the small scores."""
    model, batches = make_model().bfloat16(), make_batches()
    products = []  # float64 activation times gradient of each batch, summed over tokens

    def watch(module: torch.nn.Module, args: tuple) -> None:
        args[0].register_hook(lambda gradient: products.append((args[0].double() * gradient.double()).sum((0, 1))))

    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(watch)
    scores = score(model, batches)
    expected = torch.stack(products).abs().mean(0)
    torch.testing.assert_close(
        scores.neurons[2].double(), expected.detach(), rtol=0.0, atol=1e-6 * expected.max().item()
    )


def test_scoring_under_no_grad_still_scores(make_model):
    model, batches = make_model(), make_batches()
    with torch.no_grad():
        scores = score(model, batches)
    assert_same_scores(scores, reference_scores(model, batches))


# --- the model is left as it was found -----------------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> tuple:
    """Everything that scoring touches, as comparable values."""
    parameters = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    modules = [
        (name, m.training, len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in model.named_modules()
    ]
    return parameters, modules


def unusual_model(make_model) -> PreTrainedModel:
    """Partly frozen, partly in training mode, and with a gradient of its own: none of it the same everywhere."""
    model = make_model().train()
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    return model


def test_weights_are_frozen_while_scoring_and_everything_is_restored(make_model):
    model = unusual_model(make_model)
    gradient = model.lm_head.weight.grad.clone()
    before, weights = state_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def watched() -> Iterator[Batch]:
        for batch in make_batches():
            yield batch
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]

    assert score(model, watched()).num_units == 3
    assert state_of(model) == before
    assert torch.equal(model.lm_head.weight.grad, gradient)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_everything_is_restored_after_an_exception(make_model):
    model = unusual_model(make_model)
    before = state_of(model)

    def broken() -> Iterator[Batch]:
        yield make_batches()[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        score(model, broken())
    assert state_of(model) == before


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"unit": "token"}, {"metric": "magnitude"}])
def test_unknown_choice_is_refused_with_the_known_ones(make_model, choice):
    ((name, value),) = choice.items()
    with pytest.raises(ConfigError, match=f"{name}.*{value}.*Choose one of"):
        score(make_model(), make_batches(), **choice)


def test_non_finite_gradient_is_refused_with_its_batch(make_model):
    """One NaN would make every score NaN, and the selection arbitrary."""
    model, batches = make_model(), make_batches()
    unused = next(token for token in range(96) if not any((b["input_ids"] == token).any() for b in batches))
    model.get_input_embeddings().weight.data[unused] = float("nan")
    batches[2]["input_ids"][0, 0] = unused
    with pytest.raises(ScoresError, match=r"Non-finite.*batch 2"):
        score(model, batches)


# --- the container -------------------------------------------------------------------------------------------------


def test_scores_survive_their_file(make_model, tmp_path):
    scores = score(make_model(), make_batches(), unit="example")
    path = tmp_path / "deep" / "scores.safetensors"
    scores.save(path)
    loaded = ExpressiveScores.load(path)
    for name in ExpressiveScores.__dataclass_fields__:
        expected = getattr(scores, name)
        found = getattr(loaded, name)
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing partial is left


def test_damaged_and_foreign_files_are_refused_by_name(make_model, tmp_path):
    scores = score(make_model(), make_batches(1))
    whole, damaged = tmp_path / "scores.safetensors", tmp_path / "damaged.safetensors"
    scores.save(whole)
    content = whole.read_bytes()
    record = {"hf_capgap_scores": json.dumps({"metric": "expressive"})}

    def write_foreign(metadata: dict[str, str] | None) -> None:
        save_file({"heads": scores.heads, "neurons": scores.neurons, "hidden": scores.hidden}, damaged, metadata)

    damages = [
        lambda: damaged.write_bytes(content[:-40]),
        lambda: damaged.write_bytes(b""),
        lambda: damaged.write_text("not a safetensors file"),
        lambda: write_foreign(None),
        lambda: write_foreign({"hf_capgap_scores": "{"}),
        lambda: write_foreign(record),
        lambda: save_file({"heads": scores.heads}, damaged, record),
    ]
    for damage in damages:
        damage()
        with pytest.raises(ScoresError, match=r"damaged\.safetensors"):
            ExpressiveScores.load(damaged)
    with pytest.raises(FileNotFoundError):
        ExpressiveScores.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["heads", "neurons", "hidden"])
def test_non_finite_scores_are_neither_loaded_nor_used(make_model, tmp_path, name, value):
    model = make_model()
    scores = score(model, make_batches(1))
    getattr(scores, name).view(-1)[3] = value
    scores.save(tmp_path / "scores.safetensors")
    with pytest.raises(ScoresError, match=name):
        ExpressiveScores.load(tmp_path / "scores.safetensors")
    with pytest.raises(ScoresError, match=name):
        cut(model, scores, solve_shape(model.config, "50%"))


@pytest.mark.parametrize("unit", ["batch", "example"])
def test_merged_parts_are_the_scores_of_the_whole(make_model, unit):
    """Parts weigh by what they have seen: here three batches and one."""
    model, batches = make_model(), make_batches(4)
    parts = [score(model, batches[:3], unit=unit), score(model, batches[3:], unit=unit)]
    whole, merged = score(model, batches, unit=unit), ExpressiveScores.merge(parts)
    assert_same_scores(merged, whole)
    assert merged.num_units == whole.num_units
    assert merged.calibration_hash == whole.calibration_hash
    assert merge_ranks(whole) is whole  # one process


def test_parts_that_do_not_belong_together_are_not_merged(make_model):
    model, batches = make_model(), make_batches(1)
    scores = score(model, batches)
    strangers = [
        score(model, batches, unit="example"),
        replace(scores, metric="magnitude"),
        replace(scores, model_type="mistral"),
        score(make_model(hidden_size=56), batches),
    ]
    for stranger in strangers:
        with pytest.raises(ScoresError):
            ExpressiveScores.merge([scores, stranger])
    with pytest.raises(ScoresError):
        ExpressiveScores.merge([])


def test_calibration_hash_tells_what_was_seen_whatever_the_order(make_model):
    model, batches = make_model(), make_batches()
    relabelled = [{**batches[0], "labels": batches[0]["labels"].masked_fill(torch.arange(24) > 21, -100)}]
    hashes = {
        name: score(model, data).calibration_hash
        for name, data in {
            "all": batches,
            "reversed": batches[::-1],
            "fewer": batches[:2],
            "one twice": [*batches, batches[0]],
            "other tokens": make_batches(seed=1),
            "other targets": [*relabelled, *batches[1:]],
        }.items()
    }
    assert hashes.pop("reversed") == hashes["all"]
    assert len(set(hashes.values())) == len(hashes)
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in hashes.values())


def test_normalized_scores_have_unit_norms_and_the_same_ranking(make_model):
    scores = score(make_model(), make_batches())
    normalized = scores.normalized()
    for name, rows in (("heads", 4), ("neurons", 4), ("hidden", 1)):
        before, after = getattr(scores, name), getattr(normalized, name)
        torch.testing.assert_close(after.norm(dim=-1).reshape(-1), torch.ones(rows))
        assert torch.equal(after.argsort(dim=-1), before.argsort(dim=-1))
    assert normalized.calibration_hash == scores.calibration_hash


def test_a_layer_of_zero_scores_stays_finite_when_normalized(make_model):
    scores = score(make_model(), make_batches(1))
    scores.heads[2] = 0.0
    assert torch.equal(scores.normalized().heads[2], torch.zeros(4))
    scores.normalized().check_finite()


def test_scored_model_is_named_without_its_local_path(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert score(model, make_batches(1)).model_name == "teacher"
