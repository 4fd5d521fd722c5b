"""A resumed run is exact or refused: its files, global batch, seed and end, and the weights of architectures."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.runs.run_folder import complete_checkpoints, latest_checkpoint, read_log, read_run
from logitcask.pipeline.train.checkpoints import choose_checkpoint
from tests.support.runs import STUDENT, losses, metrics, train, weights, write_config
from tests.support.servers import free_port
from tests.support.tiny import folder_bytes, make_cache

LLAMA_LIKE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
              "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
RENAMED: dict[str, dict[str, object]] = {  # their files hold other names than the model
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_neox": {key: LLAMA_LIKE[key] for key in list(LLAMA_LIKE)[:5]},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    student = write_config(tmp_path_factory.mktemp("student") / "student.json", STUDENT)
    return {"student_config": student, "max_steps": 6, "save_steps": 2, "save_total_limit": 9, "batch_size": 4}


@pytest.fixture(scope="module")
def straight(cache: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with checkpoints 2, 4 and 6."""
    return train(cache, tmp_path_factory.mktemp("straight") / "run", **options)


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    """The same run, killed after step 4."""
    shutil.copytree(straight, tmp_path / "run")
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run/metrics.json").unlink()
    return tmp_path / "run"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """Change one byte of a tensor: torch.load reads it without complaint."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


class Code:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def pickled(file: Path) -> None:
    torch.save({"param_groups": [], "last_epoch": 1, "python": Code()}, file)


def bare_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Code()))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def other(file: Path) -> None:
    """Sound files of their kind that hold something else."""
    if file.suffix == ".json":
        file.write_text("[]")
    else:
        torch.save([1], file)


TORCH_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
DAMAGES = [
    *((name, Path.unlink, "missing") for name in (*TORCH_FILES, "trainer_state.json", "model.safetensors")),
    *((name, cut, "damaged") for name in (*TORCH_FILES, "trainer_state.json", "model.safetensors")),
    *((name, empty, "damaged") for name in (*TORCH_FILES, "trainer_state.json", "model.safetensors", "settings.json")),
    *((name, harm, "damaged") for name in TORCH_FILES for harm in (pickled, bare_pickle)),
    *((name, other, "damaged") for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "settings.json")),
    ("optimizer.pt", flip, "damaged"),
]


@pytest.mark.parametrize(
    ("name", "harm", "rule"), DAMAGES, ids=[f"{name} {harm.__name__}" for name, harm, _ in DAMAGES]
)
def test_a_missing_or_damaged_file_is_refused(
    cache: Path,
    options: dict[str, Any],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    harm: Callable[[Path], None],
    rule: str,
) -> None:
    """The line names the file and the next older checkpoint; no code of a checkpoint runs; nothing is changed."""
    monkeypatch.chdir(run.parent)
    harm(run / "checkpoint-4" / name)
    before = folder_bytes(run)
    with pytest.raises(LogitcaskError) as refused:
        train(cache, run, **options, resume_from_checkpoint=str(run / "checkpoint-4"))
    message = str(refused.value)
    assert message.startswith(f"{run / 'checkpoint-4' / name}: {rule}"), message
    assert message.endswith(f": resume with --resume-from-checkpoint {run / 'checkpoint-2'}"), message
    assert "\n" not in message
    assert not Path("ran").exists()
    assert folder_bytes(run) == before


def test_a_pickle_that_is_not_read_is_not_run(
    cache: Path, options: dict[str, Any], straight: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer writes training_args.bin; ours have none, and one that is there is left alone."""
    assert not list(straight.rglob("training_args.bin"))
    monkeypatch.chdir(run.parent)
    bare_pickle(run / "checkpoint-4/training_args.bin")
    train(cache, run, **options, resume_from_checkpoint="latest")
    assert not Path("ran").exists()
    assert losses(run) == losses(straight)


