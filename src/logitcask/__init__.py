"""Offline logit distillation: run the teacher once into a cache of sparse soft labels, train students from it.

    import logitcask as lc

What stands in ``__all__`` is public and stays; everything else may move. Names are loaded when they are first used, and
reading and writing caches needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcask.cache.errors import CacheFormatError, CacheMismatchError, IncompleteCacheError, LogitcaskError
    from logitcask.cache.labels import Example, SoftLabels, SparseTargets
    from logitcask.cache.manifest import LabelSettings
    from logitcask.cache.report.info import CacheInfo
    from logitcask.library.caches import Cache, open
    from logitcask.library.create import Writer, create
    from logitcask.library.labelling import label_settings, sparsify
    from logitcask.library.mix import Mix, mix
    from logitcask.library.training import loader
    from logitcask.pipeline.batches.loader import Loader
    from logitcask.pipeline.train.distillation import Distillation
    from logitcask.pipeline.train.loss import kd_loss, kd_loss_from_logits
    from logitcask.pipeline.train.mixin import DistillationMixin

__all__ = [
    "Cache",
    "CacheFormatError",
    "CacheInfo",
    "CacheMismatchError",
    "Distillation",
    "DistillationMixin",
    "Example",
    "IncompleteCacheError",
    "LabelSettings",
    "Loader",
    "LogitcaskError",
    "Mix",
    "SoftLabels",
    "SparseTargets",
    "Writer",
    "create",
    "kd_loss",
    "kd_loss_from_logits",
    "label_settings",
    "loader",
    "mix",
    "open",
    "sparsify",
]

_MODULES = {
    "cache.errors": ("CacheFormatError", "CacheMismatchError", "IncompleteCacheError", "LogitcaskError"),
    "cache.labels": ("Example", "SoftLabels", "SparseTargets"),
    "cache.manifest": ("LabelSettings",),
    "cache.report.info": ("CacheInfo",),
    "library.caches": ("Cache", "open"),
    "library.create": ("Writer", "create"),
    "library.labelling": ("label_settings", "sparsify"),
    "library.mix": ("Mix", "mix"),
    "library.training": ("loader",),
    "pipeline.batches.loader": ("Loader",),
    "pipeline.train.distillation": ("Distillation",),
    "pipeline.train.loss": ("kd_loss", "kd_loss_from_logits"),
    "pipeline.train.mixin": ("DistillationMixin",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'logitcask' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"logitcask.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
