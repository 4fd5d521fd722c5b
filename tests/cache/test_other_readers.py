"""Other Zarr readers see the same arrays: tensorstore, and zarr-python with the zarrs codecs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray

from tests.cache.test_cache import label_settings, random_shards, write


@pytest.fixture(scope="module", params=[300, 70_000], ids=["uint16 ids", "uint32 ids"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    label = label_settings(request.param, 4, 8)
    place = tmp_path_factory.mktemp("readers") / "cache"
    write(place, label, random_shards(label, [3, 2]))
    return place


def arrays(cache: Path) -> dict[str, NDArray[Any]]:
    """Return every array, by name, as zarr-python reads it."""
    values = {}
    for name, member in zarr.open_group(cache, mode="r").members(max_depth=None):
        if isinstance(member, zarr.Array):
            values[name] = np.asarray(member[...])
    assert len(values) == 17
    return values


def test_tensorstore_reads_the_same(cache: Path) -> None:
    for name, want in arrays(cache).items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / name)}}
        values = np.asarray(tensorstore.open(spec, read=True).result().read().result())
        assert values.dtype == want.dtype
        np.testing.assert_array_equal(values, want, err_msg=name)


def test_zarrs_reads_the_same(cache: Path) -> None:
    wanted = arrays(cache)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        for name, want in wanted.items():
            array = zarr.open_array(cache / name, mode="r")
            assert "Zarrs" in type(array.async_array.codec_pipeline).__name__
            np.testing.assert_array_equal(np.asarray(array[...]), want, err_msg=name)
