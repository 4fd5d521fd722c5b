"""The settings of the Trainer that a run of stage 2 has."""

import torch
from transformers import TrainingArguments

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.machine import choose_device
from logitcask.pipeline.settings.train import TrainSettings


def training_arguments(settings: TrainSettings) -> TrainingArguments:
    """Return the Trainer's own settings. Raises LogitcaskError if the device does not support the precision."""
    known = TrainingArguments.__dataclass_fields__  # renamed in transformers 5.2x
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    half = settings.mixed_precision_dtype if settings.use_mixed_precision else None
    if half == "fp16" and choose_device(settings.device).type == "cpu":
        raise LogitcaskError("--mixed-precision-dtype fp16 needs a GPU, but the device is cpu: use bf16")
    return TrainingArguments(
        output_dir=str(settings.output_dir),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_steps and settings.eval_fraction else "no",
        eval_steps=settings.eval_steps,
        bf16=half == "bf16",
        fp16=half == "fp16",
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        torch_compile=settings.torch_compile,
        use_cpu=settings.device == "cpu",
        **{checkpointing: settings.use_gradient_checkpointing},
        report_to="none",  # trackers() reports instead
        project=settings.wandb_project,
        run_name=settings.wandb_run_name,
        seed=settings.seed,
        remove_unused_columns=False,
    )
