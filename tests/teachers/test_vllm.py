"""The real vLLM on a CPU against transformers: chunked prefill, prefix cache, preemption. Run by ``just test-vllm``."""

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM has its own environment: just setup-vllm && just test-vllm")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.exact.head import decode
from logitcask.cache.labels import ExactTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
from logitcask.pipeline.teachers import vllm_worker
from logitcask.pipeline.teachers.labelling import fitted_head, label_shard
from logitcask.pipeline.teachers.sparsify import uniform_draws
from logitcask.pipeline.teachers.teacher import Labelled, TokenizedExample
from logitcask.pipeline.teachers.transformers import TransformersTeacher, load_teacher
from logitcask.pipeline.teachers.vllm import KEY, VllmTeacher, load_vllm_teacher, require_capture, require_options
from logitcask.pipeline.teachers.vllm_worker import Capture
from tests.support.tiny import RECORDS, folder_bytes, make_teacher, overflowing_teacher, write_jsonl

LONGEST = 128
LABEL = LabelSettings(
    vocab_size=300, head_size=4, tail_draws=8, temperatures=[1.0, 1.5, 2.0], seed=0, fidelity_positions=512
)
TOLERANCE = 1e-3  # nats

Load = Callable[..., VllmTeacher]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("vllm") / "teacher", width=128, max_length=LONGEST)


@pytest.fixture(scope="module")
def plain(folder: Path) -> TransformersTeacher:
    return load_teacher(str(folder), revision=None, dtype="float32", device="cpu", trust_remote_code=False)


@pytest.fixture
def load(folder: Path) -> Iterator[Load]:
    """A function that loads the teacher into vLLM, with options of the engine."""

    def with_options(
        topk: int | None = None,
        tensor_parallel_size: int = 1,
        source: Path = folder,
        dtype: str = "auto",
        **options: object,
    ) -> VllmTeacher:
        return load_vllm_teacher(
            str(source),
            revision=None,
            dtype=dtype,
            max_seq_length=LONGEST,
            tensor_parallel_size=tensor_parallel_size,
            trust_remote_code=False,
            topk=topk,
            overrides=options,
        )

    yield with_options
    clean_up()


def clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def examples(lengths: list[int], seed: int = 0) -> list[TokenizedExample]:
    random = np.random.default_rng(seed)
    batch = []
    for index, length in enumerate(lengths):
        mask = random.random(length) < 0.7
        mask[0], mask[-1] = True, False
        measured = random.random(int(mask.sum())) < 0.3
        batch.append(TokenizedExample(index, random.integers(0, 300, length), mask, measured))
    return batch


