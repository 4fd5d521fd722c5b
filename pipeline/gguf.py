"""GGUF files, as transformers reads them: parsed again for each use, and a table of names built for each module.

A file's header holds its whole vocabulary, so that parsing it takes seconds, and there are 397 modules in a model of
135M parameters. Both functions return the same for the same arguments, which makes it safe to keep what they returned.
"""

import contextlib
import functools
from collections.abc import Iterator

PARSERS = ("GGUFReader", "get_tensor_name_map")


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Keep, until the block ends, what gguf's parsers returned last; of a block within another, the outer one's."""
    import gguf

    own = {name: getattr(gguf, name) for name in PARSERS}
    for name, parser in own.items():
        setattr(gguf, name, functools.lru_cache(maxsize=1)(parser))
    try:
        yield
    finally:
        for name, parser in own.items():
            setattr(gguf, name, parser)
