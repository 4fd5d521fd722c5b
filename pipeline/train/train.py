"""Stage 2: train a student from the cache, on transformers.Trainer, with no teacher in memory.

The events of an optimizer step, in order, and the file that owns each (1 to 3 may run ahead, in worker processes):

 1. the sampler picks the step's examples, the same for any number of ranks     batches.BatchSampler
 2. their tokens and labels are read from the cache                             batches.CacheExamples
 3. examples are packed into rows, labels brought to the temperature            batches.Collator
 4. the step's target positions are counted over its batches and all ranks      mixin.DistillationMixin
 5. per batch, the student's layers run, then the fused loss on hidden states   loss.make_loss_forward
 6. the loss is divided by the count of 4, then the backward pass runs          mixin.DistillationMixin
 7. the gradient is clipped and the weights are updated                         transformers.Trainer
 8. a pending interrupt requests a checkpoint and the end of the run            callbacks/interrupt
 9. a non-finite loss or gradient stops the run                                 callbacks/nonfinite
10. the log line, if due, is written and shown                                  callbacks/metrics_log, live_table
11. the same line goes to the trackers                                          callbacks/trackers
12. the held-out examples are evaluated, if due                                 trainer.DistillationTrainer
13. the checkpoint is saved, if due, its settings last                          resume.CompleteCheckpoint
"""

import os
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from logitcask.cache.labels import IntArray
from logitcask.cache.storage.staging import temporary_folder
from logitcask.pipeline.batches.collate import Collator, Examples, labels_are_finite
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.mixture import Mixture
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.console import announce, notices, say
from logitcask.pipeline.machine import free_memory, why_slow
from logitcask.pipeline.models.head import keeps_apart
from logitcask.pipeline.models.losses import LossSettings, load_loss, read_router_loss
from logitcask.pipeline.models.recompute import keep_products_only
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.runs.run_folder import divergence_name, read_before
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.arguments import CHECKPOINTING, WARMUP, WARMUP_SHARE, training_arguments, with_defaults
from logitcask.pipeline.train.callbacks.best import BestSoFar, stopped_early
from logitcask.pipeline.train.callbacks.interrupt import SaveOnInterrupt
from logitcask.pipeline.train.callbacks.live_table import LiveTable
from logitcask.pipeline.train.callbacks.metrics_log import MetricsLog
from logitcask.pipeline.train.callbacks.nonfinite import Labels, StopOnNonFinite
from logitcask.pipeline.train.callbacks.trackers import new_wandb_id, trackers
from logitcask.pipeline.train.memory_advice import (
    RunSize,
    StepSize,
    checkpointing_reason,
    explain_memory,
    loss_words,
    shares,
    summary,
)
from logitcask.pipeline.train.publish import push, require_repository
from logitcask.pipeline.train.resume.choose import Checkpoint, choose_checkpoint, finished_student
from logitcask.pipeline.train.resume.extend import extension
from logitcask.pipeline.train.resume.saving import CompleteCheckpoint, sole_run
from logitcask.pipeline.train.selection import Selection
from logitcask.pipeline.train.sources.open import open_held_out, open_source
from logitcask.pipeline.train.sources.source import Source
from logitcask.pipeline.train.student import save_final, step_size, student_of_run
from logitcask.pipeline.train.trainer import DistillationTrainer, HeldOut, fsdp_requested, require_fsdp


def run_training(settings: TrainSettings) -> dict[str, float]:
    """Train and save a student; return the last evaluation. Raises LogitcaskError for anything that a user can fix.

    A finished run that is resumed trains nothing; what it lacks of its results is saved.
    """
    if settings.loss is not None:
        load_loss(settings.loss)  # before anything that takes time
    settings, why_rate = with_defaults(settings)
    arguments = training_arguments(settings)
    if settings.push_to_hub is not None and arguments.process_index == 0:
        require_repository(settings.push_to_hub, arguments)
    with temporary_folder(f"{settings.output_dir.absolute()} {arguments.process_index}") as folder:
        source = open_source(settings, folder)
        evaluated = open_held_out(settings, source)
        record = run_record(settings, source, arguments.world_size, evaluated)
        checkpoint = choose_checkpoint(
            settings.output_dir,
            settings.resume_from_checkpoint,
            record,
            fsdp=fsdp_requested(),
            extend=settings.extend,
        )
        with sole_run(settings.output_dir) if arguments.process_index == 0 else nullcontext():
            after = _train(settings, arguments, source, evaluated, record, checkpoint, why_rate)
    if settings.push_to_hub is not None and arguments.process_index == 0:
        push(settings.push_to_hub, settings.output_dir, arguments)
    return after


def run_record(
    settings: TrainSettings, source: Source, world_size: int, evaluated: Source | None = None
) -> dict[str, Any]:
    """Return what is stored with checkpoints and ``final/``: the settings as resolved, and what they were used on."""
    record = {**settings.model_dump(mode="json"), "tail": source.tail, "source": source.identity}
    record["world_size"] = world_size
    if evaluated is not None:
        record["eval_source"] = evaluated.identity
    if not settings.chat_template_kwargs:  # earlier versions did not have them
        del record["chat_template_kwargs"]
    if settings.seed:  # earlier versions left the first epoch in the cache's order for any seed, as seed 0 still does
        record["first_epoch"] = "shuffled"
    return record


