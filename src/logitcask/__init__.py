"""Offline logit distillation: run the teacher once into a cache of sparse soft labels, train students from it."""

import importlib
from typing import Any

_MODULES = {
    "cache.labels": ("SoftLabels",),
    "pipeline.train.loss": ("Distillation", "kd_loss", "kd_loss_from_logits"),
    "pipeline.train.mixin": ("DistillationMixin",),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"logitcask.{module}"), name)
    raise AttributeError(f"module 'logitcask' has no attribute {name!r}")
