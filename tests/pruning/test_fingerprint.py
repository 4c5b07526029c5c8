"""Scores know the weights that they are of: the same in every dtype and on disk, others after any training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from test_scores import make_batches
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_capgap import ExpressiveScores, StudentShape, cut, score
from hf_capgap.errors import ScoresError
from hf_capgap.families import FAMILIES, audit
from hf_capgap.pruning.checkpoint import Checkpoint
from hf_capgap.pruning.fingerprint import check_same_model, fingerprint_of_model


def fingerprint(model: PreTrainedModel) -> torch.Tensor:
    return fingerprint_of_model(audit(model), model)


def small_cut(model: PreTrainedModel) -> StudentShape:
    return replace(StudentShape.of(model.config), num_hidden_layers=3)


def test_what_it_holds(make_model):
    """Eight entries of the middle row of every parameter, in bfloat16."""
    model = make_model("mixtral", head_dim=4)
    found = fingerprint(model)
    parameters = list(audit(model).parameters_of(model.config))
    assert (found.shape, found.dtype) == ((len(parameters), 8), torch.bfloat16)
    by_name = dict(zip((parameter.name for parameter in parameters), found))
    assert by_name.keys() == dict(model.named_parameters()).keys()
    for name, entries in {
        "model.embed_tokens.weight": model.model.embed_tokens.weight[48],
        "model.layers.2.input_layernorm.weight": model.model.layers[2].input_layernorm.weight,
        "model.layers.1.self_attn.k_proj.weight": model.model.layers[1].self_attn.k_proj.weight[8],
        "model.layers.3.mlp.experts.down_proj": model.model.layers[3].mlp.experts.down_proj[2].flatten(),
    }.items():
        assert torch.equal(by_name[name], entries[:8].bfloat16())
    short = fingerprint(make_model("qwen3", head_dim=4))
    assert short[:, :4].isfinite().all()
    assert short[:, 4:].isnan().any()  # of norms over the four entries of a head


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_dtypes_agree_and_other_weights_do_not(make_model, model_type):
    """Whatever the dtypes of the scored model and of the one that is cut."""
    for scored in DTYPES:
        scores = score(make_model(model_type).to(scored), metric="magnitude")
        for dtype in DTYPES:
            check_same_model(scores, fingerprint(make_model(model_type).to(dtype)), "teacher")
            with pytest.raises(ScoresError, match="other weights"):
                check_same_model(scores, fingerprint(make_model(model_type, seed=1).to(dtype)), "teacher")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learning_rate", [1e-3, 1e-4])
def test_one_step_of_training_is_another_model(make_model, dtype, learning_rate):
    """AdamW moves each weight by about the learning rate; the weights are of a trained model's size, about 0.02."""
    model = make_model().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1)
    scores = score(model, make_batches(1))
    check_same_model(scores, fingerprint(model), "teacher")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    batch = make_batches(1, batch_size=8)[0]
    model(**batch).loss.backward()
    optimizer.step()
    with pytest.raises(ScoresError, match=r"other weights.*\d+% of the sampled weights agree"):
        check_same_model(scores, fingerprint(model), "teacher")
    with pytest.raises(ScoresError, match="other weights"):
        cut(model, scores, small_cut(model))


def test_another_model_of_the_same_size_is_not_cut(make_model, tmp_path):
    """Neither in memory, nor from its folder, nor into another folder; scores from a file know their model, too."""
    model, other = make_model(), make_model(seed=1)
    score(model, make_batches(1)).save(tmp_path / "scores.safetensors")
    scores = replace(ExpressiveScores.load(tmp_path / "scores.safetensors"), model_name="right", revision="abc123")
    other.save_pretrained(tmp_path / "wrong")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "wrong")
    shape = small_cut(model)
    for teacher, options in [
        (other, {}),
        (tmp_path / "wrong", {}),
        (tmp_path / "wrong", {"output_dir": tmp_path / "student"}),
    ]:
        with pytest.raises(ScoresError, match=r"other weights.*scores of right@abc123, teacher wrong.*Score this"):
            cut(teacher, scores, shape, **options)
    assert not (tmp_path / "student").exists()
    assert cut(model, scores, shape).num_parameters() == shape.num_parameters(model.config)


def test_scores_without_a_fingerprint_are_taken(make_model):
    """Older files, or scores from elsewhere: they are matched by type and size alone."""
    model, other = make_model(), make_model(seed=1)
    scores = replace(score(model, make_batches(1)), fingerprint=None)
    student = cut(other, scores, small_cut(other))
    assert student.num_parameters() < other.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_checkpoint_has_the_fingerprint_of_its_model(make_model, tmp_path, model_type, dtype):
    """But for experts, which it stores one by one: they are left out."""
    model = make_model(model_type).to(dtype)
    model.save_pretrained(tmp_path / "teacher", max_shard_size="50KB")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 1
    in_memory, on_disk = fingerprint(model), Checkpoint.find(str(tmp_path / "teacher")).fingerprint()
    read = ~on_disk.isnan()
    assert torch.equal(in_memory[read], on_disk[read])
    names = [parameter.name for parameter in audit(model).parameters_of(model.config)]
    left_out = {name for name, row in zip(names, on_disk) if row.isnan().all()}
    assert all(".mlp.experts." in name or ".mlp.gate." in name for name in left_out)
    assert bool(left_out) == (FAMILIES[model_type].experts_site is not None)
    assert torch.equal(read[:, 0], torch.tensor([name not in left_out for name in names]))


def test_offloaded_weights_are_left_out(make_model, tmp_path):
    model, device_map = make_model(), {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    whole = fingerprint(model)
    device_map |= {"model.rotary_emb": "cpu"} | {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    found = fingerprint(model)
    weights = dict(model.named_parameters())
    away = torch.tensor([weights[parameter.name].is_meta for parameter in audit(model).parameters_of(model.config)])
    assert away.sum() == 9
    assert found[away].isnan().all()
    assert torch.equal(found[~away], whole[~away])
