"""Settings of ``logitcask evaluate``."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from logitcask.pipeline.settings.base import Seed, Settings, Whole


def _parse_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_parse_list)]
Wholes = Annotated[tuple[Whole, ...], BeforeValidator(_parse_list), Field(min_length=1)]

OF_HUMANEVAL = {"problems", "samples", "k", "temperature", "max_new_tokens", "seed", "allow_code_execution"}


class EvaluateSettings(Settings):
    """Knobs of ``logitcask evaluate``."""

    model: str = Field(description="folder or hub id of a student, such as a run's final/, or a .gguf file")
    cache: str | None = Field(
        None, description="a logit cache of examples the student has not seen: folder, .zip file or URL"
    )
    humaneval: bool = Field(False, description="pass@k on HumanEval, by running the code that the model writes")
    tasks: Names | None = Field(None, description="tasks of lm-evaluation-harness: names, or paths of their YAML files")
    limit: Whole | None = Field(None, description="examples at most, the first of the cache and of each task")
    batch_size: Whole = Field(8, description="examples, or samples of a problem, a forward pass")
    problems: Whole | None = Field(None, description="HumanEval problems at most, the first; default: all 164")
    samples: Whole = Field(1, description="programs to write for a HumanEval problem, n")
    k: Wholes = Field((1,), description="the k of pass@k, each at most --samples")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="of HumanEval's samples, 0: the likeliest token; several samples need more"
    )
    max_new_tokens: Whole = Field(512, description="tokens of a HumanEval sample at most")
    seed: Seed = Field(0, description="seed of HumanEval's samples")
    allow_code_execution: bool = Field(
        False, description="run what the model writes on this machine, in a sandbox that does not stop everything"
    )
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    output: Path | None = Field(None, description="write the figures as JSON to this file")
    json_: bool = Field(False, description="print JSON")

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if not (self.cache or self.humaneval or self.tasks):
            raise ValueError("give at least one of cache, humaneval, tasks: what to evaluate the model on")
        strange = sorted(self.model_fields_set & OF_HUMANEVAL)
        if strange and not self.humaneval:
            raise ValueError(f"{', '.join(strange)}: only with --humaneval: add it or leave it out")
        if self.limit is not None and not (self.cache or self.tasks):
            raise ValueError(
                f"limit is of cache and tasks, is {self.limit}: HumanEval's problems are cut by --problems"
            )
        if self.humaneval and not self.allow_code_execution:
            raise ValueError(
                "--humaneval runs the code that the model writes on this machine: read in the README what the sandbox "
                "does not stop, then add --allow-code-execution"
            )
        if max(self.k) > self.samples:
            raise ValueError(f"k must be at most samples, {self.samples}, is {max(self.k)}: raise --samples")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples must be 1 at temperature 0, is {self.samples}: they would all be alike; add --temperature 0.8"
            )
        return self
