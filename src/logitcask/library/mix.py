"""Several caches mixed by weight. Needs neither torch nor transformers but for what says so."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from logitcask.cache.errors import LogitcaskError
from logitcask.library.caches import Cache
from logitcask.pipeline.batches.mixing import common_temperatures, require_one_tokenizer, require_shares

if TYPE_CHECKING:
    from logitcask.pipeline.batches.collate import Collator
    from logitcask.pipeline.batches.dataset import CacheDataset


class Mix:
    """Several caches with their weights, to be trained on as one."""

    def __init__(self, caches: Sequence[Cache], weights: Sequence[float], seed: int, stop: str) -> None:
        """Take what ``logitcask.mix`` has checked."""
        self.caches, self.weights, self.seed, self.stop = tuple(caches), tuple(weights), seed, stop

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that every cache stores, ascending."""
        return common_temperatures([cache.temperatures for cache in self.caches])

    def __len__(self) -> int:
        """Return the number of examples of all caches."""
        return sum(map(len, self.caches))

    def __repr__(self) -> str:
        parts = ", ".join(f"{w:g} {cache.path}" for cache, w in zip(self.caches, self.weights, strict=True))
        return f"<logitcask.Mix {parts}>"

    def dataset(self) -> "CacheDataset":
        """Return the examples of all caches as a torch data set, whose ``batches`` mix them. Needs torch."""
        from logitcask.library.training import dataset_of

        return dataset_of(self)

    def collator(self, temperature: float = 1.0, tail: str | None = None, *, packed: bool = False) -> "Collator":
        """Return the function that makes a batch of a data set's items, as ``Cache.collator``. Needs torch.

        Caches of different presets share batches: heads are cut to the smallest, and what is cut off counts as an entry
        of the tail, or with ``tail="bucket"`` into the bucket.
        """
        from logitcask.library.training import collator_of

        return collator_of(self, temperature, tail, packed=packed)


def mix(
    caches: Sequence[Cache], weights: Sequence[float], seed: int = 0, stop: Literal["first", "all"] = "first"
) -> Mix:
    """Mix caches: ``weights`` are the shares of the target positions, and sum to 1.

        mixed = logitcask.mix([chat, code], weights=[0.7, 0.3])

    The order depends on the seed and the caches alone. An epoch ends when the first cache has been read once
    (``stop="first"``), or each has been (``"all"``: then smaller shares repeat). Raises LogitcaskError if the weights
    are not shares, CacheMismatchError if tokenizers differ or no temperature is stored in all caches.
    """
    if not caches or not all(isinstance(cache, Cache) for cache in caches):
        raise LogitcaskError("mix: caches must be a list of open caches, as logitcask.open gives them")
    if len(weights) != len(caches):
        raise LogitcaskError(f"mix: there must be one weight per cache, got {len(weights)} for {len(caches)}")
    shares = [float(weight) for weight in weights]
    require_shares(shares, "mix")
    if stop not in ("first", "all"):
        raise LogitcaskError(f'mix: stop must be "first" or "all", got {stop!r}')
    if seed < 0:
        raise LogitcaskError(f"mix: seed must be at least 0, got {seed}")
    require_one_tokenizer([cache.path for cache in caches], [cache.reader.manifest for cache in caches])
    common_temperatures([cache.temperatures for cache in caches])
    return Mix(caches, shares, seed, stop)
