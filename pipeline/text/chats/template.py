"""The chat template of the user's choice, and the values of its variables.

Values become defaults that are set at the beginning of the template itself. It is stored with the cache and with the
student, so everybody who renders a prompt for the student renders it as in training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, _get_template_variables

from logitcask.cache.errors import LogitcaskError, shown, shown_reason

ALWAYS_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}  # a default of these has no effect


def set_template(tokenizer: PreTrainedTokenizerBase, file: Path | None, kwargs: Mapping[str, Any]) -> None:
    """Give a tokenizer the template in ``file``, if any, and defaults of its variables.

    Raises LogitcaskError if the file cannot be read or is no template, or the template does not read a variable.
    """
    if file is not None:
        tokenizer.chat_template = _read(file)
    if not kwargs:
        return
    template: Any = tokenizer.chat_template
    if not template:
        raise LogitcaskError(
            "--chat-template-kwargs: the tokenizer has no chat template: add --chat-template, or leave it out"
        )
    named = template if isinstance(template, dict) else {"": template}
    fixed = ALWAYS_GIVEN | set(tokenizer.special_tokens_map)
    read = {name: _variables(text) - fixed for name, text in named.items()}
    known = sorted(set().union(*read.values()))
    unknown = sorted(kwargs.keys() - set(known))
    if unknown:
        raise LogitcaskError(
            f"--chat-template-kwargs: the chat template does not read {shown(unknown[0])}: "
            f"it reads {', '.join(known) or 'none'}"
        )
    changed = {name: _with_defaults(text, _chosen(kwargs, read[name])) for name, text in named.items()}
    tokenizer.chat_template = changed if isinstance(template, dict) else changed[""]


def kwargs_text(kwargs: Mapping[str, Any]) -> str | None:
    """Return the values of a template's variables as a manifest holds them; None if there are none."""
    return json.dumps(dict(kwargs), sort_keys=True, ensure_ascii=True) if kwargs else None


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise LogitcaskError(f"--chat-template {file}: cannot be read: {shown_reason(error)}") from error
    if not text.strip():
        raise LogitcaskError(f"--chat-template {file}: is empty: give a Jinja chat template")
    try:
        _compile_jinja_template(text)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise LogitcaskError(
            f"--chat-template {file}: is no Jinja template: {f'line {line}: ' if line else ''}{shown_reason(error)}"
        ) from error
    return text


def _variables(template: str) -> set[str]:
    """Return the variables that a template reads without setting them first."""
    try:
        known = _compile_jinja_template(template).environment.globals
        return set(_get_template_variables(template)) - set(known)
    except TemplateError as error:
        raise LogitcaskError(f"the tokenizer's chat template is no Jinja template: {shown_reason(error)}") from error


def _chosen(kwargs: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: kwargs[name] for name in sorted(kwargs) if name in names}


def _with_defaults(template: str, values: Mapping[str, Any]) -> str:
    """Return a template that begins with defaults; the line end after the last is no text, by ``trim_blocks``."""
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in values.items()
    )
    return f"{defaults}\n{template}" if defaults else template


def _literal(value: Any) -> str:
    """Return a JSON value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
