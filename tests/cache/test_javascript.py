"""A second implementation of the format, in JavaScript, decodes the same labels to the bit."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache.labels import soft_labels
from logitcask.cache.reader import CacheReader
from tests.cache.test_cache import label_settings, write
from tests.support.tiny import sound_shards

READER = Path(__file__).parent / "reader.mjs"
ZARRITA = "zarrita@0.7.5"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader, beside an installed zarrita."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed: the JavaScript reader cannot run here")
    folder = tmp_path_factory.mktemp("javascript")
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", ZARRITA]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"npm could not install {ZARRITA}, which the JavaScript reader needs: {done.stderr.strip()[-200:]}")
    return Path(shutil.copy(READER, folder))


def read(reader: Path, cache: Path, row: int, temperature: float) -> dict[str, Any]:
    words = ["node", str(reader), str(cache), str(row), str(temperature)]
    label: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return label


def finite(values: Any) -> Any:
    return np.array([-np.inf if value is None else value for value in values], dtype=np.float64)


@pytest.mark.parametrize(("vocab", "head", "draws"), [(300, 4, 8), (70_000, 3, 300), (300, 0, 8), (300, 8, 0)], ids=str)
def test_javascript_decodes_the_same_label(vocab: int, head: int, draws: int, reader: Path, tmp_path: Path) -> None:
    label = label_settings(vocab, head, draws)
    write(tmp_path / "cache", label, sound_shards(label, [3]))
    shard = CacheReader(tmp_path / "cache").shard(0)
    for row in (0, len(shard.targets) - 1):
        mine = read(reader, tmp_path / "cache", row, 1.5)
        want = shard.targets[row : row + 1]
        used = want.tail_counts[0] > 0
        np.testing.assert_array_equal(mine["head_ids"], want.head_ids[0])
        np.testing.assert_array_equal(finite(mine["head_l"]), want.head_logprobs[0])
        np.testing.assert_array_equal(mine["tail_ids"], want.tail_ids[0][used])
        np.testing.assert_array_equal(mine["tail_counts"], want.tail_counts[0][used])
        np.testing.assert_array_equal(finite([mine["gold_l"]]), want.gold_logprobs)
        # exponentials in float64 there, in float32 here: the same but for the rounding of float32
        np.testing.assert_allclose(mine["tail_l"], want.tail_logprobs[0][used], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(mine["log_partition"], want.log_partition[0], rtol=1e-6, atol=1e-6)
        soft = soft_labels(want, label.temperatures, 1.5, "sampled")
        np.testing.assert_allclose(mine["weights"], soft.weights[0][soft.weights[0] > 0], rtol=1e-4)


def test_the_reader_is_short() -> None:
    assert len(READER.read_text().splitlines()) <= 64
