"""``logitcask generate-data``: ask the prompts that have no answer yet, then sort all answers into the data files.

The folder holds ``answers.jsonl`` (every answer so far, never requested again), ``train.jsonl`` and
``validation.jsonl`` (rebuilt from it at the end of each run), and ``manifest.json``.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from logitcask.cache.errors import LogitcaskError, differences
from logitcask.pipeline.console import track
from logitcask.pipeline.generate_data.client import Outcome, Price, Reply, Spending, ask_all
from logitcask.pipeline.generate_data.journal import Answer, Journal
from logitcask.pipeline.generate_data.prompts import Prompt, digest, make_prompts, read_templates
from logitcask.pipeline.generate_data.providers import PROVIDERS, open_api
from logitcask.pipeline.runs.run_folder import write_json
from logitcask.pipeline.settings.generate_data import GenerateDataSettings

SPLITS = ("train", "validation")
# settings that determine the answers: a run that resumes a folder must have the same
FIXED = ("provider", "model", "max_new_tokens", "temperature", "seed")


def generate_data(settings: GenerateDataSettings) -> str:
    """Write the examples and return a summary to print. Raises LogitcaskError for errors of the user or the server."""
    if settings.provider == "source":
        from logitcask.pipeline.generate_data.python_source import from_source

        written = from_source(settings.source_dir, settings.output_dir, settings.num_examples, settings.seed)
        return f"{written.examples} examples -> {written.path}"
    _require_packages(settings.provider)
    assert settings.prompts is not None, "required by the settings"
    templates = read_templates(settings.prompts)
    prompts = make_prompts(templates, settings.num_examples, settings.seed)
    fixed = {*FIXED, *(() if settings.logprobs is None else ("logprobs",))}
    identity = {**settings.model_dump(include=fixed), "prompts": digest(templates.model_dump_json())}
    folder = settings.output_dir
    _require_same_run(folder, identity)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(folder / "answers.jsonl"))
        manifest = folder / "manifest.json"
        if not manifest.exists():
            write_json(manifest, {"made_by": identity, "counts": None})
        outcome = _ask_missing(settings, prompts, journal)
        fates = _write_examples(settings, (journal[p.id] for p in prompts if p.id in journal))
        report = _report(settings, identity, fates, outcome, prompts, journal)
        write_json(manifest, report)
    if outcome.failed:
        raise LogitcaskError(
            f"{outcome.failed} prompts got no reply (the last: {outcome.reason}); {len(prompts) - sum(fates.values())} "
            f"of {len(prompts)} are open, the other examples are in {folder}: run the same command again for the rest"
        )
    return _summary(settings, report)


def _require_packages(provider: str) -> None:
    needed = ["datasketch", "markdown_it", *([PROVIDERS[provider][0]] if provider in PROVIDERS else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise LogitcaskError(
            f"--provider {provider} needs the packages {', '.join(missing)}: pip install 'logitcask[providers]'"
        )


def _require_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Raise LogitcaskError if the folder holds the data of another run, listing every difference."""
    path = folder / "manifest.json"
    if not path.exists():
        for name in ("answers.jsonl", "train.jsonl", "validation.jsonl"):
            # an empty file is that of a run killed before its first answer
            if (folder / name).exists() and (folder / name).stat().st_size:
                raise LogitcaskError(f"{folder / name}: already exists: choose another --output-dir or remove it")
        return
    try:
        stored = dict(json.loads(path.read_bytes())["made_by"])
    except (ValueError, KeyError, TypeError) as error:
        raise LogitcaskError(f"{path}: not a manifest of generated data: choose another --output-dir") from error
    wrong = differences(stored, identity, "folder")
    if wrong:
        raise LogitcaskError(
            f"{folder}: holds answers made with other settings: {'; '.join(wrong)}: choose another --output-dir"
        )


def _price(settings: GenerateDataSettings) -> Price | None:
    dollars = settings.prices.get(settings.model or "")
    return Price(*dollars, settings.max_new_tokens) if dollars else None


def _paid(price: Price, journal: Journal) -> float:
    return sum(price.paid(answer.prompt, answer.input_tokens, answer.output_tokens) for answer in journal)


def _ask_missing(settings: GenerateDataSettings, prompts: list[Prompt], journal: Journal) -> Outcome:
    missing = [prompt for prompt in prompts if prompt.id not in journal]

    def record(prompt: Prompt, reply: Reply) -> None:
        answer = Answer(
            id=prompt.id,
            prompt=prompt.text,
            response=reply.text.encode(errors="replace").decode(),  # half a surrogate pair cannot be encoded
            category=prompt.category,
            language=prompt.language,
            finish=reply.finish,
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens,
            scores=reply.scores,
        )
        journal.append(answer)

    if not missing:
        return Outcome()
    if settings.provider == "local":
        _ask_locally(settings, missing, record)
        return Outcome()
    try:
        return asyncio.run(_ask_api(settings, missing, journal, record))
    except* OSError as group:
        raise group.exceptions[0] from None


async def _ask_api(
    settings: GenerateDataSettings, missing: list[Prompt], journal: Journal, record: Callable[[Prompt, Reply], None]
) -> Outcome:
    price = _price(settings)
    opened = open_api(
        settings.provider,
        settings.model or "",
        base_url=settings.base_url,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        timeout=settings.request_timeout,
        max_retries=settings.max_retries,
        logprobs=settings.logprobs,
    )
    async with opened as ask:
        with track(f"asking {settings.model}", len(missing), "prompts") as advance:
            return await ask_all(
                missing,
                ask,
                concurrency=settings.concurrency,
                price=price,
                spending=Spending(settings.max_cost, _paid(price, journal) if price else 0.0),
                on_reply=record,
                advance=advance,
            )


