"""Options of every command that reads examples."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from logitcask.pipeline.settings.base import FilePath, Seed, Settings, Sources, Whole, require_plain_text


def _parse_columns(value: Any) -> Any:
    """Return ``response=answer,prompt=question`` as a mapping of our names to the user's; a mapping is kept."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(ours.strip() and equals and theirs.strip() for ours, equals, theirs in pairs):
        raise ValueError("must be NAME=COLUMN, commas between, such as response=answer,prompt=question")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _parse_where(value: Any) -> Any:
    """Return ``language=python,language=go`` as the allowed values of each column; a mapping may have single ones."""
    if isinstance(value, Mapping):
        return {column: [allowed] if isinstance(allowed, str) else allowed for column, allowed in value.items()}
    if not isinstance(value, str):
        return value
    columns: dict[str, list[str]] = {}
    for part in value.split(","):
        column, equals, allowed = part.partition("=")
        if not (column.strip() and equals and allowed.strip()):
            raise ValueError("must be COLUMN=VALUE, commas between, such as language=python,language=go")
        columns.setdefault(column.strip(), []).append(allowed.strip())
    return columns


def _parse_share(value: Any) -> Any:
    """Return ``1%`` as 0.01; a number is kept."""
    return (
        float(value.strip().removesuffix("%")) / 100
        if isinstance(value, str) and value.strip().endswith("%")
        else value
    )


def _parse_kwargs(value: Any) -> Any:
    """Return a JSON object as a mapping; a mapping, as from a config file, must be one that JSON can write."""
    try:
        parsed = json.loads(value if isinstance(value, str) else json.dumps(value, allow_nan=False))
        json.dumps(parsed, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError("""must be a JSON object, such as '{"enable_thinking": false}'""")
    require_plain_text("--chat-template-kwargs", parsed)
    return parsed


Columns = Annotated[Mapping[str, str], BeforeValidator(_parse_columns)]
Where = Annotated[Mapping[str, tuple[str, ...]], BeforeValidator(_parse_where)]
TemplateKwargs = Annotated[Mapping[str, Any], BeforeValidator(_parse_kwargs)]
Share = Annotated[float, BeforeValidator(_parse_share), Field(ge=0, le=1)]


class SourceSettings(Settings):
    """Which records are taken."""

    group = "Data"

    data_config: str | None = Field(None, description="configuration of a hub data set")
    data_split: str = Field("train", description="split of a hub data set, or of one saved by datasets")
    where: Where = Field({}, description="take only records whose columns have these values, such as language=python")

    @property
    def taken(self) -> dict[str, Any]:
        """These options by the names that ``Reading`` has for them."""
        return {"config": self.data_config, "split": self.data_split, "where": self.where}


class RecordSettings(SourceSettings):
    """What counts as a good record."""

    columns: Columns = Field({}, description="your names of columns, such as response=answer,prompt=question")
    on_bad_record: Literal["fail", "skip"] = Field(
        "fail", description="fail reports every bad record, before a teacher is loaded; skip leaves them out"
    )
    max_bad: Share = Field(0.01, description="with --on-bad-record skip: largest share of bad records, such as 1%")

    @property
    def renamed(self) -> dict[str, str]:
        """Our names of the user's columns."""
        return {theirs: ours for ours, theirs in self.columns.items()}

    @property
    def taken(self) -> dict[str, Any]:
        """These options by the names that ``Reading`` has for them."""
        return {**super().taken, "renamed": self.renamed}

    @property
    def bad_share(self) -> float:
        """The largest share of records that may be skipped."""
        return self.max_bad if self.on_bad_record == "skip" else 0.0


class DataSettings(RecordSettings):
    """How records become examples."""

    chat_turns: Literal["auto", "all", "last", "each"] = Field(
        "auto",
        description="chats of several turns: auto: one example if the template keeps earlier turns, else one per turn; "
        "all: one or an error; each: one per turn; last: the last answer alone",
    )
    chat_template: FilePath | None = Field(
        None, description="Jinja file in place of the tokenizer's chat template; stored with the cache and the student"
    )
    chat_template_kwargs: TemplateKwargs = Field(
        {}, description="""values of the chat template's variables as JSON, such as '{"enable_thinking": false}'"""
    )


class SplitSettings(RecordSettings):
    """Options of ``logitcask split``."""

    group = "Options"

    data: Sources = Field(description="data file, folder, pattern or hub data set; repeatable, read in order")
    output_dir: Path = Field(description="folder for train.jsonl and test.jsonl")
    test: Whole = Field(description="examples in test.jsonl; a few more if duplicates must stay together")
    seed: Seed = Field(0, description="which examples are chosen")
