#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, nvcc, ninja and torch >= 2.11; no network needed; ends in under 9 minutes.
#
#   benchmarks/gpu_check.sh FOLDER
#
# Builds for that card (or takes rnnfast/_C_*.so where they are there and load), runs the GPU tests and
# compute-sanitizer, times the suites for cuda, triton and torch.nn, and looks at the worst cases with ncu. Leaves in
# FOLDER: table.txt, logs.txt and the result files. Each stage has its own time limit, and a failure in one does not stop
# the next. Exit status 1: a stage failed. Without a card every stage says why it skips, and the status is 0.
#
#   GPU_CHECK_STAGES="build tests"  only these; two calls can share the work. Besides those that run by default (build
#                                   tests sanitizer flashrnn grid models ncu) there are microbench (what the design of
#                                   the kernels rests on) and cudnn (torch.nn's own times); "all" is every stage
#   GPU_CHECK_SECONDS=510           for all stages together; each gets its share of what is left
#   GPU_CHECK_DTYPES=float16        types of the suites (default bfloat16,float32)
#   GPU_CHECK_REBUILD=1             builds even where libraries are there
#   GPU_CHECK_DEVICE=cpu            a rehearsal: the stages that can run with tiny shapes on the CPU
#   PYTHON=python3                  the Python that has torch
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
[[ $# -eq 1 ]] || { sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
default_stages="build tests sanitizer flashrnn grid models ncu"
all_stages="$default_stages microbench cudnn"
stages=${GPU_CHECK_STAGES:-$default_stages}
[[ $stages == all ]] && stages=$all_stages
budget=${GPU_CHECK_SECONDS:-510}
device=${GPU_CHECK_DEVICE:-cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

for stage in $stages; do
  [[ " $all_stages " == *" $stage "* ]] || { echo "gpu_check: no stage is called $stage; there are: $all_stages"; exit 2; }
done

# ---- what is here ---------------------------------------------------------------------------------------------------

# The first Python whose torch sees the card, and the card's compute capability, as in "python3 9.0"; else one with torch.
find_python() {
  local candidate answer fallback=
  for candidate in ${PYTHON:-.venv/bin/python python3 python}; do
    command -v "$candidate" > /dev/null || continue
    answer=$("$candidate" -c '
import torch
print("torch", *("%d.%d" % torch.cuda.get_device_capability() for _ in range(torch.cuda.is_available())))' 2> /dev/null)
    case $answer in
      "torch "*) echo "$candidate ${answer#torch }" && return ;;
      torch) fallback=${fallback:-$candidate} ;;
    esac
  done
  echo "$fallback"
}
read -r python torch_has_card < <(find_python)
capability=$torch_has_card
[[ -n $capability ]] || capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1)
find_tool() { command -v "$1" || { [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/$1 ]] && echo "${CUDA_HOME:-/usr/local/cuda}/bin/$1"; }; }
nvcc=$(find_tool nvcc)
sanitizer=$(find_tool compute-sanitizer)
ncu=$(find_tool ncu)
# The letter opens what one generation alone has.
case $capability in 9.0 | 10.0) arch=${capability}a ;; *) arch=$capability ;; esac

# beside NAME COMMAND...: starts it, its output in a file of its own. wait_for_all: their outcomes, a line each; status 1
# if one failed.
beside() {
  local name=$1
  shift
  "$@" > "$work/$stage-$name.part" 2>&1 &
  children+=("$name:$!")
}
wait_for_all() {
  local child status=0 code
  # Told to end, this shell waits for what the others have to say.
  trap : TERM
  for child in "${children[@]}"; do
    while kill -0 "${child#*:}" 2> /dev/null; do wait "${child#*:}"; done
    wait "${child#*:}"
    code=$?
    [[ $code -eq 0 ]] || status=1
    echo "${child%:*}: status $code: $(last_line "$work/$stage-${child%:*}.part")"
  done
  echo "$(for child in "${children[@]}"; do last_line "$work/$stage-${child%:*}.part"; done | grep -oE '[0-9]+ (passed|failed|errors?|skipped|calls)' \
    | awk '{ sum[$2] += $1 } END { for (what in sum) printf "%d %s, ", sum[what], what }')${#children[@]} processes"
  return $status
}
# In plain characters, and no longer than a table bears.
last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | tr -cd '\11\12\40-\176' | cut -c 1-110; }

