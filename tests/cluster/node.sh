# shellcheck shell=bash
# The node's half of up.sh: bridge, containerd, kubelet, kube-proxy, CoreDNS, KubeRay. Sourced, never run.

# ---- what the machine had before, for down.sh -------------------------------
if [[ ! -e $RUN/sysctl.before ]]; then
  for name in net/ipv4/ip_forward net/bridge/bridge-nf-call-iptables vm/overcommit_memory \
    vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys \
    kernel/keys/root_maxbytes; do
    [[ ! -r /proc/sys/$name ]] || printf '%s %s\n' "$name" "$(cat "/proc/sys/$name")"
  done >"$RUN/sysctl.before"
  for name in /var/lib/kubelet /var/lib/kubelet/device-plugins /var/lib/cni /var/lib/cni/results \
    /var/log/containers /run/containerd /run/containerd/s; do
    [[ -e $name ]] || echo "$name"
  done >"$RUN/folders.new"
fi

# ---- network: a bridge whose address is the node, and masquerading ----------
if ! ip link show "$BRIDGE" >/dev/null 2>&1; then
  ip link add "$BRIDGE" type bridge
  ip addr add "$API_HOST/${POD_CIDR#*/}" dev "$BRIDGE"
  ip link set "$BRIDGE" up
fi
echo 1 >/proc/sys/net/ipv4/ip_forward
# Answers of a Service's pod to a pod on the same bridge must pass through nat.
[[ ! -e /proc/sys/net/bridge/bridge-nf-call-iptables ]] ||
  echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables
