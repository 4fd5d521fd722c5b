"""Listing a folder over SFTP, many of its folders at the same time."""

from pathlib import Path

import pytest
from zarr.core.sync import sync

from logitcask.cache.integrity import committed_shards
from logitcask.cache.storage.remote import RemoteStore
from tests.support.servers import ssh_server
from tests.support.tiny import folder_bytes


def test_every_object_is_listed_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = tmp_path / "far"
    for index in range(60):
        (far / f"commits/c/{index}").mkdir(parents=True)
        if index % 7:
            (far / f"commits/c/{index}/0").write_bytes(b"x" * index)
    (far / "zarr.json").write_text("{}")
    with ssh_server(tmp_path) as server:
        monkeypatch.setenv("HOME", str(server.home))
        store = RemoteStore(server.url(far), read_only=True)
        assert sync(store.sizes("")) == {key: len(data) for key, data in folder_bytes(far).items()}
        assert committed_shards(store, 50) == {index for index in range(50) if index % 7}
        assert sync(store.sizes("none")) == sync(store.sizes("zarr.json")) == {}
