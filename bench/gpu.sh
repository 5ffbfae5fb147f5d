#!/usr/bin/env bash
# Builds, tests and measures on the GPU of this machine, from a source tree, without network, in ten minutes.
#
#   bench/gpu.sh                  results in bench/results/<gpu>/<date>.{jsonl,md}, logs beside them
#   OUT=/somewhere bench/gpu.sh   results in /somewhere/<gpu>/
#
# A step that fails or runs out of its time is recorded, and the next one goes on; the exit status tells whether any did.
# What matters most comes first: with the $BUDGET seconds spent, the rest is skipped and said to be.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} BUDGET=${BUDGET:-580}
export PYTHONPATH=. TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)}

gpu=$("$PYTHON" -c 'import torch; from bench.timing import machine; print(machine(torch.device("cuda")))') || {
  echo "bench/gpu.sh: no CUDA device that $PYTHON and its torch can use" >&2
  exit 3
}
folder=${OUT:-bench/results}/$gpu
date=$(date +%Y-%m-%d)
logs=$folder/logs
results=$folder/$date.jsonl report=$folder/$date.md
mkdir -p "$logs"
printf '# %s, %s\n\n| step | result | seconds |\n|---|---|---|\n' "$gpu" "$date" >"$report"
failed=0

# step <name> <seconds> <command...>: its output goes to logs/<name>.log
step() {
  local name=$1 limit=$2 start=$SECONDS status=0 left=$((BUDGET - SECONDS))
  shift 2
  if [ $left -lt 10 ]; then
    failed=1
    printf '| %s | skipped: no time left | 0 |\n' "$name" | tee -a "$report"
    return
  fi
  [ "$limit" -le $left ] || limit=$left
  timeout --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
  local result=ok
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then result="stopped after $limit s"; elif [ $status -ne 0 ]; then result="failed: $status"; fi
  [ $status -eq 0 ] || failed=1
  printf '| %s | %s | %d |\n' "$name" "$result" $((SECONDS - start)) | tee -a "$report"
  [ $status -eq 0 ] || tail -n 15 "$logs/$name.log"
}

bench() { # bench <name> <seconds> <op and options...>
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m bench.run "$@" --device cuda --out "$results"
}

step build 150 "$PYTHON" setup.py build_ext --inplace
step doctor 60 "$PYTHON" -m fastrl.cli doctor
# The emulated and interpreted tests of a CPU, now compiled; of the CUDA kernels also 50 equal runs and 2^31 logits.
step tests 160 env FASTRL_TEST_DEVICE=cuda "$PYTHON" -m pytest tests/ops -k "triton or cuda or chunked" --no-header --tb=short

small=auto,cuda,triton,chunked
bench linear_policy_loss 110 linear_policy_loss --shapes qwen3-8b-16k --backends auto,chunked --rounds 5
bench linear_logprob 90 linear_logprob --shapes qwen3-8b-16k --backends auto,chunked --rounds 5
bench policy_loss 45 policy_loss --shapes 64k --backends $small
bench group_advantages 30 group_advantages --shapes wide --backends $small
bench gae 45 gae --shapes "16 x 128k" --backends $small --against none --rounds 9
bench logprob 45 logprob --shapes qwen3-8b-8k --backends $small --rounds 5
bench linear_policy_loss_small 45 linear_policy_loss --shapes qwen3-0.6b-8k --backends auto,chunked --rounds 5

step parity 60 "$PYTHON" -m pytest tests -m gpu --no-header --tb=short

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    step "$tool" 60 env FASTRL_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest tests/ops/test_cuda.py --no-header --tb=short \
      -k "not each_run and not two_to_the_31 and not many and not alone_and_among"
  done
else
  printf '| memcheck, racecheck | absent: no compute-sanitizer | 0 |\n' | tee -a "$report"
fi

for name in linear_policy_loss linear_logprob linear_policy_loss_small logprob policy_loss group_advantages gae; do
  # The tables are Markdown under a title; what libraries print beside them stays in the log.
  grep -E '^ *\||^(linear_|logprob|policy_|gae|group_)[a-z_]*, ' "$logs/$name.log" 2>/dev/null |
    sed -E 's/ +$//; s/^ *\|/|/; s/^([a-z].*)$/\n\1\n/' >>"$report" || true
done
echo "$report"
exit $failed
