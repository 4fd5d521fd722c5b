"""The settings of the Trainer that a run of stage 2 has."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.utils.import_utils import is_liger_kernel_available

from logitcask.cache.errors import LogitcaskError, shown, shown_reason
from logitcask.pipeline.console import say
from logitcask.pipeline.machine import choose_device
from logitcask.pipeline.runs.run_folder import SETTINGS_FILE, latest_checkpoint
from logitcask.pipeline.settings.base import flag_of
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.callbacks.best import METRIC

CHECKPOINTING = next(  # renamed in transformers 5.2x
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
WARMUP_SHARE = "warmup_ratio"  # of earlier versions of transformers, which now take a share as warmup_steps
WARMUP = 20  # steps, unless a run is short
OPTIONS = {
    **{"per_device_train_batch_size": "--batch-size", "per_device_eval_batch_size": "--batch-size"},
    **{"num_train_epochs": "--epochs", "bf16": "--use-mixed-precision", "fp16": "--use-mixed-precision"},
    **{"gradient_checkpointing": "--use-gradient-checkpointing", "use_cpu": "--device"},
    **{"activation_checkpointing": "--use-gradient-checkpointing", "dataloader_num_workers": "--num-workers"},
    **{"project": "--wandb-project", "run_name": "--wandb-run-name", "report_to": "--use-wandb and the like"},
    **{"warmup_steps": f"--warmup-steps, or {WARMUP_SHARE}", "hub_token": "the login of hf auth login"},
    **dict.fromkeys(("hub_model_id", "hub_strategy", "hub_always_push"), "--push-to-hub, which sends final/"),
    **{
        name: flag_of(name)
        for name in (
            *(
                "gradient_accumulation_steps",
                "learning_rate",
                "weight_decay",
                "max_grad_norm",
                "max_steps",
                "output_dir",
            ),
            *("save_steps", "save_total_limit", "logging_steps", "eval_steps", "seed", "resume_from_checkpoint"),
            "torch_compile",
            "push_to_hub",
        )
    },
}
OURS = {
    *(
        "remove_unused_columns",
        "label_names",
        "save_strategy",
        "eval_strategy",
        "logging_strategy",
        "do_train",
        "do_eval",
    ),
    *("do_predict", "save_only_model", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("label_smoothing_factor", "include_for_metrics", "batch_eval_metrics", "prediction_loss_only", "data_seed"),
    *("train_sampling_strategy", "length_column_name", "ignore_data_skip", "auto_find_batch_size", "bf16_full_eval"),
    *("fp16_full_eval", "average_tokens_across_devices", "logging_nan_inf_filter", "save_on_each_node"),
    *("restore_callback_states_from_checkpoint", "enable_jit_checkpoint", "logging_first_step"),
    *("accelerator_config", "parallelism_config"),
}


def with_defaults(settings: TrainSettings) -> tuple[TrainSettings, str]:
    """Return settings whose defaults by student and device are resolved, and why the learning rate is what it is.

    The reason is empty if the rate was given. A resumed run keeps what it was begun with.
    """
    begun, found, reason = _stored(settings), dict[str, Any](), ""
    if settings.learning_rate is None:
        rate, student = _rate(settings)
        kept = begun.get("learning_rate")
        known = isinstance(kept, float)  # else choose_checkpoint says what is wrong with it
        found["learning_rate"] = kept if known else rate
        reason = "as the run began" if known else f"the default for {student}"
    if settings.use_mixed_precision is None:
        half = begun.get("use_mixed_precision")
        found["use_mixed_precision"] = half if isinstance(half, bool) else _has_bf16(settings)
    for name, kind in (("eval_fraction", float), ("warmup_steps", int)):
        if getattr(settings, name) is None and isinstance(begun.get(name), kind):
            found[name] = begun[name]
    if settings.layers_to_choose is not None:
        kept = begun.get("init_from_teacher_layers")
        if isinstance(kept, str) and len(kept.split(",")) == settings.layers_to_choose:
            found["init_from_teacher_layers"] = kept
    return settings.model_copy(update=found), reason


def _stored(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings of the checkpoint to resume, empty if there is none, or not a sound one."""
    given = settings.resume_from_checkpoint
    if given is None:
        return {}
    folder = latest_checkpoint(settings.output_dir) if given == "latest" else Path(given)
    try:
        stored: Any = {} if folder is None else json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # choose_checkpoint says what is wrong with it
        return {}
    return stored if isinstance(stored, dict) else {}


