#!/usr/bin/env bash
# Is Logitcask right on this machine's GPU, and how fast: one table and one JSON, within ten minutes, without a network.
# As: bash tests/gpu/check.sh [--device cuda] [--tiny] [--output runs/gpu-check]
# PYTHON names the interpreter, python3 unless given. What it lacks is named first, and what needs that is left out.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
exec "${PYTHON:-python3}" -m tests.gpu.check "$@"
