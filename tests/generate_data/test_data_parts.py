"""The parts of data generation: prompts, the journal, duplicates, syntax, and the split."""

import random
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.generate_data.filters import Responses, curate, fault, is_python, python_blocks, share
from logitcask.pipeline.generate_data.journal import Answer, Journal
from logitcask.pipeline.generate_data.prompts import make_prompts, read_templates

ROOT = Path(__file__).parents[2]
PROMPT_FILES = sorted((ROOT / "configs" / "data").glob("*.yaml"))
FILE = (
    "languages: [python, go]\ntopics: [a, b, c]\ncategories:\n  one: ['1 {language} {topic}']\n  two: ['2 {topic}']\n"
)


def answer(number: int = 0, response: str = "fine", finish: str = "stop") -> Answer:
    about = {"prompt": f"p{number}", "category": "c", "language": "python", "input_tokens": 1, "output_tokens": 1}
    return Answer.model_validate({"id": f"id{number}", "response": response, "finish": finish, **about})


def templates(tmp_path: Path, text: str = FILE) -> Any:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    return read_templates(path)


# prompts


def test_there_are_prompt_files_and_each_loads() -> None:
    assert PROMPT_FILES
    for path in PROMPT_FILES:
        read = read_templates(path)
        prompts = make_prompts(read, 1000, seed=0)
        counts = Counter(prompt.category for prompt in prompts)
        assert counts.keys() == read.categories.keys()
        assert max(counts.values()) - min(counts.values()) <= 1
        assert {prompt.language for prompt in prompts} == set(read.languages)
        assert not any(mark in prompt.text for prompt in prompts for mark in "{}\n")
    wanted = {"function_implementation", "debugging", "refactoring", "explanation", "tests"}
    assert read_templates(ROOT / "configs/data/code.yaml").categories.keys() >= wanted


def test_prompts_depend_on_the_seed_and_begin_alike(tmp_path: Path) -> None:
    read = templates(tmp_path)
    nine = make_prompts(read, 9, seed=3)
    assert nine == make_prompts(read, 9, seed=3)
    assert nine[:4] == make_prompts(read, 4, seed=3)
    assert nine != make_prompts(read, 9, seed=4)
    assert len({prompt.id for prompt in nine}) == 9, "'2 a' is one prompt, whatever the language"
    assert [p.category for p in nine[:4]] == ["one", "two", "one", "two"]
    assert {p.text for p in nine} == {f"1 {x} {t}" for x in ("python", "go") for t in "abc"} | {f"2 {t}" for t in "abc"}
    with pytest.raises(LogitcaskError, match="--num-examples 10: the prompt file gives 9 different prompts"):
        make_prompts(read, 10, seed=3)


def test_a_text_in_two_categories_is_asked_once_for_the_first(tmp_path: Path) -> None:
    read = templates(tmp_path, FILE.replace("'1 {language} {topic}'", "'1 {language} {topic}', '2 {topic}'"))
    prompts = make_prompts(read, 9, seed=0)
    assert [prompt.category for prompt in prompts] == ["one"] * 9


