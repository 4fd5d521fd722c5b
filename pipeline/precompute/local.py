"""Run stage 1 in this process, with one teacher; ``ray`` is the other executor."""

from collections.abc import Sequence
from pathlib import Path

from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.manifest import ExactCode, LabelSettings, Manifest
from logitcask.cache.reader import CacheReader
from logitcask.cache.writer import CacheWriter
from logitcask.pipeline.machine import share_one_heap
from logitcask.pipeline.precompute.same_teacher import require_same_labels, written_example
from logitcask.pipeline.precompute.sharding import Work
from logitcask.pipeline.teachers.labelling import Advance, fitted_head, label_shard
from logitcask.pipeline.teachers.load import TeacherSpec, check_engine, load_engine
from logitcask.pipeline.teachers.teacher import ExactTeacher, TokenizedExample


class LocalExecutor:
    """Labels and writes shards one after another."""

    def __init__(self, spec: TeacherSpec, output: Path | str) -> None:
        """Load the teacher. Raises LogitcaskError if it cannot be loaded."""
        share_one_heap()
        self._spec, self._output, self._teacher = spec, output, load_engine(spec)
        self.teacher = self._teacher.facts

    def check_engine(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> None:
        """Raise LogitcaskError if the engine's labels differ from those of transformers."""
        check_engine(self._teacher, self._spec, batch, label)

    def fitted_head(
        self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings, bits: int
    ) -> tuple[TeacherHead, ExactCode]:
        """Return the teacher's head and the code of exact labels, fitted to its hidden states on some batches."""
        assert isinstance(self._teacher, ExactTeacher), "the settings refuse other engines"
        return fitted_head(self._teacher, batches, label, bits)

    def check_resumed(self, work: Work) -> None:
        """Raise LogitcaskError if the teacher gives other labels than a committed shard has."""
        example = written_example(work, str(self._output))
        if example is not None:
            require_same_labels(self._teacher, example, work.label, str(self._output))

    def write_shards(self, work: Work, shards: Sequence[int], manifest: Manifest, advance: Advance) -> None:
        """Label and write shards, one after another, calling ``advance`` with the tokens of each example."""
        writer = CacheWriter(self._output, manifest, made_by=self.teacher.made_by)
        if isinstance(self._teacher, ExactTeacher) and manifest.teacher_head:
            self._teacher.use_head(CacheReader(self._output, partial=True).teacher_head())
        following = map(work.batches, shards)
        batches = next(following, [])
        self._teacher.expect(batches, manifest.label)
        for index in shards:
            coming = next(following, [])
            self._teacher.expect(coming, manifest.label)
            writer.write_shard(index, label_shard(self._teacher, batches, manifest.label, advance))
            batches = coming

    def close(self) -> None:
        """Do nothing: there is nothing to shut down."""
