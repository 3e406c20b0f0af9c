#!/usr/bin/env bash
# Train on N ranks of this machine: launch/local.sh N [--max-restarts K] RUN.toml [section.key=value ...]
set -euo pipefail
usage() {
  echo "usage: $0 N [--max-restarts K] RUN.toml [section.key=value ...], with N ranks, at least 1" >&2
  exit 2
}
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || usage
ranks=$1 restarts=0
shift
if [[ $1 == --max-restarts ]]; then # how often torchrun starts all ranks again after one has failed
  [[ $# -ge 3 && $2 =~ ^[0-9]+$ ]] || usage
  restarts=$2
  shift 2
fi
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" runtime
if [[ -z ${OMP_NUM_THREADS:-} ]]; then # torchrun would give each rank one thread, and say so
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} # all ranks are here, and a machine's own name need not resolve
# A mistake in the run is one sentence and status 2 here; from within torchrun it would be status 1 under a traceback.
"$PYTHON" -P -m ep_engine.cli train --check-for "$ranks" "$@"
exec "$PYTHON" -P "$ROOT/launch/torchrun.py" --standalone --nproc-per-node "$ranks" --max-restarts "$restarts" \
  -m ep_engine.cli train "$@"
