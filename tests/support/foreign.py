"""Texts with the labels of a teacher that is known exactly, and the layouts in which other tools keep such labels.

The teacher is a table: the logits of the next token depend on the current one alone. The texts are drawn from it, as
labels must fit their text. Legend: L tokens, V vocabulary, K entries.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.tiny import dense_log_probs

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Drawn:
    """A text, and the teacher's log-probabilities of the token after each of its tokens."""

    ids: NDArray[np.int64]  # (L,)
    log_p: Array  # (L, V)

    def top(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the K most probable tokens at each place and their log-probabilities, (L, K)."""
        ids = np.argsort(-self.log_p, axis=1, kind="stable")[:, :k]
        return ids, np.take_along_axis(self.log_p, ids, axis=1).astype(np.float32)


def drawn_texts(count: int = 12, length: int = 24, vocab: int = 300, seed: int = 0) -> list[Drawn]:
    """Return texts of about ``length`` tokens, each token drawn from the teacher's distribution."""
    random = np.random.default_rng(seed)
    table = dense_log_probs(random.normal(0.0, 3.0, (vocab, vocab)))
    texts = []
    for number in range(count):
        ids = [int(random.integers(vocab))]
        while len(ids) < length + number % 3:
            ids.append(int(random.choice(vocab, p=np.exp(table[ids[-1]]))))
        texts.append(Drawn(np.array(ids), table[ids]))
    return texts


def top_k_row(text: Drawn, k: int, **columns: Any) -> dict[str, Any]:
    """Return a record of plain top-k columns, one row per token but the last."""
    ids, values = text.top(k)
    return {"input_ids": text.ids.tolist(), "token_ids": ids[:-1].tolist(), "logprobs": values[:-1].tolist(), **columns}
