"""Expressive scores against explicit gates in a decoder written out by hand, and the container that holds them."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from reference import Batch, GatedDecoder, gates_of, reference_scores
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from hf_capgap import ExpressiveScores, cross_entropy, cut, score, solve_shape
from hf_capgap.errors import ConfigError, ScoresError
from hf_capgap.families import FAMILIES
from hf_capgap.pruning import METRICS, merge_ranks

# Every family, and some in the variants that change where a gate's gradient comes from.
VARIANTS = {
    **{model_type: (model_type, {}) for model_type in sorted(FAMILIES)},
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-no-biases": ("gpt_neox", {"attention_bias": False}),
    "opt-no-biases": ("opt", {"enable_bias": False}),
    "qwen3_moe-unnormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "mixtral-one-expert": ("mixtral", {"num_experts_per_tok": 1}),
}
# One of each way in which tensors reach the sites: plain, tied learned positions, parallel, 2-D MLP, experts.
KINDS = ("llama", "gpt2", "gpt_neox", "opt", "mixtral")
DATA_METRICS = ("expressive", "taylor", "movement", "activation")


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


def in_float64(make_model, variant: str) -> PreTrainedModel:
    model_type, overrides = VARIANTS[variant]
    model = make_model(model_type, **overrides).double()
    if FAMILIES[model_type].experts_site is not None:
        model.set_experts_implementation("eager")  # grouped matrix products know no float64
    return model


def rows_of(batches: list[Batch]) -> list[Batch]:
    """The same sequences, one per batch."""
    return [
        {name: value[i : i + 1] for name, value in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]


def assert_same_scores(found: ExpressiveScores, expected: ExpressiveScores | dict[str, Tensor], tolerance=3e-5):
    """The same kinds of scores, and every one within `tolerance` of the largest of its kind in its layer."""
    wanted = expected if isinstance(expected, dict) else expected.tensors()
    assert found.tensors().keys() == wanted.keys()
    for name, tensor in found.tensors().items():
        assert tensor.shape == wanted[name].shape
        a, b = (t.double().flatten(1) if t.dim() > 1 else t.double()[None] for t in (tensor, wanted[name]))
        error = (a - b).abs().amax(-1) / b.abs().amax(-1)
        assert error.max() < tolerance, f"{name}: {error.max():.1e}"


# --- the scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_decoder_computes_the_models_logits(make_model, variant):
    """A reference that computes another function would prove nothing; the sequence is longer than sliding windows."""
    model = in_float64(make_model, variant).eval()
    batch = make_batches(1)[0]
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
        # transformers computes norms and rotary angles in float32 whatever the model's dtype
        found = GatedDecoder(model).logits(batch, gates_of(model))
        torch.testing.assert_close(found, expected, rtol=0.0, atol=3e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_gradients_of_explicit_gates(make_model, variant):
    """With another number of targets in every row, and a last batch smaller than the others."""
    model = in_float64(make_model, variant)
    batches = [*make_batches(2), *make_batches(1, batch_size=1, seed=1)]
    scores = score(model, batches)
    assert_same_scores(scores, reference_scores(model, batches), tolerance=1e-5)
    assert (scores.unit, scores.num_units, scores.model_type) == ("batch", 3, VARIANTS[variant][0])
    assert {tensor.dtype for tensor in scores.tensors().values()} == {torch.float32}


@pytest.mark.parametrize("model_type", [*KINDS, "qwen3"])
def test_example_scores_are_those_of_one_sequence_at_a_time(make_model, model_type):
    model, batches = make_model(model_type), make_batches()
    scores = score(model, batches, unit="example")
    assert_same_scores(scores, reference_scores(model, rows_of(batches)), tolerance=1e-4)
    assert (scores.unit, scores.num_units) == ("example", 9)


@pytest.mark.parametrize("metric", DATA_METRICS)
@pytest.mark.parametrize("model_type", KINDS)
def test_example_scores_do_not_depend_on_the_batch_size(make_model, model_type, metric):
    model, rows = make_model(model_type), rows_of(make_batches())
    one_batch = [{name: torch.cat([row[name] for row in rows]) for name in rows[0]}]
    of_four = [{name: value[i : i + 4] for name, value in one_batch[0].items()} for i in range(0, 9, 4)]
    by_one = score(model, rows, unit="example", metric=metric)
    for batches in (one_batch, of_four):
        scores = score(model, batches, unit="example", metric=metric)
        assert scores.num_units == 9
        assert_same_scores(scores, by_one)


def test_batch_scores_do_depend_on_the_batch_size(make_model):
    """The absolute value of a batch's gradient: otherwise the test above would prove nothing."""
    model, rows = make_model(), rows_of(make_batches())
    one_batch = [{name: torch.cat([row[name] for row in rows]) for name in rows[0]}]
    assert score(model, one_batch).num_units == 1
    with pytest.raises(AssertionError):
        assert_same_scores(score(model, one_batch), score(model, rows), tolerance=0.05)


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