def test_the_id_of_a_prompt_depends_only_on_its_text(tmp_path: Path) -> None:
    """The same text is the same prompt in a file with more templates."""
    more = make_prompts(templates(tmp_path, FILE.replace("topics: [a,", "topics: [z, a,")), 12, seed=1)
    ids = {prompt.text: prompt.id for prompt in more}
    assert all(ids[prompt.text] == prompt.id for prompt in make_prompts(templates(tmp_path), 9, seed=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("'2 {topic}'", "'2 {subject}'"), "only {language} and {topic} are filled in"),
        (("'2 {topic}'", "'2 {topic.__class__}'"), "only {language} and {topic} are filled in"),
        (("'2 {topic}'", "'2 {topic:>9}'"), "only {language} and {topic} are filled in"),
        (("'2 {topic}'", "'2 {topic'"), "categories.two: expected '}' before end of string"),
        (("'2 {topic}'", "'2 {}'"), "only {language} and {topic} are filled in"),
        (("topics: [a, b, c]\n", ""), "topics: Field required"),
        (("[a, b, c]", "[]"), "topics: List should have at least 1 item"),
        (("[a, b, c]", "[1, b]"), "topics.0: must be a valid string, got 1"),
        (("topics", "subjects"), "subjects: Extra inputs are not permitted"),
        (("languages:", "languages: x #"), "languages: must be a valid list, got 'x'"),
    ],
)
def test_a_wrong_prompt_file_is_an_error_that_names_it(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(LogitcaskError) as raised:
        templates(tmp_path, FILE.replace(*change))
    assert str(tmp_path / "prompts.yaml") in str(raised.value)
    assert message in str(raised.value)


def test_braces_can_be_asked_about(tmp_path: Path) -> None:
    (prompt,) = make_prompts(
        templates(tmp_path, "languages: [c]\ntopics: [x]\ncategories: {a: ['{{{topic}}} in {language}']}\n"), 1, 0
    )
    assert prompt.text == "{x} in c"


# the journal


def test_answers_come_back(tmp_path: Path) -> None:
    texts = ["plain", "naïve\n\u2028\x00 🙂", "", "x" * 100_000]
    with Journal(tmp_path / "j") as journal:
        for number, text in enumerate(texts):
            journal.append(answer(number, text))
        assert "id1" in journal
        assert "id9" not in journal
        assert journal["id1"] == answer(1, texts[1])
    with Journal(tmp_path / "j") as journal:
        assert [entry.response for entry in journal] == texts


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append(answer(0))
        size = path.stat().st_size  # of the first line
        journal.append(answer(1, "naïve 🙂"))
    whole = path.read_bytes()
    for length in range(size, len(whole)):
        path.write_bytes(whole[:length])
        with Journal(path) as journal:
            assert [entry.id for entry in journal] == ["id0"]
            assert path.read_bytes() == whole[:size]
            journal.append(answer(2))
        with Journal(path) as journal:
            assert [entry.id for entry in journal] == ["id0", "id2"]


@pytest.mark.parametrize("line", ["{}", "no", '{"id": 1}', '["id"]', ""])
def test_a_line_that_is_not_an_answer_is_an_error(line: str, tmp_path: Path) -> None:
    path = tmp_path / "j"
    good = answer().model_dump_json()
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(LogitcaskError, match=f"{path}:2: not an answer of a model"):
        Journal(path)
    assert path.read_text() == f"{good}\n{line}\n{good}\n"


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(LogitcaskError, match="another run is writing it"):
        Journal(tmp_path / "j")
    with Journal(tmp_path / "j"):
        pass


def test_a_full_disk_leaves_no_part_of_an_answer(tmp_path: Path) -> None:
    """The system accepts part of the line, then refuses the rest."""
    path = tmp_path / "j"
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        journal.append(answer(0))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                journal.append(answer(1, "x" * 1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert path.read_bytes().decode() == answer(0).model_dump_json() + "\n"
        journal.append(answer(2))
    with Journal(path) as journal:
        assert [entry.id for entry in journal] == ["id0", "id2"]


# what becomes of an answer


@pytest.mark.parametrize(
    ("response", "finish", "want"),
    [
        ("fine", "stop", ""),
        ("fine", "length", "length"),
        ("fine", "refusal", "refusal"),
        ("fine", "tool_calls", "unfinished"),
        ("fine", "None", "unfinished"),
        (" \n\t", "stop", "empty"),
        ("```python\nx = 1\n```", "stop", ""),
        ("```python\nx = = 1\n```", "stop", "syntax"),
        ("```Python3 title=a.py\nx = = 1\n```", "stop", "syntax"),
        ("~~~py\nx = = 1\n~~~", "stop", "syntax"),
        ("```python\nx = 1\n```\n\n```python\nif:\n```", "stop", "syntax"),
        ("```python\nx = = 1", "stop", "syntax"),
        ("```\nx = = 1\n```", "stop", ""),
        ("```go\nx := 1\n```", "stop", ""),
        ("```pycon\n>>> 1\n1\n```", "stop", ""),
        ("- first:\n\n  ```python\n  def f():\n      return 1\n  ```\n", "stop", ""),
        ("```python\n    def method(self):\n        return 1\n```", "stop", ""),
        ("```python\nx = '\\d'\nassert (x, 1)\n```", "stop", ""),
        ("````markdown\n```python\nx = = 1\n```\n````", "stop", ""),
        ("```python\nx = '\x00'\n```", "stop", ""),
    ],
)
def test_an_answers_fault(response: str, finish: str, want: str, recwarn: pytest.WarningsRecorder) -> None:
    assert fault(answer(0, response, finish)) == want
    assert not recwarn.list


def test_code_is_parsed_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "ran"
    code = f"```python\nopen({str(file)!r}, 'w')\n```"
    assert len(python_blocks(code)) == 1
    assert not fault(answer(0, code))
    assert not file.exists()


HOSTILE = (
    *("(" * 50_000, "-" * 50_000 + "1", "1" + "+1" * 50_000, "a" + ".b" * 50_000, "f" + "()" * 50_000),
    *("[" * 99 + "]" * 99, "x = " + "9" * 100_000, "lambda:" * 20_000 + "1", "\ud800"),
    "if 1:\n" + "".join(" " * n + "if 1:\n" for n in range(1, 150)),
)


@pytest.mark.parametrize("code", HOSTILE, ids=lambda code: repr(code[:9]))
def test_no_code_ends_the_run(code: str) -> None:
    assert is_python(code) in {True, False}


WORDS = [f"w{n}" for n in range(400)]


def overlapping(similarity: float, seed: int) -> tuple[str, str]:
    """Return two texts whose 5-word runs have about this Jaccard similarity: the same beginning, different ends."""
    same = round(300 * 2 * similarity / (1 + similarity))
    random.seed(seed)
    ends = random.sample(WORDS, 400)
    start = random.choices(WORDS, k=same)
    return " ".join([*start, *ends[: 300 - same]]), " ".join([*start, *ends[-(300 - same) or 400 :]])


@pytest.mark.parametrize(
    ("similarity", "want"), [(0.95, "near-duplicate"), (0.87, "near-duplicate"), (0.68, ""), (0.2, "")]
)
def test_near_duplicates_are_those_above_the_threshold(similarity: float, want: str) -> None:
    fates = Counter[str]()
    for seed in range(30):
        seen = Responses(0.8)
        first, second = overlapping(similarity, seed)
        assert seen.add(first) == ""
        fates[seen.add(second)] += 1
    assert fates[want] >= 27, "the estimate from 128 hashes has a standard error of about 0.04"


def test_duplicates_among_many() -> None:
    """Each of a thousand texts is a near-duplicate of exactly one other."""
    seen = Responses(0.8)
    pairs = [overlapping(0.97, seed) for seed in range(500)]
    assert [seen.add(first) for first, _ in pairs] == [""] * 500
    assert Counter(seen.add(second) for _, second in pairs)["near-duplicate"] >= 495


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.9, 0.97, 0.999])
def test_every_threshold_is_possible(threshold: float) -> None:
    seen = Responses(threshold)
    assert seen.add(overlapping(0.5, 0)[0]) == ""
    assert seen.add(overlapping(0.5, 0)[0] + " ") == "duplicate"
    assert seen.add(overlapping(0.5, 0)[0].replace(" ", "  ")) == "near-duplicate"


def test_a_threshold_of_one_drops_only_exact_duplicates() -> None:
    seen = Responses(1.0)
    assert [seen.add(text) for text in ("if a:\n  b", "if a:\nb", " if a:\n  b\n")] == ["", "", "duplicate"]


def test_short_texts_are_not_all_alike() -> None:
    seen = Responses(0.8)
    assert [seen.add(text) for text in ("yes", "no", "yes!", "+", "-", "yes ")] == ["", "", "", "", "", "duplicate"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab \n`", max_size=12), max_size=12), st.integers(0, 5), st.data())
def test_more_answers_change_no_earlier_fate(texts: list[str], seed: int, data: st.DataObject) -> None:
    answers = [answer(number, text) for number, text in enumerate(texts)]
    cut = data.draw(st.integers(0, len(answers)))
    options: dict[str, Any] = {"near_duplicate": 0.8, "validation_fraction": 0.4, "seed": seed}
    assert list(curate(answers[:cut], **options)) == list(curate(answers, **options))[:cut]


def test_the_split_is_a_share_by_seed_and_prompt() -> None:
    ids = [f"id{n}" for n in range(4000)]
    chosen = {seed: {i for i in ids if share(seed, i) < 0.1} for seed in (0, 1)}
    assert all(330 < len(ids_below) < 470 for ids_below in chosen.values())
    assert chosen[0] != chosen[1]
    assert all(0 <= share(0, i) < 1 for i in ids)
