#!/usr/bin/env bash
# Train on N ranks of this machine: launch/local.sh N RUN.toml [section.key=value ...]
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N RUN.toml [section.key=value ...], with N ranks, at least 1" >&2
  exit 2
fi
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" runtime
ranks=$1
shift
if [[ -z ${OMP_NUM_THREADS:-} ]]; then # torchrun would give each rank one thread, and say so
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} # all ranks are here, and a machine's own name need not resolve
# A mistake in the run is one sentence and status 2 here; from within torchrun it would be status 1 under a traceback.
"$PYTHON" -P -m ep_engine.cli train --check-for "$ranks" "$@"
exec "$PYTHON" -P -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m ep_engine.cli train "$@"
