#!/usr/bin/env bash
# Everything that has to be seen on a GPU, in under eleven minutes on a machine that has PyTorch, Triton, transformers
# and pytest, and nothing of this project installed.
#
#   benchmarks/gpu.sh [OUT]        OUT: folder of the tables and logs, benchmarks/results without it
#
# In this order, each part within its own time, and none stopping the next: the device's ceilings; the tests of all
# that runs on CUDA tensors; the training steps of 7B and 8B layers and of a whole Llama-2-7B; the trace of attention
# beside flash attention; the other kernels beside eager, torch.compile, Liger-Kernel and QuACK; a memory checker over
# every kernel, where compute-sanitizer is installed. It ends with status 1 where a part failed, and names it.
set -uo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit
fi
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null; then
  echo "benchmarks/gpu.sh: $python finds no PyTorch with a CUDA GPU here; PYTHON in the environment chooses another" >&2
  exit 2
fi
out=${1:-benchmarks/results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD TOKENIZERS_PARALLELISM=false
failed=()

part() { # part SECONDS NAME COMMAND...: run a command within so many seconds, its output kept in OUT/NAME.log
  local limit=$1 name=$2
  shift 2
  echo "== $name, at most $limit s"
  local started=$SECONDS status=0
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40 || status=$?
  echo "== $name: status $status after $((SECONDS - started)) s"
  [ "$status" = 0 ] || failed+=("$name")
}

# Whatever puts its tensors where tests/device.py says. Not what needs other packages, a network, a browser or several
# processes, and not compiling ahead of time, which needs no GPU.
tests=(
  tests/ofa_kernels --ignore=tests/ofa_kernels/test_aot.py
  tests/ofa/test_{exact,closed_form,hutchinson,jvp,local_jvp,objectives,anatomy,tuning,fused_norms,guest,precision,compiled}.py
  tests/ofa/test_regularizers{,_numbers,_checkpointing,_kernels}.py
  tests/ofa/test_{memory_savers,families_dropin,adapters,trainer,trainer_integration,checkpoint,adaptation}.py
  tests/ofa/test_{methods,guidance,evaluation,probing,logit_lens}.py
  tests/ofa/methods tests/ofa/comparison/test_{cell,fingerprint}.py tests/benchmarks/test_algorithm1.py
)
workers=$(("$(nproc)" < 16 ? $(nproc) : 16))

part 20 ceilings "$python" -m benchmarks.ceilings --out "$out/ceilings_gpu.csv"
part 240 tests "$python" -m pytest -q -n "$workers" -p no:cacheprovider "${tests[@]}"
part 170 step "$python" -m benchmarks.gpu_step --out "$out/step_gpu.csv"
part 60 attention "$python" -m benchmarks.attention --out "$out/attention_gpu.csv"
part 30 constants "$python" -m benchmarks.constants --out "$out/constants_gpu.csv"
part 90 kernels "$python" -m benchmarks.kernels --out "$out/kernels_gpu.csv" --rows 2048 8192 --widths 4096 --samples 4 \
  --repeats 30
if command -v compute-sanitizer >/dev/null; then
  part 45 memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m benchmarks.every_kernel
else
  echo "== memcheck: compute-sanitizer is not installed"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
