#!/bin/bash
# The init of the control plane's machine: etcd, kube-apiserver, kube-controller-manager, kube-scheduler. It runs in the
# machine's network namespace; STATE is its directory.
set -euo pipefail
if [ -z "${INSIDE:-}" ]; then
  INSIDE=1 exec unshare --mount --pid --fork --kill-child "$0"
fi
# Read by the shell itself, and by /proc as it is out there.
read -r pid _ < /proc/self/stat
echo "$pid" > "$STATE/init.pid"
mount -t proc proc /proc
mkdir -p "$STATE/log"
cd "$PKI"

start() { # NAME ARGUMENTS...
  local name=$1
  shift
  "$BIN/$name" "$@" > "$STATE/log/$name.log" 2>&1 < /dev/null &
}

cat > "$STATE/etcd.yaml" << Y
name: local
data-dir: $STATE/etcd
listen-client-urls: http://127.0.0.1:2379
advertise-client-urls: http://127.0.0.1:2379
listen-peer-urls: http://127.0.0.1:2380
initial-advertise-peer-urls: http://127.0.0.1:2380
initial-cluster: local=http://127.0.0.1:2380
initial-cluster-token: local
initial-cluster-state: new
log-level: warn
unsafe-no-fsync: true
Y
start etcd --config-file="$STATE/etcd.yaml"
# All of them wait for the ones that they need. An address that is not loopback gives `default/kubernetes` its EndpointSlice.
start kube-apiserver --bind-address=:: --secure-port=6443 --advertise-address=198.51.100.1 \
  --etcd-servers=http://127.0.0.1:2379 --service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112 \
  --authorization-mode=Node,RBAC --anonymous-auth=true --allow-privileged=true \
  --client-ca-file=ca.crt --tls-cert-file=apiserver.crt --tls-private-key-file=apiserver.key \
  --service-account-key-file=sa.pub --service-account-signing-key-file=sa.key \
  --service-account-issuer=https://kubernetes.default.svc.cluster.local \
  --api-audiences=https://kubernetes.default.svc.cluster.local \
  --kubelet-client-certificate=admin.crt --kubelet-client-key=admin.key \
  --kubelet-preferred-address-types=InternalIP,Hostname --v=1
for _ in $(seq 1200); do
  "$BIN/kubectl" --kubeconfig controllers.kubeconfig --request-timeout=2s get --raw /readyz > /dev/null 2>&1 && break
  [ "$(jobs -rp | wc -l)" = 2 ] || { tail -n 3 "$STATE"/log/*.log | tee "$STATE/failed"; exit 1; }
  sleep 0.2
done
# Addresses of pods are the network's (cluster.sh), not these controllers' to give.
start kube-controller-manager --bind-address=127.0.0.1 --kubeconfig=controllers.kubeconfig \
  --authentication-kubeconfig=controllers.kubeconfig --authorization-kubeconfig=controllers.kubeconfig \
  --leader-elect=false --use-service-account-credentials=true --service-account-private-key-file=sa.key \
  --root-ca-file=ca.crt --cluster-signing-cert-file=ca.crt --cluster-signing-key-file=ca.key \
  --cluster-cidr=10.244.0.0/16,fd00:10:244::/56 --service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112 \
  --controllers=*,-node-ipam-controller --v=1
start kube-scheduler --bind-address=127.0.0.1 --leader-elect=false --kubeconfig=scheduler.kubeconfig \
  --authentication-kubeconfig=scheduler.kubeconfig --authorization-kubeconfig=scheduler.kubeconfig --v=1
# As an init: waits for whatever ends.
while :; do wait -n || true; sleep 0.2; done
