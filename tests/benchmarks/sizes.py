"""What a label costs on disk: bytes per target position by preset, corpus and array, and what other codecs would give.

Real SmolLM2 labels of Python functions and of English prose (the language reference that Python ships). Run as
``python -m tests.benchmarks.sizes [POSITIONS]``; 30,000 positions of each, the default, take about eight minutes on
two cores. Keeps the table of codecs in tests/benchmarks/results/codecs.json; pcodec needs ``numcodecs[pcodec]``.
"""

import json
import pydoc_data.topics
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from logitcask.cache.labels import Example, Shard, SparseTargets, soft_labels
from logitcask.cache.layout import CHUNK, array_specs, decode_targets, encode_targets
from logitcask.cache.manifest import FORMAT_VERSION, DataIdentity, LabelSettings, Manifest, TeacherIdentity
from logitcask.cache.report.info import describe
from logitcask.cache.writer import create_cache
from logitcask.pipeline.generate_data.python_source import from_source
from logitcask.pipeline.models.head import last_hidden_states, read_head
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.precompute.sharding import plan_strides
from logitcask.pipeline.settings.precompute import PRESETS
from logitcask.pipeline.teachers.sparsify import sparsify, uniform_draws
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import read_records
from logitcask.pipeline.text.tokenizer import identify, load_tokenizer, tokenizer_files, tokenizer_size
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.study.report import RESULTS, machine

LENGTH, ROWS = 384, 64
TEMPERATURES = [1.0, 1.5, 2.0]
GOAL = {"lean": 30, "standard": 80, "rich": 220}
Codec = Callable[[NDArray[Any]], bytes]


def code(encoder: Encoder) -> Iterator[TokenizedExample]:
    """Return functions of the standard library as documentation and code."""
    with tempfile.TemporaryDirectory() as folder:
        written = from_source(None, Path(folder), 100_000, seed=0)
        for index, (_, record) in enumerate(read_records([str(written.path)])):
            assert isinstance(record, dict)
            (found,) = encoder.examples(record)
            mask = found.target_mask[:LENGTH].copy()
            mask[-1] = False
            if mask.any():
                yield TokenizedExample(index, found.input_ids[:LENGTH], mask, np.zeros(int(mask.sum()), dtype=bool))


def english(encoder: Encoder) -> Iterator[TokenizedExample]:
    """Return chapters of Python's language reference."""
    for index, name in enumerate(sorted(pydoc_data.topics.topics)):
        (found,) = encoder.examples({"text": pydoc_data.topics.topics[name]})
        for first in range(0, len(found.input_ids) - 16, LENGTH):
            ids = found.input_ids[first : first + LENGTH]
            mask = np.arange(len(ids)) < len(ids) - 1
            yield TokenizedExample(index, ids, mask, np.zeros(len(ids) - 1, dtype=bool))


def label(source: Iterator[TokenizedExample], positions: int, vocabulary: int) -> dict[str, list[Example]]:
    """Return labels of every preset, from one forward pass of the teacher."""
    model = load_causal_lm(teacher_path(), dtype=torch.float32).eval()
    head = read_head(model)
    found: dict[str, list[Example]] = {name: [] for name in PRESETS}
    for index, example in enumerate(source):
        if sum(len(e.targets) for e in found["lean"]) >= positions:
            break
        ids, mask = torch.from_numpy(example.input_ids), torch.from_numpy(example.target_mask)
        parts: dict[str, list[SparseTargets]] = {name: [] for name in PRESETS}
        with torch.inference_mode():
            hidden, gold = last_hidden_states(model, ids[None])[0, mask], ids.roll(-1)[mask]
            uniforms = {n: torch.from_numpy(uniform_draws(0, index, len(gold), m)) for n, (_, m) in PRESETS.items()}
            for s in (slice(first, first + ROWS) for first in range(0, len(gold), ROWS)):
                logits = head.logits(hidden[s])[:, :vocabulary]
                for name, (k, _) in PRESETS.items():
                    parts[name].append(sparsify(logits, gold[s], uniforms[name][s], k, TEMPERATURES))
        for name in PRESETS:
            found[name].append(Example(example.input_ids, example.target_mask, SparseTargets.concatenate(parts[name])))
    return found


