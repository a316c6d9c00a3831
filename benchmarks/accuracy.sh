#!/usr/bin/env bash
# Zero-shot, in-context learning, norm tuning and OFA on local tasks, by the command line a user would type.
#   benchmarks/accuracy.sh OUT SEEDS TASK_FOLDER...      for example: benchmarks/accuracy.sh runs "42 43 44" data/sst2 data/trec
# METHODS in the environment chooses among norm-tuning, ofa and ofa-algorithm1 (OFA with the sign of the paper's listing).
# A cell that is already in OUT is not run again. `python -m benchmarks.accuracy OUT` makes the tables.
set -euo pipefail
out=$1 seeds=$2
shift 2
mkdir -p "$out"

declare -A flags=(
  [norm-tuning]="--step-ratio 0 --sharpness 0"
  [ofa]=""
  [ofa-algorithm1]="--convention algorithm1"
)

cell() { # cell FILE COMMAND...: run a command whose JSON document becomes FILE, once
  local file=$1
  shift
  [ -s "$file" ] && return
  "$@" --json >"$file.part"
  mv "$file.part" "$file"
}

for seed in $seeds; do
  for task in "$@"; do
    run=$out/$(basename "$task")-$seed
    cell "$run-model.plain.json" ofa evaluate --data "$task"
    cell "$run-model.context.json" ofa evaluate --data "$task" --demonstrations "$task" --shots 5 --seed "$seed"
    for method in ${METHODS:-norm-tuning ofa ofa-algorithm1}; do
      # shellcheck disable=SC2086 # the flags are words of their own
      cell "$run-$method.fit.json" ofa fit --data "$task" --shots 5 --seed "$seed" --out "$run-$method" --overwrite ${flags[$method]}
      cell "$run-$method.plain.json" ofa evaluate "$run-$method" --data "$task"
      cell "$run-$method.context.json" ofa evaluate "$run-$method" --data "$task" --demonstrations "$task"
    done
  done
done
