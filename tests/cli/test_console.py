"""Terminal output: the live table on a real pseudo-terminal, --quiet, NO_COLOR, --version, shell completion."""

import errno
import fcntl
import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import logging
from transformers.trainer_callback import TrainerControl, TrainerState

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.cli import main
from logitcask.pipeline.console import QUIET
from logitcask.pipeline.runs.run_folder import LOG_FILE, Line, latest_checkpoint, read_log
from logitcask.pipeline.train.callbacks.live_table import LiveTable
from tests.support.runs import STUDENT, write_config
from tests.support.tiny import make_cache

COMMAND = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'logitcask'; from logitcask.pipeline.cli import main; main()",
]
STYLE = re.compile(r"\x1b\[[0-9;:]*m")
LINE: Line = {"step": 33, "epoch": 1.5, "total_loss": 7.375, "hard_loss": 6.449, "soft_loss": 8.301,
              "perplexity": 632.04, "learning_rate": 1.5e-3, "tokens_per_second": 1234.5,
              "peak_memory_mb": 987.6}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"))


def train_words(cache: Path, output: Path, *more: str) -> list[str]:
    student = write_config(output.with_suffix(".json"), STUDENT)
    return ["train", f"--cache={cache}", f"--student-config={student}", f"--output-dir={output}", "--device=cpu",
            "--batch-size=4", "--logging-steps=1", *more]  # fmt: skip


def on_a_terminal(words: list[str], look: Callable[[], bytes] = lambda: b"", **variables: str) -> tuple[int, str]:
    """Return a command's exit code and output on a terminal of 120 columns; what ``look`` returns is typed there."""
    unset = {"TQDM_DISABLE", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))

    def on_start() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C interrupts
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it

    with subprocess.Popen(
        [*COMMAND, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=on_start,  # noqa: PLW1509
        env={**environment, "TERM": "xterm-256color", **variables},
    ) as process:  # fmt: skip
        os.close(theirs)
        os.set_blocking(ours, False)
        seen, deadline = bytearray(), time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if not (part := os.read(ours, 65536)):
                    break
                seen += part
            except BlockingIOError:
                os.write(ours, look())
                time.sleep(0.02)
            except OSError as error:
                if error.errno != errno.EIO:  # nobody holds the other end open any more
                    raise
                break
        else:
            process.kill()
    os.close(ours)
    return process.returncode, seen.decode()


def shown(console: Console, *, rank_0: bool = True) -> str:
    """Return what a console shows of a whole run of 88 steps, resumed from step 22."""
    table = LiveTable(console, 88, lambda: "finishing this step")
    state, control = TrainerState(max_steps=88, global_step=22, is_world_process_zero=rank_0), TrainerControl()
    arguments: Any = None
    held_out: Line = {"eval_total_loss": 7.022, "eval_hard_loss": 6.43, "eval_soft_loss": 7.6, "eval_perplexity": 620.2}
    table.show({**held_out, "step": 22, "eval_teacher_perplexity": 3.7018})
    with table:
        table.on_train_begin(arguments, state, control)
        table.show({**LINE, "step": 23})
        table.show(LINE)
        for step in (33, 44):
            time.sleep(0.01)
            state.global_step = step
            table.on_step_end(arguments, state, control)
        table.on_train_end(arguments, state, control)
    return console.export_text()


def test_the_table_shows_the_last_lines_and_the_progress() -> None:
    text = shown(Console(record=True, force_terminal=True, width=100, file=io.StringIO()))
    rows = [line.split() for line in text[text.rindex("step ") :].splitlines()]
    assert rows[0] == ["step", "total", "hard", "soft", "perplexity", "rate", "tokens/s", "MB,", "peak"]
    numbers = ["7.375", "6.449", "8.301", "632", "1.50e-03", "1,234", "988"]
    assert [row for row in rows if row[:1] == ["training"]] == [["training", step, *numbers] for step in ("23", "33")]
    assert ["held", "out", "22", "7.022", "6.43", "7.6", "620.2"] in rows
    assert ["the", "teacher", "3.702"] in rows  # the goal, in the column of perplexities
    assert re.search(r"━ 44/88 steps, 0:00:0\d gone, 0:00:0\d left\s+finishing this step", text)


@pytest.mark.parametrize(
    ("console", "rank_0"),
    [
        (Console(record=True, force_terminal=True, quiet=True, file=io.StringIO()), True),
        (Console(record=True, force_terminal=True, file=io.StringIO()), False),
    ],
    ids=["quiet", "rank 1"],
)
def test_no_table_with_quiet_or_on_other_ranks(console: Console, rank_0: bool) -> None:
    assert shown(console, rank_0=rank_0) == ""


def test_without_a_terminal_each_line_of_the_log_is_printed() -> None:
    lines = shown(Console(record=True, width=200, file=io.StringIO())).splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d  |  \d+ min left$", "", line) for line in lines] == [
        "step 22/88  held out  loss 7.022 (hard 6.43, soft 7.6)  ppl 620.2  teacher's ppl 3.702",
        *(
            f"step {step}/88  epoch 1.50  loss 7.375 (hard 6.449, soft 8.301)  ppl 632  lr 0.0015  1,234 tok/s  988 MB"
            for step in (23, 33)
        ),
    ]