def positions_of(batch: Batch) -> Tensor:
    """Of each token in its own sequence; GPT-2 does not look them up in the mask."""
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", [*KINDS, "mistral"])
def test_padding_does_not_change_the_scores(make_model, model_type, side):
    model = make_model(model_type)
    rows = [row for length in (12, 17, 20) for row in make_batches(1, batch_size=1, length=length, seed=length)]
    missing = [20 - row["input_ids"].shape[1] for row in rows]
    padded = [pad(row, (n, 0) if side == "left" else (0, n)) for row, n in zip(rows, missing)]
    batch = {name: torch.cat([row[name] for row in padded]) for name in padded[0]}
    if model_type == "gpt2":
        batch["position_ids"] = positions_of(batch)
    assert_same_scores(score(model, [batch], unit="example"), reference_scores(model, rows), tolerance=1e-4)
    assert_same_scores(score(model, [batch]), reference_scores(model, [batch]), tolerance=1e-4)
    for metric in DATA_METRICS[1:]:
        expected = score(model, rows, unit="example", metric=metric)
        assert_same_scores(score(model, [batch], unit="example", metric=metric), expected)


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


def test_progress_is_shown_when_asked_for(make_model, capfd):
    score(make_model(), make_batches(3))
    assert capfd.readouterr() == ("", "")
    score(make_model(), make_batches(3), num_batches=2, progress=True)
    assert re.search(r"scoring: 100%.*2/2", capfd.readouterr().err)


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("metric", ["expressive", "taylor"])
def test_checkpointing_does_not_change_the_scores(make_model, metric, model_type):
    """Neither that of `score` nor the model's own; the layers really run once, or again on the way back."""
    model, batches, calls = make_model(model_type), make_batches(), []
    layer = model.get_submodule(FAMILIES[model_type].layers)[1]
    mlp = layer.get_submodule(FAMILIES[model_type].branches[1].reads)
    mlp.register_forward_pre_hook(lambda _, args: calls.append(None) if args[0].numel() >= 3 * 24 * 64 else None)

    def scored(**options: bool) -> tuple[ExpressiveScores, int]:
        calls.clear()
        return score(model, batches, metric=metric, **options), len(calls)

    plain, num_calls = scored(gradient_checkpointing=False)
    assert num_calls == 3
    checkpointed, num_calls = scored()
    assert num_calls == 6
    assert_same_scores(checkpointed, plain, tolerance=1e-6)
    for use_reentrant in (True, False):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        for options in ({}, {"gradient_checkpointing": False}):
            scores, num_calls = scored(**options)
            assert num_calls == 6
            assert_same_scores(scores, plain, tolerance=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_logits_of_few_tokens_at_a_time_give_the_same_scores(make_model, model_type, monkeypatch):
    model, batches, widths = make_model(model_type), make_batches(), []
    expected = reference_scores(model, batches)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: widths.append(args[0].shape))
    for metric in ("expressive", "taylor"):
        whole = score(model, batches, metric=metric)
        with monkeypatch.context() as patch:
            patch.setattr(cross_entropy, "_LOGIT_BYTES", [4 * 96 * 5] * 2)
            widths.clear()
            chunked = score(model, batches, metric=metric)
        of_tokens = [shape[0] for shape in widths if len(shape) == 2]
        assert max(of_tokens) == 5
        assert sum(of_tokens) == 2 * sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)  # and again
        assert_same_scores(chunked, whole)
        if metric == "expressive":
            assert_same_scores(chunked, expected, tolerance=1e-4)


