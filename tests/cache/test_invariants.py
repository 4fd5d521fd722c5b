"""``cache verify`` finds numbers that contradict each other: a stranger's digests may match and the labels be wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache.invariants import impossible, inconsistent
from logitcask.cache.labels import Shard, SparseTargets
from logitcask.cache.layout import decode_targets, encode_targets
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.verify import verify
from tests.cache.test_cache import label_settings, write
from tests.support.tiny import sound_shards

LABEL = label_settings(300, 4, 8)
Change = Callable[[Shard], Shard]


def on_targets(change: Callable[[SparseTargets], dict[str, Any]]) -> Change:
    """Change some fields of a shard's labels."""
    return lambda shard: replace(shard, targets=replace(shard.targets, **change(shard.targets)))


def rows_of(values: np.ndarray[Any, Any], column: int, wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a copy with one column replaced."""
    changed = values.copy()
    changed[:, column] = wanted
    return changed


def odds(temperature: int, nats: float) -> Change:
    """Shift the tail's log-odds at one temperature."""

    def change(targets: SparseTargets) -> dict[str, Any]:
        log_m = targets.log_tail_mass[:, temperature].astype(np.float64)
        moved = log_m - np.log(-np.expm1(log_m)) + nats
        return {"log_tail_mass": rows_of(targets.log_tail_mass, temperature, -np.logaddexp(0, -moved))}

    return on_targets(change)


def gold(nats: float, rows: slice) -> Change:
    """Shift l of the next token at some positions."""

    def change(targets: SparseTargets) -> dict[str, Any]:
        moved = targets.gold_logprobs.copy()
        moved[rows] += np.float32(nats)
        return {"gold_logprobs": moved}

    return on_targets(change)


DAMAGE: dict[str, tuple[Change, str]] = {
    "head id twice": (on_targets(lambda t: {"head_ids": rows_of(t.head_ids, 1, t.head_ids[:, 0])}),
                      "head_ids: an id is repeated"),
    "tail id twice": (on_targets(lambda t: {"tail_ids": rows_of(t.tail_ids, 1, t.tail_ids[:, 0])}),
                      "tail_ids: an id is repeated"),
    "tail id of the head": (on_targets(lambda t: {"head_ids": rows_of(t.head_ids, 0, t.tail_ids[:, 0])}),
                            "tail_ids: a drawn id is in the head too"),
    "head out of order": (on_targets(lambda t: {"head_logprobs": t.head_logprobs[:, ::-1]}), "head_logprobs: the most"),
    "head above 1": (on_targets(lambda t: {"head_logprobs": np.zeros_like(t.head_logprobs)}), "mass must be at most 1"),
    "draws too few": (on_targets(lambda t: {"tail_counts": np.minimum(t.tail_counts, 0) + (t.tail_counts > 0)}),
                      "tail_counts: a row must sum to 0 or 8"),
    "padding first": (on_targets(lambda t: {"tail_counts": rows_of(t.tail_counts, 0, 0 * t.tail_counts[:, 0])}),
                      "tail_counts: padding must come last"),
    "odds at T=1 up": (odds(0, 12.0), "head and tail mass must sum to 1, got "),
    "odds at T=1.5 up": (odds(1, 12.0), "log_tail_odds: at T=1.5 more mass than 296 tokens below the head can have"),
    "odds at T=2 up": (odds(2, 12.0), "log_tail_odds: at T=2 more mass than 296 tokens below the head can have"),
    "odds at T=2 down": (odds(2, -12.0), "log_tail_odds: at T=2 less mass than the drawn tokens alone have"),
    "gold of the head lower": (gold(-1.0, slice(0, 1)), "gold_logprobs: differs from the head's"),
    "gold of the drawn lower": (gold(-9.0, slice(1, 2)), "gold_logprobs: differs from the drawn token's"),
    "gold of others higher": (gold(30.0, slice(2, 3)), "gold_logprobs: above the head's last"),
    "other text": (lambda shard: replace(shard, input_ids=np.ones_like(shard.input_ids)), "gold_logprobs: "),
}  # fmt: skip


@pytest.mark.parametrize(("change", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_labels_that_no_teacher_gave_are_reported_whatever_their_digests(
    change: Change, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = sound_shards(LABEL, [3, 2])
    assert len(good[0].targets) > 3
    write(tmp_path / "good", LABEL, good)
    assert verify(tmp_path / "good").problems == []
    monkeypatch.setattr("logitcask.cache.writer.require_possible", lambda *given: None)  # a stranger's writer has none
    write(tmp_path / "bad", LABEL, [good[0], change(good[1])])
    problems = verify(tmp_path / "bad").problems
    assert any(line.startswith("shard 1: ") and problem in line for line in problems), problems
    assert not any(line.startswith("shard 0: ") for line in problems)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 3.0, 10.0, 300.0])  # from a flat teacher to a certain one
@pytest.mark.parametrize(
    ("vocab", "head", "draws"), [(300, 8, 24), (300, 0, 24), (300, 8, 0), (20, 20, 0), (20, 19, 3)]
)
def test_what_a_teacher_gave_is_sound(vocab: int, head: int, draws: int, scale: float) -> None:
    for temperatures in ([1.0, 1.5, 2.0], [0.5, 4.0]):
        label = LabelSettings(
            vocab_size=vocab, head_size=head, tail_draws=draws, temperatures=temperatures, seed=0, fidelity_positions=0
        )
        for shard in sound_shards(label, [40], scale):
            coded = decode_targets(encode_targets(shard.targets), label)
            assert impossible(shard.targets, label) is None
            assert impossible(coded, label) is None
            assert inconsistent(replace(shard, targets=coded), label) == []
