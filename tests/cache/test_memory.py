"""The largest shards that a manifest may describe are read and verified within 1 GiB, however small the files are."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from logitcask.cache.integrity import commit_key, shard_keys
from logitcask.cache.labels import IntArray
from logitcask.cache.layout import CHUNK, ArraySpec, shard_specs, stride_for, strides, zarr_layout
from logitcask.cache.manifest import (
    FORMAT_VERSION,
    MAX_SHARD_BYTES,
    MAX_SHARD_ENTRIES,
    DataIdentity,
    LabelSettings,
    Manifest,
    ShardPlan,
    TeacherIdentity,
    TokenizerIdentity,
    label_entries,
    shard_bytes,
)
from logitcask.cache.writer import create_cache, plan_digest

GIB = 1 << 30
MEASURE = """
import resource, sys
from pathlib import Path
from logitcask.cache.reader import CacheReader
from logitcask.cache.verify import verify
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
if sys.argv[2] == "read":
    reader = CacheReader(sys.argv[1])
    assert all(len(reader.shard(i).targets) for i in range(reader.manifest.shards.count))
else:
    assert not [problem for problem in verify(sys.argv[1]).problems if "digest" in problem or "bytes" in problem]
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(1024 * int(status["VmHWM"].split()[0]) - before)  # ru_maxrss would begin with the memory of pytest
"""


def manifest_of(label: LabelSettings, tokens: int, positions: int, shards: int) -> Manifest:
    plan = ShardPlan(
        count=shards,
        examples=1,
        tokens=stride_for("token", tokens),
        positions=stride_for("position", positions),
        digest=plan_digest(np.ones(shards, dtype=np.int64)),
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        teacher=TeacherIdentity(id="t", revision="", weights="0" * 64, dtype="float32", engine="none"),
        tokenizer=TokenizerIdentity(fingerprint="1" * 64, chat_template=None, files={}),
        data=DataIdentity(
            fingerprint="2" * 64,
            examples=shards,
            tokens=shards * tokens,
            positions=shards * positions,
            truncated=0,
            dropped=0,
            max_seq_length=tokens,
            longest=tokens,
            prompt_loss=False,
        ),
        label=label,
        shards=plan,
    )


def encoded(spec: ArraySpec, plan: ShardPlan, values: NDArray[np.int64]) -> bytes:
    """One chunk, through Zarr's own codecs."""
    sizes = {f"{axis}s": min(CHUNK[axis], stride) for axis, stride in strides(plan).items() if axis != "shard"}
    one = plan.model_copy(update={"count": 1, **sizes})
    memory = MemoryStore()
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.create_array(memory, name="a", fill_value=0, **zarr_layout(spec, one))[:] = values.astype(spec.dtype)
    return memory._store_dict["a/c/0" + ("/0" if spec.width else "")].to_bytes()[:-20]  # less the index


def content(spec: ArraySpec, label: LabelSettings, slots: IntArray, tokens: int, positions: int) -> NDArray[np.int64]:
    values = np.zeros((len(slots), *((spec.width,) if spec.width else ())), dtype=np.int64)
    if spec.name == "tail_counts":
        values[:, 0] = label.tail_draws
    elif spec.name in ("token_count", "position_count"):
        values[:] = tokens if spec.name == "token_count" else positions
    elif spec.name == "target_mask":
        values[slots < positions] = 1
    elif spec.name == "head_ids":
        values[:] = np.arange(spec.width)
    return values


def write_bomb(folder: Path, label: LabelSettings, tokens: int, positions: int, shards: int) -> int:
    """Write a sound cache whose shards are all alike; return the size of its files."""
    manifest = manifest_of(label, tokens, positions, shards)
    plan = manifest.shards
    create_cache(folder, manifest, np.ones(shards, dtype=np.int64), {})
    objects = []
    for spec in shard_specs(manifest):
        stride = strides(plan)[spec.axis]
        chunk, known, body, index = min(CHUNK[spec.axis], stride), dict[bytes, bytes](), list[bytes](), list[int]()
        for first in range(0, stride, chunk):
            values = content(spec, label, np.arange(first, first + chunk), tokens, positions)
            kind = hashlib.sha256(values.tobytes()).digest()
            known[kind] = known.get(kind) or encoded(spec, plan, values)
            index += [sum(map(len, body)) if not body else index[-2] + index[-1], len(known[kind])]
            body.append(known[kind])
        objects.append(b"".join(body) + np.array(index, dtype="<u8").tobytes() + bytes(4))
    for shard in range(shards):
        for key, data in zip(shard_keys(shard_specs(manifest), shard), objects, strict=True):
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)
        (folder / commit_key(shard)).parent.mkdir(parents=True, exist_ok=True)
        (folder / commit_key(shard)).write_bytes(b"".join(hashlib.sha256(data).digest() for data in objects))
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def label_of(head: int, draws: int, temperatures: int) -> LabelSettings:
    return LabelSettings(
        vocab_size=70_000,
        head_size=head,
        tail_draws=draws,
        temperatures=[1 + t / 2 for t in range(temperatures)],
        seed=0,
    )


@pytest.mark.parametrize(
    ("head", "draws", "temperatures", "tokens_per_position", "shards"),
    [
        (8, 24, 3, 8, 2),
        *(
            pytest.param(*kind, marks=pytest.mark.nightly)
            for kind in [(0, 0, 1, 1, 1), (1, 0, 1, 1, 1), (1, 300, 1, 1, 1), (1, 0, 1, 1000, 1)]
        ),
    ],
)
@pytest.mark.parametrize("how", ["read", "verify"])
def test_the_largest_shard_takes_less_than_a_gibibyte(
    tmp_path: Path, head: int, draws: int, temperatures: int, tokens_per_position: int, shards: int, how: str
) -> None:
    label = label_of(head, draws, temperatures)
    one = shard_bytes(label, manifest_of(label, 1, 1, 1).shards) - 6 - 32
    positions = (MAX_SHARD_BYTES - (1 << 20)) // (one + 6 * tokens_per_position) // 16384 * 16384
    positions = min(
        positions, MAX_SHARD_ENTRIES // label_entries(label) // 16384 * 16384, (1 << 26) // tokens_per_position
    )
    positions -= 1
    size = write_bomb(tmp_path / "c", label, positions * tokens_per_position + 1, positions, shards)
    assert size < 2_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "c", how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < GIB


def test_a_larger_shard_is_refused_before_anything_is_read() -> None:
    label = label_of(1, 0, 1)
    with pytest.raises(ValueError, match="must take at most 872415232 bytes in memory, got 1"):
        manifest_of(label, (1 << 25) + 1, 1 << 25, 1)
    for head, draws in ((4, 8), (8, 24), (32, 64)):  # the presets, a million positions in a shard
        preset, positions = label_of(head, draws, 3), min(1 << 20, MAX_SHARD_ENTRIES // (head + draws + 3) - 16384)
        manifest_of(preset, 8 * positions, positions, 1)
