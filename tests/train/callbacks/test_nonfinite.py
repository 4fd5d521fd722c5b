"""What stops a run: non-finite numbers, or memory that runs out; what the log shows before it starts."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.collate import TrainingExample
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.order import BatchSampler, held_out
from logitcask.pipeline.models.shapes import shape_of_size
from logitcask.pipeline.runs.run_folder import latest_checkpoint
from logitcask.pipeline.train.callbacks.nonfinite import SKIPPED_IN_A_ROW, Labels, StopOnNonFinite
from logitcask.pipeline.train.memory_advice import StepSize
from logitcask.pipeline.train.trainer import DistillationTrainer
from tests.support.forked import alone
from tests.support.mistakes import said
from tests.support.runs import STUDENT, losses, train, weights, write_config
from tests.support.tiny import make_cache
from tests.train.test_ranks import FORKED, launched


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("stock"))


def run_command(
    cache: Path, output: Path, *options: str, limit: int | None = None, **student: int
) -> subprocess.CompletedProcess[str]:
    """Run ``logitcask train`` as a process, optionally limited to so many bytes beyond those used after its imports."""
    config = write_config(output.with_suffix(".json"), {**STUDENT, **student})
    words = ["train", f"--cache={cache}", f"--output-dir={output}", f"--student-config={config}", "--device=cpu",
             "--eval-fraction=0.1", *options]  # fmt: skip
    return alone(output.parent, words, limit=limit)


def error(ran: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in ran.stderr, ran.stderr
    return said(ran.stderr)


def test_a_rising_loss_stops_the_run_at_its_step_and_saves_nothing_of_it(cache: Path, tmp_path: Path) -> None:
    ran = run_command(cache, tmp_path / "run", "--learning-rate=1e30", "--warmup-steps=0", "--save-steps=1",
                      "--max-steps=9", "--batch-size=4", "--gradient-accumulation-steps=2")  # fmt: skip
    assert ran.returncode == 2, ran.stderr
    line = error(ran)
    step = int(re.findall(r"step (\d+): non-finite", line)[0])
    sampler = BatchSampler(CacheReader(cache).shard_starts, held_out(24, 0.1, 0), 4, 0)
    batches = [batch for epoch in range(9) for batch in batches_of(sampler, epoch)]
    epochs = [batches[i : i + 6] for i in range(0, len(batches), 6)]
    steps = [[*epoch[i], *epoch[i + 1]] for epoch in epochs for i in range(0, 6, 2)]
    assert f"examples of the cache or data are {', '.join(map(str, steps[step - 1]))}; " in line
    assert "likely cause: --learning-rate 1e+30 is too high" in line
    saved = sorted(int(folder.name.rpartition("-")[2]) for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == list(range(1, step))
    assert not (tmp_path / "run" / "final").exists()
    if saved:
        assert f"--student-model {tmp_path / 'run' / f'checkpoint-{saved[-1]}'} in another" in line


def batches_of(sampler: BatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_a_checkpoint_before_the_step_is_named_and_resumes(cache: Path, tmp_path: Path) -> None:
    """At this rate weight decay multiplies parameters by about 1e9 per step: the first checkpoints are finite."""
    run = tmp_path / "run"
    options = {"learning_rate": 1e8, "weight_decay": 10.0, "save_steps": 1, "max_steps": 30, "save_total_limit": 99}
    with pytest.raises(LogitcaskError, match=r"step \d+: non-finite: loss") as stopped:
        train(cache, run, **options)
    last = latest_checkpoint(run)
    assert last is not None
    assert f"--student-model {last} in another --output-dir with --learning-rate 1e+07" in str(stopped.value)
    for folder in run.glob("checkpoint-*"):
        assert all(bool(tensor.isfinite().all()) for tensor in weights(folder).values())
    first = run / "checkpoint-1"
    with pytest.raises(LogitcaskError, match=r"step \d+: non-finite: loss"):
        train(cache, run, **options, resume_from_checkpoint=str(first))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_student_with_a_damaged_parameter_does_not_start(
    cache: Path, tmp_path: Path, name: str, value: float
) -> None:
    first = train(cache, tmp_path / "first", max_steps=2, save_steps=1)
    damage(first / "final", name, value)
    rule = f"already has non-finite parameters: 1, the first is {name}"
    with pytest.raises(LogitcaskError, match=f"the student: {rule}"):
        train(cache, tmp_path / "second", student_model=str(first / "final"))
    damage(first / "checkpoint-1", name, value)
    with pytest.raises(LogitcaskError, match=f"checkpoint-1: {rule}"):
        train(cache, first, max_steps=2, save_steps=1, resume_from_checkpoint=str(first / "checkpoint-1"))


def damage(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_non_finite_label_is_named_with_its_example(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader refuses such a label in a cache; faulty memory can still produce one."""
    monkeypatch.setattr(CacheExamples, "__getitem__", damaged_at(13))
    held = 13 in held_out(24, 0.1, 0)
    assert not held
    with pytest.raises(
        LogitcaskError, match=r"step 2: non-finite: .*label of example 13 is non-finite: run logitcask cache verify"
    ):
        train(cache, tmp_path / "run", batch_size=8, max_steps=3)


