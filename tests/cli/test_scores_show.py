"""`hf-capgap scores show`: what it prints and draws, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import cells, run
from students import random_scores

from hf_capgap import ExpressiveScores, StudentShape


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Path:
    """A teacher (no tokenizer is needed) and its scores."""
    folder = tmp_path_factory.mktemp("show")
    model = make_model("llama")
    model.config.save_pretrained(folder / "teacher")  # the config alone: no weights are read
    random_scores(model.config).save(folder / "scores.safetensors")
    return folder


@pytest.fixture
def show(capsys, folder: Path):
    return lambda *argv: run(capsys, "scores", "show", folder / "scores.safetensors", *argv)


def cell_of(output: str, kind: str, layer: object, column: int) -> str:
    """A cell of the table of boundaries."""
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if "│" in line]
    [row] = [row for row in rows if row[:2] == [kind, str(layer)] and len(row) == 6]
    return row[column]


def test_the_summary_is_that_of_the_file(show, folder) -> None:
    result = show()
    assert result.code == 0, result.err
    scores = ExpressiveScores.load(folder / "scores.safetensors")
    for name, values in scores.tensors().items():
        numbers = (values.min(), values.median(), values.max())
        expected = [" x ".join(map(str, values.shape)), *(f"{number:.3g}" for number in numbers)]
        assert cells(result.out, name) == expected
    assert "metric: expressive, |∂L/∂gate|" in result.out
    assert "mean over 7 batches, no data" in result.out
    assert "boundary" not in result.out


def test_pictures_go_into_the_folder(show, tmp_path) -> None:
    result = show("--output_dir", tmp_path / "pictures")
    assert result.code == 0, result.err
    names = ["heads", "hidden", "layers", "neurons", "query_heads"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"{name}.png" for name in names]
    for name in names:
        assert str(tmp_path / "pictures" / f"{name}.png") in result.out


@pytest.mark.parametrize("how", ["target", "sizes"])
def test_the_boundary_of_a_cut_is_printed(show, folder, how: str) -> None:
    wanted = ["--target", "60%"] if how == "target" else ["--hidden_size", "48", "--intermediate_size", "80"]
    result = show("--model", folder / "teacher", *wanted, "--num_hidden_layers", "3", "--layers", "scores")
    assert result.code == 0, result.err
    [line] = [line for line in result.out.splitlines() if line.startswith("StudentShape(")]
    shape: StudentShape = eval(line)
    scores = ExpressiveScores.load(folder / "scores.safetensors")
    removed_layer = int(scores.layers.argmin())
    rankings = {
        ("hidden", "all"): (scores.hidden, shape.hidden_size),
        ("layers", "all"): (scores.layers, 3),
        **{("neurons", n): (scores.neurons[n], shape.intermediate_size) for n in range(4) if n != removed_layer},
    }
    for (kind, layer), (values, count) in rankings.items():
        ranked = sorted(values.tolist(), reverse=True)
        last, first = ranked[count - 1], ranked[count]
        assert cell_of(result.out, kind, layer, 2) == f"{count} of {len(ranked)}"
        assert cell_of(result.out, kind, layer, 3) == f"{last:.3g}"
        assert cell_of(result.out, kind, layer, 4) == f"{first:.3g}"
        assert cell_of(result.out, kind, layer, 5) == f"{(last - first) / last:.2%}"
    assert all(f"│ neurons │ {removed_layer} " not in " ".join(line.split()) for line in result.out.splitlines())


def test_the_boundary_is_in_the_pictures(show, folder, tmp_path) -> None:
    assert show("--output_dir", tmp_path / "plain").code == 0
    cut = ("--model", folder / "teacher", "--target", "60%")
    assert show("--output_dir", tmp_path / "cut", *cut).code == 0
    for name in ("heads", "neurons", "hidden"):
        plain, marked = ((tmp_path / kind / f"{name}.png").read_bytes() for kind in ("plain", "cut"))
        assert plain != marked


def test_a_folder_that_holds_something_is_left_alone_unless_asked(show, tmp_path) -> None:
    (tmp_path / "heads.png").write_text("precious")
    result = show("--output_dir", tmp_path)
    assert (result.code, result.err.partition(" (")[0]) == (2, "OutputFolderError: The output folder is not empty")
    assert (tmp_path / "heads.png").read_text() == "precious"
    assert show("--output_dir", tmp_path, "--overwrite").code == 0
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argv", [["--target", "60%"], ["--model", "teacher"], ["--layers", "0,1"]], ids=" ".join)
def test_a_cut_needs_a_model_and_a_size(show, argv) -> None:
    result = show(*argv)
    assert (result.code, result.err.partition(".")[0]) == (
        2,
        "ConfigError: A cut needs both --model and a --target or sizes",
    )


def test_a_cut_of_another_model_is_refused(show, make_model, tmp_path) -> None:
    make_model("qwen3").config.save_pretrained(tmp_path)
    result = show("--model", tmp_path, "--target", "60%")
    assert result.code == 2
    assert "ScoresError: These scores are of another model" in result.err


def test_a_file_that_is_no_scores_file_is_refused(capsys, tmp_path) -> None:
    (tmp_path / "scores").write_text("these are no scores")
    result = run(capsys, "scores", "show", tmp_path / "scores")
    assert result.code == 2
    assert result.err.startswith("ScoresError: Not a scores file, or a damaged one")


def test_without_matplotlib_the_extra_is_named(show, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = show("--output_dir", tmp_path / "pictures")
    assert result.code == 2
    assert 'pip install "hf-capgap[plots]"' in result.err
