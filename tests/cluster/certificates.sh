#!/bin/bash
# The cluster's authority and the certificates of its control plane, in $STATE/pki; and the administrator's kubeconfig.
set -euo pipefail
umask 077
mkdir -p "$STATE/pki"
cd "$STATE/pki"
key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }
certificate() { # NAME SUBJECT [ALTERNATIVE-NAMES]
  key "$1.key"
  openssl req -new -key "$1.key" -subj "$2" -out "$1.csr" 2>/dev/null
  {
    echo keyUsage=digitalSignature
    echo extendedKeyUsage=serverAuth,clientAuth
    [ -z "${3:-}" ] || echo "subjectAltName=$3"
  } > "$1.ext"
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 8)" -days 30 -sha256 \
    -extfile "$1.ext" -out "$1.crt" 2>/dev/null
}
kubeconfig() { # FILE NAME SERVER
  cat > "$1" << K
apiVersion: v1
kind: Config
clusters: [{name: cluster, cluster: {server: "$3", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $2, user: {client-certificate-data: $(base64 -w0 "$2.crt"), client-key-data: $(base64 -w0 "$2.key")}}]
contexts: [{name: cluster, context: {cluster: cluster, user: $2}}]
current-context: cluster
K
}
key ca.key
openssl req -x509 -new -key ca.key -subj /CN=affinity-cluster-ca -days 30 -sha256 -out ca.crt 2>/dev/null
names=DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
names+=,IP:127.0.0.1,IP:::1,IP:10.96.0.1,IP:fd00:10:96::1,IP:198.51.100.1,IP:fd00:c5::1
certificate apiserver /CN=kube-apiserver "$names"
certificate admin /O=system:masters/CN=admin
certificate controllers /CN=system:kube-controller-manager
certificate scheduler /CN=system:kube-scheduler
for n in 1 2; do
  certificate "n$n" "/O=system:nodes/CN=system:node:n$n" "DNS:n$n,IP:198.51.100.1$n,IP:fd00:c5::1$n,IP:127.0.0.1"
  kubeconfig "n$n.kubeconfig" "n$n" https://198.51.100.1:6443
done
openssl genrsa -out sa.key 2048 2>/dev/null
openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
kubeconfig "$STATE/admin.kubeconfig" admin https://198.51.100.1:6443
kubeconfig controllers.kubeconfig controllers https://127.0.0.1:6443
kubeconfig scheduler.kubeconfig scheduler https://127.0.0.1:6443