def damaged_at(bad: int) -> Callable[[CacheExamples, int], TrainingExample]:
    """Return a way to read examples that spoils the label of one."""
    plain = CacheExamples.__getitem__

    def damaged(self: CacheExamples, index: int) -> TrainingExample:
        example = plain(self, index)
        if index == bad and example.targets is not None:
            example.targets.head_logprobs[0, 0] = np.nan
        return example

    return damaged


def stopper(cache: Path, output: Path, learning_rate: float, *, fp16: bool = False) -> StopOnNonFinite:
    reader = CacheReader(cache)
    sampler = BatchSampler(reader.shard_starts, np.zeros(0, dtype=np.int64), 8, 0)
    return StopOnNonFinite(
        output,
        step_examples=sampler.step_examples,
        held_out=[],
        labels=Labels(lambda index: True),
        learning_rate=learning_rate,
        warmup_steps=0,
        fp16=fp16,
    )


def steps(
    callback: StopOnNonFinite, rows: list[tuple[float, float, bool]], logged: list[bool], device: str
) -> Iterator[int]:
    """Feed the callback loss, gradient norm and whether the step was skipped, and whether the Trainer logs it."""
    arguments: Any = SimpleNamespace(device=torch.device(device), gradient_accumulation_steps=1)
    for number, ((loss, norm, skipped), logs) in enumerate(zip(rows, logged, strict=True), start=1):
        callback.note_loss(torch.tensor(loss))
        callback.note_norm(torch.tensor(norm))
        state: Any = SimpleNamespace(global_step=number)
        control: Any = SimpleNamespace(
            should_log=logs, should_evaluate=False, should_save=False, should_training_stop=False
        )
        callback.on_step_end(arguments, state, control, optimizer=SimpleNamespace(step_was_skipped=skipped))
        yield number


def test_on_an_accelerator_steps_are_checked_when_the_trainer_logs_and_the_first_is_named(
    cache: Path, tmp_path: Path
) -> None:
    callback = stopper(cache, tmp_path / "run", 5e-4)
    rows = [(1.0, 1.0, False), (2.0, np.inf, False), (np.nan, np.nan, False), (np.nan, np.nan, False)]
    done: list[int] = []
    with pytest.raises(LogitcaskError, match="step 2: non-finite: loss 2, gradient norm inf"):
        done.extend(steps(callback, rows, [False, False, False, True], "cuda"))
    assert done == [1, 2, 3]
    callback = stopper(cache, tmp_path / "run", 5e-4)
    done = []
    with pytest.raises(LogitcaskError, match="step 2: "):
        done.extend(steps(callback, rows, [False] * 4, "cpu"))
    assert done == [1]


def test_fp16_may_skip_steps_but_not_all(cache: Path, tmp_path: Path) -> None:
    callback = stopper(cache, tmp_path / "run", 1e-3, fp16=True)
    skipped = (1.0, np.inf, True)
    count = SKIPPED_IN_A_ROW - 1
    rows = [*[skipped] * count, (1.0, 1.0, False), *[skipped] * count]
    assert len(list(steps(callback, rows, [True] * len(rows), "cuda"))) == len(rows)
    with pytest.raises(LogitcaskError, match=r"largest in fp16: use --mixed-precision-dtype bf16 and start over"):
        list(steps(callback, [skipped], [True], "cuda"))


