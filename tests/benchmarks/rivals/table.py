"""The comparison as Markdown tables: both numbers of each ratio."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from tests.benchmarks.rivals.ours import NAME as OURS
from tests.benchmarks.rivals.speed import BARE

PLAIN = "text alone"


def report(found: Mapping[str, Any]) -> str:
    """Return all tables of what was found, and what was left out."""
    parts = [versions(found["systems"]), storage(found), *steps(found["steps"])]
    title = ["mean mass outside the teacher's", *next(iter(found["mass outside"].values()))]
    parts.append(rows(title, [[n, *(f"{m:.3f}" for m in each.values())] for n, each in found["mass outside"].items()]))
    parts += [students(teacher, runs) for teacher, runs in found["students"].items()]
    left_out = [f"{name}: left out: {why}" for name, why in found["left out"].items()]
    return "\n\n".join([*parts, *left_out])


def rows(title: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (title, ["---"] * len(title), *lines))


def versions(systems: Sequence[Mapping[str, str]]) -> str:
    """Return the table of what was compared."""
    return rows(["system", "version", "commit"], [[s["name"], s["version"], s["commit"]] for s in systems])


def storage(found: Mapping[str, Any]) -> str:
    """Return bytes per position, tokens/s of capture, positions/s of reading."""
    labels = found["labels"]
    sizes = {name: (each["bytes"] - each["once"]) / each["positions"] for name, each in labels.items()}
    capture, read = ({n: each["per_second"] for n, each in found[part].items()} for part in ("capture", "read"))
    lines = [[BARE, "", "", "", f"{capture[BARE]:,.0f}", "1.00", "", ""]]
    for name, size in sizes.items():
        made = [f"{capture[name]:,.0f}", f"{capture[name] / capture[BARE]:.2f}"] if name in capture else ["none", ""]
        reading = [f"{read[name]:,.0f}", f"{read[OURS] / read[name]:.1f}"]
        once = f"{labels[name]['once'] / 1e3:,.0f}"
        lines.append([name, f"{size:.1f}", f"{size / sizes[OURS]:.2f}", once, *made, *reading])
    title = ["system", "bytes per position", "of ours", "kB once", "capture, tokens/s", "of bare", "positions/s read"]
    title.append("ours is times as fast")
    return rows(title, lines)


def steps(found: Mapping[str, Any]) -> list[str]:
    """Return a table of seconds and memory for each kind of student."""
    tables = []
    for kind, measured in found.items():
        ways = {name: each for name, each in measured.items() if name != "positions"}
        seconds = {name: median(each["cpu_seconds"]) for name, each in ways.items()}
        lines = [
            [
                name,
                f"{seconds[name]:.2f}",
                f"{seconds[name] / seconds[PLAIN]:.2f}",
                f"{each['peak_mb']:,}",
                f"{each['peak_mb'] / ways[PLAIN]['peak_mb']:.2f}",
            ]
            for name, each in ways.items()
        ]
        title = [f"{kind}, {measured['positions']:,} positions", "CPU s per step", "of text", "peak MB", "of text"]
        tables.append(rows(title, lines))
    return tables


def students(teacher: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Return held-out figures by objective, means over seeds, sorted by KL, which stands beside for each seed."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["system"], run["loss"]), []).append(run)
    means = {key: {n: mean(r[n] for r in found) for n in ("kl", "cross_entropy")} for key, found in grouped.items()}
    seeds = {key: ", ".join(f"{run['kl']:.2f}" for run in found) for key, found in grouped.items()}
    least = min(each["kl"] for each in means.values())
    lines = [
        [*key, f"{each['kl']:.3f}", f"{each['kl'] - least:+.3f}", seeds[key], f"{each['cross_entropy']:.3f}"]
        for key, each in sorted(means.items(), key=lambda item: item[1]["kl"])
    ]
    return rows(
        [f"students of {teacher}", "objective", "held-out KL, nats", "more than the least", "by seed", "cross-entropy"],
        lines,
    )
