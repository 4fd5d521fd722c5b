"""A cache of format 4 as it was written on 2026-11-28 is read, verified, and written again as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import ZipStore

from logitcask.cache.copy import copy_cache
from logitcask.cache.layout import array_specs
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe
from logitcask.cache.verify import verify
from logitcask.cache.writer import create_cache
from tests.support.tiny import folder_bytes

STORED = Path(__file__).parent / "stored" / "format4.zip"


def test_it_is_whole() -> None:
    assert verify(STORED).problems == []
    info = describe(STORED)
    assert (info.manifest.data.examples, info.manifest.data.positions, info.shards_committed) == (24, 231, 2)
    assert info.labels is not None
    np.testing.assert_allclose(info.labels.captured_mass, [0.2479, 0.1222, 0.0776], atol=1e-4)


def written_again(reader: CacheReader, folder: Path) -> Path:
    """The same shards through this version's writer."""
    manifest = reader.manifest
    writer = create_cache(folder, manifest, np.diff(reader.shard_starts), reader.tokenizer_files())
    for index in range(manifest.shards.count):
        writer.write_shard(index, replace(reader.shard(index), fidelity=reader.shard_fidelity(index)))
    return folder


def test_what_is_read_is_written_as_it_was(tmp_path: Path) -> None:
    """Every code of every array and every metadata document; compressed bytes depend on the version of numcodecs."""
    reader = CacheReader(STORED)
    again = written_again(reader, tmp_path / "again")
    assert verify(again).problems == []
    copy_cache(str(STORED), str(tmp_path / "stored"), None)
    before, after = folder_bytes(tmp_path / "stored"), folder_bytes(again)
    assert before.keys() == after.keys()
    documents = [name for name in before if name.endswith("zarr.json")]
    assert len(documents) > 15
    assert {name: after[name] for name in documents} == {name: before[name] for name in documents}
    stored: Any = zarr.open_group(ZipStore(STORED, mode="r"), mode="r")
    made: Any = zarr.open_group(again, mode="r")
    for spec in array_specs(reader.manifest.label):
        np.testing.assert_array_equal(made[spec.name][:], stored[spec.name][:], err_msg=spec.name)
