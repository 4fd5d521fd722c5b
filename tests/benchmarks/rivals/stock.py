"""The teacher's one pass over the text, and what every system stores of it."""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.labels import IntArray
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm
from tests.benchmarks.rivals.systems import Batch, System, Text
from tests.benchmarks.study import corpus
from tests.benchmarks.study.students import write_atomically

BLOCK = 8  # windows per forward pass of the teacher
TOPS = (8, 50, 64, 128)  # sizes of the labels that are compared


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are for SmolLM2."""

    length: int = 128  # L
    windows: int = 200  # of training
    held_out: int = 16
    per_step: int = 2
    steps: int = 300
    width: int = 64  # of the student that is trained
    rounds: int = 5  # of reading and of capture
    step_length: int = 513
    # of the students whose steps are measured: name, layers, B, steps after one to warm up
    students: tuple[tuple[str, int, int, int], ...] = (
        ("loss and head alone", 0, 4, 2),
        ("the 100m student", 20, 2, 1),
    )


class Stored:
    """The teacher's hidden states of the training windows, (windows, N, H), in the place of a teacher that runs."""

    def __init__(self, hidden: NDArray[np.float32], weight: Tensor) -> None:
        self._hidden, self.weight = hidden, weight

    def hidden(self, batch: Batch) -> Tensor:
        """Return the hidden states of a batch's windows, (B, N, H)."""
        return torch.from_numpy(self._hidden[batch["windows"]])


@dataclass(frozen=True)
class Stock:
    """Training and held-out windows, (windows, L), their hidden states, and the teacher's head."""

    text: Text
    head: LMHead
    ids: IntArray
    hidden: NDArray[np.float32]
    held_ids: IntArray
    held_hidden: NDArray[np.float32]

    @property
    def stored(self) -> Stored:
        """The teacher of the training windows."""
        return Stored(self.hidden, self.head.weight)

    def logits(self, hidden: NDArray[np.float32]) -> Tensor:
        """Return the teacher's logits (N, V) from its hidden states (N, H)."""
        with torch.inference_mode():
            return self.head.logits(torch.from_numpy(np.asarray(hidden)))[:, : self.text.vocabulary]


def outside(stock: Stock) -> dict[str, Any]:
    """Return the mean mass that the teacher has outside its most probable k tokens, over the held-out positions."""
    sums, ks = torch.zeros(len(TOPS), dtype=torch.float64), [min(k, stock.text.vocabulary) for k in TOPS]
    for hidden in stock.held_hidden:
        inner = stock.logits(hidden).softmax(1).topk(max(ks), dim=1).values.double().cumsum(1)
        sums += (1 - inner[:, [k - 1 for k in ks]]).mean(0)
    means = sums / len(stock.held_hidden)
    return {f"top {k}": round(float(mean), 4) for k, mean in zip(TOPS, means, strict=True)}


def the_teacher(source: str) -> PreTrainedModel:
    """Return the teacher in float32."""
    return load_causal_lm(source, dtype=torch.float32).eval().requires_grad_(False)


def prepare(folder: Path, text: Text, sizes: Sizes) -> Stock:
    """Return the windows and the teacher's hidden states; run the teacher if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    model = the_teacher(text.source)
    found = []
    for name, count in (("train", sizes.windows), ("held_out", sizes.held_out)):
        place = folder / f"{name}.npz"
        if not place.exists():
            ids = windows(text, count, sizes.length, held_out=name == "held_out")
            partial = place.with_suffix(".partial.npz")
            np.savez(partial, ids=ids, hidden=states(model, ids))
            partial.replace(place)
        arrays = np.load(place)
        found += [arrays["ids"], arrays["hidden"]]
    return Stock(text, read_head(model), *found)


def windows(text: Text, count: int, length: int, *, held_out: bool) -> IntArray:
    """Return the first windows of the study's code, (count, L); held-out ones come from several files."""
    parts, apart = corpus.LENGTH // length, 8 if held_out else 1
    whole = corpus.windows(corpus.code_files(held_out), text.tokenizer(), -(-count // parts) * apart)
    return whole[::apart].reshape(-1, length)[:count]


def states(model: PreTrainedModel, ids: IntArray) -> NDArray[np.float32]:
    """Return the last hidden states of the target positions, (windows, N, H)."""
    found = []
    for first in range(0, len(ids), BLOCK):
        with torch.inference_mode():
            hidden = last_hidden_states(model, torch.from_numpy(ids[first : first + BLOCK]))
        found.append(hidden[:, :-1].numpy())
    return np.concatenate(found)


def label(folder: Path, stock: Stock, systems: Sequence[System]) -> dict[str, Any]:
    """Let the systems without labels of these windows store them; return bytes and positions of each.

    ``once`` are the bytes that a larger store would not have more of.
    """
    writing = [system for system in systems if system.write and not done(folder, system).exists()]
    with contextlib.ExitStack() as stack:
        adds = []
        for system in writing:
            place = folder / system.name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            if system.write is not None:
                adds.append(stack.enter_context(system.write(place)))
        for ids, hidden in zip(stock.ids, stock.hidden, strict=True) if adds else ():
            logits = stock.logits(hidden)
            for add in adds:
                add(ids, logits)
    for system in writing:
        done(folder, system).touch()
    positions = stock.ids.shape[0] * (stock.ids.shape[1] - 1)
    sizes = {}
    for system in systems:
        place = folder / system.name
        sizes[system.name] = {"bytes": size_of(place), "once": system.once(place), "positions": positions}
    return sizes


def done(folder: Path, system: System) -> Path:
    """Return the file that says that a system's labels are complete."""
    return folder / f"{system.name}.done"


def size_of(place: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def part(folder: Path, name: str, names: Sequence[str], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a part measured, which it does once for the same systems: ratios are of one run."""
    file = folder / "parts" / f"{name}.json"
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["systems"] == list(names):
            found: dict[str, Any] = kept["found"]
            return found
    found = measure()
    write_atomically(file, {"systems": list(names), "found": found})
    print(f"{name}: {json.dumps(found)}", flush=True)
    return found
