"""Labels on their way into a cache, staged on disk so that memory does not grow with them.

Legend: N rows of an example, K entries of each, V vocabulary.
"""

import hashlib
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.labels import FloatArray, IntArray, SparseTargets
from logitcask.pipeline.labels_from.fit import Fit, log_sums
from logitcask.pipeline.labels_from.rows import LabelledText
from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.tokens.encoded import Encoded

LEAST_HEAD = -1e-12  # log of the most that can be outside the entries: more would leave nothing for them
CODED = 0.125  # nats: what the codes of a cache leave of a sum
DTYPES = {"ids": "<u4", "values": "<f4", "rest": "<f4", "gold": "<f4"}


class StagedLabels:
    """The rows of all examples in four files; 16 bytes per example are in memory."""

    def __init__(self, folder: Path, fit: Fit, vocab_size: int, head_size: int | None) -> None:
        """Stage into ``folder``, rows of ``head_size`` entries or more only, if that is given."""
        self._folder, self._fit, self._vocab = folder, fit, vocab_size
        self._least = head_size or 1
        self._files = {name: (folder / f"label-{name}").open("wb") for name in DTYPES}
        self._digest = hashlib.sha256()
        self._widths, self._rows = array("i"), array("q", [0])
        self._entries = array("q", [0])
        self.fewest, self.most, self.left_out, self.without_gold = vocab_size, 0, 0, 0

    def add(self, text: LabelledText) -> Encoded:
        """Stage the rows of a text that are labels of its targets; return its tokens with these targets.

        Raises RecordError if a row is malformed.
        """
        rows, target = self._targets(text)
        ids, values = _ordered(text.ids[rows], text.values[rows])
        counts = (values > -np.inf).sum(1)
        _require_ids(ids, values, target - 1, self._vocab)
        width = int(counts.max(initial=0))
        ids, values = ids[:, :width], values[:, :width]
        given = None if text.log_rest is None else text.log_rest[rows]
        values, rest = self._normalized(values, given, text.slack, target - 1)
        gold = _gold(ids, values, text.input_ids[target], None if text.gold is None else text.gold[rows])
        mask = np.zeros(len(text.input_ids), dtype=bool)
        mask[target - 1] = True
        if len(rows):
            self.fewest, self.most = min(self.fewest, int(counts.min())), max(self.most, width)
            self.without_gold += int(np.isneginf(gold).sum())
            self._widths.append(width)
            self._rows.append(self._rows[-1] + len(rows))
            self._entries.append(self._entries[-1] + len(rows) * width)
            for name, part in (("ids", ids), ("values", values), ("rest", rest), ("gold", gold)):
                data = part.astype(DTYPES[name]).tobytes()
                self._files[name].write(data)
                self._digest.update(data)
        return Encoded(text.input_ids, mask)

    def finish(self) -> str:
        """End the staging; return the SHA-256 of all labels."""
        for file in self._files.values():
            file.close()
        self._staged = {
            name: np.memmap(self._folder / f"label-{name}", dtype=DTYPES[name], mode="r") for name in DTYPES
        }
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._widths)

    def targets(self, index: int, head_size: int) -> SparseTargets:
        """Return the labels of a staged example with the ``head_size`` most probable entries of each row."""
        rows = slice(self._rows[index], self._rows[index + 1])
        inside = slice(self._entries[index], self._entries[index + 1])
        shape = (rows.stop - rows.start, self._widths[index])
        ids = self._staged["ids"][inside].reshape(shape)[:, :head_size].astype(np.int64)
        values = self._staged["values"][inside].reshape(shape).astype(np.float32)
        rest = self._staged["rest"][rows].astype(np.float64)
        kept, cut = log_sums(values[:, :head_size]), log_sums(values[:, head_size:])
        if self._fit.rest_is_known:
            partition = np.logaddexp(kept, cut) - np.log(-np.expm1(np.minimum(rest, LEAST_HEAD)))
            rest = np.logaddexp(rest, cut - partition)
            excess, last = np.zeros((shape[0], 1), dtype=np.float32), values[:, head_size - 1]
            outside = max(1, self._vocab - head_size)  # tokens, each at most as probable as the last of the head
            floor = (rest + partition - np.log(outside)).astype(np.float32)
        else:
            excess = _excess(kept)
            partition = kept - excess[:, 0]
            last = floor = np.full(shape[0], -np.inf, dtype=np.float32)
        gold = self._staged["gold"][rows]
        gold = np.where((gold >= last) & (gold < floor), floor, gold) - excess[:, 0]
        head = np.maximum(values[:, :head_size], floor[:, None]) - excess
        none = np.zeros((shape[0], 0))
        return SparseTargets(
            head_ids=ids,
            head_logprobs=np.minimum(head, np.float32(0.0)),
            tail_ids=none.astype(np.int64),
            tail_logprobs=none.astype(np.float32),
            tail_counts=none.astype(np.int64),
            log_partition=partition[:, None].astype(np.float32),
            log_tail_mass=np.minimum(rest, 0.0)[:, None].astype(np.float32),
            gold_logprobs=np.minimum(gold, np.float32(0.0)),
        )

    def _targets(self, text: LabelledText) -> tuple[IntArray, IntArray]:
        """Return the rows that label a target, and the token each is the distribution of."""
        token = text.at + self._fit.offset
        inside = (token > 0) & (token < len(text.input_ids))
        inside[inside] &= text.wanted[token[inside]]
        counts = (text.values > -np.inf).sum(1)
        full = counts >= self._least
        self.left_out += int((inside & ~full & (counts > 0)).sum())
        rows = np.flatnonzero(inside & full)
        return rows, token[rows]

    def _normalized(
        self, values: FloatArray, rest: FloatArray | None, slack: float, places: IntArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return log-probabilities and the log of the mass outside them; without a known rest there is none."""
        sums = log_sums(values)
        if not self._fit.rest_is_known:
            return values - _excess(sums), np.full(len(values), -np.inf, dtype=np.float32)
        whole = sums if rest is None else np.logaddexp(sums, rest)
        wrong = (whole > slack) if rest is None else np.abs(whole) > slack
        if wrong.any():
            row = int(wrong.argmax())
            raise RecordError(
                f"the probabilities at position {places[row]} sum to {np.exp(whole[row]):.3g}, unlike those before"
            )
        if rest is not None:
            return values, rest
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(sums < 0, np.log(-np.expm1(np.minimum(sums, 0.0))), -np.inf)
        scaled: FloatArray = values - np.maximum(sums, 0.0)[:, None].astype(np.float32)
        return _raised(scaled, np.where(values.shape[1] >= self._vocab, -np.inf, left).astype(np.float32), self._vocab)


def _raised(values: FloatArray, rest: FloatArray, vocab_size: int) -> tuple[FloatArray, FloatArray]:
    """Return rows in which no entry is less probable than the tokens outside it, and the log of the mass of these.

    Fits give the last entries too little. These and the tokens outside then share what the entries before them leave:
    the mean of what is behind an entry is least where the entries that are as probable as it end.
    """
    counts = (values > -np.inf).sum(1)
    last = values[np.arange(len(values)), np.maximum(counts - 1, 0)]
    low = np.flatnonzero((counts < vocab_size) & (last < rest - np.log(np.maximum(vocab_size - counts, 1))))
    if not len(low):
        return values, rest
    before = np.cumsum(np.exp(values[low].astype(np.float64)), axis=1)
    before = np.concatenate([np.zeros((len(low), 1)), before[:, :-1]], axis=1)
    level = np.log(((1.0 - before) / (vocab_size - np.arange(values.shape[1]))).min(1))
    values, rest = values.copy(), rest.copy()
    present = values[low] > -np.inf
    values[low] = np.where(present, np.maximum(values[low], level[:, None]), -np.inf)
    rest[low] = level + np.log(vocab_size - counts[low])
    return values, rest


def _excess(sums: NDArray[np.float64]) -> FloatArray:
    """Return by how much rows are to be lowered to sum to 1, (N, 1); not by what coarse codes leave of it.

    Labels that came out of a cache are therefore the same when they go into one.
    """
    return np.where(np.abs(sums) > CODED, sums, 0.0)[:, None].astype(np.float32)


def _ordered(ids: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    """Return the entries of each row, most probable first, absent ones last with id 0."""
    order = np.argsort(-values, axis=1, kind="stable")
    values = np.take_along_axis(values, order, axis=1)
    return np.where(values > -np.inf, np.take_along_axis(ids, order, axis=1), 0), values


def _require_ids(ids: IntArray, values: FloatArray, places: IntArray, vocab_size: int) -> None:
    outside = ((ids < 0) | (ids >= vocab_size)).any(1)
    if outside.any():
        row = int(outside.argmax())
        wrong = ids[row][(ids[row] < 0) | (ids[row] >= vocab_size)][0]
        raise RecordError(f"id {wrong} at position {places[row]} is outside --tokenizer's vocabulary of {vocab_size:,}")
    absent = -1 - np.arange(ids.shape[1])
    ordered = np.sort(np.where(values > -np.inf, ids, absent), axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if repeated.any():
        raise RecordError(f"an id stands twice at position {places[int(repeated.argmax())]}")


def _gold(ids: IntArray, values: FloatArray, tokens: IntArray, given: FloatArray | None) -> FloatArray:
    """Return the log-probability of each row's token, (N,): its entry's, else what the source gives, else -inf."""
    match: NDArray[np.bool_] = (ids == tokens[:, None]) & (values > -np.inf)
    outside = np.full(len(tokens), -np.inf, dtype=np.float32) if given is None else np.minimum(given, np.float32(0.0))
    own = np.where(match, values, -np.inf).max(1, initial=-np.inf)
    return np.where(match.any(1), np.minimum(own, np.float32(0.0)), outside).astype(np.float32)
