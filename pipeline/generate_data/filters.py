"""Sort each answer into training or validation, or give the reason to drop it.

Memory: about 7 kB per distinct response; nothing else grows.
"""

import ast
import hashlib
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from datasketch import MinHash, MinHashLSH
from markdown_it import MarkdownIt

from logitcask.pipeline.generate_data.journal import Answer

HASHES = 128  # minimum hashes per response
SHINGLE_WORDS = 5
PYTHON = {"python", "py", "python3"}
MARKDOWN = MarkdownIt("commonmark")


def curate(
    answers: Iterable[Answer], *, near_duplicate: float, validation_fraction: float, seed: int
) -> Iterator[tuple[str, Answer]]:
    """Yield each answer with ``train``, ``validation``, or the reason why it is dropped.

    An answer's fate depends on it, on the answers before it, and on the seed: more answers at the end change nothing.
    """
    seen = Responses(near_duplicate)
    for answer in answers:
        fate = fault(answer) or seen.add(answer.response)
        if not fate:
            fate = "validation" if share(seed, answer.id) < validation_fraction else "train"
        yield fate, answer


def fault(answer: Answer) -> str:
    """Return why an answer cannot be used, or an empty string."""
    if answer.finish != "stop":
        return answer.finish if answer.finish in {"length", "refusal"} else "unfinished"
    if not answer.response.strip():
        return "empty"
    return "" if all(map(is_python, python_blocks(answer.response))) else "syntax"


def python_blocks(text: str) -> list[str]:
    """Return the contents of a Markdown text's fenced code blocks that are marked as Python."""
    fences = [(token.info.lower().split() or [""], token.content) for token in MARKDOWN.parse(text)
              if token.type == "fence"]  # fmt: skip
    return [content for info, content in fences if info[0] in PYTHON]


def is_python(code: str) -> bool:
    """Return whether the code parses. It is never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about doubtful but valid code
            ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def share(seed: int, prompt_id: str) -> float:
    """Return a number in [0, 1) that depends only on the seed and the prompt."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt_id}".encode()).digest()[:8]) / 2**64


class Responses:
    """The responses so far, to detect duplicates."""

    def __init__(self, threshold: float) -> None:
        """``threshold``: Jaccard similarity of 5-word runs, estimated from 128 hashes, that makes two duplicates."""
        self._threshold, self._exact = threshold, set[bytes]()
        # The index only proposes candidates: a lower threshold makes it miss none.
        self._index = MinHashLSH(threshold=0.85 * threshold, num_perm=HASHES, weights=(0.2, 0.8))
        self._hashes: list[np.ndarray] = []

    def add(self, text: str) -> str:
        """Return ``duplicate`` or ``near-duplicate``; or add the text to those so far and return an empty string."""
        digest = hashlib.sha256(text.strip().encode()).digest()[:16]
        if digest in self._exact:
            return "duplicate"
        if self._threshold < 1:
            words = re.findall(r"\w+|[^\w\s]", text)
            starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
            sketch = MinHash(num_perm=HASHES)
            sketch.update_batch({" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in starts})
            hashes, candidates = sketch.hashvalues, self._index.query(sketch)
            if any((self._hashes[earlier] == hashes).mean() >= self._threshold for earlier in candidates):
                return "near-duplicate"
            self._index.insert(len(self._hashes), sketch)
            self._hashes.append(hashes)
        self._exact.add(digest)
        return ""
