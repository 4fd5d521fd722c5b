"""The public interface on caches: reading, writing, mixing, loading, and bad use in one line."""

import itertools
import multiprocessing
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import logitcask as lc
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.cli import main
from tests.support.distilled import mixed_lengths
from tests.support.forked import forks
from tests.support.runs import train
from tests.support.tiny import make_cache, make_teacher

WITHOUT = (
    "import sys\n"
    "class Block:\n"
    "    def find_spec(self, name, *_):\n"
    "        assert name.split('.')[0] not in ('torch', 'transformers'), name\n"
    "sys.meta_path.insert(0, Block())\n"
    "import logitcask as lc\n"
    "cache = lc.open(sys.argv[1])\n"
    "label = cache.label.model_copy(update={'fidelity_positions': 0})\n"
    "with lc.create(sys.argv[2], label=label, tokenizer=cache) as out:\n"
    "    for example in cache:\n"
    "        out.add(example.input_ids, example.target_mask, example.targets)\n"
    "print(len(lc.open(sys.argv[2])))\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    make_cache(folder, shard_positions=60)
    make_cache(
        folder, folder / "teacher", output=folder / "other", head_size=2, tail_draws=4, temperatures="1,2", seed=3
    )
    return folder


@pytest.fixture
def cache(place: Path) -> lc.Cache:
    return lc.open(place / "cache")


def ids(examples: Any) -> list[list[int]]:
    return [example.input_ids.tolist() for example in examples]


def test_random_access_decodes_each_shard_once(cache: lc.Cache) -> None:
    order = np.random.default_rng(0).permutation(len(cache))
    found = cache[order]
    shards = len(cache.reader.shard_starts) - 1
    assert shards >= 5
    assert cache.reader.decodes == shards
    everything = ids(cache)
    assert ids(found) == [everything[i] for i in order]
    assert ids(cache[-3:]) == everything[-3:]
    assert ids([cache[-1]]) == everything[-1:]
    assert ids(cache[np.arange(len(cache)) == 2]) == [everything[2]]
    example = cache[0]
    assert len(example.targets.gold_logprobs) == int(example.target_mask.sum())
    example.targets.gold_logprobs[:] = 7.0  # a copy
    assert not (cache[0].targets.gold_logprobs == 7.0).any()
    assert cache.info().manifest == cache.reader.manifest


def test_bad_use_is_one_line(cache: lc.Cache, place: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path, make_teacher(tmp_path / "teacher", vocab_size=280))
    another = lc.open(other)
    label = lc.label_settings(300)
    closed = lc.open(place / "cache")
    closed.close()
    uses: list[tuple[Any, str]] = [
        (lambda: closed[0], "is closed"),
        (lambda: cache[len(cache)], "out of range"),
        (lambda: cache.collator(1.7), "1.7 is not stored"),
        (lambda: cache.check(str(tmp_path / "teacher")), "another vocabulary"),
        (lambda: lc.mix([cache, another], [0.5, 0.5]), "another tokenizer"),
        (lambda: lc.mix([cache, cache], [1.5, -0.5]), "above 0 and sum to 1"),
        (lambda: lc.mix([cache, cache], [0.5, 0.4]), "above 0 and sum to 1"),
        (lambda: lc.mix([cache], [0.5, 0.5]), "one weight per cache"),
        (lambda: lc.loader(cache, 0), "batch_size must be at least 1"),
        (lambda: lc.loader(cache, rank=1), "rank must be below ranks"),
        (lambda: lc.create(place / "cache", label=label, tokenizer=cache), "already exists"),
        (lambda: lc.create("s3://bucket/x", label=label, tokenizer=cache), "writes to a folder"),
        (lambda: lc.open(place / "cache", revision="v1"), "only an hf:// URL"),
        (lambda: lc.label_settings(300, temperatures=(-1.0,)), "temperatures"),
        (lambda: lc.sparsify(torch.zeros(2, 7), torch.zeros(2).long(), label, example=0), "cut a padded"),
    ]
    for use, message in uses:
        with pytest.raises(lc.LogitcaskError, match=message) as raised:
            use()
        assert "\n" not in str(raised.value)
    with pytest.raises(IndexError):
        cache[len(cache)]
    make_cache(tmp_path, tmp_path / "teacher", seed=5, overwrite=True)
    with pytest.raises(lc.LogitcaskError, match="replaced by another cache"):
        another[0]


def test_caches_are_read_and_written_without_torch(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(place / "cache"), str(tmp_path / "copy")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["24"]
    before, after = lc.open(place / "cache"), lc.open(tmp_path / "copy")
    assert ids(before) == ids(after)
    for one, two in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.targets.head_logprobs, two.targets.head_logprobs)
        np.testing.assert_array_equal(one.targets.tail_logprobs, two.targets.tail_logprobs)


def test_a_writer_that_was_stopped_is_resumed(cache: lc.Cache, tmp_path: Path) -> None:
    label = lc.label_settings(300, head_size=4, tail_draws=8)
    given: dict[str, Any] = {"label": label, "tokenizer": cache, "shard_positions": 60}

    def add(writer: lc.Writer, numbers: range) -> None:
        for number in numbers:
            ids, mask = cache[number].input_ids, cache[number].target_mask
            logits = torch.randn(int(mask.sum()), 300, generator=torch.Generator().manual_seed(number)) * 3
            gold = torch.from_numpy(ids[1:][mask[:-1]])
            writer.add(ids, mask, lc.sparsify(logits, gold, label, example=number))

    with lc.create(tmp_path / "whole", **given) as whole:
        add(whole, range(len(cache)))
    writer = lc.create(tmp_path / "resumed", **given)
    add(writer, range(10))
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with pytest.raises(lc.LogitcaskError, match="resume=True"):
        lc.create(tmp_path / "resumed", **given)
    with lc.create(tmp_path / "resumed", **given, resume=True) as resumed:
        assert 0 < len(resumed) < 10
        add(resumed, range(len(resumed), len(cache)))
    files = [
        {str(f.relative_to(p)): f.read_bytes() for f in p.rglob("*") if f.is_file()}
        for p in (tmp_path / "whole", tmp_path / "resumed")
    ]
    assert files[0] == files[1]
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]
    assert ids(lc.open(tmp_path / "whole")) == ids(cache)
    assert sum(len(batch["gold"]) for batch in lc.loader(lc.open(tmp_path / "whole"))) > 0


