"""Logitcask by its public names: the standard label in a cache, and the loss of a batch; larger labels for students."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import logitcask as lc
from logitcask.cache.labels import IntArray
from logitcask.pipeline.models.recompute import keep_products_only
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.precompute.sharding import shuffled
from logitcask.pipeline.settings.precompute import PRESETS, PrecomputeSettings
from tests.benchmarks.rivals.systems import Add, Batch, Loss, Read, System, Text, commit_of

NAME = "Logitcask, standard"


def load(text: Text) -> System:
    """Return Logitcask with the label of its preset ``standard``, which is the default."""
    return System(
        name=NAME,
        version=version("logitcask"),
        commit=commit_of(Path(__file__).parent),
        losses=(_loss("0.1 cross-entropy + 0.9 KL", 0.1, timed=True), _loss("KL alone", 0.0)),
        write=writing(text, label_of(text)),
        read=read,
        prepare=prepare,
        once=lambda place: sum(lc.open(place / "cache").info().bytes_beside.values()),  # the tokenizer
    )


def larger(text: Text) -> list[System]:
    """Return Logitcask with the labels of its presets ``rich`` and ``exact``; the latter are made by stage 1."""

    @contextmanager
    def write_exact(place: Path) -> Iterator[Add]:
        windows: list[list[int]] = []
        yield lambda ids, logits: windows.append(ids.tolist())
        data = place / "windows.jsonl"
        data.write_text("".join(json.dumps({"input_ids": ids, "labels": ids}) + "\n" for ids in windows))
        given = {"teacher_model": text.source, "train_data": str(data), "output": place / "cache", "preset": "exact"}
        precompute(PrecomputeSettings.model_validate({**given, "device": "cpu", "max_seq_length": len(windows[0])}))

    def read_exact(place: Path) -> Read:
        as_stored, count = read(place), len(lc.open(place / "cache").dataset())
        places = np.argsort(shuffled(count, PrecomputeSettings.model_fields["seed"].default))
        return lambda numbers: as_stored(places[numbers])

    head, draws = PRESETS["rich"]
    rich = writing(text, lc.label_settings(text.vocabulary, head_size=head, tail_draws=draws))
    made = {"rich": (rich, read), "exact": (write_exact, read_exact)}
    return [
        System(
            name=f"Logitcask, {name}",
            version=version("logitcask"),
            commit=commit_of(Path(__file__).parent),
            losses=(_loss("KL alone", 0.0),),
            write=write,
            read=reading,
            prepare=prepare,
        )
        for name, (write, reading) in made.items()
    ]


def label_of(text: Text) -> lc.LabelSettings:
    """Return how labels are made."""
    return lc.label_settings(text.vocabulary)


def writer(place: Path, text: Text, label: lc.LabelSettings | None = None) -> lc.Writer:
    """Return what writes a cache into a folder."""
    return lc.create(place / "cache", label=label or label_of(text), tokenizer=text.tokenizer(), teacher=text.source)


def writing(text: Text, label: lc.LabelSettings) -> Callable[[Path], AbstractContextManager[Add]]:
    """Return what labels windows and writes a cache of them into a folder."""

    @contextmanager
    def write(place: Path) -> Iterator[Add]:
        with writer(place, text, label) as cache:

            def add(ids: IntArray, logits: Tensor) -> None:
                targets = lc.sparsify(logits, torch.from_numpy(ids[1:]), label, example=len(cache))
                cache.add(ids, np.arange(len(ids)) < len(ids) - 1, targets)

            yield add

    return write


def read(place: Path) -> Read:
    """Return batches of a cache at T=1."""
    cache = lc.open(place / "cache")
    data, collate = cache.dataset(), cache.collator(1.0)
    return lambda numbers: collate([data[int(number)] for number in numbers])


def prepare(student: PreTrainedModel) -> None:
    """Do what ``logitcask train`` does on a CPU: keep the results of products alone."""
    keep_products_only(student)


def _loss(name: str, alpha: float, *, timed: bool = False) -> Loss:
    def mean(student: PreTrainedModel, batch: Batch) -> Tensor:
        return lc.kd_loss(student, batch, alpha=alpha)

    return Loss(name, mean, timed)
