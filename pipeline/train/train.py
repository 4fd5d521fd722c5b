"""Stage 2: train a student from the cache, on transformers.Trainer, with no teacher in memory.

The events of an optimizer step, in order, and the file that owns each (1 to 3 may run ahead, in worker processes):

 1. the sampler picks the step's examples, the same for any number of ranks     batches.BatchSampler
 2. their tokens and labels are read from the cache                             batches.CacheExamples
 3. examples are packed into rows, labels brought to the temperature            batches.Collator
 4. the step's target positions are counted over its batches and all ranks      trainer.DistillationTrainer
 5. per batch, the student's layers run, then the fused loss on hidden states   trainer.make_loss_forward
 6. the loss is divided by the count of 4, then the backward pass runs          trainer.DistillationTrainer
 7. the gradient is clipped and the weights are updated                         transformers.Trainer
 8. a pending interrupt requests a checkpoint and the end of the run            callbacks/interrupt
 9. a non-finite loss or gradient stops the run                                 callbacks/nonfinite
10. the log line, if due, is written and shown                                  callbacks/metrics_log, live_table
11. the same line goes to the trackers                                          callbacks/trackers
12. the held-out examples are evaluated, if due                                 trainer.DistillationTrainer
13. the checkpoint is saved, if due, its settings last                          checkpoints.CompleteCheckpoint
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import IntArray
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.pipeline.batches.collate import Collator, TrainingExample, labels_are_finite
from logitcask.pipeline.batches.order import BatchSampler, held_out
from logitcask.pipeline.console import notices, results, say
from logitcask.pipeline.machine import choose_device, free_large_blocks
from logitcask.pipeline.models.head import keeps_apart
from logitcask.pipeline.models.load import count_parameters, require_finite, require_plain_weights, require_saved
from logitcask.pipeline.models.losses import LossSettings, read_router_loss, require_known_loss
from logitcask.pipeline.models.recompute import keep_products_only, require_checkpointing
from logitcask.pipeline.models.shapes import Amount, shape_of_model
from logitcask.pipeline.models.student import make_student
from logitcask.pipeline.runs.run_folder import (
    ENDS_FILE,
    FINAL,
    SETTINGS_FILE,
    divergence_name,
    ends_table,
    read_before,
    write_json,
)
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.text.bad_records import BadRecords, skipped_file
from logitcask.pipeline.train.callbacks.interrupt import SaveOnInterrupt
from logitcask.pipeline.train.callbacks.live_table import LiveTable
from logitcask.pipeline.train.callbacks.metrics_log import MetricsLog
from logitcask.pipeline.train.callbacks.nonfinite import StopOnNonFinite
from logitcask.pipeline.train.callbacks.trackers import new_wandb_id, trackers
from logitcask.pipeline.train.checkpoints import (
    Checkpoint,
    CompleteCheckpoint,
    choose_checkpoint,
    explain_save_errors,
    finished_student,
    make_output,
)
from logitcask.pipeline.train.memory_advice import RunSize, StepSize, explain_memory, summary
from logitcask.pipeline.train.source import Source, cache_source, file_source
from logitcask.pipeline.train.trainer import DistillationTrainer, fsdp_requested, make_loss_forward, require_fsdp


def run_training(settings: TrainSettings) -> dict[str, float]:
    """Train and save a student; return the last evaluation. Raises LogitcaskError for anything that a user can fix.

    A finished run that is resumed trains nothing; what it lacks of its results is saved.
    """
    arguments = training_arguments(settings)
    with tempfile.TemporaryDirectory(prefix="logitcask-") as folder:
        source = _open_source(settings, Path(folder))
        record = run_record(settings, source, arguments.world_size)
        checkpoint = choose_checkpoint(
            settings.output_dir, settings.resume_from_checkpoint, record, fsdp=fsdp_requested()
        )
        return _train(settings, arguments, source, record, checkpoint)


def run_record(settings: TrainSettings, source: Source, world_size: int) -> dict[str, Any]:
    """Return what is stored with checkpoints and ``final/``: the settings as resolved, and what they were used on."""
    record = {**settings.model_dump(mode="json"), "tail": source.tail, "source": source.identity}
    record["world_size"] = world_size
    if settings.seed:  # earlier versions left the first epoch in the cache's order for any seed, as seed 0 still does
        record["first_epoch"] = "shuffled"
    return record


def _open_source(settings: TrainSettings, folder: Path) -> Source:
    soft = settings.hard_weight < 1.0
    trained = settings.teacher_model if settings.init_from_teacher_layers else settings.student_model
    if trained is not None:
        require_plain_weights(trained)
    if settings.cache is None:
        assert settings.train_data is not None
        return file_source(
            settings.train_data,
            folder,
            student_model=settings.student_model,
            teacher_model=settings.teacher_model,
            online=soft,
            max_seq_length=settings.max_seq_length,
            device=settings.device,
            chat_turns=settings.chat_turns,
            columns=settings.renamed,
            bad=BadRecords(skipped_file(settings.output_dir), settings.bad_share),
        )
    return cache_source(
        settings.cache,
        DiskCache(settings.copies_folder, int(settings.local_copies_gb * 1e9)),
        soft=soft,
        temperature=settings.temperature,
        tail=settings.tail,
        min_fidelity=settings.min_fidelity,
        same_tokenizer=[str(model) for model in {settings.student_model, settings.teacher_model} - {None}],
    )


def _train(
    settings: TrainSettings,
    arguments: TrainingArguments,
    source: Source,
    record: dict[str, Any],
    checkpoint: Checkpoint | None,
) -> dict[str, float]:
    held = held_out(len(source.examples), settings.eval_fraction, settings.seed)
    run = _run_size(settings, source.amount, len(held), arguments.world_size)
    arguments.max_steps = run.steps()[0]  # counted here only
    finished = checkpoint is not None and checkpoint.step >= arguments.max_steps
    if finished:
        after = finished_student(settings.output_dir, record)
        end = f"{settings.output_dir}: finished: all {arguments.max_steps:,} steps are done"
        say(f"{end}; its student is to be saved" if after is None else f"{end} and final/ is saved: nothing to do")
        if after is not None:
            return after
    reports = _trackers(settings, arguments, record, checkpoint)
    model = _make_student(settings, source, arguments.world_size)
    packed = keeps_apart(model) and (source.teacher is None or source.teacher.packs)
    step = _step_size(settings, model, source.longest, arguments.device.type == "cpu")
    if step.on_cpu:
        free_large_blocks()
        if not step.checkpointing:
            keep_products_only(model)
    if arguments.process_index == 0:
        for line in summary(run, step, str(arguments.device), _precision(settings)):
            say(line)
        say("rows: several examples share one if they fit" if packed else "rows: one example each, of similar lengths")
    folder = None if checkpoint is None else checkpoint.folder
    make_output(settings.output_dir)
    with explain_memory(step, settings.output_dir, settings.num_workers):
        interrupt, complete = SaveOnInterrupt(), CompleteCheckpoint(record)
        table = LiveTable(notices(), interrupt.note)
        log = MetricsLog(settings.output_dir, table.show)
        callbacks = [interrupt, table, log, complete, *reports]
        trainer = _trainer(settings, arguments, source, model, held, callbacks, packed=packed)
        trainer.finished = finished
        require_fsdp(trainer)
        table.replace_bar(trainer)
        before = read_before(settings.output_dir) if folder else trainer.evaluate() if len(held) else None
        with table, interrupt, complete.explain_load_errors(folder):
            trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
        interrupt.raise_if_stopped(settings.resume_from_checkpoint)
        after = trainer.evaluate() if len(held) else {}
    _save_final(settings, trainer, record, before, after)
    return after


def _trainer(
    settings: TrainSettings,
    arguments: TrainingArguments,
    source: Source,
    model: PreTrainedModel,
    held: IntArray,
    callbacks: list[TrainerCallback],
    *,
    packed: bool,
) -> DistillationTrainer:
    sampler = BatchSampler(
        source.shard_starts,
        held,
        settings.batch_size,
        settings.seed,
        arguments.process_index,
        arguments.world_size,
        lengths=None if packed else source.lengths(),
        accumulation=settings.gradient_accumulation_steps,
    )
    loss = LossSettings(settings.hard_weight, settings.temperature, source.tail, settings.divergence)
    router = read_router_loss(model, settings.router_aux_loss_coef)
    if router is not None:
        say(f"router loss: added to the total, with the coefficient {router.coefficient:g}")
    make_loss_forward(model, loss, source.teacher, router)
    pad = source.tokenizer.pad_token_id
    collator = Collator(0 if pad is None else pad, source.temperatures, settings.temperature, source.tail, packed)
    return DistillationTrainer(
        model=model,
        args=arguments,
        examples=source.examples,
        sampler=sampler,
        held_out=held.tolist(),
        collator=collator,
        tokenizer=source.tokenizer,
        nonfinite=_stop_on_nonfinite(settings, source.examples, sampler, collator),
        callbacks=callbacks,
    )


def _trackers(
    settings: TrainSettings, arguments: TrainingArguments, record: dict[str, Any], checkpoint: Checkpoint | None
) -> list[TrainerCallback]:
    """Return the trackers' callbacks; the record keeps the id of the W&B run, which a resumed run continues."""
    run_id = checkpoint.record.get("wandb_run_id") if checkpoint else None
    if settings.use_wandb:
        run_id = run_id or new_wandb_id()
    if run_id:
        record["wandb_run_id"] = run_id
    return trackers(
        settings.output_dir,
        settings.wandb_project,
        wandb=settings.use_wandb,
        tensorboard=settings.use_tensorboard,
        trackio=settings.use_trackio,
        wandb_id=run_id,
        reports=arguments.process_index == 0,
    )


