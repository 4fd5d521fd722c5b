"""What the compared systems have in common; the code of the others is loaded from checkouts outside this project.

Legend: B windows of a batch, L tokens of a window, N = L - 1 target positions, V vocabulary, H the teacher's width.
"""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache.labels import IntArray
from logitcask.pipeline.text.tokenizer import load_tokenizer

Batch = dict[str, Any]  # of PyTorch tensors: input_ids (B, L), and what the system's own loss takes
Add = Callable[[IntArray, Tensor], None]  # the tokens (L,) of a window and the teacher's logits (N, V)
Read = Callable[[IntArray], Batch]  # windows by their numbers, in the order they were written


class Loss(NamedTuple):
    """An objective: the mean over a batch's target positions; ``timed``: the one whose step is measured."""

    name: str
    mean: Callable[[PreTrainedModel, Batch], Tensor]
    timed: bool = False


@dataclass(frozen=True)
class System:
    """A system by its functions. One that stores no labels has neither ``write`` nor ``read``."""

    name: str
    version: str
    commit: str
    losses: tuple[Loss, ...]
    write: Callable[[Path], AbstractContextManager[Add]] | None = None
    read: Callable[[Path], Read] | None = None
    prepare: Callable[[PreTrainedModel], None] = lambda student: None  # before the first step
    once: Callable[[Path], int] = lambda place: 0  # bytes of its files that hardly grow with the positions

    @property
    def timed(self) -> Loss:
        """The objective whose step is measured."""
        return next(loss for loss in self.losses if loss.timed)


@dataclass(frozen=True)
class Text:
    """What the systems must know of the teacher."""

    source: str
    vocabulary: int

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the teacher's tokenizer, loaded once."""
        return _tokenizer(self.source)


@cache
def _tokenizer(source: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(source)


def windows_of(ids: IntArray) -> Read:
    """Return batches of the text alone, with the windows' numbers."""
    return lambda numbers: {"input_ids": torch.from_numpy(ids[numbers]), "windows": numbers}


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout, or "unknown"."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def plain() -> System:
    """Return training on the text alone, as transformers does it."""

    def mean(student: PreTrainedModel, batch: Batch) -> Tensor:
        found: Tensor = student(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        return found

    return System("text alone", "", "", (Loss("cross-entropy", mean, timed=True),))


def without_init(name: str, folder: Path) -> None:
    """Make a package of a folder without running its ``__init__``, which imports more than the modules needed of it."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder: give a checkout that has it")
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
