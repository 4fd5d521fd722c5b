"""How fast stage 1 tokenizes with 1 and with 2 processes, on functions of the standard library and SmolLM2's tokenizer.

Run as ``python -m tests.benchmarks.tokenizing [COPIES]``. The seconds are those of the whole step: read, encode and
stage all examples, for 2 processes their start too, and all records go to them. Memory is that of this process, which
holds what grows with the number of examples. The two take turns, so that another load of the machine hits both.
"""

import gc
import resource
import sys
import tempfile
import time
from pathlib import Path

from logitcask.cache.manifest import DataIdentity
from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.text.bad_records import BadRecords
from logitcask.pipeline.text.examples import Encoder, encode_sources
from logitcask.pipeline.text.token_table import stage_tokens
from logitcask.pipeline.text.tokenizer import load_tokenizer
from logitcask.pipeline.text.tokens import workers as module
from logitcask.pipeline.text.tokens.workers import workers
from tests.benchmarks.capture import teacher_path

EXAMPLES, ROUNDS = 4_000, 2
module.ALONE = 0


def main() -> None:
    """Print one line per run."""
    copies = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    tokenizer, identities = load_tokenizer(teacher_path()), list[DataIdentity]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = (str(from_source(None, folder / "data", EXAMPLES, seed=0).path),) * copies
        for _ in range(ROUNDS):
            for count in (1, 2):
                gc.collect()
                busy = time.process_time()
                encoder, began = Encoder(tokenizer, prompt_loss=False, report=lambda _: None), time.perf_counter()
                with workers(encoder, tokenizer, count) as encode:
                    encoded = encode_sources(encoder, sources, BadRecords(None), encode=encode)
                    table = stage_tokens(encoded, folder, max_seq_length=1024, prompt_loss=False, source="data")
                seconds, data = time.perf_counter() - began, table.identity
                identities.append(data)
                cpu = time.process_time() - busy
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                print(
                    f"{count} processes: {data.examples:,} examples, {data.tokens:,} tokens in {seconds:.1f} s: "
                    f"{data.examples / seconds:,.0f} examples/s, {data.tokens / seconds:,.0f} tokens/s; "
                    f"{cpu:.1f} CPU seconds of this process; peak {peak:,.0f} MB",
                    flush=True,
                )
    assert all(identity == identities[0] for identity in identities)


if __name__ == "__main__":
    main()