def settings_of(name: str, vocabulary: int) -> LabelSettings:
    """Return the label settings of a preset."""
    head, draws = PRESETS[name]
    return LabelSettings(vocab_size=vocabulary, head_size=head, tail_draws=draws, temperatures=TEMPERATURES, seed=0)


def write(folder: Path, name: str, examples: list[Example], tokenizer: Any) -> Path:
    """Write a complete cache of one shard."""
    tokens = np.array([len(e.input_ids) for e in examples])
    positions = np.array([len(e.targets) for e in examples])
    shard_examples = np.array([len(examples)])
    files = tokenizer_files(tokenizer)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        teacher=TeacherIdentity(
            id="SmolLM2-135M", revision="", weights="0" * 64, dtype="float32", engine="transformers", versions={}
        ),
        tokenizer=identify(tokenizer, files),
        data=DataIdentity(
            fingerprint="0" * 64,
            examples=len(examples),
            tokens=int(tokens.sum()),
            positions=int(positions.sum()),
            truncated=0,
            dropped=0,
            max_seq_length=LENGTH,
            longest=int(tokens.max()),
            prompt_loss=False,
        ),
        label=settings_of(name, tokenizer_size(tokenizer)),
        shards=plan_strides(shard_examples, tokens, positions),
    )
    create_cache(folder / name, manifest, shard_examples, files).write_shard(0, Shard.of(examples))
    return folder / name


def spoilt(targets: SparseTargets, how: LabelSettings) -> list[float]:
    """Return, by temperature, the squared error that storing adds to the weights over the variance of drawing them."""
    coded = {s.name: encode_targets(targets)[s.name].astype(s.dtype) for s in array_specs(how) if s.axis == "position"}
    back, shares = decode_targets(coded, how), []
    for t in TEMPERATURES:
        drawn, stored = (soft_labels(x, TEMPERATURES, t, "sampled").weights.astype(np.float64) for x in (targets, back))
        variance = (drawn[:, how.head_size :] ** 2 / np.maximum(targets.tail_counts, 1)).sum()
        shares.append(float(((stored - drawn) ** 2).sum() / variance))
    return shares


def codecs() -> dict[str, tuple[bool, Codec]]:
    """Return, by name, whether the array is transposed to columns first, and the compressor."""
    found: dict[str, tuple[bool, Codec]] = {
        "rows, zstd": (False, Zstd(9).encode),
        "rows, shuffle": (False, Blosc("zstd", 9, Blosc.SHUFFLE).encode),
        "columns, zstd": (True, Blosc("zstd", 9, Blosc.NOSHUFFLE).encode),
        "columns, shuffle": (True, Blosc("zstd", 9, Blosc.SHUFFLE).encode),
        "columns, bits": (True, Blosc("zstd", 9, Blosc.BITSHUFFLE).encode),
        "columns, lz4": (True, Blosc("lz4", 9, Blosc.SHUFFLE).encode),
    }
    try:
        from numcodecs.pcodec import PCodec  # an optional dependency of numcodecs
    except ImportError:
        return found
    pcodec = PCodec(level=8)

    def encode_wide(columns: NDArray[Any]) -> bytes:
        wide = columns.astype(np.uint16) if columns.itemsize == 1 else columns
        return b"".join(bytes(pcodec.encode(np.ascontiguousarray(column))) for column in np.atleast_2d(wide))

    return {**found, "columns, pcodec": (True, encode_wide)}


def compressed(array: NDArray[Any], columns: bool, encode: Codec) -> float:
    """Return an array's bytes per position, compressed chunk by chunk."""
    chunks = [array[first : first + CHUNK["position"]] for first in range(0, len(array), CHUNK["position"])]
    return sum(len(encode(np.ascontiguousarray(c.T if columns else c))) for c in chunks) / len(array)