def test_resumed_from_the_older_checkpoint_that_is_named(
    cache: Path, options: dict[str, Any], straight: Path, run: Path
) -> None:
    cut(run / "checkpoint-4/optimizer.pt")
    train(cache, run, **options, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert losses(run) == losses(straight)
    torch.testing.assert_close(weights(run / "final"), weights(straight / "final"), rtol=0.0, atol=0.0)
    assert metrics(run) == metrics(straight)


@pytest.mark.parametrize(
    "name", ["checkpoint-best", "checkpoint-4.old", "checkpoint-", "checkpoint-²", "checkpoint--1"]
)
def test_folders_of_other_names_are_no_checkpoints_of_a_run(
    cache: Path, options: dict[str, Any], straight: Path, run: Path, name: str
) -> None:
    shutil.copytree(run / "checkpoint-2", run / name)
    assert latest_checkpoint(run) == run / "checkpoint-4"
    assert complete_checkpoints(run) == [run / "checkpoint-2", run / "checkpoint-4"]
    train(cache, run, **options, resume_from_checkpoint="latest")
    assert losses(run) == losses(straight)


def test_a_checkpoint_may_be_given_by_another_name(
    cache: Path, options: dict[str, Any], straight: Path, run: Path
) -> None:
    (run / "checkpoint-4").rename(run / "checkpoint-best")
    train(cache, run, **options, resume_from_checkpoint=str(run / "checkpoint-best"))
    assert losses(run) == losses(straight)
    cut(run / "checkpoint-best/scheduler.pt")
    with pytest.raises(LogitcaskError, match=r"scheduler\.pt: damaged .*: resume with --resume-from-.*/checkpoint-6"):
        train(cache, run, **options, resume_from_checkpoint=str(run / "checkpoint-best"))


@pytest.mark.parametrize(
    ("place", "rule"),
    [
        ("final", r"final: is a finished student without .*: give a checkpoint, such as .*/run/checkpoint-6; to train"),
        (".", r"is the folder of a run: give one of its checkpoints, such as .*/run/checkpoint-6"),
        ("checkpoint-4", r"checkpoint-4: not a complete checkpoint .*: resume with --resume-from-.*/run/checkpoint-2"),
        ("nowhere", r"nowhere: not a complete checkpoint of a run: "),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_to_give(
    cache: Path, options: dict[str, Any], straight: Path, tmp_path: Path, place: str, rule: str
) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    (run / "checkpoint-4/settings.json").unlink()
    with pytest.raises(LogitcaskError, match=rule):
        train(cache, run, **options, resume_from_checkpoint=str(run / place))


# the end


def test_a_finished_run_is_left_as_it_is(
    cache: Path, options: dict[str, Any], straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    before = folder_bytes(run)
    train(cache, run, **options, resume_from_checkpoint="latest")
    assert folder_bytes(run) == before
    assert f"{run}: finished: all 6 steps are done and final/ is saved: nothing to do\n" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["final", "final/settings.json", "metrics.json"])
def test_a_finished_run_trains_no_more_and_saves_what_is_missing(
    cache: Path, options: dict[str, Any], straight: Path, tmp_path: Path, lost: str
) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(run / lost) if lost == "final" else (run / lost).unlink()
    train(cache, run, **options, resume_from_checkpoint="latest")
    wanted, actual = folder_bytes(straight), folder_bytes(run)
    changed = {name for name in wanted.keys() | actual.keys() if wanted.get(name) != actual.get(name)}
    assert changed <= {
        "metrics.jsonl",
        "final/settings.json",
    }  # a second line of the last evaluation; how it was resumed
    assert metrics(run)["before"] == metrics(straight)["before"]
    assert read_run(run).after == read_run(straight).after


@pytest.mark.parametrize("lost", [(), ("final", "checkpoint-5"), ("final", "checkpoint-5", "checkpoint-4")])
def test_fractional_epochs_are_the_same_steps_when_resumed(
    cache: Path, options: dict[str, Any], tmp_path: Path, lost: tuple[str, ...]
) -> None:
    """22 examples to train on, 6 steps per epoch: 0.7 epochs are 5 steps, which end within the epoch."""
    changes = {**options, "max_steps": None, "epochs": 0.7, "save_steps": 1}
    whole = train(cache, tmp_path / "whole", **changes)
    run = shutil.copytree(whole, tmp_path / "run")
    for name in lost:
        shutil.rmtree(run / name)
    train(cache, run, **changes, resume_from_checkpoint="latest")
    assert len(losses(run)) == 5
    assert losses(run) == losses(whole)
    assert metrics(run)["before"] == metrics(whole)["before"]
    assert metrics(run)["after"]["eval_total_loss"] == metrics(whole)["after"]["eval_total_loss"]
    torch.testing.assert_close(weights(run / "final"), weights(whole / "final"), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("epochs", "accumulation", "steps"), [(0.1, 1, 1), (0.5, 1, 3), (1.4, 1, 9), (2.0, 4, 4), (0.3, 4, 1), (1.01, 4, 3)]
)
def test_the_summary_counts_the_steps_that_are_trained(
    cache: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    epochs: float, accumulation: int, steps: int,
) -> None:  # fmt: skip
    run = train(cache, tmp_path / "run", **{**options, "max_steps": None, "epochs": epochs},
                gradient_accumulation_steps=accumulation)  # fmt: skip
    assert f"steps: {steps}, " in capsys.readouterr().err
    assert max(line["step"] or 0 for line in read_log(run)) == steps
    assert latest_checkpoint(run) == run / f"checkpoint-{steps}"


def test_extending_a_finished_run_is_refused_with_the_difference(
    cache: Path, options: dict[str, Any], straight: Path
) -> None:
    """The cosine schedule of more steps has other learning rates from the start."""
    with pytest.raises(LogitcaskError, match="another run: max_steps: checkpoint has 6, this run has 8; use"):
        train(cache, straight, **{**options, "max_steps": 8}, resume_from_checkpoint="latest")
    with pytest.raises(LogitcaskError, match=r"another run: epochs: checkpoint has 1\.0, this run has 2\.0"):
        train(cache, straight, **options, epochs=2.0, resume_from_checkpoint="latest")


def test_a_resumed_run_keeps_its_evaluation_before(
    cache: Path, options: dict[str, Any], straight: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(cache, run, **options, resume_from_checkpoint="latest")
    assert metrics(run) == metrics(straight)
    perplexity = metrics(straight)["before"]["eval_perplexity"]
    assert f"{perplexity:,.3f}" in capsys.readouterr().out


# the global batch


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
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    ran = subprocess.run(
        [*launch, "-m", "logitcask", "train", *words], capture_output=True, text=True, check=False, timeout=120
    )
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
