#!/usr/bin/env bash
# On-policy distillation offline, in rounds: the student writes, the teacher labels what it wrote, and the student is
# trained further on that and the first cache. Run again, it skips what is finished and resumes what was interrupted.
# As: rounds.sh TEACHER CACHE STUDENT PROMPTS OUTPUT [options of logitcask train, for every round]
# From the environment: ROUNDS (1), PROMPTS_PER_ROUND (500), NEW_TOKENS (256 per reply, longer ones are dropped) and SHARE
# (0.5), the share of the target positions that the student wrote. The loss is the soft one alone: text of the student's
# own is nothing to imitate.
set -euo pipefail
teacher=$1 cache=$2 student=$3 prompts=$4 output=$5
shift 5
share=${SHARE:-0.5}
rest=$(awk "BEGIN { print 1 - $share }")

for ((round = 1; round <= ${ROUNDS:-1}; round++)); do
    here=$output/$round run=$output/$round/run resume=
    if [[ -f $run/metrics.json ]]; then # written last
        printf '== round %s: finished before\n' "$round"
        student=$run/final
        continue
    fi
    printf '== round %s: %s writes\n' "$round" "$student"
    logitcask generate-data --provider local --model "$student" --prompts "$prompts" --output-dir "$here/data" \
        --num-examples "${PROMPTS_PER_ROUND:-500}" --max-new-tokens "${NEW_TOKENS:-256}" --temperature 1 \
        --validation-fraction 0 --seed "$round"
    printf '== round %s: %s labels what it wrote\n' "$round" "$teacher"
    logitcask precompute-logits --teacher-model "$teacher" --train-data "$here/data/train.jsonl" --output "$here/cache"
    printf '== round %s: %s is trained further\n' "$round" "$student"
    if compgen -G "$run/checkpoint-*/settings.json" >/dev/null; then # of a complete checkpoint
        resume="--resume-from-checkpoint latest"
    else
        rm -rf "$run"/checkpoint-* # cut off while it was written
    fi
    # shellcheck disable=SC2086  # two words or none
    logitcask train --cache "$cache:$rest" --cache "$here/cache:$share" --student-model "$student" --output-dir "$run" \
        --distillation-type logit $resume "$@"
    student=$run/final
done
printf '== the student of the last round: %s\n' "$student"
