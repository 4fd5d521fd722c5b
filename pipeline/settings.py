"""Settings: each knob stands here once, with its type, its limits, its default and its help text.

The command line is made from these models; a ``--config`` file sets the same names, a flag overrides it.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from logitcask.cache.errors import LogitcaskError


def _parse_temperatures(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def _place(value: Any) -> Any:
    return str(value) if "://" in str(value) else Path(value)


Temperature = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]
Temperatures = Annotated[tuple[Temperature, ...], BeforeValidator(_parse_temperatures), Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=1, le=2**31)]
PRESETS = {"lean": (4, 8), "standard": (8, 24), "rich": (32, 64)}  # head size, tail draws
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Settings(BaseModel):
    """A frozen, closed set of knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


class PrecomputeSettings(Settings):
    """Knobs of ``logitcask precompute-logits``."""

    teacher_model: str = Field(description="hub id, local folder or .gguf file of a causal language model")
    teacher_revision: str | None = Field(None, description="branch, tag or commit of a hub teacher")
    train_data: str = Field(description=".jsonl or .parquet file, or a dataset's hub id")
    output: Annotated[Path | str, BeforeValidator(_place)] = Field(
        description="folder of the cache, or its s3://, gs:// or ssh:// URL"
    )
    preset: Literal["lean", "standard", "rich"] = Field(
        "standard", description="size of a label, head + tail: lean 4 + 8, standard 8 + 24, rich 32 + 64"
    )
    head_size: Annotated[int, Field(ge=0, le=65536)] = Field(
        8, description="most probable tokens kept exactly, K; overrides the preset's"
    )
    tail_draws: Annotated[int, Field(ge=0, le=65535)] = Field(
        24, description="tokens drawn from the rest, M; overrides the preset's"
    )
    temperatures: Temperatures = Field((1.0, 1.5, 2.0), description="temperatures students may train at")
    max_seq_length: Annotated[int, Field(ge=2, le=2**31)] = Field(1024, description="tokens an example, longer are cut")
    prompt_loss: bool = Field(False, description="label prompts too, not only responses")
    batch_size: Whole = Field(8, description="full-length sequences a forward pass; shorter ones go in greater number")
    shard_positions: Whole = Field(65536, description="target positions a shard: the unit of resuming")
    fidelity_positions: Annotated[int, Field(ge=0, le=2**31)] = Field(
        512, description="positions to measure the labels' fidelity on, against the full distribution; 0: none"
    )
    engine: Literal["auto", "transformers", "vllm", "vllm-topk"] = Field(
        "auto", description="auto: vLLM where it and an accelerator are found; vllm-topk: head at T=1 only, no draws"
    )
    tensor_parallel_size: Whole = Field(1, description="devices that share the teacher, with --engine vllm")
    ray: str | None = Field(
        None,
        description="make each shard a task of the Ray cluster at this address; local: of one started here; auto, or "
        "--ray alone: of one that runs here, else of one started here",
    )
    workers: Whole | None = Field(
        None, description="teachers on the Ray cluster, which may have yet to grow; default: one an accelerator it has"
    )
    skip_engine_check: bool = Field(False, description="do not compare a few of vLLM's labels with transformers' first")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the teacher's weights")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    trust_remote_code: bool = Field(False, description="run model code that comes with a hub teacher")
    overwrite: bool = Field(False, description="replace a cache that lies at the output")
    dry_run: bool = Field(False, description="print counts, lengths, bytes and hours; load no weights, write nothing")
    json_: bool = Field(False, description="print JSON; goes with --dry-run only")
    shards: str | None = Field(
        None, description="i/n: write only part i of n, from 1, beside other processes; the cache needs all parts"
    )
    seed: Seed = Field(0, description="seed of the shuffle and of the draws")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        head, tail = PRESETS.get(str(given.get("preset", "standard")), (8, 24))
        return {"head_size": head, "tail_draws": tail, **given}

    @field_validator("shards")
    @classmethod
    def _shards_are_a_part(cls, value: str | None) -> str | None:
        found = None if value is None else re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value)
        if value is not None and not (found and 1 <= int(found[1]) <= int(found[2])):
            raise ValueError("must be i/n with i from 1 to n, such as 1/8")
        return value

    @model_validator(mode="after")
    def _a_part_keeps_the_others(self) -> Self:
        if self.shards is not None and self.overwrite:
            raise ValueError(
                "overwrite does not go with shards: a part would wipe the others' work; remove the cache's folder first"
            )
        return self

    @model_validator(mode="after")
    def _json_is_of_a_dry_run(self) -> Self:
        if self.json_ and not self.dry_run:
            raise ValueError("--json goes with --dry-run: what a cache holds tells cache info --json")
        return self

    @model_validator(mode="after")
    def _nothing_is_left_unused(self) -> Self:
        if self.tensor_parallel_size > 1 and not self.engine.startswith("vllm"):
            raise ValueError(
                f"tensor_parallel_size {self.tensor_parallel_size} is vLLM's, engine is {self.engine}: add engine vllm"
            )
        if self.skip_engine_check and not self.engine.startswith("vllm"):
            raise ValueError(f"skip_engine_check is of engine vllm, engine is {self.engine}: leave it out")
        if self.workers is not None and self.ray is None:
            raise ValueError(f"workers {self.workers} are of a Ray cluster: add ray, or leave it out")
        return self

    @model_validator(mode="after")
    def _top_k_has_neither_tail_nor_temperatures(self) -> Self:
        if self.engine == "vllm-topk" and (self.tail_draws, self.temperatures, self.fidelity_positions) != (
            0,
            (1.0,),
            0,
        ):
            raise ValueError(
                "engine vllm-topk gives the head at T=1 alone: add tail_draws 0, temperatures 1, fidelity_positions 0"
            )
        return self

    @property
    def part(self) -> tuple[int, int] | None:
        """Part i of n of the shards, None for all of them."""
        if self.shards is None:
            return None
        index, count = self.shards.split("/")
        return int(index), int(count)

    @model_validator(mode="after")
    def _label_is_not_empty(self) -> Self:
        if self.head_size + self.tail_draws == 0:
            raise ValueError("head_size + tail_draws must be at least 1, is 0: a label needs an entry")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures must differ from each other, are {list(self.temperatures)}")
        return self


