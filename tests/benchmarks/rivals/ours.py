"""Logitcask by its public names: the standard label in a cache, and the loss of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import logitcask as lc
from logitcask.cache.labels import IntArray
from logitcask.pipeline.machine import free_large_blocks
from logitcask.pipeline.models.recompute import keep_products_only
from tests.benchmarks.rivals.systems import Add, Batch, Loss, Read, System, Text, commit_of

NAME = "Logitcask, standard"


def load(text: Text) -> System:
    """Return Logitcask with the label of its preset ``standard``, which is the default."""

    @contextmanager
    def write(place: Path) -> Iterator[Add]:
        with writer(place, text) as cache:

            def add(ids: IntArray, logits: Tensor) -> None:
                targets = lc.sparsify(logits, torch.from_numpy(ids[1:]), label_of(text), example=len(cache))
                cache.add(ids, np.arange(len(ids)) < len(ids) - 1, targets)

            yield add

    return System(
        name=NAME,
        version=version("logitcask"),
        commit=commit_of(Path(__file__).parent),
        losses=(_loss("0.1 cross-entropy + 0.9 KL", 0.1, timed=True), _loss("KL alone", 0.0)),
        write=write,
        read=read,
        prepare=prepare,
        once=lambda place: sum(lc.open(place / "cache").info().bytes_beside.values()),  # the tokenizer
    )


def label_of(text: Text) -> lc.LabelSettings:
    """Return how labels are made."""
    return lc.label_settings(text.vocabulary)


def writer(place: Path, text: Text) -> lc.Writer:
    """Return what writes a cache into a folder."""
    return lc.create(place / "cache", label=label_of(text), tokenizer=text.tokenizer(), teacher=text.source)


def read(place: Path) -> Read:
    """Return batches of a cache at T=1."""
    cache = lc.open(place / "cache")
    data, collate = cache.dataset(), cache.collator(1.0)
    return lambda numbers: collate([data[int(number)] for number in numbers])


def prepare(student: PreTrainedModel) -> None:
    """Do what ``logitcask train`` does on a CPU: keep the results of products alone, give freed blocks back."""
    keep_products_only(student)
    free_large_blocks()


def _loss(name: str, alpha: float, *, timed: bool = False) -> Loss:
    def mean(student: PreTrainedModel, batch: Batch) -> Tensor:
        return lc.kd_loss(student, batch, alpha=alpha)

    return Loss(name, mean, timed)
