"""What a cache holds, as figures and as text: the output of ``logitcask cache info``."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel
from zarr.abc.store import Store

from logitcask.cache.errors import shown
from logitcask.cache.exact.head import GROUP
from logitcask.cache.fidelity import BATCH, Fidelity, divergences, figures
from logitcask.cache.integrity import committed_shards
from logitcask.cache.layout import array_specs
from logitcask.cache.manifest import LabelSettings, MadeBy, Manifest, metadata_values
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.label_figures import ExampleFigures, LabelFigures, fidelity_of, label_figures
from logitcask.cache.storage.open import object_sizes, open_store

LABEL_PARTS = ("head_", "tail_", "log_", "gold_", "hidden_", "fidelity")  # prefixes of the names of label arrays
KINDS = ("aligned", "straddling", "unlabelled")  # of target positions in another vocabulary than the teacher's
UNKNOWN = {"rest": "the mass outside the head", "gold": "next tokens outside the head"}


class FidelityFigures(BaseModel):
    """Errors of gradients at one temperature, see ``cache.fidelity``."""

    temperature: float
    label: Fidelity
    top_k_renormalized: Fidelity  # of as many most probable tokens as a label has entries


class Makers(BaseModel):
    """How many of the committed shards were labelled by what; None if that is not recorded."""

    made_by: MadeBy | None
    shards: int


class CacheInfo(BaseModel):
    """Figures of one cache. ``bytes`` is the sum of ``bytes_by_array`` and ``bytes_beside``."""

    path: str
    manifest: Manifest
    shards_committed: int
    made_by: list[Makers]  # most shards first
    bytes: int
    bytes_by_array: dict[str, int]  # objects of the shards
    bytes_beside: dict[str, int]  # all other objects, which hardly grow with the labels
    positions: int  # committed; if shards are missing, estimated from the share of examples
    bytes_per_position: float | None  # all bytes; None if nothing is committed
    labels: LabelFigures | None  # of a sample; None if nothing is committed
    fidelity_positions: int  # measured in the committed shards
    fidelity: list[FidelityFigures]  # one per temperature; empty if too few positions were measured
    projection: list[float] | None  # of labels in another vocabulary: bits per byte of the text by label, by projection
    divergence: list[float] | None  # mean KL(teacher || label) per temperature in nats, of exact labels


def describe(place: str | Path | Store) -> CacheInfo:
    """Return the figures of a cache, complete or not. Raises CacheFormatError if it is not a cache, or damaged."""
    store = place if isinstance(place, Store) else open_store(place, read_only=True)
    reader = CacheReader(place, partial=True)
    manifest = reader.manifest
    committed = sorted(committed_shards(store, manifest.shards.count))
    examples = sum(int(reader.shard_starts[s + 1] - reader.shard_starts[s]) for s in committed)
    positions = round(manifest.data.positions * examples / manifest.data.examples)
    sizes = object_sizes(store)
    arrays = {spec.name: 0 for spec in array_specs(manifest.label)}
    beside = {"tokenizer": 0, "digests": 0, "metadata": 0, "other": 0, **({GROUP: 0} if manifest.teacher_head else {})}
    for key, size in sizes.items():
        name = key.split("/")[0]
        if name in arrays and not key.endswith("zarr.json"):
            arrays[name] += size
        else:
            beside[_part(key)] += size
    total = sum(sizes.values())
    temperatures = manifest.label.temperatures
    sums = fidelity_of(reader, committed)
    return CacheInfo(
        path=str(place),
        manifest=manifest,
        shards_committed=len(committed),
        made_by=_makers(reader, committed),
        bytes=total,
        bytes_by_array=arrays,
        bytes_beside=beside,
        positions=positions,
        bytes_per_position=total / positions if positions else None,
        labels=label_figures(reader, committed),
        fidelity_positions=int(sums.positions),
        fidelity=[
            FidelityFigures(temperature=t, label=label, top_k_renormalized=top)
            for t, (label, top) in zip(temperatures, figures(sums, len(temperatures)) or [], strict=False)
        ],
        projection=_bits_per_byte(reader, committed),
        divergence=divergences(sums, len(temperatures)),
    )


def _bits_per_byte(reader: CacheReader, shards: Sequence[int]) -> list[float] | None:
    """Return the bits per byte of the labelled text by the labels, and by projection alone."""
    if reader.manifest.teacher_tokenizer is None or not shards:
        return None
    size, *nats = (float(sum(parts)) for parts in zip(*map(reader.shard_projection, shards), strict=True))
    return [each / size / math.log(2) for each in nats] if size else None


def _makers(reader: CacheReader, shards: Sequence[int]) -> list[Makers]:
    made_by = [reader.made_by(shard) for shard in shards]
    counts = Counter("" if each is None else each.model_dump_json() for each in made_by)
    parsed = {"" if each is None else each.model_dump_json(): each for each in made_by}
    return [Makers(made_by=parsed[key], shards=count) for key, count in counts.most_common()]


def _part(key: str) -> str:
    """Return what kind of object outside the label and text arrays this is, as a key of ``bytes_beside``."""
    name = key.split("/", maxsplit=1)[0]
    if name == "tokenizer":
        return "tokenizer"
    if key.endswith("zarr.json") or name == "made_by":
        return "metadata"
    if name == GROUP:
        return name
    return "digests" if name in ("commits", "seal", "shard_examples") else "other"


def render(info: CacheInfo) -> str:
    """Return the figures as lines of text."""
    labels = _labels(info.labels, info.manifest.label) if info.labels else []
    return "\n".join([*_identity(info), *_sizes(info), *_fidelity(info), *labels])


def _identity(info: CacheInfo) -> Iterator[str]:
    m, label, data = info.manifest, info.manifest.label, info.manifest.data
    count, missing = m.shards.count, m.shards.count - info.shards_committed
    state = f"{info.shards_committed:,} of {count:,} committed: not finished" if missing else "all committed"
    temperatures = ", ".join(f"{t:g}" for t in label.temperatures)
    yield f"cache       {info.path}, format {m.format_version}"
    yield f"teacher     {m.teacher.id} ({m.teacher.dtype}, {m.teacher.engine}), revision {m.teacher.revision or 'none'}"
    yield f"            weights {m.teacher.weights[:12]}"
    yield from _made_by(info)
    yield f"tokenizer   {label.vocab_size:,} tokens, fingerprint {m.tokenizer.fingerprint[:12]}"
    yield from _other_vocabulary(info)
    yield f"data        {data.examples:,} examples, {data.tokens:,} tokens, {data.positions:,} target positions"
    yield f"            fingerprint {data.fingerprint[:12]}; at most {data.max_seq_length:,} tokens per example"
    yield f"            {data.truncated:,} examples truncated, {data.dropped:,} dropped"
    if data.date:
        yield f"            the chat template writes the date: {data.date}"
    for column, values in metadata_values(m).items():
        yield f"            {column}: {len(values):,} values, {', '.join(map(shown, values[:3]))}"
    if data.chat_template_kwargs:
        yield f"            values given to the chat template: {data.chat_template_kwargs}"
    yield f"label       {label.entries}, temperatures {temperatures}, seed {label.seed}"
    if label.unknown:
        yield f"            not known: {', '.join(UNKNOWN[each] for each in label.unknown)}"
    part = f" (shards {m.part.first:,} to {m.part.first + count:,} of {m.part.of:,})" if m.part else ""
    yield f"shards      {count:,}, {state}{part}"


def _other_vocabulary(info: CacheInfo) -> Iterator[str]:
    """Yield what is known of labels in another vocabulary than the teacher's."""
    part = info.manifest.teacher_tokenizer
    if part is None:
        return
    count = part.aligned + part.straddling + part.unlabelled
    shares = [f"{getattr(part, kind) / count:.1%} {kind}" for kind in KINDS]
    yield f"            the student's; the teacher's has {part.vocab_size:,}, fingerprint {part.fingerprint[:12]}"
    yield f"            target positions: {', '.join(shares)}"
    if info.projection:
        bits = "{:.3f} by the labels, the teacher's own; {:.3f} by projection alone".format(*info.projection)
        yield f"            bits per byte of the text: {bits}"


