# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that source this file use the settings
# Settings and small functions that the cluster's scripts share. Sourced, never run.

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(cd -- "$HERE/../.." && pwd)

# Which parts run: everything; the control plane without a node; or only the API server.
PARTS=${TIDEGATE_CLUSTER_PARTS:-all}

# What takes long to make lies in CACHE, outside the checkout, each thing under a key of all that it is
# made from: a second run makes nothing. What a running cluster writes lies in STATE; its path is short,
# because unix sockets lie in it.
CACHE=${TIDEGATE_CLUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tidegate/cluster}
STATE=${TIDEGATE_CLUSTER_STATE:-/tmp/tidegate-cluster}
if [[ $PARTS != all ]]; then STATE+=-$PARTS; fi
LIVE=$STATE/live
RUN=$LIVE/run
LOG=$LIVE/log
PKI=$LIVE/pki
ETC=$LIVE/etc
KUBECONFIG_FILE=$STATE/kubeconfig
FACTS_FILE=$STATE/facts.json

# Versions. The modules in programs/ pin the same ones, with checksums.
K8S_VERSION=v1.36.3
CONTAINERD_VERSION=v2.2.9
HELM_VERSION=v4.3.1
KWOK_VERSION=v0.8.0
KUBERAY_VERSION=v1.6.1

# Network. The bridge's address is also the node's and the API server's. Without a node the API server
# listens on the loopback device, on ports that leave a whole cluster on the same machine alone.
NODE=node1
BRIDGE=tgc0
POD_CIDR=10.244.0.0/24
SVC_CIDR=10.96.0.0/16
DNS_IP=10.96.0.10
NFT_TABLE=tidegate_cluster
case $PARTS in
all) API_HOST=10.244.0.1 API_PORT=6443 ETCD_PORT=2379 ;;
control) API_HOST=127.0.0.1 API_PORT=6543 ETCD_PORT=2479 ;;
api) API_HOST=127.0.0.1 API_PORT=6643 ETCD_PORT=2579 ;;
*) echo "TIDEGATE_CLUSTER_PARTS is '$PARTS': all, control or api" >&2 && exit 1 ;;
esac

# Image names. All are imported, none is asked of a registry.
IMAGE_PAUSE=localhost/cluster/pause:1
IMAGE_COREDNS=localhost/cluster/coredns:1
IMAGE_KUBERAY=localhost/cluster/kuberay-operator:$KUBERAY_VERSION
# What the chart asks for by default, so that `helm install` needs no values here.
IMAGE_VALKEY=docker.io/valkey/valkey:9.1
TIDEGATE_REGISTRY=localhost/tidegate
TIDEGATE_TAG=$(sed -n 's/^version = "\(.*\)"/\1/p' "$CHECKOUT/pyproject.toml" | head -n 1)

# The system's Python makes the environments and the images' Python runs them: one Debian release.
PYTHON=/usr/bin/python3

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() { say "error: $*"; exit 1; }
sha() { sha256sum | cut -c1-12; }

need() {
  local p
  for p in "$@"; do
    command -v "$p" >/dev/null || die "missing program: $p"
  done
}

kc() { "$BIN/kubectl" --kubeconfig "$KUBECONFIG_FILE" "$@"; }

# Programs: all of this checkout's versions lie in one folder, whose name says which versions.
BIN=$CACHE/bin-$(cat "$HERE"/programs/*/* "$HERE/build.sh" <(declare -p K8S_VERSION CONTAINERD_VERSION \
  HELM_VERSION KWOK_VERSION KUBERAY_VERSION) | sha)
IMAGES=$CACHE/images
ENVIRONMENTS=$CACHE/environments

put() { # put FILE <TEXT   (leaves an unchanged file alone: kube-proxy ends when its own changes)
  local text
  text=$(cat)
  [[ -e $1 && $(cat "$1") == "$text" ]] || printf '%s\n' "$text" >"$1"
}

# A recorded process is its pid and its start time, so that a reused pid is never taken for ours.
start_time() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

alive() { # alive NAME
  local pid born
  [[ -s $RUN/$1.pid ]] || return 1
  read -r pid born <"$RUN/$1.pid"
  [[ -n $born && $(start_time "$pid") == "$born" ]]
}

start() { # start NAME COMMAND...
  local name=$1 pid
  shift
  if alive "$name"; then
    say "$name already runs"
    return
  fi
  setsid nohup nice -n 5 "$@" >>"$LOG/$name.log" 2>&1 </dev/null &
  pid=$!
  printf '%s %s\n' "$pid" "$(start_time "$pid")" >"$RUN/$name.pid"
}

stop() { # stop NAME [SECONDS]
  local name=$1 wait=${2:-10} pid i
  if alive "$name"; then
    read -r pid _ <"$RUN/$name.pid"
    kill "$pid" 2>/dev/null || true
    for ((i = 0; i < wait * 10; i++)); do
      alive "$name" || break
      sleep 0.1
    done
    if alive "$name"; then
      say "$name did not stop in ${wait}s: killing it"
      kill -9 "$pid" 2>/dev/null || true
    fi
  fi
  rm -f "$RUN/$name.pid"
}

wait_for() { # wait_for SECONDS WHAT COMMAND...
  local limit=$1 what=$2 t0=$SECONDS
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((SECONDS - t0 < limit)) || die "$what: not ready after ${limit}s (logs: $LOG)"
    sleep 0.2
  done
}
