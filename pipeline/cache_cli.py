"""The ``logitcask cache`` commands. Each parses its options, imports what it needs, and calls one function."""

from pathlib import Path
from typing import Annotated

import typer

from logitcask.pipeline.command_line import Group, example, file, options_from, place
from logitcask.pipeline.settings.cache import BrowseSettings, ImportSettings

cache_app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Inspect, browse, verify, copy, import and export logit caches.",
)


@cache_app.command("info", **example("cache info data/cache --plot cache.png"))
def cache_info(
    path: Annotated[str, place("PATH", "folder, .zip file or URL of the cache")],
    verbose: Annotated[
        bool, typer.Option("--verbose", help="print the bytes of each array, the certificate, examples and all else")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    plot: Annotated[Path | None, file("plot mass by rank and entropies to this .png, .svg or .pdf")] = None,
) -> None:
    """Show what a cache holds in ten lines: teacher, data, size, captured mass, entropy, fidelity of the gradient."""
    from logitcask.cache.errors import IncompleteCacheError
    from logitcask.cache.report.info import describe, render
    from logitcask.cache.report.plot import plot_labels, require_plot
    from logitcask.cache.report.summary import summarize

    if plot:
        require_plot(plot)
    info = describe(path)
    typer.echo(info.model_dump_json(indent=2) if json else render(info) if verbose else summarize(info))
    if plot:
        if info.labels is None:
            raise IncompleteCacheError(f"{path}: no shard is committed yet: there is nothing to plot")
        plot_labels(info.labels, info.manifest.teacher.id, plot)


def _shard_count(path: str) -> int:
    """Return the number of shards of a cache, finished or not."""
    from logitcask.cache.reader import read_manifest
    from logitcask.cache.storage.open import open_store

    return read_manifest(open_store(path, read_only=True), path).shards.count


@cache_app.command("copy", **example("cache copy data/cache s3://bucket/caches/code --shards 0:10"))
def cache_copy(
    source: Annotated[str, place("SOURCE", "folder, .zip file, or s3://, gs://, hf://, ssh:// URL")],
    destination: Annotated[str, place("DESTINATION", "the same; an interrupted copy there is resumed")],
    shards: Annotated[
        str | None, typer.Option(metavar="FIRST:STOP", help="copy only these, as a cache in itself")
    ] = None,
) -> None:
    """Copy a cache, checking every object at both ends. Run it again to finish an interrupted copy."""
    from logitcask.cache.copy import copy_cache
    from logitcask.pipeline.console import counted, track
    from logitcask.pipeline.settings.base import shard_range

    chosen = shard_range(shards) if shards else None
    with track("copying", chosen[1] - chosen[0] if chosen else _shard_count(source), "shards") as advance:
        copied = copy_cache(source, destination, chosen, advance)
    typer.echo(
        f"{source} -> {destination}: {counted(copied.brought, 'shard')} copied, {copied.found:,} already present, "
        f"{copied.bytes:,} bytes written; all match their digests"
    )


@cache_app.command(
    "import",
    **example("cache import captures/qwen3 --format distillkit --tokenizer Qwen/Qwen3-8B --output data/cache"),
)
@options_from(ImportSettings)
def cache_import(settings: ImportSettings) -> None:
    """Make a cache of labels that another tool made. They must fit their text; what they lack is recorded.

    Run it again to finish an interrupted import.
    """
    from logitcask.pipeline.console import counted
    from logitcask.pipeline.labels_from.import_labels import import_labels

    report = import_labels(settings)
    data, label = report.manifest.data, report.manifest.label
    typer.echo(
        f"{data.examples:,} examples, {data.positions:,} target positions -> {settings.output} "
        f"({counted(report.shards_written, 'shard')} written)"
    )
    typer.echo(
        f"head {label.head_size} of {report.fewest} to {report.most} entries at T=1, no draws; "
        f"{report.positions_left_out:,} positions left out: fewer entries"
    )
    if not label.knows("rest"):
        typer.echo("the source gives only the entries, not the mass outside them: train with --tail renormalize")


@cache_app.command("export", **example("cache export data/cache --format parquet --output labels.parquet"))
def cache_export(
    cache: Annotated[str, place("CACHE", "folder, .zip file or URL of the cache")],
    form: Annotated[str, typer.Option("--format", metavar="NAME", help="parquet or topk-jsonl")],
    output: Annotated[Path, file("the file to write")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
) -> None:
    """Write the heads of a cache's labels at T=1 to a file, one row per example, for `cache import --format topk`."""
    from logitcask.pipeline.labels_from.export import export_labels

    typer.echo(f"{export_labels(cache, output, form, overwrite=overwrite):,} examples -> {output}")


@cache_app.command("browse", **example("cache browse data/cache --examples worst:10,0:5 --html labels.html"))
@options_from(BrowseSettings)
def cache_browse(settings: BrowseSettings) -> None:
    """Write a page of labels, token by token: one file, to be opened in a browser, that loads nothing."""
    from logitcask.pipeline.pages.labels import browse

    typer.echo(f"{browse(settings)} examples -> {settings.html}")


@cache_app.command("verify", **example("cache verify data/cache --repair"))
def cache_verify(
    path: Annotated[str, place("PATH", "folder, .zip file or URL of the cache")],
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
    intact = "its shard is intact" if report.shards == 1 else f"all {report.shards:,} shards are intact"
    summary = "\n".join(report.problems) or f"{path}: {intact}"
    typer.echo(dumps({"path": path, **asdict(report)}, indent=2) if json else summary)
    if not report.problems:
        return
    if not repair:
        raise CacheFormatError(f"{path}: {len(report.problems)} problems: {report.remedy}")
    dropped = verification.repair(path, report)
    if not json:
        again = f"dropped shards {dropped}: run the same logitcask precompute-logits command again to recompute them"
        typer.echo(again if dropped else f"nothing to repair: {report.remedy}")
