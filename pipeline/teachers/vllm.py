"""The vLLM engine: the same labels, computed inside vLLM's workers by ``vllm_worker``.

Legend: L tokens of an example, N target positions, K head tokens.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.labels import ExactTargets, FloatArray, SparseTargets
from logitcask.cache.manifest import LabelSettings, TeacherIdentity
from logitcask.pipeline.machine import device_name
from logitcask.pipeline.teachers.exact.heads import packed_head, unpacked_head
from logitcask.pipeline.teachers.labelling import split_rows
from logitcask.pipeline.teachers.sparsify import head_only
from logitcask.pipeline.teachers.teacher import Labelled, TeacherFacts, TokenizedExample, made_by, teacher_id

KEY = "logitcask"  # in a request's extra_args
TESTED = "0.31 and 0.32"  # the worker uses private attributes, which these versions have
CPU_KV_CACHE = 1 << 30  # bytes; by default vLLM takes half of the machine's memory


class VllmTeacher:
    """A causal language model in vLLM."""

    def __init__(self, llm: Any, facts: TeacherFacts) -> None:
        self._llm, self.facts = llm, facts
        self._label: LabelSettings | None = None
        self._stored_head = b""  # for exact labels

    def expect(self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings) -> None:
        """Do nothing: batches are labelled one after another."""

    def label(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> Labelled:
        """Return the labels of each example's target positions. vLLM schedules the batch as it sees fit."""
        if label != self._label:
            self._llm.collective_rpc("logitcask_begin", args=(label.model_dump_json(), self._stored_head))
            self._label = label
        self._generate([example.input_ids[:-1].tolist() for example in batch], [_request(e) for e in batch])
        fidelity = FidelitySums.zeros(label.temperatures, exact=label.exact is not None)
        labels: dict[int, SparseTargets] = {}
        for data in self._llm.collective_rpc("logitcask_take"):
            if data:
                arrays = load(data)
                kind = ExactTargets if label.exact else SparseTargets
                targets = kind(*(arrays[name] for name in kind.names()))
                labels |= dict(
                    zip(arrays["examples"].tolist(), split_rows(targets, arrays["counts"].tolist()), strict=True)
                )
                fidelity += FidelitySums(arrays["fidelity"])
        for example in batch:
            count = len(labels[example.index]) if example.index in labels else 0
            if count != example.target_mask.sum():
                raise LogitcaskError(
                    f"vLLM gave {count} of {example.target_mask.sum()} labels of example {example.index}: this version "
                    f"schedules differently from {TESTED}, which work: use one of them, or --engine transformers"
                )
        return Labelled([labels[example.index] for example in batch], fidelity)

    def output_head(self, vocab_size: int) -> TeacherHead:
        """Return its head, without a basis, for exact labels."""
        return unpacked_head(next(filter(None, self._llm.collective_rpc("logitcask_head", args=(vocab_size,)))))

    def hidden_states(self, batch: Sequence[TokenizedExample]) -> FloatArray:
        """Return what the head reads at the target positions of a batch, (N, W)."""
        self._llm.collective_rpc("logitcask_begin")
        self._label = None
        self._generate([example.input_ids[:-1].tolist() for example in batch], [_request(e) for e in batch])
        arrays = load(next(filter(None, self._llm.collective_rpc("logitcask_take"))))
        starts = dict(zip(arrays["examples"].tolist(), np.cumsum(arrays["counts"]) - arrays["counts"], strict=True))
        counts = {example.index: int(example.target_mask.sum()) for example in batch}
        rows = [arrays["hidden"][starts[index] : starts[index] + count] for index, count in counts.items()]
        return np.concatenate(rows)

    def use_head(self, head: TeacherHead) -> None:
        """Code hidden states in the basis of this head from now on."""
        self._stored_head, self._label = packed_head(head), None

    def _generate(self, prompts: list[list[int]], wanted: list[dict[str, Any]]) -> None:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=1, temperature=0, detokenize=False, skip_reading_prefix_cache=True, extra_args={KEY: each}
            )
            for each in wanted
        ]
        self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def _request(example: TokenizedExample) -> dict[str, Any]:
    """Return what a worker needs of an example besides the prompt, which lacks the last token."""
    return {
        "example": example.index,
        "targets": np.flatnonzero(example.target_mask).tolist(),
        "measured": np.flatnonzero(example.measured).tolist(),
        "last": int(example.input_ids[-1]),
    }


