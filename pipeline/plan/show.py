"""precompute-logits --dry-run --show: examples as the teacher will read them, the targets highlighted."""

import re
from collections.abc import Callable, Iterator

from pydantic import BaseModel
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.records import Raw
from logitcask.pipeline.text.tokens.encoded import Encoded

TARGET = "black on green"
OPEN, CLOSE = "«", "»"  # around a target where there is no colour
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but the line end, which a terminal would obey


class Piece(BaseModel):
    """Text of an example whose tokens are all targets, or none is."""

    text: str
    target: bool


class ShownExample(BaseModel):
    """An example as text, cut to the length that the teacher takes."""

    where: str  # its record, such as data.jsonl:7
    tokens: int
    targets: int
    truncated: bool
    pieces: list[Piece]


def first_examples(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    sources: tuple[str, ...],
    records: Callable[[str], Iterator[Raw]],
    count: int,
    max_seq_length: int,
) -> list[ShownExample]:
    """Return the first ``count`` examples of the data, bad records left out."""
    found: list[ShownExample] = []
    for where, record in (raw for source in sources if count for raw in records(source)):
        if len(found) >= count:
            break
        try:
            examples = [] if isinstance(record, RecordError) else encoder.examples(record)
        except RecordError:
            continue
        found += [_shown(tokenizer, where, example, max_seq_length) for example in examples]
    return found[:count]


def _shown(tokenizer: PreTrainedTokenizerBase, where: str, example: Encoded, max_seq_length: int) -> ShownExample:
    ids = example.input_ids[:max_seq_length].tolist()
    targets = [False, *example.target_mask[: len(ids) - 1].tolist()]  # whether each token is one
    pieces: list[Piece] = []
    begin, done = 0, ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and targets[end] == targets[begin]:
            continue
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        pieces.append(Piece(text=text[len(done) :], target=targets[begin]))
        begin, done = end, text
    return ShownExample(
        where=where,
        tokens=len(ids),
        targets=sum(targets),
        truncated=len(ids) < len(example.input_ids),
        pieces=pieces,
    )


def print_examples(console: Console, examples: list[ShownExample]) -> None:
    """Print examples, targets in colour, or between marks where the console has none."""
    for number, example in enumerate(examples, start=1):
        cut, dropped = ", truncated" * example.truncated, ": dropped" * (not example.targets)
        counts = f"{example.tokens:,} tokens{cut}, {example.targets:,} targets{dropped}"
        console.print(
            f"\nexample {number}, {example.where}: {counts}",
            style="bold",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        text = Text()
        for piece in example.pieces:
            visible = CONTROL.sub(lambda control: repr(control[0])[1:-1], piece.text)
            if not piece.target:
                text.append(visible)
            elif console.color_system:
                text.append(visible.replace("\n", "⏎\n"), style=TARGET)
            else:
                text.append(f"{OPEN}{visible}{CLOSE}")
        console.print(text, soft_wrap=True)
