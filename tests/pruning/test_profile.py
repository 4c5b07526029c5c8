"""What a global ranking would keep, against the definition written out with Python's sort."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from students import ALL_FAMILIES, MIXTURES, random_scores, smaller, smaller_everywhere
from transformers import AutoConfig

from hf_capgap.errors import ScoresError, ShapeError
from hf_capgap.families import FAMILIES
from hf_capgap.pruning import StudentShape, global_profile, select

WIDTHS = {"heads": "num_key_value_heads", "neurons": "intermediate_size"}


def config_of(model_type: str):
    return AutoConfig.for_model(model_type, **FAMILIES[model_type].tiny_config)


def brute_force(scores, shape, layers) -> dict[str, tuple[dict[int, int], float, float]]:
    """{kind: (units kept in each layer, share kept globally, share kept uniformly)}.

    Scores are divided by their layer's L2 norm; all of a kind compete in one list; as many stay as in uniform widths.
    """
    result = {}
    for kind, width in WIDTHS.items():
        units = []  # (score, layer, ranking, index)
        for layer in layers:
            values = getattr(scores, kind)[layer].double()
            values = values / values.norm()
            rankings = values if values.dim() == 2 else values[None]
            units += [(v, layer, r, i) for r, ranking in enumerate(rankings.tolist()) for i, v in enumerate(ranking)]
        num_rankings = len({(layer, ranking) for _, layer, ranking, _ in units})
        total = sum(max(0.0, unit[0]) for unit in units)
        kept = sorted(units, reverse=True)[: getattr(shape, width) * num_rankings]
        counts = {layer: sum(unit[1] == layer for unit in kept) for layer in layers}
        uniform = 0.0
        for place in {unit[1:3] for unit in units}:
            own = sorted((unit[0] for unit in units if unit[1:3] == place), reverse=True)
            uniform += sum(max(0.0, value) for value in own[: getattr(shape, width)])
        result[kind] = (counts, sum(max(0.0, unit[0]) for unit in kept) / total, uniform / total)
    return result


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_the_profile_is_that_of_the_definition(model_type: str) -> None:
    config = config_of(model_type)
    scores, shape = random_scores(config), smaller_everywhere(config)
    # Layers of different scales, and one with a few large scores: only the second matters after normalising.
    scale = torch.tensor([1.0, 100.0, 0.01, 5.0])
    neurons = scores.neurons * scale.view(-1, *[1] * (scores.neurons.dim() - 1))
    neurons[1, ..., :3] *= 20
    scores = replace(scores, heads=scores.heads * scale[:, None], neurons=neurons)
    profile = global_profile(scores, shape, config)
    for kind, (counts, share, uniform_share) in brute_force(scores, shape, range(4)).items():
        assert profile.kept[kind] == counts
        assert profile.share[kind] == pytest.approx(share, rel=1e-5)
        assert profile.uniform_share[kind] == pytest.approx(uniform_share, rel=1e-5)
        assert profile.share[kind] >= profile.uniform_share[kind] - 1e-6
    assert len(set(profile.kept["neurons"].values())) > 1  # uneven


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_only_the_layers_that_compete_count(model_type: str) -> None:
    config = config_of(model_type)
    scores, shape = random_scores(config), smaller_everywhere(config)
    profile = global_profile(scores, shape, config, layers=[1, 3])
    for kind, (counts, share, uniform_share) in brute_force(scores, shape, [1, 3]).items():
        assert profile.kept[kind] == counts
        assert set(counts) == {1, 3}
        assert profile.share[kind] == pytest.approx(share, rel=1e-5)
        assert profile.uniform_share[kind] == pytest.approx(uniform_share, rel=1e-5)


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_symmetric_shaping_gives_the_uniform_widths_and_the_units_of_local_selection(model_type: str) -> None:
    config = config_of(model_type)
    scores, shape = random_scores(config), smaller_everywhere(config)
    shape = replace(shape, num_hidden_layers=4, num_experts=None)
    widths = global_profile(scores, shape, config).symmetric()
    assert widths == {name: getattr(shape, name) for name in WIDTHS.values()}
    local = select(scores, shape, config)
    shaped = select(scores, replace(shape, **widths), config)
    assert shaped == local
    # The units of uniform widths are the first of each layer's own order, which the global order does not change.
    normalized = scores.normalized()
    for layer in range(4):
        best = normalized.heads[layer].topk(widths["num_key_value_heads"]).indices.tolist()
        assert shaped.heads[layer] == sorted(best)
        rankings = normalized.neurons[layer].view(-1, normalized.neurons.shape[-1])
        units = shaped.neurons[layer] if model_type in MIXTURES else [shaped.neurons[layer]]
        for ranking, kept in zip(rankings, units, strict=True):
            assert kept == sorted(ranking.topk(widths["intermediate_size"]).indices.tolist())


def test_equal_layers_keep_equal_widths() -> None:
    config = config_of("llama")
    scores = random_scores(config)
    scores = replace(scores, heads=scores.heads[:1].repeat(4, 1), neurons=scores.neurons[:1].repeat(4, 1))
    shape = smaller(config, num_key_value_heads=2, intermediate_size=50)
    profile = global_profile(scores, shape, config)
    assert profile.kept == {"heads": dict.fromkeys(range(4), 2), "neurons": dict.fromkeys(range(4), 50)}
    assert profile.share == pytest.approx(profile.uniform_share)


def test_the_whole_teacher_keeps_everything() -> None:
    config = config_of("llama")
    profile = global_profile(random_scores(config), StudentShape.of(config), config)
    assert profile.kept == {"heads": dict.fromkeys(range(4), 4), "neurons": dict.fromkeys(range(4), 112)}
    assert profile.share == pytest.approx({"heads": 1.0, "neurons": 1.0})


def test_negative_scores_are_ranked_but_lose_no_share() -> None:
    """Scores by movement can be negative: the order among them counts, their mass does not."""
    config = config_of("llama")
    scores = random_scores(config)
    heads = torch.tensor(
        [[0.4, -0.1, -0.2, 0.3], [-0.3, -0.2, 0.1, -0.4], [0.2, 0.3, 0.1, 0.5], [-0.1, -0.1, 0.2, 0.1]]
    )
    scores = replace(scores, metric="movement", heads=heads, neurons=scores.neurons - 0.5)
    shape = smaller(config, hidden_size=60, num_key_value_heads=3, intermediate_size=80)
    profile = global_profile(scores, shape, config)
    for kind, (counts, share, uniform_share) in brute_force(scores, shape, range(4)).items():
        assert profile.kept[kind] == counts
        assert profile.share[kind] == pytest.approx(share, rel=1e-5)
        assert profile.uniform_share[kind] == pytest.approx(uniform_share, rel=1e-5)


def test_a_shape_or_scores_that_do_not_fit_are_refused() -> None:
    config = config_of("llama")
    with pytest.raises(ShapeError, match="wider than the teacher"):
        global_profile(random_scores(config), replace(StudentShape.of(config), intermediate_size=1000), config)
    with pytest.raises(ScoresError, match="another model"):
        global_profile(random_scores(config_of("qwen3")), StudentShape.of(config), config)