class TopKTeacher(VllmTeacher):
    """vLLM's own prompt log-probabilities: the head at T=1 alone, for a vLLM whose workers cannot be extended."""

    def label(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> Labelled:
        """Return the head of each target position; the tail mass is 1 minus the head's."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=label.head_size, flat_logprobs=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": example.input_ids.tolist()} for example in batch]
        results = self._llm.generate(prompts, params, use_tqdm=False)
        targets = [_top_k(result.prompt_logprobs, e, label) for result, e in zip(results, batch, strict=True)]
        return Labelled(targets, FidelitySums.zeros(label.temperatures))


def _top_k(logprobs: Any, example: TokenizedExample, label: LabelSettings) -> SparseTargets:
    """Return labels from vLLM's K + 1 entries per position: the token that came next, then the K most probable."""
    rows = (np.flatnonzero(example.target_mask) + 1).tolist()
    n, k = len(rows), label.head_size
    ids, values = np.zeros((n, k), dtype=np.int64), np.zeros((n, k), dtype=np.float32)
    gold = np.zeros(n, dtype=np.float32)
    for place, row in enumerate(rows):
        entries = sorted(logprobs[row].items(), key=lambda entry: entry[1].rank)
        gold[place] = logprobs[row][int(example.input_ids[row])].logprob
        best = [(t, entry.logprob) for t, entry in entries if t < label.vocab_size and entry.rank <= k][:k]
        if len(best) < k:
            raise LogitcaskError(
                f"vLLM gave {len(best)} of {k} tokens at example {example.index}, position {row - 1}: the others are "
                f"beyond the tokenizer's {label.vocab_size}: use --engine vllm or transformers"
            )
        ids[place], values[place] = [token for token, _ in best], [value for _, value in best]
    return head_only(ids, values, gold, example.input_ids[np.array(rows)], label.vocab_size)


def load_vllm_teacher(
    source: str,
    *,
    revision: str | None,
    dtype: str,
    max_seq_length: int,
    tensor_parallel_size: int,
    trust_remote_code: bool,
    topk: int | None,
    overrides: Mapping[str, object] | None = None,
) -> VllmTeacher:
    """Load a teacher into vLLM; with ``topk`` a TopKTeacher. ``overrides`` are vLLM's own options.

    Raises LogitcaskError if vLLM is not installed, lacks what is needed, or cannot load the teacher.
    """
    if source.endswith(".gguf"):
        raise LogitcaskError(
            f"{source}: vLLM does not read GGUF files: give a folder or hub id, or use --engine transformers"
        )
    if tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in 10 s instead of 30
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    try:
        import vllm
    except ImportError as error:
        raise LogitcaskError("--engine vllm needs vLLM: pip install 'logitcask[vllm]', or just setup-vllm") from error
    on_cpu = not torch.accelerator.is_available()
    options: dict[str, Any] = {
        "model": source,
        "revision": revision,
        "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
        "skip_tokenizer_init": True,
        "max_model_len": max_seq_length + 1,
        "tensor_parallel_size": tensor_parallel_size,
        "trust_remote_code": trust_remote_code,
        "worker_extension_cls": "logitcask.pipeline.teachers.vllm_worker.LogitCapture",
        "enforce_eager": on_cpu,
        **({"kv_cache_memory_bytes": CPU_KV_CACHE} if on_cpu else {}),
        **({"max_logprobs": topk, "logprobs_mode": "raw_logprobs"} if topk else {}),
        **(overrides or {}),
    }
    require_options(options, {"flat_logprobs"} if topk else {"extra_args", "skip_reading_prefix_cache"})
    try:
        llm = vllm.LLM(**options)
    except (ValueError, OSError, RuntimeError) as error:
        reason = first_line(error)
        raise LogitcaskError(f"{source}: vLLM cannot load this teacher: {reason}") from error
    if not topk:
        require_capture(llm)
    facts = _facts(llm, source, revision, "vllm prompt_logprobs" if topk else "vllm")
    return (TopKTeacher if topk else VllmTeacher)(llm, facts)


def require_options(options: Mapping[str, object], sampling: Collection[str]) -> None:
    """Raise LogitcaskError, naming them, if this vLLM lacks options with which the teacher is loaded or asked."""
    from vllm import EngineArgs, SamplingParams

    known, asked = {field.name for field in fields(EngineArgs)}, set(SamplingParams.__struct_fields__)
    _refuse([f"EngineArgs.{name}" for name in sorted(options.keys() - known)])
    _refuse([f"SamplingParams.{name}" for name in sorted({"detokenize", *sampling} - asked)])


def require_capture(llm: Any) -> None:
    """Raise LogitcaskError, naming it, if this vLLM lacks what the capture in its workers needs."""
    if not hasattr(llm, "collective_rpc"):
        _refuse(["LLM.collective_rpc"])
    _refuse(sorted({name for name in llm.collective_rpc("logitcask_lacking") if name}))


def _refuse(lacking: Sequence[str]) -> None:
    if lacking:
        import vllm

        raise LogitcaskError(
            f"vLLM {vllm.__version__} lacks {', '.join(lacking)}: serve the teacher with it and use --engine server "
            f"(the head at T=1 alone), or install {TESTED.rpartition(' ')[2]}, or use --engine transformers"
        )


def _facts(llm: Any, source: str, revision: str | None, engine: str) -> TeacherFacts:
    import vllm

    config = llm.llm_engine.model_config
    identity = TeacherIdentity(
        id=teacher_id(source),
        revision=getattr(config.hf_config, "_commit_hash", None) or revision or "",
        weights=llm.collective_rpc("logitcask_weights")[0],
        dtype=str(config.dtype).removeprefix("torch."),
        engine=engine,
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    versions = {"torch": torch.__version__, "vllm": vllm.__version__}
    maker = made_by(engine, device_name(device or torch.device("cpu")), **versions)
    text = config.hf_text_config
    return TeacherFacts(identity, maker, int(text.vocab_size), getattr(text, "max_position_embeddings", None))
