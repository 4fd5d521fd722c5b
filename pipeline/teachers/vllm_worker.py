"""Compute labels inside vLLM's worker, where the hidden states are, so that only labels leave it.

vLLM mixes ``LogitCapture`` into its worker class. It runs before the runner's step that computes the prompt's
log-probabilities, which sees the hidden state of every prompt token once. That step is private to vLLM: both model
runners are supported, V1 (``_get_prompt_logprobs_dict``) and V2 (``prompt_logprobs_worker``).

Legend: L prompt tokens, N target positions of an example, M tail draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.labels import FloatArray, SparseTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.models.load import weights_fingerprint
from logitcask.pipeline.teachers.exact.coder import HiddenCoder
from logitcask.pipeline.teachers.exact.heads import measured_head, packed_head, unpacked_head
from logitcask.pipeline.teachers.fidelity_probe import Probe
from logitcask.pipeline.teachers.labelling import label_rows, slice_rows
from logitcask.pipeline.teachers.sparsify import uniform_draws
from logitcask.pipeline.teachers.vllm import KEY


@dataclass
class _Rows:
    """Labels of one request so far: its prefill may be split into chunks, and start over after a preemption."""

    parts: list[SparseTargets] = field(default_factory=list)
    hidden: list[FloatArray] = field(default_factory=list)  # in place of labels, if they are asked for
    fidelity: FidelitySums | None = None
    positions: int = 0


class Capture:
    """Turns chunks of hidden states into the labels of whole examples."""

    def __init__(
        self, label: LabelSettings | None, logits_of: Callable[[Tensor], Tensor | None], keeps_labels: bool
    ) -> None:
        """``keeps_labels``: whether this rank does; the others only take part in computing the logits."""
        self._logits_of, self._keeps_labels = logits_of, keeps_labels
        self.begin(label)

    def begin(self, label: LabelSettings | None, head: TeacherHead | None = None) -> None:
        """Label with these settings from now on; labels not yet handed over are dropped.

        Exact labels need the ``head`` that a cache stores; without settings, hidden states are handed over.
        """
        self._label, self._head = label, head
        self._probe: Probe | None = None
        self._coder: HiddenCoder | None = None
        self._unfinished: dict[str, _Rows] = {}
        self._finished: dict[int, _Rows] = {}

    @torch.inference_mode()
    def take(self, request: str, wanted: dict[str, Any], prompt_L: Any, hidden: Tensor, start: int) -> None:
        """Label the targets among the tokens ``start`` to ``start + len(hidden)`` of a request's prompt."""
        if start == 0:
            self._unfinished[request] = _Rows()
        rows = self._unfinished.get(request)
        if rows is None:  # finished: these are generated tokens
            return
        targets = np.asarray(wanted["targets"], dtype=np.int64)
        inside = np.flatnonzero((targets >= start) & (targets < start + len(hidden)))
        if len(inside):
            chosen = hidden[torch.from_numpy(targets[inside] - start).to(hidden.device)]
            if self._label is None:
                rows.hidden.append(chosen.float().cpu().numpy())
            elif self._keeps_labels:
                self._label_rows(
                    rows, self._label, wanted, np.asarray(prompt_L, dtype=np.int64), targets, inside, chosen
                )
            else:
                at_once = slice_rows(self._label.vocab_size, chosen.device, fresh=True)
                for first in range(0, len(chosen), at_once):
                    self._logits_of(chosen[first : first + at_once])
            rows.positions += len(inside)
        if start + len(hidden) > targets[-1]:
            self._finished[int(wanted["example"])] = self._unfinished.pop(request)

    def _label_rows(
        self,
        rows: _Rows,
        label: LabelSettings,
        wanted: dict[str, Any],
        prompt_L: Any,
        targets: Any,
        inside: Any,
        chosen: Tensor,
    ) -> None:
        if self._probe is None and label.fidelity_positions:
            self._probe = Probe(label.vocab_size, chosen.shape[1], chosen.device)
        if self._coder is None and label.exact:
            assert self._head is not None, "exact labels need a head"
            self._coder = HiddenCoder(self._head, label, chosen.device)
        uniforms_NM = uniform_draws(label.seed, int(wanted["example"]), len(targets), label.tail_draws)
        following = np.append(prompt_L[1:], wanted["last"])  # not in the prompt: it predicts nothing
        targets_of_chunk, fidelity = label_rows(
            self._logits,
            chosen,
            following[targets[inside]],
            uniforms_NM[inside],
            np.isin(inside, wanted["measured"]),
            label,
            self._probe,
            slice_rows(label.vocab_size, chosen.device, fresh=True),
            self._coder,
        )
        rows.parts.append(targets_of_chunk)
        rows.fidelity = fidelity if rows.fidelity is None else rows.fidelity + fidelity

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._logits_of(hidden)
        assert logits is not None, "the rank that keeps labels has the logits"
        return logits

    def hand_over(self) -> bytes:
        """Return what is finished as safetensors: arrays of targets, or ``hidden``, and of each example.

        That is ``examples``, ``counts`` and, of labels, the sums ``fidelity``.
        """
        finished, self._finished = dict(sorted(self._finished.items())), {}
        if not self._keeps_labels or not finished:
            return b""
        counts = np.array([rows.positions for rows in finished.values()], dtype=np.int64)
        examples = {"examples": np.array(list(finished), dtype=np.int64), "counts": counts}
        if self._label is None:
            hidden = np.concatenate([part for rows in finished.values() for part in rows.hidden])
            return save({"hidden": hidden, **examples})
        parts = [part for rows in finished.values() for part in rows.parts]
        arrays = {name: np.ascontiguousarray(value) for name, value in vars(SparseTargets.concatenate(parts)).items()}
        nothing = FidelitySums.zeros(self._label.temperatures, exact=self._label.exact is not None)
        fidelity = nothing
        for rows in finished.values():
            fidelity += rows.fidelity or nothing
        return save({**arrays, **examples, "fidelity": fidelity.row})


