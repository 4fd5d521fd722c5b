"""TRL's losses with the teacher in memory, on the file's text: GKDTrainer's as with ``lmbda=0``, DistillationTrainer's.

The latter's trainer always lets the student write; its loss takes any text. In measurements of time the teacher runs in
every step. Students get its hidden states from one pass before, which changes no number and spares hours.
"""

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from tests.benchmarks.rivals.systems import Batch, Loss, System

GKD, DISTILLATION = "TRL, GKDTrainer", "TRL, DistillationTrainer's loss"


class Teacher(Protocol):
    """The teacher of a batch."""

    weight: Tensor  # of its head, (V, H)

    def hidden(self, batch: Batch) -> Tensor:
        """Return its last hidden states at the target positions, (B, N, H)."""


class Running:
    """A teacher that is run."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.weight = model, model.get_output_embeddings().weight.detach()

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Return the hidden states of a forward pass."""
        found: Tensor = self.model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        return found[:, :-1]


class _Asked:
    """A teacher as GKDTrainer calls it, for one batch."""

    def __init__(self, teacher: Teacher, batch: Batch) -> None:
        self.teacher, self.batch = teacher, batch

    def eval(self) -> None:
        """Do nothing: it is never in training."""

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        hidden = functional.pad(self.teacher.hidden(self.batch), (0, 0, 0, 1))  # GKDTrainer drops the last one
        return SimpleNamespace(logits=functional.linear(hidden, self.teacher.weight))


def load(teacher: Teacher) -> tuple[System, System]:
    """Return both trainers' losses of TRL, as it is installed."""
    gkd, distillation = _gkd("JSD, beta 0.5", teacher), _distillation("KL, beta 0", teacher, 0.0)
    return (
        System(GKD, version("trl"), "from PyPI", (gkd,)),
        System(DISTILLATION, version("trl"), "from PyPI", (distillation,)),
    )


def _gkd(name: str, teacher: Teacher) -> Loss:
    def mean(student: PreTrainedModel, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        trainer: Any = SimpleNamespace(
            teacher_model=_Asked(teacher, batch), beta=0.5, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss
        )
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        found: Tensor = GKDTrainer.compute_loss(trainer, student, inputs)
        return found

    return Loss(name, mean, timed=True)


def _distillation(name: str, teacher: Teacher, beta: float) -> Loss:
    def mean(student: PreTrainedModel, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        head, mask = student.get_output_embeddings().weight, torch.ones_like(ids[:, 1:])
        found: Tensor = _chunked_divergence_loss(hidden, teacher.hidden(batch), head, teacher.weight, mask, beta)[0]
        return found

    return Loss(name, mean, timed=True)
