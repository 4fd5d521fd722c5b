"""The study's arithmetic: its baselines are what their names say, its intervals and pairs are correct."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.models.dense.rows import ExactRows, log_probs
from logitcask.pipeline.models.load import load_causal_lm
from tests.benchmarks import rounds
from tests.benchmarks.healing.corpus import in_cache_order
from tests.benchmarks.study import designs, fidelity, figures, ideas, summary
from tests.benchmarks.study.__main__ import claim
from tests.benchmarks.study.corpus import LENGTH, POSITIONS
from tests.benchmarks.study.exact import ExactTeacher
from tests.benchmarks.study.labelling import label_rows_of, label_windows
from tests.benchmarks.study.labels import LARGER, STORED, TeacherFolder, entries
from tests.benchmarks.study.report import Key, against_exact, by_key, interval
from tests.benchmarks.study.students import (
    EVERY_WAY,
    TRAININGS,
    Setting,
    Teacher,
    batches,
    new_student,
    target_of,
    train,
)
from tests.support.tiny import make_cache, make_teacher, write_jsonl

VOCAB, ROWS = 300, slice(0, 2 * POSITIONS)
PAGES = (Path("docs/results/study.md"), Path("docs/results/study-in-full.md"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[TeacherFolder, torch.Tensor]:
    """Label two windows whose rows all have one distribution; also return its logits."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, POSITIONS + 1))
    where = TeacherFolder(tmp_path_factory.mktemp("study"), ids, STORED | LARGER | ideas.STORED)
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    for window in range(2):
        rows = slice(window * POSITIONS, (window + 1) * POSITIONS)
        label_rows_of(where, logits.expand(POSITIONS, -1).contiguous(), VOCAB, rows, list(where.stored))
    return where, logits


def mean_weights(where: TeacherFolder, way: str, temperature: float) -> torch.Tensor:
    """Return weights by token, averaged over positions."""
    labels = entries(where, EVERY_WAY[way], ROWS, temperature)
    whole = torch.zeros(len(labels.ids), VOCAB).scatter_add(1, labels.ids, labels.weights)
    return whole.mean(0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "way",
    [
        "lean",
        "standard",
        "rich",
        "random sampling, 32",
        "standard, stratified draws",
        "standard, half the draws by need",
    ],
)
def test_sampled_labels_are_unbiased_even_if_drawn_at_another_temperature(
    labelled: tuple[TeacherFolder, torch.Tensor], way: str, temperature: float
) -> None:
    where, logits = labelled
    p = (logits / temperature).softmax(0)
    rare = (logits < logits.topk(64).values[-1]).float()
    estimated, wanted = float(mean_weights(where, way, temperature) @ rare), float(p @ rare)
    assert wanted > 0.01
    assert estimated == pytest.approx(wanted, rel=0.2 if way.startswith("random") else 0.1)
    assert float(mean_weights(where, "top-64 renormalised", temperature) @ rare) == 0.0


def test_draws_by_need_have_the_same_mean_and_are_more_for_larger_tails() -> None:
    tails = torch.rand(2000, generator=torch.Generator().manual_seed(3)) ** 3
    sizes = ideas.sizes_by_need(tails)
    assert float(sizes.double().mean()) == pytest.approx(ideas.DRAWS, rel=0.1)
    assert {int(n) for n in sizes} <= set(ideas.SIZES)
    assert bool((sizes[tails.argsort()].diff() >= 0).all())


def test_each_stratum_has_one_number() -> None:
    numbers = ideas.stratified(np.random.default_rng(0).random((5, 24)))
    assert ((numbers * 24).astype(int) == np.arange(24)).all()


