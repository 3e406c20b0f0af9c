#!/usr/bin/env bash
# Compile what only a CUDA build sees, for sm_80 and sm_90, so that it cannot rot where there is no GPU. Needs nvcc;
# a torch without CUDA will do, because csrc/ keeps to torch's stable ABI. The objects are thrown away.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" runtime
cd "$ROOT"

object=$(mktemp --suffix .o)
trap 'rm -f "$object"' EXIT
# Flags as in setup.py; the two architectures are compiled side by side.
flags=(-std=c++20 -O3 --threads 2 -DEP_WITH_CUDA -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc)
for arch in 80 90; do
  flags+=(-gencode "arch=compute_$arch,code=sm_$arch")
done
folders=$("$PYTHON" -c '
import sysconfig
from torch.utils.cpp_extension import include_paths
print(*include_paths(), sysconfig.get_path("include"), sep="\n")')
while read -r folder; do
  flags+=(-isystem "$folder")
done <<<"$folders"

shopt -s nullglob
for source in csrc/cuda/*.cu csrc/bindings/*.cpp; do # the bindings too: half of them is under EP_WITH_CUDA
  echo "nvcc $source"
  nvcc "${flags[@]}" -c "$source" -o "$object"
done
