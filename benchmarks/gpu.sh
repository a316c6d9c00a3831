#!/usr/bin/env bash
# Everything that has to be seen on a GPU, in under nine minutes on a machine that has PyTorch, Triton, transformers
# and pytest, and nothing of this project installed.
#
#   benchmarks/gpu.sh [OUT [PART...]]     OUT: folder of the tables and logs, benchmarks/results without it
#
# Parts, in this order, each within its own time, and none stopping the next:
#   ceilings   the device's copy bandwidth and its rate of bfloat16 products
#   tests      the tests of all that runs on CUDA tensors; those of training only where pydantic is installed
#   step       training steps of 7B and 8B layers and of a whole Llama-2-7B: times, ratios to plain, memory
#   replays    the same steps, plain and with the closed form, as replayed CUDA graphs
#   launches   which kernels a step launches, and how long they run
#   curvature  the kernels of the curvature beside eager, flash attention and a copy of the weights
#   kernels    those of norms beside eager, torch.compile, Liger-Kernel and QuACK
#   probes     those of the probes beside eager
#   memcheck   a memory checker over every kernel, where compute-sanitizer is installed
# And if it is named:
#   tune       the kernels of rows under other launches than their own
# It ends with status 1 where a part failed, and names it.
set -uo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit
fi
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
parts="ceilings tests step replays launches curvature kernels probes memcheck tune"
for name in "${@:2}"; do
  if [[ " $parts " != *" $name "* ]]; then
    echo "benchmarks/gpu.sh: there is no part $name; the parts are $parts" >&2
    exit 2
  fi
done
wanted=" ${*:2} "
python=${PYTHON:-python3}
if ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null; then
  echo "benchmarks/gpu.sh: $python finds no PyTorch with a CUDA GPU here; PYTHON in the environment chooses another" >&2
  exit 2
fi
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
failed=()

part() { # part SECONDS NAME COMMAND...: run a command within so many seconds, its output kept in OUT/NAME.log
  local limit=$1 name=$2
  shift 2
  [[ $wanted = "  " || $wanted = *" $name "* ]] || return 0
  echo "== $name, at most $limit s"
  local started=$SECONDS status=0
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40 || status=$?
  echo "== $name: status $status after $((SECONDS - started)) s"
  [ "$status" = 0 ] || failed+=("$name")
}

# Whatever puts its tensors where tests/device.py says. Not what needs other packages, a network, a browser or several
# processes, and not compiling ahead of time, which needs no GPU.
tests=(
  tests/ofa/regularizers/test_{exact,closed_form,hutchinson,objectives,guest,precision,compiled}.py tests/ofa/anatomy/test_steps.py tests/ofa/tuning/test_norms.py
  tests/ofa/regularizers/test_{attach,numbers,recompute,kernels}.py
  tests/ofa/regularizers/test_{memory_savers,transformers_trainer,waiting}.py tests/ofa/anatomy/test_families_dropin.py tests/ofa/adapters/test_save_and_load.py tests/ofa/anatomy/test_fused_norms.py
  tests/ofa/evaluation/test_scorer.py tests/ofa/probing/test_{layerwise,logit_lens}.py tests/benchmarks/test_algorithm1.py
  tests/ofa_kernels --ignore=tests/ofa_kernels/test_aot.py
)
if "$python" -c "import peft, pydantic" 2>/dev/null; then
  tests+=(tests/ofa/training/test_{loop,checkpoint}.py tests/ofa/test_adaptation.py tests/ofa/methods/test_{interface,structured_guidance}.py tests/ofa/methods)
  tests+=(tests/ofa/comparison/test_{cell,fingerprint}.py)
fi
workers=$(("$(nproc)" < 16 ? $(nproc) : 16))

part 20 ceilings "$python" -m benchmarks.ceilings --out "$out/ceilings_gpu.csv"
part 150 tests "$python" -m pytest -q -n "$workers" -p no:cacheprovider "${tests[@]}"
part 100 step "$python" -m benchmarks.gpu_step --out "$out/step_gpu.csv"
part 35 replays "$python" -m benchmarks.gpu_step --what replays --out "$out/replays_gpu.csv"
part 30 launches "$python" -m benchmarks.gpu_profile --out "$out/step_profile_gpu.csv"
part 60 curvature "$python" -m benchmarks.curvature_kernels --out "$out/curvature_gpu.csv"
rows=(--rows 8192 --widths 4096 --samples 4 --repeats 30)
part 60 kernels "$python" -m benchmarks.kernels --out "$out/kernels_gpu.csv" "${rows[@]}" --operations \
  {norm_step,add_norm}_{forward,backward}
# Compiling the probes' integers takes longer than everything else here.
part 30 probes "$python" -m benchmarks.kernels --out "$out/probes_gpu.csv" "${rows[@]}" --operations \
  {step_boundary,contract,perturb}_{forward,backward} --variants eager triton
if command -v compute-sanitizer >/dev/null; then
  part 45 memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m benchmarks.every_kernel
else
  echo "== memcheck: compute-sanitizer is not installed"
fi
[[ $wanted != *" tune "* ]] || part 400 tune "$python" -m benchmarks.tune_rows --out "$out/tune_rows_gpu.csv"

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
