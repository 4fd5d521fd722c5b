#!/usr/bin/env bash
# SE-KD3X's setting (arXiv 2602.01395): Qwen3-8B into Qwen3-1.7B on 80M tokens of FineWeb-Edu, 512 per example, T=1, alpha 0,
# learning rate 1e-5, three seeds; from data to scores. Run again, it skips what is finished and resumes what was interrupted.
# As: run.sh OUTPUT [other options of logitcask train, for every run]
#
# By `logitcask plan --tokens 80000000 --teacher-model 8B --student-config 1.7B --max-seq-length 512`, on one H100: 5.55 GB of
# cache, 53.9 min of the teacher. A run of the student is 6 x 1.7e9 x 80e6 operations, 34 min at 40 % of 989 TFLOP/s
# (calculated); six runs. None of it has been run on a GPU.
#
# From the environment: TEACHER, STUDENT; DATA, a JSON Lines file of texts in place of the hub's data set; TOKENS, HELD_OUT
# (documents); SEEDS; WAYS: "all" positions, "selected" the fifth of them where the student is least certain; TASKS of
# lm-evaluation-harness, none if empty. The tasks are ours: compare with the paper's table by the same ones only.
set -euo pipefail
out=$1
shift
teacher=${TEACHER:-Qwen/Qwen3-8B} student=${STUDENT:-Qwen/Qwen3-1.7B}
tokens=${TOKENS:-80000000} held_out=${HELD_OUT:-500}
tasks=${TASKS-arc_easy,arc_challenge,boolq,hellaswag,openbookqa,piqa,winogrande}
mkdir -p "$out"

if [[ ! -f $out/train.jsonl ]]; then
    printf '== data: %s tokens, and %s documents held out\n' "$tokens" "$held_out"
    python - "$out" "$teacher" "$tokens" "$held_out" "${DATA:-}" <<'PYTHON'
import json, os, sys
from datasets import load_dataset
from transformers import AutoTokenizer

out, teacher, tokens, held_out, file = sys.argv[1:]
source = ("json", {"data_files": file}) if file else ("HuggingFaceFW/fineweb-edu", {"name": "sample-10BT"})
documents = iter(load_dataset(source[0], split="train", streaming=True, **source[1]))
tokenizer = AutoTokenizer.from_pretrained(teacher)
with open(f"{out}/test.jsonl", "w") as test:
    for _ in range(int(held_out)):
        test.write(json.dumps({"text": next(documents)["text"]}) + "\n")
left = int(tokens)
with open(f"{out}/train.jsonl.new", "w") as train:
    for document in documents:
        if left <= 0:
            break
        left -= len(tokenizer(document["text"], truncation=True, max_length=512)["input_ids"])
        train.write(json.dumps({"text": document["text"]}) + "\n")
os.rename(f"{out}/train.jsonl.new", f"{out}/train.jsonl")
PYTHON
fi

printf '== what it will cost\n'
logitcask plan --train-data "$out/train.jsonl" --teacher-model "$teacher" --student-config 1.7B --max-seq-length 512

for part in train test; do
    printf '== %s: %s labels it\n' "$part" "$teacher"
    logitcask precompute-logits --teacher-model "$teacher" --train-data "$out/$part.jsonl" --output "$out/$part-cache" \
        --max-seq-length 512 --temperatures 1
done

score() { # MODEL FILE
    [[ -f $2 ]] || logitcask evaluate --model "$1" --cache "$out/test-cache" ${tasks:+--tasks "$tasks"} --output "$2"
}
printf '== the teacher and the student as they are\n'
score "$teacher" "$out/teacher.json"
score "$student" "$out/student.json"

runs=()
for seed in ${SEEDS:-0 1 2}; do
    for way in ${WAYS:-all selected}; do
        run=$out/$way-$seed resume='' select=''
        runs+=("$run")
        [[ $way == all ]] || select='--select entropy:0.2'
        if [[ ! -f $run/metrics.json ]]; then # written last
            if compgen -G "$run/checkpoint-*/settings.json" >/dev/null; then # of a complete checkpoint
                resume='--resume-from-checkpoint latest'
            else
                rm -rf "$run"/checkpoint-* # cut off while it was written
            fi
            printf '== %s: %s\n' "$run" "${resume:-from the start}"
            # shellcheck disable=SC2086  # two words or none
            logitcask train --cache "$out/train-cache" --student-model "$student" --output-dir "$run" --seed "$seed" \
                --distillation-type logit --temperature 1 --learning-rate 1e-5 --epochs 1 --batch-size 8 \
                --gradient-accumulation-steps 8 --eval-cache "$out/test-cache" $select $resume "$@"
        fi
        score "$run/final" "$run/scores.json"
    done
done

printf '== the runs side by side; scores in */scores.json, teacher.json and student.json\n'
logitcask compare "${runs[@]}" --output "$out/comparison.md"
