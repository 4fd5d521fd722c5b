"""From caches to training batches: examples, their order, mixing, loading. Stage 2 and the library share it."""
