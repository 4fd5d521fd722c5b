"""What the healing study reads: functions of the standard library, English about it, text that the teacher wrote.

The held-out examples are other functions, other texts and answers to other prompts. Functions and texts depend on the
version of Python alone. What a teacher answers depends on the processor's arithmetic too, so the answers of the study
are kept beside this file; a smaller study generates its own.
"""

import ast
import gzip
import hashlib
import json
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from logitcask.pipeline.generate_data.generate import generate_data
from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.precompute.sharding import shuffled
from logitcask.pipeline.settings.generate_data import GenerateDataSettings

PARAGRAPHS = 900  # characters of an English example, about 200 tokens
NEW_TOKENS = 160
KEPT = Path(__file__).parent / "answers.jsonl.gz"
FILES = ("train.jsonl", "held-out.jsonl")


class Sizes(NamedTuple):
    """How many examples there are of each kind, held-out ones among them."""

    functions: int
    texts: int
    answers: int
    held_out: int  # of each kind


WHOLE, SMALL = Sizes(1100, 800, 400, 50), Sizes(12, 12, 6, 4)


def english() -> Iterator[str]:
    """Return pieces of Python's language reference and of what its modules and classes say: of Python alone."""
    texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if "site-packages" not in file.parts and "test" not in file.parts:
            texts.append(_docstrings(file.read_text(encoding="utf-8", errors="replace")))
    for text in texts:
        piece = ""
        for paragraph in text.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= PARAGRAPHS:
                yield piece[: 2 * PARAGRAPHS]
                piece = ""


def _docstrings(source: str) -> str:
    try:
        module = ast.parse(source)
    except SyntaxError:  # a few files of the library are templates
        return ""
    explained: list[ast.Module | ast.ClassDef] = [module]
    explained += (part for part in module.body if isinstance(part, ast.ClassDef))
    return "\n\n".join(text for part in explained if (text := ast.get_docstring(part)))


def make(folder: Path, teacher: str, sizes: Sizes) -> None:
    """Write train.jsonl and held-out.jsonl, the three kinds mixed in a fixed random order, unless they exist."""
    if (folder / "train.jsonl").exists():
        return
    kinds = [_functions(folder, sizes.functions), _texts(sizes.texts), _answers(folder, teacher, sizes.answers)]
    held_out = [record for records in kinds for record in records[: sizes.held_out]]
    train = [record for records in kinds for record in records[sizes.held_out :]]
    order = np.random.default_rng(0).permutation(len(train))
    _write(folder / "held-out.jsonl", held_out)
    _write(folder / "train.jsonl", [train[place] for place in order])


def digest(folder: Path) -> str:
    """Return what identifies the data: runs on other data do not belong in one table."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in FILES)).hexdigest()


def shorter(folder: Path, share: float) -> Path:
    """Return a file of the first examples of train.jsonl, which is in random order; make it if it does not exist."""
    records = _read(folder / "train.jsonl")
    target = folder / f"train-{share:g}.jsonl"
    _write(target, records[: round(share * len(records))])
    return target


def in_cache_order(data: Path) -> Path:
    """Write a file's examples so that a cache, which shuffles them, has them in the order of the file; return it."""
    records = _read(data)
    placed = list(records)
    for place, record in zip(shuffled(len(records), 0), records, strict=True):
        placed[place] = record
    target = data.with_name(f"{data.stem}-shuffled.jsonl")
    _write(target, placed)
    return target


def _functions(folder: Path, count: int) -> list[dict[str, Any]]:
    file = folder / "functions/train.jsonl"
    if not file.exists():
        from_source(None, file.parent, count, seed=0)
    return _read(file)


def _texts(count: int) -> list[dict[str, Any]]:
    pieces = list(dict.fromkeys(english()))
    chosen = np.random.default_rng(0).permutation(len(pieces))[:count]
    return [{"text": pieces[place]} for place in chosen]


def _answers(folder: Path, teacher: str, count: int) -> list[dict[str, Any]]:
    """Return answers to so many prompts; one that was cut at its limit is text, which need not end."""
    how: dict[str, Any] = {
        "provider": "local",
        "model": teacher,
        "prompts": "code",
        "output_dir": folder / "answers",
        "num_examples": count,
        "max_new_tokens": NEW_TOKENS,
        "batch_size": 32,
        "temperature": 1.0,
        "validation_fraction": 0.0,
        "device": "cpu",
    }
    if count == WHOLE.answers:
        written = gzip.decompress(KEPT.read_bytes()).decode()
    else:
        generate_data(GenerateDataSettings.model_validate(how))
        written = (folder / "answers/answers.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    return [
        {"text": f"{row['prompt']}\n\n{row['response']}"}
        if row.get("finish") == "length"
        else {name: row[name] for name in ("prompt", "response")}
        for row in rows
    ]


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    """Write a file, unless it is the same already: another process may read it."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    if file.exists() and file.read_text() == text:
        return
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)