def _rate(settings: TrainSettings) -> tuple[float, str]:
    """Return the default learning rate of a student, and what it is for."""
    if settings.lora_rank is not None:
        return 2e-4, "an adapter"
    if settings.student_model is not None:
        return 1e-5, "a pretrained student"
    return (1e-4, "layers of a teacher") if settings.init_from_teacher_layers is not None else (5e-4, "a new student")


def _has_bf16(settings: TrainSettings) -> bool:
    """Return whether mixed precision in bf16 is of use: on a GPU that has it, for weights in float32."""
    cuda = choose_device(settings.device).type == "cuda"
    return cuda and settings.student_dtype == "float32" and torch.cuda.is_bf16_supported()


def training_arguments(settings: TrainSettings) -> TrainingArguments:
    """Return the Trainer's own settings. Raises LogitcaskError if the device does not support the precision."""
    half = settings.mixed_precision_dtype if settings.use_mixed_precision else None
    if half == "fp16" and choose_device(settings.device).type == "cpu":
        raise LogitcaskError("--mixed-precision-dtype fp16 needs a GPU, but the device is cpu: use bf16")
    values: dict[str, Any] = dict(
        output_dir=str(settings.output_dir),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate or _rate(settings)[0],
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps or 0,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=max(2, settings.save_total_limit) if settings.watches_best else settings.save_total_limit,
        metric_for_best_model=METRIC if settings.watches_best else None,
        greater_is_better=False,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        bf16=half == "bf16",
        fp16=half == "fp16",
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        torch_compile=settings.torch_compile,
        use_cpu=choose_device(settings.device).type == "cpu",
        **{CHECKPOINTING: bool(settings.use_gradient_checkpointing)},
        report_to="none",  # trackers() reports instead
        project=settings.wandb_project,
        run_name=settings.wandb_run_name,
        seed=settings.seed,
        remove_unused_columns=False,
    )
    try:
        arguments = TrainingArguments(**{**values, **_others(settings.training_args)})
        _try(arguments, settings.training_args)
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError, ArithmeticError) as error:
        if not settings.training_args:
            raise
        raise LogitcaskError(
            f"--training-args: transformers refuses them: {shown_reason(error)}: correct them"
        ) from error
    arguments.load_best_model_at_end = settings.load_best  # set here: the Trainer saves at each new best, at any step
    if arguments.n_gpu > 1:  # otherwise the Trainer takes DataParallel, whose replicas do not compute our loss
        say(f"1 of {arguments.n_gpu} GPUs is used: start with torchrun to use all of them")
        arguments._n_gpu = 1
    return arguments


def _try(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise what transformers raises about the optimizer, the schedule or the kernels that some arguments ask for."""
    if {"optim", "optim_args"} & given.keys():
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel needs the package liger-kernel")
    if not {"lr_scheduler_type", "lr_scheduler_kwargs"} & given.keys():
        return
    optimizer, steps = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate), 10
    how = {"num_warmup_steps": 2, "num_training_steps": steps}
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer, **how, scheduler_specific_kwargs=arguments.lr_scheduler_kwargs
    )
    for _ in range(steps):
        optimizer.step()
        scheduler.step()


def _others(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of TrainingArguments beside ours. Raises LogitcaskError if one is ours or does not exist."""
    known = {name for name, field in TrainingArguments.__dataclass_fields__.items() if field.init} | {WARMUP_SHARE}
    for name in given:
        if name in OPTIONS:
            raise LogitcaskError(f"--training-args: {name} is set by {OPTIONS[name]}: give that instead")
        if name in OURS or name.startswith(("dataloader_", "fsdp", "eval_", "local_")):
            raise LogitcaskError(
                f"--training-args: {name} cannot be set: batches, evaluations, checkpoints and the log are Logitcask's "
                "own: leave it out"
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, 3) or ["optim"]
            raise LogitcaskError(
                f"--training-args: TrainingArguments has no field {shown(name)}: did you mean {', '.join(close)}?"
            )
    if given.get("lr_scheduler_type") in BY_METRIC:
        raise LogitcaskError(
            f"--training-args: lr_scheduler_type {given['lr_scheduler_type']} waits for the Trainer's evaluations, but "
            "those are Logitcask's own: choose one by steps, such as cosine or constant_with_warmup"
        )
    others = dict(given)
    share = others.pop(WARMUP_SHARE, None)
    if share is not None:
        if type(share) not in (int, float) or not 0 <= share < 1:
            raise LogitcaskError(f"--training-args: {WARMUP_SHARE} must be at least 0 and below 1, got {shown(share)}")
        others["warmup_steps"] = float(share)
    return others
