#!/usr/bin/env bash
# Builds microbench.cu for the card at hand and runs it: JSON lines on stdout. Exit status 3: nvcc or a card is missing.
#   benchmarks/microbench/run.sh [part ...]          the parts: see microbench.cu
#   benchmarks/microbench/run.sh --build-only [9.0a] only compiles, for that compute capability; needs no card
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$here")")
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
[[ -x $nvcc ]] || { echo "microbench: no nvcc: put it on PATH or set CUDA_HOME" >&2; exit 3; }

build_only=
if [[ ${1:-} == --build-only ]]; then
  build_only=1
  arch=${2:-9.0a}
else
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || arch=
  [[ -n $arch ]] || { echo "microbench: no CUDA device (nvidia-smi names none)" >&2; exit 3; }
  # The letter opens what one generation alone has.
  case $arch in 9.0 | 10.0) arch=${arch}a ;; esac
fi
number=${arch//./}
program=$root/build/microbench/microbench-$number
if [[ ! -x $program || -n $(find "$here" "$root/csrc/cuda/primitives" -newer "$program" -type f) ]]; then
  mkdir -p "$(dirname "$program")"
  # What ptxas says of registers and spills stays beside the program.
  "$nvcc" -std=c++20 -O3 -lineinfo --Werror all-warnings -Xcompiler -Wall,-Wextra -I "$root/csrc" \
    -gencode "arch=compute_$number,code=sm_$number" -cudart static -Xptxas -v \
    -o "$program" "$here/microbench.cu" > "$program.log" 2>&1 || { cat "$program.log" >&2; exit 2; }
fi
[[ -n $build_only ]] && { echo "$program"; exit 0; }
exec "$program" "$@"