class TrainSettings(Settings):
    """Knobs of ``logitcask train``."""

    distillation_type: Literal["output", "logit", "hybrid"] = Field(
        "hybrid", description="output: next tokens only; logit: soft labels only; hybrid: both"
    )
    cache: str | None = Field(
        None, description="the logit cache: a folder, a .zip file, or s3://, gs://, hf://, ssh://"
    )
    local_copies: Path = Field(
        Path("~/.cache/logitcask"), description="folder for what was read of a cache on another machine"
    )
    local_copies_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        20.0, description="size of that folder at most, in GB of 10^9 bytes"
    )
    train_data: str | None = Field(
        None, description="data file in place of a cache; soft losses then take a --teacher-model in memory"
    )
    student_config: Path | None = Field(None, description="Hugging Face config JSON of a new student")
    student_model: str | None = Field(None, description="hub id or folder of a student to go on from")
    init_from_teacher_layers: str | None = Field(
        None, description="layers of a local --teacher-model to start from, as 0,9,19,29"
    )
    teacher_model: str | None = Field(
        None, description="for its layers; without a cache for its tokenizer and, online, its exact soft labels"
    )
    output_dir: Path = Field(description="folder of the run: checkpoints and final/")
    alpha: Fraction | None = Field(None, description="weight of the hard loss; hybrid: 0.1")
    temperature: Temperature = Field(1.0, description="one of the cache's temperatures")
    min_fidelity: Fraction | None = Field(
        None, description="refuse a cache whose gradient at the temperature has a smaller cosine to the exact one"
    )
    tail: Literal["sampled", "bucket", "renormalize"] | None = Field(
        None, description="mass outside the head; sampled where the cache holds draws, else bucket"
    )
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = Field(
        "forward-kl", description="reverse-kl and jsd need --tail bucket"
    )
    batch_size: Whole = Field(8, description="examples a device and forward pass")
    gradient_accumulation_steps: Whole = Field(1, description="forward passes an optimizer step")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(5e-4, description="peak learning rate")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(20, description="steps of linear warm-up, before a cosine decay")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.01, description="AdamW's weight decay")
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1.0, description="gradient clipping, 0: off"
    )
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1.0, description="passes over the data")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimizer steps; overrides epochs")
    max_seq_length: Annotated[int, Field(ge=2, le=2**31)] = Field(1024, description="for --train-data only")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of examples held out")
    eval_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between evaluations; default: at the ends"
    )
    save_steps: Whole = Field(1000, description="steps between checkpoints")
    save_total_limit: Whole = Field(3, description="checkpoints kept")
    logging_steps: Whole = Field(10, description="steps between log lines")
    resume_from_checkpoint: str | None = Field(None, description="a checkpoint folder, or latest")
    use_gradient_checkpointing: bool = Field(False, description="less memory, slower")
    use_mixed_precision: bool = Field(False, description="autocast to the dtype below")
    mixed_precision_dtype: Literal["bf16", "fp16"] = Field("bf16", description="dtype of mixed precision")
    num_workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="processes that read the cache ahead of a GPU"
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes an accelerator where there is one")
    use_wandb: bool = Field(False, description="report to Weights & Biases")
    wandb_project: str = Field("logitcask", description="project there, and in trackio")
    wandb_run_name: str | None = Field(None, description="run name there, and in trackio")
    use_tensorboard: bool = Field(False, description="write TensorBoard events to the run's folder")
    use_trackio: bool = Field(False, description="report to trackio, on this machine")
    seed: Seed = Field(0, description="seed of initial weights, held-out examples and order")

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        students = [self.student_config, self.student_model, self.init_from_teacher_layers]
        if sum(choice is not None for choice in students) != 1:
            raise ValueError("give exactly one of student_config, student_model, init_from_teacher_layers")
        if self.init_from_teacher_layers is not None and self.teacher_model is None:
            raise ValueError("init_from_teacher_layers needs teacher_model: the local model whose layers to take")
        if (self.cache is None) == (self.train_data is None):
            raise ValueError("give exactly one of cache and train_data")
        if self.cache is None and self.distillation_type != "output":
            if self.teacher_model is None:
                raise ValueError(
                    f"distillation_type {self.distillation_type} needs cache, where soft labels lie, or teacher_model, "
                    "to make them in memory"
                )
            if self.tail is not None or self.divergence != "forward-kl":
                raise ValueError("tail and divergence are of a cache: a teacher in memory gives the exact forward KL")
        fixed = {"output": 1.0, "logit": 0.0}.get(self.distillation_type)
        if fixed is not None and self.alpha not in (None, fixed):
            raise ValueError(
                f"alpha must be {fixed} for {self.distillation_type}, is {self.alpha}: use hybrid or leave it out"
            )
        if self.min_fidelity is not None and (
            self.distillation_type == "output" or self.tail is not None or self.divergence != "forward-kl"
        ):
            raise ValueError(
                "min_fidelity tells of the forward KL with the cache's own tail: leave out output, tail and divergence"
            )
        if self.min_fidelity is not None and self.cache is None:
            raise ValueError("min_fidelity is of a cache: a teacher in memory gives the exact gradient, leave it out")
        if self.divergence != "forward-kl" and self.tail != "bucket":
            raise ValueError(f"divergence {self.divergence} is only defined with tail bucket, tail is {self.tail}")
        return self

    @property
    def hard_weight(self) -> float:
        """The weight of the hard loss, alpha."""
        fixed = {"output": 1.0, "logit": 0.0, "hybrid": 0.1}[self.distillation_type]
        return fixed if self.alpha is None else self.alpha


