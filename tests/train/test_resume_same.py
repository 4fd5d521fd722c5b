"""A resumed run is the same run: its global batch, ranks and seed, and the weights of architectures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.runs.run_folder import complete_checkpoints
from logitcask.pipeline.train.resume.choose import choose_checkpoint
from tests.support.forked import on_two_ranks
from tests.support.runs import STUDENT, losses, metrics, train, weights, write_config

LLAMA_LIKE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
              "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
RENAMED: dict[str, dict[str, object]] = {  # their files hold other names than the model
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_neox": {key: LLAMA_LIKE[key] for key in list(LLAMA_LIKE)[:5]},
}


def test_the_global_batch_must_match(cache: Path, options: dict[str, Any], run: Path) -> None:
    """A record of two ranks: the batch of one rank alone would halve the step and train on examples twice."""
    for checkpoint in complete_checkpoints(run):
        record = json.loads((checkpoint / "settings.json").read_text())
        assert record["world_size"] == 1
        (checkpoint / "settings.json").write_text(json.dumps({**record, "world_size": 2}))
    rule = r"batch_size \* gradient_accumulation_steps \* world_size: checkpoint has 8, this run has 4; use"
    with pytest.raises(LogitcaskError, match=rule):
        train(cache, run, **options, resume_from_checkpoint="latest")
    train(cache, run, **options, gradient_accumulation_steps=2, resume_from_checkpoint="latest")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_older_record_has_as_many_ranks_as_random_states(
    cache: Path, options: dict[str, Any], run: Path, ranks: int
) -> None:
    folder = run / "checkpoint-4"
    record = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({k: v for k, v in record.items() if k != "world_size"}))
    if ranks > 1:
        for rank in range(ranks):
            shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
        (folder / "rng_state.pth").unlink()
        with pytest.raises(LogitcaskError, match=f"world_size: checkpoint has {4 * ranks}, this run has 4; use"):
            train(cache, run, **options, resume_from_checkpoint="latest")
        return
    chosen = choose_checkpoint(run, "latest", record)
    assert chosen is not None
    assert chosen.step == 4
    (folder / "rng_state.pth").unlink()
    with pytest.raises(LogitcaskError, match=r"rng_state\.pth: missing, so the number of ranks is unknown: resume"):
        train(cache, run, **options, resume_from_checkpoint="latest")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(("batch", "accumulation", "ranks"), [(2, 2, 2), (2, 1, 4), (1, 8, 1), (4, 1, 2)])
def test_a_step_has_the_same_examples_on_any_number_of_ranks(
    batch: int, accumulation: int, ranks: int, seed: int, packed: bool
) -> None:
    """Also in a last step that is short, and in the second epoch, as a resumed run skips to it."""
    starts, held = np.array([0, 9, 20, 31, 37]), np.array([3, 22])
    lengths = None if packed else np.arange(37) * 7 % 11
    one = BatchSampler(starts, held, 8, seed, lengths=lengths)
    many = [BatchSampler(starts, held, batch, seed, rank, ranks, lengths, accumulation) for rank in range(ranks)]
    for epoch in (0, 1):
        for sampler in (one, *many):
            sampler.set_epoch(epoch)
        micro = list(zip(*(list(sampler) for sampler in many), strict=False))
        longest = max(len(list(sampler)) for sampler in many)
        assert longest == len(micro) == len(many[0])
        steps = [micro[i : i + accumulation] for i in range(0, len(micro), accumulation)]
        examples = [sorted(i for ranks_ in step for part in ranks_ for i in part) for step in steps]
        assert examples == [sorted(step) for step in one]


def test_two_ranks_resumed_on_one(cache: Path, options: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    """Steps of 4 examples: 2 ranks of 2, then 1 rank with 2 accumulated, as an uninterrupted run of 1 rank of 4."""
    student, run = options["student_config"], tmp_path / "run"
    words = [f"--cache={cache}", f"--student-config={student}", f"--output-dir={run}", "--device=cpu", "--max-steps=6",
             "--save-steps=2", "--save-total-limit=9", "--batch-size=2", "--warmup-steps=0", "--eval-fraction=0.1",
             "--logging-steps=1"]  # fmt: skip
    ran = on_two_ranks(tmp_path, ["train", *words])
    assert ran.returncode == 0, ran.stderr[:3000]
    assert {file.name for file in run.glob("checkpoint-2/rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    for name in ("checkpoint-4", "checkpoint-6", "final"):
        shutil.rmtree(run / name)
    with pytest.raises(LogitcaskError, match="checkpoint has 4, this run has 2; use"):
        train(cache, run, **{**options, "batch_size": 2}, resume_from_checkpoint="latest")
    train(cache, run, **{**options, "batch_size": 2}, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    np.testing.assert_allclose(losses(run), losses(straight), rtol=1e-4)
    assert metrics(run)["before"]["eval_total_loss"] == pytest.approx(metrics(straight)["before"]["eval_total_loss"])


def test_a_checkpoint_is_resumed_with_fsdp_only_if_it_was_saved_so(straight: Path, run: Path) -> None:
    record = json.loads((straight / "checkpoint-4/settings.json").read_text())
    with pytest.raises(LogitcaskError, match="was saved with no FSDP, this run has accelerate's FSDP: start it with"):
        choose_checkpoint(run, "latest", record, fsdp=True)
    folder = run / "checkpoint-4"
    for name, file in (("pytorch_model_fsdp_0", "model.safetensors"), ("optimizer_0", "optimizer.pt")):
        (folder / file).unlink()
        (folder / name).mkdir()
        (folder / name / ".metadata").write_bytes(b"x")
    with pytest.raises(LogitcaskError, match="was saved with accelerate's FSDP, this run has no FSDP: start it with"):
        choose_checkpoint(run, "latest", record)
    assert choose_checkpoint(run, "latest", record, fsdp=True) is not None
    shutil.rmtree(folder / "optimizer_0")
    with pytest.raises(LogitcaskError, match=r"optimizer_0: missing or incomplete: resume with .*checkpoint-2"):
        choose_checkpoint(run, "latest", record, fsdp=True)


# the seed


def test_the_seed_changes_the_first_epoch() -> None:
    starts, nobody = np.array([0, 9, 20, 31, 37]), np.zeros(0, dtype=np.int64)
    first = {seed: [i for batch in BatchSampler(starts, nobody, 4, seed) for i in batch] for seed in range(4)}
    assert first[0] == list(range(37))
    assert len({tuple(order) for order in first.values()}) == 4
    for order in first.values():
        assert sorted(order) == list(range(37))
        borders = np.flatnonzero(np.diff(np.searchsorted(starts, order, side="right"))) + 1
        assert len(borders) == 3  # whole shards, in turn


def test_an_older_run_of_another_seed_is_refused(cache: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """Its first epoch was in the cache's order."""
    run = train(cache, tmp_path / "run", **options, seed=3)
    record = json.loads((run / "checkpoint-4/settings.json").read_text())
    del record["first_epoch"]
    (run / "checkpoint-4/settings.json").write_text(json.dumps(record))
    with pytest.raises(LogitcaskError, match="first_epoch: checkpoint has None, this run has 'shuffled'"):
        train(cache, run, **options, seed=3, resume_from_checkpoint=str(run / "checkpoint-4"))
    assert "first_epoch" not in json.loads(
        (train(cache, tmp_path / "0", **options) / "final/settings.json").read_text()
    )