def test_batches_depend_only_on_the_seed_and_epochs_repeat_the_same_windows() -> None:
    usual = batches(Setting("exact", 1.0, 0.0, 1, 0.002), 64, 16)
    assert sorted(np.concatenate([windows for _, windows in usual])) == list(range(64))
    assert all(
        epoch == 0 and (windows == other).all()
        for (epoch, windows), (_, other) in zip(usual, batches(Setting("lean", 2.0, 0.5, 1, 0.1), 64, 16), strict=True)
    )
    four = batches(Setting("standard", 1.0, 0.0, 1, 0.002, "4 epochs"), 64, 16)
    assert [epoch for epoch, _ in four] == [step // 4 for step in range(16)]
    assert sorted(np.concatenate([windows for epoch, windows in four if epoch == 2])) == list(range(16))
    large = batches(Setting("standard", 1.0, 0.0, 1, 0.002, "4 times the batch"), 64, 4)
    parts = [sorted(np.concatenate([windows for _, windows in usual[first : first + 4]])) for first in (0, 4, 8, 12)]
    assert [windows.tolist() for _, windows in large] == parts


def test_a_wider_student_has_the_stated_parameters_and_a_jittered_one_the_same_weights_up_to_rounding() -> None:
    usual, wide = (new_student(8_192, 0, TRAININGS[name]) for name in ("usual", "width 256"))
    assert (usual.num_parameters(), wide.num_parameters()) == (1_901_696, 5_507_328)
    assert wide.config.intermediate_size == 3 * wide.config.hidden_size == 768
    again = new_student(8_192, 0, TRAININGS["jitter 1e-6"])
    moved = [(a / b - 1).abs().max().item() for a, b in zip(again.parameters(), usual.parameters(), strict=True)]
    assert 1e-6 < max(moved) < 1e-5


def test_the_learning_rate_rises_for_20_steps_then_stays_or_falls_to_zero() -> None:
    names = ("usual", "cosine", "rate 1.25")
    usual, cosine, more = ([TRAININGS[name].rate(step, 300) for step in (1, 20, 160, 300)] for name in names)
    assert usual == [0.05, 1.0, 1.0, 1.0]
    assert cosine == pytest.approx([0.05, 1.0, 0.5, 0.0])
    assert more == [1.25 * rate for rate in usual]


def test_the_usual_tempering_treats_the_tail_as_one_token(labelled: tuple[TeacherFolder, torch.Tensor]) -> None:
    where, logits = labelled
    where.stored["top"] = fidelity.STORED["top"]
    tempered = fidelity.one_token_tail(where, np.arange(3), 2.0)
    where.stored["top"] = STORED["top"]
    top = logits.softmax(0).sort(descending=True).values
    z = torch.cat([top[:64], top[64:].sum()[None]]).sqrt()
    assert torch.allclose(tempered.log_probs[0].exp(), (z / z.sum())[:64], atol=2e-2)
    assert float(tempered.log_probs[0].exp().sum() + tempered.log_rest[0].exp()) == pytest.approx(1.0, abs=1e-5)


def test_unlabelled_blocks_are_not_used_as_labels(tmp_path: Path) -> None:
    where = TeacherFolder(tmp_path / "train", np.zeros((2, POSITIONS + 1), dtype=np.int64), {})
    with pytest.raises(SystemExit, match="train: 0 of 1 blocks are labelled: `just study labels` does the rest"):
        where.labelled()  # it has no exact ones


@pytest.fixture(scope="module")
def with_exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[TeacherFolder, Path]:
    """Return nine windows with exact labels, and their teacher."""
    folder = tmp_path_factory.mktemp("exact")
    teacher = make_teacher(folder / "teacher", max_length=LENGTH)
    ids = np.random.default_rng(0).integers(3, VOCAB, (9, LENGTH))
    where = TeacherFolder(folder / "windows", ids, {name: (STORED | LARGER)[name] for name in ("standard", "rich")})
    where.run(str(teacher))
    return where, teacher


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_exact_distributions_of_any_rows_are_the_teachers(
    with_exact: tuple[TeacherFolder, Path], temperature: float
) -> None:
    where, source = with_exact
    rows = np.concatenate([np.arange(40, 300), np.arange(4 * POSITIONS + 7, 4 * POSITIONS + 9)])
    teacher = load_causal_lm(str(source), dtype=torch.float64).eval()
    with torch.no_grad():
        logits = teacher(torch.from_numpy(where.ids)).logits[:, :-1].flatten(0, 1)[torch.from_numpy(rows)]
    wanted = (logits / temperature).log_softmax(1)
    found = where.exact.log_probs(rows, temperature)
    kl = (wanted.exp() * (wanted - found)).sum(1)
    assert float(kl.mean()) < 5e-4
    assert float((found.double().logsumexp(1)).abs().max()) < 1e-5
    precise = log_probs(where.exact.rows(rows, temperature, torch.float64), slice(None), temperature)
    assert precise.dtype == torch.float64
    assert float((precise - found).abs().max()) < 1e-4
    other = (logits[1:] / temperature).log_softmax(1)
    assert float((other.exp() * (other - found[:-1])).sum(1).mean()) > 0.1  # of the next row


def test_a_new_label_is_computed_from_exact_ones_and_the_others_stay(
    with_exact: tuple[TeacherFolder, Path], tmp_path: Path
) -> None:
    at_once, _ = with_exact
    label_windows(at_once, VOCAB, (0, 1))
    shutil.copytree(at_once.folder / "exact", tmp_path / "later/exact")
    label_windows(TeacherFolder(tmp_path / "later", at_once.ids, {"standard": STORED["standard"]}), VOCAB, (0, 1))
    later = TeacherFolder(tmp_path / "later", at_once.ids, at_once.stored)
    with pytest.raises(SystemExit, match="later: 0 of 2 blocks are labelled"):
        later.labelled()
    later.put("standard", slice(0, 1), later.targets("standard", slice(1, 2)))
    later.run("a teacher that is not needed again")
    label_windows(later, VOCAB, (0, 1))
    with pytest.raises(AssertionError, match="exact is of another study: remove it"):
        ExactTeacher(later.folder / "exact", later.ids + 1)
    for name in at_once.stored:
        written, wanted = (where.labelled().targets(name, slice(1, None)) for where in (later, at_once))
        for field in ("head_ids", "tail_ids", "tail_counts", "tail_logprobs"):
            assert (getattr(written, field) == getattr(wanted, field)).all()
    first, second = (later.targets("standard", slice(row, row + 1)) for row in (0, 1))
    assert (first.tail_ids == second.tail_ids).all()


def test_a_student_of_exact_labels_is_judged_by_its_divergence_from_the_teacher(
    with_exact: tuple[TeacherFolder, Path], tmp_path: Path
) -> None:
    where, source = with_exact
    setting = Setting("exact", 2.0, 0.0, 0, 2e-3)
    judge, rows = Teacher(VOCAB, where, where), np.arange(200, 300)
    target = target_of("exact", 2.0, judge, rows)
    assert isinstance(target, ExactRows)
    assert (log_probs(target, slice(None), 2.0) == where.exact.log_probs(rows, 2.0)).all()
    found = train(setting, judge, (1, 2), tmp_path)["lengths"]
    assert found[1]["kl_at_2"] < found[0]["kl_at_2"]
    student = new_student(VOCAB, 0)
    student.load_state_dict(torch.load(tmp_path / f"{setting.name}_2.pt", weights_only=True)["student"])
    teacher, ids = load_causal_lm(str(source), dtype=torch.float64).eval(), torch.from_numpy(where.ids)
    with torch.no_grad():
        z, z_teacher = (model(ids).logits[:, :-1].double().flatten(0, 1) for model in (student.eval(), teacher))
    for t, name in ((1.0, "kl_at_1"), (2.0, "kl_at_2")):
        log_p, log_q = (z_teacher / t).log_softmax(1), (z / t).log_softmax(1)
        assert found[1][name] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-3)