def _ask_locally(
    settings: GenerateDataSettings, missing: list[Prompt], record: Callable[[Prompt, Reply], None]
) -> None:
    from logitcask.pipeline.generate_data.local_model import answer_locally

    replies = answer_locally(
        settings.model or "",
        missing,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        dtype=settings.dtype,
        device=settings.device,
        seed=settings.seed,
    )
    with track(f"asking {settings.model}", len(missing), "prompts") as advance:
        for batch in replies:
            for prompt, reply in batch:
                record(prompt, reply)
            advance(len(batch))


def _write_examples(settings: GenerateDataSettings, answers: Iterable[Answer]) -> Counter[str]:
    """Rebuild the data files, in the order of the prompts, and return how many answers met each fate."""
    from logitcask.pipeline.generate_data.filters import curate

    fates: Counter[str] = Counter()
    scored = settings.logprobs is not None
    files = {name: settings.output_dir / f"{name}.jsonl" for name in SPLITS}
    files |= {f"scores of {name}": scores_file(settings.output_dir, name) for name in SPLITS if scored}
    with ExitStack() as stack:
        partial = {name: stack.enter_context(file.with_suffix(".partial").open("w")) for name, file in files.items()}
        for fate, answer in curate(
            answers,
            near_duplicate=settings.near_duplicate,
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
        ):
            fates[fate] += 1
            if fate in SPLITS:
                record = answer.model_dump(include={"id", "prompt", "response", "category", "language"})
                partial[fate].write(json.dumps(record) + "\n")
                if scored:
                    partial[f"scores of {fate}"].write(json.dumps(_as_reply(answer)) + "\n")
    for file in files.values():
        file.with_suffix(".partial").replace(file)
    return fates


def scores_file(folder: Path, split: str) -> Path:
    """Return the file of the scores of a split's answers, one server's reply per line."""
    return folder / f"{split}-scores.jsonl"


def _as_reply(answer: Answer) -> dict[str, Any]:
    """Return an answer as the reply of a vLLM server, with its prompt, and no more of it than its scores and text."""
    scores = answer.scores
    assert scores is not None, "the folder holds only answers with scores"
    content = [
        {
            "token": f"token_id:{token}",
            "logprob": logprob,
            "top_logprobs": [{"token": f"token_id:{each}", "logprob": value} for each, value in top],
        }
        for token, logprob, top in zip(scores.tokens, scores.logprobs, scores.top, strict=True)
    ]
    choice = {"message": {"role": "assistant", "content": answer.response}, "logprobs": {"content": content}}
    return {"id": answer.id, "prompt_token_ids": scores.prompt, "response": {"choices": [choice]}}


def _report(
    settings: GenerateDataSettings,
    identity: dict[str, Any],
    fates: Counter[str],
    outcome: Outcome,
    prompts: list[Prompt],
    journal: Journal,
) -> dict[str, Any]:
    """Return the manifest: what made the answers, what became of them, tokens, dollars."""
    price, answered = _price(settings), sum(fates.values())
    tokens = {"input": 0, "output": 0, "answers_that_tell_none": 0}
    for answer in journal:
        tokens["input"] += answer.input_tokens or 0
        tokens["output"] += answer.output_tokens or 0
        tokens["answers_that_tell_none"] += answer.input_tokens is None or answer.output_tokens is None
    package = PROVIDERS[settings.provider][0] if settings.provider in PROVIDERS else "transformers"
    return {
        "made_by": identity,
        "base_url": settings.base_url,
        "packages": {package: version(package)},
        "selection": settings.model_dump(include={"near_duplicate", "validation_fraction"}),
        "counts": {
            "prompts": len(prompts),
            "answered": answered,
            "kept": {name: fates[name] for name in SPLITS},
            "dropped": {name: count for name, count in sorted(fates.items()) if name not in SPLITS},
            "failed": outcome.failed,
            "open": len(prompts) - answered,
        },
        "stopped": outcome.stopped or None,
        "tokens": tokens,
        "dollars": round(_paid(price, journal), 6) if price else None,
        "dollars_a_million_tokens": {"input": price.input, "output": price.output} if price else None,
    }


def _summary(settings: GenerateDataSettings, report: dict[str, Any]) -> str:
    counts, tokens, folder = report["counts"], report["tokens"], settings.output_dir
    dropped = ", ".join(f"{count} {name}" for name, count in counts["dropped"].items()) or "none"
    lines = [
        f"{counts['kept']['train']} examples -> {folder / 'train.jsonl'}, "
        f"{counts['kept']['validation']} -> {folder / 'validation.jsonl'}; dropped: {dropped}"
    ]
    if settings.provider != "local":
        cost = f"${report['dollars']:,.4f}" if report["dollars"] is not None else (
            f"unknown: no price for {settings.model}, give it with --prices {settings.model}=INPUT/OUTPUT"
        )  # fmt: skip
        uncounted = tokens["answers_that_tell_none"]
        hidden = f"; {uncounted} answers report no tokens and count as the most they can cost" if uncounted else ""
        lines.append(f"{tokens['input']:,} input tokens, {tokens['output']:,} output tokens{hidden}; cost {cost}")
    if report["stopped"]:
        lines.append(
            f"stopped at --max-cost {settings.max_cost:g}: {counts['open']} of {counts['prompts']} prompts are open; "
            "the next might cost more than is left: raise it and run the same command again to resume"
        )
    return "\n".join(lines)
