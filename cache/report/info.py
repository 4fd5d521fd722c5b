"""What a cache holds, as figures and as text."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from zarr.abc.store import Store

from logitcask.cache.fidelity import BATCH, Fidelity, figures
from logitcask.cache.integrity import committed_shards
from logitcask.cache.layout import array_specs
from logitcask.cache.manifest import Manifest
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.label_figures import ExampleFigures, LabelFigures, fidelity_of, label_figures
from logitcask.cache.storage.open import object_sizes, open_store

LABEL_PARTS = ("head_", "tail_", "log_", "gold_", "fidelity")  # how the names of arrays of labels begin


class FidelityFigures(BaseModel):
    """How far gradients go astray at a temperature, see ``cache.fidelity``."""

    temperature: float
    label: Fidelity
    top_k_renormalized: Fidelity  # as many most probable tokens as a label has entries


class CacheInfo(BaseModel):
    """Figures of one cache. The bytes by array and beside them sum to ``bytes``."""

    path: str
    manifest: Manifest
    shards_committed: int
    bytes: int
    bytes_by_array: dict[str, int]  # objects of the shards
    bytes_beside: dict[str, int]  # what does not grow with the labels, or hardly
    positions: int  # committed; where shards are missing, in proportion to their examples
    bytes_per_position: float | None  # all bytes; None where nothing is committed
    labels: LabelFigures | None  # of a sample; None where nothing is committed
    fidelity_positions: int  # measured in the committed shards
    fidelity: list[FidelityFigures]  # one a temperature; none where too few positions were measured


def describe(place: str | Path | Store) -> CacheInfo:
    """Read a cache's figures, complete or not. Raises CacheFormatError where it is none or damaged."""
    store = place if isinstance(place, Store) else open_store(place, read_only=True)
    reader = CacheReader(place, partial=True)
    manifest = reader.manifest
    committed = sorted(committed_shards(store, manifest.shards.count))
    examples = sum(int(reader.shard_starts[s + 1] - reader.shard_starts[s]) for s in committed)
    positions = round(manifest.data.positions * examples / manifest.data.examples)
    sizes = object_sizes(store)
    arrays = {spec.name: 0 for spec in array_specs(manifest.label)}
    beside = {"tokenizer": 0, "digests": 0, "metadata": 0, "other": 0}
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
    )


def _part(key: str) -> str:
    """What an object outside the shards belongs to."""
    name = key.split("/", maxsplit=1)[0]
    if name == "tokenizer":
        return "tokenizer"
    if key.endswith("zarr.json"):
        return "metadata"
    return "digests" if name in ("commits", "seal", "shard_examples") else "other"


def render(info: CacheInfo) -> str:
    """The figures as lines of text."""
    labels = _labels(info.labels) if info.labels else []
    return "\n".join([*_identity(info), *_sizes(info), *_fidelity(info), *labels])


def _identity(info: CacheInfo) -> Iterator[str]:
    m, label, data = info.manifest, info.manifest.label, info.manifest.data
    count, missing = m.shards.count, m.shards.count - info.shards_committed
    state = f"{info.shards_committed:,} of {count:,} committed: not finished" if missing else "all committed"
    temperatures = ", ".join(f"{t:g}" for t in label.temperatures)
    versions = ", ".join(f"{name} {version}" for name, version in m.teacher.versions.items())
    yield f"cache       {info.path}, format {m.format_version}"
    yield f"teacher     {m.teacher.id} ({m.teacher.dtype}, {m.teacher.engine}), revision {m.teacher.revision or 'none'}"
    yield f"            weights {m.teacher.weights[:12]}; {versions}"
    yield f"tokenizer   {label.vocab_size:,} tokens, fingerprint {m.tokenizer.fingerprint[:12]}"
    yield f"data        {data.examples:,} examples, {data.tokens:,} tokens, {data.positions:,} target positions"
    yield f"            fingerprint {data.fingerprint[:12]}; at most {data.max_seq_length:,} tokens an example"
    yield f"            {data.truncated:,} examples cut, {data.dropped:,} dropped"
    draws = f"head {label.head_size}, tail {label.tail_draws} draws"
    yield f"label       {draws}, temperatures {temperatures}, seed {label.seed}"
    part = f" (shards {m.part.first:,} to {m.part.first + count:,} of {m.part.of:,})" if m.part else ""
    yield f"shards      {count:,}, {state}{part}"


def _sizes(info: CacheInfo) -> Iterator[str]:
    labels = {name: size for name, size in info.bytes_by_array.items() if name.startswith(LABEL_PARTS)}
    tokens = {name: size for name, size in info.bytes_by_array.items() if name not in labels}
    each = f", {info.bytes_per_position:.1f} a target position" if info.bytes_per_position else ""
    yield f"size        {info.bytes:,} bytes{each}"
    for group, sizes in (("labels", labels), ("text", tokens), ("beside", info.bytes_beside)):
        yield _size(f"  {group}", sum(sizes.values()), info.positions)
        for name, size in sizes.items():
            if size:
                yield _size(f"    {name}", size, info.positions)


def _size(name: str, size: int, positions: int) -> str:
    return f"{name:20s}{size:15,}" + (f"{size / positions:10.2f} a position" if positions else "")


def _fidelity(info: CacheInfo) -> Iterator[str]:
    """The certificate, two lines a temperature."""
    if not info.fidelity:
        yield f"fidelity    too few positions were measured ({info.fidelity_positions}): see --fidelity-positions"
        return
    yield (
        f"fidelity    of the gradient of a linear probe student over {BATCH:,} positions to the exact one, "
        f"measured on {info.fidelity_positions:,} positions"
    )
    entries = info.manifest.label.head_size + info.manifest.label.tail_draws
    for at in info.fidelity:
        for name, found in (("labels", at.label), (f"top-{entries} renormalised", at.top_k_renormalized)):
            bias = f"bias {found.bias:6.1%}" if found.bias > found.bias_floor else f"bias < {found.bias_floor:4.1%}"
            errors = f"{bias}, noise {found.noise:6.1%}, angle {found.degrees:5.2f} degrees"
            yield f"  T={at.temperature:<6g}{name:24s}{errors}"


def _labels(labels: LabelFigures) -> Iterator[str]:
    """Lines on the sampled labels, a row a temperature."""
    bound = "at least " if labels.entropy_is_bound else ""
    yield (
        f"sample      {labels.positions:,} positions of {labels.examples:,} examples: the first "
        f"{labels.shards:,} committed shards; all that follows is of them"
    )
    for temperature, mass, entropy in zip(labels.temperatures, labels.captured_mass, labels.entropy, strict=True):
        yield f"  T={temperature:<8g}head holds {mass:6.1%} of the mass, teacher's entropy {bound}{entropy:.3f} nats"
    yield f"tail        {labels.distinct_tail_draws:.1f} distinct draws a position"
    yield f"perplexity  {labels.gold_perplexity:.2f}, the teacher's on the text itself"
    at = f"T={labels.certainty_temperature:g}"
    yield from _examples(f"most certain examples (index, mean entropy at {at}, beginning)", labels.most_certain)
    yield from _examples("least certain", labels.least_certain)


def _examples(title: str, examples: list[ExampleFigures]) -> Iterator[str]:
    yield title
    for example in examples:
        yield f"  {example.index:8d}  {example.entropy:6.3f}  {example.text}"
