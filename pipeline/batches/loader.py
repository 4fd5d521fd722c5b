"""A loader of batches for a loop of one's own: resumable within an epoch, on any number of workers and ranks."""

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from logitcask.cache.errors import CacheMismatchError, LogitcaskError, differences
from logitcask.cache.labels import IntArray
from logitcask.pipeline.batches.collate import Batch, Collator
from logitcask.pipeline.batches.dataset import CacheDataset
from logitcask.pipeline.machine import prepare_worker, worker_processes


class Loader:
    """Batches of a cache or a mixture, one rank's share of each step.

    Each iteration is one epoch, and the next has another order; one that is broken off starts over. Every rank has the
    same number of batches, and each example occurs once per epoch: in the last step some ranks' batches may be short or
    have no example (then they have no target).

        loader = logitcask.loader(cache, batch_size=8)
        for batch in loader:
            ...
            torch.save(loader.state_dict(), "loader.pt")  # after load_state_dict the next batch is the one that follows
    """

    def __init__(
        self,
        dataset: CacheDataset,
        collator: Collator,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        ranks: int,
        num_workers: int,
    ) -> None:
        self.dataset, self.collator = dataset, collator
        self._batch_size, self._seed, self._rank, self._ranks = batch_size, seed, rank, ranks
        self._sampler = dataset.batches(batch_size, seed, rank=rank, ranks=ranks, packed=collator.packed)
        self._plan = _Plan()
        self._step = batch_size * ranks  # examples per step that this epoch was ordered for
        self._epoch = self._examples = 0
        self._resumed = False
        self._loader = data_loader(dataset, self._plan, collator, num_workers, pin_memory=torch.cuda.is_available())

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._examples, self._step = 0, self._batch_size * self._ranks
        self._resumed = False
        order = self._order()
        self._plan.batches = self._share(order[self._examples :])
        for batch in self._loader:
            self._examples = min(len(order), self._examples + self._batch_size * self._ranks)
            yield batch
        self._epoch, self._examples = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is: plain numbers and strings, the same on every rank."""
        return {**self._identity(), "epoch": self._epoch, "examples": self._examples, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch of the loader whose ``state_dict`` this is.

        The number of workers, of ranks and the batch size may be others: the examples that follow are the same. Raises
        CacheMismatchError, with the differences, if the state is of other caches, seeds or weights.
        """
        own = self._identity()
        missing = {*own, "epoch", "examples", "step"} - set(state)
        if missing:
            raise LogitcaskError(f"not the state of a loader: it lacks {', '.join(sorted(missing))}")
        mismatches = differences({name: state[name] for name in own}, own, "the state")
        if mismatches:
            raise CacheMismatchError(f"the loader's state does not fit: {'; '.join(mismatches)}")
        self._epoch, self._examples, self._step = (int(state[name]) for name in ("epoch", "examples", "step"))
        self._resumed = True

    def _order(self) -> IntArray:
        """Return the order of this epoch, as it was planned where the epoch began."""
        sampler = self.dataset.batches(self._step, self._seed, packed=self.collator.packed)
        return sampler.order(self._epoch)

    def _share(self, order: IntArray) -> list[list[int]]:
        """Return this rank's batches of some examples in order."""
        stride = self._batch_size * self._ranks
        starts = range(self._rank * self._batch_size, len(order) + self._rank * self._batch_size, stride)
        return [order[first : first + self._batch_size].tolist() for first in starts]

    def _identity(self) -> dict[str, Any]:
        """Return what determines the order: the caches, how they are mixed, and whether by length."""
        digests = [hashlib.sha256(m.model_dump_json().encode()).hexdigest()[:16] for m in self.dataset.manifests]
        mixture = self.dataset.mixture
        mixing = None if mixture is None else json.dumps([mixture.weights, mixture.seed, mixture.stop])
        return {
            "caches": digests,
            "mixing": mixing,
            "seed": self._seed,
            "by_length": mixture is None and not self.collator.packed,
        }


class _Plan:
    """The batches of an epoch that are still to come, set before each iteration."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def data_loader(
    items: Dataset[Any], batches: Iterable[Any], collator: Callable[[Any], Batch], num_workers: int, *, pin_memory: bool
) -> DataLoader[Any]:
    """Return a DataLoader of the items that the sampler ``batches`` names, collated; workers last for all epochs."""
    return DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=_Collated(collator) if num_workers else collator,
        num_workers=num_workers,
        multiprocessing_context=worker_processes(num_workers),
        worker_init_fn=prepare_worker,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


class _Collated:
    """Collates in a worker, and sends the batch through its pipe.

    PyTorch sends tensors in /dev/shm, of which a container often has 64 MB; where that is full, the worker prints an
    error, its batch never arrives, and the run waits for it forever.
    """

    def __init__(self, collator: Callable[[Any], Batch]) -> None:
        self._collator = collator

    def __call__(self, examples: Sequence[Any]) -> Any:
        batch = self._collator(examples)
        return batch if get_worker_info() is None else _Sent(batch)


class _Sent:
    """A batch as bytes, which becomes the batch again where it is unpickled."""

    def __init__(self, batch: Batch) -> None:
        file = io.BytesIO()
        _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(batch)
        self._bytes = file.getvalue()

    def __reduce__(self) -> tuple[Callable[[bytes], Batch], tuple[bytes]]:
        return pickle.loads, (self._bytes,)


class _Pickler(pickle.Pickler):
    """Pickles tensors with their values."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        if value.dtype == torch.bfloat16:  # NumPy has no such type
            return _bfloat16, (value.view(torch.int16).numpy(),)
        return torch.from_numpy, (value.numpy(),)


def _bfloat16(bits: IntArray) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)
