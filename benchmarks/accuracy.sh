#!/usr/bin/env bash
# Zero-shot, in-context learning, norm tuning and OFA on local tasks, by the command line a user would type.
#   benchmarks/accuracy.sh OUT SEEDS TASK_FOLDER...      for example: benchmarks/accuracy.sh runs "42 43 44" data/sst2 data/trec
# A cell that is already in OUT is not run again. `python -m benchmarks.accuracy OUT` makes the tables.
set -euo pipefail
out=$1 seeds=$2
shift 2
mkdir -p "$out"

cell() { # cell FILE COMMAND...: run a command whose JSON document becomes FILE, once
  local file=$1
  shift
  [ -s "$file" ] && return
  "$@" --json >"$file.part"
  mv "$file.part" "$file"
}

fit() { # fit NAME FLAGS...: tune, then test without and with the demonstrations in context
  local name=$1
  shift
  cell "$run-$name.fit.json" ofa fit --data "$task" --shots 5 --seed "$seed" --out "$run-$name" --overwrite "$@"
  cell "$run-$name.plain.json" ofa evaluate "$run-$name" --data "$task"
  cell "$run-$name.context.json" ofa evaluate "$run-$name" --data "$task" --demonstrations "$task"
}

for seed in $seeds; do
  for task in "$@"; do
    run=$out/$(basename "$task")-$seed
    cell "$run-model.plain.json" ofa evaluate --data "$task"
    cell "$run-model.context.json" ofa evaluate --data "$task" --demonstrations "$task" --shots 5 --seed "$seed"
    fit norm-tuning --step-ratio 0 --sharpness 0
    fit ofa
    fit ofa-algorithm1 --convention algorithm1
  done
done
