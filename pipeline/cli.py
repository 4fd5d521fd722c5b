"""The logitcask command. Each subcommand parses its options, imports what it needs, and calls one function."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from logitcask.pipeline.settings.base import Command, Group, expand_home, home_path, options_from, require_plain_text
from logitcask.pipeline.settings.browse import BrowseSettings
from logitcask.pipeline.settings.data import SplitSettings
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.settings.generate import GenerateSettings
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.settings.import_labels import ImportSettings
from logitcask.pipeline.settings.plan import PlanSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "" if sys.stderr.isatty() else "1")
os.environ.setdefault("TQDM_DISABLE", "" if sys.stderr.isatty() else "1")

QUIET_PACKAGES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings={"color": False},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Offline logit distillation: run the teacher once into a cache of sparse soft labels, train students from it.",
)
cache_app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Inspect, browse, verify, copy, import and export logit caches.",
)
app.add_typer(cache_app, name="cache")


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"logitcask {version('logitcask')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="print no progress and no notices, only results and errors")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    from logitcask.pipeline.console import QUIET

    before = QUIET.set(quiet)
    context.call_on_close(lambda: QUIET.reset(before))
    if quiet:
        os.environ.update(QUIET_PACKAGES)


def _example(text: str) -> dict[str, Any]:
    """Return what every command is registered with: its class, and an example at the end of its help."""
    return {"cls": Command, "epilog": f"Example: logitcask {text}"}


def _place(name: str, words: str) -> Any:
    """Return the argument that names a cache: a path, with ``~`` expanded, or a URL."""
    return typer.Argument(parser=expand_home, metavar=name, help=words)


def _runs(words: str) -> Any:
    return typer.Argument(parser=home_path, metavar="RUNS", help=words)


def _file(words: str) -> Any:
    return typer.Option(parser=home_path, metavar="PATH", help=words)


@app.command(
    "generate-data",
    **_example(
        "generate-data --provider openai --model gpt-5-mini --prompts code --num-examples 500 "
        "--prices gpt-5-mini=0.25/2 --max-cost 3 --output-dir data"
    ),
)
@options_from(GenerateDataSettings)
def generate_data(settings: GenerateDataSettings) -> None:
    """Write prompt/response examples to OUTPUT_DIR/train.jsonl. Run it again to resume: no answer is paid for twice."""
    from logitcask.pipeline.generate_data import generate as run

    typer.echo(run.generate_data(settings))


@app.command("split", **_example("split --data data/all.jsonl --test 1000 --output-dir data"))
@options_from(SplitSettings)
def split(settings: SplitSettings) -> None:
    """Cut data into train.jsonl and test.jsonl; duplicates stay on one side."""
    from logitcask.pipeline.text.reading import Reading
    from logitcask.pipeline.text.split import split_data

    reading = Reading(settings.data, **settings.taken)
    done = split_data(reading, settings.output_dir, settings.test, settings.seed, settings.bad_share)
    typer.echo(f"{done.train_examples:,} examples -> {done.train}, {done.test_examples:,} -> {done.test}")


@app.command(
    "precompute-logits",
    **_example("precompute-logits --teacher-model Qwen/Qwen3-8B --train-data data/train.jsonl --output data/cache"),
)
@options_from(PrecomputeSettings)
def precompute_logits(settings: PrecomputeSettings) -> None:
    """Stage 1: run the teacher once and write its sparse soft labels. Run it again to finish an interrupted cache.

    With --dry-run, print what it would do.
    """
    if settings.dry_run:
        from logitcask.pipeline.plan.dry_run import print_dry_run

        print_dry_run(settings)
        return
    from logitcask.pipeline.precompute.precompute import precompute

    report = precompute(settings)
    data = report.manifest.data
    if not report.shards_written:
        part = f" of part {settings.shards}" if settings.shards else ""
        typer.echo(f"complete  {settings.output} has all {report.shards_found} shards{part}; nothing to do")
        return
    typer.echo(
        f"{data.examples} examples, {data.positions} target positions -> {settings.output} "
        f"({report.shards_written} shards written, {report.shards_found} already present)\n"
        f"{data.truncated} examples truncated at {data.max_seq_length} tokens, {data.dropped} dropped: no target left"
    )
    if settings.engine in ("vllm-topk", "server"):
        owner = "vLLM's own" if settings.engine == "vllm-topk" else "the server's"
        typer.echo(f"labels are {owner}: only the head at T=1, no draws, no other temperature")


@app.command("train", **_example("train --cache data/cache --student-config tiny --output-dir runs/a"))
@options_from(TrainSettings)
def train(settings: TrainSettings) -> None:
    """Stage 2: train a student from the cache, without a teacher in memory."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch then uses huge pages for large tensors on a CPU

    from logitcask.pipeline.train.train import run_training

    run_training(settings)


