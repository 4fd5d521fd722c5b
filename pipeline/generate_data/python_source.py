"""Training examples from Python source code: a function's signature and docstring as prompt, its code as response."""

import ast
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from logitcask.cache.errors import LogitcaskError

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}
LONGEST_DOCSTRING = 1200  # characters; longer ones are manuals, not instructions
LONGEST_CODE = 4000


@dataclass(frozen=True)
class Written:
    """Where the examples were written, and how many."""

    path: Path
    examples: int


def from_source(source_dir: Path | None, output_dir: Path, num_examples: int, seed: int) -> Written:
    """Write examples from a tree of Python files, the standard library by default, in an order given by the seed alone.

    Raises LogitcaskError if the tree is missing or has no documented function, or if the output exists.
    """
    root = source_dir or Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise LogitcaskError(f"--source-dir {root}: no such folder")
    target = output_dir / "train.jsonl"
    if target.exists():
        raise LogitcaskError(f"{target}: already exists: choose another --output-dir or remove it")
    functions = list(dict.fromkeys(_documented_functions(root)))
    if not functions:
        raise LogitcaskError(f"--source-dir {root}: contains no documented Python function: choose another folder")
    random.Random(seed).shuffle(functions)
    chosen = functions[:num_examples]
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    with partial.open("w") as out:
        for prompt, response in chosen:
            record = {
                "prompt": prompt,
                "response": response,
                "category": "function_implementation",
                "language": "python",
            }
            out.write(json.dumps(record) + "\n")
    partial.replace(target)
    return Written(target, len(chosen))


def _documented_functions(root: Path) -> Iterator[tuple[str, str]]:
    """Yield prompt and response of each function with a docstring and a body, files in order of their names."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # every large tree has deliberately broken files
        lines = source.split("\n")  # as the parser counts lines: not at form feeds
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                pair = _example(node, lines)
                if pair:
                    yield pair


def _example(node: ast.FunctionDef, source: list[str]) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node)
    code = textwrap.dedent("\n".join(source[node.lineno - 1 : node.end_lineno])).rstrip()
    signature = "\n".join(code.split("\n")[: node.body[0].lineno - node.lineno])
    if not docstring or not signature or len(docstring) > LONGEST_DOCSTRING or len(code) > LONGEST_CODE:
        return None
    quoted = textwrap.indent(f'"""{docstring}"""', "    ")
    return f"Write a Python function that does what its docstring says.\n\n{signature}\n{quoted}", code + "\n"