def variants(targets: SparseTargets, how: LabelSettings) -> dict[str, NDArray[Any]]:
    """Return the arrays of the format, then the alternatives that were tried."""
    coded = encode_targets(targets)
    found = {s.name: coded[s.name].astype(s.dtype) for s in array_specs(how) if s.axis == "position"}
    padding = targets.tail_counts == 0
    below = np.maximum(targets.head_logprobs[:, -1:] - targets.tail_logprobs, 0.0)
    odds = np.cumsum(coded["log_tail_odds"], axis=1, dtype=np.int16)
    return {
        **found,
        "tail_ids, plain": np.where(padding, 0, targets.tail_ids).astype(np.uint16),
        "tail_logprobs, 1/16 nat": np.where(padding, 0, np.rint(below * 16)).astype(np.uint16),
        "tail_logprobs, 5/16 nat": np.where(padding, 0, np.rint(below * 16 / 5)).astype(np.uint8),
        "head_logprobs, 1/64 nat": np.diff(np.rint(-targets.head_logprobs * 64), axis=1, prepend=0).astype(np.uint16),
        "head_logprobs, plain": np.rint(-targets.head_logprobs * 16).astype(np.uint16),
        "log_tail_odds, plain": odds,
        "log_partition, 1/256": np.rint(targets.log_partition * 256).astype(np.int32),
        "log_tail_mass, 1/128": np.rint(np.clip(-targets.log_tail_mass, 0, 500) * 128).astype(np.uint16),
    }


def size_table(sizes: dict[tuple[str, str], dict[str, float]]) -> Table:
    """Return a table of bytes per position by array, with one column per preset and corpus."""
    table = Table("bytes a position", *(f"{preset}\n{corpus}" for preset, corpus in sizes))
    for name in dict.fromkeys(name for column in sizes.values() for name in column):
        table.add_row(name, *(f"{column[name]:.2f}" if name in column else "" for column in sizes.values()))
    return table


def codec_table(tried: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Return a table of bytes per position by corpus and array, with one column per codec."""
    table = Table("bytes a position, standard", *codecs(), title="codecs")
    for corpus, arrays in tried.items():
        for name, row in arrays.items():
            table.add_row(f"{corpus}: {name}", *(f"{size:.2f}" for size in row.values()))
    return table


def keep(tried: dict[str, dict[str, dict[str, float]]], positions: dict[str, int]) -> None:
    """Write results/codecs.json."""
    found = machine()
    packages = {dist.name: dist.version for dist in distributions() if dist.name in ("numcodecs", "pcodec")}
    found["versions"] |= packages
    record = {"machine": found, "preset": "standard", "positions": positions, "bytes_a_position": tried}
    (RESULTS / "codecs.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Print the tables, and save that of the codecs."""
    positions = int(sys.argv[1]) if len(sys.argv) > 1 else 30_000
    tokenizer = load_tokenizer(teacher_path())
    encoder, vocabulary = Encoder(tokenizer, prompt_loss=False), tokenizer_size(tokenizer)
    sizes: dict[tuple[str, str], dict[str, float]] = {}
    tried: dict[str, dict[str, dict[str, float]]] = {}
    for corpus, source in (("code", code(encoder)), ("English", english(encoder))):
        found = label(source, positions, vocabulary)
        for preset, examples in found.items():
            with tempfile.TemporaryDirectory() as folder:
                info = describe(write(Path(folder), preset, examples, tokenizer))
            n = info.manifest.data.positions
            targets = SparseTargets.concatenate([e.targets for e in examples])
            shares = spoilt(targets, info.manifest.label)
            arrays = {name: size / n for name, size in info.bytes_by_array.items()}
            sizes[preset, corpus] = {
                "positions": n,
                **arrays,
                "metadata": (info.bytes_beside["metadata"] + info.bytes_beside["digests"]) / n,
                "all but the tokenizer": (info.bytes - info.bytes_beside["tokenizer"]) / n,
                "goal": GOAL[preset],
                "whole cache": info.bytes / n,
                **{f"noise added at T={t:g}, %": 100 * x for t, x in zip(TEMPERATURES, shares, strict=True)},
            }
            if preset == "standard":
                tried[corpus] = {
                    name: {codec: round(compressed(array, *how), 3) for codec, how in codecs().items()}
                    for name, array in variants(targets, info.manifest.label).items()
                }
    console = Console(width=150)
    console.print(size_table(sizes))
    console.print(codec_table(tried))
    keep(tried, {corpus: int(sizes["standard", corpus]["positions"]) for corpus in tried})


if __name__ == "__main__":
    main()