class PlanSettings(Settings):
    """Knobs of ``logitcask plan``."""

    train_data: str | None = Field(None, description="data file or dataset to count, large files by a sample")
    tokens: Annotated[int, Field(ge=1, le=10**15)] | None = Field(
        None, description="tokens in place of a data file; all are taken to be targets"
    )
    teacher_model: str | None = Field(
        None, description="hub id, local folder or .gguf file, whose weights are not read; or a size such as 7B"
    )
    student_config: str = Field("100M", description="Hugging Face config JSON of a student, or a size such as 350M")
    preset: Literal["lean", "standard", "rich"] = Field("standard", description="size of a label, as in stage 1")
    max_seq_length: Annotated[int, Field(ge=2, le=2**31)] = Field(1024, description="tokens an example, longer are cut")
    prompt_loss: bool = Field(False, description="label prompts too, not only responses")
    batch_size: Whole = Field(8, description="full-length sequences a forward pass, in both stages")
    use_gradient_checkpointing: bool = Field(False, description="of the student")
    use_mixed_precision: bool = Field(False, description="of the student, bfloat16")
    device: str = Field("H100", description="a device that --tables names")
    teacher_tokens_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="a speed of stage 1 that was measured, in place of the estimate"
    )
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="of an hour of the device, in any currency"
    )
    tables: bool = Field(
        False, description="devices, and what common students and teachers need; goes with --json only"
    )
    json_: bool = Field(False, description="print JSON")

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if self.tables:
            others = sorted(self.model_fields_set - {"tables", "json_"})
            if others:
                raise ValueError(f"tables are of fixed cases and take no {', '.join(others)}: leave it out")
            return self
        if (self.train_data is None) == (self.tokens is None):
            raise ValueError("give exactly one of train_data and tokens")
        if self.teacher_model is None:
            raise ValueError("--teacher-model is required: a model, or a size such as 7B")
        return self


class GenerateSettings(Settings):
    """Knobs of ``logitcask generate``."""

    model: str = Field(description="folder or hub id of a causal language model, such as a run's final/")
    prompt: str = Field(description="what to answer")
    max_new_tokens: Whole = Field(128, description="tokens at most")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.0, description="0: the likeliest token")
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    seed: Seed = Field(0, description="seed of sampling")


def shard_range(text: str) -> tuple[int, int]:
    """FIRST and STOP of ``FIRST:STOP``. Raises LogitcaskError where it is none."""
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not found:
        raise LogitcaskError(f"--shards: must be FIRST:STOP, such as 0:10, is {text!r}")
    return int(found[1]), int(found[2])
