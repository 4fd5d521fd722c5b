"""The manual: generated pages are up to date, commands have the options they are shown with, the README repeats it."""

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from logitcask.pipeline.cli import app
from tests.benchmarks import exact_students
from tests.benchmarks.healing import __main__ as healing
from tests.project.reference import MODELS, ROOT, commands, pages

README = ROOT / "README.md"
DOCS = ROOT / "docs"
COMMANDS = dict(commands(typer.main.get_command(app)))
GLOBAL = {"--help", "--version", "--quiet", "--install-completion", "--show-completion"}


def shown_commands(text: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the command and the options of each ``logitcask …`` in a Markdown text, in blocks and between backticks."""
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in (line.removeprefix("$ ").strip() for line in (*lines, *inline)):
        if re.match(r"logitcask [a-z]", line):
            words = shlex.split(
                " ".join(line.split()).removeprefix("logitcask ").split("  #")[0].replace("…", ""), posix=True
            )
            name = max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len, default="")
            yield name or line, {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_generated_pages_are_what_the_program_gives(page: Path) -> None:
    assert page.read_text() == pages()[page], "python -m tests.project.reference writes it again"


def test_the_page_of_settings_has_every_command_that_takes_an_option_file() -> None:
    taking = {name for name, command in COMMANDS.items() if any("--config" in one.opts for one in command.params)}
    assert set(MODELS) == taking


def test_commands_are_shown_with_options_that_they_have() -> None:
    count = 0
    for page in (README, *DOCS.rglob("*.md")):
        for name, options in shown_commands(page.read_text()):
            assert name in COMMANDS, (page, name)
            known = {
                word for parameter in COMMANDS[name].params for word in (*parameter.opts, *parameter.secondary_opts)
            }
            assert options <= known | GLOBAL, (page, name)
            count += 1
    assert count > 50


def test_the_readme_is_short_and_repeats_the_manual() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 250
    first_run = (DOCS / "start/first-run.md").read_text()
    runs = json.loads((ROOT / "tests/benchmarks/results/healing.json").read_text())["runs"]

    def cells(objective: str) -> list[str]:
        of = {at: runs.get(f"{objective}_T{at}_0.25_20_seed0") for at in (1, 2)}
        kl = {at: {each["temperature"]: f"{each['kl']:.3f}" for each in run["kl"]} for at, run in of.items() if run}
        size = next(run for run in of.values() if run)["bytes_per_position"]
        after_two = [kl[2][2.0], kl[2][1.0]] if 2 in kl else ["", ""]
        return [f"{size:.0f}" if size else "–", *after_two, kl[1][1.0] if 1 in kl else ""]

    names = {"the teacher in memory": "exact", "`exact`, 4 bits": "exact-labels", "`standard`, the default": "standard",
             "top-64, renormalised": "top-64-renormalised", "the text alone": "cross-entropy"}  # fmt: skip
    for name, objective in names.items():
        row = next(line for line in text.split("## How good is it?")[1].splitlines() if line.startswith(f"| {name} |"))
        assert [cell.strip() for cell in row.split("|")[2:-1]] == cells(objective)
    output = text.split("## First run")[1].split("```")[1]
    assert not set(output.splitlines()) - set(first_run.splitlines())


def test_the_table_of_the_demos_settings_is_the_measured_one() -> None:
    results = json.loads((ROOT / "tests/benchmarks/results/demo_settings.json").read_text())
    rows = re.findall(r"^\| .* \| (.* \| .* \| .* \| .*) \|$", (DOCS / "start/first-run.md").read_text(), re.MULTILINE)
    assert sorted(rows[1:]) == sorted(
        f"{row['steps']} | {row['processor_seconds']:.0f} | {row['perplexity']:.2f} | {row['kl']:.3f}"
        for row in results["students"].values()
    )


def test_steps_and_loading_are_the_measured_ones() -> None:
    page = " ".join((DOCS / "results/benchmarks.md").read_text().split())
    steps, loading = (
        json.loads((ROOT / f"tests/benchmarks/results/{name}.json").read_text())["ratios"]
        for name in ("student_step", "loader")
    )
    for way in ("hybrid at T=2", "logit at T=1"):
        seconds, memory = (
            SimpleNamespace(**steps[f"a step of 100m, batch 8 x 512, V=49,152: {unit} of ours, {way} / plain"])
            for unit in ("s", "MB")
        )
        figures = f"{seconds.one:.2f} | {seconds.ratio:.2f} | {8 * 512 / seconds.one:.0f}"
        assert f"| from a cache, {way} | {figures} | {memory.one:,.0f} | {memory.ratio:.2f} |" in page
        assert f"| plain cross-entropy | {seconds.other:.2f} | 1.00 " in page
        assert f" | {memory.other:,.0f} | 1.00 |" in page
    alone, worker = (loading[f"tiny: s a step, {way} / in memory"] for way in ("no worker", "one worker"))
    assert f"took {alone['other']:.3f} s, from the demo's" in page
    assert f"{alone['one']:.3f}, with a worker {worker['one']:.3f};" in page
    read = loading["positions/s: lc.loader / train's"]
    assert f"{read['other']:,.0f} target positions per second there, `lc.loader` {read['one']:,.0f}." in page


def test_the_table_of_layers_left_out_is_the_measured_one() -> None:
    results = json.loads((ROOT / "tests/benchmarks/results/pruning.json").read_text())
    page = (DOCS / "guides" / "train.md").read_text()
    for way in results["ways"].values():
        cells = [f"{value:,.2f}" for _, value in sorted(way["perplexity"].items(), reverse=True)]
        assert f" | {' | '.join(cells)} | " in page
    assert f"perplexity of {results['whole']:.2f} with all" in page


def test_the_codes_of_exact_labels_are_those_recorded() -> None:
    results = json.loads((ROOT / "tests/benchmarks/results/exact_codes.json").read_text())
    page = (DOCS / "results/benchmarks.md").read_text()
    names = {
        **{f"{bits} bits": f"fitted, {bits} bits" for bits in (3, 4, 5, 6, 8)},
        "6 bits, the teacher's head in bfloat16": "fitted, 6 bits, a head in bfloat16",
        "6 bits, without a trellis": "fitted, 6 bits, without a trellis",
        "4 bits, with a trellis": "fitted, 4 bits, with a trellis",
        "a rotation, 4 bits": "rotated, 4 bits",
    }
    for row, name in names.items():
        found = results["SmolLM2-135M-Instruct.Q4_1"]["codes"][name]
        each, whole = ([found[t][of] for t in ("T=1", "T=2")] for of in ("gradient", "over 1,200 positions"))
        assert f"| {row} | {found['bytes']:.0f} | {' | '.join(f'{value:.4f}' for value in (*each, *whole))} |" in page
    finest = results["SmolLM2-135M-Instruct.Q4_1"]["codes"]["fitted, 8 bits"]
    errors = [finest[t]["gradient"] for t in ("T=1", "T=2")]
    degrees = " and ".join(f"{math.degrees(error):.2f}" for error in errors)
    study = (DOCS / "results/study.md").read_text().replace("\n", " ")
    assert f"{finest['bytes']:.0f} bytes per position, whose error in a gradient" in study
    assert f"is {errors[0]:.4f} at T=1 and {errors[1]:.4f} at T=2, or {degrees} degrees" in study
    assert f"whose KL from the teacher is {finest['T=1']['kl']:.4f} nats" in study
    for bits in (4, 6):
        found = results["gemma-3-270m-q4_k_m"]["codes"][f"fitted, {bits} bits"]
        figures = " | ".join(f"{found[t]['gradient']:.4f}" for t in ("T=1", "T=2"))
        assert f"| Gemma 3 270M, {bits} bits | {found['bytes']:.0f} | {figures} | | |" in page


@pytest.mark.parametrize("name", ["healing_first.json", "healing.json"])
def test_the_tables_of_healed_students_are_those_recorded(name: str) -> None:
    results = json.loads((ROOT / "tests/benchmarks/results" / name).read_text())
    assert results["runs"]
    assert healing.table(results) in (DOCS / "results/healing.md").read_text()
    assert "/" not in json.dumps(results["runs"]), "no path of a machine"
    assert name == "healing_first.json" or healing.answered(results) in (DOCS / "results/healing.md").read_text()


def test_what_healed_students_were_predicted_to_be_is_beside_what_was_seen() -> None:
    runs = json.loads((ROOT / "tests/benchmarks/results/healing.json").read_text())["runs"]

    def kl(objective: str, at: int) -> list[float]:
        of = {each["temperature"]: each["kl"] for each in runs[f"{objective}_T{at}_0.25_20_seed0"]["kl"]}
        return [of[1.0], of[2.0]]

    page = (DOCS / "results/healing.md").read_text()
    exact, now = kl("exact", 2), kl("exact", 1)
    assert f"| exact, the teacher in memory: KL at T=1 | 0.73 | {exact[0]:.3f} |" in page
    for objective, predicted in (
        ("exact labels", "within 0.01"), ("standard", "+0.05, +0.02"), ("top-64 renormalised", "+0.2, +0.15"),
    ):  # fmt: skip
        behind = ", ".join(f"+{a - b:.3f}" for a, b in zip(kl(objective.replace(" ", "-"), 2), exact, strict=True))
        assert f"| {objective}, more than that: KL at T=1, at T=2 | {predicted} | {behind} |" in page
    assert f"| at T=1: exact, KL at T=1 | 0.70 | {now[0]:.3f} |" in page
    spent = json.loads((ROOT / "tests/benchmarks/results/healing.json").read_text())
    assert f"({spent['core_hours']:.1f} are used, about {spent['lost_hours']} of them" in page
    whole = [runs[f"{name}_T1_1_20_seed0"]["kl"][0]["kl"] for name in ("cross-entropy", "standard")]
    assert f"| all of the data, T=1: cross-entropy | 0.95 | {whole[0]:.3f} |" in page
    assert f"| standard | 0.5, within 0.01 of exact | {whole[1]:.3f}, exact not run |" in page
    assert f"the default label comes to {whole[1]:.3f} and the text alone to {whole[0]:.3f}." in README.read_text()
    labels, default, top = (kl(name, 2)[0] - exact[0] for name in ("exact-labels", "standard", "top-64-renormalised"))
    for text in (" ".join(page.split()), " ".join((DOCS / "results/study.md").read_text().split())):
        said = (
            f"to {labels:.3f} nats at T=2, the default label is {default:.3f} behind, and top-64 renormalised {top:.2f}"
        )
        assert said in text
    for objective, predicted in (("cross-entropy", "1.05, so +0.35"), ("standard", "within 0.015")):
        assert f"| {objective}, more than that | {predicted} | +{kl(objective, 1)[0] - now[0]:.3f} |" in page


def more(found: dict[str, float]) -> str:
    return f"{round(found['more'], 4) + 0:.4f} ± {found['±']:.4f}"


def test_the_students_of_exact_labels_are_those_recorded() -> None:
    results = json.loads((ROOT / "tests/benchmarks/results/exact_students.json").read_text())
    for table in results.values():
        of = {loss: found for loss, found in exact_students.summary(table["runs"]).items() if found}
        assert of == table["summary"]
    page = (DOCS / "guides/train.md").read_text()
    ways = {"SmolLM2, 150 steps": ("exact", "exact-6", "standard", "rounded")}
    for name, (loss, found) in (
        (n, row) for n in (*ways, "300 steps", "40 steps") for row in results[n]["summary"].items()
    ):
        shown = loss.replace("forward-kl", "forward KL").replace("reverse-kl", "reverse KL").replace("jsd", "JSD")
        columns = ways.get(name, ("exact", "standard"))
        cells = " | ".join(more(found[way]) if way in found else "" for way in columns)
        assert f"| {shown} | {found['online']:.4f} | {cells} |" in page
    text = page.replace("\n", " ")
    ends = {
        (run["way"], run["seed"]): run["held_out"]["reverse-kl at T=1"]
        for run in results["SmolLM2, 150 steps"]["runs"]
        if run["divergence"] == "reverse-kl"
    }
    apart = [ends["exact", seed] - ends["online", seed] for seed in range(12)]
    assert f"the twelve differ by {min(apart):.2f} to +{max(apart):.2f}" in text
    slower = results["SmolLM2, 150 steps at a rate of 0.0005"]["summary"]["reverse-kl at T=1"]
    assert f"{slower['online']:.4f} in memory, and {more(slower['exact'])} more from exact labels" in text
    earlier = results["SmolLM2, 150 steps, before tail_bias"]["summary"]["reverse-kl at T=1"]
    assert f"six pairs were {more(earlier['exact'])} behind by them, and {more(earlier['exact-6'])} by those" in text
    early = results["SmolLM2, 40 steps"]
    pairs = early["summary"]["reverse-kl at T=1"]
    assert f"reverse KL, six pairs, {pairs['online']:.4f} in memory and {more(pairs['exact'])} more" in text
    single = [f"{ends[way, 0]:.4f}" for way in ("exact-8", "online")]
    for run in early["runs"]:
        loss = f"{run['divergence']} at T={run['temperature']:g}"
        single += [f"{run['held_out'][loss]:.4f}"] if run["divergence"] != "reverse-kl" else []
    assert [figure for figure in single if figure not in page] == []


def test_the_gradients_of_exact_labels_are_those_recorded() -> None:
    recorded = json.loads((ROOT / "tests/benchmarks/results/exact_gradients.json").read_text())
    page = (DOCS / "guides/train.md").read_text()
    gradients, before = recorded["rows"], recorded["before tail_bias"][0]["exact"]["loss"]
    online, coarse, fine = gradients[0]["loss"], gradients[0]["exact"]["loss"], gradients[0]["exact-6"]["loss"]
    losses = f"is {online:.2f} with the teacher in memory, {coarse:.2f} by labels of 4 bits and {fine:.2f} by 6"
    assert f"{losses} (4 bits before: {before:.2f})" in page.replace("\n", " ")
    for row in gradients:
        name = {"reverse-kl": "reverse KL", "jsd": "JSD"}[row["divergence"]]
        errors = " | ".join(
            f"{row[way][of]:.4f}" for way in ("exact", "exact-6") for of in ("one batch", "mean", "along")
        )
        assert f"| {name} | {row['steps']} | {row['spread of batches']:.2f} | {errors} |" in page
