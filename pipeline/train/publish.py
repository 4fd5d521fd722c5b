"""The model card of a student, always written to ``final/README.md``, and the upload of ``final/`` to the hub."""

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import TrainingArguments

from logitcask.cache.errors import LogitcaskError, shown_reason
from logitcask.cache.manifest import Manifest
from logitcask.cache.storage.hub import explained
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.console import say
from logitcask.pipeline.runs.run_folder import FINAL, divergence_name, ends_rows, with_alpha
from logitcask.pipeline.settings.base import flag_of
from logitcask.pipeline.settings.train import TrainSettings
from logitcask.pipeline.train.sources.source import Source

CARD = "README.md"
NOT_LEARNED = {
    *("output_dir", "resume_from_checkpoint", "extend", "push_to_hub", "local_copies", "local_copies_gb", "num_workers")
}
SHOWN = (
    *("distillation_type", "alpha", "temperature", "tail", "divergence", "learning_rate", "batch_size", "epochs"),
    *("gradient_accumulation_steps", "max_steps", "lora_rank", "freeze", "seed", "world_size", "save_dtype"),
)


def model_card(
    settings: TrainSettings,
    source: Source,
    record: dict[str, Any],
    ends: Mapping[str, dict[str, float] | None],
) -> str:
    """Return the card of a finished student: what it learned from, how well, and how to make it again."""
    base = settings.student_model or (settings.teacher_model if settings.init_from_teacher_layers else None)
    adapter = settings.lora_rank is not None and not settings.merge_lora
    front = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=None if base is None or Path(base).exists() else base,
        tags=["logitcask", "knowledge-distillation", *(["lora"] if adapter else [])],
        ignore_metadata_errors=False,
    )
    shown = with_alpha(record)
    settings_rows = [(flag_of(name), str(shown[name])) for name in SHOWN if shown.get(name) not in (None, "")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("logitcask", "torch", "transformers"))
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        "# A distilled student\n",
        "Trained by [Logitcask](https://pypi.org/project/logitcask/) from soft labels that its teacher wrote once.\n"
        if source.labelled
        else "Trained by [Logitcask](https://pypi.org/project/logitcask/) on its teacher's text.\n",
        _table(("", ""), _origin(source, base)),
        "## Evaluation\n",
        _evaluation(settings, record, ends),
        "## How to make it again\n",
        f"```sh\n{command(settings)}\n```\n",
        f"With {versions}, on {record['world_size']} rank{'s' if record['world_size'] > 1 else ''}:\n",
        _table(("setting", "value"), settings_rows),
    ]
    return "\n".join(parts)


def _origin(source: Source, base: str | None) -> list[tuple[str, str]]:
    """Return rows on teacher, data and label of each cache, or on the data alone."""
    rows = [("student before training", f"`{_plain(base)}`")] if base else []
    for part in source.parts or (source,):
        if not isinstance(part.examples, CacheExamples):
            rows.append(("data", f"{part.amount.examples:,} examples, fingerprint `{part.identity}`"))
            continue
        manifest: Manifest = part.examples.reader.manifest
        teacher, data, label = manifest.teacher, manifest.data, manifest.label
        at = ", ".join(f"{t:g}" for t in label.temperatures)
        rows += [
            ("teacher", f"`{_plain(teacher.id)}`, revision `{_plain(teacher.revision) or 'none'}`, {teacher.dtype}"),
            ("data", f"{data.examples:,} examples, {data.positions:,} positions, fingerprint `{data.fingerprint}`"),
            ("label", f"head {label.head_size}, {label.tail_draws} draws, temperatures {at}"),
        ]
    return rows


def _evaluation(
    settings: TrainSettings,
    record: dict[str, Any],
    ends: Mapping[str, dict[str, float] | None],
) -> str:
    before, after = ends["before"], ends["after"]
    if not after:
        return "None: no examples were held out.\n"
    rows = ends_rows(before, after, settings.temperatures.last, divergence_name(record))
    return _table(("held-out examples", "before", "after", "teacher"), rows)


def command(settings: TrainSettings) -> str:
    """Return the command line of a run that learns the same."""
    words = ["logitcask", "train"]
    for name, value in settings.model_dump(mode="json", exclude_defaults=True).items():
        flag = flag_of(name)
        if name in NOT_LEARNED:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name == "columns":
            words += [flag, ",".join(f"{ours}={theirs}" for ours, theirs in value.items())]
        elif name == "where":
            words += [flag, ",".join(f"{column}={one}" for column, all_ in value.items() for one in all_)]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        else:
            for each in value if isinstance(value, list) else [value]:
                words += [flag, str(each)]
    return shlex.join([*words, "--output-dir", "run"])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("`", "'")


def require_repository(repository: str, arguments: TrainingArguments) -> None:
    """Make a repository on the hub unless it is there. Raises LogitcaskError if it cannot be written."""
    try:
        HfApi().create_repo(repository, private=arguments.hub_private_repo, exist_ok=True)
    except Exception as error:
        raise _refused(repository, error) from error


def push(repository: str, folder: Path, arguments: TrainingArguments) -> None:
    """Send a run's ``final/`` to the hub in one commit; what is there already is not sent again."""
    final = folder / FINAL
    try:
        sent = HfApi().upload_folder(
            repo_id=repository,
            folder_path=final,
            revision=arguments.hub_revision,
            commit_message="Add a student distilled by logitcask",
        )
    except Exception as error:
        reason = _refused(repository, error)
        raise LogitcaskError(f"{reason}; {final} is saved: push it with hf upload {repository} {final}") from error
    say(f"{final} -> {sent.commit_url.split('/commit/')[0]}")


def _refused(repository: str, error: Exception) -> LogitcaskError:
    """Return why the hub does not take a student, in one line."""
    response = getattr(error, "response", None)
    if isinstance(error, HFValidationError):
        return LogitcaskError(f"--push-to-hub: must be NAME or ME/NAME, got {repository!r}")
    if isinstance(error, HfHubHTTPError) and response is not None and response.status_code in (401, 403, 404):
        return explained(f"hf://{repository}", error)
    if isinstance(error, OfflineModeIsEnabled):
        return LogitcaskError(f"--push-to-hub {repository}: HF_HUB_OFFLINE is set: unset it")
    return LogitcaskError(f"--push-to-hub {repository}: the hub cannot be reached: {shown_reason(error)}")