@app.command(
    "plan", **_example("plan --train-data data/train.jsonl --teacher-model Qwen/Qwen3-8B --device H100 --price 2.5")
)
@options_from(PlanSettings)
def plan(settings: PlanSettings) -> None:
    """Estimate the cost of a run: bytes of the cache, hours of the teacher, memory of both stages. Runs nothing."""
    from logitcask.pipeline.plan.plan import print_plan

    print_plan(settings)


@app.command("plot", **_example("plot runs/a runs/b --output curves.png"))
def plot(
    runs: Annotated[list[Path], _runs("folders of runs, finished or not")],
    output: Annotated[Path, _file("the figure to write: .png, .svg or .pdf")] = Path("curves.png"),
) -> None:
    """Plot the losses and perplexities of runs, in training and on held-out examples, from their metrics.jsonl."""
    from logitcask.pipeline.runs.curves import plot_runs

    typer.echo(f"{plot_runs(runs, output)} curves of {len(runs)} runs -> {output}")


@app.command(
    "evaluate", **_example("evaluate --model runs/a/final --cache data/held-out-cache --output runs/a/evaluation.json")
)
@options_from(EvaluateSettings)
def evaluate(settings: EvaluateSettings) -> None:
    """Evaluate a student: on a cache, on HumanEval, on tasks of lm-evaluation-harness.

    A cache gives perplexity, KL to the teacher at each temperature, top-1 agreement and calibration.
    """
    from logitcask.pipeline.evaluate import evaluate as evaluating

    evaluation = evaluating.evaluate(settings)
    if settings.json_:
        typer.echo(evaluation.model_dump_json(indent=2))
    else:
        evaluating.print_evaluation(evaluation)


@app.command("compare", **_example("compare runs/a runs/b --output comparison.md --plot curves.png"))
def compare(
    runs: Annotated[list[Path], _runs("folders of finished runs")],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    output: Annotated[Path | None, _file("write the table to this file, as Markdown")] = None,
    plot: Annotated[Path | None, _file("plot the total losses to this .png, .svg or .pdf")] = None,
) -> None:
    """Compare runs in one table: the settings that differ, what they cost, and their results."""
    from logitcask.pipeline.runs.compare import compare as compare_runs

    typer.echo(compare_runs(runs, output, plot, as_json=json))


@app.command("generate", **_example("generate --model runs/a/final --prompt 'Write a function that adds two numbers.'"))
@options_from(GenerateSettings)
def generate(settings: GenerateSettings) -> None:
    """Generate text with a student."""
    from logitcask.pipeline.models.generate import generate_text

    for piece in generate_text(
        settings.model,
        settings.prompt,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        device=settings.device,
        seed=settings.seed,
    ):
        typer.echo(piece, nl=False)  # flushed at once
    typer.echo()


@cache_app.command("info", **_example("cache info data/cache --plot cache.png"))
def cache_info(
    path: Annotated[str, _place("PATH", "folder, .zip file or URL of the cache")],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    plot: Annotated[Path | None, _file("plot mass by rank and entropies to this .png, .svg or .pdf")] = None,
) -> None:
    """Show what a cache holds: identity, sizes, captured mass, entropy, the most and least certain examples."""
    from logitcask.cache.errors import IncompleteCacheError
    from logitcask.cache.report.info import describe, render
    from logitcask.cache.report.plot import plot_labels, require_plot

    if plot:
        require_plot(plot)
    info = describe(path)
    typer.echo(info.model_dump_json(indent=2) if json else render(info))
    if plot:
        if info.labels is None:
            raise IncompleteCacheError(f"{path}: no shard is committed yet: there is nothing to plot")
        plot_labels(info.labels, info.manifest.teacher.id, plot)


def _shard_count(path: str) -> int:
    """Return the number of shards of a cache, finished or not."""
    from logitcask.cache.reader import read_manifest
    from logitcask.cache.storage.open import open_store

    return read_manifest(open_store(path, read_only=True), path).shards.count


