"""Settings of ``logitcask evaluate``."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from logitcask.pipeline.settings.base import FilePath, Place, Seed, Settings, Whole, flag_of
from logitcask.pipeline.settings.data import Where
from logitcask.pipeline.settings.precompute import Temperatures


def _parse_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[tuple[Annotated[Place, Field(min_length=1)], ...], BeforeValidator(_parse_list)]
Wholes = Annotated[tuple[Whole, ...], BeforeValidator(_parse_list), Field(min_length=1)]

HUMANEVAL_ONLY = {"problems", "samples", "k", "temperature", "max_new_tokens", "seed", "allow_code_execution"}


class EvaluateSettings(Settings):
    """Options of ``logitcask evaluate``."""

    model: Place = Field(description="folder or hub id of a student, such as a run's final/, or a .gguf file")
    cache: Place | None = Field(
        None, description="a logit cache of examples the student has not seen: folder, .zip file or URL"
    )
    humaneval: bool = Field(False, description="measure pass@k on HumanEval, by running the code that the model writes")
    tasks: Names | None = Field(None, description="tasks of lm-evaluation-harness: names, or paths of their YAML files")
    limit: Whole | None = Field(
        None, description="evaluate at most this many examples, the first of --cache and of each task"
    )
    temperatures: Temperatures | None = Field(
        None, description="temperatures of the divergence from the teacher; default: the cache's; exact labels have any"
    )
    where: Where = Field({}, description="only examples of --cache with these values, such as language=python")
    batch_size: Whole = Field(8, description="examples, or HumanEval samples, per forward pass")
    problems: Whole | None = Field(
        None, description="evaluate only the first so many HumanEval problems; default: all 164"
    )
    samples: Whole = Field(1, description="programs to write per HumanEval problem, n")
    k: Wholes = Field((1,), description="values of k in pass@k, each at most --samples")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0,
        description="sampling temperature for HumanEval; 0: the most likely token; several samples need more than 0",
    )
    max_new_tokens: Whole = Field(512, description="most tokens per HumanEval sample")
    seed: Seed = Field(0, description="seed of the HumanEval samples")
    allow_code_execution: bool = Field(
        False,
        description="run the code that the model writes on this machine, in a sandbox that does not stop everything",
    )
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    output: FilePath | None = Field(None, description="write the figures as JSON to this file")
    json_: bool = Field(False, description="print JSON")

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if not (self.cache or self.humaneval or self.tasks):
            raise ValueError("give at least one of --cache, --humaneval, --tasks: what to evaluate the model on")
        extra = [flag_of(name) for name in sorted(self.model_fields_set & HUMANEVAL_ONLY)]
        if extra and not self.humaneval:
            raise ValueError(f"{', '.join(extra)}: only valid with --humaneval: add it or leave them out")
        if self.limit is not None and not (self.cache or self.tasks):
            raise ValueError(
                f"--limit applies to --cache and --tasks, got {self.limit} with neither: use --problems for HumanEval"
            )
        if self.temperatures and not self.cache:
            raise ValueError("--temperatures applies to --cache, and none is given: add it or leave --temperatures out")
        if self.where and not self.cache:
            raise ValueError("--where applies to --cache, and none is given: add it or leave --where out")
        if self.humaneval and not self.allow_code_execution:
            raise ValueError(
                "--humaneval runs the code that the model writes on this machine: read in the manual, guides/evaluate, "
                "what the sandbox does not stop, then add --allow-code-execution"
            )
        if max(self.k) > self.samples:
            raise ValueError(f"--k must be at most --samples, {self.samples}, got {max(self.k)}: raise --samples")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"--samples must be 1 at --temperature 0, got {self.samples}: all would be alike; add --temperature 0.8"
            )
        return self
