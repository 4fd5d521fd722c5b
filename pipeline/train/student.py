"""The student of a run of stage 2: made before its first step, saved and checked after its last."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import IntArray
from logitcask.pipeline.console import results, say
from logitcask.pipeline.models import adapters
from logitcask.pipeline.models.adapters import add_lora, four_bits
from logitcask.pipeline.models.load import (
    DTYPES,
    forget_quantization,
    load_causal_lm,
    probe_logits,
    require_finite,
    require_saved,
    stored_dtype,
    trained_parameters,
    weights_fingerprint,
)
from logitcask.pipeline.models.losses import read_router_loss, require_known_loss
from logitcask.pipeline.models.recompute import require_checkpointing
from logitcask.pipeline.models.shapes import shape_of_model
from logitcask.pipeline.models.students.choose import PROBE_TOKENS, choose_layers
from logitcask.pipeline.models.students.student import cast, freeze, make_student
from logitcask.pipeline.runs.run_folder import (
    ENDS_FILE,
    FINAL,
    SETTINGS_FILE,
    divergence_name,
    ends_table,
    explain_save_errors,
    write_json,
)
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.text.tokenizer import make_loadable
from logitcask.pipeline.train.memory_advice import StepSize
from logitcask.pipeline.train.publish import CARD, model_card
from logitcask.pipeline.train.resume.choose import Checkpoint
from logitcask.pipeline.train.resume.identity import BASE_WEIGHTS
from logitcask.pipeline.train.sources.source import Source


def student_of_run(
    settings: TrainSettings,
    source: Source,
    held: IntArray,
    longest: int,
    arguments: TrainingArguments,
    record: dict[str, Any],
    checkpoint: Checkpoint | None,
) -> PreTrainedModel:
    """Return the student as its run begins, in training parts of it or an adapter if asked.

    ``held``: the examples that are held out; ``longest``: the tokens of the longest one that it has to take.
    The record keeps the layers of a teacher that were chosen, and the fingerprint of the weights that an adapter
    belongs to. Raises LogitcaskError if the student
    cannot be made or trained, or the adapter to resume was trained on other weights.
    """
    model = make_student(
        config=settings.student_config,
        model=settings.student_model,
        teacher=settings.teacher_model,
        teacher_layers=lambda teacher: _layers_of_run(teacher, settings, source, held, arguments, record),
        seed=settings.seed,
        vocab_size=source.vocab_size,
        longest=longest,
        tokenizer=source.tokenizer,
        dtype=DTYPES[settings.student_dtype],
        attention=settings.attn_implementation,
        loading={**settings.loading, "quantization": four_bits() if settings.load_in_4bit else None},
    )
    require_finite(model, "the student")
    require_known_loss(model)
    if settings.use_gradient_checkpointing:
        require_checkpointing(model)
    if settings.lora_rank is not None:
        assert settings.student_model is not None
        _note_base(record, checkpoint, weights_fingerprint(model))
        set_seed(settings.seed)
        add_lora(
            model,
            settings.student_model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha or 2.0 * settings.lora_rank,
            dropout=settings.lora_dropout,
            targets=settings.lora_target_modules,
            revision=settings.student_revision,
        )
    if settings.freeze is not None:
        freeze(model, settings.freeze)
    return model


def _layers_of_run(
    teacher: PreTrainedModel,
    settings: TrainSettings,
    source: Source,
    held: IntArray,
    arguments: TrainingArguments,
    record: dict[str, Any],
) -> str:
    """Return the layers of the teacher that the student begins with, the same on each rank, and note them."""
    if settings.layers_to_choose is not None:
        places = np.setdiff1d(np.arange(source.amount.examples), held)
        wanted = math.ceil(PROBE_TOKENS * source.amount.examples / source.amount.tokens)
        taken = places[np.linspace(0, len(places) - 1, min(wanted, len(places))).astype(int)]
        examples = [source.examples[int(place)].encoded for place in taken]
        chosen = [choose_layers(teacher.to(arguments.device), examples, settings.layers_to_choose)]
        broadcast_object_list(chosen)  # rounding may differ between devices
        teacher.cpu()
        record["init_from_teacher_layers"] = ",".join(map(str, chosen[0]))
    return str(record["init_from_teacher_layers"])


def _note_base(record: dict[str, Any], checkpoint: Checkpoint | None, fingerprint: str) -> None:
    """Note the base of an adapter in the record. Raises LogitcaskError if a checkpoint's had other weights."""
    record[BASE_WEIGHTS] = fingerprint
    if checkpoint is not None and checkpoint.record.get(BASE_WEIGHTS) != fingerprint:
        raise LogitcaskError(
            f"{checkpoint.folder}: its adapter was trained on other weights than --student-model "
            f"{record['student_model']} has now: give the model that the run began with"
        )


