"""The study's tables as Markdown, from tests/benchmarks/results: first docs/results/study.md's, then the others."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.study.corpus import POSITIONS
from tests.benchmarks.study.labels import MIDDLE, WAYS
from tests.benchmarks.study.report import (
    RESULTS,
    Key,
    Run,
    against,
    against_exact,
    by_key,
    differences,
    interval,
    measured,
)
from tests.benchmarks.study.students import EPS, LENGTHS, TRAININGS, WINDOWS

NONE = "–"
Students = tuple[Key, int]  # a setting and its number of steps
USUAL = Key("exact", 1.0, 0.0)  # except way and temperature
BESIDE = ("cosine", "4 times the batch", "width 256", "jitter 1e-6")  # trainings with separate tables
OPTIMIZERS = ("beta2 0.95", "clipped at 0.2", "rate 1.25", "untied", *EPS)  # differences that apply to every label


def found(values: tuple[float, float | None] | None, sign: str = "", digits: int = 2) -> str:
    """Format a mean and its interval."""
    if values is None:
        return NONE
    mean = f"{values[0]:{sign}.{digits}f}"
    return mean if values[1] is None else f"{mean} ± {values[1]:.{digits}f}"


def figure(groups: dict[Key, dict[int, Run]], key: Key, steps: int, name: str) -> tuple[float, float | None] | None:
    """Return mean and interval of a figure over the seeds of a setting."""
    values = [value for run in groups.get(key, {}).values() if (value := measured(run, steps, name)) is not None]
    return interval(values) if values else None


def at_own_temperature(
    groups: dict[Key, dict[int, Run]], way: str, like: Sequence[Students], digits: int = 2
) -> list[str]:
    """Return KL of students of T=1 and T=2 at their temperature; except for exact ones, as difference to exact."""
    cells = []
    for t, (one, steps) in itertools.product((1.0, 2.0), like):
        name, key = f"kl_at_{t:g}", one._replace(way=way, temperature=t)
        if way == "exact":
            cells.append(found(figure(groups, key, steps, name), digits=digits))
        else:
            cells.append(found(against_exact(groups, key, steps, name) if key in groups else None, "+", digits))
    return cells


def row(cells: Sequence[str]) -> str:
    """Format a line of a table."""
    return f"| {' | '.join(cells)} |"


def labels_table(parts: Sequence[Sequence[Run]], gradients: dict[str, Any], steps: int) -> list[str]:
    """Return one line per label: bytes, angles on the late student's largest batch of code, the students' results."""
    groups, sizes = [by_key(runs) for runs in parts], gradients["bytes_a_position"]["code"]
    late = {c["temperature"]: c["ways"] for c in gradients["cells"] if c["text"] == "code" and c["stage"] == "late"}
    titles = ["gradient, T=1", "T=2", "AdamW, T=1", "T=2", "SmolLM2, T=1", "T=2", "second, T=1", "T=2"]
    lines = [row(["label", "bytes", *titles]), "|" + "---|" * (len(titles) + 2)]
    for way in ("exact", *sizes):
        angles = [
            f"{late[t][way][name][-1]:.1f}°" if way in sizes else NONE
            for name in ("angle", "update_angle")
            for t in (1.0, 2.0)
        ]
        size = f"{sizes[way]:.0f}" if way in sizes else NONE
        cells = [cell for one in groups for cell in at_own_temperature(one, way, [(USUAL, steps)])]
        lines.append(row([way, size, *angles, *cells]))
    return lines


def angles_table(gradients: dict[str, Any]) -> list[str]:
    """Return one line per text, T and stage: angles of gradient and AdamW's update on the largest batch, degrees."""
    ways = list(gradients["bytes_a_position"]["code"])
    lines = [row(["text", "T", "student", *ways]), "|" + "---|" * (len(ways) + 3)]
    for cell in gradients["cells"]:
        angles = [f"{at['angle'][-1]:.1f}, {at['update_angle'][-1]:.0f}" for at in map(cell["ways"].get, ways)]
        lines.append(row([cell["text"], f"{cell['temperature']:g}", cell["stage"], *angles]))
    return lines


def settings_table(parts: Sequence[Sequence[Run]], steps: int, way: str = "standard") -> list[str]:
    """Return one line per alpha and T for a label: held-out hard loss, KL at T=1, calibration error, by teacher.

    The last are each alpha less alpha 0 at T=1, paired by seed.
    """
    names = {"hard loss": "hard_loss", "KL at T=1": "kl_at_1", "calibration error": "calibration_error"}
    heads = [f"{teacher}: {title}" for teacher in ("SmolLM2", "second") for title in names]
    lines = [row(["alpha", "T", *heads]), "|" + "---|" * (len(heads) + 2)]
    groups = [by_key(runs) for runs in parts]
    tried = {(key.alpha, key.temperature) for one in groups for key in one if key == Key(way, *key[1:3])}
    keys = [
        Key("output", 1.0, 1.0),
        *[Key(way, t, alpha) for alpha, t in sorted(tried, key=lambda at: (-at[0], at[1]))],
    ]
    for key in keys:
        cells = [found(figure(one, key, steps, name)) for one in groups for name in names.values()]
        lines.append(row([f"{key[2]:g}", f"{key[1]:g}" if key[2] < 1 else NONE, *cells]))
    none = Key(way, 1.0, 0.0)
    for alpha in sorted({alpha for alpha, t in tried if t == 1 and alpha}, reverse=True):
        key = none._replace(alpha=alpha)
        cells = [found(against(one, key, none, steps, name), "+") for one in groups for name in names.values()]
        lines.append(row([f"{alpha:g} less 0", "1", *cells]))
    return lines


