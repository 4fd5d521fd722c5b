"""What caches must have in common to be mixed. Needs neither torch nor transformers."""

import math
from collections.abc import Sequence

from logitcask.cache.errors import CacheMismatchError, LogitcaskError
from logitcask.cache.manifest import LabelSettings, Manifest


def require_shares(weights: Sequence[float], whose: str) -> None:
    """Raise LogitcaskError unless weights are above 0 and sum to 1."""
    if not all(math.isfinite(weight) and weight > 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise LogitcaskError(f"{whose}: weights must be above 0 and sum to 1, got {given}")


def require_one_tokenizer(names: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise CacheMismatchError if a cache was made with another tokenizer than the first."""
    first = manifests[0]
    for name, manifest in zip(names[1:], manifests[1:], strict=True):
        if (manifest.tokenizer.fingerprint, manifest.label.vocab_size) != (
            first.tokenizer.fingerprint,
            first.label.vocab_size,
        ):
            raise CacheMismatchError(
                f"{name}: was made with another tokenizer than {names[0]}: fingerprints "
                f"{manifest.tokenizer.fingerprint[:12]} and {first.tokenizer.fingerprint[:12]}: mix caches of one "
                "tokenizer"
            )


def common_temperatures(stored: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the temperatures that every cache stores, ascending. Raises CacheMismatchError if there is none."""
    rounded = [{round(t, 6): t for t in temperatures} for temperatures in stored]
    common = sorted(set.intersection(*map(set, rounded)))
    if not common:
        lists = "; ".join(", ".join(f"{t:g}" for t in sorted(each)) for each in rounded)
        raise CacheMismatchError(f"mix: the caches have no temperature in common: they store {lists}: make one anew")
    return tuple(rounded[0][t] for t in common)


def require_one_teacher(names: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise CacheMismatchError unless all caches have exact labels, and of one teacher, whose head reads them."""
    first = manifests[0].teacher
    for name, manifest in zip(names, manifests, strict=True):
        if manifest.label.exact is None:
            raise CacheMismatchError(
                f"{name}: has no exact labels: mix caches of one kind, or take all as sparse ones by a tail of bucket"
            )
        if manifest.teacher.weights != first.weights:
            raise CacheMismatchError(
                f"{name}: its exact labels are of another teacher than those of {names[0]}: {manifest.teacher.id} and "
                f"{first.id}: mix exact labels of one teacher, or take all as sparse ones by a tail of bucket"
            )


def common_tail(labels: Sequence[LabelSettings]) -> str:
    """Return what stands for the mass outside the head by default: what most of the caches can give."""
    if any(label.exact for label in labels):
        return "exact"
    usual = {label.usual_tail for label in labels}
    return next(name for name in ("renormalize", "bucket", "sampled") if name in usual)
