#!/usr/bin/env bash
# N emulated nodes on this machine, joined by links of a real bandwidth, and a torchrun on each:
#   launch/nodes.sh N --bandwidth 100mbit [--ranks-per-node R] [--max-restarts K] COMMAND...
# COMMAND is what every rank runs: ep-engine train RUN.toml ..., -m MODULE ..., SCRIPT.py ..., or a program.
set -euo pipefail

usage() {
  echo "usage: $0 N --bandwidth 100mbit [--ranks-per-node 1] [--max-restarts 0] COMMAND..., with 1 to 99 nodes, a" \
    "bandwidth in kbit, mbit or gbit, and as COMMAND what every rank runs: ep-engine train RUN.toml, -m MODULE, ..." >&2
  exit 2
}

nodes=${1:-} bandwidth='' ranks=1 restarts=0
shift || usage
while [[ ${1:-} == --* ]]; do
  case $1 in
    --bandwidth) bandwidth=${2:-} ;;
    --ranks-per-node) ranks=${2:-} ;;
    --max-restarts) restarts=${2:-} ;;
    *) usage ;;
  esac
  shift 2 || usage
done
[[ $nodes =~ ^[1-9][0-9]?$ && $bandwidth =~ ^[1-9][0-9]*[kmg]bit$ ]] || usage
[[ $ranks =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ && $# -gt 0 ]] || usage

for tool in ip tc unshare setpriv; do
  command -v "$tool" >/dev/null || {
    echo "there is no $tool on PATH; install it (Debian, Ubuntu: apt install iproute2 util-linux)" >&2
    exit 2
  }
done
# Tried, not looked up: root in a container may lack the right to any of this, and a kernel the modules.
unshare --net --mount --pid --fork --mount-proc "$BASH" -c "ip link add type veth && ip link add type bridge &&
  tc qdisc add dev veth0 root tbf rate $bandwidth burst 32kb latency 5ms" 2>/dev/null || {
  echo "namespaces, veth, bridge or tbf cannot be had here; run this as root (in a container: with CAP_SYS_ADMIN and" \
    "CAP_NET_ADMIN) on a kernel that has them" >&2
  exit 2
}
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" runtime

if [[ $1 == ep-engine ]]; then # of this checkout, whatever is on PATH
  set -- -m ep_engine.cli "${@:2}"
fi
if [[ "${*:1:3}" == "-m ep_engine.cli train" ]]; then # a mistake is one sentence and status 2 here, as in local.sh
  "$PYTHON" -P -m ep_engine.cli train --check-for $((nodes * ranks)) --ranks-per-node "$ranks" "${@:4}"
fi
[[ $1 == -m || $1 == *.py ]] || set -- --no-python "$@"
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  export OMP_NUM_THREADS=$(($(nproc) > nodes * ranks ? $(nproc) / (nodes * ranks) : 1))
fi

# All of it lives in namespaces of its own, whose first process is switch.sh. When that ends, or this script does, even by
# SIGKILL, the kernel ends every process in them and takes the network away: there is nothing to clean up.
export PYTHON
setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc \
  "$BASH" "$ROOT/launch/switch.sh" "$nodes" "$bandwidth" "$restarts" --nproc-per-node "$ranks" "$@" &
namespaces=$!

# unshare itself lets SIGTERM pass by. The process that it has started reports and ends at it, unless it is just starting.
stop() {
  trap '' INT TERM HUP
  local first=''
  read -r first <"/proc/$namespaces/task/$namespaces/children" || true
  [[ -z $first ]] || kill -TERM "$first" 2>/dev/null || true
  for _ in {1..50}; do
    kill -0 "$namespaces" 2>/dev/null || exit "$1"
    sleep 0.1
  done
  kill -KILL "$namespaces" 2>/dev/null || true
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP
wait "$namespaces"
