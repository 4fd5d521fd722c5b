"""Options of ``logitcask cache import``."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitcask.pipeline.settings.base import ARGUMENT, CachePlace, FilePath, Place, Settings
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
