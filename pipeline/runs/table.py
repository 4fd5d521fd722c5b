"""Figures of finished runs side by side: what differs, what it cost, how good the students are."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from logitcask.pipeline.runs.evaluation import rows as evaluation_rows
from logitcask.pipeline.runs.run_folder import Run, curve, divergence_name

# only the place of a run, how it was resumed, and what follows from the seed
NOT_COMPARED = {"output_dir", "resume_from_checkpoint", "extend", "wandb_run_id", "first_epoch"}
LOSSES = {
    "total_loss": "total loss",
    "hard_loss": "hard loss, nats",
    "soft_loss": "soft loss, T² {}, nats",
    "perplexity": "perplexity",
}
WIDEST = 40  # characters per setting


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the names of settings that differ among the runs."""
    known = sorted({name for run in runs for name in run.settings} - NOT_COMPARED)
    return [name for name in known if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)]


def last(run: Run, name: str) -> float | None:
    """Return the last logged value of a quantity, None if there is none."""
    values = curve(run.log, name)[1]
    return values[-1] if values else None


def effort(run: Run) -> dict[str, float | None]:
    """Return steps, tokens trained on, seconds, tokens per second of training alone, and peak memory in MB."""
    lines = [(line["tokens"], line.get("tokens_per_second")) for line in run.log if line.get("tokens") is not None]
    spent = sum((tokens or 0) / speed for tokens, speed in lines if speed)
    tokens = sum(tokens or 0 for tokens, _ in lines)
    return {
        "steps": max((line["step"] or 0 for line in run.log), default=0),
        "tokens": tokens,
        "seconds": last(run, "seconds"),
        "tokens_per_second": tokens / spent if spent else None,
        "peak_memory_mb": max(filter(None, (line.get("peak_memory_mb") for line in run.log)), default=None),
    }


def table(names: Sequence[str], runs: Sequence[Run]) -> list[list[str]]:
    """Return lines of cells, the first of them the head: one column per run, no row that is empty for all runs."""
    soft = {divergence_name(run.settings) for run in runs}
    names_of = {key: word.format(*soft if len(soft) == 1 else ["divergence"]) for key, word in LOSSES.items()}
    columns = [_column(run, differing(runs), names_of) for run in runs]
    known = list(dict.fromkeys(row for column in columns for row in column))
    filled = [row for row in known if any(column.get(row) for column in columns)]
    return [["", *names], *([row, *(column.get(row, "") for column in columns)] for row in filled)]


def _column(run: Run, settings: Sequence[str], losses: Mapping[str, str]) -> dict[str, str]:
    cost = effort(run)
    cells = {f"`{name}`": _setting(run.settings.get(name)) for name in settings}
    cells |= {
        "steps": f"{cost['steps']:,}",
        "tokens": f"{cost['tokens']:,}",
        "time, s": _number(cost["seconds"], ".1f"),
        "tokens/s of training": _number(cost["tokens_per_second"], ".0f"),
        "peak memory, MB": _number(cost["peak_memory_mb"], ".0f"),
    }
    cells |= {f"training: {word}, last": _number(last(run, key), ".4g") for key, word in losses.items()}
    for key, word in losses.items():
        ends = [_number(part.get(f"eval_{key}"), ".4g") for part in (run.before, run.after)]
        cells[f"held out: {word}, before → after"] = " → ".join(end or "?" for end in ends) if any(ends) else ""
    if run.best:
        final = ", which final/ is" if run.settings.get("load_best") else ""
        cells["held out: total loss, best"] = f"{run.best['eval_total_loss']:,.4g} at step {run.best['step']:,}{final}"
    if run.evaluation:
        if on_cache := run.evaluation.on_cache:
            cells["evaluated on"] = f"{on_cache.cache}, {on_cache.positions:,} positions"
        cells |= {f"evaluation: {name}": value for name, value in evaluation_rows(run.evaluation).items()}
    return cells


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:,{form}}"


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else "not set" if value is None else json.dumps(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