def _make_student(settings: TrainSettings, source: Source, ranks: int) -> PreTrainedModel:
    model = make_student(
        config=settings.student_config,
        model=settings.student_model,
        teacher=settings.teacher_model,
        teacher_layers=settings.init_from_teacher_layers,
        seed=settings.seed,
        vocab_size=source.vocab_size,
        longest=source.longest,
        tokenizer=source.tokenizer,
    )
    size = count_parameters(model)
    where = f", on {ranks} ranks" if ranks > 1 else ""
    say(f"student: {size.total:,} parameters, {size.without_embeddings:,} without embeddings{where}")
    require_finite(model, "the student")
    require_known_loss(model)
    if settings.use_gradient_checkpointing:
        require_checkpointing(model)
    return model


def _step_size(settings: TrainSettings, model: PreTrainedModel, longest: int, on_cpu: bool) -> StepSize:
    return StepSize(
        student=shape_of_model(model, "student"),
        longest=longest,
        on_cpu=on_cpu,
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation_steps,
        checkpointing=settings.use_gradient_checkpointing,
        mixed=settings.use_mixed_precision,
        from_cache=settings.cache is not None,
    )


def _run_size(settings: TrainSettings, data: Amount, held: int, ranks: int) -> RunSize:
    batches = -(-(data.examples - held) // (settings.batch_size * ranks))
    accumulation = settings.gradient_accumulation_steps
    return RunSize(data, held, batches, ranks, accumulation, settings.epochs, settings.max_steps)


def _precision(settings: TrainSettings) -> str:
    return f"{settings.mixed_precision_dtype} mixed" if settings.use_mixed_precision else "float32"


def _stop_on_nonfinite(
    settings: TrainSettings, examples: Dataset[TrainingExample], sampler: BatchSampler, collator: Collator
) -> StopOnNonFinite:
    return StopOnNonFinite(
        settings.output_dir,
        step_examples=sampler.step_examples,
        held_out=sampler.left_out,
        label_is_finite=lambda index: labels_are_finite(collator([examples[index]])),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        fp16=settings.use_mixed_precision and settings.mixed_precision_dtype == "fp16",
        resumed_from=settings.resume_from_checkpoint,
    )


def _save_final(
    settings: TrainSettings,
    trainer: DistillationTrainer,
    record: dict[str, Any],
    before: dict[str, float] | None,
    after: dict[str, float],
) -> None:
    final = settings.output_dir / FINAL
    logits = trainer.student_logits()
    with explain_save_errors(settings.output_dir):
        trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        sharded, on_cpu = trainer.is_fsdp_enabled, trainer.args.device.type == "cpu"
        require_saved(final, logits, None if sharded else trainer.model, exact=on_cpu and not sharded)
        (final / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should have to load
        write_json(final / SETTINGS_FILE, record)
        write_json(settings.output_dir / ENDS_FILE, {"before": before, "after": after})
        if after:
            results().print(ends_table(before, after, settings.temperature, divergence_name(record)))
        say(f"student -> {final}")


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
        use_cpu=settings.device == "cpu",
        **{checkpointing: settings.use_gradient_checkpointing},
        report_to="none",  # trackers() reports instead
        project=settings.wandb_project,
        run_name=settings.wandb_run_name,
        seed=settings.seed,
        remove_unused_columns=False,
    )
