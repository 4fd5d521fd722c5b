"""What a cache holds, as figures and as text."""

from pathlib import Path

import numpy as np
from pydantic import BaseModel

from cache.layout import array_specs
from cache.manifest import Manifest
from cache.reader import CacheReader

SAMPLED_SHARDS = 4  # shards whose labels are read for the statistics


class CacheInfo(BaseModel):
    """Figures of one cache. Statistics of labels come from its first shards."""

    path: str
    manifest: Manifest
    bytes: int
    bytes_by_array: dict[str, int]
    bytes_per_position: float
    captured_mass: dict[str, float]
    distinct_tail_draws: float
    gold_perplexity: float


def describe(path: str | Path) -> CacheInfo:
    """Read a complete cache's figures. Raises CacheFormatError or IncompleteCacheError."""
    reader = CacheReader(path)
    sizes = {spec.name: _size(Path(path) / spec.name) for spec in array_specs(reader.manifest.label)}
    total = _size(Path(path))
    targets = [reader.shard(s).targets for s in range(min(SAMPLED_SHARDS, reader.manifest.shards.count))]
    tail_mass = np.exp(np.concatenate([t.log_tail_mass for t in targets]).astype(np.float64))
    names = [f"{t:g}" for t in reader.manifest.label.temperatures]
    gold = np.concatenate([t.gold_logprobs for t in targets]).astype(np.float64)
    return CacheInfo(
        path=str(path),
        manifest=reader.manifest,
        bytes=total,
        bytes_by_array=sizes,
        bytes_per_position=total / reader.manifest.data.positions,
        captured_mass={name: float(1 - mass) for name, mass in zip(names, tail_mass.mean(0), strict=True)},
        distinct_tail_draws=float(np.mean(np.concatenate([(t.tail_counts > 0).sum(1) for t in targets]))),
        gold_perplexity=float(np.exp(-gold.mean())),
    )


def render(info: CacheInfo) -> str:
    """The figures as lines of text."""
    m = info.manifest
    label = m.label
    captured = ", ".join(f"{mass:.1%} at T={t}" for t, mass in info.captured_mass.items())
    lines = [
        f"teacher     {m.teacher.id} ({m.teacher.dtype}, {m.teacher.engine})",
        f"tokenizer   {label.vocab_size:,} tokens, fingerprint {m.tokenizer.fingerprint[:12]}",
        f"data        {m.data.examples:,} examples, {m.data.tokens:,} tokens, {m.data.positions:,} target positions",
        f"label       head {label.head_size}, tail {label.tail_draws} draws, temperatures {label.temperatures}",
        f"shards      {m.shards.count}, all committed",
        f"size        {info.bytes:,} bytes, {info.bytes_per_position:.1f} a target position",
        *(f"  {name:16s}{size / m.data.positions:7.2f} bytes a position" for name, size in info.bytes_by_array.items()),
        f"captured    head holds {captured}; {info.distinct_tail_draws:.1f} distinct tail draws",
        f"perplexity  {info.gold_perplexity:.2f}, the teacher's on the text itself",
    ]
    return "\n".join(lines)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