def beside_table(runs: Sequence[Run], like: dict[str, Students], digits: int) -> list[str]:
    """Return one line per label: KL at T as in ``labels_table``, of the students named in ``like``."""
    groups, keys = by_key(runs), [key for key, _ in like.values()]
    titles = [f"T={t}, {name}" for t in (1, 2) for name in like]
    lines = [row(["label", *titles]), "|" + "---|" * (len(titles) + 1)]
    ways = [
        way
        for way in ("exact", *WAYS)
        if any(all(key._replace(way=way, temperature=t) in groups for key in keys) for t in (1.0, 2.0))
    ]
    return lines + [row([way, *at_own_temperature(groups, way, list(like.values()), digits)]) for way in ways]


def as_exact_after(groups: dict[Key, dict[int, Run]], way: str, t: float) -> str:
    """Return the steps after which exact distillation reaches the final KL of a label's students, by log steps."""
    name, exact, of_label = f"kl_at_{t:g}", groups.get(Key("exact", t, 0.0), {}), groups.get(Key(way, t, 0.0), {})
    seeds = sorted(exact.keys() & of_label.keys())
    if not seeds:
        return NONE
    curve = [statistics.mean(measured(exact[seed], steps, name) or math.nan for seed in seeds) for steps in LENGTHS]
    ends = statistics.mean(measured(of_label[seed], LENGTHS[-1], name) or math.nan for seed in seeds)
    for (a, b), (after, before) in zip(itertools.pairwise(LENGTHS), itertools.pairwise(curve), strict=True):
        if before <= ends <= after:
            return f"{a * (b / a) ** ((after - ends) / (after - before)):.0f}"
    return f"under {LENGTHS[0]}" if ends > curve[0] else f"{LENGTHS[-1]} or more"


def steps_table(parts: Sequence[Sequence[Run]]) -> list[str]:
    """Return one line per label: the steps after which exact distillation reaches its students' end, at alpha 0."""
    groups = [by_key(runs) for runs in parts]
    lines = [row(["label", "SmolLM2, T=1", "T=2", "second, T=1", "T=2"]), "|" + "---|" * 5]
    return lines + [row([way, *[as_exact_after(one, way, t) for one in groups for t in (1.0, 2.0)]]) for way in WAYS
                    if any(Key(way, 1.0, 0.0) in one for one in groups)]  # fmt: skip


def all_table(parts: Sequence[Sequence[Run]], steps: int) -> list[str]:
    """Return one line per label, alpha and T: seeds, held-out hard loss, KL at T, calibration error, by teacher."""
    groups = [by_key(runs) for runs in parts]
    titles = ("seeds", "hard loss", "KL at T", "calibration error")
    heads = [f"{teacher}: {title}" for teacher in ("SmolLM2", "second") for title in titles]
    lines = [row(["alpha", "T", "label", *heads]), "|" + "---|" * (len(heads) + 3)]
    keys = [Key("output", 1.0, 1.0)]
    keys += [Key(way, t, alpha) for alpha, t, way in itertools.product((0.5, 0.0), (1.0, 2.0), ("exact", *WAYS))]
    for key in keys:
        if not any(key in one for one in groups):
            continue
        cells = []
        for one in groups:
            names = ("hard_loss", f"kl_at_{key.temperature:g}", "calibration_error")
            cells += [str(len(one.get(key, {})) or NONE), *[found(figure(one, key, steps, name)) for name in names]]
        lines.append(row([f"{key.alpha:g}", f"{key.temperature:g}" if key.alpha < 1 else NONE, key.way, *cells]))
    return lines


def designs_table(teachers: dict[str, Any]) -> list[str]:
    """Return one line per design: entries, and squared error relative to the stored design, by teacher."""
    columns = [(name, t, at["designs"]) for name, one in teachers.items() for t, at in one["temperatures"].items()]
    heads = [name if t == "1" else "" for name, t, _ in columns]
    heads = [f"{name}: entries, T={t}" if name else f"T={t}" for name, (_, t, _) in zip(heads, columns, strict=True)]
    lines = [row(["label", *heads]), "|" + "---|" * (len(heads) + 1)]
    for design in columns[-1][2]:
        cells = []
        for _, t, at in columns:
            one = at.get(design)
            entries = f"{one['entries']:.1f}, " if one and t == "1" else ""
            cells.append(f"{entries}{one['squared_error']:.2f}" if one else NONE)
        lines.append(row([design, *cells]))
    return lines


