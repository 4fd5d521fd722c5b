"""Settings of ``logitcask train``; most of them stand in ``training/``, by what they are about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from logitcask.pipeline.settings.base import FilePath, Sources, expand_home, split_weight
from logitcask.pipeline.settings.data import DataSettings
from logitcask.pipeline.settings.training.loss import LossOptions
from logitcask.pipeline.settings.training.optimizer import OptimizerSettings
from logitcask.pipeline.settings.training.run import RunSettings
from logitcask.pipeline.settings.training.student import StudentSettings


class TrainSettings(RunSettings, OptimizerSettings, StudentSettings, LossOptions, DataSettings):
    """Options of ``logitcask train``."""

    group = "Data"
    groups: ClassVar[Mapping[str, str]] = {
        "Data": "cache train_data",
        "Student": "student_model student_config init_from_teacher_layers teacher_model",
        "Reporting": "logging_steps use_wandb wandb_project wandb_run_name use_tensorboard use_trackio push_to_hub",
    }

    cache: Sources | None = Field(
        None,
        description="logit cache: a folder, a .zip file, or an s3://, gs://, hf:// or ssh:// URL; repeatable, with the "
        "share of each, such as a:0.7",
    )
    local_copies: FilePath = Field(
        Path("~/.cache/logitcask"), description="folder for local copies of what is read from a remote cache"
    )
    local_copies_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        20.0, description="largest size of that folder, in GB of 10^9 bytes"
    )
    train_data: Sources | None = Field(
        None,
        description="data file in place of a cache, repeatable; soft losses then need a --teacher-model in memory; or "
        "beside a cache, with the share of each, such as text.jsonl:0.2: its text has the hard loss alone",
    )
    max_seq_length: Annotated[int, Field(ge=2, le=2**31)] = Field(
        1024, description="tokens per example; only with --train-data"
    )

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if self.cache is None and self.train_data is None:
            raise ValueError("give --cache, or --train-data in place of one")
        if self.cache is not None and (self.chat_template is not None or self.chat_template_kwargs):
            raise ValueError(
                "--chat-template and --chat-template-kwargs apply to --train-data: give them to precompute-logits, "
                "whose cache holds the template, and leave them out here"
            )
        for place, weight in (*self.weighted_caches, *self.weighted_texts):
            if self.is_mixed and weight is None:
                raise ValueError(
                    f"{place}: several caches, or text beside one, need a weight each, such as --cache a:0.7 --cache "
                    "b:0.3: shares of the target positions that sum to 1"
                )
        for place, _ in self.weighted_caches:
            if "://" not in place and self.output_dir.resolve().is_relative_to(Path(place).resolve()):
                raise ValueError(f"--output-dir {self.output_dir} is inside the cache {place}: choose another folder")
        if self.cache is None and self.distillation_type != "output":
            if self.teacher_model is None:
                raise ValueError(
                    f"--distillation-type {self.distillation_type} needs --cache, which holds soft labels, or "
                    "--teacher-model, to compute them in memory"
                )
            if self.tail is not None:
                raise ValueError("--tail applies to a cache: leave it out, a teacher in memory has its whole tail")
        return self

    @model_validator(mode="after")
    def _what_needs_a_caches_labels_has_them(self) -> Self:
        if self.cache is None and self.min_fidelity is not None:
            raise ValueError(
                "--min-fidelity applies to a cache: a teacher in memory gives the exact gradient; leave it out"
            )
        if self.cache is None and not self.temperatures.level:
            raise ValueError("--temperature FIRST:LAST applies to a cache: give one number to a teacher in memory")
        if self.select is not None and (self.cache is None or self.train_data is not None):
            raise ValueError("--select applies to a cache's labels: leave it out, or give --cache without --train-data")
        return self

    @model_validator(mode="after")
    def _labels_to_evaluate_by(self) -> Self:
        if self.eval_cache is not None and self.cache is None and self.distillation_type != "output":
            raise ValueError("--eval-cache applies to --cache, or to --distillation-type output: leave it out")
        return self

    @property
    def loading(self) -> dict[str, Any]:
        """How the student model is loaded."""
        return {"revision": self.student_revision, "trust_remote_code": self.trust_remote_code}

    @property
    def is_mixed(self) -> bool:
        """Whether there are several caches, or text beside one."""
        return self.cache is not None and len(self.cache) + len(self.train_data or ()) > 1

    @property
    def weighted_caches(self) -> list[tuple[str, float | None]]:
        """Each cache and its weight, None if there is nothing to mix."""
        return [split_weight(cache) if self.is_mixed else (cache, None) for cache in self.cache or ()]

    @property
    def weighted_texts(self) -> list[tuple[str, float | None]]:
        """Each data file beside caches and its weight."""
        return [split_weight(text) for text in self.train_data or ()] if self.is_mixed else []

    @property
    def copies_folder(self) -> Path:
        """Folder for local copies. Raises LogitcaskError if it is needed and in an unknown home folder."""
        remote = any("://" in cache for cache in (*(self.cache or ()), self.eval_cache or ""))
        return Path(expand_home(self.local_copies)) if remote else self.local_copies