def step_size(
    settings: TrainSettings, model: PreTrainedModel, longest: int, on_cpu: bool, teacher_bytes: int
) -> StepSize:
    """Return what determines the memory of a step of this student."""
    router = read_router_loss(model, settings.router_aux_loss_coef)
    return StepSize(
        student=shape_of_model(model, "student"),
        trained=trained_parameters(model),
        longest=longest,
        on_cpu=on_cpu,
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation_steps,
        checkpointing=bool(settings.use_gradient_checkpointing),
        mixed=bool(settings.use_mixed_precision),
        from_cache=settings.cache is not None,
        teacher_bytes=teacher_bytes,
        in_parts=on_cpu and settings.cache is not None and router is None,
    )


def save_final(
    settings: TrainSettings,
    trainer: Trainer,
    logits: Tensor,
    source: Source,
    record: dict[str, Any],
    ends: dict[str, dict[str, float] | None],
) -> None:
    """Save the student to ``final/`` and check that it loads as what was trained; write and show the evaluations.

    ``logits``: the student's in memory, on the probe; ``ends``: the evaluations before and after, and ``best``, the
    step of the best one and its loss, if the run knows.

    Raises LogitcaskError if it cannot be saved, or loads as another one.
    """
    final = settings.output_dir / FINAL
    with explain_save_errors(settings.output_dir):
        trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        sharded, on_cpu = trainer.is_fsdp_enabled, trainer.args.device.type == "cpu"
        dtype = _final_dtype(settings)
        if settings.merge_lora or (settings.lora_rank is None and dtype != trainer.model.dtype):
            merged = _save_again(final, trainer.model, source, dtype, settings.trust_remote_code)
            logits = merged if settings.load_in_4bit else logits  # those in memory are of a rounded base
        compared = None if sharded or settings.merge_lora else trainer.model
        whole = dtype == trainer.model.dtype == torch.float32 and not settings.load_in_4bit
        require_saved(
            final,
            logits,
            compared,
            exact=on_cpu and not sharded and whole,
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            quantization=adapters.four_bits() if settings.load_in_4bit and not settings.merge_lora else None,
        )
        record["save_dtype"] = str(dtype).removeprefix("torch.")
        (final / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should have to load
        write_json(final / SETTINGS_FILE, record)
        settings = settings.model_copy(update={"init_from_teacher_layers": record["init_from_teacher_layers"]})
        card = model_card(settings, source, record, ends)
        (final / CARD).write_text(card, encoding="utf-8")
        write_json(settings.output_dir / ENDS_FILE, ends)
        if after := ends["after"]:
            results().print(ends_table(ends["before"], after, settings.temperatures.last, divergence_name(record)))
        say(str(final), "done")


def _final_dtype(settings: TrainSettings) -> torch.dtype:
    """Return the dtype of the weights in ``final/``: as asked, or the one in which the student is stored elsewhere."""
    if settings.save_dtype is not None:
        return DTYPES[settings.save_dtype]
    if settings.student_model is not None:
        return stored_dtype(settings.student_model, **settings.loading)
    if settings.init_from_teacher_layers is not None:
        return stored_dtype(str(settings.teacher_model))
    return DTYPES[settings.student_dtype]


def _save_again(folder: Path, trained: PreTrainedModel, source: Source, dtype: torch.dtype, own_code: bool) -> Tensor:
    """Replace what was saved to a folder by a whole model in ``dtype``; an adapter is merged in float32.

    Return its logits on the probe.
    """
    model = load_causal_lm(str(folder), dtype=torch.float32, trust_remote_code=own_code)
    config, generation = trained.config, trained.generation_config
    for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
        (folder / name).unlink(missing_ok=True)
    model.config, model.generation_config = deepcopy(config), generation
    forget_quantization(model)  # of the weights in training
    cast(model, dtype)
    model.save_pretrained(folder)
    make_loadable(source.tokenizer, folder)
    return probe_logits(model)
