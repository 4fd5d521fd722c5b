"""``logitcask cache browse``: write the page."""

import html
import json
from pathlib import Path
from typing import Any

import torch

from logitcask.cache.manifest import metadata_values
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.teacher_head import StoredHead
from logitcask.pipeline.console import track
from logitcask.pipeline.machine import choose_device, explain_out_of_memory
from logitcask.pipeline.models.head import read_head
from logitcask.pipeline.models.load import load_causal_lm, require_finite
from logitcask.pipeline.models.students.student import require_room
from logitcask.pipeline.pages.choose import choose
from logitcask.pipeline.pages.contents import STEPS, pack, shown_draws, student_rows, token_texts
from logitcask.pipeline.pages.page import fill, require_new
from logitcask.pipeline.settings.cache import BrowseSettings
from logitcask.pipeline.text.tokenizer import require_tokenizer


def browse(settings: BrowseSettings) -> int:
    """Write a page of chosen examples; return how many.

    Raises LogitcaskError if the file exists, an example is not there, or the student does not match the cache.
    """
    require_new(settings.html, "--html", overwrite=settings.overwrite)
    reader = CacheReader(settings.cache)
    chosen = choose(reader, settings.examples, settings.seed)
    with explain_out_of_memory("choose fewer --examples, or a smaller --student"):
        page = render(_contents(reader, chosen, settings.student, settings.device))
    settings.html.write_text(page, encoding="utf-8")
    return len(chosen)


def _contents(reader: CacheReader, chosen: dict[int, str], student: str | None, device: str) -> dict[str, Any]:
    """Return what the page's script reads."""
    label, teacher = reader.manifest.label, reader.manifest.teacher
    model = None
    if student is not None:
        require_tokenizer(student, reader.manifest.tokenizer.fingerprint, reader.path)
        model = load_causal_lm(student, dtype=torch.float32).to(choose_device(device)).eval()
        require_finite(model, student)
        require_room(model, label.vocab_size, reader.manifest.data.longest)
    head = None if model is None else read_head(model)
    teacher_head = StoredHead(((reader.path, reader.opened),)) if label.exact else None
    values, entries, ids, draws = metadata_values(reader.manifest), [], set[int](), 0
    with track("reading", len(chosen), "examples") as advance:
        for index, why in chosen.items():
            example = reader.example(index)
            rows = None if model is None or head is None else student_rows(model, head, example, label, teacher_head)
            entry, used = pack(example, label, rows)
            kept = {name: values[name][code - 1] for name, code in example.metadata.items() if code}
            entries.append({"index": index, "why": why, "metadata": kept, **entry})
            draws = shown_draws(example.targets)[0].shape[1]
            ids |= used
            advance(1)
    return {
        "cache": Path(reader.path).name if "://" not in reader.path else reader.path,
        "teacher": teacher.id,
        "student": student,
        "steps": STEPS,
        "head": label.head_size,
        "draws": draws,
        "drawn": label.tail_draws,
        "temperatures": label.temperatures,
        "total": len(reader),
        "texts": token_texts(reader.tokenizer_files(), sorted(ids)),
        "examples": entries,
    }


def render(contents: dict[str, Any]) -> str:
    """Return the page. Texts are data of strangers: they stand in JSON without ``<``."""
    data = json.dumps(contents, ensure_ascii=True, separators=(",", ":"))
    for char in "<>&":
        data = data.replace(char, f"\\u{ord(char):04x}")
    return fill("labels", {"TITLE": html.escape(f"Labels of {contents['cache']}"), "DATA": data})
