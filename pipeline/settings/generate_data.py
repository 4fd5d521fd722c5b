"""Settings of ``logitcask generate-data``: which provider takes which knob is said here once."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from logitcask.pipeline.settings.base import Seed, Settings, Whole

Provider = Literal["source", "openai", "anthropic", "openai-compatible", "local"]
PRICE_RULE = "must be MODEL=INPUT/OUTPUT, in dollars a million tokens, commas between models, such as some-model=0.25/2"


def _parse_prices(value: Any) -> Any:
    """``a=1/2,b=3/4`` as a mapping; a mapping, as a config file gives it, stays."""
    if not isinstance(value, str):
        if isinstance(value, dict) and not all(isinstance(p, list | tuple) and len(p) == 2 for p in value.values()):
            raise ValueError("must give [INPUT, OUTPUT] for each model, in dollars a million tokens")
        return value
    found = {}
    for item in value.split(","):
        model, _, price = item.rpartition("=")
        if not model.strip() or price.count("/") != 1:
            raise ValueError(PRICE_RULE)
        found[model.strip()] = tuple(price.split("/"))
    return found


def _is_plain_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        found = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return found and "@" not in parts.netloc and not parts.query and not parts.fragment


Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Prices = Annotated[dict[str, tuple[Dollars, Dollars]], BeforeValidator(_parse_prices)]

EVERY = {"provider", "output_dir", "num_examples", "seed"}
ASKED = {"model", "prompts", "max_new_tokens", "near_duplicate", "validation_fraction"}
REMOTE = {"concurrency", "request_timeout", "max_retries", "prices", "max_cost"}
TAKES: dict[Provider, set[str]] = {
    "source": EVERY | {"source_dir"},
    "openai": EVERY | ASKED | REMOTE | {"temperature"},
    "anthropic": EVERY | ASKED | REMOTE,  # its API refuses a temperature since version 2026-10-21
    "openai-compatible": EVERY | ASKED | REMOTE | {"temperature", "base_url"},
    "local": EVERY | ASKED | {"temperature", "batch_size", "dtype", "device"},
}
NEEDS = ("model", "prompts", "base_url")


class GenerateDataSettings(Settings):
    """Knobs of ``logitcask generate-data``."""

    provider: Provider = Field(
        "source", description="where examples come from; source: Python source code; local: a model on this machine"
    )
    output_dir: Path = Field(description="folder for train.jsonl; for models also validation.jsonl and manifest.json")
    num_examples: Whole = Field(1000, description="examples to write at most; prompts to ask of a model")
    source_dir: Path | None = Field(None, description="tree of Python files; default: the standard library")
    model: str | None = Field(None, description="the provider's name of the model; local: hub id, folder or .gguf file")
    base_url: str | None = Field(
        None, description="URL of an openai-compatible server, such as http://localhost:8000/v1"
    )
    prompts: Path | None = Field(None, description="YAML file of categories, languages and topics, or code")
    max_new_tokens: Whole = Field(1024, description="tokens of a response at most; longer ones are dropped")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="of sampling, 0: the likeliest token; default: the model's own"
    )
    concurrency: Whole = Field(8, description="requests at once")
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        120.0, description="seconds to wait for one response"
    )
    max_retries: Annotated[int, Field(ge=0, le=100)] = Field(
        5, description="times a request is sent again after 408, 409, 429, 5xx, a timeout or a broken connection"
    )
    prices: Prices = Field({}, description="MODEL=INPUT/OUTPUT[,...], dollars a million tokens; a mapping in a config")
    max_cost: Dollars | None = Field(None, description="dollars the output folder may cost in all; needs the price")
    batch_size: Whole = Field(8, description="prompts a local model answers at once")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of a local model's weights")
    device: str = Field("auto", description="of a local model: auto, cpu, cuda, cuda:1, mps")
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="drop responses that share this part of their 5-word runs (Jaccard) with an earlier; 1: exact"
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share for validation.jsonl")
    seed: Seed = Field(0, description="seed of the order, of the split and of a local model's sampling")

    @model_validator(mode="after")
    def _options_fit_the_provider(self) -> Self:
        takes = TAKES[self.provider]
        strange = sorted(self.model_fields_set - takes)
        if strange:
            raise ValueError(f"provider {self.provider} takes no {', '.join(strange)}: leave it out")
        for name in NEEDS:
            if name in takes and getattr(self, name) is None:
                raise ValueError(f"provider {self.provider} needs --{name.replace('_', '-')}")
        if self.base_url is not None and not _is_plain_url(self.base_url):  # the value stays untold: it may hold a key
            raise ValueError(
                "--base-url must be http:// or https://, a host and a path, without user name, password or query: "
                "the key comes from the environment variable OPENAI_COMPATIBLE_API_KEY"
            )
        if self.max_cost is not None and self.model not in self.prices:
            raise ValueError(
                f"max_cost needs the price of {self.model}: add --prices {self.model}=INPUT/OUTPUT, "
                "in dollars a million tokens"
            )
        return self
