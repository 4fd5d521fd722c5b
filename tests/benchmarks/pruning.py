"""Which layers of a teacher to leave out: by how little they change their input, or by the loss without them.

Run as ``python -m tests.benchmarks.pruning`` (10 minutes on one core; stopped, it continues after the last finished
way). SmolLM2 reads functions of the Python standard library; each way removes its layers one by one, and the perplexity
on other functions is taken on the way. Prints the table and writes ``results/pruning.json``, with what was predicted.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.models.students.choose import (
    SHORTLIST,
    PartialModel,
    Probe,
    influence,
    losses_without,
    partial_model,
)
from logitcask.pipeline.runs.run_folder import write_json
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.tokenizer import load_tokenizer
from logitcask.pipeline.text.tokens.encoded import Encoded
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.study.report import machine

RESULTS = Path(__file__).parent / "results/pruning.json"
LENGTH = 160  # tokens per example
CHOOSING, HELD_OUT = 4, 8  # examples
LEFT = (28, 26, 24, 22, 20, 18, 16)  # layers at which the perplexity is taken
PREDICTED = (
    "With 20 layers left, trying all layers gives a perplexity of about 35, a shortlist of 4 by influence up to 1.3 "
    "times that, influence measured again after each removal 2 to 5 times, measured once 3 to 10 times. The shortlist "
    "costs a fifth of trying all."
)
Seen = dict[int, Any]
Scores = Callable[[PartialModel, Probe, Sequence[int], Seen], dict[int, float]]


def changes(partial: PartialModel, probe: Probe, kept: Sequence[int], seen: Seen) -> dict[int, float]:
    """Return the influence of each layer that is left."""
    return influence(probe, seen)


def tried(count: int) -> Scores:
    """Return a function to the losses without each of the ``count`` layers that change their input least."""

    def scores(partial: PartialModel, probe: Probe, kept: Sequence[int], seen: Seen) -> dict[int, float]:
        least = influence(probe, seen)
        return losses_without(partial, probe, kept, sorted(kept, key=lambda i: least[i])[:count], seen)

    return scores


WAYS: dict[str, tuple[Scores, int]] = {  # and how many layers are left at its end
    "influence, once": (changes, 16),
    "influence, after each": (changes, 16),
    f"loss, shortlist of {SHORTLIST}": (tried(SHORTLIST), 16),
    "loss, shortlist of 8": (tried(8), 16),
    "loss, all": (tried(1000), 24),
}


def remove(partial: PartialModel, chosen_by: Probe, held_out: Probe, way: str) -> dict[str, Any]:
    """Return the order in which a way removes layers, perplexities on the way, and processor seconds down to 20."""
    scores, last = WAYS[way]
    kept, order, perplexity, spent, to_20 = list(range(partial.count)), list[int](), dict[str, float](), 0.0, 0.0
    seen, once = partial.between(chosen_by, kept)[0], dict[int, float]()
    while len(kept) > last:
        began = time.process_time()
        if "once" not in way or not once:
            once = scores(partial, chosen_by, kept, seen)
        removed = min((i for i in kept if i in once), key=lambda i: once[i])
        kept.remove(removed)
        order.append(removed)
        if "once" not in way:
            below = {i: seen[i] for i in kept if i < removed}
            seen = below | partial.between(chosen_by, kept, removed, seen[removed][0])[0]
        spent += time.process_time() - began
        to_20 = spent if len(kept) == max(20, last) else to_20
        if len(kept) in LEFT:
            loss = partial.loss(held_out, partial.run(held_out, kept))
            perplexity[str(len(kept))] = round(math.exp(loss), 3)
    return {"order": order, "perplexity": perplexity, "processor_seconds_to_20": round(to_20, 1)}


def examples() -> list[Encoded]:
    """Return functions of the standard library, cut."""
    with tempfile.TemporaryDirectory() as folder:
        written = from_source(None, Path(folder), 2 * (CHOOSING + HELD_OUT), seed=0).path.read_text()
    encoder = Encoder(load_tokenizer(teacher_path()), prompt_loss=False)
    whole = [encoded for line in written.splitlines() for encoded in encoder.examples(json.loads(line))]
    cut = [Encoded(one.input_ids[:LENGTH], one.target_mask[:LENGTH]) for one in whole]
    return [one for one in cut if one.target_mask[:-1].sum() >= 16][: CHOOSING + HELD_OUT]


def main() -> None:
    """Take the ways that are missing, print the table and write it."""
    cpu, results = torch.device("cpu"), json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not results:  # the prediction is written before there is anything to see
        results = {"machine": machine(), "predicted": PREDICTED, "ways": {}}
        write_json(RESULTS, results)
    among = examples()
    chosen_by, held_out = Probe.of(among[:CHOOSING], cpu), Probe.of(among[CHOOSING:], cpu)
    with partial_model(load_causal_lm(teacher_path(), dtype=torch.float32)) as partial:
        every = list(range(partial.count))
        results["whole"] = round(math.exp(partial.loss(held_out, partial.run(held_out, every))), 3)
        results["positions"] = [int(probe.is_target_BL.sum()) for probe in (chosen_by, held_out)]
        for way in (way for way in WAYS if way not in results["ways"]):
            results["ways"][way] = remove(partial, chosen_by, held_out, way)
            write_json(RESULTS, results)
    table = Table("layers left", *map(str, LEFT), "s", title=f"perplexity held out; all layers: {results['whole']}")
    for way in WAYS:
        row = results["ways"][way]
        values = [f"{row['perplexity'].get(str(left), ''):}" for left in LEFT]
        table.add_row(way, *values, f"{row['processor_seconds_to_20']:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