def test_designs_are_compared_over_exact_distributions(with_exact: tuple[TeacherFolder, Path]) -> None:
    where, source = with_exact
    teacher = load_causal_lm(str(source), dtype=torch.float64).eval()
    with torch.no_grad():
        logits = teacher(torch.from_numpy(where.ids)).logits[:, :-1].flatten(0, 1)
    compared = designs.compare(where)["temperatures"]
    for t in (1.0, 2.0):
        wanted = float(designs.errors(logits, t)[designs.STORED][0].mean())
        assert compared[f"{t:g}"]["squared_error_as_stored"] == pytest.approx(wanted, rel=0.03)


def run(way: str, seed: int, kl: float) -> dict[str, Any]:
    setting = {"way": way, "temperature": 2.0, "alpha": 0.0, "seed": seed}
    return {"setting": setting, "lengths": [{"steps": 10, "kl_at_2": kl}]}


def test_differences_are_paired_by_seed_with_students_t_interval() -> None:
    exact = [run("exact", seed, kl) for seed, kl in ((0, 1.0), (1, 3.0), (2, 2.0))]
    ours = [run("standard", seed, kl) for seed, kl in ((0, 1.1), (1, 3.3), (2, 2.2), (3, 9.0))]
    difference = against_exact(by_key(exact + ours), Key("standard", 2.0, 0.0), 10, "kl_at_2")
    assert difference is not None
    assert difference[0] == pytest.approx(0.2)
    assert difference[1] == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert interval([5.0]) == (5.0, None)


def test_an_idea_is_compared_with_the_same_run_without_it() -> None:
    alone = "standard, drawn for T=2 alone"
    runs = [run("standard", 0, 2.0), run("standard", 1, 3.0), run(alone, 0, 1.9), run(alone, 1, 2.7)]
    runs += [run("exact", 0, 1.0), run("exact", 0, 1.5)]
    runs[-1]["setting"]["training"] = "beta2 0.95"
    runs.append(run(alone.replace("T=2", "T=1"), 0, 9.0))
    runs[-1]["setting"]["temperature"] = 1.0
    lines = summary.ideas_table(runs, 10)[2:]
    assert lines == [
        "| exact; beta2 0.95 | – | – | +0.500 | – |",
        "| standard | – | – | – | +1.000 |",
        "| standard, drawn for this T alone | – | – | -0.200 ± 1.271 | +0.900 |",
    ]


