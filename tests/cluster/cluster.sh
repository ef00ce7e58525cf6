#!/bin/bash
# A Kubernetes cluster of two nodes on one machine, without a container engine and without kube-proxy: `cargo xtask cluster`.
#
#   cluster.sh up              the machines below, each in a network namespace of its own, joined by a bridge
#   cluster.sh in MACHINE ...  a command in one of them
#   cluster.sh kubectl ...     kubectl, as the administrator
#   cluster.sh down            ends all of it and leaves nothing; does nothing where there is nothing
#
#   affinity-cp        API server, controllers, scheduler    198.51.100.1        fd00:c5::1
#   affinity-n1, -n2   nodes, shaped as kind's               198.51.100.11, .12  fd00:c5::11, ::12
#   affinity-client    outside of the cluster                198.51.100.100      fd00:c5::100
#   affinity-client2   the same                              198.51.100.101      fd00:c5::101
#
# Pods of node N have 10.244.10N.0/24 and fd00:10:244:10N::/64, services 10.96.0.0/16 and fd00:10:96::/112. The machine's own
# interfaces are left alone. Environment: STATE (where everything is written), BIN (Kubernetes' programs), SYSTEM (where
# containerd, runc and the CNI plugins are unpacked), IMAGES (archives for every node, separated by blanks).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${STATE:?}"
NODES="1 2"

log() { echo "cluster: $*" >&2; }
# The process that is everything else's parent in a machine, by its id out here; nothing where it is not running. After a
# reboot an old id may be somebody else's, but the namespace is not there.
init() {
  local pid
  pid=$(cat "$STATE/$1/init.pid" 2>/dev/null) || return 0
  if [ "$(stat -Lc %i "/run/netns/affinity-$1" 2>/dev/null)" = "$(stat -Lc %i "/proc/$pid/ns/net" 2>/dev/null)" ]; then
    echo "$pid"
  fi
}

plug() { # MACHINE HOST-PART: a namespace with one interface at the bridge
  local ns=affinity-$1
  ip netns add "$ns"
  ip -n "$ns" link set lo up
  ip -n affinity-cp link add "to-$1" type veth peer name eth0 netns "$ns"
  ip -n affinity-cp link set "to-$1" master segment up
  ip -n "$ns" addr add "198.51.100.$2/24" dev eth0
  ip -n "$ns" addr add "fd00:c5::$2/64" dev eth0 nodad
  ip -n "$ns" link set eth0 up
  ip -n "$ns" route add default via 198.51.100.1
  ip -n "$ns" -6 route add default via fd00:c5::1
}

network() {
  local n ns
  ip netns add affinity-cp
  ip -n affinity-cp link set lo up
  ip -n affinity-cp link add segment type bridge
  ip -n affinity-cp addr add 198.51.100.1/24 dev segment
  ip -n affinity-cp addr add fd00:c5::1/64 dev segment nodad
  ip -n affinity-cp link set segment up
  plug client 100
  plug client2 101
  for n in $NODES; do plug "n$n" "1$n"; done
  # What a CNI plugin for several nodes does beside what the plugins on each node do.
  for ns in cp n1 n2; do
    nsenter --net="/run/netns/affinity-$ns" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
    for n in $NODES; do
      [ "$ns" = "n$n" ] || {
        ip -n "affinity-$ns" route add "10.244.10$n.0/24" via "198.51.100.1$n"
        ip -n "affinity-$ns" -6 route add "fd00:10:244:10$n::/64" via "fd00:c5::1$n"
      }
    done
  done
}

boot() { # MACHINE SCRIPT VARIABLE=VALUE...: its init, by whose end the kernel ends everything in it
  local machine=$1 script=$2
  shift 2
  mkdir -p "$STATE/$machine"
  env "$@" STATE="$STATE/$machine" PKI="$STATE/pki" setsid nohup nsenter --net="/run/netns/affinity-$machine" \
    "$here/$script" > "$STATE/$machine/init.log" 2>&1 < /dev/null &
}

