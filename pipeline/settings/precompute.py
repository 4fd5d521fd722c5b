"""Settings of ``logitcask precompute-logits``."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from logitcask.pipeline.settings.base import CachePlace, Place, Seed, Sources, Temperature, Whole, flag_of, is_plain_url
from logitcask.pipeline.settings.data import DataSettings


def _parse_temperatures(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Temperatures = Annotated[tuple[Temperature, ...], BeforeValidator(_parse_temperatures), Field(min_length=1)]


def _parse_urls(value: Any) -> Any:
    return tuple(url.strip() for url in value.split(",")) if isinstance(value, str) else value


Urls = Annotated[tuple[str, ...], BeforeValidator(_parse_urls), Field(min_length=1)]
# what only a served teacher takes, and what it does not take
OF_SERVERS = ("base_url", "tokenizer", "concurrency", "request_timeout", "max_retries")
NOT_OF_SERVERS = ("dtype", "device", "ray", "workers", "tensor_parallel_size", "skip_engine_check")
HEAD_OF_SERVERS = {"head_size": 20, "tail_draws": 0, "temperatures": (1.0,), "fidelity_positions": 0}
PRESETS = {"lean": (4, 8), "standard": (8, 24), "rich": (32, 64), "exact": (8, 0)}  # head size, tail draws


class PrecomputeSettings(DataSettings):
    """Options of ``logitcask precompute-logits``."""

    group = "Run"
    groups: ClassVar[Mapping[str, str]] = {
        "Data": "max_seq_length prompt_loss tokenize_workers",
        "Teacher": "teacher_revision engine dtype device tensor_parallel_size skip_engine_check trust_remote_code",
        "Label": "preset head_size tail_draws hidden_bits temperatures fidelity_positions student_tokenizer",
        "With --engine server": "base_url tokenizer concurrency request_timeout max_retries",
        "Dry run": "dry_run show json_",
    }

    teacher_model: Place = Field(description="hub id, local folder or .gguf file of a causal language model")
    teacher_revision: str | None = Field(None, description="branch, tag or commit of a hub teacher")
    train_data: Sources = Field(description=".jsonl or .parquet file, or a dataset's hub id; repeatable, read in order")
    output: CachePlace = Field(description="folder of the cache, or its s3://, gs:// or ssh:// URL")
    preset: Literal["lean", "standard", "rich", "exact"] = Field(
        "standard",
        description="head size + tail draws of a label: lean 4 + 8, standard 8 + 24, rich 32 + 64; exact: head 8 + the "
        "hidden state in few bits, for any temperature and divergence; at T=1 sparse labels of as many bytes are "
        "better for teachers wider than about 1,400",
    )
    hidden_bits: Annotated[int, Field(ge=3, le=8)] = Field(
        4,
        description="with --preset exact: how fine the hidden state is; each bit up to 6 halves the error",
    )
    head_size: Annotated[int, Field(ge=0, le=65536)] = Field(
        8, description="K, the number of most probable tokens that are kept; overrides the preset"
    )
    tail_draws: Annotated[int, Field(ge=0, le=65535)] = Field(
        24, description="M, the number of tokens drawn from the rest; overrides the preset"
    )
    temperatures: Temperatures = Field((1.0, 1.5, 2.0), description="temperatures that students can train at")
    max_seq_length: Annotated[int, Field(ge=2, le=2**31)] = Field(
        1024,
        description="tokens per example; longer examples are truncated; fewer by default if the teacher takes fewer",
    )
    tokenize_workers: Whole | None = Field(
        None, description="processes that tokenize; default: one per core, at most 16; the cache is the same"
    )
    prompt_loss: bool = Field(False, description="label prompts too, not only responses")
    batch_size: Whole = Field(8, description="full-length sequences per forward pass; more if they are shorter")
    shard_positions: Whole = Field(65536, description="target positions per shard, the unit of resuming")
    fidelity_positions: Annotated[int, Field(ge=0, le=2**31)] = Field(
        512, description="positions on which labels are measured against the full distribution; 0: none"
    )
    student_tokenizer: Place | None = Field(
        None,
        description="hub id or folder of another tokenizer than the teacher's: the cache is in its vocabulary, for "
        "students that have it; with --engine transformers",
    )
    engine: Literal["auto", "transformers", "vllm", "vllm-topk", "server"] = Field(
        "auto",
        description="auto: vLLM if it and an accelerator are available; vllm-topk: head at T=1 only, no draws; server: "
        "the same from a running vLLM or SGLang, by default 20 tokens",
    )
    base_url: Urls | None = Field(
        None, description="with --engine server: its URL, such as http://localhost:8000/v1; several share the work"
    )
    tokenizer: Place | None = Field(
        None, description="with --engine server: hub id or folder of the tokenizer; default: --teacher-model"
    )
    concurrency: Whole = Field(16, description="with --engine server: concurrent requests per server")
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        600.0, description="with --engine server: seconds to wait for a reply"
    )
    max_retries: Annotated[int, Field(ge=0, le=1000)] = Field(
        20, description="with --engine server: retries in a row, 0.5 to 30 s apart: 20 take 8 minutes"
    )
    tensor_parallel_size: Whole = Field(1, description="devices that share the teacher, with --engine vllm")
    ray: str | None = Field(
        None,
        description="run each shard as a task on the Ray cluster at this address; local: on a new one; auto, or --ray "
        "without a value: on one that runs here, else on a new one",
    )
    workers: Whole | None = Field(
        None, description="teachers on the Ray cluster, which may still have to grow; default: one per accelerator"
    )
    skip_engine_check: bool = Field(False, description="skip the comparison of a few vLLM labels with transformers")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the teacher's weights"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    trust_remote_code: bool = Field(False, description="run model code that comes with a hub teacher")
    overwrite: bool = Field(False, description="replace an existing cache at --output")
    dry_run: bool = Field(False, description="print counts, lengths, bytes and hours; load no weights, write nothing")
    show: int = Field(0, ge=0, description="with --dry-run: print the first N examples, with their targets highlighted")
    json_: bool = Field(False, description="print JSON; only with --dry-run")
    shards: str | None = Field(
        None,
        description="i/n: write only part i (1 to n) of the shards, beside other processes; the cache needs all parts",
    )
    seed: Seed = Field(0, description="seed of the shuffle and the draws")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        head, tail = PRESETS.get(str(given.get("preset", "standard")), (8, 24))
        if given.get("engine") == "server":
            return {**HEAD_OF_SERVERS, **({"head_size": head} if "preset" in given else {}), **given}
        if given.get("student_tokenizer") and given.get("engine", "auto") == "auto":
            given = {**given, "engine": "transformers"}
        return {"head_size": head, "tail_draws": tail, **given}

    @model_validator(mode="after")
    def _another_vocabulary_needs_the_whole_distribution(self) -> Self:
        if self.student_tokenizer is None:
            return self
        if self.engine != "transformers":
            raise ValueError(f"--student-tokenizer requires --engine transformers, got {self.engine}: leave it out")
        if self.preset == "exact":
            raise ValueError(
                "--student-tokenizer cannot be combined with --preset exact, whose labels are in the teacher's own "
                "vocabulary: use --preset rich"
            )
        return self

    @field_validator("shards")
    @classmethod
    def _shards_is_i_of_n(cls, value: str | None) -> str | None:
        match = None if value is None else re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value)
        if value is not None and not (match and 1 <= int(match[1]) <= int(match[2])):
            raise ValueError("must be i/n with i from 1 to n, such as 1/8")
        return value

    @model_validator(mode="after")
    def _parts_do_not_overwrite(self) -> Self:
        if self.shards is not None and self.overwrite:
            raise ValueError(
                "--overwrite cannot be combined with --shards: a part would delete the work of the others; "
                "remove the cache's folder first"
            )
        return self

    @model_validator(mode="after")
    def _show_requires_dry_run(self) -> Self:
        if self.show and not self.dry_run:
            raise ValueError("--show requires --dry-run")
        return self

    @model_validator(mode="after")
    def _json_requires_dry_run(self) -> Self:
        if self.json_ and not self.dry_run:
            raise ValueError("--json requires --dry-run: `logitcask cache info --json` shows what a cache holds")
        return self

    @model_validator(mode="after")
    def _options_apply_to_the_engine(self) -> Self:
        if self.tensor_parallel_size > 1 and not self.engine.startswith("vllm"):
            raise ValueError(
                f"--tensor-parallel-size {self.tensor_parallel_size} requires vLLM, got --engine {self.engine}: "
                "add --engine vllm"
            )
        if self.skip_engine_check and not self.engine.startswith("vllm"):
            raise ValueError(f"--skip-engine-check requires vLLM, got --engine {self.engine}: leave it out")
        if self.workers is not None and self.ray is None:
            raise ValueError(f"--workers {self.workers} requires --ray: add it, or leave --workers out")
        return self

    @model_validator(mode="after")
    def _options_fit_servers(self) -> Self:
        served = self.engine == "server"
        for name in NOT_OF_SERVERS if served else OF_SERVERS:
            if name in self.model_fields_set:
                rule = "does not apply to --engine server" if served else "requires --engine server"
                raise ValueError(f"{flag_of(name)} {rule}: {'leave it out' if served else 'add it'}")
        if served and not self.base_url:
            raise ValueError("--engine server requires --base-url, such as http://localhost:8000/v1")
        if not all(map(is_plain_url, self.base_url or ())):  # not printed: it may hold a key
            raise ValueError(
                "--base-url must be http:// or https://, a host and a path, without user name, password or query, with "
                "commas between several: the key comes from the environment variable OPENAI_COMPATIBLE_API_KEY"
            )
        return self

    @model_validator(mode="after")
    def _top_k_gives_the_head_alone(self) -> Self:
        if self.engine in ("vllm-topk", "server") and (self.tail_draws, self.temperatures, self.fidelity_positions) != (
            0,
            (1.0,),
            0,
        ):
            raise ValueError(
                f"--engine {self.engine} gives the head at T=1 alone: "
                "add --tail-draws 0 --temperatures 1 --fidelity-positions 0"
            )
        return self

    @model_validator(mode="after")
    def _exact_labels_have_hidden_states(self) -> Self:
        if self.preset != "exact":
            if "hidden_bits" in self.model_fields_set:
                raise ValueError("--hidden-bits requires --preset exact: add it, or leave --hidden-bits out")
            return self
        if self.engine in ("vllm-topk", "server"):
            raise ValueError(
                f"--preset exact needs the teacher's hidden states, which --engine {self.engine} does not give: "
                "use --engine vllm or transformers"
            )
        if self.tail_draws or not self.head_size:
            raise ValueError("--preset exact takes a head and no draws: leave --tail-draws out, --head-size at least 1")
        return self

    @property
    def tokenizer_source(self) -> str:
        """Where the teacher's tokenizer and config are: its own place, unless that is only a server's name for it."""
        return self.tokenizer or self.teacher_model

    @property
    def part(self) -> tuple[int, int] | None:
        """Part i of n of the shards, None if all of them."""
        if self.shards is None:
            return None
        index, count = self.shards.split("/")
        return int(index), int(count)

    @model_validator(mode="after")
    def _label_is_not_empty(self) -> Self:
        if self.head_size + self.tail_draws == 0:
            raise ValueError("--head-size + --tail-draws must be at least 1, got 0: a label needs an entry")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"--temperatures must differ from each other, got {list(self.temperatures)}")
        return self