nft -f - <<END
table ip $NFT_TABLE
delete table ip $NFT_TABLE
table ip $NFT_TABLE {
  chain postrouting {
    type nat hook postrouting priority srcnat;
    ip saddr $POD_CIDR ip daddr != $POD_CIDR ip daddr != 224.0.0.0/4 masquerade
  }
}
END
mkdir -p "$LIVE/cni/conf"
put "$LIVE/cni/conf/10-bridge.conflist" <<END
{"cniVersion": "1.0.0", "name": "$NFT_TABLE", "plugins": [
  {"type": "bridge", "bridge": "$BRIDGE", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$LIVE/cni/ipam",
    "ranges": [[{"subnet": "$POD_CIDR"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
END

# ---- container runtime ------------------------------------------------------
# Every container sees Tidegate's environments and source read-only at /opt/tidegate, as if its image had
# them. Below Kubernetes, so that no manifest of the product carries a mount that only tests need.
cp -rT "$CHECKOUT/platform/tidegate/demo/weights" "$LIVE/demo"
chmod -R u=rwX,go=rX "$LIVE/demo"
mounts() {
  printf '%s\n' "$environments"
  echo "source $LIVE/source"
  echo "demo $LIVE/demo"
}
"$BIN/ctr" oci spec | "$PYTHON" -c '
import json, sys
spec = json.load(sys.stdin)
spec["process"].pop("rlimits", None)  # as many open files as the machine allows
for line in sys.argv[1].splitlines():
    name, folder = line.split()
    spec["mounts"].append({"destination": f"/opt/tidegate/{name}", "source": folder, "type": "bind",
                           "options": ["rbind", "ro", "nosuid", "nodev"]})
print(json.dumps(spec))' "$(mounts)" >"$ETC/base-spec.json"
put "$ETC/containerd.toml" <<END
version = 3
root = "$LIVE/containerd/root"
state = "$LIVE/containerd/state"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "$RUN/containerd.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "$IMAGE_PAUSE"
[plugins."io.containerd.cri.v1.runtime"]
  # The machine may lack CAP_SYS_RESOURCE, which lowering oom_score_adj needs.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "$LIVE/cni/conf"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "$ETC/base-spec.json"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      SystemdCgroup = false
      Root = "$LIVE/containerd/runc"
END
start containerd "$BIN/containerd" -c "$ETC/containerd.toml"

import_images() { # import_images ARCHIVE
  local ctr=("$BIN/ctr" -a "$RUN/containerd.sock" -n k8s.io)
  wait_for 60 containerd "${ctr[@]}" version
  [[ $(cat "$ETC/imported" 2>/dev/null) != "$1" ]] || return 0
  "${ctr[@]}" images import "$1" >"$LOG/import.log" 2>&1 || die "cannot import the images: see $LOG/import.log"
  echo "$1" >"$ETC/imported"
}

start_node() {
  put "$ETC/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $API_HOST
healthzBindAddress: 127.0.0.1
failCgroupV1: false
cgroupDriver: cgroupfs
failSwapOn: false
makeIPTablesUtilChains: false
containerRuntimeEndpoint: unix://$RUN/containerd.sock
tlsCertFile: $PKI/kubelet-server.crt
tlsPrivateKeyFile: $PKI/kubelet-server.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
clusterDomain: cluster.local
clusterDNS: [$DNS_IP]
resolvConf: /etc/resolv.conf
podLogsDir: $LOG/pods
volumePluginDir: $LIVE/volume-plugins
maxPods: 60
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
END
  put "$ETC/proxy.yaml" <<END
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: $ETC/proxy.kubeconfig}
hostnameOverride: $NODE
clusterCIDR: $POD_CIDR
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
END
  start kubelet "$BIN/kubelet" --config "$ETC/kubelet.yaml" --kubeconfig "$ETC/node.kubeconfig" \
    --root-dir "$LIVE/kubelet" --hostname-override "$NODE" --node-ip "$API_HOST" \
    --cert-dir "$LIVE/kubelet-pki"
  start proxy "$BIN/kube-proxy" --config "$ETC/proxy.yaml"
  wait_for 60 node kc get "node/$NODE"
  kc wait --for=condition=Ready "node/$NODE" --timeout=60s >/dev/null
}

# There is no provisioner: claims bind to these, each used once in the cluster's life. "local" volumes and
# not "hostPath" ones, because fsGroup acts on them.
volumes() {
  cat <<END
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: standard, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
END
  local number
  for number in $(seq 24); do
    mkdir -p "$LIVE/volumes/$number"
    cat <<END
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: local-$number}
spec:
  capacity: {storage: 20Gi}
  accessModes: [ReadWriteOnce, ReadWriteMany]
  storageClassName: standard
  persistentVolumeReclaimPolicy: Retain
  local: {path: "$LIVE/volumes/$number"}
  nodeAffinity:
    required:
      nodeSelectorTerms:
      - matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [$NODE]}]
END
  done
}

start_addons() {
  wait_for 30 "default service account" kc -n kube-system get serviceaccount default
  sed -e "s|@IMAGE@|$IMAGE_COREDNS|; s|@DNS_IP@|$DNS_IP|" "$HERE/coredns.yaml" |
    kc apply --server-side -f - >/dev/null
  kc apply --server-side -f "$HERE/admission.yaml" >/dev/null
  volumes | kc apply --server-side -f - >/dev/null
  rm -rf "$ETC/kuberay"
  mkdir -p "$ETC/kuberay"
  cp -r "$BIN/kuberay-config" "$ETC/kuberay/config"
  rm -rf "$ETC/kuberay/config/crd"
  put "$ETC/kuberay/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: kuberay-system
resources: [namespace.yaml, config/rbac, config/manager]
images: [{name: kuberay/operator, newName: "${IMAGE_KUBERAY%:*}", newTag: "${IMAGE_KUBERAY##*:}"}]
patches:
- target: {kind: Deployment, name: kuberay-operator}
  patch: |
    - {op: replace, path: /spec/template/spec/containers/0/imagePullPolicy, value: Never}
    - {op: replace, path: /spec/template/spec/containers/0/resources, value: {requests: {cpu: 50m, memory: 64Mi}, limits: {cpu: "1", memory: 512Mi}}}
END
  put "$ETC/kuberay/namespace.yaml" <<END
apiVersion: v1
kind: Namespace
metadata: {name: kuberay-system}
END
  # Server-side: the definitions are too big for the annotation that plain apply writes. Not through
  # kustomize: that takes 20 seconds with them.
  kc apply --server-side --validate=false -f "$BIN/kuberay-config/crd/bases" >/dev/null
  kc kustomize "$ETC/kuberay" | kc apply --server-side -f - >/dev/null
  kc -n kube-system rollout status deployment/coredns --timeout=120s >/dev/null
  kc -n kuberay-system rollout status deployment/kuberay-operator --timeout=120s >/dev/null
}
