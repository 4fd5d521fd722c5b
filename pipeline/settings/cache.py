"""Settings of ``logitcask cache import`` and ``cache browse``."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from logitcask.pipeline.settings.base import ARGUMENT, CachePlace, FilePath, Place, Seed, Settings
from logitcask.pipeline.settings.data import Columns, Share


class ImportSettings(Settings):
    """Options of ``logitcask cache import``; ``source`` is its argument."""

    source: Annotated[Place, ARGUMENT] = Field(description="file, folder, pattern or hub id of a data set with labels")
    format: Literal["distillkit", "axolotl", "topk", "openai"] = Field(
        description="which tool's layout the labels have"
    )
    tokenizer: Place = Field(
        description="model whose tokenizer the labels were made with: hub id, folder or .gguf file"
    )
    output: CachePlace = Field(description="folder of the cache, or its s3://, gs:// or ssh:// URL")
    columns: Columns = Field({}, description="your names of columns, such as token_ids=top_ids,logprobs=top_logits")
    compression_config: FilePath | None = Field(
        None, description="YAML with DistillKit's compression settings; default: compression_config.yaml in SOURCE"
    )
    head_size: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None,
        description="entries kept per position; positions with fewer are no targets; default: as many as each has",
    )
    on_bad_record: Literal["fail", "skip"] = Field("fail", description="fail reports bad records; skip leaves them out")
    max_bad: Share = Field(0.01, description="with --on-bad-record skip: largest share of bad records, such as 1%")
    overwrite: bool = Field(False, description="replace an existing cache at --output")

    @property
    def renamed(self) -> dict[str, str]:
        """Our names of the user's columns."""
        return {theirs: ours for ours, theirs in self.columns.items()}

    @property
    def bad_share(self) -> float:
        """The largest share of records that may be skipped."""
        return self.max_bad if self.on_bad_record == "skip" else 0.0

    @model_validator(mode="after")
    def _options_apply_to_the_format(self) -> Self:
        if self.compression_config is not None and self.format != "distillkit":
            raise ValueError(f"--compression-config applies to --format distillkit, got {self.format}: leave it out")
        return self


PART = re.compile(r"(?P<kind>worst|best|random):(?P<count>[1-9]\d{0,5})|(?P<first>\d+)(:(?P<stop>\d+))?")


def _parse_parts(value: Any) -> Any:
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    for part in parts:
        if not isinstance(part, str) or not PART.fullmatch(part):
            raise ValueError(
                "must be parts such as worst:5,best:5,random:5, indices such as 17, or ranges such as 0:20"
            )
    return tuple(parts)


Parts = Annotated[tuple[str, ...], BeforeValidator(_parse_parts), Field(min_length=1)]


class BrowseSettings(Settings):
    """Options of ``logitcask cache browse``; ``cache`` is its argument."""

    cache: Annotated[Place, ARGUMENT] = Field(description="folder, .zip file or URL of the cache")
    html: FilePath = Field(Path("labels.html"), description="the page to write")
    examples: Parts = Field(
        ("worst:5", "best:5", "random:5"),
        description="which: worst or best by the teacher's surprise at the text, random, indices and ranges, as in "
        "worst:5,17,0:20",
    )
    student: Place | None = Field(
        None, description="folder or hub id of a model, whose probabilities are shown beside the teacher's"
    )
    seed: Seed = Field(0, description="seed of the random examples")
    device: str = Field("auto", description="device of --student: auto, cpu, cuda, cuda:N, mps")
    overwrite: bool = Field(False, description="replace an existing file at --html")
