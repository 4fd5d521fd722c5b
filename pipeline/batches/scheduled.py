"""Batches whose labels are at a temperature that changes from optimizer step to optimizer step."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch.utils.data import Dataset, Sampler

from logitcask.pipeline.batches.collate import TrainingExample
from logitcask.pipeline.batches.order import BatchSampler
from logitcask.pipeline.settings.training.schedule import Ramp

Item = tuple[int, float]  # an example's index, and the temperature of its labels


class ScheduledExamples(Dataset[TrainingExample]):
    """Examples by index and temperature, which the collator takes from them."""

    def __init__(self, examples: Dataset[TrainingExample]) -> None:
        self._examples = examples

    def __getitem__(self, item: Item) -> TrainingExample:
        return replace(self._examples[item[0]], temperature=item[1])


class ScheduledSampler(Sampler[list[Item]]):
    """The batches of another sampler, each with the temperature of its optimizer step.

    ``accumulation`` batches make a step, the last of an epoch may have fewer; ``steps`` are those of the whole run. A
    step has that one of the ``stored`` temperatures between the ends of the line which is nearest to the line; if
    ``stored`` is None, that of the line itself.
    """

    def __init__(
        self, sampler: BatchSampler, line: Ramp, stored: Sequence[float] | None, *, accumulation: int, steps: int
    ) -> None:
        self._sampler, self._line, self._accumulation, self._steps = sampler, line, accumulation, steps
        low, high = min(line) - 1e-6, max(line) + 1e-6
        self._stored = None if stored is None else [t for t in stored if low <= t <= high]
        self._epoch = 0
        self.batch_size, self.drop_last = sampler.batch_size, sampler.drop_last

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
        self._epoch = epoch
        self._sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Item]]:
        first = self._epoch * -(-len(self) // self._accumulation)
        for number, batch in enumerate(self._sampler):
            step = first + number // self._accumulation
            if self._stored is None:
                temperature = self._line.at(step, self._steps)
            else:
                temperature = self._line.nearest(step, self._steps, self._stored)
            yield [(index, temperature) for index in batch]