def test_training_on_a_terminal_without_colour_interrupted_by_a_key(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = iter([b"\x03"])

    def look() -> bytes:
        if not (run / LOG_FILE).exists() or len(read_log(run)) < 5:
            return b""
        time.sleep(0.6)  # the table is drawn four times a second
        return next(keys, b"")

    words = train_words(cache, run, "--max-steps=1000000")
    code, seen = on_a_terminal(words, look, NO_COLOR="1")
    assert code == 130, seen[-2000:]
    assert STYLE.findall(seen) == []
    assert re.search(r"training +\d+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d,.]+ +[\d.e-]+ +[\d,]+ +[\d,]+", seen)
    assert re.search(r"held out +0 +[\d.]+", seen)
    assert re.search(r"the teacher +[\d,.]+", seen)
    assert re.search(r" \d+/1000000 steps, 0:00:\d\d gone, [\d:]+ left", seen)
    assert "it/s" not in seen
    assert "'total_loss'" not in seen
    assert "model shards" not in seen  # a bar of transformers as it saves a checkpoint
    assert "Traceback" not in seen
    last = latest_checkpoint(run)
    assert last is not None
    step = int(last.name.rpartition("-")[2])
    notices = [line for line in seen.splitlines() if "interrupted" in line]
    assert len(notices) == 1
    remedy = "resume with the same command and --resume-from-checkpoint latest"
    assert notices[0].endswith(f"interrupted: step {step} of 1000000 is saved: {remedy}")
    assert read_log(run)[-1]["step"] == step


def test_no_color_turns_colour_off(cache: Path) -> None:
    for value, styled in (("", True), ("1", False)):
        code, seen = on_a_terminal(["cache", "verify", str(cache)], NO_COLOR=value)
        assert code == 0
        assert "verifying" in seen
        assert bool(STYLE.search(seen)) == styled


def test_quiet_on_a_terminal_leaves_the_result(cache: Path) -> None:
    assert on_a_terminal(["--quiet", "cache", "verify", str(cache)]) == (
        0,
        f"{cache}: all {CacheReader(cache).manifest.shards.count} shards are intact\r\n",
    )


def test_quiet_training_prints_only_its_result(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (["--quiet"], []):
        words = train_words(cache, tmp_path / f"run{len(quiet)}", "--max-steps=2")
        monkeypatch.setattr(sys, "argv", ["logitcask", *quiet, *words])
        (logging.set_verbosity_error if quiet else logging.set_verbosity_warning)()  # as TRANSFORMERS_VERBOSITY has it
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        out, err = capsys.readouterr()
        assert "held out" in out
        assert "step " not in out
        assert ("plan      2 steps" in err) == (not quiet)
        assert bool(re.search(r"^\d\d:\d\d:\d\d  step 2/2  epoch \d", err, re.M)) == (not quiet)
        assert not (quiet and err)
        assert not QUIET.get()


def test_quiet_prints_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["logitcask", "--quiet", "cache", "verify", "nowhere"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: nowhere: ")


def logitcask(*words: str, **variables: str) -> str:
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, check=True, env={**os.environ, **variables}
    ).stdout


def test_the_version_is_that_of_the_package() -> None:
    version = re.search(r'^version = "(.*)"$', (Path(__file__).parents[2] / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert logitcask("--version") == f"logitcask {version[1]}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pre", ["precompute-logits"]),
        ("cache v", ["verify"]),
        ("train --use-t", ["--use-tensorboard", "--use-trackio"]),
        ("train --distillation-type ", ["output", "logit", "hybrid"]),
    ],
)
def test_the_shell_completes(typed: str, offered: list[str]) -> None:
    line = f"logitcask {typed}"
    asked = {"_LOGITCASK_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    assert logitcask(**asked).split() == offered


def test_completion_can_be_shown_and_installed(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = logitcask("--show-completion", "bash", **home)
    assert "complete -o default -F _logitcask_completion logitcask" in shown
    assert "installed" in logitcask("--install-completion", "bash", **home)
    assert "logitcask" in (tmp_path / ".bashrc").read_text()


def test_progress_bars_of_cache_commands_show_what_is_left(cache: Path, tmp_path: Path) -> None:
    """The number of shards is known from the start; without it no remaining time could be shown."""
    shards = CacheReader(cache).manifest.shards.count
    for words in (["verify", str(cache)], ["copy", str(cache), str(tmp_path / "copy")]):
        code, seen = on_a_terminal(["cache", *words])
        assert code == 0, seen
        assert f"{shards}/{shards}" in STYLE.sub("", seen)
    code, seen = on_a_terminal(["cache", "copy", str(cache), str(tmp_path / "part"), "--shards", "1:3"])
    assert code == 0, seen
    assert "2/2" in STYLE.sub("", seen)