class LogitCapture:
    """Methods that vLLM's ``collective_rpc`` calls on each worker; mixed into its class."""

    logitcask_capture: Capture | None = None

    def logitcask_lacking(self) -> str:
        """Return what this vLLM lacks for the capture, "" if nothing."""
        needed = ("rank", "parallel_config.tensor_parallel_size", "model_runner.model.compute_logits")
        if lacking := _lacking(self, "worker", *needed):
            return lacking
        runner = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "_get_prompt_logprobs_dict"):
            return lacking_in_v1(runner)
        if getattr(runner, "prompt_logprobs_worker", None) is not None:
            return lacking_in_v2(runner.prompt_logprobs_worker)
        return "model_runner._get_prompt_logprobs_dict or model_runner.prompt_logprobs_worker"

    def logitcask_begin(self, label: str = "", head: bytes = b"") -> None:
        """Start labelling with these LabelSettings, given as JSON, exact labels with the head of ``packed_head``.

        Without settings, start collecting hidden states.
        """
        settings = LabelSettings.model_validate_json(label) if label else None
        stored = unpacked_head(head) if head else None
        if self.logitcask_capture is not None:  # the runner is hooked already
            self.logitcask_capture.begin(settings, stored)
            return
        runner = self.model_runner  # type: ignore[attr-defined]
        keeps_labels = self.rank % self.parallel_config.tensor_parallel_size == 0  # type: ignore[attr-defined]
        self.logitcask_capture = Capture(settings, runner.model.compute_logits, keeps_labels)
        self.logitcask_capture.begin(settings, stored)
        if hasattr(runner, "_get_prompt_logprobs_dict"):
            _hook_v1(runner, self.logitcask_capture)
        else:
            _hook_v2(runner.prompt_logprobs_worker, self.logitcask_capture)

    def logitcask_take(self) -> bytes:
        """Return the labels finished since the last call; empty on ranks that keep none."""
        return b"" if self.logitcask_capture is None else self.logitcask_capture.hand_over()

    def logitcask_head(self, vocab_size: int) -> bytes:
        """Return the model's head, measured, as ``packed_head`` does; empty on ranks that keep no labels."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        config = self.model_runner.model_config  # type: ignore[attr-defined]
        head = measured_head(
            model.compute_logits,
            config.get_hidden_size(),
            vocab_size,
            torch.zeros((), dtype=config.dtype, device=next(model.parameters()).device),
        )
        return packed_head(head) if head is not None else b""

    def logitcask_weights(self) -> str:
        """Return the fingerprint of this rank's weights."""
        return weights_fingerprint(self.model_runner.model)  # type: ignore[attr-defined]