@cache_app.command("copy", **_example("cache copy data/cache s3://bucket/caches/code --shards 0:10"))
def cache_copy(
    source: Annotated[str, _place("SOURCE", "folder, .zip file, or s3://, gs://, hf://, ssh:// URL")],
    destination: Annotated[str, _place("DESTINATION", "the same; an interrupted copy there is resumed")],
    shards: Annotated[
        str | None, typer.Option(metavar="FIRST:STOP", help="copy only these, as a cache in itself")
    ] = None,
) -> None:
    """Copy a cache, checking every object at both ends. Run it again to finish an interrupted copy."""
    from logitcask.cache.copy import copy_cache
    from logitcask.pipeline.console import track
    from logitcask.pipeline.settings.base import shard_range

    chosen = shard_range(shards) if shards else None
    with track("copying", chosen[1] - chosen[0] if chosen else _shard_count(source), "shards") as advance:
        copied = copy_cache(source, destination, chosen, advance)
    typer.echo(
        f"{source} -> {destination}: {copied.brought} shards copied, {copied.found} already present, "
        f"{copied.bytes:,} bytes written; all match their digests"
    )


@cache_app.command(
    "import",
    **_example("cache import captures/qwen3 --format distillkit --tokenizer Qwen/Qwen3-8B --output data/cache"),
)
@options_from(ImportSettings)
def cache_import(settings: ImportSettings) -> None:
    """Make a cache of labels that another tool made. They must fit their text; what they lack is recorded.

    Run it again to finish an interrupted import.
    """
    from logitcask.pipeline.labels_from.import_labels import import_labels

    report = import_labels(settings)
    data, label = report.manifest.data, report.manifest.label
    typer.echo(
        f"{data.examples:,} examples, {data.positions:,} target positions -> {settings.output} "
        f"({report.shards_written} shards written)"
    )
    typer.echo(
        f"head {label.head_size} of {report.fewest} to {report.most} entries at T=1, no draws; "
        f"{report.positions_left_out:,} positions left out: fewer entries"
    )
    if not label.knows("rest"):
        typer.echo("the source gives only the entries, not the mass outside them: train with --tail renormalize")


@cache_app.command("export", **_example("cache export data/cache --format parquet --output labels.parquet"))
def cache_export(
    cache: Annotated[str, _place("CACHE", "folder, .zip file or URL of the cache")],
    form: Annotated[str, typer.Option("--format", metavar="NAME", help="parquet or topk-jsonl")],
    output: Annotated[Path, _file("the file to write")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
) -> None:
    """Write the heads of a cache's labels at T=1 to a file, one row per example, for `cache import --format topk`."""
    from logitcask.pipeline.labels_from.export import export_labels

    typer.echo(f"{export_labels(cache, output, form, overwrite=overwrite):,} examples -> {output}")


@cache_app.command("browse", **_example("cache browse data/cache --examples worst:10,0:5 --html labels.html"))
@options_from(BrowseSettings)
def cache_browse(settings: BrowseSettings) -> None:
    """Write a page of labels, token by token: one file, to be opened in a browser, that loads nothing."""
    from logitcask.pipeline.browse.page import browse

    typer.echo(f"{browse(settings)} examples -> {settings.html}")


@cache_app.command("verify", **_example("cache verify data/cache --repair"))
def cache_verify(
    path: Annotated[str, _place("PATH", "folder, .zip file or URL of the cache")],
    repair: Annotated[
        bool, typer.Option("--repair", help="drop damaged shards, so that stage 1 computes them again")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check every object against its digest, and the labels against the manifest and each other."""
    from dataclasses import asdict
    from json import dumps

    from logitcask.cache import verify as verification
    from logitcask.cache.errors import CacheFormatError
    from logitcask.pipeline.console import track

    with track("verifying", _shard_count(path), "shards") as advance:
        report = verification.verify(path, advance)
    summary = "\n".join(report.problems) or f"{path}: all {report.shards} shards are intact"
    typer.echo(dumps({"path": path, **asdict(report)}, indent=2) if json else summary)
    if not report.problems:
        return
    if not repair:
        raise CacheFormatError(f"{path}: {len(report.problems)} problems: {report.remedy}")
    dropped = verification.repair(path, report)
    if not json:
        again = f"dropped shards {dropped}: run the same logitcask precompute-logits command again to recompute them"
        typer.echo(again if dropped else f"nothing to repair: {report.remedy}")


def main() -> None:
    """Run the command; a user's error is one line on stderr and exit code 2 (typer exits with 130 on an interrupt)."""
    from logitcask.cache.errors import LogitcaskError

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the output has no Unicode, as of a pipe on Windows
    try:
        require_plain_text("the command line", sys.argv[1:])
        app()
    except LogitcaskError as error:
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
        sys.exit(2)
    except OSError as error:  # such as a full disk or a missing permission
        sys.stderr.write("error: " + " ".join(f"{error}: fix that and run the same command again".split()) + "\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
