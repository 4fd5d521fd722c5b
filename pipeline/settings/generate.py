"""Settings of ``logitcask generate``."""

from typing import Annotated

from pydantic import Field

from logitcask.pipeline.settings.base import Place, Seed, Settings, Whole


class GenerateSettings(Settings):
    """Options of ``logitcask generate``."""

    model: Place = Field(description="folder or hub id of a causal language model, or the folder of a run")
    prompt: str = Field(description="the text to answer")
    max_new_tokens: Whole = Field(128, description="most tokens to generate")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.0, description="0: the most likely token")
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    seed: Seed = Field(0, description="seed of sampling")
