"""A teacher in memory beside the student: exact distillation with no cache, for small teachers and as the reference."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from logitcask.pipeline.batches import Batch
from logitcask.pipeline.fused import TeacherRows
from logitcask.pipeline.lm_head import LMHead, keeps_apart, last_hidden_states, read_head
from logitcask.pipeline.models import load_causal_lm, weights_fingerprint


@dataclass(frozen=True)
class OnlineTeacher:
    """A teacher in float32; its full distribution at each target position is the target."""

    model: PreTrainedModel
    head: LMHead
    vocab_size: int  # ids beyond it are no tokens
    packs: bool  # whether examples may share a row
    fingerprint: str  # of the weights

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherRows:
        """What the teacher's head sees at the batch's N target positions, and the head."""
        ids = batch["input_ids"]
        with torch.autocast(ids.device.type, enabled=False):
            hidden = last_hidden_states(self.model, ids, batch.get("position_ids"))
        return TeacherRows(hidden.flatten(0, 1)[batch["target_index"]], self.head, self.vocab_size)


def load_online_teacher(source: str, vocab_size: int, device: torch.device) -> OnlineTeacher:
    """A teacher on a device. Raises LogitcaskError where it cannot be loaded, or its logits be taken apart."""
    model = load_causal_lm(source, dtype=torch.float32).eval().requires_grad_(False).to(device)
    return OnlineTeacher(model, read_head(model), vocab_size, keeps_apart(model), weights_fingerprint(model))
