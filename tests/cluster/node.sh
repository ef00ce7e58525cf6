#!/bin/bash
# The init of a node, shaped as kind's: its own process, mount, cgroup and network namespaces, with containerd and a kubelet.
# What a DaemonSet sees of the machine under /proc, /run, /var/lib, /etc and the cgroups is this node's alone; there is no BPF
# file system before somebody mounts one. It runs in the machine's network namespace; STATE is its directory.
set -euo pipefail
cgroup2=$(awk '{ for (i = 7; i < NF; i++) if ($i == "-" && $(i + 1) == "cgroup2") { print $5; exit } }' /proc/self/mountinfo)
# Of a machine that has both versions of cgroups.
controllers() { awk '{ for (i = 7; i < NF; i++) if ($i == "-" && $(i + 1) == "cgroup") print $5 }' /proc/self/mountinfo; }
name=affinity-$NODE

if [ -z "${INSIDE:-}" ]; then
  mkdir -p "$cgroup2/$name"
  for c in $(controllers); do mkdir -p "$c/$name"; done
  for f in cpuset.cpus cpuset.mems; do
    [ ! -e "/sys/fs/cgroup/cpuset/$f" ] || cat "/sys/fs/cgroup/cpuset/$f" > "/sys/fs/cgroup/cpuset/$name/$f"
  done
  if [ -z "$(controllers)" ]; then
    for c in $(cat "$cgroup2/cgroup.controllers"); do echo "+$c" > "$cgroup2/cgroup.subtree_control" 2>/dev/null || true; done
  fi
  echo $$ > "$cgroup2/$name/cgroup.procs"
  INSIDE=1 exec unshare --mount --cgroup --pid --fork --kill-child --propagation private "$0"
fi
# Read by the shell itself, and by /proc as it is out there.
read -r pid _ < /proc/self/stat
echo "$pid" > "$STATE/init.pid"
trap 'echo "node.sh failed at line $LINENO" > "$STATE/failed"' ERR
mount -t proc proc /proc
# In the new cgroup namespace a new mount shows this node's part alone.
umount "$cgroup2"
mount -t cgroup2 none "$cgroup2"
kubelet_root=/$name
if [ -z "$(controllers)" ]; then
  # Controllers go to cgroups without processes of their own.
  mkdir -p "$cgroup2/init"
  for p in $(cat "$cgroup2/cgroup.procs"); do echo "$p" > "$cgroup2/init/cgroup.procs" 2>/dev/null || true; done
  for c in $(cat "$cgroup2/cgroup.controllers"); do echo "+$c" > "$cgroup2/cgroup.subtree_control"; done
  kubelet_root=/
fi
while umount /sys/fs/bpf 2>/dev/null; do :; done
mkdir -p "$STATE"/{log,lib,etc,etc-work}
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$STATE/etc,workdir=$STATE/etc-work" /etc
mount --bind "$STATE/lib" /var/lib
mount --bind "$STATE/log" /var/log
mount -t tmpfs tmpfs /run
mount --make-rshared /
mkdir -p /run/netns /var/lib/{kubelet,containerd,cni} /etc/{kubernetes,cni/net.d,containerd}

ranges="" routes=""
for cidr in ${POD_CIDR//,/ }; do
  case $cidr in *:*) default=::/0 ;; *) default=0.0.0.0/0 ;; esac
  ranges+="${ranges:+,}[{\"subnet\":\"$cidr\"}]"
  routes+="${routes:+,}{\"dst\":\"$default\"}"
done
cat > /etc/cni/net.d/10-ptp.conflist << J
{"cniVersion": "0.4.0", "name": "ptp", "plugins": [{"type": "ptp", "ipMasq": false,
 "ipam": {"type": "host-local", "ranges": [$ranges], "routes": [$routes]}}]}
J
cat > /etc/containerd/config.toml << T
version = 2
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  # Lowering it takes CAP_SYS_RESOURCE, which a virtual machine's root may lack.
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$SYSTEM/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "$SYSTEM/usr/sbin/runc"
      SystemdCgroup = false
T
export PATH=$SYSTEM/usr/bin:$SYSTEM/usr/sbin:$PATH
containerd > /var/log/containerd.log 2>&1 < /dev/null &
for _ in $(seq 300); do ctr version > /dev/null 2>&1 && break; sleep 0.1; done
for image in $IMAGES; do ctr -n k8s.io images import "$image" > /dev/null; done

# Where kubeadm has it, and so kind.
install -m 600 "$PKI/$NODE.kubeconfig" /etc/kubernetes/kubelet.conf
cat > /var/lib/kubelet/config.yaml << Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: "::"
healthzBindAddress: 127.0.0.1
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $PKI/$NODE.crt
tlsPrivateKeyFile: $PKI/$NODE.key
failCgroupV1: false
failSwapOn: false
cgroupDriver: cgroupfs
cgroupRoot: $kubelet_root
makeIPTablesUtilChains: false
enforceNodeAllocatable: [none]
oomScoreAdj: 0
clusterDomain: cluster.local
clusterDNS: [10.96.0.10]
resolvConf: ""
localStorageCapacityIsolation: false
evictionHard: {memory.available: "100Mi", nodefs.available: "1%", imagefs.available: "1%"}
nodeStatusUpdateFrequency: 5s
registryPullQPS: 0
serializeImagePulls: false
Y
# Starts it again, as systemd would, but for when a test has stopped it.
while :; do
  [ -e /run/kubelet.stopped ] || "$BIN/kubelet" --config=/var/lib/kubelet/config.yaml \
    --kubeconfig=/etc/kubernetes/kubelet.conf --hostname-override="$NODE" --node-ip="$NODE_IP" \
    --node-labels="topology.kubernetes.io/zone=$ZONE" --v=1 >> /var/log/kubelet.log 2>&1 < /dev/null || true
  sleep 0.5
done &
trap - ERR
# As an init: waits for whatever ends.
while :; do wait -n || true; sleep 0.2; done
