"""Settings of ``logitcask train``."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitcask.pipeline.settings.base import FilePath, Place, Seed, Sources, Temperature, Whole, expand_home
from logitcask.pipeline.settings.data import DataSettings

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class TrainSettings(DataSettings):
    """Options of ``logitcask train``."""

    distillation_type: Literal["output", "logit", "hybrid"] = Field(
        "hybrid", description="output: next tokens only; logit: soft labels only; hybrid: both"
    )
    cache: Place | None = Field(
        None, description="logit cache: a folder, a .zip file, or an s3://, gs://, hf:// or ssh:// URL"
    )
    local_copies: FilePath = Field(
        Path("~/.cache/logitcask"), description="folder for local copies of what is read from a remote cache"
    )
    local_copies_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        20.0, description="largest size of that folder, in GB of 10^9 bytes"
    )
    train_data: Sources | None = Field(
        None, description="data file in place of a cache, repeatable; soft losses then need a --teacher-model in memory"
    )
    student_config: FilePath | None = Field(
        None, description="Hugging Face config JSON of a new student, or a name: tiny, 100m, 350m, 1b"
    )
    student_model: Place | None = Field(None, description="hub id or folder of a pretrained student")
    init_from_teacher_layers: str | None = Field(
        None, description="start from these layers of a local --teacher-model, such as 0,9,19,29"
    )
    teacher_model: Place | None = Field(
        None,
        description="source of layers; without a cache, also of the tokenizer and of exact soft labels made online",
    )
    output_dir: FilePath = Field(description="folder of the run: checkpoints and final/")
    alpha: Fraction | None = Field(None, description="weight of the hard loss; default with hybrid: 0.1")
    temperature: Temperature = Field(1.0, description="one of the cache's temperatures")
    min_fidelity: Fraction | None = Field(
        None, description="refuse a cache whose gradient at --temperature has a smaller cosine to the exact one"
    )
    tail: Literal["sampled", "bucket", "renormalize"] | None = Field(
        None, description="how to treat mass outside the head; default: sampled if the cache holds draws, else bucket"
    )
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = Field(
        "forward-kl", description="reverse-kl and jsd need --tail bucket"
    )
    loss: str | None = Field(
        None, description="module:function, a soft loss of your own in place of T^2 times the divergence"
    )
    batch_size: Whole = Field(8, description="examples per device and forward pass")
    gradient_accumulation_steps: Whole = Field(1, description="forward passes per optimizer step")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(5e-4, description="peak learning rate")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(20, description="steps of linear warm-up before a cosine decay")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.01, description="AdamW's weight decay")
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1.0, description="clip gradients to this norm; 0: off"
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="weight of a mixture of experts' router loss; default: as its config says; 0: off"
    )
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1.0, description="passes over the data")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimizer steps; overrides --epochs")
    max_seq_length: Annotated[int, Field(ge=2, le=2**31)] = Field(
        1024, description="tokens per example; only with --train-data"
    )
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of examples held out")
    eval_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between evaluations; default: only before and after training"
    )
    save_steps: Whole = Field(1000, description="steps between checkpoints")
    save_total_limit: Whole = Field(3, description="most recent checkpoints to keep")
    logging_steps: Whole = Field(10, description="steps between log lines")
    resume_from_checkpoint: Place | None = Field(None, description="a checkpoint folder, or latest")
    use_gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
    use_mixed_precision: bool = Field(False, description="autocast to --mixed-precision-dtype")
    mixed_precision_dtype: Literal["bf16", "fp16"] = Field("bf16", description="dtype of mixed precision")
    num_workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="processes that prefetch batches from the cache"
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: an accelerator if there is one")
    use_wandb: bool = Field(False, description="report to Weights & Biases")
    wandb_project: str = Field("logitcask", description="project in W&B and trackio")
    wandb_run_name: str | None = Field(None, description="run name in W&B and trackio")
    use_tensorboard: bool = Field(False, description="write TensorBoard events to the run's folder")
    use_trackio: bool = Field(False, description="report to trackio, on this machine")
    seed: Seed = Field(0, description="seed of initial weights, held-out examples and order")

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        students = [self.student_config, self.student_model, self.init_from_teacher_layers]
        if sum(choice is not None for choice in students) != 1:
            raise ValueError("give exactly one of --student-config, --student-model, --init-from-teacher-layers")
        if self.init_from_teacher_layers is not None and self.teacher_model is None:
            raise ValueError("--init-from-teacher-layers needs --teacher-model: the local model whose layers to take")
        if (self.cache is None) == (self.train_data is None):
            raise ValueError("give exactly one of --cache and --train-data")
        local = self.cache is not None and "://" not in self.cache
        if local and self.output_dir.resolve().is_relative_to(Path(str(self.cache)).resolve()):
            raise ValueError(f"--output-dir {self.output_dir} is inside the cache {self.cache}: choose another folder")
        if self.cache is None and self.distillation_type != "output":
            if self.teacher_model is None:
                raise ValueError(
                    f"--distillation-type {self.distillation_type} needs --cache, which holds soft labels, or "
                    "--teacher-model, to compute them in memory"
                )
            if self.tail is not None or self.divergence != "forward-kl":
                raise ValueError(
                    "--tail and --divergence apply to a cache: leave them out, a teacher in memory gives the exact "
                    "forward KL"
                )
        fixed = {"output": 1.0, "logit": 0.0}.get(self.distillation_type)
        if fixed is not None and self.alpha not in (None, fixed):
            raise ValueError(
                f"--alpha must be {fixed} for --distillation-type {self.distillation_type}, got {self.alpha}: "
                "use hybrid or leave --alpha out"
            )
        if self.min_fidelity is not None and (
            self.distillation_type == "output" or self.tail is not None or self.divergence != "forward-kl"
        ):
            raise ValueError(
                "--min-fidelity applies to the forward KL with the default tail: "
                "leave out --distillation-type output, --tail and --divergence"
            )
        if self.min_fidelity is not None and self.cache is None:
            raise ValueError(
                "--min-fidelity applies to a cache: a teacher in memory gives the exact gradient; leave it out"
            )
        if self.divergence != "forward-kl" and self.tail != "bucket":
            raise ValueError(f"--divergence {self.divergence} requires --tail bucket, got {self.tail or 'no --tail'}")
        return self

    @model_validator(mode="after")
    def _own_loss_fits(self) -> Self:
        if self.loss is not None and self.cache is None:
            raise ValueError("--loss applies to a cache's labels: give --cache, or leave --loss out")
        if self.loss is not None and (self.hard_weight == 1.0 or self.divergence != "forward-kl" or self.min_fidelity):
            raise ValueError(
                "--loss takes the place of the divergence: leave out --divergence, --min-fidelity and "
                "--distillation-type output"
            )
        return self

    @property
    def copies_folder(self) -> Path:
        """Folder for local copies. Raises LogitcaskError if it is needed and in an unknown home folder."""
        remote = self.cache is not None and "://" in self.cache
        return Path(expand_home(self.local_copies)) if remote else self.local_copies

    @property
    def hard_weight(self) -> float:
        """Weight of the hard loss, alpha."""
        fixed = {"output": 1.0, "logit": 0.0, "hybrid": 0.1}[self.distillation_type]
        return fixed if self.alpha is None else self.alpha
