"""The public interface's own code: caches as objects, mixtures, loaders, writing. Import it from ``logitcask``."""