def assert_same(labels: Labelled, wanted: Labelled) -> None:
    for a, b in zip(labels.targets, wanted.targets, strict=True):
        assert len(a) == len(b) > 0
        for name in ("gold_logprobs", "log_partition", "log_tail_mass", "head_logprobs"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=TOLERANCE)
        differ = a.head_ids != b.head_ids  # near-ties may swap
        gaps = np.abs(np.diff(b.head_logprobs, axis=1)).min(1) < TOLERANCE
        assert not (differ.any(1) & ~gaps).any()
        assert (a.tail_ids == b.tail_ids).mean() > 0.99, "a draw on a boundary may fall on either side"
    have, want = labels.fidelity.row, wanted.fidelity.row
    np.testing.assert_allclose(have, want, rtol=1e-2, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("chunked", [False, True])
def test_labels_match_those_of_transformers(chunked: bool, load: Load, plain: TransformersTeacher) -> None:
    """Every length from 2 to the longest, in chunks of 48 tokens or whole."""
    options = {"enable_chunked_prefill": True, "max_num_batched_tokens": 48, "max_num_seqs": 16} if chunked else {}
    batch = examples([*range(2, LONGEST, 9), LONGEST, LONGEST, 2])
    assert_same(load(**options).label(batch, LABEL), plain.label(batch, LABEL))


def test_a_prefix_cache_skips_no_label(load: Load, plain: TransformersTeacher) -> None:
    from vllm import SamplingParams

    teacher = load(enable_prefix_caching=True, block_size=32)
    batch = examples([LONGEST, 80])
    wanted = plain.label(batch, LABEL)
    for _ in range(2):
        assert_same(teacher.label(batch, LABEL), wanted)
    prompt = {"prompt_token_ids": batch[0].input_ids[:-1].tolist()}
    (found,) = teacher._llm.generate([prompt], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    assert found.num_cached_tokens > 0, "nothing was cached, so the second round proves nothing"


def test_other_label_settings_replace_the_first(
    load: Load, plain: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, batch = load(), examples([LONGEST, 80])
    other = LABEL.model_copy(update={"head_size": 2, "seed": 1})
    teacher.label(batch, LABEL)
    seen: list[Capture] = []
    take = Capture.take

    def spy(self: Capture, *given: Any) -> None:
        seen.append(self)
        take(self, *given)

    monkeypatch.setattr(Capture, "take", spy)
    assert_same(teacher.label(batch, other), plain.label(batch, other))
    assert len(set(map(id, seen))) == 1, "each row is labelled once"


def test_a_preempted_example_is_labelled_whole(
    load: Load, plain: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted halfway through its prefill, it starts over."""
    starts: dict[str, int] = {}
    take = Capture.take

    def spy(self: Capture, request: str, wanted: Any, prompt: Any, hidden: Any, start: int) -> None:
        starts[request] = starts.get(request, 0) + (start == 0)
        take(self, request, wanted, prompt, hidden, start)

    monkeypatch.setattr(Capture, "take", spy)
    teacher = load(enable_chunked_prefill=True, max_num_batched_tokens=48, max_num_seqs=8, enable_prefix_caching=True)
    engine = teacher._llm.llm_engine
    step, steps = engine.step, iter(range(1000))

    def preempting() -> Any:
        outputs = step()
        if next(steps) in (1, 4):
            engine.reset_prefix_cache(reset_running_requests=True)
        return outputs

    monkeypatch.setattr(engine, "step", preempting)
    batch = examples([LONGEST] * 8)
    labels = teacher.label(batch, LABEL)
    assert max(starts.values()) > 1, "nothing was preempted"
    assert_same(labels, plain.label(batch, LABEL))


def test_two_tensor_parallel_ranks_give_the_same(load: Load, plain: TransformersTeacher) -> None:
    batch = examples([LONGEST, 17, 2])
    assert_same(load(tensor_parallel_size=2).label(batch, LABEL), plain.label(batch, LABEL))


@pytest.mark.parametrize("ranks", [1, 2])
def test_exact_labels_are_those_of_transformers(ranks: int, load: Load, plain: TransformersTeacher) -> None:
    """The head is measured through vLLM's own product, hidden states come from its workers."""
    sparse, batch = LABEL.model_copy(update={"tail_draws": 0}), examples([LONGEST, 17, 2])
    teacher = load(tensor_parallel_size=ranks)
    head, code = fitted_head(teacher, [batch], sparse, 6)
    own, own_code = fitted_head(plain, [batch], sparse, 6)
    np.testing.assert_allclose(head.weights() * head.scale, own.weights() * own.scale, atol=1e-4)
    assert (head.bias, head.softcap) == (None, None)
    exact = sparse.model_copy(update={"exact": code})
    for each in (teacher, plain):
        each.use_head(head)
    labels, wanted = teacher.label(batch, exact), plain.label(batch, exact)
    for a, b in zip(labels.targets, wanted.targets, strict=True):
        assert isinstance(a, ExactTargets)
        assert isinstance(b, ExactTargets)
        assert (a.codes == b.codes).mean() > 0.98, "a coefficient on a boundary may fall on either side"
        np.testing.assert_allclose(decode(a, head), decode(b, head), atol=0.05 * np.abs(decode(b, head)).max())
    np.testing.assert_allclose(
        labels.fidelity.row, wanted.fidelity.row, rtol=0.05, atol=1e-2 * wanted.fidelity.row.max()
    )
    assert code.width == own_code.width


def test_vllms_own_log_probabilities_give_the_head(load: Load, plain: TransformersTeacher) -> None:
    label = LABEL.model_copy(update={"tail_draws": 0, "temperatures": [1.0], "fidelity_positions": 0})
    batch = examples([LONGEST - 1, 30, 2])
    labels, wanted = load(topk=4).label(batch, label), plain.label(batch, label)
    for a, b in zip(labels.targets, wanted.targets, strict=True):
        for name in ("gold_logprobs", "log_partition", "log_tail_mass", "head_logprobs"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=TOLERANCE)


def test_stage_1_runs_on_it(tmp_path: Path, folder: Path) -> None:
    """A whole cache, reproduced byte for byte, with the ids of the one made with transformers."""
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    caches = {}
    for name, engine in (("first", "vllm"), ("second", "vllm"), ("plain", "transformers")):
        options = ["--teacher-model", folder, "--train-data", tmp_path / "train.jsonl", "--output", tmp_path / name]
        command = [sys.executable, "-m", "logitcask", "precompute-logits", *map(str, options), "--engine", engine]
        subprocess.run([*command, "--preset", "lean", "--max-seq-length", "64", "--shard-positions", "64"], check=True)
        caches[name] = CacheReader(tmp_path / name)
        assert verify(tmp_path / name).problems == []
    assert folder_bytes(tmp_path / "first") == folder_bytes(tmp_path / "second")
    assert caches["first"].manifest.teacher.engine == "vllm"
    for index in range(len(caches["first"])):
        found, wanted = caches["first"].example(index), caches["plain"].example(index)
        np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
        assert (found.targets.tail_ids == wanted.targets.tail_ids).mean() > 0.9


def test_stage_1_runs_on_vllms_own_log_probabilities(tmp_path: Path, folder: Path) -> None:
    """The manifest and a line of what is reported name the fallback."""
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    printed = {}
    for engine in ("vllm-topk", "transformers"):
        options = ["--teacher-model", folder, "--train-data", tmp_path / "train.jsonl", "--output", tmp_path / engine,
                   "--head-size", 4, "--tail-draws", 0, "--temperatures", 1, "--fidelity-positions", 0]  # fmt: skip
        words = [sys.executable, "-m", "logitcask", "precompute-logits", *map(str, options), "--engine", engine]
        words += ["--max-seq-length", "64", "--shard-positions", "64"]
        printed[engine] = subprocess.run(words, check=True, capture_output=True, text=True).stderr.splitlines()
        assert verify(tmp_path / engine).problems == []
    own = "labels    vLLM's own: only the head at T=1, no draws, no other temperature"
    assert own in printed["vllm-topk"]
    assert own not in printed["transformers"]
    found, wanted = CacheReader(tmp_path / "vllm-topk"), CacheReader(tmp_path / "transformers")
    assert found.manifest.teacher.engine == "vllm prompt_logprobs"
    assert (found.manifest.label.temperatures, found.manifest.label.tail_draws) == ([1.0], 0)
    assert len(found) == len(wanted) == len(RECORDS)
    for index in range(len(found)):
        a, b = found.example(index), wanted.example(index)
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        assert (a.targets.head_ids == b.targets.head_ids).mean() > 0.9
        np.testing.assert_allclose(a.targets.head_logprobs, b.targets.head_logprobs, atol=0.13)  # a code's width


@pytest.mark.parametrize("topk", [None, 4])
def test_a_float16_teacher_that_overflows_in_vllm_is_refused(topk: int | None, load: Load, tmp_path: Path) -> None:
    """Its third token sets it off; the same reason is given as with transformers."""
    folder = overflowing_teacher(tmp_path / "teacher", in_body=True, tokens=[260], width=128)
    teacher = load(topk, source=folder, dtype="float16")
    label = LABEL.model_copy(update={"temperatures": [1.0], "fidelity_positions": 0, "tail_draws": 0 if topk else 8})
    mask = np.array([True, True, True, True, False])
    example = TokenizedExample(5, np.array([3, 4, 260, 6, 7]), mask, np.zeros(4, dtype=bool))
    message = ""
    try:  # pytest.raises would keep the traceback and with it the engine, whose end breaks the next test's
        label_shard(teacher, [[example]], label, lambda count: None)
    except LogitcaskError as error:
        message = str(error)
    assert message.startswith("the label of example 5, position "), message
    assert message.endswith("the teacher ran in float16: float16 overflows above 65,504: use bfloat16 or float32")


@contextlib.contextmanager
def without(owner: Any, name: str) -> Iterator[None]:
    """Remove an attribute or a field of an object or a class for a while."""
    place = owner if isinstance(owner, dict) else vars(owner)
    value = place.pop(name)
    yield
    place[name] = value


def test_a_vllm_that_lacks_an_attribute_is_refused(load: Load, plain: TransformersTeacher) -> None:
    """The whole message is checked; with the attribute back, the same teacher labels."""
    import vllm
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    teacher, batch = load(), examples([20, 5])
    (worker,) = teacher._llm.collective_rpc(lambda wrapper: wrapper.worker)
    runner, fields = worker.model_runner, CachedRequestState.__dataclass_fields__
    for owner, lost, named in (
        (worker, "rank", "worker.rank"),
        (runner, "model", "worker.model_runner.model.compute_logits"),
        (runner, "requests", "model_runner.requests"),
        (runner.input_batch, "req_id_to_index", "model_runner.input_batch.req_id_to_index"),
        (runner, "query_start_loc", "model_runner.query_start_loc.np"),
        (runner.query_start_loc, "np", "model_runner.query_start_loc.np"),
        (fields, "num_computed_tokens", "CachedRequestState.num_computed_tokens"),
    ):
        with without(owner, lost), pytest.raises(LogitcaskError) as refused:
            require_capture(teacher._llm)
        assert str(refused.value) == (
            f"vLLM {vllm.__version__} lacks {named}: serve the teacher with it and use --engine server (the head at "
            "T=1 alone), or install 0.32, or use --engine transformers"
        )
    with pytest.raises(LogitcaskError, match=r"lacks EngineArgs\.head_of_another_version: serve the teacher"):
        load(head_of_another_version=True)
    with pytest.raises(LogitcaskError, match=r"lacks SamplingParams\.of_another_version: serve the teacher"):
        require_options({}, {"of_another_version"})
    assert_same(teacher.label(batch, LABEL), plain.label(batch, LABEL))


def test_a_v2_runner_that_lacks_an_attribute_is_named() -> None:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    assert vllm_worker.lacking_in_v2(SimpleNamespace()) == "prompt_logprobs_worker.add_request"
    worker = PromptLogprobsWorker(8, torch.device("cpu"))
    for lost in ("req_ids", "query_start_loc_np", "idx_mapping_np", "num_computed_prefill_tokens_np"):
        with without(InputBatch.__dataclass_fields__, lost):
            assert vllm_worker.lacking_in_v2(worker) == f"InputBatch.{lost}"


def test_the_v2_step_takes_the_rows_of_each_request() -> None:
    """Simulated: the V2 runner itself needs a GPU. The requests go through its worker's own class."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    example = examples([40])[0]
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(39, 16, generator=generator), torch.randn(300, 16, generator=generator)
    worker = PromptLogprobsWorker(8, torch.device("cpu"))
    capture = Capture(LABEL, lambda rows: rows @ head.T, keeps_labels=True)
    assert vllm_worker.lacking_in_v2(worker) == ""
    vllm_worker._hook_v2(worker, capture)
    wanted = {"example": 0, "targets": np.flatnonzero(example.target_mask).tolist(), "measured": [], "last": 7}
    worker.add_request("a", 3, SamplingParams(extra_args={KEY: wanted}))
    tokens = torch.zeros(8, 64, dtype=torch.int64)
    tokens[3, :39] = torch.from_numpy(example.input_ids[:-1])
    lengths = np.zeros(8, dtype=np.int64)
    lengths[3] = 39
    for start, end in ((0, 20), (20, 39)):
        batch = SimpleNamespace(
            req_ids=["other", "a"],
            query_start_loc_np=np.array([0, 2, 2 + end - start]),
            idx_mapping_np=np.array([1, 3]),
            num_computed_prefill_tokens_np=np.array([5, start]),
        )
        rows = torch.cat([torch.zeros(2, 16), hidden[start:end]])
        assert worker.compute_prompt_logprobs(None, rows, batch, tokens, None, lengths) == {}
    from logitcask.pipeline.teachers.labelling import label_rows

    targets = np.flatnonzero(example.target_mask)
    want, _ = label_rows(
        lambda rows: rows @ head.T,
        hidden[targets],
        np.append(example.input_ids[1:-1], 7)[targets],
        uniform_draws(0, 0, len(targets), 8),
        np.zeros(len(targets), dtype=bool),
        LABEL,
        None,
        len(targets),
    )
    from safetensors.numpy import load as load_arrays

    arrays = load_arrays(capture.hand_over())
    np.testing.assert_array_equal(arrays["tail_ids"], want.tail_ids)
    np.testing.assert_allclose(arrays["gold_logprobs"], want.gold_logprobs, atol=1e-6)
