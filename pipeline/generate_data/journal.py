"""The journal: every answer received, one line of JSON each, appended as soon as it arrives.

A prompt whose answer is in the journal is never sent again. A process killed while writing leaves a torn last line; the
next one drops it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.storage.staging import lock_file
from logitcask.pipeline.generate_data.client import Scores

Count = Annotated[int, Field(ge=0)]


class Answer(BaseModel):
    """An answer to a prompt: the text, why it ended, and the billed tokens if the provider reports them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str
    response: str
    category: str
    language: str
    finish: str
    input_tokens: Count | None
    output_tokens: Count | None
    scores: Scores | None = None

    @model_serializer(mode="wrap")
    def _leave_out_scores(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name != "scores" or value is not None}


class Journal:
    """The answers of an output folder, locked by one process at a time. Memory: about 150 bytes per answer."""

    def __init__(self, path: Path) -> None:
        """Open or create it. Raises LogitcaskError if another run holds it or a line is not an answer."""
        self._path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        try:
            lock_file(self._file)
        except BlockingIOError as error:
            self._file.close()
            raise LogitcaskError(f"{path}: another run is writing it: wait for that run or stop it") from error
        self._offsets: dict[str, int] = {}  # of each prompt's line, in bytes
        self._end = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                self._offsets[self._parse(line, f"{path}:{number}").id] = self._end
                self._end += len(line)
        self._file.truncate(self._end)

    def __enter__(self) -> Self:
        """Return the open journal."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it and release the lock."""
        self._file.close()

    def __contains__(self, prompt_id: str) -> bool:
        """Return whether the prompt has an answer."""
        return prompt_id in self._offsets

    def append(self, answer: Answer) -> None:
        """Add an answer. Raises OSError if it does not fit on the disk, and leaves no part of it behind."""
        line = answer.model_dump_json().encode() + b"\n"
        try:
            self._file.seek(self._end)
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(self._end)
            raise
        self._offsets[answer.id] = self._end
        self._end += len(line)

    def __iter__(self) -> Iterator[Answer]:
        """Yield every answer, in order of arrival."""
        for prompt_id in self._offsets:
            yield self[prompt_id]

    def __getitem__(self, prompt_id: str) -> Answer:
        """Return the answer to a prompt."""
        with self._path.open("rb") as lines:
            lines.seek(self._offsets[prompt_id])
            return self._parse(lines.readline(), str(self._path))

    @staticmethod
    def _parse(line: bytes, where: str) -> Answer:
        try:
            return Answer.model_validate_json(line)
        except ValidationError as error:
            raise LogitcaskError(f"{where}: not an answer of a model: fix or remove that line") from error