def test_an_idea_is_reported_by_length_of_training() -> None:
    runs = [run("standard", 0, 2.0), run("standard, half bucket", 0, 1.9)]
    for one, kl in zip(runs, (1.0, 1.2), strict=True):
        one["lengths"] = [{"steps": 75, "kl_at_2": one["lengths"][0]["kl_at_2"]}, {"steps": 300, "kl_at_2": kl}]
    lines = summary.lengths_table(runs, "standard, half bucket")[2:]
    assert lines == ["| 75 | – | -0.100 |", "| 150 | – | – |", "| 300 | – | +0.200 |"]


def test_students_of_another_alpha_are_beside_the_usual_ones() -> None:
    runs = [
        run("exact", 0, 1.0),
        run("lean", 0, 1.2),
        run("exact", 0, 3.0),
        run("lean", 0, 3.1),
        run("standard", 0, 7.0),
    ]
    for one in runs:
        one["setting"]["temperature"] = 1.0
        one["lengths"][0]["kl_at_1"] = one["lengths"][0].pop("kl_at_2")
    for one in runs[2:4]:
        one["setting"]["alpha"] = 0.5
    like = {"alpha 0": (summary.USUAL, 10), "alpha 0.5": (summary.USUAL._replace(alpha=0.5), 10)}
    assert summary.beside_table(runs, like, 2)[2:] == [
        "| exact | 1.00 | 3.00 | – | – |",
        "| lean | +0.20 | +0.10 | – | – |",
    ]


def test_differences_per_seed_are_beside_those_of_repeated_exact_distillation() -> None:
    runs = [run("exact", seed, kl) for seed, kl in ((0, 1.0), (1, 3.0), (2, 2.0))]
    runs += [run("rich", 0, 1.5), run("rich", 1, 2.9), run("rich", 2, 2.1), run("exact", 1, 3.2)]
    runs[-1]["setting"]["training"] = "jitter 1e-6"
    assert summary.seeds_table(runs, ("standard", "rich"), 10) == [
        "| label | T | seed 0 | seed 1 | seed 2 | median |",
        "|---|---|---|---|---|---|",
        "| exact, again | 2 | – | +0.200 | – | +0.200 |",
        "| rich | 2 | +0.500 | -0.100 | +0.100 | +0.100 |",
    ]