def _made_by(info: CacheInfo) -> Iterator[str]:
    """Yield a line on what labelled the shards, or one for each of several that differ."""
    heading = "made by     "
    for makers in info.made_by:
        by = makers.made_by
        text = "not recorded" if by is None else ", ".join(f"{name} {version}" for name, version in by.versions.items())
        text += f" on {by.device}" if by and by.device else ""
        yield f"{heading}{text}" + (f" ({makers.shards:,} shards)" if len(info.made_by) > 1 else "")
        heading = " " * 12


def _sizes(info: CacheInfo) -> Iterator[str]:
    labels = {name: size for name, size in info.bytes_by_array.items() if name.startswith(LABEL_PARTS)}
    tokens = {name: size for name, size in info.bytes_by_array.items() if name not in labels}
    per_position = f", {info.bytes_per_position:.1f} per target position" if info.bytes_per_position else ""
    yield f"size        {info.bytes:,} bytes{per_position}"
    for group, sizes in (("labels", labels), ("text", tokens), ("rest", info.bytes_beside)):
        yield _size(f"  {group}", sum(sizes.values()), info.positions)
        for name, size in sizes.items():
            if size:
                yield _size(f"    {name}", size, info.positions)


def _size(name: str, size: int, positions: int) -> str:
    return f"{name:20s}{size:15,}" + (f"{size / positions:10.2f} per position" if positions else "")


