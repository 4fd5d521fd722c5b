"""The package as people install it: sdist, wheel, a fresh environment, and a folder full of files with our names."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from logitcask.pipeline.cli import main
from tests.support.nightly import nightly
from tests.support.servers import free_port
from tests.support.tiny import RECORDS, folder_bytes, make_cache, make_teacher, write_jsonl

ROOT = Path(__file__).parents[2]
SHADOW = "raise SystemExit('a file of the user was imported in place of the package')\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist, not from the checkout."""
    place = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(place)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = place.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(place), str(sdist)], check=True, capture_output=True)
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; the packages it needs are those of this one, behind its own."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = place / "lib" / version / "site-packages"
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = place / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return python


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder of a user whose files have the names of our folders and of a config."""
    place = tmp_path / "project"
    (place / "pipeline").mkdir(parents=True)
    for name in ("cache.py", "pipeline.py", "pipeline/__init__.py"):
        (place / name).write_text(SHADOW)
    (place / "logitcask.yaml").write_text("alpha: [\n")
    write_jsonl(place / "train.jsonl", RECORDS)
    make_teacher(place / "teacher")
    return place


def test_the_wheel_has_every_file_of_the_checkout(wheel: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "pipeline", "cache", "configs", "src/logitcask/*.*"], cwd=ROOT,
                             text=True, check=True, capture_output=True).stdout.splitlines()  # fmt: skip
    wanted = {f"logitcask/{name.removeprefix('src/logitcask/')}" for name in tracked}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == wanted
    assert len([name for name in packed if name.endswith(".py")]) > 90


def test_it_runs_where_files_have_our_names(environment: Path, hostile: Path) -> None:
    """The console script, -m, a DataLoader's worker, at night torchrun and Ray; configs by name."""

    def run(*words: object) -> str:
        done = subprocess.run([*map(str, words)], cwd=hostile, env=clean, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    module = [environment, "-m", "logitcask"]
    where = run(environment, "-c", "import logitcask; print(logitcask.__file__)")
    assert Path(where.strip()).is_relative_to(environment.parents[1])
    assert run(environment.with_name("logitcask"), "--version") == run(*module, "--version")

    stage_1 = ["precompute-logits", "--teacher-model", "teacher", "--train-data", "train.jsonl", "--head-size", "4",
               "--tail-draws", "8", "--max-seq-length", "64", "--shard-positions", "64", "--device", "cpu"]  # fmt: skip
    run(environment.with_name("logitcask"), *stage_1, "--output", "caches/one")
    if nightly():
        run(*module, *stage_1, "--output", "caches/two", "--ray", "local", "--workers", "1")
        assert folder_bytes(hostile / "caches/one") == folder_bytes(hostile / "caches/two")

    stage_2 = ["train", "--cache", "caches/one", "--max-steps", "2", "--device", "cpu"]
    stage_2 += ["--config", "hybrid-tiny", "--output-dir", "runs/named", "--num-workers", "1"]
    torchrun = ["torch.distributed.run", "--nproc_per_node=1", f"--master_port={free_port()}", "-m"]
    run(environment, "-m", *(torchrun if nightly() else []), "logitcask", *stage_2)
    assert (hostile / "runs/named/final/model.safetensors").is_file()


@pytest.mark.parametrize(("words", "known"), [
    (["--student-config", "huge"], "100m, 1b, 350m, tiny"),
    (["--config", "hybrid-2b", "--student-config", "tiny"],
     "guide-hybrid, guide-logit, guide-output, hybrid-100m, hybrid-1b, hybrid-350m, hybrid-tiny"),
])  # fmt: skip
def test_an_unknown_name_lists_the_known_ones(
    words: list[str], known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path)
    train = ["train", "--cache", cache, "--output-dir", tmp_path / "run", *words]
    monkeypatch.setattr(sys, "argv", ["logitcask", *map(str, train)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"{words[1]}: neither a file nor a known name: known are {known}" in capsys.readouterr().err
