"""Whether labels belong to their text: which token a row is the distribution of, and what its numbers are.

A wrong shift, another tokenizer or another kind of numbers would train a student on noise without an error. Each shows
in the text: the token that a row is the distribution of must be as probable as the row says.

Legend: N rows, K entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import FloatArray
from logitcask.pipeline.labels_from.rows import LabelledText

OFFSETS = (1, 0, 2)  # tokens from a row's place to the token it is the distribution of; 2 is nobody's
CERTAIN = 0.01  # nats: a row within this of certainty holds all the probability
ENOUGH = 30  # rows: fewer say nothing for sure
LOGITS = 0.05  # share of rows beyond the slack from which on the numbers are logits
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Fit:
    """How a source is to be read."""

    offset: int  # a row is the distribution of the token so many places later
    kind: str  # logprobs: over the whole vocabulary; renormalized: over the entries alone; logits: neither

    @property
    def rest_is_known(self) -> bool:
        """Whether the probability outside the entries is known."""
        return self.kind == "logprobs"


def log_sums(values: FloatArray) -> NDArray[np.float64]:
    """Return log sum exp of each row, (N,); -inf of an empty one."""
    wide = values.astype(np.float64)
    most = np.maximum(wide.max(1, initial=-np.inf, keepdims=True), np.finfo(np.float64).min)
    with np.errstate(divide="ignore"):
        sums: NDArray[np.float64] = most[:, 0] + np.log(np.exp(wide - most).sum(1))
    return sums


@dataclass
class Evidence:
    """Sums over rows, from which the fit is judged."""

    judged: bool = True  # whether the text must be as probable as the rows say: not if it is known to be theirs
    rows: int = 0
    beyond: int = 0  # rows that sum to more than certainty allows
    certain: int = 0
    probabilities: int = 0  # rows of numbers in [0, 1] that sum to at most 1
    bare: int = 0  # rows whose rest the source says is unknown
    whole: int = 0  # rows that hold the whole vocabulary, or whose rest is given
    mass: float = 0.0
    own: float = 0.0  # what the rows give, on average, to a token that they are the distribution of
    compared: dict[int, int] = field(default_factory=lambda: dict.fromkeys(OFFSETS, 0))
    inside: dict[int, int] = field(default_factory=lambda: dict.fromkeys(OFFSETS, 0))  # tokens among the entries
    given: dict[int, float] = field(default_factory=lambda: dict.fromkeys(OFFSETS, 0.0))  # their probability

    def add(self, text: LabelledText, vocab_size: int) -> None:
        """Take the rows of a text, empty ones left out."""
        present = text.values > -np.inf
        used = present.any(1)
        if not used.any():
            return
        at, ids, values, present = text.at[used], text.ids[used], text.values[used], present[used]
        sums = log_sums(values)
        share = np.exp(values - sums[:, None])
        positive = np.where(present, values, 0.0)
        self.rows += len(at)
        self.beyond += int((sums > text.slack).sum())
        self.certain += int((np.abs(sums) < CERTAIN).sum())
        self.probabilities += int(((positive >= 0).all(1) & (positive.sum(1) <= 1.0 + CERTAIN)).sum())
        self.bare += len(at) * text.bare
        self.whole += len(at) if text.log_rest is not None or ids.shape[1] >= vocab_size else 0
        self.mass += float(np.exp(np.minimum(sums, 0.0)).sum())
        self.own += float((share**2).sum())
        for offset in OFFSETS:
            token = at + offset
            here = (token > 0) & (token < len(text.input_ids))
            here[here] &= text.wanted[token[here]]
            match = (ids[here] == text.input_ids[token[here]][:, None]) & present[here]
            self.compared[offset] += int(here.sum())
            self.inside[offset] += int(match.any(1).sum())
            self.given[offset] += float(share[here][match].sum())

    def settle(self, source: str, offsets: Sequence[int]) -> Fit:
        """Return how to read a source whose rows have one of these offsets.

        Raises LogitcaskError if the rows are probabilities, or fit the text in none of these ways.
        """
        if not self.rows:
            raise LogitcaskError(f"{source}: has no labels: every row is empty")
        if self.probabilities == self.rows and self.certain < self.rows:
            raise LogitcaskError(f"{source}: holds probabilities, not their logarithms: store their logarithms")
        kind = "logprobs"
        if self.beyond > LOGITS * self.rows:
            kind = "logits"
        elif self.bare or (self.certain == self.rows and self.whole < self.rows):
            kind = "renormalized"
        offset = max(offsets, key=self._score)
        fit = Fit(offset, kind)
        self.require(source, fit)
        return fit

    def require(self, source: str, fit: Fit) -> None:
        """Raise LogitcaskError unless the text is about as probable as the rows read in this way say."""
        count = self.compared[fit.offset]
        if not count:
            raise LogitcaskError(f"{source}: no row stands before a token that is a target")
        if count < ENOUGH or not self.judged:
            return
        mass = self.mass / self.rows if fit.rest_is_known else 1.0
        inside = self.inside[fit.offset] / count
        best = max(OFFSETS, key=self._score)
        if self._score(best) > 2 * self._score(fit.offset):
            raise LogitcaskError(
                f"{source}: the rows are the distributions of other tokens than this format's: they fit the text best "
                f"{abs(best - fit.offset)} token {'later' if best > fit.offset else 'earlier'}: shift them"
            )
        if self._score(fit.offset) < self.own / self.rows / 4 or inside < (mass / 2 if fit.rest_is_known else 0.05):
            raise LogitcaskError(
                f"{source}: the labels do not fit the text: its tokens are among the entries at {inside:.1%} of "
                f"{count:,} positions, where the labels say {mass:.1%}, and get a probability of "
                f"{self._score(fit.offset):.3f} on average, where they say {self.own / self.rows:.3f}: is --tokenizer "
                "that of the labels, and --columns right?"
            )
        if fit.rest_is_known and mass < inside / 2:
            raise LogitcaskError(
                f"{source}: the values are neither log-probabilities nor logits of one softmax: they sum to a "
                f"probability of {mass:.3g} on average, but hold the text's token at {inside:.1%} of positions"
            )

    def _score(self, offset: int) -> float:
        return self.given[offset] / max(1, self.compared[offset])
