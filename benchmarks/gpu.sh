#!/usr/bin/env bash
# Everything that has to be seen on a GPU that is there for minutes, on a machine that has PyTorch, Triton, transformers
# and pytest, and nothing of this project installed. No part takes more than two minutes.
#
#   benchmarks/gpu.sh [OUT [PART...]]     OUT: folder of the tables and logs, benchmarks/results without it
#
# Parts, in the order of what they answer; none stops the next. What is expected, on an H200, is written down before the
# first run, in docs/performance.md too; "copy" is the device's own bandwidth of a large copy.
#   ceilings   What can the device do? Copies at 4,200 GB/s, bfloat16 products at 790 TFLOP/s.
#   works      Is what was written without a GPU right on one? CUDA graphs of training steps, norms and their gradients
#              with rows loaded ahead, fused layers, copies without the scale and the diagonal from them: no test fails.
#   fused      Do fused layers pay? Step <= 0.95 of the unfused plain step; step ratio alone <= 1.00 of the fused plain.
#   graphs     What is left once launching is free? Exact sharpness at 512 tokens <= 1.20 of plain, both as graphs; at
#              2048 <= 1.15; a plain step of four 7B layers 3.8 ms (10.7 eagerly).
#   step       What does a user pay, term by term? Exact <= 1.15 at 2048 tokens, step ratio <= 1.15, every=4 <= 1.04.
#   kernels    Are the norms as fast as a copy? norm_step forward >= 0.90 (0.94 before), backward >= 0.80 (0.66 before).
#   launches   Which kernels does a step launch? With the exact sharpness 8 more per layer, none in the backward pass.
#   curvature  How fast are the kernels of the curvature, beside eager, flash attention and a copy of the weights?
#   probes     Those of the probes, N = 4: perturb without the scale >= 0.40, probed_diagonal >= 0.65, contract >= 0.65
#              (0.69 before), perturb backward >= 0.25 (0.15 before).
#   tests      Does everything else that computes on a device? No test fails.
#   memcheck   Does a kernel touch memory that is not its own? No error; where compute-sanitizer is installed.
# And if it is named:
#   tune       Is there a faster launch for norm_step backward? None by more than 5 %.
# It ends with status 1 where a part failed, and names it.
set -uo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit
fi
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
parts="ceilings works fused graphs step kernels launches curvature probes tests memcheck tune"
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

# The kernels and callers that no GPU has run yet.
works=(
  tests/ofa/training/test_graphed_step.py tests/benchmarks/test_gpu.py::test_a_replayed_step_has_the_gradients_of_an_eager_one
  tests/ofa/anatomy/test_fused_layers.py tests/ofa/regularizers/test_waiting.py
  tests/ofa_kernels/test_{kernels,held_probes,ops}.py
)
rows=(--rows 8192 --widths 4096 --samples 4 --repeats 30)
part 20 ceilings "$python" -m benchmarks.ceilings --out "$out/ceilings_gpu.csv"
part 100 works "$python" -m pytest -q -n "$workers" -p no:cacheprovider "${works[@]}" -k "not (perturb or contract)"
part 60 fused "$python" -m benchmarks.gpu_step --what fused --out "$out/fused_gpu.csv"
part 45 graphs "$python" -m benchmarks.gpu_step --what replays --out "$out/replays_gpu.csv"
part 100 step "$python" -m benchmarks.gpu_step --out "$out/step_gpu.csv"
part 60 kernels "$python" -m benchmarks.kernels --out "$out/kernels_gpu.csv" "${rows[@]}" --operations \
  {norm_step,add_norm}_{forward,backward}
part 30 launches "$python" -m benchmarks.gpu_profile --out "$out/step_profile_gpu.csv"
part 60 curvature "$python" -m benchmarks.curvature_kernels --out "$out/curvature_gpu.csv"
# Compiling the probes' integers takes longer than everything else here.
part 30 probes "$python" -m benchmarks.kernels --out "$out/probes_gpu.csv" "${rows[@]}" --operations \
  {perturb_unscaled,probed_diagonal}_forward {contract,perturb}_{forward,backward} --variants eager triton
part 120 tests "$python" -m pytest -q -n "$workers" -p no:cacheprovider "${tests[@]}"
if command -v compute-sanitizer >/dev/null; then
  part 45 memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m benchmarks.every_kernel
else
  echo "== memcheck: compute-sanitizer is not installed"
fi
[[ $wanted != *" tune "* ]] || part 120 tune "$python" -m benchmarks.tune_rows --kernels norm_step_backward \
  --out "$out/tune_rows_gpu.csv"

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
