"""Pictures of scores, and the boundary of a cut against its definition."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from students import ALL_FAMILIES, MIXTURES, random_scores, smaller, smaller_everywhere
from transformers import AutoConfig

from hf_capgap.families import FAMILIES
from hf_capgap.pruning import StudentShape, select
from hf_capgap.pruning.pictures import Boundary, boundaries, deciles, draw_scores


def config_of(model_type: str):
    return AutoConfig.for_model(model_type, **FAMILIES[model_type].tiny_config)


def pixels(path) -> np.ndarray:
    """[height, width, 3]; reading all of it checks the file."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def red(path) -> int:
    """Pixels of the marks of a boundary."""
    image = pixels(path)
    return int(((image[..., 0] > 220) & (image[..., 1] < 60) & (image[..., 2] < 60)).sum())


# --- deciles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 37, 100, 7, 1])
def test_deciles_are_means_of_sorted_tenths(size: int) -> None:
    values = torch.rand(3, size)
    found = deciles(values)
    for row, means in zip(values.tolist(), found.tolist(), strict=True):
        best_first = sorted(row, reverse=True)
        expected = [np.mean(part) for part in np.array_split(best_first, min(10, size))]
        assert means == pytest.approx(expected, abs=1e-12)


def test_deciles_of_experts_are_those_of_each() -> None:
    values = torch.rand(2, 3, 40)
    found = deciles(values)
    assert found.shape == (2, 3, 10)
    assert torch.equal(found[1, 2], deciles(values[1, 2]))


# --- boundaries ----------------------------------------------------------------------------------------------------


def margin(last: float, first: float) -> float:
    return (last - first) / max(abs(last), abs(first)) if last or first else 0.0


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_the_boundary_lies_between_the_ranks_that_the_shape_says(model_type: str) -> None:
    config = config_of(model_type)
    scores, shape, teacher = random_scores(config), smaller_everywhere(config), StudentShape.of(config)
    kept = select(scores, shape, config, layers="scores")
    expected = {}

    def expect(kind: str, row: tuple[int, ...], values: torch.Tensor, count: int) -> None:
        ranked = sorted(values.tolist(), reverse=True)
        if count < len(ranked):
            expected[kind, row] = (count, len(ranked), ranked[count - 1], ranked[count])

    expect("hidden", (), scores.hidden, shape.hidden_size)
    expect("layers", (), scores.layers, shape.num_hidden_layers)
    for layer in sorted(scores.layers.topk(shape.num_hidden_layers).indices.tolist()):
        groups = scores.heads[layer].topk(shape.num_key_value_heads).indices.tolist()
        expect("heads", (layer,), scores.heads[layer], shape.num_key_value_heads)
        for group in groups:
            queries = scores.query_heads[layer].view(len(scores.heads[layer]), -1)[group]
            expect("query_heads", (layer, group), queries, shape.queries_per_group)
        if model_type not in MIXTURES:
            expect("neurons", (layer,), scores.neurons[layer], shape.intermediate_size)
            continue
        expect("experts", (layer,), scores.experts[layer], shape.num_experts)
        for expert in scores.experts[layer].topk(shape.num_experts).indices.tolist():
            expect("neurons", (layer, expert), scores.neurons[layer, expert], shape.intermediate_size)
    found = boundaries(scores, kept, config)
    assert {
        (one.kind, one.row): (one.num_kept, one.num_units, one.last_kept, one.first_removed) for one in found
    } == expected
    assert len(found) == len(expected)
    for one in found:
        assert one.margin == pytest.approx(margin(one.last_kept, one.first_removed), abs=1e-12)
        assert one.margin > 0
    assert shape.num_key_value_heads < teacher.num_key_value_heads  # something was cut


def test_query_heads_inside_their_groups() -> None:
    config = config_of("llama")  # 8 query heads in 4 groups
    scores = random_scores(config)
    kept = select(scores, smaller(config, num_attention_heads=4, num_key_value_heads=4), config)
    found = boundaries(scores, kept, config)
    assert {one.kind for one in found} == {"query_heads"}
    assert {one.row for one in found} == {(layer, group) for layer in range(4) for group in range(4)}
    for one in found:
        layer, group = one.row
        pair = scores.query_heads[layer, 2 * group : 2 * group + 2].tolist()
        assert (one.last_kept, one.first_removed) == (max(pair), min(pair))


