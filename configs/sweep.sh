#!/usr/bin/env bash
# A small grid of tiny students on one cache, then their table and curves. Run again, it skips what is finished and
# resumes what was interrupted. As: sweep.sh CACHE OUTPUT [options of logitcask train, for every run]
set -euo pipefail
cache=$1 output=$2
shift 2

runs=()
train() { # NAME TYPE ALPHA TEMPERATURE [options]
    local run=$output/$1 type=$2 alpha=$3 temperature=$4 resume=
    shift 4
    runs+=("$run")
    if [[ -f $run/metrics.json ]]; then # written last
        printf '== %s: finished before\n' "$run"
        return
    elif compgen -G "$run/checkpoint-*/settings.json" >/dev/null; then # of a complete checkpoint
        resume="--resume-from-checkpoint latest"
    else
        rm -rf "$run"/checkpoint-* # cut off while it was written
    fi
    printf '== %s: %s\n' "$run" "${resume:-from the start}"
    # shellcheck disable=SC2086  # two words or none
    logitcask train --config hybrid-tiny --cache "$cache" --output-dir "$run" --save-steps 20 \
        --distillation-type "$type" --alpha "$alpha" --temperature "$temperature" $resume "$@"
}

#     name      type   alpha T
train output    output 1     2 "$@"
train logit-T1  logit  0     1 "$@"
train hybrid-T1 hybrid 0.5   1 "$@"
train hybrid-T2 hybrid 0.5   2 "$@"

printf '== the runs side by side\n'
logitcask compare "${runs[@]}" --output "$output/comparison.md" --plot "$output/curves.png"
