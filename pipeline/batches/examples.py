"""The examples of a run, by index: those of a cache, or of a tokenized file."""

from torch.utils.data import Dataset

from logitcask.cache.reader import CacheReader
from logitcask.cache.storage.disk_cache import DiskCache
from logitcask.pipeline.batches.collate import TrainingExample
from logitcask.pipeline.text.examples import Encoded
from logitcask.pipeline.text.token_table import TokenTable


class CacheExamples(Dataset[TrainingExample]):
    """The examples of a cache, which each worker process opens for itself at its first read."""

    def __init__(
        self, path: str, *, with_targets: bool, disk_cache: DiskCache | None = None, opened: bytes | None = None
    ) -> None:
        """Take the cache at a path, the one that another reader has ``opened`` if that is given."""
        self._path, self._with_targets, self._disk_cache, self._opened = path, with_targets, disk_cache, opened
        self._reader: CacheReader | None = None

    @property
    def reader(self) -> CacheReader:
        """The open cache."""
        if self._reader is None:
            self._reader = CacheReader(self._path, disk_cache=self._disk_cache, opened=self._opened)
            self._opened = self._reader.opened
        return self._reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> TrainingExample:
        example = self.reader.example(index)
        encoded = Encoded(example.input_ids, example.target_mask)
        return TrainingExample(encoded, example.targets if self._with_targets else None)

    def __getstate__(self) -> dict[str, object]:
        return {
            "_path": self._path,
            "_with_targets": self._with_targets,
            "_disk_cache": self._disk_cache,
            "_opened": self._opened,
            "_reader": None,
        }


class FileExamples(Dataset[TrainingExample]):
    """The examples of a tokenized file, for output distillation without a cache."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> TrainingExample:
        return TrainingExample(self._table.example(index), None)