def _train(
    settings: TrainSettings,
    arguments: TrainingArguments,
    source: Source,
    evaluated: Source | None,
    record: dict[str, Any],
    checkpoint: Checkpoint | None,
    why_rate: str,
) -> dict[str, float]:
    held = source.held_out(settings.held_out_fraction(source.amount.examples), settings.seed)
    mixture = source.mixture(held)
    run = _run_size(settings, source.amount, len(held), evaluated, mixture, arguments.world_size)
    _set_steps(arguments, settings, run)
    longer = extension(checkpoint, arguments.max_steps, record)
    finished = None if checkpoint is None else _end_of(checkpoint, arguments.max_steps, settings)
    if finished is not None and (ended := _ended(settings, arguments, record, finished)) is not None:
        return ended
    reports = _trackers(settings, arguments, record, checkpoint)
    longest = max(source.longest, evaluated.longest if evaluated else 0)
    model = student_of_run(settings, source, held, longest, arguments, record, checkpoint)
    packed = keeps_apart(model) and (source.teacher is None or source.teacher.packs)
    step = step_size(settings, model, source.longest, arguments.device.type == "cpu", source.teacher_bytes)
    half = settings.use_mixed_precision or settings.student_dtype == "bfloat16"
    memory = [("note", slow)] if half and (slow := why_slow(torch.bfloat16, arguments.device)) else []
    if settings.use_gradient_checkpointing is None and (reason := _why_checkpoint(step, model, arguments)):
        step = replace(step, checkpointing=True)
        setattr(arguments, CHECKPOINTING, True)
        memory.append(("memory", reason))
    record["use_gradient_checkpointing"] = step.checkpointing
    if step.on_cpu and not step.checkpointing and not settings.torch_compile:
        keep_products_only(model)
    if arguments.process_index == 0:
        loss = loss_words(settings, divergence_name(record), why_rate)
        where, free = f"{_precision(settings)} on {arguments.device}", free_memory(arguments.device)
        chosen = settings.model_copy(update={"init_from_teacher_layers": record["init_from_teacher_layers"]})
        lines = summary(chosen, run, step, where=where, free=free, packed=packed, loss=loss)
        for label, text in [*lines, *shares(mixture), *memory]:
            say(text, label)
    folder = None if checkpoint is None else checkpoint.folder
    with explain_memory(step, settings.output_dir, settings.num_workers):
        interrupt, complete = SaveOnInterrupt(), CompleteCheckpoint(record)
        best = BestSoFar(settings.early_stopping_patience, extended=bool(longer)) if settings.watches_best else None
        table = LiveTable(notices(), arguments.max_steps, lambda: interrupt.note() or (best.note() if best else ""))
        callbacks = [interrupt, table, MetricsLog(settings.output_dir, table.show), complete]
        callbacks += [*([best] if best else []), *longer, *reports]
        trainer = _trainer(settings, arguments, source, evaluated, model, held, mixture, callbacks, packed=packed)
        trainer.finished = finished is not None
        require_fsdp(trainer)
        table.replace_bar(trainer)
        before = read_before(settings.output_dir) if folder else trainer.evaluate() if settings.evaluates else None
        with table, interrupt, complete.explain_load_errors(folder):
            trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
        interrupt.raise_if_stopped(settings.resume_from_checkpoint)
        after = trainer.evaluated or trainer.evaluate() if settings.evaluates else {}
    ends = {"before": before, "after": after}
    if best is not None:
        best.report(settings.load_best)
        ends |= {"best": best.best} if best.best else {}
    save_final(settings, trainer, trainer.student_logits(), source, record, ends)
    return after


