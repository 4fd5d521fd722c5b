"""Settings of ``logitcask cache browse``."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from logitcask.pipeline.settings.base import ARGUMENT, FilePath, Place, Seed, Settings

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
