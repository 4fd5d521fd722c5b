"""Run stage 1 on Ray: each chunk of records is a task, then each shard one of an actor that holds a teacher.

Ray places the actors, on new nodes if it has an autoscaler, restarts those that die, and retries their tasks. The
content of a shard depends on its number alone, so the cache is the same whatever the number and order of workers.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from logitcask.cache.errors import LogitcaskError, differences, first_line
from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.manifest import ExactCode, LabelSettings, Manifest, identity
from logitcask.cache.reader import CacheReader
from logitcask.cache.writer import CacheWriter
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import explain_out_of_memory, share_one_heap
from logitcask.pipeline.precompute.same_teacher import require_same_labels, written_example
from logitcask.pipeline.precompute.sharding import Work
from logitcask.pipeline.teachers.labelling import Advance, fitted_head, label_shard
from logitcask.pipeline.teachers.load import TeacherSpec, check_engine, load_engine
from logitcask.pipeline.teachers.teacher import ExactTeacher, Teacher, TeacherFacts, TokenizedExample
from logitcask.pipeline.text.tokens.packed import PackedChunk
from logitcask.pipeline.text.tokens.workers import AHEAD, Encode, Pool, Promise, Workers

RETRIES = 3  # of a shard whose worker died, and restarts of a worker


class Labeller:
    """An actor that holds a teacher and writes shards of one cache."""

    def __init__(self, spec: TeacherSpec, output: Path | str, memory_remedy: str) -> None:
        share_one_heap()
        self._spec, self._output, self._memory_remedy = spec, output, memory_remedy
        self._writer: CacheWriter | None = None

    @cached_property
    def _teacher(self) -> Teacher:
        """Loaded by the first task: of an error in a constructor, Ray keeps only the text."""
        return load_engine(self._spec)

    def facts(self) -> TeacherFacts:
        """Return what stage 1 needs to know about the teacher."""
        return self._teacher.facts

    def check_engine(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> None:
        """Raise LogitcaskError if the engine's labels differ from those of transformers."""
        check_engine(self._teacher, self._spec, batch, label)

    def check_resumed(self, example: TokenizedExample, label: LabelSettings) -> None:
        """Raise LogitcaskError if the teacher gives other labels than the cache has."""
        require_same_labels(self._teacher, example, label, str(self._output))

    def fitted_head(
        self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings, bits: int
    ) -> tuple[TeacherHead, ExactCode]:
        """Return the teacher's head and the code of exact labels, fitted to its hidden states on some batches."""
        assert isinstance(self._teacher, ExactTeacher), "the settings refuse other engines"
        return fitted_head(self._teacher, batches, label, bits)

    def write(self, index: int, batches: list[list[TokenizedExample]], manifest: Manifest) -> int:
        """Label and write a shard; return its number of tokens."""
        if self._writer is None:
            self._writer = CacheWriter(self._output, manifest, made_by=self._teacher.facts.made_by)
            if isinstance(self._teacher, ExactTeacher) and manifest.teacher_head:
                self._teacher.use_head(CacheReader(self._output, partial=True).teacher_head())
        with explain_out_of_memory(self._memory_remedy):
            shard = label_shard(self._teacher, batches, manifest.label, lambda tokens: None)
            self._writer.write_shard(index, shard)
        return sum(len(example.input_ids) for batch in batches for example in batch)


