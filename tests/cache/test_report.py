"""``cache info`` reports what is in the cache."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.cache.report.info import describe, render
from logitcask.cache.report.label_figures import entropies
from logitcask.cache.report.summary import summarize
from logitcask.pipeline.teachers.sparsify import sparsify, uniform_draws
from tests.support.tiny import make_cache

TEMPERATURES = [1.0, 1.5, 2.0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("report"), shard_positions=64)


def info_command(cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "logitcask", "cache", "info", str(cache), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_entropy_is_the_full_distributions_on_average(t: float) -> None:
    logits = 3 * torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    label = LabelSettings(vocab_size=300, head_size=4, tail_draws=16, temperatures=TEMPERATURES, seed=0)
    uniforms = torch.from_numpy(uniform_draws(0, 0, 400, 16))
    targets = sparsify(logits, torch.zeros(400, dtype=torch.long), uniforms, 4, TEMPERATURES)
    estimates = entropies(targets, label, t)
    log_p = (logits.double() / t).log_softmax(1)
    error = estimates - -(log_p.exp() * log_p).sum(1).numpy()
    assert abs(error.mean()) < 4 * error.std() / 20
    assert error.std() < 1.0


def test_all_bytes_are_accounted_for(cache: Path) -> None:
    info = describe(cache)
    on_disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert info.bytes == on_disk == sum(info.bytes_by_array.values()) + sum(info.bytes_beside.values())
    assert info.bytes_beside["other"] == 0
    assert info.positions == info.manifest.data.positions


def test_figures_are_those_of_the_labels(cache: Path) -> None:
    labels = describe(cache).labels
    reader = CacheReader(cache)
    targets = [reader.shard(s).targets for s in range(reader.manifest.shards.count)]
    mass = np.concatenate([np.exp(x.log_tail_mass) for x in targets])
    assert labels is not None
    np.testing.assert_allclose(labels.captured_mass, 1 - mass.mean(0), rtol=1e-5)
    np.testing.assert_allclose([row[-1] for row in labels.captured_by_rank], labels.captured_mass, rtol=1e-4)
    assert [sum(row) for row in labels.entropy_counts] == [labels.positions] * 3
    most, least = labels.most_certain, labels.least_certain
    assert most[0].entropy <= most[-1].entropy <= least[-1].entropy <= least[0].entropy
    assert "How many" in least[0].text


def test_an_unfinished_cache_is_described(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, shard_positions=64)
    (cache / "commits" / "c" / "0" / "0").unlink()
    info = describe(cache)
    assert info.shards_committed == info.manifest.shards.count - 1
    assert "committed: not finished" in render(info)
    assert "shards committed: not finished" in summarize(info)


def test_the_summary_has_ten_lines_at_most(cache: Path) -> None:
    info = describe(cache)
    lines = summarize(info).splitlines()
    assert len(lines) <= 10
    assert [line.split()[0] for line in lines] == [
        *("cache", "teacher", "data", "label", "size", "mass", "entropy", "perplexity", "fidelity")
    ]
    said = dict(line.split(maxsplit=1) for line in lines)
    shown = [float(number) for number in re.findall(r"([\d.]+) (?:bytes|labels|text|tokenizer)", said["size"])]
    assert shown[0] == pytest.approx(sum(shown[1:]), abs=0.2) == pytest.approx(info.bytes / info.positions, abs=0.1)
    assert info.labels is not None
    masses = [f"{mass:.1%} at T={t:g}" for t, mass in zip(TEMPERATURES, info.labels.captured_mass, strict=True)]
    assert said["mass"] == f"the head holds {', '.join(masses)}"
    assert set(render(info).splitlines()) - set(lines)  # --verbose says more


def test_a_plot_is_drawn_and_json_is_complete(cache: Path, tmp_path: Path) -> None:
    done = info_command(cache, "--json", "--plot", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["labels"]["positions"] > 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    refused = info_command(cache, "--plot", str(tmp_path / "a.doc"))
    assert refused.returncode == 2
    assert "--plot must end in .png" in refused.stderr
