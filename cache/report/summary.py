"""What a cache holds in at most ten lines; ``info.render`` says all of it."""

from collections.abc import Iterator

from logitcask.cache.exact.head import GROUP
from logitcask.cache.manifest import metadata_values
from logitcask.cache.report.info import KINDS, LABEL_PARTS, UNKNOWN, CacheInfo


def summarize(info: CacheInfo) -> str:
    """Return the figures that decide how a cache is used, as lines of text."""
    return "\n".join(f"{label:<12}{text}" for label, text in [*_identity(info), *_labels(info)])


def _identity(info: CacheInfo) -> Iterator[tuple[str, str]]:
    manifest, data, label = info.manifest, info.manifest.data, info.manifest.label
    count, done = manifest.shards.count, info.shards_committed
    shards = f"{count:,} {'shard' if count == 1 else 'shards'}, all committed"
    if done < count:
        shards = f"{done:,} of {count:,} shards committed: not finished"
    if manifest.part:
        shards += f" (shards {manifest.part.first:,} to {manifest.part.first + count:,} of {manifest.part.of:,})"
    yield "cache", f"{info.path}, format {manifest.format_version}, {shards}"
    yield "teacher", f"{manifest.teacher.id}, {manifest.teacher.dtype}, {manifest.teacher.engine}"
    cut = f"; {data.truncated:,} truncated at {data.max_seq_length:,}" if data.truncated else ""
    dropped = f"; {data.dropped:,} dropped" if data.dropped else ""
    counts = f"{data.examples:,} examples, {data.tokens:,} tokens, {data.positions:,} target positions"
    yield "data", f"{counts}{cut}{dropped}"
    if columns := metadata_values(manifest):
        yield (
            "columns",
            "; ".join(f"{name}, {len(v):,} {'value' if len(v) == 1 else 'values'}" for name, v in columns.items()),
        )
    unknown = f"; not known: {', '.join(UNKNOWN[each] for each in label.unknown)}" if label.unknown else ""
    at = ", ".join(f"{t:g}" for t in label.temperatures)
    yield (
        "label",
        f"{label.entries}, of {label.vocab_size:,} tokens, T={at}{unknown}",
    )
    if (part := manifest.teacher_tokenizer) is not None:
        count = part.aligned + part.straddling + part.unlabelled
        kinds = ", ".join(f"{getattr(part, kind) / count:.1%} {kind}" for kind in KINDS)
        bits = "; bits per byte {:.3f}, by projection alone {:.3f}".format(*info.projection) if info.projection else ""
        yield "vocabulary", f"the student's; positions {kinds}{bits}"
    yield "size", _size(info)


def _size(info: CacheInfo) -> str:
    size = f"{info.bytes / 1e6:,.2f} MB" if info.bytes < 1e9 else f"{info.bytes / 1e9:,.2f} GB"
    if not info.bytes_per_position:
        return size
    labels = sum(size for name, size in info.bytes_by_array.items() if name.startswith(LABEL_PARTS))
    parts = {"labels": labels, "text": sum(info.bytes_by_array.values()) - labels}
    if GROUP in info.bytes_beside:
        parts["teacher's head"] = info.bytes_beside[GROUP]
    parts["tokenizer and metadata"] = sum(info.bytes_beside.values()) - info.bytes_beside.get(GROUP, 0)
    shares = ", ".join(f"{part / info.positions:,.1f} {name}" for name, part in parts.items())
    return f"{size}, {info.bytes_per_position:,.1f} bytes per target position: {shares}"


def _labels(info: CacheInfo) -> Iterator[tuple[str, str]]:
    """Yield the lines on the sampled labels and the certificate, a figure per temperature."""
    if info.labels is not None:
        labels, exact = info.labels, info.manifest.label.exact is not None
        yield "mass", f"the head holds {_by(labels.temperatures, [f'{mass:.1%}' for mass in labels.captured_mass])}"
        bound, entropies = "at least " * labels.entropy_is_bound, [f"{entropy:.3f}" for entropy in labels.entropy]
        if not exact:  # whose bound is far from it
            yield "entropy", f"{bound}{_by(labels.temperatures, entropies)}, of the teacher, in nats"
        if info.manifest.label.knows("gold"):
            yield "perplexity", f"{labels.gold_perplexity:.2f}, the teacher's on the text"
    angles = [f"{at.label.degrees:.2f}°" for at in info.fidelity]
    measured = f"angle of the gradient to the exact one {_by([at.temperature for at in info.fidelity], angles)}"
    if info.divergence:
        figures = [f"{kl:.2g}" for kl in info.divergence]
        measured += f"; KL from the teacher {_by(info.manifest.label.temperatures, figures)} nats"
    yield "fidelity", measured if angles else "not measured: see --fidelity-positions"


def _by(temperatures: list[float], figures: list[str]) -> str:
    return ", ".join(f"{figure} at T={t:g}" for t, figure in zip(temperatures, figures, strict=True))
