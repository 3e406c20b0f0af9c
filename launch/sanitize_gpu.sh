#!/usr/bin/env bash
# The CUDA ops under compute-sanitizer: out-of-bounds and misaligned accesses, and races in shared memory. Needs a GPU.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$ROOT"
command -v compute-sanitizer >/dev/null || refuse "there is no compute-sanitizer on PATH; it comes with the CUDA toolkit"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || refuse "torch finds no GPU"
for tool in memcheck racecheck; do
  echo "compute-sanitizer --tool $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest -m gpu tests/test_ops_gpu.py "$@"
done
