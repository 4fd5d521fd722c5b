"""Who writes the shards: this process alone, with one teacher. The other crew is ``distributed``."""

from collections.abc import Callable, Sequence

from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.labels import Example, Shard
from logitcask.cache.manifest import LabelSettings, Manifest
from logitcask.cache.writer import CacheWriter
from logitcask.pipeline.machine import share_one_heap
from logitcask.pipeline.precompute.sharding import Work
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.teachers.load import check_engine, load_engine
from logitcask.pipeline.teachers.teacher import Teacher, TokenizedExample

Advance = Callable[[int], None]


def memory_remedy(settings: PrecomputeSettings) -> str:
    """What lowers the memory of stage 1, with the present values, most first."""
    return (
        f"lower --batch-size from {settings.batch_size}, --max-seq-length from {settings.max_seq_length} or "
        f"--shard-positions from {settings.shard_positions} (the last two make another cache), or take a smaller "
        f"teacher or --dtype than {settings.dtype}; committed shards are kept"
    )


class Alone:
    """One teacher in this process."""

    def __init__(self, settings: PrecomputeSettings) -> None:
        """Loads the teacher. Raises LogitcaskError where it cannot be had."""
        share_one_heap()
        self._settings, self._teacher = settings, load_engine(settings)
        self.teacher = self._teacher.facts

    def check_engine(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> None:
        """Raise LogitcaskError where the engine's labels are not those of transformers."""
        check_engine(self._teacher, self._settings, batch, label)

    def write_shards(self, work: Work, shards: Sequence[int], manifest: Manifest, advance: Advance) -> None:
        """Label and write shards, each whole before the next, calling ``advance`` with the positions just labelled."""
        writer = CacheWriter(self._settings.output, manifest)
        for index in shards:
            writer.write_shard(index, label_shard(self._teacher, work.batches(index), work.label, advance))

    def close(self) -> None:
        """Nothing to end."""


def label_shard(
    teacher: Teacher, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings, advance: Advance
) -> Shard:
    """A shard, labelled: its examples are in the batches in any order."""
    labelled: dict[int, Example] = {}
    fidelity = FidelitySums.zeros(label)
    for batch in batches:
        found = teacher.label(batch, label)
        fidelity += found.fidelity
        for example, targets in zip(batch, found.targets, strict=True):
            labelled[example.index] = Example(example.input_ids, example.target_mask, targets)
            advance(len(targets))
    return Shard.of([labelled[place] for place in sorted(labelled)], fidelity)
