"""The caches of what ``generate-data --logprobs`` got: the model's labels of its own answers, of the same run."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.pipeline.generate_data.generate import SPLITS, scores_file
from logitcask.pipeline.labels_from.import_labels import import_labels
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.cache import ImportSettings
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_size

COMPARED = 50  # answers of which the tokenizer must give the text
REMEDY = "give the served model's own as --tokenizer and run the same command again"


def make_caches(settings: GenerateDataSettings) -> Iterator[str]:
    """Make a cache of each split that has answers, anew; yield a line about each.

    Raises LogitcaskError if the tokenizer is not the model's, or the labels are not those of the answers.
    """
    source = settings.tokenizer or settings.model or ""
    for split in SPLITS:
        scores = scores_file(settings.output_dir, split)
        if not scores.stat().st_size:
            continue
        _require_tokenizer(source, scores)
        output = settings.output_dir / f"{split}-cache"
        options = {"source": str(scores), "format": "openai", "tokenizer": source, "head_size": settings.logprobs}
        imported = resolve(ImportSettings, None, {**options, "output": output, "overwrite": True})
        report = import_labels(imported, judged=False)  # a high --temperature makes answers improbable
        data = report.manifest.data
        yield f"{data.examples} examples, {data.positions} target positions -> {output}"


def _require_tokenizer(source: str, scores: Path) -> None:
    """Raise LogitcaskError unless the tokenizer turns the tokens of most answers into their texts."""
    tokenizer = load_tokenizer(source)
    size = tokenizer_size(tokenizer)
    read = wrong = 0
    example = ""
    with scores.open(encoding="utf-8") as lines:
        for line in itertools.islice(lines, COMPARED):
            record = json.loads(line)
            choice = record["response"]["choices"][0]
            ids = [int(each["token"].removeprefix("token_id:")) for each in choice["logprobs"]["content"]]
            wanted = choice["message"]["content"]
            most = max(*ids, *record["prompt_token_ids"])
            if most >= size:
                raise LogitcaskError(
                    f"{source}: its tokenizer has {size:,} tokens, the answers have id {most}: {REMEDY}"
                )
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            read += 1
            if _bare(text) != _bare(wanted):
                wrong, example = wrong + 1, f"{shown(text, 30)} instead of {shown(wanted, 30)}"
    if 2 * wrong > read:
        raise LogitcaskError(f"{source}: its tokenizer gives other texts of the answers' tokens, {example}: {REMEDY}")


def _bare(text: str) -> str:
    """Return a text without blanks around it and the incomplete character that it may end in."""
    return text.strip().rstrip("\ufffd")
