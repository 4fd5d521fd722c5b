"""Prompts: every template of every category with every language and topic, in an order given by the seed alone."""

import hashlib
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.pipeline.settings.base import config_file, read_config

FIELDS = {"language", "topic"}
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]


class Templates(BaseModel):
    """A prompt file: templates by category, and what to fill into ``{language}`` and ``{topic}``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    languages: Texts
    topics: Texts
    categories: Annotated[dict[Text, Texts], Field(min_length=1)]


@dataclass(frozen=True)
class Prompt:
    """A prompt to send. ``id`` is a digest of the text: the same text is the same prompt in every run."""

    id: str
    text: str
    category: str
    language: str


def read_templates(path: Path) -> Templates:
    """Read a prompt file. Raises LogitcaskError naming the key, the rule and the value."""
    try:
        templates = Templates.model_validate(read_config(config_file("data", path)))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].replace('Input should be', 'must be')}, got {shown(e['input'])}"
            for e in error.errors()
        ]
        raise LogitcaskError(f"{path}: {'; '.join(wrong)}") from error
    for category, texts in templates.categories.items():
        for text in texts:
            _require_known_fields(f"{path}: categories.{category}", text)
    return templates


def make_prompts(templates: Templates, count: int, seed: int) -> list[Prompt]:
    """Return the first ``count`` prompts in the seed's order; categories alternate, so that any prefix is balanced.

    A smaller count gives a prefix of a greater one. Raises LogitcaskError if there are not enough prompts.
    """
    ranked: dict[str, tuple[tuple[int, int], Prompt]] = {}
    for place, (category, texts) in enumerate(templates.categories.items()):
        combinations = [(t, lang, topic) for t in texts for lang in templates.languages for topic in templates.topics]
        random.Random(f"{seed} {category}").shuffle(combinations)
        filled = {prompt.id: prompt for prompt in (_fill(t, category, lang, topic) for t, lang, topic in combinations)}
        fresh = [prompt for prompt_id, prompt in filled.items() if prompt_id not in ranked]
        ranked |= {prompt.id: ((rank, place), prompt) for rank, prompt in enumerate(fresh)}
    if count > len(ranked):
        raise LogitcaskError(
            f"--num-examples {count}: the prompt file gives {len(ranked)} different prompts: "
            "ask for fewer, or add topics, languages or templates"
        )
    return [prompt for _, prompt in sorted(ranked.values(), key=lambda entry: entry[0])[:count]]


def digest(text: str) -> str:
    """Return the first sixteen hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fill(template: str, category: str, language: str, topic: str) -> Prompt:
    text = template.format(language=language, topic=topic).strip()
    return Prompt(digest(text), text, category, language)


def _require_known_fields(where: str, template: str) -> None:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise LogitcaskError(f"{where}: {error} in {shown(template)}: write {{{{ and }}}} for braces") from error
    for _, name, form, conversion in pieces:
        if name is not None and (name not in FIELDS or form or conversion):
            raise LogitcaskError(
                f"{where}: {shown(template)} names {{{shown(name)}}}: only {{language}} and {{topic}} are filled in; "
                "write {{ and }} for braces"
            )