def _fidelity(info: CacheInfo) -> Iterator[str]:
    """Yield the lines of the certificate, two per temperature."""
    if not info.fidelity:
        yield f"fidelity    too few positions were measured ({info.fidelity_positions}): see --fidelity-positions"
        return
    yield (
        f"fidelity    gradient of a linear probe student over {BATCH:,} positions, compared with the exact one; "
        f"measured on {info.fidelity_positions:,} positions"
    )
    if info.divergence:
        at_each = ", ".join(
            f"{kl:.2g} at T={t:g}" for kl, t in zip(info.divergence, info.manifest.label.temperatures, strict=True)
        )
        yield f"            mean KL of the label from the teacher, nats: {at_each}"
    entries = info.manifest.label.head_size + info.manifest.label.tail_draws
    for at in info.fidelity:
        for name, fidelity in (("labels", at.label), (f"top-{entries} renormalised", at.top_k_renormalized)):
            measurable = fidelity.bias > fidelity.bias_floor
            bias = f"bias {fidelity.bias:6.1%}" if measurable else f"bias < {fidelity.bias_floor:4.1%}"
            errors = f"{bias}, noise {fidelity.noise:6.1%}, angle {fidelity.degrees:5.2f} degrees"
            yield f"  T={at.temperature:<6g}{name:24s}{errors}"


def _labels(labels: LabelFigures, label: LabelSettings) -> Iterator[str]:
    """Yield the lines on the sampled labels, one per temperature, then the figures over all."""
    bound = "at least " if labels.entropy_is_bound else ""
    shards = "shard" if labels.shards == 1 else f"{labels.shards:,} shards"
    yield (
        f"sample      {labels.positions:,} positions of {labels.examples:,} examples from the first committed "
        f"{shards}; all that follows is over this sample"
    )
    for temperature, mass, entropy in zip(labels.temperatures, labels.captured_mass, labels.entropy, strict=True):
        yield f"  T={temperature:<8g}head holds {mass:6.1%} of the mass, teacher's entropy {bound}{entropy:.3f} nats"
    if not label.exact:
        yield f"tail        {labels.distinct_tail_draws:.1f} distinct draws per position"
    if label.knows("gold"):
        yield f"perplexity  {labels.gold_perplexity:.2f}, the teacher's on the text"
    at = f"T={labels.certainty_temperature:g}"
    yield from _examples(f"most certain examples (index, mean entropy at {at}, beginning)", labels.most_certain)
    yield from _examples("least certain", labels.least_certain)


def _examples(title: str, examples: list[ExampleFigures]) -> Iterator[str]:
    yield title
    for example in examples:
        yield f"  {example.index:8d}  {example.entropy:6.3f}  {example.text}"
