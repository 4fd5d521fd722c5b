"""Options of ``logitcask split``."""

from pathlib import Path

from pydantic import Field

from logitcask.pipeline.settings.base import Seed, Sources, Whole
from logitcask.pipeline.settings.data import SourceSettings


class SplitSettings(SourceSettings):
    """Options of ``logitcask split``."""

    data: Sources = Field(description="data file, folder, pattern or hub data set; repeatable, read in order")
    output_dir: Path = Field(description="folder for train.jsonl and test.jsonl")
    test: Whole = Field(description="examples in test.jsonl; a few more if duplicates must stay together")
    seed: Seed = Field(0, description="which examples are chosen")