def test_labels_are_side_by_side_in_the_figure_and_have_one_colour(tmp_path: Path) -> None:
    parts = {"one": ["exact", "lean"], "other": ["exact", "standard", "rich", "lean"]}
    runs: dict[str, Sequence[dict[str, Any]]] = {n: [run(way, 0, 1.0) for way in ways] for n, ways in parts.items()}
    for one in (one for of_teacher in runs.values() for one in of_teacher):
        one["setting"]["temperature"] = 1.0
        one["lengths"][0]["kl_at_1"] = 1.0
    figure = figures.draw_students(runs, [10], tmp_path / "students.png")
    points: list[list[Any]] = [[bar.lines[0] for bar in list[Any](axis.containers)] for axis in figure.axes]
    assert [len({float(point.get_xdata()[0]) for point in panel}) for panel in points] == [1, 0, 3, 0]  # side by side
    drawn = [point for panel in points for point in panel]
    assert {point.get_markerfacecolor() for point in drawn} == {"white"}  # of one seed
    assert [point.get_color() for point in drawn] == [
        figures.STYLES[way][0] for way in ("lean", "standard", "lean", "rich")
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["standard", "lean", "rich"]


def test_the_figures_of_gradients_have_the_same_colours(tmp_path: Path) -> None:
    ways = {way: {"angle": [4.0, 3.0]} for way in ("lean", "rich", "top-64 bucket")}
    cells = [{"stage": stage, "temperature": 1.0, "batches": [1, 2], "ways": ways} for stage in ("late", "early")]
    figure = figures.draw_gradients(cells, {"lean": 28, "rich": 174, "top-64 bucket": 119}, tmp_path / "g.png")
    for axis in figure.axes:
        drawn = [(line.get_color(), line.get_marker()) for line in axis.lines]
        assert drawn == [figures.STYLES[way] for way in ("lean", "top-64 bucket", "rich")]
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["28", "119", "174"]


@pytest.mark.parametrize(("ends", "steps"), [(1.5, "212"), (2.0, "150"), (4.0, "under 75"), (0.5, "300 or more")])
def test_a_label_is_placed_on_the_curve_of_exact_distillation(ends: float, steps: str) -> None:
    exact = run("exact", 0, 0.0)
    exact["lengths"] = [{"steps": at, "kl_at_2": kl} for at, kl in zip((75, 150, 300), (3.0, 2.0, 1.0), strict=True)]
    label = run("lean", 0, ends)
    label["lengths"][0]["steps"] = 300
    assert summary.as_exact_after(by_key([exact, label, run("lean", 1, 9.0)]), "lean", 2.0) == steps


def test_the_errors_of_the_designs_match_simulated_draws() -> None:
    random = torch.Generator().manual_seed(2)
    z = 2 * torch.randn(40, generator=random).double()
    p, r, draws, times = z.softmax(0), (z / 2).softmax(0), 12, 20_000
    ends = r.cumsum(0)
    free = torch.rand(times, draws, generator=random, dtype=torch.float64)
    even = (torch.arange(draws) + free[:, :1]) / draws
    strata = (torch.arange(draws) + free) / draws
    sizes = {
        designs.independent: designs.distinct(r[None], draws),
        designs.systematic: (draws * r).clamp_max(1).sum(),
        designs.stratified: designs.entered(r[None], draws),
    }
    for (design, size), numbers in zip(sizes.items(), (free, even, strata), strict=True):
        drawn = torch.searchsorted(ends, numbers).clamp_max(39)
        counts = torch.zeros(times, 40, dtype=torch.float64).scatter_add(1, drawn, torch.ones_like(numbers))
        squared_error = ((counts / draws * p / r - p) ** 2).sum(1).mean()
        assert float(squared_error) == pytest.approx(float(design(p[None], r[None], draws)), rel=0.03)
        assert float((counts > 0).double().sum(1).mean()) == pytest.approx(float(size), rel=0.01)


def test_inclusion_probabilities_sum_to_the_size_and_keep_the_proposal_if_possible() -> None:
    r = torch.tensor([[0.5, 0.2, 0.2, 0.05, 0.05]], dtype=torch.float64)
    pi = designs.inclusion(r, torch.tensor([2.0]))
    assert torch.allclose(pi, torch.tensor([[1.0, 0.4, 0.4, 0.1, 0.1]], dtype=torch.float64))
    assert float(designs.without_replacement(r, r, torch.tensor([5.0]))) == pytest.approx(0.0, abs=1e-12)


def test_a_result_is_claimed_once(tmp_path: Path) -> None:
    with claim(tmp_path / "a.json") as first, claim(tmp_path / "a.json") as second:
        assert (first, second) == (True, False)
    (tmp_path / "a.json").write_text("{}")
    with claim(tmp_path / "a.json") as third:
        assert not third


def test_the_tables_of_the_studys_pages_match_the_results() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    for number, lines in enumerate(summary.tables()):
        assert len(lines) > 3
        assert "\n".join(lines) in texts[min(number, 1)]


def test_the_figures_and_pages_that_the_study_links_exist() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert len(links) > 0
        assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_what_is_mixed_in_is_compared_with_the_first_cache_of_its_loss() -> None:
    runs = [
        {"way": way, "seed": seed, **dict.fromkeys(rounds.FIGURES, kl + seed)}
        for way, kl in {"first cache": 1.0, "own text": 1.5, "own text, reverse KL": 9.0}.items()
        for seed in (0, 1)
    ]
    runs[2]["held_out_kl"] = 2.0
    assert [line.split(" | ")[:3] for line in rounds.table(runs)[2:]] == [
        ["| first cache", "1.50 ± 6.35", "1.50 ± 6.35"],
        ["| own text", "+0.75 ± 3.18", "+0.50 ± 0.00"],
    ]
    measured = json.loads(rounds.RESULTS.read_text())["runs"]
    assert "\n".join(["", *rounds.table(measured), ""]) in PAGES[0].read_text()


def test_a_cache_of_the_healing_study_has_the_order_of_its_file(tmp_path: Path) -> None:
    """So that students of labels see the batches of those with the teacher in memory."""
    rows = [[5, n + 10, 6] for n in range(9)]
    data = write_jsonl(tmp_path / "whole.jsonl", [{"input_ids": row, "labels": row} for row in rows])
    cache = CacheReader(make_cache(tmp_path, train_data=str(in_cache_order(data)), shard_positions=1 << 20))
    assert [cache.example(place).input_ids.tolist() for place in range(len(cache))] == rows