# Waits, and gives up when a machine has ended or said that it failed.
until_ok() { # WHAT SECONDS COMMAND...
  local what=$1 machine end=$((SECONDS + $2))
  shift 2
  until "$@" > /dev/null 2>&1; do
    for machine in cp n1 n2; do
      if [ -e "$STATE/$machine/failed" ]; then
        log "$machine: $(cat "$STATE/$machine/failed")"
        return 1
      fi
    done
    [ $SECONDS -lt $end ] || { log "$what: not in time; logs are under $STATE/*/log"; return 1; }
    sleep 0.1
  done
}

kubectl() { nsenter --net=/run/netns/affinity-cp "$BIN/kubectl" --kubeconfig "$STATE/admin.kubeconfig" "$@"; }

up() {
  local n
  : "${BIN:?}" "${SYSTEM:?}" "${IMAGES:?}"
  down
  mkdir -p "$STATE"
  chmod 700 "$STATE"
  network
  STATE=$STATE "$here/certificates.sh"
  boot cp control-plane.sh
  # Their containers' system comes up meanwhile.
  for n in $NODES; do
    boot "n$n" node.sh NODE="n$n" NODE_IP="198.51.100.1$n,fd00:c5::1$n" \
      POD_CIDR="10.244.10$n.0/24,fd00:10:244:10$n::/64" ZONE="zone-$n"
  done
  until_ok "the API server" 180 kubectl get --raw /readyz
  until_ok "the controllers" 60 kubectl -n default get serviceaccount default
  kubectl apply -f "$here/dns.yaml" > /dev/null
  for n in $NODES; do
    until_ok "node n$n" 180 kubectl get node "n$n"
    kubectl patch node "n$n" --type merge \
      -p "{\"spec\":{\"podCIDR\":\"10.244.10$n.0/24\",\"podCIDRs\":[\"10.244.10$n.0/24\",\"fd00:10:244:10$n::/64\"]}}" > /dev/null
  done
  until_ok "ready nodes" 180 kubectl wait --for=condition=Ready nodes --all --timeout=1s
}

down() {
  local machine pid ns
  for machine in n1 n2 cp; do
    pid=$(init "$machine")
    [ -z "$pid" ] || kill -9 "$pid"
  done
  for machine in n1 n2 cp; do
    ns=/run/netns/affinity-$machine
    [ -e "$ns" ] || continue
    # Everything in the machine's own process namespace goes with its init; what was put into it from outside does not.
    for _ in $(seq 100); do
      [ -n "$(ip netns pids "affinity-$machine")" ] || break
      ip netns pids "affinity-$machine" | xargs -r kill -9 2>/dev/null || true
      sleep 0.05
    done
  done
  for ns in cp n1 n2 client client2; do ip netns del "affinity-$ns" 2>/dev/null || true; done
  for _ in $(seq 50); do
    find /sys/fs/cgroup -mindepth 1 -depth -type d -path '*/affinity-n[12]*' -exec rmdir {} + 2>/dev/null || true
    [ -n "$(find /sys/fs/cgroup -type d -name 'affinity-n[12]' -print -quit)" ] || break
    sleep 0.1
  done
  rm -rf "$STATE"
}

case ${1:-} in
  up) up ;;
  down) down ;;
  in)
    machine=${2:?a machine: cp, n1, n2, client or client2}
    shift 2
    [ -e "/run/netns/affinity-$machine" ] || { log "there is no machine $machine: \`cargo xtask cluster up\`"; exit 1; }
    case $machine in
      client*) exec nsenter --net="/run/netns/affinity-$machine" "$@" ;;
      *) exec nsenter --mount --net --cgroup --pid -t "$(init "$machine")" "$@" ;;
    esac
    ;;
  kubectl)
    shift
    [ -e "$STATE/admin.kubeconfig" ] || { log "there is no cluster: \`cargo xtask cluster up\`"; exit 1; }
    exec nsenter --net=/run/netns/affinity-cp "$BIN/kubectl" --kubeconfig "$STATE/admin.kubeconfig" "$@"
    ;;
  *)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
