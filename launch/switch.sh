# shellcheck shell=bash
# Started by nodes.sh as the first process of new network, mount and PID namespaces: the network, the agents, the count.
#   switch.sh NODES BANDWIDTH RESTARTS TORCHRUN_ARGUMENTS...
#
# These namespaces hold a bridge; a node is a network namespace whose eth0 leads to a port of it. tbf shapes both ends of
# the link, so each direction has the bandwidth. Nodes reach one another and nothing else.
set -euo pipefail
trap 'exit 143' TERM
nodes=$1 bandwidth=$2 restarts=$3
shift 3
job=$(</proc/sys/kernel/random/uuid)
join=${EP_JOIN_SECONDS:-120}
first_address=101 # three digits for all: torchrun orders nodes by the text of their addresses
agents=() replaced=() sent=() received=() most_sent=() most_received=()

plug_in() {
  local node=$1
  # A burst of more than 32 kB lets small messages pass unshaped.
  local shaped=(root tbf rate "$bandwidth" burst 32kb latency 5ms)
  ip netns add "node$node"
  ip link add "port$node" type veth peer name eth0 netns "node$node"
  ip link set "port$node" master switch up
  ip -n "node$node" address add "10.0.0.$((first_address + node))/24" dev eth0
  ip -n "node$node" link set eth0 up
  ip -n "node$node" link set lo up
  tc qdisc add dev "port$node" "${shaped[@]}"
  tc -n "node$node" qdisc add dev eth0 "${shaped[@]}"
  printf '%s10.0.0.%d node%d\n' '' $((first_address + node)) "$node" ::ffff: $((first_address + node)) "$node" >>/run/netns/hosts
}

# start NODE TORCHRUN_ARGUMENTS...: all nodes have one host name, so torchrun must be told which of them it is on; gloo
# would settle on 127.0.0.1.
start() {
  local node=$1
  GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 ip netns exec "node$node" \
    "$PYTHON" -P "${BASH_SOURCE[0]%/*}/torchrun.py" --nnodes "$nodes" --max-restarts "$restarts" \
    --rdzv-backend c10d --rdzv-endpoint "10.0.0.$first_address:29500" --rdzv-id "$job" \
    --local-addr "10.0.0.$((first_address + node))" \
    --rdzv-conf "is_host=$((node == 0)),join_timeout=$join,read_timeout=$join" "${@:2}" &
  agents[node]=$!
}

# Bytes of every node so far, as its port counts them: what the port receives, the node has sent.
count() {
  local name in out node
  while read -r name in _ _ _ _ _ _ _ out _; do
    [[ $name == port* ]] || continue
    node=${name//[a-z:]/}
    sent[node]=$in received[node]=$out
  done </proc/net/dev
  now=${EPOCHREALTIME//[.,]/} # microseconds, so that bits over it are Mbit/s
}

count_a_second() {
  local sent_before=("${sent[@]}") received_before=("${received[@]}") before=$now node rate
  count
  for ((node = 0; node < nodes; node++)); do
    rate=$(((sent[node] - sent_before[node]) * 8 / (now - before)))
    ((rate < ${most_sent[node]:-0})) || most_sent[node]=$rate
    rate=$(((received[node] - received_before[node]) * 8 / (now - before)))
    ((rate < ${most_received[node]:-0})) || most_received[node]=$rate
  done
}

# shellcheck disable=SC2329 # called by trap
report() {
  local node
  count
  echo "goodput over links of $bandwidth in $(((now - started) / 1000000)) s: bytes that passed, headers included" >&2
  for ((node = 0; node < nodes; node++)); do
    printf 'node %d: %s %d kB (%d Mbit/s on average, %d in the busiest second), %s %d kB (%d, %d)\n' "$node" \
      sent $((sent[node] / 1000)) $((sent[node] * 8 / (now - started))) "${most_sent[node]:-0}" \
      received $((received[node] / 1000)) $((received[node] * 8 / (now - started))) "${most_received[node]:-0}" >&2
  done
}

mkdir -p /run/netns
mount -t tmpfs netns /run/netns # so that the names of the nodes are of this run alone
ip link set lo up
ip link add switch type bridge
ip link set switch up
echo "127.0.0.1 localhost" >/run/netns/hosts
for ((node = 0; node < nodes; node++)); do plug_in "$node"; done
mount --bind /run/netns/hosts /etc/hosts # torch warns of every address without a name
count
started=$now
trap report EXIT
for ((node = 0; node < nodes; node++)); do start "$node" "$@"; done

status=0 deadline=$((1 << 62))
while ((${#agents[@]} && SECONDS < deadline)); do
  sleep 1
  count_a_second
  for node in "${!agents[@]}"; do
    ! kill -0 "${agents[node]}" 2>/dev/null || continue
    ended=0
    wait "${agents[node]}" || ended=$?
    unset "agents[node]"
    ((ended)) || continue
    echo "node $node: torchrun ended with status $ended" >&2
    ip netns pids "node$node" | xargs --no-run-if-empty kill -KILL || true # ranks outlive a killed torchrun
    # Status 1 is its own last word. Killed, it is a machine that was lost, and another comes in its place; but with the
    # first one goes what all meet at.
    if ((ended > 128 && node > 0 && ${replaced[node]:-0} < restarts)); then
      replaced[node]=$((${replaced[node]:-0} + 1))
      echo "node $node: started again (${replaced[node]} of $restarts)" >&2
      start "$node" "$@"
    elif ((!status)); then
      status=$ended deadline=$((SECONDS + 10)) # in which the others can say what they saw
    fi
  done
done
((${#agents[@]} == 0)) || echo "nodes ${!agents[*]} still ran and were stopped" >&2
exit "$status"