# architectures


@pytest.mark.parametrize("name", RENAMED)
def test_weights_that_are_stored_under_other_names_are_resumed(
    cache: Path, options: dict[str, Any], tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    student = write_config(tmp_path / "student.json", {"model_type": name, **RENAMED[name]})
    changes = {**options, "student_config": student, "learning_rate": 1e-2, "max_steps": 4}
    whole = train(cache, tmp_path / "whole", **changes)
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
    train(cache, run, **changes, resume_from_checkpoint="latest")
    assert losses(run) == losses(whole)
    torch.testing.assert_close(weights(run / "final"), weights(whole / "final"), rtol=0.0, atol=0.0)
    assert "missing keys" not in capfd.readouterr().err


def test_a_checkpoint_without_a_weight_is_refused(cache: Path, options: dict[str, Any], run: Path) -> None:
    from safetensors.torch import save_file

    kept = weights(run / "checkpoint-4")
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, run / "checkpoint-4/model.safetensors", metadata={"format": "pt"})
    rule = r"model\.safetensors: does not fit the student: 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight: "
    with pytest.raises(LogitcaskError, match=rule):
        train(cache, run, **options, resume_from_checkpoint="latest")


def test_an_optimizer_of_another_student_is_refused(
    cache: Path, options: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    """Sound in itself: only loading it shows that it does not fit."""
    one_layer = write_config(tmp_path / "one.json", {**STUDENT, "num_hidden_layers": 1})
    other_run = train(cache, tmp_path / "other", **{**options, "student_config": one_layer, "max_steps": 4})
    shutil.copy(other_run / "checkpoint-4/optimizer.pt", run / "checkpoint-4/optimizer.pt")
    with pytest.raises(LogitcaskError, match=r"checkpoint-4: cannot be loaded: .*: resume with .*checkpoint-2$"):
        train(cache, run, **options, resume_from_checkpoint="latest")
