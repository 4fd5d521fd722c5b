"""The plan: counts equal to those of stage 1, bytes close to a real cache's, formulas that follow their laws."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from logitcask.cache.report.info import describe
from logitcask.pipeline.cli import main
from logitcask.pipeline.models.shapes import (
    Amount,
    ModelShape,
    shape_of_size,
    shape_of_student,
    shape_of_teacher,
    student_memory,
)
from logitcask.pipeline.plan.estimates import (
    CPU,
    GPUS,
    LABEL_BYTES,
    Preset,
    cache_bytes,
    find_device,
    teacher_memory,
    teacher_seconds,
)
from logitcask.pipeline.plan.plan import Plan, count_data, make_plan
from logitcask.pipeline.plan.tables import make_tables
from logitcask.pipeline.settings.plan import PlanSettings
from logitcask.pipeline.settings.precompute import PRESETS
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.reading import Reading
from tests.benchmarks.plan_check import compare, preset_of
from tests.support.mistakes import said
from tests.support.runs import STUDENT, write_config
from tests.support.tiny import RECORDS, make_cache, make_teacher, make_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
SMOLLM2 = 49_152
TINY_BOUND = 0.15  # random labels of a 300-token vocabulary: arrays are off by up to a third, in both directions
NAMES: list[Preset] = ["lean", "standard", "rich"]


def plan_of(**options: object) -> Plan:
    return make_plan(PlanSettings.model_validate(options))


def many_records(count: int) -> list[dict[str, object]]:
    return [{**RECORDS[n % len(RECORDS)], "prompt": f"Number {n * 7919 % 1000}: say it\n"} for n in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher, its data and a standard cache of them; some examples are truncated."""
    folder = tmp_path_factory.mktemp("plan")
    make_teacher(folder / "teacher")
    data = write_jsonl(folder / "train.jsonl", many_records(400))
    make_cache(
        folder, folder / "teacher", train_data=str(data), head_size=8, tail_draws=24, max_seq_length=28,
        shard_positions=65536, batch_size=64,
    )  # fmt: skip
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``logitcask plan`` and return its exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["logitcask", "plan", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_counts_equal_those_of_stage_1_and_bytes_are_close(made: Path) -> None:
    info = describe(made / "cache")
    data = info.manifest.data
    assert data.truncated > 0
    plan = plan_of(train_data=str(made / "train.jsonl"), teacher_model=str(made / "teacher"), max_seq_length=28)
    assert (plan.examples, plan.tokens, plan.positions) == (data.examples, data.tokens, data.positions)
    assert plan.shards == info.manifest.shards.count
    arrays = (made / "cache" / "tokenizer").glob("*/c/*")
    assert plan.cache_bytes_by_part["tokenizer"] == sum(file.stat().st_size for file in arrays) > 0
    assert plan.cache_bytes == pytest.approx(info.bytes, rel=TINY_BOUND)
    metadata = info.bytes_beside["metadata"] + info.bytes_beside["digests"]
    assert plan.cache_bytes_by_part["metadata"] == pytest.approx(metadata, rel=0.1)


def test_the_check_compares_a_cache_with_its_plan(made: Path) -> None:
    counts, sizes = compare(made / "cache", made / "train.jsonl")
    assert [name for name, *_ in counts] == ["shards", "examples", "tokens", "positions"]
    assert all(predicted == measured for _, predicted, measured in counts)
    (_, whole, there), *_ = sizes
    assert there == sum(file.stat().st_size for file in (made / "cache").rglob("*") if file.is_file())
    assert whole == pytest.approx(there, rel=TINY_BOUND)
    assert sum(measured for _, _, measured in sizes[2:]) == there
    other = write_jsonl(made / "other.jsonl", many_records(399))
    assert compare(made / "cache", other)[0][1] == ("examples", 399, 400)


def test_the_check_refuses_a_label_that_is_no_preset(made: Path) -> None:
    label = describe(made / "cache").manifest.label
    assert preset_of(label) == "standard"
    with pytest.raises(SystemExit, match=r"presets only; this label is 8 \+ 25"):
        preset_of(label.model_copy(update={"tail_draws": 25}))


def test_prompt_loss_adds_the_prompts_positions(made: Path) -> None:
    usual = {"train_data": str(made / "train.jsonl"), "teacher_model": str(made / "teacher"), "max_seq_length": 28}
    assert plan_of(**usual, prompt_loss=True).positions > plan_of(**usual).positions


def test_a_large_file_is_counted_from_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", many_records(1_000))
    encoder = Encoder(make_tokenizer(), prompt_loss=False)
    whole, assumed = count_data(Reading((str(data),)), encoder, 64, False)
    assert assumed == []
    monkeypatch.setattr("logitcask.pipeline.plan.plan.SAMPLE_BYTES", data.stat().st_size / 6.5)
    sampled, assumed = count_data(Reading((str(data),)), encoder, 64, False)
    assert "one in 7 of the 1,000 examples" in assumed[0]
    assert sampled.examples == whole.examples
    assert sampled.positions != whole.positions  # only every seventh is tokenized
    assert sampled.positions == pytest.approx(whole.positions, rel=0.1)
    assert sampled.tokens == pytest.approx(whole.tokens, rel=0.1)


def test_every_array_of_a_preset_has_a_cost(made: Path) -> None:
    arrays = describe(made / "cache").bytes_by_array
    assert set(cache_bytes("standard", 300, Amount(1, 1, 1), 1)) == {*arrays, "metadata"}


@pytest.mark.parametrize("preset", NAMES)
def test_bytes_grow_linearly(preset: Preset) -> None:
    one, ten = (cache_bytes(preset, SMOLLM2, Amount(100 * n, 50_000 * n, 20_000 * n), n) for n in (1, 10))
    for name in one.keys() - {"metadata"}:
        assert ten[name] == pytest.approx(10 * one[name])
    by_shard = ten["metadata"] - one["metadata"]
    assert by_shard == 9 * (cache_bytes(preset, SMOLLM2, Amount(1, 1, 1), 2)["metadata"] - one["metadata"])


def test_tokens_that_are_not_targets_cost_only_their_ids_and_mask() -> None:
    few, many = (cache_bytes("lean", SMOLLM2, Amount(10, tokens, 1_000), 1) for tokens in (1_000, 2_000))
    grown = {name: many[name] / few[name] for name in few if many[name] != few[name]}
    assert grown == {"input_ids": 2, "target_mask": 2}


@pytest.mark.parametrize("preset", NAMES)
def test_bytes_match_the_page_of_labels(preset: Preset) -> None:
    """Compare with code in its table, which excludes tokenizer and certificate; tokens in proportion to the demo's."""
    page = (ROOT / "docs" / "concepts" / "labels.md").read_text(encoding="utf-8")
    (measured,) = re.findall(rf"^\| `{preset}` \| ([\d.]+) \| [\d.]+ \| \d+ \|$", page, re.MULTILINE)
    sizes = cache_bytes(preset, SMOLLM2, Amount(265, 55_876, 30_158), 1)
    assert (sum(sizes.values()) - sizes["fidelity"]) / 30_158 == pytest.approx(float(measured), rel=0.02)


def test_a_larger_vocabulary_costs_more_only_in_ids() -> None:
    narrow, wide = (cache_bytes("rich", v, Amount(1, 1_000, 1_000), 1) for v in (SMOLLM2, 4 * SMOLLM2))
    grown = {name for name in narrow if wide[name] > narrow[name]}
    assert grown == {"head_ids", "tail_ids", "input_ids"}
    bits = math.log2(math.comb(4 * SMOLLM2, 64)) / math.log2(math.comb(SMOLLM2, 64))
    assert wide["tail_ids"] / narrow["tail_ids"] == pytest.approx(bits, rel=0.01)


def test_label_sizes_rise_with_the_preset() -> None:
    for name, sizes in LABEL_BYTES.items():
        assert [*sizes, "exact"] == list(PRESETS)  # the bytes of exact labels depend on the teacher's width
        assert sizes["lean"] <= sizes["standard"] <= sizes["rich"], name


def test_a_students_parameters_equal_those_of_the_real_one(tmp_path: Path) -> None:
    config = write_config(tmp_path / "student.json", STUDENT)
    values = {**STUDENT, "vocab_size": 300}
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    shape = shape_of_student(config, 300)
    embeddings = real.get_input_embeddings().weight.numel()
    assert shape.parameters == sum(p.numel() for p in real.parameters())
    assert shape.body == shape.parameters - embeddings
    assert (shape.layers, shape.hidden, shape.inner, shape.attention, shape.vocabulary) == (2, 32, 64, 32, 300)


def test_a_teachers_parameters_equal_those_of_the_real_one(made: Path) -> None:
    real = AutoModelForCausalLM.from_pretrained(made / "teacher")
    assert shape_of_teacher(str(made / "teacher")).parameters == sum(p.numel() for p in real.parameters())


def test_unchosen_experts_take_memory_but_no_time(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    real = MixtralForCausalLM(config)
    real.save_pretrained(tmp_path)
    shape = shape_of_teacher(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in real.parameters())
    expert = 3 * 32 * 64
    assert shape.body == shape.parameters - 2 * 300 * 32 - 2 * 6 * expert
    assert shape.inner == 2 * 64


@pytest.mark.parametrize(("size", "config"), [("100M", "100m"), ("350M", "350m"), ("1B", "1b")])
def test_sizes_of_students_are_shaped_like_their_configs(size: str, config: str) -> None:
    bare, real = shape_of_size(size), shape_of_student(ROOT / "configs" / "students" / f"{config}.json", SMOLLM2)
    for name in ("layers", "hidden", "inner", "attention", "vocabulary"):
        assert getattr(bare, name) == getattr(real, name), name
    assert bare.parameters == pytest.approx(real.parameters, rel=0.1)


def test_optimizer_checkpointing_and_batch_affect_the_students_memory() -> None:
    shape = shape_of_size("350M")
    plain, checkpointed, twice = (
        student_memory(shape, tokens, checkpointing=checkpointing, mixed=False)
        for tokens, checkpointing in ((8192, False), (8192, True), (16384, False))
    )
    assert plain["optimizer"] == 8 * shape.parameters  # two float32 moments
    assert checkpointed["activations"] < plain["activations"] / 5
    assert {name for name in plain if plain[name] != checkpointed[name]} == {"activations"}
    assert twice["activations"] == 2 * plain["activations"]


def test_on_a_cpu_a_batch_is_planned_in_parts() -> None:
    same = {"tokens": 1_000_000, "teacher_model": "135M", "student_config": "100m", "max_seq_length": 512}
    one, two, eight = (
        make_plan(PlanSettings.model_validate({**same, "batch_size": n, "device": "2-core-CPU"})).student_memory
        for n in (1, 2, 8)
    )
    assert eight == two != one
    on_gpu = [make_plan(PlanSettings.model_validate({**same, "batch_size": n, "device": "L4"})) for n in (2, 8)]
    assert on_gpu[0].student_memory != on_gpu[1].student_memory


def test_a_teachers_memory_is_its_weights_and_little_else() -> None:
    need = teacher_memory(shape_of_size("13B"), 8192, 2)
    assert need["weights"] == 26e9
    assert sum(need.values()) < 1.1 * need["weights"]


def test_the_cpus_speed_is_the_measured_one() -> None:
    """tests/benchmarks/capture.py: 469 tokens/s of SmolLM2-135M, 8 examples of 256 tokens, 255 of them targets."""
    smollm2 = ModelShape("SmolLM2-135M", 134_515_008, 106_203_456, 30, 576, 1536, 576, SMOLLM2)
    seconds = teacher_seconds(smollm2, CPU, Amount(8, 8 * 256, 8 * 255), 8 * 256)
    assert 8 * 256 / seconds == pytest.approx(469, rel=0.05)


def test_time_follows_the_slower_of_arithmetic_and_weights() -> None:
    shape, amount = shape_of_size("7B"), Amount(1_000, 1_000_000, 1_000_000)
    h100 = find_device("h100")
    large, larger = (teacher_seconds(shape, h100, amount, tokens) for tokens in (8192, 65536))
    assert large == larger  # arithmetic
    alone = teacher_seconds(shape, h100, amount, 1)
    assert alone > 1_000_000 * 14e9 / 3350e9 > 10 * large  # the weights are read once per token
    assert teacher_seconds(shape_of_size("34B"), h100, amount, 8192) > 3 * large
    assert teacher_seconds(shape, find_device("L4"), amount, 8192) > 5 * large


def test_a_measured_speed_replaces_the_estimate() -> None:
    plan = plan_of(tokens=3_600_000, teacher_model="7B", teacher_tokens_per_second=500, price=3)
    assert plan.teacher_hours == pytest.approx(2)
    assert plan.cost == pytest.approx(6)
    assert plan_of(tokens=3_600_000, teacher_model="7B").cost is None


def test_models_that_do_not_fit_are_reported() -> None:
    plan = plan_of(tokens=1_000, teacher_model="34B", student_config="1B", device="RTX-4090", batch_size=32)
    assert not plan.teacher_fits
    assert not plan.student_fits
    assert plan_of(tokens=1_000, teacher_model="34B", device="h200").teacher_fits


def test_the_tables_have_a_row_for_every_case() -> None:
    tables = make_tables()
    cases = {
        (s.student, s.mixed_precision, s.gradient_checkpointing, s.batch_size, s.length): s for s in tables.students
    }
    for student in ("100M", "350M", "1B", "7B"):
        for batch, length in ((8, 1024), (8, 2048), (32, 1024)):
            for mixed in (False, True):
                plain, checkpointed = (
                    cases[student, mixed, checkpointing, batch, length] for checkpointing in (False, True)
                )
                assert checkpointed.total < plain.total
                assert plain.optimizer == 8 * shape_of_size(student).parameters
    assert {t.teacher for t in tables.teachers} == {"7B", "13B", "34B"}
    needs = [(row.smallest_device, row.total) for row in tables.students]
    for name, total in [*needs, *((row.smallest_device, row.total) for row in tables.teachers)]:
        assert find_device(name).holds(total) if name else not any(gpu.holds(total) for gpu in GPUS)
    assert [device.name for device in tables.devices] == [*(gpu.name for gpu in GPUS), CPU.name]


def test_tables_are_printed_whole(run: Any) -> None:
    code, out, err = run("--tables")
    assert (code, err) == (0, "")
    for word in ("100M", "350M", "1B", "7B", "13B", "34B", "AdamW", "checkpointing", "8 x 1024", "H100"):
        assert word in out
    code, out, _ = run("--tables", "--json")
    assert len(json.loads(out)["students"]) == 4 * 3 * 2 * 2


def test_a_plan_is_printed_as_a_table_and_as_json(run: Any) -> None:
    words = ["--tokens", 10**9, "--teacher-model", "7B", "--student-config", "350m", "--price", 2]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    for word in ("target positions", "stage 1, time", "stage 1, cost", "stage 1, memory", "stage 2, memory", "40%"):
        assert word in out, word
    printed = json.loads(run(*words, "--json")[1])
    assert printed["cost"] == pytest.approx(2 * printed["teacher_hours"])
    assert sum(printed["cache_bytes_by_part"].values()) == pytest.approx(printed["cache_bytes"], abs=20)


MISTAKES = [
    ("preset", ["--tokens", 5, "--teacher-model", "7B", "--preset", "huge"], ["--preset", "'lean'", "'huge'"]),
    ("device", ["--tokens", 5, "--teacher-model", "7B", "--device", "abacus"], ["--device", "H100", "got 'abacus'"]),
    ("no text", ["--teacher-model", "7B"], ["exactly one of --train-data and --tokens"]),
    ("no teacher", ["--tokens", 5], ["--teacher-model is required"]),
    ("tokens", ["--tokens", 0, "--teacher-model", "7B"], ["--tokens", "greater than or equal to 1", "'0'"]),
    ("size", ["--tokens", 5, "--teacher-model", "0.1M"], ["from 1M to 1000B", "'0.1M'"]),
    ("no model", ["--tokens", 5, "--teacher-model", "no/where"], ["--teacher-model no/where", "give its size"]),
    ("no data", ["--train-data", "no.jsonl", "--teacher-model", "7B"], ["tokenizer", "'7B'", "--tokens"]),
    ("student", ["--tokens", 5, "--teacher-model", "7B", "--student-config", "no.json"], ["no.json: no such file"]),
    ("price", ["--tokens", 5, "--teacher-model", "7B", "--price", "-1"], ["--price", "greater than or equal to 0"]),
    ("tables", ["--tables", "--tokens", 5], ["--tables", "does not take --tokens", "leave it out"]),
]


@pytest.mark.parametrize(("words", "fragments"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_one_line_and_exit_2(words: list[object], fragments: list[str], run: Any) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    for fragment in fragments:
        assert fragment in said(err)


def test_missing_data_empty_data_and_a_too_short_limit_are_refused(made: Path, run: Any) -> None:
    (made / "empty.jsonl").touch()
    code, _, err = run("--train-data", made / "empty.jsonl", "--teacher-model", made / "teacher")
    assert code == 2
    assert "empty.jsonl: has no examples" in err
    code, _, err = run("--train-data", made / "no.jsonl", "--teacher-model", made / "teacher")
    assert code == 2
    assert "no.jsonl: no such data file" in err
    code, _, err = run("--train-data", made / "train.jsonl", "--teacher-model", made / "teacher", "--max-seq-length", 2)
    assert code == 2
    assert "--max-seq-length 2" in err
