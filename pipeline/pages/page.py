"""How a page becomes one file: its style and script go into it, and its policy allows nothing else."""

import base64
import hashlib
import html
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from logitcask.cache.errors import LogitcaskError

KINDS = {"style": "css", "script": "js"}


def require_new(file: Path, flag: str, *, overwrite: bool) -> None:
    """Raise LogitcaskError if a page cannot be written to a file, or would replace it."""
    if file.exists() and not overwrite:
        raise LogitcaskError(f"{flag} {file}: exists: name another file, or give --overwrite")
    if not file.parent.is_dir():
        raise LogitcaskError(f"{flag} {file}: there is no folder {file.parent}: create it first")


def fill(name: str, slots: Mapping[str, str]) -> str:
    """Return a page whose body is NAME.html with its slots, such as ``%%DATA%%``, filled; slots hold markup.

    NAME.css and NAME.js go into it, too. The page's policy allows its own style and script, by their digests, images
    that stand in it, and no connection: a text that became markup by a mistake could neither run nor load anything.
    """
    folder = files("logitcask.pipeline.pages")
    parts = {
        kind: (folder / f"{name}.{suffix}").read_text(encoding="utf-8")
        for kind, suffix in KINDS.items()
        if (folder / f"{name}.{suffix}").is_file()
    }
    rules = ["default-src 'none'", "base-uri 'none'", "form-action 'none'", "img-src data:"]
    rules += [f"{kind}-src 'sha256-{_digest(text)}'" for kind, text in parts.items()]
    filled = {**slots, **{kind.upper(): text for kind, text in parts.items()}}
    filled["POLICY"] = html.escape("; ".join(rules), quote=True)
    filled["BODY"] = _fill((folder / f"{name}.html").read_text(encoding="utf-8"), filled)
    return _fill((folder / "page.html").read_text(encoding="utf-8"), filled)


def _fill(template: str, slots: Mapping[str, str]) -> str:
    pieces = template.split("%%")  # text, slot, text, slot, text …
    return "".join(slots[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
