"""Several processes label parts of one cache at once, and are killed at random moments."""

import contextlib
import os
import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import is_complete
from logitcask.cache.verify import verify
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from tests.support.forked import forks
from tests.support.nightly import times
from tests.support.tiny import RECORDS, folder_bytes, make_teacher, precompute_settings, write_jsonl

PARTS, KILLS, ROUNDS = ("1/2", "2/2"), times(12, 40), times(3, 5)


def test_parts_killed_at_random_moments_leave_the_bytes_of_one_run(tmp_path: Path) -> None:
    """SIGKILLs hit two workers that start at the same instant; then both run to the end."""
    want, settings, context = _prepared(tmp_path)
    began = time.monotonic()
    _to_the_end(_started(context, want.model_copy(update={"output": tmp_path / "timed"})))
    whole_run = time.monotonic() - began
    chance, landed, most = random.Random(0), 0, 0
    shards = len(list((Path(want.output) / "commits" / "c").iterdir()))
    for _ in range(2 * KILLS):
        if landed >= KILLS:
            break
        workers = _started(context, settings)
        for worker in workers:
            time.sleep(chance.uniform(0.05, 0.5) * whole_run)
            if worker.is_alive() and worker.pid:
                with contextlib.suppress(ProcessLookupError):  # it ended in between
                    os.kill(worker.pid, signal.SIGKILL)
                    landed += 1
        for worker in workers:
            worker.join()
        commits = Path(settings.output) / "commits" / "c"
        now = len(list(commits.iterdir())) if commits.exists() else 0
        assert now >= most, "a committed shard was lost"
        most = now
        if now == shards:
            shutil.rmtree(settings.output)  # finished: start over, so that every kill hits work
            most = 0
    assert landed >= KILLS
    _to_the_end(_started(context, settings))
    precompute_again = context.Process(target=_work, args=(settings,))
    precompute_again.start()
    _to_the_end([precompute_again])
    assert folder_bytes(Path(settings.output)) == folder_bytes(Path(want.output))
    assert not [place.name for place in tmp_path.iterdir() if place.name.startswith(".killed")]


def test_parts_started_at_the_same_instant_make_one_cache(tmp_path: Path) -> None:
    """Whichever comes first creates the group and its arrays; repeated several times."""
    want, settings, context = _prepared(tmp_path)
    for index in range(ROUNDS):
        place = settings.model_copy(update={"output": tmp_path / f"round {index}"})
        _to_the_end(_started(context, place))
        assert not verify(place.output).problems
        assert folder_bytes(Path(place.output)) == folder_bytes(Path(want.output))


def _prepared(
    folder: Path,
) -> tuple[PrecomputeSettings, PrecomputeSettings, ForkServerContext]:
    """Return settings of an uninterrupted run, already done, those of the run to disturb, and how to start it."""
    teacher = make_teacher(folder / "teacher")
    write_jsonl(folder / "train.jsonl", RECORDS * 2)
    want = precompute_settings(folder, output=folder / "want", teacher_model=str(teacher), shard_positions=32)
    context = forks()
    whole = context.Process(target=_work, args=(want,))
    whole.start()
    _to_the_end([whole])
    return want, want.model_copy(update={"output": folder / "killed"}), context


def _started(context: ForkServerContext, settings: PrecomputeSettings) -> list[BaseProcess]:
    workers: list[BaseProcess] = [
        context.Process(target=_work, args=(settings.model_copy(update={"shards": part}),)) for part in PARTS
    ]
    for worker in workers:
        worker.start()
    return workers


def _work(settings: PrecomputeSettings) -> None:
    """Run one worker; a plain run over a complete cache has nothing left to do."""
    try:
        precompute(settings)
    except LogitcaskError:
        if not is_complete(settings.output):
            raise


def _to_the_end(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