def test_nothing_removed_has_no_boundary() -> None:
    config = config_of("llama")
    scores = random_scores(config)
    assert boundaries(scores, select(scores, StudentShape.of(config), config), config) == []


def test_symmetric_layers_can_have_a_margin_below_zero() -> None:
    config = config_of("llama")
    scores = replace(random_scores(config), layers=torch.tensor([4.0, 1.0, 2.0, 3.0]))
    kept = select(scores, smaller(config, num_hidden_layers=2), config)
    [found] = [one for one in boundaries(scores, kept, config) if one.kind == "layers"]
    assert (found.last_kept, found.first_removed, found.margin) == (1.0, 4.0, -0.75)


@pytest.mark.parametrize(
    ("last", "first", "expected"), [(4.0, 3.0, 0.25), (0.0, 0.0, 0.0), (1.0, -1.0, 2.0), (-3.0, -4.0, 0.25)]
)
def test_the_margin_is_a_share_of_the_larger_magnitude(last: float, first: float, expected: float) -> None:
    assert Boundary("hidden", (), 1, 2, last, first).margin == expected


# --- drawings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_each_kind_of_unit_is_drawn(model_type: str, tmp_path) -> None:
    config = config_of(model_type)
    scores = random_scores(config)
    paths = draw_scores(scores, tmp_path / "pictures")
    expected = {"heads", "neurons", "hidden", "layers"}
    expected |= {"query_heads"} if model_type != "gpt2" else set()  # there they are the heads
    expected |= {"experts"} if model_type == "mixtral" else set()
    assert {path.name for path in paths} == {f"{name}.png" for name in expected}
    assert set(paths) == set((tmp_path / "pictures").iterdir())
    for path in paths:
        image = pixels(path)
        assert image.shape[0] > 300
        assert image.shape[1] > 500
        assert image.std() > 10  # not blank
        assert red(path) == 0


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_removed_units_are_marked(model_type: str, tmp_path) -> None:
    config = config_of(model_type)
    scores = random_scores(config)
    kept = select(scores, smaller_everywhere(config), config)
    for path in draw_scores(scores, tmp_path, kept=kept, config=config):
        if path.name == "layers.png":
            continue  # bars change their colour
        assert red(path) > 20, path.name
    # Removed layers are crossed out whole: more marks than with the same heads and all layers.
    fewer = select(scores, replace(smaller_everywhere(config), num_hidden_layers=4), config)
    draw_scores(scores, tmp_path / "fewer", kept=fewer, config=config)
    assert red(tmp_path / "heads.png") > red(tmp_path / "fewer" / "heads.png")


def test_a_heat_map_has_the_scores_in_their_places(tmp_path) -> None:
    """The brightest cell of a map is where the best unit is."""
    config = config_of("llama")
    heads = torch.full((4, 4), 0.1)
    heads[0, 3] = heads[1, 0] = heads[2, 0] = heads[3, 0] = 1.0
    draw_scores(replace(random_scores(config), heads=heads), tmp_path)
    image = pixels(tmp_path / "heads.png")
    yellow = (image[..., 0] > 230) & (image[..., 1] > 210) & (image[..., 2] < 90)  # the top of the colour map
    height, width = yellow.shape
    rows, columns = np.nonzero(yellow[:, : int(0.8 * width)])  # without the colour bar
    top, left = rows < height * 0.25, columns < width * 0.3
    assert (top & ~left).sum() > 1000
    assert (~top & left).sum() > 3000
    assert (top & left).sum() == 0


def test_zero_and_negative_scores_are_drawn(tmp_path) -> None:
    config = config_of("llama")
    scores = random_scores(config)
    values = {name: tensor * 0 if name != "hidden" else tensor - 0.5 for name, tensor in scores.tensors().items()}
    scores = replace(scores, metric="movement", **values)
    kept = select(scores, smaller_everywhere(config), config)
    assert len(draw_scores(scores, tmp_path, kept=kept, config=config)) == 5


def test_drawing_needs_no_pyplot(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    config = config_of("llama")
    assert draw_scores(random_scores(config), tmp_path)
