#!/usr/bin/env bash
# The comparison of benchmarks/comparison.yaml on the GPUs of this machine, within a given time, without network and
# with nothing of this project installed.
#
#   benchmarks/comparison_gpu.sh DATA OUT [SECONDS]     DATA: holds a folder with task.json for each task
#                                                       OUT: folder of what it writes; SECONDS: 3600 without it
#
# OUT gets comparison_gpu (results.jsonl and run.json, as `ofa compare` writes them; the same command continues it),
# report.md and report.html of the tasks that are finished, comparison_seconds_gpu.csv, and comparison_gpu.log. When the
# time is over, `ofa compare` is interrupted: what it has finished is kept and told. It ends with status 1 where
# something failed, and says what.
#
# Within a task quick methods come first. Meanwhile another process compiles the kernels of the slow ones, by a fit of
# one epoch each (compile_kernels.log): every worker finds them in Triton's cache then, instead of compiling its own.
#
# In the environment:
#   WORKERS (8): cells that run at once on each GPU.  TASKS (all of DATA): "sst2 trec", in the order in which they run.
#   OPTIONS: more options of `ofa compare`, such as "--seeds 42 --test-size 50".  CONFIG (benchmarks/comparison.yaml).
#   MODEL (the embedded one): hub id or folder.
#   OFA_CACHE, OFA_EMBEDDED_WHEEL: where the embedded model lies, or the wheel from which it is made.
#   COMMIT: the commit that runs, where this is no git checkout.  PYTHON (python3).
#   DEVICE (cuda): cpu runs it on a CPU, with that many workers; files are then called _cpu.
set -uo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit
fi
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  echo "benchmarks/comparison_gpu.sh: give DATA and OUT, and SECONDS if need be; --help says what they are" >&2
  exit 2
fi
begun=$SECONDS limit=${3:-3600}
for_report=30 # of these seconds
if ! [[ $limit =~ ^[0-9]+$ ]] || [ "$limit" -le "$for_report" ]; then
  echo "benchmarks/comparison_gpu.sh: SECONDS is $limit: give a whole number above $for_report" >&2
  exit 2
fi
data=$(cd "$1" && pwd) && out=$(mkdir -p "$2" && cd "$2" && pwd) || exit 2
config=$(realpath "${CONFIG:-$(dirname "$0")/comparison.yaml}")
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} workers=${WORKERS:-8} device=${DEVICE:-cuda}
if [ "$device" = cpu ]; then
  kind=cpu sharing=(--workers "$workers")
else
  kind=gpu sharing=(--workers-per-gpu "$workers")
  if ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null; then
    echo "benchmarks/comparison_gpu.sh: $python finds no PyTorch with a CUDA GPU here; PYTHON in the environment chooses" \
      "another, DEVICE=cpu does without" >&2
    exit 2
  fi
fi
tasks=()
for file in "$data"/${TASKS:+none/}*/task.json; do
  [ -f "$file" ] && tasks+=("data/$(basename "$(dirname "$file")")")
done
for task in ${TASKS:-}; do
  tasks+=("data/$task")
done
for task in "${tasks[@]:-data/*}"; do
  if [ ! -f "$data/${task#data/}/task.json" ]; then
    echo "benchmarks/comparison_gpu.sh: there is no $data/${task#data/}/task.json: DATA holds a folder for each task" >&2
    exit 2
  fi
done
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
results=$out/comparison_$kind failed=() compiling=

# From a folder of links, so that neither the noted command nor the names of tasks depend on this machine's folders.
links=$(mktemp -d)
trap '[ -z "$compiling" ] || kill "$compiling" 2>/dev/null; rm -rf "$links"' EXIT
mkdir -p "$results"
ln -s "$data" "$links/data" && ln -s "$results" "$links/results" && ln -s "$config" "$links/comparison.yaml"
if [ "$device" != cpu ]; then
  cp benchmarks/compile_kernels.yaml "$links/compile.yaml"
  (cd "$links" && exec "$python" -m ofa compare --config compile.yaml --tasks "${tasks[0]}" --out compiled --offline \
    --device "$device" --workers-per-gpu 3 ${MODEL:+--model "$MODEL"} </dev/null >"$out/compile_kernels.log" 2>&1) &
  compiling=$!
fi

left=$((limit - (SECONDS - begun) - for_report)) status=0
echo "== ${tasks[*]}: at most $left s"
# The interrupt reaches Python even where whoever started this ignores interrupts, as shells do for background jobs.
# shellcheck disable=SC2086 # the options are words of their own
(cd "$links" && timeout --signal=INT --kill-after=10 "$left" env --default-signal=INT "$python" -m ofa compare \
  --config comparison.yaml --tasks "$(IFS=,; echo "${tasks[*]}")" --out results --offline --device "$device" \
  --order quick-first "${sharing[@]}" ${MODEL:+--model "$MODEL"} ${OPTIONS:-} </dev/null) 2>&1 | tee "$out/comparison_$kind.log" || status=${PIPESTATUS[0]}
case $status in
  0) ;;
  124 | 137) echo "== the time is over" ;;
  *) failed+=("compare (status $status)") ;;
esac
if [ -s "$results/results.jsonl" ]; then
  "$python" -m benchmarks.comparison_seconds "$results" --out "$out/comparison_seconds_$kind.csv" \
    ${COMMIT:+--commit "$COMMIT"} || failed+=(seconds)
  "$python" -m ofa report "$results" --out "$out" --whole-tasks || failed+=(report)
  echo "== $(wc -l <"$results/results.jsonl") cells in $results, $((SECONDS - begun)) s"
else
  failed+=("no cell is finished")
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
