"""The logitcask command. Each subcommand parses its options, imports what it needs, and calls one function."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from logitcask.pipeline.cache_cli import cache_app
from logitcask.pipeline.command_line import (
    PARSER_ERROR,
    Group,
    example,
    file,
    help_command,
    new_folder,
    options_from,
    parser_message,
    run_folders,
)
from logitcask.pipeline.mistakes import error_lines
from logitcask.pipeline.settings.base import require_plain_text
from logitcask.pipeline.settings.data import SplitSettings
from logitcask.pipeline.settings.evaluate import EvaluateSettings
from logitcask.pipeline.settings.generate import GenerateSettings
from logitcask.pipeline.settings.generate_data import GenerateDataSettings
from logitcask.pipeline.settings.plan import PlanSettings
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.settings.train import TrainSettings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it says about missing weights is our error
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns when imported, which peft does for any student

QUIET_PACKAGES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings={"color": False, "help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Offline logit distillation: run the teacher once into a cache of sparse soft labels, train students from it.",
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


@app.command(
    "generate-data",
    **example(
        "generate-data --provider openai --model gpt-5-mini --prompts code --num-examples 500 "
        "--prices gpt-5-mini=0.25/2 --max-cost 3 --output-dir data"
    ),
)
@options_from(GenerateDataSettings)
def generate_data(settings: GenerateDataSettings) -> None:
    """Write prompt/response examples to OUTPUT_DIR/train.jsonl. Run it again to resume: no answer is paid for twice."""
    from logitcask.pipeline.generate_data import generate as run

    typer.echo(run.generate_data(settings))
    if settings.logprobs is not None:
        from logitcask.pipeline.labels_from.generated import make_caches

        for line in make_caches(settings):
            typer.echo(line)


@app.command("split", **example("split --data data/all.jsonl --test 1000 --output-dir data"))
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
    **example("precompute-logits --teacher-model Qwen/Qwen3-8B --train-data data/train.jsonl --output data/cache"),
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
    from logitcask.pipeline.console import announce, hide_bars, say
    from logitcask.pipeline.precompute.precompute import precompute
    from logitcask.pipeline.precompute.report import after_lines, result_line

    hide_bars()
    report = precompute(settings)
    announce(*reversed(result_line(settings, report)))
    for label, text in after_lines(settings, report):
        say(text, label)


@app.command("train", **example("train --cache data/cache --student-config tiny --output-dir runs/a"))
@options_from(TrainSettings)
def train(settings: TrainSettings) -> None:
    """Stage 2: train a student from the cache, without a teacher in memory."""
    from logitcask.pipeline.console import hide_bars
    from logitcask.pipeline.train.train import run_training

    hide_bars()
    run_training(settings)


@app.command(
    "plan", **example("plan --train-data data/train.jsonl --teacher-model Qwen/Qwen3-8B --device H100 --price 2.5")
)
@options_from(PlanSettings)
def plan(settings: PlanSettings) -> None:
    """Estimate the cost of a run: bytes of the cache, hours of the teacher, memory of both stages. Runs nothing."""
    from logitcask.pipeline.plan.plan import print_plan

    print_plan(settings)


@app.command("plot", **example("plot runs/a runs/b --output curves.png"))
def plot(
    runs: Annotated[list[Path], run_folders("folders of runs, finished or not")],
    output: Annotated[Path, file("the figure to write: .png, .svg or .pdf")] = Path("curves.png"),
) -> None:
    """Plot the losses and perplexities of runs, in training and on held-out examples, from their metrics.jsonl."""
    from logitcask.pipeline.runs.curves import plot_runs

    number = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    typer.echo(f"{plot_runs(runs, output)} curves of {number} -> {output}")


@app.command(
    "evaluate", **example("evaluate --model runs/a/final --cache data/held-out-cache --output runs/a/evaluation.json")
)
@options_from(EvaluateSettings)
def evaluate(settings: EvaluateSettings) -> None:
    """Evaluate a student: on a cache, on HumanEval, on tasks of lm-evaluation-harness.

    A cache gives perplexity, KL to the teacher at each temperature, top-1 agreement and calibration.
    """
    from logitcask.pipeline.console import hide_bars
    from logitcask.pipeline.evaluate import evaluate as evaluating

    hide_bars()
    evaluation = evaluating.evaluate(settings)
    if settings.json_:
        typer.echo(evaluation.model_dump_json(indent=2))
    else:
        evaluating.print_evaluation(evaluation)


@app.command("compare", **example("compare runs/a runs/b --output comparison.md --plot curves.png"))
def compare(
    runs: Annotated[list[Path], run_folders("folders of finished runs")],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    output: Annotated[Path | None, file("write the table to this file, as Markdown")] = None,
    plot: Annotated[Path | None, file("plot losses and perplexity by tokens to this .png, .svg or .pdf")] = None,
    html: Annotated[Path | None, file("write a report to this file: results, settings, curves, answers")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="with --html: a prompt that every student answers")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file at --html")] = False,
) -> None:
    """Compare runs in one table: the settings that differ, what they cost, and their results."""
    from logitcask.cache.errors import LogitcaskError
    from logitcask.pipeline.runs.compare import compare as compare_runs

    if html is None and (prompt or overwrite):
        raise LogitcaskError("--prompt and --overwrite apply to --html: name the report's file")
    compared = compare_runs(runs, output, plot, as_json=json)
    if html is not None:
        from logitcask.pipeline.models.generate import answer
        from logitcask.pipeline.pages.report import write_report

        write_report(runs, html, prompt or [], answer, overwrite=overwrite)
    typer.echo(compared)


@app.command("generate", **example("generate --model runs/a --prompt 'Write a function that adds two numbers.'"))
@options_from(GenerateSettings)
def generate(settings: GenerateSettings) -> None:
    """Generate text with a student."""
    from logitcask.pipeline.console import hide_bars
    from logitcask.pipeline.models.generate import generate_text

    hide_bars()
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


@app.command("demo", **example("demo demo"))
def demo(folder: Annotated[Path, new_folder("where everything is written [default: demo]")] = Path("demo")) -> None:
    """Show the whole job in a few minutes: a real teacher, its labels, a student of two thirds of its layers, healed.

    Needs the teacher's package, and nothing else that is not installed already. Run it again to resume.
    """
    from logitcask.pipeline.demo.demo import run_demo

    run_demo(folder)


def main() -> None:
    """Run the command; a user's mistake is at most three lines on stderr, and exit code 2; an interrupt is 130."""
    from logitcask.cache.errors import LogitcaskError

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the output has no Unicode, as of a pipe on Windows
    words = sys.argv[1:]
    try:
        require_plain_text("the command line", words)
        sys.exit(app(standalone_mode=False) or 0)
    except LogitcaskError as error:
        message, helps = str(error), str(error).startswith(("--", "give "))
    except PARSER_ERROR as error:
        message, helps = parser_message(error), True
    except OSError as error:  # such as a full disk or a missing permission
        message, helps = f"{error}: fix that and run the same command again", False
    sys.stderr.write(error_lines(message, help_command(typer.main.get_command(app), words) if helps else ""))
    sys.exit(2)


if __name__ == "__main__":
    main()
