"""The interface of a teacher, as stage 1 uses it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.exact.head import TeacherHead
from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.labels import FloatArray, IntArray, SparseTargets
from logitcask.cache.manifest import LabelSettings, MadeBy, TeacherIdentity
from logitcask.pipeline.text.tokens.encoded import Encoded


@dataclass(frozen=True)
class TokenizedExample:
    """An example of L tokens, N of them target positions, at ``index`` in the cache."""

    index: int
    input_ids: IntArray  # (L,)
    target_mask: NDArray[np.bool_]  # (L,) whether the distribution of the next token is labelled
    measured: NDArray[np.bool_]  # (N,) whether the certificate measures the position
    metadata: Mapping[str, int] = field(default_factory=dict)  # codes, by column
    companion: bytes = b""  # the example in the teacher's vocabulary, if that is another one: ``vocabulary.alignment``

    @property
    def read(self) -> int:
        """The number of tokens that the teacher reads."""
        return int.from_bytes(self.companion[:4], "little") or len(self.input_ids)


@dataclass(frozen=True)
class Labelled:
    """Labels of each example, and the sums of the fidelity certificate over them all."""

    targets: list[SparseTargets]
    fidelity: FidelitySums
    projection: NDArray[np.float64] | None = None  # (3,) sums of labels in another vocabulary


@dataclass(frozen=True)
class TeacherFacts:
    """What stage 1 needs to know about a teacher before labelling."""

    identity: TeacherIdentity
    made_by: MadeBy  # recorded with each shard
    logits_width: int  # rows of the head: the tokenizer's vocabulary, possibly padded
    max_length: int | None  # the longest sequence the model supports, None if its config does not say


def padded(batch: Sequence[TokenizedExample | Encoded]) -> tuple[IntArray, NDArray[np.bool_]]:
    """Return the token ids and target masks of a batch, both (B, L), padded on the right."""
    longest = max(len(example.input_ids) for example in batch)
    ids_BL = np.zeros((len(batch), longest), dtype=np.int64)
    mask_BL = np.zeros((len(batch), longest), dtype=bool)
    for row, example in enumerate(batch):
        ids_BL[row, : len(example.input_ids)] = example.input_ids
        mask_BL[row, : len(example.input_ids)] = example.target_mask
    return ids_BL, mask_BL


def next_tokens(batch: Sequence[TokenizedExample | Encoded]) -> IntArray:
    """Return the tokens after all target positions of a batch, (N,)."""
    return np.concatenate([example.input_ids[1:][example.target_mask[:-1]] for example in batch])


def teacher_id(source: str) -> str:
    """Return a teacher's name: its hub id, also that of a snapshot in the hub's cache, or the last part of a path."""
    if not Path(source).exists():
        return source
    path = Path(os.path.abspath(source))
    if path.parent.name == "snapshots" and path.parts[-3].startswith("models--"):
        return path.parts[-3].removeprefix("models--").replace("--", "/")
    return path.name


def made_by(engine: str, device: str, **versions: str) -> MadeBy:
    """Return the record of what labels shards: an engine on a device, with versions of packages and of this one."""
    return MadeBy(engine=engine, device=device, versions={"logitcask": version("logitcask"), **versions})


class Teacher(Protocol):
    """A model that labels tokenized examples."""

    facts: TeacherFacts

    def expect(self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings) -> None:
        """Learn which batches will be labelled soon; a teacher may begin with them."""
        ...

    def label(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> Labelled:
        """Return the labels of each example's target positions, in order."""
        ...


@runtime_checkable
class ExactTeacher(Teacher, Protocol):
    """A teacher whose hidden states are known, so that its labels may be exact."""

    def output_head(self, vocab_size: int) -> TeacherHead:
        """Return its head, without a basis, for exact labels."""
        ...

    def hidden_states(self, batch: Sequence[TokenizedExample]) -> FloatArray:
        """Return what the head reads at the target positions of a batch, (N, W)."""
        ...

    def use_head(self, head: TeacherHead) -> None:
        """Code hidden states in the basis of this head from now on."""
        ...