def test_fp16_needs_a_gpu(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(LogitcaskError, match="fp16 needs a GPU, but the device is cpu: use bf16"):
        train(cache, tmp_path / "run", use_mixed_precision=True, mixed_precision_dtype="fp16")


@pytest.mark.parametrize(
    ("module", "rate", "cause"),
    [
        ("logitcask", 1e30, "likely cause: --learning-rate 1e+30 is too high"),
        (
            "tests.support.spoiled_on_ranks",
            1e-3,
            "likely cause: the label of example 13 is non-finite",
        ),  # only one rank has it
    ],
)
def test_both_ranks_stop_if_one_is_non_finite(
    cache: Path, tmp_path: Path, module: str, rate: float, cause: str
) -> None:
    write_config(tmp_path / "student.json", STUDENT)
    options: dict[str, Any] = {"cache": cache, "learning_rate": rate, "batch_size": 4, "max_steps": 9, "save_steps": 1}
    ran = launched(tmp_path, "run", FORKED, module=module, **options)
    assert ran.returncode != 0
    lines = ["".join(each.split("see: ")[0]) for each in ran.stderr.split("error: ")[1:] if each.startswith("step")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert "non-finite: loss nan" in lines[0] or rate > 1
    assert "the step's 8 examples" in lines[0]
    assert cause in lines[0]


def test_out_of_memory_is_one_line_with_what_to_change(cache: Path, tmp_path: Path) -> None:
    """The allocator really refuses: one forward pass over all examples of a student that is 60,000 features wide."""
    ran = run_command(cache, tmp_path / "run", "--batch-size=24", limit=400 << 20, intermediate_size=60_000)
    assert ran.returncode == 2, ran.stderr
    line = error(ran).splitlines()[0]
    assert "memory ran out" in line
    assert "can't allocate memory" in line
    assert "halve --batch-size from 24 and double --gradient-accumulation-steps from 1 (-" in line
    assert "--use-gradient-checkpointing (-" in line
    assert re.search(r"--max-seq-length \d+ in stage 1, half the longest example's \d+ tokens", line)
    assert re.search(r"a student with half of this one's [\d,]+ parameters", line)
    assert "--use-mixed-precision" not in line  # saves nothing on a CPU
    gains = [float(gain) for gain in re.findall(r"\(-([\d.]+) GB\)", line)]
    assert gains == sorted(gains, reverse=True)
    assert len(gains) == 4
    small = run_command(cache, tmp_path / "again", "--max-steps=1", limit=400 << 20)
    assert small.returncode == 0, small.stderr  # the limit alone does not stop a run


def test_a_killed_worker_is_one_line_with_what_to_change(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, run = DistillationTrainer.training_step, tmp_path / "run"

    def kill_workers(trainer: DistillationTrainer, *arguments: Any, **named: Any) -> torch.Tensor:
        if trainer.state.global_step == 2:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
            time.sleep(0.5)  # until SIGCHLD has arrived
        return plain(trainer, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, "training_step", kill_workers)
        with pytest.raises(LogitcaskError) as refused:
            train(cache, run, num_workers=1, batch_size=4, max_steps=9, save_steps=2)
    line = str(refused.value)
    assert line.startswith("a process that reads batches was killed, usually because memory ran out (DataLoader ")
    assert "fewer --num-workers than 1 (each holds a shard); " in line
    assert f"resume with --resume-from-checkpoint {latest_checkpoint(run)}" in line  # 4 if batches had arrived, or 2
    train(cache, run, batch_size=4, max_steps=9, save_steps=2, resume_from_checkpoint="latest")
    assert len(losses(run)) == 9


def test_the_savings_are_those_of_the_plan(tmp_path: Path) -> None:
    shape = shape_of_size("100M")
    step = StepSize(
        student=shape, longest=1024, on_cpu=False, batch_size=8, accumulation=1, checkpointing=False, mixed=False,
        from_cache=False,
    )  # fmt: skip
    savings = step.savings()
    assert {words.rpartition(" (")[0] for words in savings} == {
        "halve --batch-size from 8 and double --gradient-accumulation-steps from 1",
        "--max-seq-length 512, half the longest example's 1024 tokens",
        "--use-gradient-checkpointing", "--use-mixed-precision",
        "a student with half of this one's 100,000,000 parameters",
    }  # fmt: skip
    less = step.memory() - replace(step, batch_size=4).memory()
    assert any(words.startswith("halve") and f"(-{less / 1e9:.2f} GB)" in words for words in savings)
    one = replace(step, batch_size=1, checkpointing=True, on_cpu=True)
    assert not any("batch" in words or "checkpointing" in words for words in one.savings())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_steps": 3}, "3 steps, 1 epoch,"),
        ({"epochs": 2, "max_steps": None}, "6 steps, 2 epochs,"),
        ({"epochs": 2, "max_steps": 4}, "4 steps, 1.33 epochs,"),
        ({"epochs": 0.5, "max_steps": None}, "2 steps, 0.667 epochs,"),
    ],
)
def test_the_log_shows_what_the_run_will_do(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], line: str
) -> None:
    run = train(cache, tmp_path / "run", batch_size=4, gradient_accumulation_steps=2, **options)
    said = capsys.readouterr().err
    assert f"plan      {line} 8 examples per step (4 x 2 accumulated), hybrid, alpha 0.1, T=1, lr 0.0005 (the" in said
    kept = len(held_out(24, 0.1, 0))
    assert f"data      {24 - kept} examples to train on, {kept} held out, packed\n" in said
    assert re.search(
        r"^student   .*run.json \(new\), 28,192 parameters, float32 on cpu, about 0.00[0-9]+ GB of .* free$", said, re.M
    )
    assert said.index("plan ") < said.index("step 0/") < said.index("done      ")
    folder = latest_checkpoint(run)
    assert folder is not None
    assert json.loads((folder / "trainer_state.json").read_text())["max_steps"] == int(line.split(maxsplit=1)[0])


def test_a_run_resumes_with_half_the_batch_and_twice_the_accumulation(cache: Path, tmp_path: Path) -> None:
    student = write_config(tmp_path / "student.json", STUDENT)
    options = {"max_steps": 5, "save_steps": 2, "save_total_limit": 9, "student_config": student}
    whole = train(cache, tmp_path / "whole", batch_size=8, **options)
    resumed = {**options, "resume_from_checkpoint": str(whole / "checkpoint-2"), "batch_size": 4}
    with pytest.raises(
        LogitcaskError,
        match=r"batch_size \* gradient_accumulation_steps \* world_size: checkpoint has 8, this run has 4",
    ):
        train(cache, tmp_path / "half", **resumed)
    half = train(cache, tmp_path / "half", **resumed, gradient_accumulation_steps=2)
    np.testing.assert_allclose(losses(half), losses(whole), rtol=1e-4)