has_module() { "$python" -c "import $1" 2> /dev/null; }
libraries_load() {
  "$python" -c '
import sys
from rnnfast import libraries
sys.exit(libraries.cpu_error is not None or (sys.argv[1] == "cuda" and libraries.cuda_problem() is not None))' "$device" 2> /dev/null
}

# ---- stages: why_not_X prints a reason to skip or nothing; run_X does it ---------------------------------------------

why_no_card() {
  if [[ -z $python ]]; then
    echo "no Python with torch (PYTHON= chooses one)"
  elif [[ $device == cpu ]]; then
    [[ ${1:-} == also-cpu ]] || echo "a rehearsal on the CPU"
  elif [[ -z $capability ]]; then
    echo "no CUDA device"
  elif [[ -z $torch_has_card ]]; then
    echo "the torch of $python does not see the card"
  fi
}
why_no_library() {
  why_no_card "$@" | grep . && return
  libraries_load || echo "rnnfast's libraries do not load (see stage build, or build them first)"
}

why_not_build() {
  why_no_card | grep . && return
  [[ -z ${GPU_CHECK_REBUILD:-} ]] && libraries_load && { echo "not needed: the libraries in rnnfast/ load on this card"; return; }
  [[ -n $nvcc ]] || { echo "no nvcc"; return; }
  has_module setuptools.command.bdist_wheel || echo "no setuptools >= 70.1 for $python"
}
run_build() {
  RNNFAST_CUDA=1 RNNFAST_CUDA_ARCHS=$arch MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" setup.py -q build_ext --inplace \
    && "$python" -m rnnfast info
}

why_not_tests() {
  why_no_library also-cpu | grep . && return
  has_module pytest || echo "no pytest"
}
# A process for each file, side by side: the host is what takes the time, and an error that a CUDA context does not
# survive ends only its own file. On the signal of `timeout` pytest says what has failed by then.
run_tests() {
  local files=(tests/gpu/test_gpu_*.py) file
  if [[ $device == cpu ]]; then
    files=(tests/gpu/test_gpu_precision.py)
    export RNNFAST_GPU_TESTS_DEVICE=cpu
  fi
  for file in "${files[@]}"; do
    # The sanitizer has a stage of its own.
    [[ $file == *sanitizer* ]] && continue
    beside "$(basename "$file" .py)" "$python" -c '
import signal, sys
import pytest
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))' -m gpu -q -p no:cacheprovider --tb=short --durations=3 "$file"
  done
  wait_for_all
}

why_not_sanitizer() {
  why_no_library | grep . && return
  [[ -n $sanitizer ]] || echo "no compute-sanitizer"
}
# Side by side: most of the time goes into torch's start. Without torch's cache every tensor is an allocation of its own,
# so that an access beyond its end is seen. Only our kernels, whose names begin with step.
run_sanitizer() {
  local tool
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck synccheck initcheck; do
    beside "$tool" "$sanitizer" --tool "$tool" --error-exitcode 99 --kernel-regex kns=step \
      "$python" tests/gpu/sanitized.py
  done
  wait_for_all
}

why_not_suite() {
  why_no_library also-cpu | grep . && return
  "$python" benchmarks/run.py --help 2>&1 > /dev/null | tail -n 1  # a library that it lacks
}
# run_suite NAME: ends by itself before the limit, so that what was measured by then is written.
run_suite() {
  if [[ $device == cpu ]]; then
    "$python" benchmarks/run.py --suite smoke --seconds 0.05 --out "$out"
    return
  fi
  local seconds=$((limit > 40 ? limit - 20 : limit / 2))
  "$python" benchmarks/run.py --suite "$1" --device cuda --dtype "${GPU_CHECK_DTYPES:-bfloat16,float32}" \
    --mode fwd,fwdbwd --seconds 0.15 --limit "$seconds" --out "$out"
}

why_not_microbench() {
  why_no_card | grep . && return
  [[ -n $nvcc ]] || echo "no nvcc"
}
run_microbench() { bash benchmarks/microbench/run.sh > "$out/microbench.jsonl"; }

why_not_cudnn() { why_no_card; }
run_cudnn() { "$python" benchmarks/microbench/cudnn.py --seconds $((limit - 15)) > "$out/cudnn.jsonl"; }

