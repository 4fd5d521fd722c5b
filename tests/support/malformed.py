"""Commands run in this process on malformed input: what each did that it must not."""

import contextlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from logitcask.pipeline.cli import main
from tests.support import runs
from tests.support.nightly import times
from tests.support.runs import STUDENT, write_config
from tests.support.tiny import make_cache, make_teacher

PATHS = ["", "nowhere/x", "a\0b", "x" * 5000, "\udcff", "~nobody-here/x", "/dev/null/x"]
Case = tuple[str, list[object]]  # what is malformed, the words of the command
JUNK: list[Any] = [None, "x", -1, 0, 1.5, [], {}, [[]], "\ud83d", "9" * 5000, True]
MOST_LINES = 3
EVERY = times(3, 1)  # which of the cases are tried: each third in every check


def make_stock(folder: Path) -> Path:
    """Make teachers (one with a chat template), data, a cache, a student's config and a finished run in a folder."""
    make_cache(folder)
    make_teacher(folder / "chat", chat=True)
    write_config(folder / "student.json", STUDENT)
    runs.train(folder / "cache", folder / "run", student_config=folder / "student.json", max_steps=2, save_steps=1)
    return folder


def attempt(words: Iterable[object]) -> tuple[object, str]:
    """Run a command in this process and return its exit code, or what it raised, and its stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["logitcask", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stopped:
        return stopped.code or 0, err.getvalue()
    except BaseException as error:  # a traceback
        return f"{type(error).__name__}: {error}"[:300], err.getvalue()
    finally:
        sys.argv = before
    return 0, err.getvalue()


def wrong(cases: Iterable[Case], allowed: tuple[int, ...] = (2,), fewest: int = 0) -> list[str]:
    """Return one line for each case that ends in a traceback, another exit code or too many lines."""
    lines, count = [], 0
    for what, words in cases:
        count += 1
        if count % EVERY:
            continue
        code, err = attempt(words)
        printed = [line for line in err[err.find("error: ") :].splitlines() if line.strip()]  # after the notices
        # text is escaped so that a report of half a character does not fail itself
        if code not in allowed or len(printed) > MOST_LINES or "Traceback" in err:
            lines.append(ascii(f"{what}: {code}, {len(printed)} lines: {err[:300]}"))
    assert count >= fewest, f"only {count} cases"
    return lines


def usual(stock: Path, new: Path) -> dict[str, list[object]]:
    """Return a command line of each command that takes settings, which would run."""
    cache, final, data = stock / "cache", stock / "run" / "final", stock / "train.jsonl"
    return {
        "generate-data": ["generate-data", "--output-dir", new / "data"],
        "precompute-logits": ["precompute-logits", "--teacher-model", stock / "teacher", "--train-data", data,
                              "--output", new / "cache", "--max-seq-length", 64],
        "train": ["train", "--cache", cache, "--student-config", stock / "student.json", "--output-dir", new / "run"],
        "plan": ["plan", "--train-data", data, "--teacher-model", stock / "teacher"],
        "evaluate": ["evaluate", "--model", final, "--cache", cache],
        "generate": ["generate", "--model", final, "--prompt", "Hi"],
    }  # fmt: skip


def replaced(words: list[object], flag: str, value: object) -> list[object]:
    """Return the words with an option's value replaced, or the option added."""
    at = words.index(flag) if flag in words else None
    return [*words, flag, value] if at is None else [*words[: at + 1], value, *words[at + 2 :]]
