"""Memory that runs out, told in one line: what is known of it, and what to change."""

import contextlib
from collections.abc import Iterator

from logitcask.cache.errors import LogitcaskError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc")


def ran_out(error: BaseException) -> str | None:
    """The first line of an error that is of memory run out, None for any other."""
    if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
        return None  # torch.OutOfMemoryError is a RuntimeError, and so is the refusal of its processor's allocator
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


@contextlib.contextmanager
def memory_explained(remedy: str) -> Iterator[None]:
    """Tell of memory that runs out within as LogitcaskError, with what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = ran_out(error)
        if told is None:
            raise
        raise LogitcaskError(f"memory ran out ({told}): {remedy}") from error
