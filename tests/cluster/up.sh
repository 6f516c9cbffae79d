#!/usr/bin/env bash
# Start a one-node Kubernetes cluster with real pods, CoreDNS and the KubeRay operator: make what is
# missing, then start it. Needs root. Run it again to start whatever has ended.
# TIDEGATE_CLUSTER_PARTS=control starts the control plane alone and `api` only the API server: these need
# no root, and pods in them never run.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

begin=$SECONDS
[[ $PARTS != all || $(id -u) == 0 ]] || die "run as root: the cluster has real pods, mounts and networks"
"$HERE/packages.sh"
# What is missing is told before a quarter of an hour of building, not after it.
[[ $PARTS != all ]] || "$HERE/environment.sh" --check >/dev/null
"$HERE/build.sh"
if [[ $PARTS == all ]]; then
  environments=$("$HERE/environment.sh")
  archive=$("$HERE/image.sh")
fi
made=$((SECONDS - begin))

mkdir -p "$STATE"
[[ -O $STATE ]] || die "$STATE belongs to someone else"
chmod 700 "$STATE"
mkdir -p "$RUN" "$LOG" "$PKI" "$ETC"
export PATH=$BIN:$PATH
begin=$SECONDS

# ---- keys -------------------------------------------------------------------
key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }

issue() { # issue NAME COMMON_NAME [ORGANIZATION [ALT_NAMES]]
  [[ ! -s $PKI/$1.crt ]] || return 0
  local subject="/CN=$2"
  [[ -z ${3:-} ]] || subject="/O=$3$subject"
  key "$PKI/$1.key"
  {
    echo "extendedKeyUsage=serverAuth,clientAuth"
    [[ -z ${4:-} ]] || echo "subjectAltName=$4"
  } >"$PKI/$1.ext"
  openssl req -new -key "$PKI/$1.key" -subj "$subject" |
    openssl x509 -req -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial -days 30 \
      -extfile "$PKI/$1.ext" -out "$PKI/$1.crt" 2>/dev/null
}

kubeconfig() { # kubeconfig NAME FILE
  put "$2" <<END
apiVersion: v1
kind: Config
current-context: tidegate-test
contexts: [{name: tidegate-test, context: {cluster: tidegate-test, user: $1}}]
clusters:
- name: tidegate-test
  cluster:
    server: https://$API_HOST:$API_PORT
    certificate-authority-data: $(base64 -w0 "$PKI/ca.crt")
users:
- name: $1
  user:
    client-certificate-data: $(base64 -w0 "$PKI/$1.crt")
    client-key-data: $(base64 -w0 "$PKI/$1.key")
END
  chmod 600 "$2"
}

if [[ ! -s $PKI/ca.crt ]]; then
  key "$PKI/ca.key"
  openssl req -x509 -new -key "$PKI/ca.key" -subj /CN=tidegate-test-ca -days 30 -out "$PKI/ca.crt"
fi
[[ -s $PKI/sa.key ]] || key "$PKI/sa.key"
names=DNS:localhost,IP:127.0.0.1,IP:$API_HOST,IP:${SVC_CIDR%.*}.1
for suffix in '' .default .default.svc .default.svc.cluster.local; do names+=,DNS:kubernetes$suffix; done
issue apiserver kube-apiserver '' "$names"
issue admin admin system:masters
issue kubelet-client kube-apiserver-kubelet-client system:masters
kubeconfig admin "$KUBECONFIG_FILE"
if [[ $PARTS != api ]]; then
  issue kcm system:kube-controller-manager
  issue scheduler system:kube-scheduler
  for name in kcm scheduler; do kubeconfig "$name" "$ETC/$name.kubeconfig"; done
fi
if [[ $PARTS == all ]]; then
  issue kubelet-server "$NODE" '' "DNS:$NODE,IP:$API_HOST"
  issue node "system:node:$NODE" system:nodes
  issue proxy system:kube-proxy
  for name in node proxy; do kubeconfig "$name" "$ETC/$name.kubeconfig"; done
