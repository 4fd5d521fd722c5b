"""Settings of ``logitcask generate-data``, and which options each provider takes."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from logitcask.pipeline.settings.base import FilePath, Place, Seed, Settings, Whole, flag_of, is_plain_url

Provider = Literal["source", "openai", "anthropic", "openai-compatible", "local"]
PRICE_RULE = (
    "must be MODEL=INPUT/OUTPUT, in dollars per million tokens, with commas between models, such as some-model=0.25/2"
)


def _parse_prices(value: Any) -> Any:
    """Parse ``a=1/2,b=3/4`` into a mapping; a mapping, from a config file, is returned as it is."""
    if not isinstance(value, str):
        if isinstance(value, dict) and not all(isinstance(p, list | tuple) and len(p) == 2 for p in value.values()):
            raise ValueError("must give [INPUT, OUTPUT] for each model, in dollars per million tokens")
        return value
    prices = {}
    for item in value.split(","):
        model, _, price = item.rpartition("=")
        if not model.strip() or price.count("/") != 1:
            raise ValueError(PRICE_RULE)
        if model.strip() in prices:
            raise ValueError(f"the price of {model.strip()} is given twice: give it once")
        prices[model.strip()] = tuple(price.split("/"))
    return prices


Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Prices = Annotated[dict[str, tuple[Dollars, Dollars]], BeforeValidator(_parse_prices)]

COMMON = {"provider", "output_dir", "num_examples", "seed"}
MODELS = {"model", "prompts", "max_new_tokens", "near_duplicate", "validation_fraction"}
REMOTE = {"concurrency", "request_timeout", "max_retries", "prices", "max_cost"}
TAKES: dict[Provider, set[str]] = {
    "source": COMMON | {"source_dir"},
    "openai": COMMON | MODELS | REMOTE | {"temperature"},
    "anthropic": COMMON | MODELS | REMOTE,  # its API has refused a temperature since version 2026-10-21
    "openai-compatible": COMMON | MODELS | REMOTE | {"temperature", "base_url", "logprobs", "tokenizer"},
    "local": COMMON | MODELS | {"temperature", "batch_size", "dtype", "device"},
}
NEEDS = ("model", "prompts", "base_url")


class GenerateDataSettings(Settings):
    """Options of ``logitcask generate-data``."""

    provider: Provider = Field(
        "source", description="where examples come from; source: Python source code; local: a model on this machine"
    )
    output_dir: FilePath = Field(
        description="folder for train.jsonl; for models also validation.jsonl and manifest.json"
    )
    num_examples: Whole = Field(1000, description="most examples to write; with a model, prompts to send")
    source_dir: FilePath | None = Field(None, description="folder of Python files; default: the standard library")
    model: Place | None = Field(
        None, description="the provider's name for the model; local: hub id, folder or .gguf file"
    )
    base_url: str | None = Field(
        None, description="URL of an openai-compatible server, such as http://localhost:8000/v1"
    )
    prompts: FilePath | None = Field(
        None, description="YAML file of categories, languages and topics, or the name of a shipped one: code"
    )
    max_new_tokens: Whole = Field(1024, description="most tokens per response; longer ones are dropped")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="sampling temperature; 0: the most likely token; default: the model's own"
    )
    logprobs: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None,
        description="keep the K most probable tokens at each token of the answers, from a server of vLLM's, and make "
        "train-cache and validation-cache of them; its own cap of 20 allows 19",
    )
    tokenizer: Place | None = Field(
        None, description="with --logprobs: hub id or folder of the model's tokenizer; default: --model"
    )
    concurrency: Whole = Field(8, description="concurrent requests")
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        120.0, description="seconds to wait for a response"
    )
    max_retries: Annotated[int, Field(ge=0, le=100)] = Field(
        5, description="retries per request after 408, 409, 429, 5xx, a timeout or a broken connection"
    )
    prices: Prices = Field(
        {}, description="MODEL=INPUT/OUTPUT[,...] in dollars per million tokens; a mapping in a config"
    )
    max_cost: Dollars | None = Field(
        None, description="most dollars to spend on the output folder in all; needs --prices"
    )
    batch_size: Whole = Field(8, description="prompts per batch of a local model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of a local model's weights"
    )
    device: str = Field("auto", description="device of a local model: auto, cpu, cuda, cuda:1, mps")
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8,
        description="drop responses whose 5-word runs reach this Jaccard similarity to an earlier one's; 1: exact",
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="share of examples written to validation.jsonl"
    )
    seed: Seed = Field(0, description="seed of the order, the split and a local model's sampling")

    @model_validator(mode="after")
    def _options_fit_the_provider(self) -> Self:
        takes = TAKES[self.provider]
        extra = [flag_of(name) for name in sorted(self.model_fields_set - takes)]
        if extra:
            raise ValueError(f"--provider {self.provider} does not take {', '.join(extra)}: leave it out")
        for name in NEEDS:
            if name in takes and getattr(self, name) is None:
                raise ValueError(f"--provider {self.provider} needs {flag_of(name)}")
        if self.tokenizer is not None and self.logprobs is None:
            raise ValueError("--tokenizer requires --logprobs: add it, or leave --tokenizer out")
        if self.base_url is not None and not is_plain_url(self.base_url):  # not printed: it may hold a key
            raise ValueError(
                "--base-url must be http:// or https://, a host and a path, without user name, password or query: "
                "the key comes from the environment variable OPENAI_COMPATIBLE_API_KEY"
            )
        if self.max_cost is not None and self.model not in self.prices:
            raise ValueError(
                f"--max-cost needs the price of {self.model}: add --prices {self.model}=INPUT/OUTPUT, "
                "in dollars per million tokens"
            )
        return self
