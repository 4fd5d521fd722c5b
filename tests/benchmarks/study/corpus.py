"""What the study reads: Python code and English, in windows of equal length, the held-out part from other files."""

import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.labels import IntArray

LENGTH = 256  # tokens per window
POSITIONS = LENGTH - 1  # target positions per window


def code_files(held_out: bool) -> Iterator[str]:
    """Return sources of the standard library in a fixed random order; every tenth file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests", "idlelib"} & {*p.parts})
    order = np.random.default_rng(0).permutation(len(files))
    for place in order:
        if (place % 10 == 0) == held_out:
            yield files[place].read_text(encoding="utf-8", errors="replace")


def english() -> Iterator[str]:
    """Return chapters of Python's language reference."""
    yield from (pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def windows(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, count: int) -> IntArray:
    """Return the first ``count`` full windows of the texts, shape (count, LENGTH); none spans two texts."""
    found: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [ids[first : first + LENGTH] for first in range(0, len(ids) - LENGTH + 1, LENGTH)]
        if len(found) >= count:
            return np.array(found[:count], dtype=np.int64)
    raise SystemExit(f"the text has {len(found)} windows of {LENGTH} tokens, {count} are needed")
