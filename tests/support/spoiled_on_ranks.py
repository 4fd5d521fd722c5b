"""The command with the label of example 13 spoiled, as a module that a launcher can start."""

from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.cli import main
from tests.train.callbacks.test_nonfinite import damaged_at

if __name__ == "__main__":
    CacheExamples.__getitem__ = damaged_at(13)  # type: ignore[method-assign]
    main()
