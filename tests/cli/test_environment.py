"""Odd environments: no file locks and no limits on processes, as on Windows; an output that has no Unicode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.malformed import make_stock, usual

WITHOUT = (
    "import sys, psutil  # which needs resource on Linux alone\nsys.modules['fcntl'] = sys.modules['resource'] = None\n"
    "import logitcask\n"
    "from logitcask.pipeline.cli import main\n"
    "import logitcask.pipeline.train.train, logitcask.pipeline.evaluate.evaluate, logitcask.cache.copy\n"
    "import logitcask.pipeline.precompute.precompute, logitcask.pipeline.generate_data.generate\n"
    "from logitcask.cache.reader import CacheReader\n"
    "assert len(CacheReader(sys.argv[1])) > 0\n"
    "for words in sys.argv[2].split('|'):\n"
    "    sys.argv = ['logitcask', *words.split()]\n"
    "    try:\n        main()\n"
    "    except SystemExit as stopped:\n        print('exit', stopped.code or 0, words, flush=True)\n"
)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stock(tmp_path_factory.mktemp("stock"))


def python(*words: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, encoding="latin-1", check=False, env=environment
    )


def test_without_locks_caches_are_read_and_writing_is_refused(stock: Path, tmp_path: Path) -> None:
    lines = {name: " ".join(map(str, words)) for name, words in usual(stock, tmp_path).items()}
    read = [f"cache info {stock}/cache", f"cache verify {stock}/cache", "train --help",
            f"{lines['train']} --max-steps 1", lines["evaluate"],
            f"{lines['generate']} --max-new-tokens 1", f"compare {stock}/run"]  # fmt: skip
    local = f"generate-data --provider local --model {stock}/run/final --prompts code --output-dir {tmp_path}/data"
    humaneval = f"evaluate --model {stock}/run/final --humaneval --allow-code-execution"
    write = [lines["precompute-logits"], f"cache copy {stock}/cache {tmp_path}/copy", local, humaneval]
    done = python("-c", WITHOUT, str(stock / "cache"), "|".join([*read, *write]), HF_HUB_OFFLINE="1")
    assert "Traceback" not in done.stderr, done.stderr
    exits = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert exits == [*(f"exit 0 {words}" for words in read), *(f"exit 2 {words}" for words in write)], done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(write)
    assert all(line.endswith("this system lacks") for line in errors), errors
    assert done.stderr.count("fix:   use Linux or macOS\n") == len(write)


def test_without_unicode_the_output_is_written_all_the_same(stock: Path) -> None:
    done = python("-m", "logitcask", "compare", str(stock / "run"), PYTHONIOENCODING="cp1252")
    assert (done.returncode, done.stderr) == (0, "")
    assert "before ? after" in done.stdout  # an arrow where there is Unicode
