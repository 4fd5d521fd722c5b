"""A run of a million examples resumes at step 100,000 within seconds: it reads no example that it is past."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from logitcask.pipeline.batches.collate import Collator, Examples, TrainingExample
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.train.arguments import training_arguments
from logitcask.pipeline.train.callbacks.nonfinite import Labels, StopOnNonFinite
from logitcask.pipeline.train.trainer import DistillationTrainer
from tests.support.runs import STUDENT, train_settings, write_config
from tests.support.tiny import make_tokenizer

EXAMPLES, SHARDS, BATCH = 1_000_000, 1_500, 8
STARTS = np.linspace(0, EXAMPLES, SHARDS + 1).astype(np.int64)
NOBODY = np.zeros(0, dtype=np.int64)


class Counted(Examples):
    """Examples of eight tokens; each read appends a line to a file, since readers may be other processes."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> TrainingExample:
        with self._log.open("a") as log:
            log.write(f"{index}\n")
        return TrainingExample(Encoded(np.full(8, index % 300), np.arange(8) < 7), None)


def trainer(folder: Path, steps: int, workers: int, accumulation: int) -> DistillationTrainer:
    settings = train_settings(None, folder, train_data="x", teacher_model="t", distillation_type="output",
                              max_steps=steps,
                              num_workers=workers, gradient_accumulation_steps=accumulation)  # fmt: skip
    model = student_from_config(write_config(folder / "student.json", STUDENT), 300)
    examples, sampler = Counted(folder / "reads"), BatchSampler(STARTS, NOBODY, BATCH, 0, accumulation=accumulation)
    collator = Collator(0, (), 1.0, "bucket")
    nonfinite = StopOnNonFinite(folder, step_examples=sampler.step_examples, held_out=[], learning_rate=1e-3,
                                labels=Labels(lambda index: True), warmup_steps=0, fp16=False)  # fmt: skip
    return DistillationTrainer(
        model=model, args=training_arguments(settings), examples=examples, sampler=sampler,
        collator=collator, tokenizer=make_tokenizer(), nonfinite=nonfinite, callbacks=[],
        loss=LossSettings(1.0, 1.0, "bucket", "forward-kl"),
    )  # fmt: skip


@pytest.mark.parametrize(("done", "workers", "accumulation"), [(100_000, 0, 1), (100_000, 1, 1), (100_000, 0, 2)])
def test_resuming_reads_only_the_next_examples(tmp_path: Path, done: int, workers: int, accumulation: int) -> None:
    trainer(tmp_path, 1, 0, accumulation).train()
    folder = (tmp_path / "checkpoint-1").rename(tmp_path / f"checkpoint-{done}")
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "global_step": done}))
    (tmp_path / "reads").unlink()
    again = trainer(tmp_path, done + 2, workers, accumulation)
    began, worked = time.perf_counter(), time.process_time()
    again.train(resume_from_checkpoint=str(folder))
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    assert again.state.global_step == done + 2
    reads = [int(line) for line in (tmp_path / "reads").read_text().split()]
    next_ones = [i for step in range(done, done + 6) for i in again._sampler.step_examples(step)]
    assert reads == next_ones[: len(reads)]
    assert 2 * BATCH * accumulation <= len(reads) <= (2 * accumulation + 1 + 2 * workers) * BATCH
    print(f"step {done}, {workers} workers, accumulation {accumulation}: {seconds:.2f} s, {worked:.2f} s of CPU time")
    assert worked < 10  # CPU seconds of this process, whatever else the machine does
