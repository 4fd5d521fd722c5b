"""What becomes of each answer: training, validation, or a reason to drop it.

Legend: b bands of r of a response's 128 minimum hashes. Memory: about 7 kB a distinct response, nothing else grows.
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

HASHES = 128
RUN = 5  # words of a shingle
PYTHON = {"python", "py", "python3"}
MARKDOWN = MarkdownIt("commonmark")
KEPT = ("train", "validation")


def curate(
    answers: Iterable[Answer], *, near_duplicate: float, validation_fraction: float, seed: int
) -> Iterator[tuple[str, Answer]]:
    """Each answer with ``train``, ``validation``, or why it is dropped.

    An answer's fate depends on it, on the answers before it, and on the seed: more answers at the end change nothing.
    """
    seen = Responses(near_duplicate)
    for answer in answers:
        fate = fault(answer) or seen.add(answer.response)
        if not fate:
            fate = "validation" if share(seed, answer.id) < validation_fraction else "train"
        yield fate, answer


def fault(answer: Answer) -> str:
    """Why an answer cannot be used, or nothing."""
    if answer.finish != "stop":
        return answer.finish if answer.finish in {"length", "refusal"} else "unfinished"
    if not answer.response.strip():
        return "empty"
    return "" if all(map(is_python, python_blocks(answer.response))) else "syntax"


def python_blocks(text: str) -> list[str]:
    """The contents of a Markdown text's fenced code blocks that are marked as Python."""
    words = [(token.info.lower().split() or [""], token.content) for token in MARKDOWN.parse(text)
             if token.type == "fence"]  # fmt: skip
    return [content for info, content in words if info[0] in PYTHON]


def is_python(code: str) -> bool:
    """Whether the code parses. It is never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful but valid code
            ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def share(seed: int, prompt_id: str) -> float:
    """A number in [0, 1) that depends on the seed and the prompt only."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt_id}".encode()).digest()[:8]) / 2**64


class Responses:
    """The responses so far, to tell duplicates by."""

    def __init__(self, threshold: float) -> None:
        """``threshold``: Jaccard similarity of 5-word runs, estimated from 128 hashes, that makes two duplicates."""
        self._threshold, self._exact = threshold, set[bytes]()
        # it only proposes candidates, so it is made for somewhat less similar ones, not to miss any
        self._index = MinHashLSH(threshold=0.85 * threshold, num_perm=HASHES, weights=(0.2, 0.8))
        self._hashes: list[np.ndarray] = []

    def add(self, text: str) -> str:
        """``duplicate``, ``near-duplicate``, or nothing, and the text is one of those so far."""
        digest = hashlib.sha256(text.strip().encode()).digest()[:16]
        if digest in self._exact:
            return "duplicate"
        if self._threshold < 1:
            words = re.findall(r"\w+|[^\w\s]", text)
            runs = {" ".join(words[i : i + RUN]).encode() for i in range(max(1, len(words) - RUN + 1))}
            sketch = MinHash(num_perm=HASHES)
            sketch.update_batch(runs)
            hashes = sketch.hashvalues
            if any((self._hashes[found] == hashes).mean() >= self._threshold for found in self._index.query(sketch)):
                return "near-duplicate"
            self._index.insert(len(self._hashes), sketch)
            self._hashes.append(hashes)
        self._exact.add(digest)
        return ""