def _lacking(owner: Any, name: str, *paths: str) -> str:
    """Return the first of these dotted attributes that an object lacks, "" if it has all."""
    for path in paths:
        value = owner
        for word in path.split("."):
            if not hasattr(value, word):
                return f"{name}.{path}"
            value = getattr(value, word)
    return ""


def _lacking_fields(module: str, kind: str, *names: str) -> str:
    """Return the first of these fields that a dataclass of vLLM, which may have no instance yet, lacks."""
    try:
        known = getattr(import_module(module), kind).__dataclass_fields__
    except (ImportError, AttributeError):
        return f"{module}.{kind}"
    return next((f"{kind}.{name}" for name in names if name not in known), "")


def lacking_in_v1(runner: Any) -> str:
    """Return what a V1 runner lacks, "" if nothing."""
    request_fields = ("sampling_params", "prompt_token_ids", "num_computed_tokens")
    return _lacking(
        runner, "model_runner", "requests", "input_batch.req_id_to_index", "query_start_loc.np"
    ) or _lacking_fields("vllm.v1.worker.gpu_input_batch", "CachedRequestState", *request_fields)


def lacking_in_v2(worker: Any) -> str:
    """Return what a V2 runner's worker lacks, "" if nothing."""
    batch_fields = ("req_ids", "query_start_loc_np", "idx_mapping_np", "num_computed_prefill_tokens_np")
    return _lacking(
        worker, "prompt_logprobs_worker", "add_request", "remove_request", "compute_prompt_logprobs"
    ) or _lacking_fields("vllm.v1.worker.gpu.input_batch", "InputBatch", *batch_fields)


def _hook_v1(runner: Any, capture: Capture) -> None:
    """Wrap the V1 runner's step."""
    original = runner._get_prompt_logprobs_dict

    def step(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        for request_id, count in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            wanted = (getattr(request.sampling_params, "extra_args", None) or {}).get(KEY)
            if wanted is not None:
                offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
                rows, start = hidden_states[offset : offset + count], request.num_computed_tokens
                capture.take(request_id, wanted, request.prompt_token_ids, rows, start)
        return original(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = step


def _hook_v2(worker: Any, capture: Capture) -> None:
    """Wrap the V2 runner's step. Not yet run: the V2 runner needs CUDA."""
    add, remove, original = worker.add_request, worker.remove_request, worker.compute_prompt_logprobs
    wanted_by: dict[str, Any] = {}

    def add_request(req_id: str, req_idx: int, sampling_params: Any) -> None:
        add(req_id, req_idx, sampling_params)
        wanted = (sampling_params.extra_args or {}).get(KEY)
        if wanted is not None:
            wanted_by[req_id] = wanted

    def remove_request(req_id: str) -> None:
        remove(req_id)
        wanted_by.pop(req_id, None)

    def step(
        logits_of: Any, hidden_states: Tensor, input_batch: Any, all_token_ids: Tensor, computed: Any, prompt_lens: Any
    ) -> Any:
        for row, request_id in enumerate(input_batch.req_ids):
            if request_id in wanted_by:
                first, end = (int(at) for at in input_batch.query_start_loc_np[row : row + 2])
                slot = int(input_batch.idx_mapping_np[row])
                prompt = all_token_ids[slot, : int(prompt_lens[slot])].cpu().numpy()
                start = int(input_batch.num_computed_prefill_tokens_np[row])
                capture.take(request_id, wanted_by[request_id], prompt, hidden_states[first:end], start)
        return original(logits_of, hidden_states, input_batch, all_token_ids, computed, prompt_lens)

    worker.add_request, worker.remove_request, worker.compute_prompt_logprobs = add_request, remove_request, step
