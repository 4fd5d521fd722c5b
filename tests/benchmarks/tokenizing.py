"""How fast stage 1 tokenizes with 1 and with 2 processes, on functions of the standard library and SmolLM2's tokenizer.

Run as ``python -m tests.benchmarks.tokenizing [COPIES]``. The seconds are those of the whole step: read, encode and
stage all examples; for 2 processes their start is included, and all records go to them. The two take turns, so that
another load of the machine hits both. CPU seconds, of this process and of those that it started, hardly depend on such
a load: with idle cores, two processes take at least half of all of them. ``memory`` instead of COPIES prints what a
million short examples take: the growth of this process's memory from one size of the data to another.
"""

import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from logitcask.cache.manifest import DataIdentity
from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import Raw
from logitcask.pipeline.text.token_table import TokenTable
from logitcask.pipeline.text.tokenizer import load_tokenizer
from logitcask.pipeline.text.tokens import stage
from logitcask.pipeline.text.tokens.workers import processes
from tests.benchmarks.capture import teacher_path

EXAMPLES, ROUNDS = 4_000, 3
SIZES = 200_000, 1_200_000  # examples
stage.ALONE = 0


def cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds of this process and of all that it started and that ended."""
    spent = os.times()
    return spent.user + spent.system, spent.children_user + spent.children_system


def resident() -> float:
    """Return the bytes of memory that this process has now, without pages of files."""
    gc.collect()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return float(line.split()[1]) * 1024


def main() -> None:
    """Print one line per run."""
    if sys.argv[1:] == ["memory"]:
        memory()
        return
    copies = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    tokenizer, identities = load_tokenizer(teacher_path()), list[DataIdentity]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = (str(from_source(None, folder / "data", EXAMPLES, seed=0).path),) * copies
        for _ in range(ROUNDS):
            for count in (1, 2):
                gc.collect()
                before, began = cpu_seconds(), time.perf_counter()
                encoder = Encoder(tokenizer, prompt_loss=False, report=lambda _: None)
                table = stage.stage_tokens(
                    encoder, sources, folder, bad=BadRecords(None), max_seq_length=1024, workers=processes(count)
                )
                seconds, data = time.perf_counter() - began, table.identity
                identities.append(data)
                here, others = (after - start for after, start in zip(cpu_seconds(), before, strict=True))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                print(
                    f"{count} processes: {data.examples:,} examples, {data.tokens:,} tokens in {seconds:.1f} s: "
                    f"{data.examples / seconds:,.0f} examples/s, {data.tokens / seconds:,.0f} tokens/s; "
                    f"CPU seconds: {here:.1f} here, {others:.1f} in others; peak {peak:,.0f} MB",
                    flush=True,
                )
    assert all(identity == identities[0] for identity in identities)


def memory() -> None:
    """Print the memory that tables of short examples take."""
    tokenizer, held = load_tokenizer(teacher_path()), list[float]()
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:

            def records(_: str, size: int = size) -> Iterator[Raw]:
                return ((f"row {n}", {"text": f"{n}", "language": "en"}) for n in range(size))

            def table(size: int = size) -> TokenTable:
                encoder = Encoder(tokenizer, prompt_loss=False, report=lambda _: None)
                return stage.stage_tokens(
                    encoder, ("rows",), Path(name), bad=BadRecords(None), max_seq_length=8, records=records
                )

            before = resident()
            kept = table()
            held.append(resident() - before)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            print(f"{len(kept):,} examples: {held[-1] / 1e6:.1f} MB more, peak {peak:,.0f} MB", flush=True)
            del kept
    print(f"{(held[1] - held[0]) / (SIZES[1] - SIZES[0]):.1f} bytes per example, with a column of metadata")


if __name__ == "__main__":
    main()
