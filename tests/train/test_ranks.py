"""Stage 2 on two ranks over gloo, by torchrun and accelerate, replicated and sharded by FSDP: losses and weights equal
those of one rank with the whole batch; a lost rank ends the run.

Of every check torchrun starts the run that loses a rank; at night each launcher starts one run, or two. All others are
forked, with the environment that the launcher gives.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from logitcask.pipeline.models.load import student_from_config
from logitcask.pipeline.runs.run_folder import SETTINGS_FILE, curve, read_log
from tests.support.forked import alone, on_two_ranks
from tests.support.nightly import nightly
from tests.support.runs import STUDENT, history, losses, metrics, write_config
from tests.support.servers import free_port
from tests.support.tiny import make_cache

ROUNDING = 1e-4
TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
FSDP = (
    "accelerate.commands.launch",
    f"--config_file={Path(__file__).parents[2] / 'configs/accelerate/fsdp.yaml'}",
    "--num_processes=2",
)
ALONE, FORKED, FORKED_FSDP = ("alone",), ("forked",), ("forked with FSDP",)
STEPS = {"save-steps": 3, "logging-steps": 1, "learning-rate": 1e-3, "warmup-steps": 0, "eval-fraction": 0.1,
         "alpha": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At ``cache`` a cache of 22 training examples, which do not divide into steps of eight."""
    place = tmp_path_factory.mktemp("ranks")
    make_cache(place, shard_positions=64)
    write_config(place / "student.json", STUDENT)
    return place


def flags(folder: Path, output: str, **options: object) -> list[str]:
    values = {**STEPS, "cache": folder / "cache", "student-config": folder / "student.json", "device": "cpu"}
    values |= {option.replace("_", "-"): value for option, value in options.items()}
    given = [
        f"--{option}" + ("" if value is True else f"={value}") for option, value in values.items() if value is not None
    ]
    return ["train", f"--output-dir={folder / output}", *given]


def command(launcher: tuple[str, ...], words: list[str], module: str = "logitcask") -> list[str]:
    name, *rest = launcher
    port = "--main_process_port" if name.startswith("accelerate") else "--master_port"
    return [sys.executable, "-m", name, *rest, f"{port}={free_port()}", "-m", module, *words]


