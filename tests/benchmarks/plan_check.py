"""The plan's bytes and positions against those of a finished cache.

Run as ``python -m tests.benchmarks.plan_check RUN_OR_CACHE [DATA]``; a run is a folder that holds ``cache`` and
``data/train.jsonl``, as ``just demo`` leaves it. With the data its examples, tokens and positions are counted as the
plan does, with the tokenizer that the cache carries; without it the cache's own are taken. Exits with 1 where the bytes
are more than 10 % off or the positions differ.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe
from logitcask.pipeline.models.shapes import Amount
from logitcask.pipeline.plan.estimates import Preset
from logitcask.pipeline.plan.plan import count_data, plan_cache
from logitcask.pipeline.settings.precompute import PRESETS, PrecomputeSettings
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.reading import Reading
from logitcask.pipeline.text.tokenizer import tokenizer_from_files

BOUND = 0.10
Row = tuple[str, float, float]  # name, predicted, measured


def preset_of(label: LabelSettings) -> Preset:
    """Return the preset of a cache; exit if its label matches none."""
    usual = PrecomputeSettings.model_fields["temperatures"].default
    names: list[Preset] = ["lean", "standard", "rich"]
    for name in names:
        if PRESETS[name] == (label.head_size, label.tail_draws) and list(usual) == label.temperatures:
            return name
    sys.exit(f"error: the plan knows presets only; this label is {label.head_size} + {label.tail_draws}")


def compare(cache: Path, data: Path | None) -> tuple[list[Row], list[Row]]:
    """Return rows of counts, then of bytes: in total, without the tokenizer, and by part."""
    info, files = describe(cache), CacheReader(cache).tokenizer_files()
    found, label = info.manifest.data, info.manifest.label
    tokenizer = tokenizer_from_files(files)
    measured = Amount(found.examples, found.tokens, found.positions)
    amount = measured
    if data is not None:
        encoder = Encoder(tokenizer, prompt_loss=found.prompt_loss)
        amount, _ = count_data(Reading((str(data),)), encoder, found.max_seq_length, found.prompt_loss)
    shards, parts = plan_cache(preset_of(label), amount, label.vocab_size, tokenizer)
    counts: list[Row] = [("shards", shards, info.manifest.shards.count)]
    counts += [(name, getattr(amount, name), getattr(measured, name)) for name in ("examples", "tokens", "positions")]
    beside = info.bytes_beside
    there = {
        **info.bytes_by_array,
        "metadata": beside["metadata"] + beside["digests"] + beside["other"],
        "tokenizer": beside["tokenizer"],
    }
    whole, rest = sum(parts.values()), sum(parts.values()) - parts["tokenizer"]
    sizes: list[Row] = [
        ("whole cache", whole, info.bytes),
        ("without tokenizer", rest, info.bytes - there["tokenizer"]),
    ]
    return counts, [*sizes, *((name, parts.get(name, 0.0), size) for name, size in there.items())]


def main() -> None:
    """Print the table; exit with 1 if the plan is off."""
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m tests.benchmarks.plan_check RUN_OR_CACHE [DATA]")
    place = Path(sys.argv[1])
    cache = place / "cache" if (place / "cache" / "zarr.json").is_file() else place
    beside = place / "data" / "train.jsonl"
    data = Path(sys.argv[2]) if len(sys.argv) == 3 else beside if cache != place and beside.is_file() else None
    counts, sizes = compare(cache, data)
    table = Table(str(place), "predicted", "measured", "ratio")
    for name, predicted, measured in (*counts, *sizes):
        table.add_row(name, f"{predicted:,.0f}", f"{measured:,.0f}", f"{predicted / measured:.3f}")
    Console(width=100).print(table)
    if data is None:
        print("no data file given: counts are the cache's own")
    off = [f"{name}: {x / y - 1:+.1%}" for name, x, y in sizes[:2] if abs(x / y - 1) > BOUND]
    off += [f"{name}: {x:.0f} for {y:.0f}" for name, x, y in counts if name != "shards" and x != y]
    print("; ".join(off) if off else f"counts equal, bytes within {BOUND:.0%}")
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
