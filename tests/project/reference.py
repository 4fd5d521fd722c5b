"""The manual's generated pages: the command line, the settings and the public names of Python.

``python -m tests.project.reference`` writes them into docs/reference; tests/project/test_manual.py compares them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from logitcask.pipeline.cli import app
from logitcask.pipeline.settings.base import ARGUMENT, Settings
from logitcask.pipeline.settings.cache import BrowseSettings, ImportSettings
from logitcask.pipeline.settings.data import SplitSettings
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.settings.generate import GenerateSettings
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.settings.plan import PlanSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "docs" / "reference"
SURFACE = ROOT / "tests" / "library" / "surface.json"
WIDTH = 100
MADE = "This page is made from the program (`python -m tests.project.reference`)."
HUGE = 2**31  # such a limit is not worth a word
MODELS: dict[str, type[Settings]] = {
    "generate-data": GenerateDataSettings,
    "split": SplitSettings,
    "plan": PlanSettings,
    "precompute-logits": PrecomputeSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "generate": GenerateSettings,
    "cache import": ImportSettings,
    "cache browse": BrowseSettings,
}
LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the name and the command of everything that can be run, such as ``cache info``."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))
    if not getattr(command, "commands", None):
        yield " ".join(words), command


def cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    plain = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
    return re.sub(r"(?<![\w`-])--[a-z][a-z0-9-]*", r"`\g<0>`", plain)


def command_line() -> str:
    """Return the page of the commands: what each does, its arguments and options, an example."""
    lines = [
        "# The command line",
        "",
        f"{MADE} `logitcask COMMAND --help` prints the same. "
        "[In a shell and in scripts](shell.md) has exit codes, output and option files.",
    ]
    for name, command in commands(typer.main.get_command(app)):
        lines += ["", f"## logitcask {name}", "", " ".join(str(command.help).split())]
        lines += ["", "```sh", str(command.epilog).removeprefix("Example: "), "```", ""]
        lines += ["| option | value | meaning |", "|---|---|---|"]
        title = ""
        for parameter in command.params:
            group = getattr(parameter, "rich_help_panel", None) or title
            if group != title:
                title = group
                lines.append(f"| **{title}** | | |")
            names = [*parameter.opts, *parameter.secondary_opts]
            argument = parameter.param_type_name == "argument"
            shown = ", ".join(f"`{word.upper() if argument else word}`" for word in names)
            switch = getattr(parameter, "is_flag", False) or argument
            value = "" if switch else f"`{parameter.metavar or 'TEXT'}`"
            lines.append(f"| {shown} | {value} | {cell(str(parameter.help))} |")
    return "\n".join(lines) + "\n"


def kinds(schema: dict[str, Any], names: dict[str, Any]) -> tuple[str, str]:
    """Return the type of a setting in a YAML file, and its limits."""
    if "$ref" in schema:
        return kinds(names[schema["$ref"].rsplit("/", 1)[1]], names)
    if "anyOf" in schema:
        parts = [kinds(part, names) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(part[0] for part in parts)), "; ".join(part[1] for part in parts if part[1])
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(f"`{choice}`" for choice in schema.get("enum", [schema.get("const")])), ""
    limits = ", ".join(f"{words} {schema[key]:,}" for key, words in LIMITS.items() if schema.get(key, HUGE) < HUGE)
    kind = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    if schema.get("type") == "array":
        return "list", ""
    if schema.get("type") == "object":
        return "mapping", ""
    return kind.get(schema.get("type", ""), "text"), limits


def settings() -> str:
    """Return the page of the settings: the keys of an option file for each command, with types, limits and defaults."""
    lines = [
        "# Settings",
        "",
        f"{MADE} A key of a `--config` file is an option's name with underscores: `--batch-size` is `batch_size`. "
        "What each means is on the page of [the command line](cli.md).",
    ]
    for name, model in MODELS.items():
        schema = model.model_json_schema()
        lines += ["", f"## Of logitcask {name}", "", "| key | type | limits | default |", "|---|---|---|---|"]
        for key, field in model.model_fields.items():
            if ARGUMENT in field.metadata:
                continue
            kind, limits = kinds(schema["properties"][key], schema.get("$defs", {}))
            default = "required" if field.is_required() else shown_default(field.default)
            lines.append(f"| `{key}` | {cell(kind)} | {limits} | {default} |")
    return "\n".join(lines) + "\n"


def shown_default(value: Any) -> str:
    """Return a default as it is written in a YAML file; nothing for none."""
    if value is None:
        return ""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return f"`{plain if isinstance(plain, str) else json.dumps(plain)}`"


def folded(name: str, signature: str) -> str:
    """Return a call's signature, a parameter per line if it is long."""
    if len(name) + len(signature) <= WIDTH:
        return name + signature
    parts, depth, start = [], 0, 1
    for at, letter in enumerate(signature):
        depth += (letter in "([{") - (letter in ")]}")
        if (depth == 1 and letter == ",") or depth == 0:
            parts.append(signature[start:at].strip())
            start = at + 1
            if depth == 0:
                break
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts if part) + f"){signature[start:]}"


def public_names() -> str:
    """Return the page of the public names of Python: signatures and docstrings."""
    lines = [
        "# The Python interface",
        "",
        f"{MADE} `import logitcask as lc`: these names, their signatures and their docstrings are frozen "
        "by a test. [Your own loop or trainer](../guides/your-own-trainer.md) and "
        "[your own forward pass](../guides/your-own-forward-pass.md) show them in use.",
    ]
    for name, (signature, docstring) in json.loads(SURFACE.read_text()).items():
        lines += ["", f"{'###' if '.' in name else '##'} {name}"]
        if signature:
            lines += [
                "",
                "```text",
                folded(f"lc.{name}", signature.replace("(self, ", "(").replace("(self)", "()")),
                "```",
            ]
        if docstring:
            lines += ["", docstring.replace("``", "`")]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Return the text of every generated page."""
    return {
        PLACE / "cli.md": command_line(),
        PLACE / "config.md": settings(),
        PLACE / "python.md": public_names(),
    }


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text)
