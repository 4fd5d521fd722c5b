"""The recipes of the justfile pass their arguments on verbatim."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JUST = Path(sys.executable).parent / "just"
AWKWARD = [
    "--train-data=two words",
    "it's",
    '"quoted"',
    "$HOME",
    "`false`",
    "a;b",
    "back\\slash",
    "",
    "*",
    "two\nlines",
]
PRINT = (
    "#!/bin/bash\nprintf '%s\\0' \"$@\"\n"  # stands in for a command: prints its arguments, each ended by a null byte
)


def stand_in(folder: Path, name: str) -> dict[str, str]:
    """Return an environment in which a command prints its arguments."""
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(PRINT)
    place.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def output(words: list[object], **options: object) -> str:
    printed: str = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload]
    return printed


def test_the_slurm_script_starts_the_command_it_was_given(tmp_path: Path) -> None:
    """With a stand-in for SLURM's launcher, since SLURM itself is not available."""
    script = tmp_path / "job.sh"
    script.write_text(output([JUST, "precompute-slurm", 3, "my teacher", "it's.jsonl", "$out", *AWKWARD], cwd=ROOT))
    output(["bash", "-n", script])
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines[2] == "#SBATCH --array=1-3"
    environment = {**stand_in(tmp_path / "bin", "srun"), "SLURM_ARRAY_TASK_ID": "2"}
    assert output(["bash", script], env=environment).split("\0")[:-1] == [
        ".venv/bin/logitcask", "precompute-logits", "--teacher-model", "my teacher", "--train-data", "it's.jsonl",
        "--output", "$out", *AWKWARD, "--shards", "2/3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (
            ["precompute", "a b", "c", "$d"],
            ["precompute-logits", "--teacher-model", "a b", "--train-data", "c", "--output", "$d"],
        ),
        (["train", "a b", "c", "$d"], ["train", "--cache", "a b", "--student-config", "c", "--output-dir", "$d"]),
    ],
)
def test_recipes_keep_quotes(tmp_path: Path, given: list[str], started: list[str]) -> None:
    (tmp_path / "justfile").write_text((ROOT / "justfile").read_text())
    stand_in(tmp_path, ".venv/bin/logitcask")
    assert output([JUST, *given, *AWKWARD], cwd=tmp_path).split("\0")[:-1] == [*started, *AWKWARD]


def test_recipes_copy_in_the_right_direction(tmp_path: Path) -> None:
    (tmp_path / "justfile").write_text((ROOT / "justfile").read_text())
    stand_in(tmp_path, ".venv/bin/logitcask")
    for given, copied in (
        (["push-cache", "s3://b/a b"], ["data/cache", "s3://b/a b"]),
        (["push-cache", "s3://b", "my cache"], ["my cache", "s3://b"]),
        (["pull-cache", "s3://b/a b"], ["s3://b/a b", "data/cache"]),
    ):
        assert output([JUST, *given], cwd=tmp_path).split("\0")[:-1] == ["cache", "copy", *copied]