@pytest.mark.parametrize("stop", ["first", "all"])
def test_weights_are_shares_of_positions(place: Path, stop: Any) -> None:
    caches = [lc.open(place / "cache"), lc.open(place / "other")]
    mixed = lc.mix(caches, [0.7, 0.3], seed=1, stop=stop)
    assert mixed.temperatures == (1.0, 2.0)
    data = mixed.dataset()
    sampler = data.batches(4)
    for epoch in (0, 1):
        order = sampler.order(epoch)
        examples = [data[i] for i in order.tolist()]
        positions = np.zeros(2)
        for example in examples:
            positions[example.source] += example.encoded.target_mask.sum()
        assert positions[0] / positions.sum() == pytest.approx(0.7, abs=0.05)
    assert set(range(len(caches[0]))) <= set(sampler.order(0).tolist())
    seen = {i for i in sampler.order(0).tolist() if i >= len(caches[0])}
    assert (len(seen) == len(caches[1])) == (stop == "all")
    for tail in ("sampled", "bucket", "renormalize"):
        labels = next(iter(lc.loader(mixed, 8, 2.0, tail=tail)))["soft_labels"]
        assert (labels.head_size, labels.temperature, labels.tail) == (2, 2.0, tail)
        head = labels.weights[:, :2].sum(1)
        if tail != "renormalize":
            torch.testing.assert_close(head, -torch.expm1(labels.log_rest), rtol=1e-3, atol=1e-4)