def fsdp_environment() -> dict[str, str]:
    """Return the variables that ``accelerate launch`` makes of the shipped configuration."""
    words = [*FSDP[1:], f"--main_process_port={free_port()}", "-m", "logitcask"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment: dict[str, str] = prepare_multi_gpu_env(options)
    return environment


def launched(
    folder: Path, output: str, launcher: tuple[str, ...], *, module: str = "logitcask", **options: object
) -> subprocess.CompletedProcess[str]:
    words = flags(folder, output, **options)
    if launcher == ALONE:
        return alone(folder, words)
    if launcher in (FORKED, FORKED_FSDP):
        environment = fsdp_environment() if launcher == FORKED_FSDP else {}
        return on_two_ranks(folder, words, module=module, environment=environment)
    started = command(launcher, words, module)
    return subprocess.run(started, capture_output=True, text=True, check=False, timeout=180)


def run(folder: Path, output: str, launcher: tuple[str, ...], **options: Any) -> Path:
    done = launched(folder, output, launcher, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("on 2 ranks" in done.stderr) == (launcher != ALONE)
    return folder / output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def assert_same(actual: Path, expected: Path) -> None:
    for a, b in zip(history(actual), history(expected), strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=ROUNDING)
        assert a["hard_loss"] == pytest.approx(b["hard_loss"], rel=ROUNDING)
    start, ends, wanted = weights_at_start(expected), weights(actual), weights(expected)
    for name, tensor in wanted.items():
        update, difference = tensor - start[name], ends[name] - tensor
        assert difference.norm() <= ROUNDING * update.norm(), name
        assert difference.abs().max() <= 10 * ROUNDING * update.abs().max(), name


def weights_at_start(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's student before its first step."""
    settings = json.loads((run / "final" / SETTINGS_FILE).read_text())
    set_seed(settings["seed"])
    vocabulary = len(weights(run)["model.embed_tokens.weight"])
    return dict(student_from_config(Path(settings["student_config"]), vocabulary).state_dict())


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """Two epochs on one rank."""
    return run(folder, "one", ALONE, batch_size=8, epochs=2)


def test_two_ranks_are_one_with_the_whole_batch(folder: Path, one: Path) -> None:
    """With accumulation, and with a last step per epoch that has examples for one rank only: each occurs once."""
    launcher = TORCHRUN if nightly() else FORKED
    two = run(folder, "two", launcher, batch_size=2, gradient_accumulation_steps=2, epochs=2)
    assert_same(two, one)
    assert [line["step"] for line in read_log(two)] == [line["step"] for line in read_log(one)]  # one rank writes
    assert curve(read_log(two), "tokens") == curve(read_log(one), "tokens")


def test_in_parts_they_average_the_gradients_of_a_batch_once(folder: Path, one: Path) -> None:
    two = run(folder, "parts", FORKED, batch_size=4, epochs=2, module="tests.support.one_row_at_a_time")
    assert_same(two, one)


@pytest.mark.nightly
def test_accelerate_launches_the_same(folder: Path, one: Path) -> None:
    assert_same(run(folder, "accelerated", ACCELERATE, batch_size=4, epochs=2), one)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_by_fsdp_they_are_the_same(folder: Path, one: Path, tied: bool) -> None:
    """With accumulation, an evaluation that has examples for one rank only, an unsharded model, and a resumed run."""
    want, changes = one, {}
    if not tied:
        changes["student_config"] = write_config(folder / "untied.json", {**STUDENT, "tie_word_embeddings": False})
        want = run(folder, "one untied", ALONE, batch_size=8, epochs=2, **changes)
    options: dict[str, Any] = {"module": "tests.support.fsdp_on_cpu", "batch_size": 2, "gradient_accumulation_steps": 2}
    launcher = FSDP if tied and nightly() else FORKED_FSDP
    sharded_run = run(folder, f"sharded {tied}", launcher, epochs=2, **options, **changes)
    assert_same(sharded_run, want)
    assert weights(sharded_run).keys() == weights(want).keys()
    assert not (sharded_run / "checkpoint-3/model.safetensors").exists()
    assert (sharded_run / "checkpoint-3/pytorch_model_fsdp_0/__1_0.distcp").stat().st_size > 0
    assert_same_model(sharded_run, want)
    if not tied:
        return
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(sharded_run / name)
    assert_same(run(folder, sharded_run.name, FORKED_FSDP, epochs=2, resume_from_checkpoint="latest", **options), want)


@pytest.mark.parametrize("launcher", [FORKED, pytest.param(FORKED_FSDP, marks=pytest.mark.nightly)])
def test_schedules_selection_and_the_best_step_are_the_same_on_two_ranks(
    folder: Path, launcher: tuple[str, ...]
) -> None:
    """Both stop early at the same step, and the best step becomes final; the last step has examples of one rank."""
    options = {
        "alpha": "0.6:0.1", "temperature": "2:1", "select": "entropy:0.3", "max_steps": 10, "eval_steps": 1,
        "learning_rate": 0.3, "warmup_steps": 10, "load_best": True, "early_stopping_patience": 2,
    }  # fmt: skip
    want = folder / "best of one"
    if not want.exists():
        run(folder, want.name, ALONE, batch_size=8, **options)
    options |= {"batch_size": 2, "gradient_accumulation_steps": 2}
    module = "tests.support.fsdp_on_cpu" if launcher == FORKED_FSDP else "logitcask"
    two = run(folder, f"best of two {module}", launcher, module=module, **options)
    assert_same(two, want)
    for name in ("alpha", "temperature", "eval_total_loss"):
        assert curve(read_log(two), name)[1] == pytest.approx(curve(read_log(want), name)[1], rel=ROUNDING)
    best, expected = metrics(two)["best"], metrics(want)["best"]
    assert best["step"] == expected["step"] < history(two)[-1]["step"] < 10
    assert best["eval_total_loss"] == pytest.approx(expected["eval_total_loss"], rel=ROUNDING)
    if launcher == FORKED_FSDP:
        shutil.rmtree(two / "final")
        run(folder, two.name, launcher, module=module, resume_from_checkpoint="latest", **options)
        assert_same(two, want)


@pytest.mark.parametrize("launcher", [FORKED, pytest.param(FORKED_FSDP, marks=pytest.mark.nightly)])
def test_exact_labels_on_two_ranks(folder: Path, launcher: tuple[str, ...]) -> None:
    """At a temperature that is not stored, by a divergence of the whole distribution."""
    if not (folder / "exact").exists():
        make_cache(folder, folder / "teacher", output=folder / "exact", preset="exact", tail_draws=0)
    options = {"cache": folder / "exact", "temperature": "3:1.2", "divergence": "jsd", "epochs": 2}
    want = folder / "exact of one"
    if not want.exists():
        run(folder, want.name, ALONE, batch_size=8, **options)
    module = "tests.support.fsdp_on_cpu" if launcher == FORKED_FSDP else "logitcask"
    accumulated = {"batch_size": 2, "gradient_accumulation_steps": 2}
    two = run(folder, f"exact {module}", launcher, module=module, **accumulated, **options)
    assert_same(two, want)
    assert losses(two, "soft_loss") == pytest.approx(losses(want, "soft_loss"), rel=ROUNDING)


@pytest.mark.parametrize("launcher", [pytest.param(FORKED, marks=pytest.mark.nightly), FORKED_FSDP])
def test_an_adapter_on_two_ranks(folder: Path, launcher: tuple[str, ...]) -> None:
    """Replicated and sharded, and the latter resumed: final/ holds the adapter of one rank."""
    lora = {"student_config": None, "student_model": folder / "teacher", "lora_rank": 4, "learning_rate": 1e-2}
    want = folder / "lora"
    if not want.exists():
        run(folder, "lora", ALONE, batch_size=8, epochs=2, **lora)
    module = "tests.support.fsdp_on_cpu" if launcher == FORKED_FSDP else "logitcask"
    two = run(folder, f"lora {module}", launcher, module=module, batch_size=4, epochs=2, **lora)
    expected, found = (load_file(place / "final/adapter_model.safetensors") for place in (want, two))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    if launcher == FORKED_FSDP:
        for name in ("checkpoint-6", "final"):
            shutil.rmtree(two / name)
        run(folder, two.name, launcher, module=module, batch_size=4, epochs=2, resume_from_checkpoint="latest", **lora)
        torch.testing.assert_close(load_file(two / "final/adapter_model.safetensors"), expected, rtol=1e-3, atol=1e-5)


def test_half_precision_under_fsdp_rounds_no_label(folder: Path) -> None:
    half = {"use_mixed_precision": True, "mixed_precision_dtype": "bf16", "epochs": 1}
    want = run(folder, "half", ALONE, batch_size=8, **half)
    sharded_run = run(folder, "half sharded", FORKED_FSDP, module="tests.support.fsdp_on_cpu", batch_size=4, **half)
    for a, b in zip(history(sharded_run), history(want), strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=5e-4)
        assert a["soft_loss"] == pytest.approx(b["soft_loss"], rel=5e-4)


def assert_same_model(actual: Path, expected: Path) -> None:
    ids = torch.arange(1, 9)[None]
    logits = [AutoModelForCausalLM.from_pretrained(place / "final")(ids).logits for place in (actual, expected)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_fsdp_that_would_be_skipped_is_refused(folder: Path) -> None:
    refused = launched(folder, "refused", FORKED_FSDP, batch_size=4, max_steps=1)
    assert refused.returncode != 0
    rule = "accelerate's FSDP must have fsdp_version 2 and run on several accelerators"
    assert f"error: {rule}, got version 2 and 2 ranks on cpu" in refused.stderr
    assert not (folder / "refused/final").exists()


def test_a_lost_rank_ends_the_run_and_it_can_be_resumed(folder: Path, one: Path) -> None:
    words = command(TORCHRUN, flags(folder, "lost", batch_size=4, epochs=2))
    with subprocess.Popen(words, stderr=subprocess.PIPE) as parent:
        victim = None
        for _ in range(6000):
            if (folder / "lost/checkpoint-3" / SETTINGS_FILE).exists() and (victim := ranks_of(parent.pid)):
                os.kill(victim[-1], signal.SIGKILL)
                break
            assert parent.poll() is None, "the run ended before a rank was killed"
            time.sleep(0.01)
        assert victim
        _, errors = parent.communicate(timeout=120)
        assert parent.returncode != 0
        assert b"SIGKILL" in errors or b"-9" in errors
    assert_same(run(folder, "lost", FORKED, batch_size=4, epochs=2, resume_from_checkpoint="latest"), one)


def ranks_of(parent: int) -> list[int]:
    """Return the processes that torchrun started, ascending."""
    ranks = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and "logitcask" in (place.parent / "cmdline").read_text():
            ranks.append(int(place.parent.name))
    return sorted(ranks)