why_not_ncu() {
  why_no_library | grep . && return
  [[ -n $ncu ]] || { echo "no ncu"; return; }
  [[ -n $(worst_cases) ]] || echo "no result file in $out to choose the worst cases from"
}
worst_cases() { "$python" benchmarks/records.py --worst 3 "$out"; }
run_ncu() {
  local case status=0
  while read -r case; do
    echo "== $case"
    # A few launches in mid-sequence.
    # shellcheck disable=SC2086
    "$ncu" --kernel-name 'regex:step|persistent' --launch-skip 20 --launch-count 2 \
      --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats \
      --section MemoryWorkloadAnalysis "$python" -m rnnfast bench $case --device cuda --seconds 0.01 || status=1
  done < <(worst_cases)
  return $status
}

# ---- the run --------------------------------------------------------------------------------------------------------

# What `timeout` sends first. On Ctrl-C the suites write what they have; programs in the background do not hear it.
signal_of() { case $1 in tests | sanitizer) echo TERM ;; *) echo INT ;; esac; }

# How the time is shared out.
share_of() {
  case $1 in
    tests) echo 22 ;;
    build | sanitizer) echo 11 ;;
    grid) echo 8 ;;
    *) echo 4 ;;
  esac
}

started=$SECONDS
failed=0
table=$work/table
printf '%-11s %-9s %8s  %s\n' stage outcome seconds notes > "$table"
run_stage() {
  local stage=$1 kind=$1 part reason outcome=ok note= code=0 begin=$SECONDS
  case $stage in flashrnn | grid | models) kind=suite ;; esac
  local log=$work/$stage.log left other shares=0
  echo "--- $stage"
  for other in $waiting; do shares=$((shares + $(share_of "$other"))); done
  waiting=${waiting#"$stage"}
  waiting=${waiting# }
  # Ten seconds stay for the table.
  left=$((budget - (SECONDS - started) - 10))
  limit=$((left * $(share_of "$stage") / shares))
  reason=$("why_not_$kind")
  if [[ -n $reason ]]; then
    outcome=skipped note=$reason
    echo "skipped: $reason" > "$log"
  elif ((limit < 10)); then
    outcome=skipped note="no time left of $budget s (GPU_CHECK_STAGES runs the rest)"
    echo "skipped: $note" > "$log"
  else
    # The stage in a shell of its own, so that timeout can end it with all that it started.
    limit=$limit stage=$stage timeout -s "$(signal_of "$stage")" -k 8 "$limit" bash -c "$definitions; run_$kind $stage" \
      > "$log" 2>&1
    code=$?
    note=$(last_line "$log")
    for part in "$work/$stage"-*.part; do
      [[ -e $part ]] && { echo "== $(basename "$part" .part)"; tail -c 300000 "$part"; } >> "$work/$stage.parts"
    done
    case $code in
      0) ;;
      124 | 137) outcome=TIMEOUT failed=1 note="after $limit s: $note" ;;
      *) outcome=FAILED failed=1 note="status $code: $note" ;;
    esac
  fi
  tail -n 8 "$log" | tr -cd '\11\12\40-\176' | cut -c 1-160
  [[ -e $work/$stage.parts ]] && cat "$work/$stage.parts" >> "$log"
  printf '%-11s %-9s %8d  %s\n' "$stage" "$outcome" $((SECONDS - begin)) "$note" >> "$table"
}
definitions=$(declare -p root out device work python capability arch nvcc sanitizer ncu; echo 'children=()'; declare -f)

about=$work/about
{
  date -u +%Y-%m-%dT%H:%M:%SZ
  echo "commit $(git rev-parse --short=12 HEAD 2> /dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,compute_cap,driver_version,clocks.max.sm,power.limit --format=csv 2> /dev/null || echo "no nvidia-smi"
  if [[ -n $nvcc ]]; then "$nvcc" --version | grep release; else echo "no nvcc"; fi
  if [[ -n $python ]]; then "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)'; fi
  echo "compute-sanitizer: ${sanitizer:-none}; ncu: ${ncu:-none}"
} > "$about" 2>&1
cat "$about"

waiting=$stages
for stage in $stages; do run_stage "$stage"; done

# ---- what stays -----------------------------------------------------------------------------------------------------

# A file of all logs, each cut to its last megabyte.
for log in "$about" "$work"/*.log; do
  [[ -e $log ]] || continue
  echo "==================== $(basename "$log" .log)"
  tail -c 1000000 "$log"
done > "$out/logs.txt"
{
  cat "$about"
  echo
  cat "$table"
  if [[ -n $python ]]; then
    echo
    "$python" benchmarks/records.py "$out"
  fi
} > "$out/table.txt" 2>&1
find "$out" -maxdepth 1 -name '*.jsonl' -empty -delete
echo
cat "$out/table.txt"
exit $failed