def test_the_loader_resumes_within_an_epoch(place: Path) -> None:
    def flat(batches: Any) -> list[list[int]]:
        return [batch["input_ids"].flatten().tolist() for batch in batches]

    for source in (lc.open(place / "cache"), lc.mix([lc.open(place / "cache"), lc.open(place / "other")], [0.5, 0.5])):
        loader = lc.loader(source, 4, seed=2)
        whole = [flat(loader), flat(loader)]
        assert whole[0] != whole[1]
        first = lc.loader(source, 4, seed=2)
        begun = flat(itertools.islice(first, 2))
        state = first.state_dict()
        assert begun == whole[0][:2]
        for workers in (0, 2) if isinstance(source, lc.Cache) else (0,):  # a worker takes seconds to start
            again = lc.loader(source, 4, seed=2, num_workers=workers)
            again.load_state_dict(state)
            assert flat(again) == whole[0][2:]
            if workers == 0:
                assert flat(again) == whole[1]
        ranks = [lc.loader(source, 2, seed=2, rank=rank, ranks=2) for rank in (0, 1)]
        for each in ranks:
            each.load_state_dict(state)
        parts = zip(*(list(each) for each in ranks), strict=True)
        golds = [sorted(torch.cat([a["gold"], b["gold"]]).tolist()) for a, b in parts]
        loader = lc.loader(source, 4, seed=2)
        assert golds == [sorted(batch["gold"].tolist()) for batch in loader][2:]
        with pytest.raises(lc.LogitcaskError, match="seed"):
            lc.loader(source, 4, seed=3).load_state_dict(state)


def read_forever(place: str, report: Connection) -> None:
    batches = iter(lc.loader(lc.open(place), 2, num_workers=2))
    next(batches)
    report.send([worker.pid for worker in multiprocessing.active_children()])
    signal.pause()


def test_a_loaders_workers_end_with_the_process_that_was_killed(place: Path) -> None:
    """Also where it is itself a fork of the process that they are forks of, which lives on."""
    ours, theirs = multiprocessing.Pipe()
    reader = forks().Process(target=read_forever, args=(str(place / "cache"), theirs))
    reader.start()
    assert ours.poll(60)
    workers = [Path(f"/proc/{worker}") for worker in ours.recv()]
    assert [worker.exists() for worker in workers] == [True, True]
    reader.kill()
    reader.join()
    ends = time.monotonic() + 20
    while any(worker.exists() for worker in workers) and time.monotonic() < ends:
        time.sleep(0.02)
    assert [worker.exists() for worker in workers] == [False, False]


def test_only_a_foreign_random_order_is_warned_of(cache: lc.Cache) -> None:
    data, collate = cache.dataset(), cache.collator()
    with pytest.warns(UserWarning, match="random order decodes"):
        list(DataLoader(data, batch_size=1, shuffle=True, collate_fn=collate))
    assert data.decodes > 2 * (len(cache.reader.shard_starts) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (cache.dataset(), cache.dataset()):
            for epoch in range(3):
                sampler = data.batches(2, seed=1)
                sampler.set_epoch(epoch)
                list(DataLoader(data, batch_sampler=sampler, collate_fn=collate))
        list(DataLoader(cache.dataset(), batch_size=2, collate_fn=collate))


def test_reader_counts(place: Path) -> None:
    data = lc.open(place / "cache").dataset()
    list(DataLoader(data, batch_sampler=data.batches(4), collate_fn=lc.open(place / "cache").collator()))
    assert data.decodes == len(CacheReader(place / "cache").shard_starts) - 1


@pytest.mark.parametrize("name", ["own", "own.zip"])
def test_what_create_writes_is_a_cache_to_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cache = lc.open(mixed_lengths(tmp_path))
    with lc.create(tmp_path / "own", label=cache.label.model_copy(update={"fidelity_positions": 0}), tokenizer=cache,
                   shard_positions=60) as writer:  # fmt: skip
        for example in cache:
            writer.add(example.input_ids, example.target_mask, example.targets)
    place = tmp_path / name
    if name != "own":
        command(monkeypatch, "cache", "copy", tmp_path / "own", place)
    command(monkeypatch, "cache", "verify", place)
    command(monkeypatch, "cache", "info", place)
    train(place, tmp_path / "run", max_steps=2)
    assert (tmp_path / "run/final/model.safetensors").is_file()
    opened = lc.open(place)
    assert ids(opened) == ids(cache)
    loader = lc.loader(opened, 8, packed=True)
    batches = list(loader)
    assert any("position_ids" in batch for batch in batches)
    assert sum(len(batch["gold"]) for batch in batches) == sum(int(e.target_mask.sum()) for e in cache)
    assert loader.dataset.decodes == len(opened.reader.shard_starts) - 1


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["logitcask", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
