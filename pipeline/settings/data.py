"""Options of every command that reads examples."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from logitcask.pipeline.settings.base import Settings


def _parse_columns(value: Any) -> Any:
    """Return ``response=answer,prompt=question`` as a mapping of our names to the user's; a mapping is kept."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(ours.strip() and equals and theirs.strip() for ours, equals, theirs in pairs):
        raise ValueError("must be NAME=COLUMN, commas between, such as response=answer,prompt=question")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _parse_share(value: Any) -> Any:
    """Return ``1%`` as 0.01; a number is kept."""
    return (
        float(value.strip().removesuffix("%")) / 100
        if isinstance(value, str) and value.strip().endswith("%")
        else value
    )


Columns = Annotated[Mapping[str, str], BeforeValidator(_parse_columns)]
Share = Annotated[float, BeforeValidator(_parse_share), Field(ge=0, le=1)]


class DataSettings(Settings):
    """How records become examples."""

    chat_turns: Literal["auto", "all", "last", "each"] = Field(
        "auto",
        description="chats of several turns: auto: one example if the template keeps earlier turns, else one per turn; "
        "all: one or an error; each: one per turn; last: the last answer alone",
    )
    columns: Columns = Field({}, description="your names of columns, such as response=answer,prompt=question")
    on_bad_record: Literal["fail", "skip"] = Field(
        "fail", description="fail reports every bad record before the teacher is loaded; skip leaves them out"
    )
    max_bad: Share = Field(0.01, description="with --on-bad-record skip: largest share of bad records, such as 1%")

    @property
    def renamed(self) -> dict[str, str]:
        """Our names of the user's columns."""
        return {theirs: ours for ours, theirs in self.columns.items()}

    @property
    def bad_share(self) -> float:
        """The largest share of records that may be skipped."""
        return self.max_bad if self.on_bad_record == "skip" else 0.0
