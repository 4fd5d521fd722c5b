"""Stage 2: train a student from the cache, on transformers.Trainer, with no teacher in memory."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import TrainingArguments

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.console import notices, results, say
from logitcask.pipeline.machine import choose_device, free_at_once
from logitcask.pipeline.models.head import keeps_apart
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.models.recompute import keep_products_only
from logitcask.pipeline.models.shapes import shape_of_model
from logitcask.pipeline.models.student import count_parameters, make_student
from logitcask.pipeline.runs.run_folder import ENDS_FILE, FINAL, SETTINGS_FILE, divergence_name
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.batches import BatchSampler, Collator, held_out
from logitcask.pipeline.train.callbacks.interrupt import Interrupts
from logitcask.pipeline.train.callbacks.live_table import LiveTable
from logitcask.pipeline.train.callbacks.metrics_log import KeepMetrics
from logitcask.pipeline.train.callbacks.nonfinite import Watch, require_finite
from logitcask.pipeline.train.callbacks.trackers import reporters
from logitcask.pipeline.train.checkpoints import KeepSettings, admit_output, saving, write_json
from logitcask.pipeline.train.memory_advice import Extent, memory_watched, needed, summary
from logitcask.pipeline.train.source import Source, cache_source, file_source
from logitcask.pipeline.train.trainer import DistillationTrainer, make_loss_forward


def run_training(settings: TrainSettings) -> dict[str, float]:
    """Train and save a student; returns the last evaluation. Raises LogitcaskError for anything the user can mend."""
    with tempfile.TemporaryDirectory(prefix="logitcask-") as folder:
        source = cache_source(settings) if settings.cache else file_source(settings, Path(folder))
        record = {**settings.model_dump(mode="json"), "tail": source.tail, "source": source.identity}
        checkpoint = admit_output(settings, record)
        return _train(settings, source, record, checkpoint)


def _train(settings: TrainSettings, source: Source, record: dict[str, Any], checkpoint: str | None) -> dict[str, float]:
    arguments, reports = training_arguments(settings), reporters(settings)
    model = make_student(settings, source.vocab_size, source.longest, source.tokenizer)
    size = count_parameters(model)
    ranks = arguments.process_index, arguments.world_size
    where = f", on {ranks[1]} ranks" if ranks[1] > 1 else ""
    say(f"student: {size.total:,} parameters, {size.without_embeddings:,} without embeddings{where}")
    require_finite(model, "the student")
    kept = held_out(len(source.examples), settings.eval_fraction, settings.seed)
    packed = keeps_apart(model) and (source.teacher is None or source.teacher.packs)
    lengths = None if packed else source.lengths()
    sampler = BatchSampler(
        source.shard_starts,
        kept,
        settings.batch_size,
        settings.seed,
        *ranks,
        lengths=lengths,
        accumulation=settings.gradient_accumulation_steps,
    )
    shape, device = shape_of_model(model, "student"), arguments.device.type
    if device == "cpu":
        free_at_once()
        if not settings.use_gradient_checkpointing:
            keep_products_only(model)
    if arguments.process_index == 0:
        extent = Extent(source.amount, len(kept), sampler, arguments.world_size)
        for line in summary(settings, extent, str(arguments.device), needed(settings, shape, source.longest, device)):
            say(line)
        say("rows: several examples share one where they fit" if packed else "rows: one example each, of like lengths")
    with memory_watched(settings, shape, source.longest, device):
        loss = LossSettings(settings.hard_weight, settings.temperature, source.tail, settings.divergence)
        make_loss_forward(model, loss, source.teacher)
        pad = source.tokenizer.pad_token_id
        collator = Collator(0 if pad is None else pad, source.temperatures, settings.temperature, source.tail, packed)
        interrupts = Interrupts()
        table = LiveTable(notices(), interrupts.note)
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            examples=source.examples,
            sampler=sampler,
            held_out=kept.tolist(),
            collator=collator,
            tokenizer=source.tokenizer,
            watch=Watch(settings, source.examples, sampler, collator),
            callbacks=[interrupts, table, KeepMetrics(settings.output_dir, table.show), KeepSettings(record), *reports],
        )
        require_fsdp(trainer)
        table.replace_bar(trainer)
        before = trainer.evaluate() if len(kept) and checkpoint is None else None
        with table, interrupts:
            trainer.train(resume_from_checkpoint=checkpoint)
        interrupts.raise_if_stopped(settings.resume_from_checkpoint)
        after = trainer.evaluate() if len(kept) else {}
    _keep_final(settings, trainer, record, before, after)
    return after


def _keep_final(
    settings: TrainSettings,
    trainer: DistillationTrainer,
    record: dict[str, Any],
    before: dict[str, float] | None,
    after: dict[str, float],
) -> None:
    final = settings.output_dir / FINAL
    with saving(settings.output_dir):
        trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        (final / "training_args.bin").unlink(missing_ok=True)  # a pickle; nobody should have to load one
        write_json(final / SETTINGS_FILE, record)
        write_json(settings.output_dir / ENDS_FILE, {"before": before, "after": after})
        _print_evaluation(before, after, settings.temperature, divergence_name(record))
        say(f"student -> {final}")


def require_fsdp(trainer: DistillationTrainer) -> None:
    """Raise LogitcaskError where FSDP was asked for and accelerate would leave it out, or use its first version."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not trainer.accelerator.is_fsdp2:
        version, device = os.environ.get("FSDP_VERSION", "1"), trainer.accelerator.device.type
        raise LogitcaskError(
            f"accelerate's FSDP must be of fsdp_version 2, over several accelerators; it is {version}, over "
            f"{trainer.args.world_size} ranks on {device}: see configs/accelerate/fsdp.yaml, or start it by torchrun"
        )


def training_arguments(settings: TrainSettings) -> TrainingArguments:
    """The Trainer's own settings. Raises LogitcaskError for a precision that the device has not."""
    known = TrainingArguments.__dataclass_fields__  # renamed in transformers 5.2x
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    half = settings.mixed_precision_dtype if settings.use_mixed_precision else None
    if half == "fp16" and choose_device(settings.device).type == "cpu":
        raise LogitcaskError("--mixed-precision-dtype fp16 needs a GPU, the device is cpu: use bf16")
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
        use_cpu=settings.device == "cpu",
        **{checkpointing: settings.use_gradient_checkpointing},
        report_to="none",  # by callbacks of our own
        project=settings.wandb_project,
        run_name=settings.wandb_run_name,
        seed=settings.seed,
        remove_unused_columns=False,
    )


def _print_evaluation(
    before: dict[str, float] | None, after: dict[str, float], temperature: float, divergence: str
) -> None:
    if not after:
        return
    table = Table("held out", "before", "after")
    rows = {"perplexity": ("eval_perplexity", 1.0), "hard loss, nats": ("eval_hard_loss", 1.0)}
    if after["eval_teacher_captured_mass"]:
        rows[f"{divergence} to the teacher at T={temperature:g}, nats"] = ("eval_soft_loss", temperature**-2)
    for name, (key, factor) in rows.items():
        table.add_row(name, f"{before[key] * factor:,.3f}" if before else "", f"{after[key] * factor:,.3f}")
    results().print(table)