class RayExecutor:
    """Workers on a Ray cluster, one per accelerator or as many as requested."""

    def __init__(
        self, spec: TeacherSpec, output: Path | str, *, address: str, workers: int | None, memory_remedy: str
    ) -> None:
        """Connect to or start a cluster and load every teacher. Raises LogitcaskError if that fails."""
        try:
            import ray
        except ImportError as error:
            raise LogitcaskError("--ray needs Ray: pip install 'logitcask[ray]'") from error
        self._ray, self._output = ray, output
        with contextlib.ExitStack() as cleanup, _explain_worker_errors():
            cleanup.callback(ray.shutdown)
            _connect(address)  # unless tokenizing has
            resources = ray.cluster_resources()
            nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
            options = worker_options(spec, workers, resources, nodes)
            count = workers or default_workers(spec.tensor_parallel_size, resources)
            actor = ray.remote(**options, max_restarts=RETRIES, max_task_retries=RETRIES)(Labeller)
            self._actors = [actor.remote(spec, output, memory_remedy) for _ in range(count)]
            if notice := missing_resources(options, count, resources):
                say(notice)
            facts = ray.get([each.facts.remote() for each in self._actors])
            for other in facts[1:]:
                if mismatches := differences(_compared(facts[0]), _compared(other), "a node"):
                    raise LogitcaskError(
                        f"--ray {address}: its nodes load different teachers: {'; '.join(mismatches)}: give all the "
                        "same model and kind of device"
                    )
            cleanup.pop_all()
        self.teacher: TeacherFacts = facts[0]

    def check_engine(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> None:
        """Raise LogitcaskError if the engine's labels differ from those of transformers."""
        with _explain_worker_errors():
            self._ray.get(self._actors[0].check_engine.remote(batch, label))

    def check_resumed(self, work: Work) -> None:
        """Raise LogitcaskError if the teacher gives other labels than a committed shard has."""
        example = written_example(work, str(self._output))
        if example is not None:
            with _explain_worker_errors():
                self._ray.get(self._actors[0].check_resumed.remote(example, work.label))

    def fitted_head(
        self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings, bits: int
    ) -> tuple[TeacherHead, ExactCode]:
        """Return the teacher's head and the code of exact labels, fitted to its hidden states on some batches."""
        with _explain_worker_errors():
            made: tuple[TeacherHead, ExactCode] = self._ray.get(
                self._actors[0].fitted_head.remote(batches, label, bits)
            )
        return made

    def write_shards(self, work: Work, shards: Sequence[int], manifest: Manifest, advance: Advance) -> None:
        """Hand out shards as workers become free, calling ``advance`` with the tokens of each that is written."""
        from ray.util import ActorPool

        shared = self._ray.put(manifest)
        with _explain_worker_errors():
            pool = ActorPool(self._actors)
            for written in pool.map_unordered(
                lambda a, shard: a.write.remote(shard, work.batches(shard), shared), shards
            ):
                advance(written)

    def close(self) -> None:
        """Disconnect from the cluster; one that was started here shuts down."""
        self._ray.shutdown()


def tasks(address: str) -> Workers:
    """Return what connects to or starts a cluster, once the first chunk is submitted, and encodes there.

    The connection stays, for the executor, unless something fails. What it gives raises LogitcaskError if the cluster
    cannot be used.
    """

    @contextlib.contextmanager
    def workers(encode: Encode) -> Iterator[Pool]:
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(disconnect)
            yield _Tasks(address, encode)
            cleanup.pop_all()

    return workers


def disconnect() -> None:
    """Leave the cluster, if there is one; one that was started here shuts down."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


class _Tasks:
    """A pool of one task per CPU that the cluster has, and as many that wait."""

    def __init__(self, address: str, encode: Encode) -> None:
        self._address, self._encode, self.depth = address, encode, 1

    @cached_property
    def _remote(self) -> Callable[[bytes], Any]:
        import ray

        _connect(self._address)
        self.depth = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        encode = ray.put(self._encode)
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_encoded)
        return lambda message: task.remote(encode, message)

    def submit(self, message: bytes) -> Promise:
        """Start a task for pickled records."""
        with _explain_worker_errors():
            return partial(self._result, self._remote(message))

    @staticmethod
    def _result(reference: Any) -> PackedChunk:
        import ray

        with _explain_worker_errors():
            packed: PackedChunk = ray.get(reference)
        return packed


def _encoded(encode: Encode, message: bytes) -> PackedChunk:
    return encode(message)


def _compared(facts: TeacherFacts) -> dict[str, object]:
    """Return what must be equal on all nodes: versions of packages and names of devices need not be."""
    return {**identity({"teacher": facts.identity}), "head": facts.logits_width, "longest": facts.max_length}


def _connect(address: str) -> None:
    """Connect, or raise LogitcaskError if no cluster answers: Ray itself would wait for minutes."""
    import ray

    if ray.is_initialized():
        return
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")  # "": the cluster that runs here, else a new one
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or None, log_to_driver=False)
    except Exception as error:  # Ray raises a plain one if a node's start takes too long
        place = address or "auto"
        raise LogitcaskError(f"--ray {place}: no cluster answers there: {first_line(error)}: try again") from error


def default_workers(tensor_parallel_size: int, resources: dict[str, float]) -> int:
    """Return one worker per ``tensor_parallel_size`` accelerators that the cluster has now; one if it has none."""
    return max(1, int(resources.get("GPU", 0)) // tensor_parallel_size)


def worker_options(
    spec: TeacherSpec, workers: int | None, resources: dict[str, float], nodes: Sequence[float]
) -> dict[str, Any]:
    """Return what Ray reserves for a worker: its accelerators, or a share of the CPUs, ``nodes`` of them on each.

    The share is the largest with which all workers have room, each on one node. Accelerators if the cluster has some,
    and with ``--device cuda`` even if its autoscaler has yet to add them.
    """
    if spec.device.startswith("cuda") or (resources.get("GPU", 0) and spec.device != "cpu"):
        return {"num_gpus": spec.tensor_parallel_size}
    shares = range(int(max(nodes, default=1)), 1, -1)
    return {"num_cpus": next((n for n in shares if sum(int(cpus) // n for cpus in nodes) >= (workers or 1)), 1)}


def missing_resources(options: dict[str, Any], count: int, resources: dict[str, float]) -> str:
    """Return a notice if the cluster in its present size cannot hold all workers, "" if it can."""
    ((option, per_worker),) = options.items()
    kind = {"num_gpus": "GPU", "num_cpus": "CPU"}[option]
    available, needed = resources.get(kind, 0), per_worker * count
    if available >= needed:
        return ""
    return (
        f"waiting for Ray's autoscaler, or for nodes that you add: {count} workers need {needed} {kind}s, the cluster "
        f"has {available:g}"
    )


@contextlib.contextmanager
def _explain_worker_errors() -> Iterator[None]:
    """Raise a worker's own LogitcaskError as it is, and turn workers that keep dying into a one-line error."""
    try:
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
    except ImportError as error:
        raise LogitcaskError("--ray needs Ray: pip install 'logitcask[ray]'") from error

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, LogitcaskError):
            raise LogitcaskError(str(error.cause)) from error
        raise
    except (RayActorError, WorkerCrashedError, OutOfMemoryError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines() if line and not line.startswith("\t"))
        raise LogitcaskError(
            f"a Ray worker died, after at most {RETRIES} restarts: {reason} Committed shards are kept: fix that and "
            "run the same command again to finish"
        ) from error
