"""The transformers engine: any causal language model by hub id, local folder or GGUF file, run in plain PyTorch.

Legend: B sequences per batch, L their padded length, N target positions, V vocabulary, M tail draws.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.labels import FloatArray
from logitcask.cache.manifest import LabelSettings, MadeBy, TeacherIdentity
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import choose_device, device_name, why_slow
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm, weights_fingerprint
from logitcask.pipeline.teachers.exact.coder import HiddenCoder
from logitcask.pipeline.teachers.exact.heads import stored_head
from logitcask.pipeline.teachers.fidelity_probe import Probe
from logitcask.pipeline.teachers.labelling import batch_draws, label_rows, slice_rows, split_rows
from logitcask.pipeline.teachers.teacher import (
    Labelled,
    TeacherFacts,
    TokenizedExample,
    made_by,
    next_tokens,
    padded,
    teacher_id,
)
from logitcask.pipeline.text.tokens.encoded import Encoded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersTeacher:
    """A causal language model in evaluation mode. Its head runs on target positions only, a slice of them at a time."""

    def __init__(self, model: PreTrainedModel, identity: TeacherIdentity, maker: MadeBy) -> None:
        self._model = model.eval()
        self._head = read_head(model)
        self._cached_probe: Probe | None = None
        self._stored_head: TeacherHead | None = None
        self._coder: HiddenCoder | None = None
        self._buffer = self._head.weight.new_empty(0, 0)  # for a slice of logits, allocated once
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.facts = TeacherFacts(identity, maker, int(self._head.weight.shape[0]), longest)

    def expect(self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings) -> None:
        """Do nothing: batches are labelled one after another."""

    def label(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> Labelled:
        """Return the labels of each example's target positions.

        Rows are padded on the right and run without a padding mask: attention is causal, so no real token sees padding.
        """
        counts = [int(example.target_mask.sum()) for example in batch]
        with torch.inference_mode():
            hidden_NH = self.target_states(batch)
            buffer = self.room(label)
            targets, fidelity = label_rows(
                partial(self._head.logits, room=buffer),
                hidden_NH,
                next_tokens(batch),
                batch_draws(batch, counts, label),
                np.concatenate([example.measured for example in batch]),
                label,
                self.probe(label),
                len(buffer),
                self._coder_for(label),
            )
        return Labelled(split_rows(targets, counts), fidelity)

    @property
    def head(self) -> LMHead:
        """Its output head."""
        return self._head

    def target_states(self, batch: Sequence[TokenizedExample | Encoded]) -> Tensor:
        """Return the last hidden states of the target positions, (N, H)."""
        ids_BL, mask_BL = padded(batch)
        lengths_B = torch.tensor([len(example.input_ids) for example in batch])
        hidden_BLH = last_hidden_states(self._model, torch.from_numpy(ids_BL).to(self._model.device), lengths=lengths_B)
        at_N = torch.from_numpy(np.flatnonzero(mask_BL)).to(hidden_BLH.device)
        return hidden_BLH.flatten(0, 1)[at_N]  # by a mask, the host would wait to learn how many there are

    def hidden_states(self, batch: Sequence[TokenizedExample]) -> FloatArray:
        """Return what the head reads at the target positions of a batch, (N, W)."""
        with torch.inference_mode():
            hidden: FloatArray = self.target_states(batch).float().cpu().numpy()
        return hidden

    def output_head(self, vocab_size: int) -> TeacherHead:
        """Return its head, without a basis, for exact labels."""
        return stored_head(self._head, vocab_size)

    def use_head(self, head: TeacherHead) -> None:
        """Code hidden states in the basis of this head from now on."""
        self._stored_head, self._coder = head, None

    def _coder_for(self, label: LabelSettings) -> HiddenCoder | None:
        if self._coder is None and label.exact:
            assert self._stored_head is not None, "exact labels need use_head first"
            self._coder = HiddenCoder(self._stored_head, label, self._head.weight.device)
        return self._coder if label.exact else None

    def room(self, label: LabelSettings) -> Tensor:
        """Return the memory for a slice of logits."""
        weight = self._head.weight
        shape = slice_rows(label.vocab_size, weight.device, fresh=False), len(weight)
        if self._buffer.shape != shape:
            self._buffer = weight.new_empty(shape)
        return self._buffer

    def probe(self, label: LabelSettings) -> Probe | None:
        """Return what measures the fidelity certificate, if it is wanted."""
        if self._cached_probe is None and label.fidelity_positions:
            self._cached_probe = Probe(label.vocab_size, self._head.weight.shape[1], self._head.weight.device)
        return self._cached_probe


def load_teacher(
    source: str, *, revision: str | None, dtype: str, device: str, trust_remote_code: bool
) -> TransformersTeacher:
    """Load a teacher. Raises LogitcaskError if the model cannot be loaded or the device does not exist."""
    torch_device = choose_device(device)
    torch_dtype = (
        DTYPES[dtype] if dtype != "auto" else (torch.bfloat16 if torch_device.type == "cuda" else torch.float32)
    )
    if slow := why_slow(torch_dtype, torch_device):
        say(slow)
    model = load_causal_lm(source, dtype=torch_dtype, revision=revision, trust_remote_code=trust_remote_code)
    identity = TeacherIdentity(
        id=teacher_id(source),
        revision=getattr(model.config, "_commit_hash", None) or revision or "",
        weights=weights_fingerprint(model),
        dtype=str(torch_dtype).removeprefix("torch."),
        engine="transformers",
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    maker = made_by(identity.engine, device_name(torch_device), **versions)
    return TransformersTeacher(model.to(torch_device), identity, maker)