fi

# ---- the node's ground: source, network, container runtime ------------------
if [[ $PARTS == all ]]; then
  "$HERE/source.sh"
  source "$HERE/node.sh"
fi

# ---- control plane ----------------------------------------------------------
start etcd "$BIN/etcd" --data-dir "$LIVE/etcd" --unsafe-no-fsync --log-level warn \
  --listen-client-urls "http://127.0.0.1:$ETCD_PORT" --advertise-client-urls "http://127.0.0.1:$ETCD_PORT" \
  --listen-peer-urls "http://127.0.0.1:$((ETCD_PORT + 1))" \
  --initial-advertise-peer-urls "http://127.0.0.1:$((ETCD_PORT + 1))" \
  --initial-cluster "default=http://127.0.0.1:$((ETCD_PORT + 1))"
flags=(--advertise-address "$API_HOST")
[[ $PARTS == all ]] || flags=(--endpoint-reconciler-type none)
start apiserver env GOMEMLIMIT=1GiB "$BIN/kube-apiserver" "${flags[@]}" \
  --etcd-servers "http://127.0.0.1:$ETCD_PORT" --bind-address "$API_HOST" --secure-port "$API_PORT" \
  --tls-cert-file "$PKI/apiserver.crt" --tls-private-key-file "$PKI/apiserver.key" \
  --client-ca-file "$PKI/ca.crt" --cert-dir "$LIVE/apiserver" \
  --kubelet-client-certificate "$PKI/kubelet-client.crt" \
  --kubelet-client-key "$PKI/kubelet-client.key" --kubelet-certificate-authority "$PKI/ca.crt" \
  --kubelet-preferred-address-types InternalIP \
  --service-account-issuer https://kubernetes.default.svc.cluster.local \
  --service-account-key-file "$PKI/sa.key" --service-account-signing-key-file "$PKI/sa.key" \
  --service-cluster-ip-range "$SVC_CIDR" --authorization-mode Node,RBAC \
  --enable-admission-plugins NodeRestriction --allow-privileged=true
if [[ $PARTS == all ]]; then import_images "$archive"; fi
wait_for 90 apiserver kc get --raw /readyz
if [[ $PARTS != api ]]; then
  start kcm "$BIN/kube-controller-manager" --kubeconfig "$ETC/kcm.kubeconfig" --leader-elect=false \
    --service-account-private-key-file "$PKI/sa.key" --root-ca-file "$PKI/ca.crt" \
    --cluster-signing-cert-file "$PKI/ca.crt" --cluster-signing-key-file "$PKI/ca.key" \
    --use-service-account-credentials=true --secure-port 0
  start scheduler "$BIN/kube-scheduler" --kubeconfig "$ETC/scheduler.kubeconfig" --leader-elect=false \
    --secure-port 0
fi

# ---- node and add-ons -------------------------------------------------------
if [[ $PARTS == all ]]; then
  start_node
  say "node ready after $((SECONDS - begin))s"
  start_addons
fi
for file in "$RUN"/*.pid; do
  name=$(basename "$file" .pid)
  alive "$name" || die "$name ended: see $LOG/$name.log"
done

# ---- what the tests ask -----------------------------------------------------
put "$FACTS_FILE" <<END
{"parts": "$PARTS", "kubeconfig": "$KUBECONFIG_FILE", "programs": "$BIN", "logs": "$LOG",
 "node": "$NODE", "node_address": "$API_HOST", "registry": "$TIDEGATE_REGISTRY", "tag": "$TIDEGATE_TAG",
 "valkey_image": "$IMAGE_VALKEY", "kuberay_version": "$KUBERAY_VERSION"}
END
say "up after $((SECONDS - begin))s, and ${made}s to make what was missing; for kubectl and helm:"
say "export KUBECONFIG=$KUBECONFIG_FILE PATH=$BIN:\$PATH"