def _set_steps(arguments: TrainingArguments, settings: TrainSettings, run: RunSize) -> None:
    """Set how many steps the run has, how many of them warm up and after which it evaluates, counted here only."""
    arguments.max_steps = run.steps()[0]
    if settings.warmup_steps is None and WARMUP_SHARE not in settings.training_args:
        arguments.warmup_steps = min(WARMUP, arguments.max_steps // 10)
    every = settings.eval_steps or run.eval_steps(at_any_cost=settings.watches_best)
    if every is not None and settings.evaluates:
        arguments.eval_strategy, arguments.eval_steps = IntervalStrategy.STEPS, every


def _ended(
    settings: TrainSettings, arguments: TrainingArguments, record: dict[str, Any], finished: str
) -> dict[str, float] | None:
    """Return the last evaluation of a finished run, None if its student is still to be saved; say which it is."""
    ended = finished_student(settings.output_dir, record)
    if arguments.process_index == 0:
        if ended is None:
            say(f"{settings.output_dir}: {finished}; its student is to be saved")
        else:
            announce(f"{settings.output_dir}: {finished}, final/ is saved; nothing to do", "complete")
    return ended


def _end_of(checkpoint: Checkpoint, steps: int, settings: TrainSettings) -> str | None:
    """Return why a run has nothing left to train, None if it has."""
    if checkpoint.step >= steps:
        return f"all {steps:,} steps are done"
    if not checkpoint.extended and stopped_early(checkpoint.folder, settings.early_stopping_patience):
        return f"it stopped early at step {checkpoint.step:,} of {steps:,}"
    return None


def _why_checkpoint(step: StepSize, model: PreTrainedModel, arguments: TrainingArguments) -> str | None:
    """Return why this step has to recompute activations, on any rank; None if it fits, or the student cannot."""
    if fsdp_requested() or not model.supports_gradient_checkpointing:
        return None  # FSDP divides what a step takes, by its own settings
    device, free = arguments.device, free_memory(arguments.device)
    taken = float(sum(p.nbytes for p in model.parameters())) if step.on_cpu else 0.0  # else it is still to be moved
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if step.on_cpu else 1
    share = torch.tensor([float("inf") if free is None else free / here], device=device)
    least = float(gather(share).min()) if arguments.world_size > 1 else float(share)
    return checkpointing_reason(step, taken, least)


def _trainer(
    settings: TrainSettings,
    arguments: TrainingArguments,
    source: Source,
    evaluated: Source | None,
    model: PreTrainedModel,
    held: IntArray,
    mixture: Mixture | None,
    callbacks: list[TrainerCallback],
    *,
    packed: bool,
) -> DistillationTrainer:
    sampler = source.sampler(
        held,
        mixture,
        settings.batch_size,
        settings.seed,
        rank=arguments.process_index,
        ranks=arguments.world_size,
        accumulation=settings.gradient_accumulation_steps,
        packed=packed,
    )
    if isinstance(source.examples, CacheExamples):
        source.examples.keep(sampler.shards_at_once)
    own = None if settings.loss is None else load_loss(settings.loss)
    router = read_router_loss(model, settings.router_aux_loss_coef)
    if router is not None:
        say(f"its loss is added to the total, with the coefficient {router.coefficient:g}", "router")
    alpha, temperature = settings.alphas.last, settings.temperatures.last  # of evaluations
    collator = source.collator(temperature, packed=packed)
    held_out = HeldOut(source.examples, held.tolist(), collator)
    if evaluated is not None:
        every = list(range(evaluated.amount.examples))
        held_out = HeldOut(evaluated.examples, every, evaluated.collator(temperature, packed=packed))
    return DistillationTrainer(
        model=model,
        args=arguments,
        examples=source.examples,
        sampler=sampler,
        held_out=held_out,
        collator=collator,
        tokenizer=source.tokenizer,
        nonfinite=_stop_on_nonfinite(
            settings, arguments.get_warmup_steps(arguments.max_steps), source.examples, sampler, collator, held_out
        ),
        callbacks=callbacks,
        loss=LossSettings(alpha, temperature, source.tail, settings.divergence, own),
        alphas=settings.alphas,
        temperatures=settings.temperatures,
        teacher=source.teacher,
        router=router,
        selection=None if settings.selection is None else Selection(*settings.selection),
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


def _run_size(
    settings: TrainSettings, data: Amount, held: int, evaluated: Source | None, mixture: Mixture | None, ranks: int
) -> RunSize:
    left = data.examples - held
    examples, positions = (left, data.positions * left / data.examples)
    if mixture is not None:
        examples, positions = mixture.examples, mixture.end
    return RunSize(
        data=data,
        held_out=evaluated.amount.examples if evaluated else held,
        held_out_positions=evaluated.amount.positions if evaluated else data.positions * held / data.examples,
        batches=-(-examples // (settings.batch_size * ranks)),
        examples=examples,
        positions=positions,
        ranks=ranks,
        accumulation=settings.gradient_accumulation_steps,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
    )


def _precision(settings: TrainSettings) -> str:
    return f"{settings.mixed_precision_dtype} mixed" if settings.use_mixed_precision else settings.student_dtype


def _stop_on_nonfinite(
    settings: TrainSettings,
    warmup_steps: int,
    examples: Examples,
    sampler: BatchSampler,
    collator: Collator,
    held_out: HeldOut,
) -> StopOnNonFinite:
    return StopOnNonFinite(
        settings.output_dir,
        step_examples=sampler.step_examples,
        held_out=held_out.places,
        labels=_labels(examples, collator),
        held_out_labels=_labels(held_out.examples, held_out.collator),
        learning_rate=settings.learning_rate or 0.0,
        warmup_steps=warmup_steps,
        fp16=bool(settings.use_mixed_precision) and settings.mixed_precision_dtype == "fp16",
        resumed_from=settings.resume_from_checkpoint,
    )


def _labels(examples: Examples, collator: Collator) -> Labels:
    return Labels(lambda index: labels_are_finite(collator([examples[index]])), examples.describe)