def is_idea(way: str) -> bool:
    """Return whether a run is that of an idea or of its baseline."""
    return way in ("exact", "standard") or way.startswith("standard, ")


def ideas_table(runs: Sequence[Run], steps: int) -> list[str]:
    """Return one line per idea, by T: KL minus that of the same without the idea, and minus exact distillation's."""
    groups = {key: of_seed for key, of_seed in by_key(runs).items() if key.alpha == 0 and is_idea(key.way)}
    heads = [f"T={t}: {what}" for t in (1, 2) for what in ("less without", "less exact")]
    lines = [row(["tried", *heads]), "|" + "---|" * 5]
    for way, training in sorted({(key.way, key.training) for key in groups}):
        optimizer = training in OPTIMIZERS
        if training in BESIDE or way.endswith("T=2 alone") or (way == "exact" and not optimizer):
            continue  # reported elsewhere; reported with T=1; the baseline
        cells = []
        for t in (1.0, 2.0):
            name, key = f"kl_at_{t:g}", Key(way.replace("T=1", f"T={t:g}"), t, 0.0, training)
            base = Key(way, t, 0.0) if optimizer else Key("standard", t, 0.0, training)
            cells.append(found(against(groups, key, base, steps, name) if key != base else None, "+", 3))
            cells.append(found(against_exact(groups, key, steps, name) if way != "exact" else None, "+", 3))
        title = way.replace("for T=1 alone", "for this T alone")
        lines.append(row([title if training == "usual" else f"{title}; {training}", *cells]))
    return lines


def lengths_table(runs: Sequence[Run], way: str) -> list[str]:
    """Return one line per length: KL at T of an idea's students minus that of the same without it."""
    groups = by_key(runs)
    lines = [row(["steps", "T=1: less without", "T=2: less without"]), "|" + "---|" * 3]
    for steps in LENGTHS:
        keys = [(Key(way, t, 0.0), Key("standard", t, 0.0), steps, f"kl_at_{t:g}") for t in (1.0, 2.0)]
        lines.append(row([str(steps), *[found(against(groups, *pair), "+", 3) for pair in keys]]))
    return lines


def seeds_table(runs: Sequence[Run], ways: Sequence[str], steps: int) -> list[str]:
    """Return one line per label and T: KL at T minus exact distillation's, seed by seed.

    The first is exact distillation again, with what is as small as a rounding error in its initial weights.
    """
    groups = by_key(runs)
    keys = [Key("exact", t, 0.0, "jitter 1e-6") for t in (1.0, 2.0)]
    keys += [Key(way, t, 0.0) for way, t in itertools.product(ways, (1.0, 2.0))]
    seeds = sorted({seed for key in keys for seed in groups.get(key, {})})
    lines = [row(["label", "T", *[f"seed {seed}" for seed in seeds], "median"]), "|" + "---|" * (len(seeds) + 3)]
    for key in keys:
        base = key._replace(way="exact", training="usual")
        if less := differences(groups, key, base, steps, f"kl_at_{key.temperature:g}"):
            cells = [f"{less[seed]:+.3f}" if seed in less else NONE for seed in seeds]
            title = "exact, again" if key.way == "exact" else key.way
            lines.append(row([title, f"{key.temperature:g}", *cells, f"{statistics.median(less.values()):+.3f}"]))
    return lines


def tables() -> list[list[str]]:
    """Return all tables of the current results."""
    students, second, gradients, designs = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("students", "second", "gradients", "designs")
    )
    parts = [[run for run in one["runs"] if run["setting"]["seed"] < 100] for one in (students, second)]
    steps, few, large = max(LENGTHS), min(LENGTHS), "4 times the batch"
    batch = WINDOWS * POSITIONS
    batches = {
        f"{few} steps of {batch:,}": (USUAL, few),
        f"{few} steps of {TRAININGS[large].batch * batch:,}": (USUAL._replace(training=large), few),
        f"{steps} steps of {batch:,}": (USUAL, steps),
    }
    wide = {"width 128": (USUAL, steps), "width 256": (USUAL._replace(training="width 256"), steps)}
    rates = {"constant rate": (USUAL, steps), "cosine": (USUAL._replace(training="cosine"), steps)}
    return [
        labels_table(parts, gradients, steps),
        angles_table(gradients),
        steps_table(parts),
        seeds_table(parts[1], ("standard", MIDDLE, "rich"), steps),
        beside_table(parts[1], batches, 3),
        beside_table(parts[1], wide, 3),
        beside_table(parts[1], rates, 3),
        beside_table(parts[0], {"alpha 0": (USUAL, steps), "alpha 0.5": (USUAL._replace(alpha=0.5), steps)}, 2),
        settings_table(parts, steps),
        all_table(parts, steps),
        designs_table(designs["teachers"]),
        ideas_table(parts[1], steps),
        lengths_table(parts[1], "standard, half bucket"),
    ]


if __name__ == "__main__":
    print("\n\n".join("\n".join(lines) for lines in tables()))