class ScaledLlama(LlamaForCausalLM):
    """Does more to its logits than the config says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.7 * output.logits
        return output


def test_a_head_that_is_more_than_its_weights_is_scored_by_the_models_own_logits(make_model):
    plain, batches = make_model(), make_batches()
    odd = ScaledLlama(plain.config)
    odd.load_state_dict(plain.state_dict())
    scores = score(odd, batches)
    plain.lm_head.weight.data *= 1.7
    assert_same_scores(scores, reference_scores(plain, batches))


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
        x = args[0]
        if x.requires_grad and x.grad_fn is not None:  # not while `score` looks at the head
            x.register_hook(lambda gradient: products.append((x.double() * gradient.double()).sum((0, 1))))

    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(watch)
    scores = score(model, batches, gradient_checkpointing=False)
    assert len(products) == len(batches)
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
    parameters = [
        (name, p.requires_grad, None if p.grad is None else p.grad.tolist(), p._backward_hooks or None)
        + (getattr(p, "_post_accumulate_grad_hooks", None) or None,)
        for name, p in model.named_parameters()
    ]
    modules = [
        (name, m.training, vars(m).get("forward"), *map(dict, (m._forward_hooks, m._forward_pre_hooks)))
        for name, m in model.named_modules()
    ]
    return parameters, modules


def unusual_model(make_model) -> PreTrainedModel:
    """Partly frozen, partly in training mode, with a gradient, a hook and a forward of its own."""
    model = make_model().train()
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    model.model.layers[3].forward = model.model.layers[3].forward
    return model


def test_weights_are_frozen_while_scoring_and_everything_is_restored(make_model):
    model = unusual_model(make_model)
    before, weights = state_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def watched() -> Iterator[Batch]:
        for batch in make_batches():
            yield batch
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]

    assert score(model, watched()).num_units == 3
    assert state_of(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_leaves_the_model_as_it_found_it(make_model, metric):
    model = unusual_model(make_model)
    before, weights = state_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, make_batches(1), metric=metric)
    assert state_of(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def bad_data() -> Iterator[Batch]:
    yield make_batches()[0]
    raise OSError("the disk is gone")


def bad_token() -> Iterator[Batch]:
    batch = make_batches()[0]
    yield batch
    yield {name: value + 96 for name, value in batch.items()}


@pytest.mark.parametrize("metric", DATA_METRICS)
@pytest.mark.parametrize(("batches", "error"), [(bad_data, OSError), (bad_token, IndexError)])
def test_everything_is_restored_after_an_exception(make_model, metric, batches, error):
    model = unusual_model(make_model)
    before = state_of(model)
    with pytest.raises(error):
        score(model, batches(), metric=metric)
    assert state_of(model) == before


def test_everything_is_restored_after_an_exception_on_the_way_back(make_model):
    model = unusual_model(make_model)

    def explode(gradient: Tensor) -> None:
        raise RuntimeError("no way back")

    def mine(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(explode)

    model.model.layers[2].mlp.register_forward_hook(mine)
    before = state_of(model)
    for metric in ("expressive", "taylor"):
        with pytest.raises(RuntimeError, match="no way back"):
            score(model, make_batches(), metric=metric)
        assert state_of(model) == before


# --- what exists while scoring -------------------------------------------------------------------------------------


def leaves_of(output: Tensor) -> set[Tensor]:
    """Every tensor that a backward pass from `output` would leave a gradient on."""
    seen, waiting, leaves = set(), [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("metric", ["expressive", "activation"])
@pytest.mark.parametrize("model_type", KINDS)
def test_no_gradient_of_any_weight_ever_exists(make_model, model_type, metric, checkpointing):
    """No weight is in the autograd graph, no hook of one fires, and none is found between the layers' backward."""
    model, found, graphs = make_model(model_type), [], []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: found.append(name))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))

    def look(_: Tensor | None = None) -> None:
        found.extend(name for name, parameter in model.named_parameters() if parameter.grad is not None)

    def watch(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(look)
            graphs.append(leaves_of(output))

    family = FAMILIES[model_type]
    for layer in model.get_submodule(family.layers):
        layer.get_submodule(family.branches[-1].writes).register_forward_hook(watch)
    score(model, make_batches(), metric=metric, gradient_checkpointing=checkpointing)
    look()
    assert not found
    weights = {id(parameter) for parameter in model.parameters()}
    assert not any(id(leaf) in weights for leaves in graphs for leaf in leaves)
    assert bool(graphs) == (metric == "expressive")
    assert all(leaves for leaves in graphs)  # there is a graph, and it starts somewhere


@pytest.mark.parametrize("metric", ["taylor", "movement"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "mixtral"])
def test_gradients_of_two_modules_never_exist_at_the_same_time(make_model, model_type, metric):
    """A module's bias may have its gradient together with its weight: one operation makes both."""
    model, alive, others = make_model(model_type), {}, []

    def see(gradient: Tensor, name: str) -> None:
        module = name.rpartition(".")[0]
        others.extend((name, old) for old, ref in alive.items() if ref() is not None and old != module)
        others.extend((name, old) for old, p in model.named_parameters() if p.grad is not None)
        alive[module] = weakref.ref(gradient)

    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: see(gradient, name))
    score(model, make_batches(), metric=metric)
    assert len(alive) > 8
    assert not others


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"unit": "token"}, {"metric": "beauty"}])
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


@pytest.mark.parametrize("model_type", KINDS)
def test_scores_survive_their_file(make_model, tmp_path, model_type):
    scores = replace(score(make_model(model_type), make_batches(1), unit="example"), revision="0123abcd")
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
@pytest.mark.parametrize("name", ["heads", "neurons", "hidden", "query_heads", "experts", "layers"])
def test_non_finite_scores_are_neither_loaded_nor_used(make_model, tmp_path, name, value):
    model = make_model("mixtral")
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
        replace(scores, layers=None),
        score(make_model(seed=1), batches),
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


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_normalized_scores_have_unit_norms_and_the_same_ranking(make_model, model_type):
    """Per layer, the neurons of all its experts together; hidden dimensions and layers over the model."""
    scores = score(make_model(model_type), make_batches())
    normalized = scores.normalized()
    for name, before in scores.tensors().items():
        after = getattr(normalized, name)
        rows = after.flatten()[None] if name in ("hidden", "layers") else after.flatten(1)
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(1 if name in ("hidden", "layers") else 4))
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
